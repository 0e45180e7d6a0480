"""Load an adapter onto SDXL, sample from it, and show several side by side.

base           SDXL from a folder, a file or the Hub
adapter_files  what kind of adapter a file or folder holds, and whether it fits a base
load           adapters on and off a pipeline
tokens         new words that come with an adapter
sampling       prompts × seeds -> images, one generator per image
pipelines      a pipeline as the flags of a command say
manifest       names of pictures, the text in each PNG, the list of a folder's pictures
columns        pictures of several models, drawn where they are missing
adapters       `python -m inference.adapters`: look into adapters, convert, resize, merge, extract
adapter_work, adapter_extract, adapter_facts, nora_factors, outline    what it does
figures        what an adapter cost, in words
page, sheet    pictures side by side, as HTML and as one picture
run_page       a run's curves, samples, scores and costs, as HTML; charts: its curves
generate       `python -m inference.generate`: pictures into a folder
gallery        `python -m inference.gallery`: base | adapter | adapter on one page and one sheet
"""

import logging
from importlib import import_module
from typing import Any

# Said while the libraries are imported, about what nothing here needs: transformers about image processors without
# torchvision, xformers about a machine it has no kernels for (`check_xformers` says it to those who ask for xformers).
logging.getLogger("xformers").setLevel(logging.ERROR)
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

# Imported when they are asked for (PEP 562): PyTorch takes seconds, and `--help` of the commands needs none of it.
_MODULES = {
    "FOLDED_WEIGHTS": "methods.components",
    "INNER_WEIGHTS": "methods.components",
    "RUN_RECORD": "methods.components",
    "adapter_components": "methods.components",
    "inspect_adapter": "inference.adapter_files",
    "load_adapter": "inference.load",
    "load_pipeline": "inference.base",
    "set_adapter_scale": "inference.load",
    "swap_adapter": "inference.load",
    "unload_adapters": "inference.load",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
