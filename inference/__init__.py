"""Look at an adapter: load it onto SDXL, sample from it, and set several side by side.

components  which modules carry adapters, their key prefixes, and the file names of a run
load        a base pipeline; adapters on and off it
generate    prompts × seeds -> images, one generator per image; `python -m inference.generate`
gallery     base | adapter | adapter on one page and one sheet; `python -m inference.gallery`
"""

import logging

# Said while the libraries are imported, about what nothing here needs: transformers about image processors without
# torchvision, xformers about a machine it has no kernels for (`check_xformers` says it to those who ask for xformers).
logging.getLogger("xformers").setLevel(logging.ERROR)
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

from inference.components import FOLDED_WEIGHTS, INNER_WEIGHTS, RUN_RECORD, adapter_components  # noqa: E402
from inference.load import (  # noqa: E402
    inspect_adapter,
    load_adapter,
    load_pipeline,
    set_adapter_scale,
    unload_adapters,
)

__all__ = [
    "FOLDED_WEIGHTS",
    "INNER_WEIGHTS",
    "RUN_RECORD",
    "adapter_components",
    "inspect_adapter",
    "load_adapter",
    "load_pipeline",
    "set_adapter_scale",
    "unload_adapters",
]
