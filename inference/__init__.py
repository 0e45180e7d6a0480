"""Look at an adapter: load it onto SDXL, sample from it, and set several side by side.

components     which modules carry adapters, their key prefixes, and the file names of a run
base           SDXL from a folder, a file or the Hub
adapter_files  what kind of adapter a file or folder holds, and whether it fits a base
load           adapters on and off a pipeline
tokens         new words that come with an adapter
generate       prompts × seeds -> images, one generator per image; `python -m inference.generate`
prompts        an instance prompt's subject in words, and the protocols' prompts with it
evaluate       scores of adapters on a subject; `python -m judging.evaluate`
gallery        base | adapter | adapter on one page and one sheet; `python -m inference.gallery`
"""

import logging

# Said while the libraries are imported, about what nothing here needs: transformers about image processors without
# torchvision, xformers about a machine it has no kernels for (`check_xformers` says it to those who ask for xformers).
logging.getLogger("xformers").setLevel(logging.ERROR)
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

from inference.adapter_files import inspect_adapter  # noqa: E402
from inference.base import load_pipeline  # noqa: E402
from inference.load import load_adapter, set_adapter_scale, swap_adapter, unload_adapters  # noqa: E402
from methods.components import FOLDED_WEIGHTS, INNER_WEIGHTS, RUN_RECORD, adapter_components  # noqa: E402

__all__ = [
    "FOLDED_WEIGHTS",
    "INNER_WEIGHTS",
    "RUN_RECORD",
    "adapter_components",
    "inspect_adapter",
    "load_adapter",
    "load_pipeline",
    "set_adapter_scale",
    "swap_adapter",
    "unload_adapters",
]
