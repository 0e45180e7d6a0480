"""NoRA, nested low-rank adaptation (arXiv 2408.10280), as a PEFT method.

Importing this package registers ``NORA`` with PEFT; after that every PEFT, transformers and diffusers call that takes a
config or a saved adapter knows it.
"""

from .registration import ensure_peft_type, register

ensure_peft_type()  # the config names the type when it is constructed, so the type must exist before

from .cache import BasisCache, use_basis_cache  # noqa: E402
from .calibration import calibration_mask, measure_statistics, preprocess_nora  # noqa: E402
from .config import NoraConfig  # noqa: E402
from .files import inner_prefixes, load_inner, read_inner, save_inner  # noqa: E402
from .layer import NoraLinear  # noqa: E402
from .model import NoraModel, check_targets, fold_nora  # noqa: E402
from .parallel import split_over_processes  # noqa: E402
from .version import __version__  # noqa: E402

register(NoraConfig, NoraModel)

__all__ = [
    "BasisCache",
    "NoraConfig",
    "NoraLinear",
    "NoraModel",
    "__version__",
    "calibration_mask",
    "check_targets",
    "fold_nora",
    "inner_prefixes",
    "load_inner",
    "measure_statistics",
    "preprocess_nora",
    "read_inner",
    "save_inner",
    "split_over_processes",
    "use_basis_cache",
]
