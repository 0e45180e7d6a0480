"""The base: SDXL from a folder, a file or the Hub, with another autoencoder, scheduler or a refiner if asked for."""

from __future__ import annotations

import re
import tempfile
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    SchedulerMixin,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import is_xformers_available
from huggingface_hub import is_offline_mode
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextConfig, CLIPTokenizer

from inference.prediction import knows_zero_snr, prediction_of, settle_scheduler
from inference.single_file import ENCODERS, SDXL_CONFIG, check_single_file, is_eight_bit, load_eight_bit
from methods.components import RUN_RECORD
from storage.files import read_json
from storage.text import first_line

BASE_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_base(base: str | Path) -> None:
    """Raise ValueError unless `base` is a whole SDXL folder or `.safetensors` file, or could be a Hub id."""
    path = Path(base)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(
                f"base {base} is a file, but not a .safetensors one: name a diffusers folder or such a file"
            )
        check_single_file(path)
        return
    if not path.exists():
        if _HUB_ID.fullmatch(str(base)) and path.suffix != ".safetensors" and not path.parent.is_dir():
            return
        raise ValueError(
            f"base {base} does not exist (looked from {Path.cwd()}): "
            "name a diffusers folder, a .safetensors file or a Hub id"
        )
    index = path / "model_index.json"
    if not index.is_file():
        if (path / RUN_RECORD).is_file():
            raise ValueError(
                f"base folder {base} is that of a training: name the base that it was trained on here, and this as the "
                "adapter"
            )
        raise ValueError(f"base folder {base} has no model_index.json: it is not a diffusers pipeline folder")
    class_name = read_json(index).get("_class_name")
    if not str(class_name).startswith("StableDiffusionXL"):
        raise ValueError(f"base folder {base} holds a {class_name}, and SDXL (StableDiffusionXLPipeline) is needed")
    missing = [part for part in BASE_PARTS if not _part_is_there(path / part)]
    if missing:
        raise ValueError(f"base folder {base} lacks {', '.join(missing)}: copy or download the whole pipeline folder")


def _part_is_there(folder: Path) -> bool:
    if folder.name.startswith("tokenizer"):
        return (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
    if folder.name == "scheduler":
        return (folder / "scheduler_config.json").is_file()
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def load_pipeline(
    base: str | Path,
    torch_dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    vae: str | Path | None = None,
    vae_dtype: torch.dtype | None = None,
    *,
    base_config: str | None = None,
    prediction_type: str = "auto",
    zero_terminal_snr: str = "auto",
    **from_pretrained_options: Any,
) -> StableDiffusionXLPipeline:
    """Load SDXL from a diffusers folder, a Hub id or a single `.safetensors` file.

    Args:
        torch_dtype: of every model in the pipeline, text encoders stored in another dtype included.
            None: float16 on a GPU, float32 on a CPU.
        device: None: a GPU where there is one.
        vae: another autoencoder, as for `load_vae`.
        vae_dtype: of the autoencoder alone; one in fp32 can't decode what a UNet in half precision drew. None: as all.
        base_config: folder or Hub id with the configurations and tokenizers of a single file. None: SDXL's.
        prediction_type, zero_terminal_snr: what the UNet predicts, as for `inference.prediction.settle_scheduler`.
        from_pretrained_options: passed on, such as `variant="fp16"` or `local_files_only=True`.

    Raises:
        ValueError: the base is missing, incomplete, not SDXL, or can't be fetched; or the autoencoder doesn't fit it.
    """
    check_base(base)
    device = torch.device(device or default_device())
    torch_dtype = torch_dtype or default_dtype(device)
    vae_dtype = vae_dtype or torch_dtype
    options = {
        "add_watermarker": False,  # an invisible watermark would differ between machines with and without its package
        **from_pretrained_options,
    }
    try:
        if Path(base).is_file():
            dtype = torch_dtype if vae_dtype == torch_dtype else torch.float32
            pipeline = _load_single_file(Path(base), dtype, base_config, options)
        else:
            # safetensors only: a pickle from outside can run code
            pipeline = StableDiffusionXLPipeline.from_pretrained(
                str(base), dtype={"vae": vae_dtype, "default": torch_dtype}, use_safetensors=True, **options
            )
    except (OSError, SafetensorError, SingleFileComponentError) as error:
        raise unloadable("base", base, error) from error
    _check_loaded(base, pipeline, from_pretrained_options)
    pipeline.register_modules(scheduler=settle_scheduler(pipeline.scheduler, base, prediction_type, zero_terminal_snr))
    if vae is not None:
        pipeline.register_modules(vae=load_vae(vae, like=pipeline.vae))
    pipeline.vae.enable_slicing()  # one image at a time: decoding four at 1024 px takes more memory than the UNet
    for name, model in pipeline.components.items():
        dtype = vae_dtype if name == "vae" else torch_dtype
        if isinstance(model, nn.Module) and model.dtype != dtype:
            model.to(dtype)
    return pipeline.to(device)


def _load_single_file(
    path: Path, dtype: torch.dtype, config: str | None, options: dict[str, Any]
) -> StableDiffusionXLPipeline:
    if config is not None:
        options = options | {"config": config}
    if is_eight_bit(path):
        named = {name: options[name] for name in ("cache_dir", "local_files_only") if name in options}
        options = options | load_eight_bit(path, dtype, config, leave_out=set(options), **named)
    return StableDiffusionXLPipeline.from_single_file(str(path), dtype=dtype, **options)


def _check_loaded(base: str | Path, pipeline: StableDiffusionXLPipeline, given: dict[str, Any]) -> None:
    """Refuse relatives of SDXL that load as it: diffusers leaves out what another family lacks."""
    missing = [part for part in BASE_PARTS if part not in given and getattr(pipeline, part) is None]
    if missing:
        raise ValueError(f"base {base} has no {', '.join(missing)}: SDXL is needed, and this is another model")
    if not hasattr(pipeline.scheduler, "init_noise_sigma"):
        raise ValueError(
            f"base {base} has a {type(pipeline.scheduler).__name__}, and SDXL starts from noise of a known size: name "
            "a scheduler of its kind, such as EulerDiscreteScheduler, in model_index.json"
        )
    if pipeline.unet is not None:
        config = pipeline.unet.config
        if config.addition_embed_type != "text_time" or config.in_channels != pipeline.vae.config.latent_channels:
            raise ValueError(
                f"base {base} has a UNet with {config.in_channels} input channels and {config.addition_embed_type} "
                "conditioning: SDXL's text-to-image UNet is needed, with text_time conditioning"
            )


def configuration_source(base: str | Path, base_config: str | None = None) -> str:
    """Folder or Hub id that has the configurations of a base: itself, or another one's for a single file."""
    return (base_config or SDXL_CONFIG) if Path(base).is_file() else str(base)


def load_outline(
    base: str | Path,
    vae: str | Path | None = None,
    *,
    base_config: str | None = None,
    prediction_type: str = "auto",
    zero_terminal_snr: str = "auto",
    **download_options: Any,
) -> StableDiffusionXLPipeline:
    """The base's tokenizers and scheduler, and its models with shapes and no weights (on the device "meta").

    What can be asked of it need not wait for gigabytes.

    Args:
        vae: another autoencoder, as for `load_vae`.
        base_config, prediction_type, zero_terminal_snr: as for `load_pipeline`.
        download_options: revision and cache_dir.

    Raises:
        ValueError: as `load_pipeline`, but for the weights.
    """
    options = {name: value for name, value in download_options.items() if name != "variant"}
    source = configuration_source(base, base_config)
    try:
        index = StableDiffusionXLPipeline.load_config(source, **options)
        scheduler = getattr(diffusers, index["scheduler"][1])
        parts = {
            "scheduler": scheduler.from_pretrained(source, subfolder="scheduler", **options),
            **{name: CLIPTokenizer.from_pretrained(source, subfolder=name, **options) for name in _TOKENIZERS},
        }
        configs = {name: CLIPTextConfig.from_pretrained(source, subfolder=name, **options) for name in ENCODERS}
        with init_empty_weights(include_buffers=True):
            parts |= {name: ENCODERS[name](config) for name, config in configs.items()}
            for name, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
                parts[name] = cls.from_config(cls.load_config(source, subfolder=name, **options))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise unloadable("base", base, error) from error
    outline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    _check_loaded(base, outline, {})
    outline.register_modules(scheduler=settle_scheduler(outline.scheduler, base, prediction_type, zero_terminal_snr))
    if vae is not None and not Path(vae).is_file():
        try:
            with init_empty_weights(include_buffers=True):
                other = AutoencoderKL.from_config(AutoencoderKL.load_config(str(vae), subfolder=_vae_subfolder(vae)))
        except (OSError, ValueError) as error:
            raise unloadable("autoencoder", vae, error) from error
        _check_vae_fits(vae, other, outline.vae)
    return outline


def unloadable(what: str, source: str | Path, error: Exception) -> ValueError:
    """What to raise for a model that a library couldn't load from a folder, a file or the Hub."""
    reason, where = textwrap.shorten(first_line(error), 200, placeholder="…"), ""
    if not Path(source).exists():
        where = f", which is no folder in {Path.cwd()} either,"
        if is_offline_mode():
            reason = "HF_HUB_OFFLINE is set, and it was not downloaded before: unset that, or name a folder"
    return ValueError(f"{what} {source}{where} could not be loaded: {reason}")


def base_geometry(base: str | Path, *, base_config: str | None = None, **download_options: Any) -> tuple[int, int]:
    """Side of the pictures that a base was trained on, and what a side must be a multiple of; pixels.

    Only configurations are read. A single file without one is SDXL at its own size.
    """
    if Path(base).is_file() and base_config is None:
        return 1024, 32
    options = {name: value for name, value in download_options.items() if name != "variant"}
    source = configuration_source(base, base_config)
    try:
        unet = UNet2DConditionModel.load_config(source, subfolder="unet", **options)
        vae = AutoencoderKL.load_config(source, subfolder="vae", **options)
    except (OSError, ValueError) as error:
        raise unloadable("base", base, error) from error
    try:
        vae_scale_factor = 2 ** (len(vae["block_out_channels"]) - 1)
        return unet["sample_size"] * vae_scale_factor, vae_scale_factor * 2 ** (len(unet["block_out_channels"]) - 1)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"base {base} needs block_out_channels in vae/config.json, and sample_size and block_out_channels in "
            "unet/config.json: copy or download them again"
        ) from error


def load_vae(path: str | Path, like: AutoencoderKL) -> AutoencoderKL:
    """An autoencoder to use instead of the base's own: a folder, a single file, or a Hub id.

    Args:
        like: the base's own. A single file says nothing of its configuration, its scaling factor among it, and is taken
            to have the same.

    Raises:
        ValueError: if there is none, or if its latents are of another shape.
    """
    folder, subfolder = Path(path), _vae_subfolder(path)
    try:
        if folder.is_file():
            with tempfile.TemporaryDirectory() as config:
                like.save_config(config)
                vae = AutoencoderKL.from_single_file(str(path), config=config)
        else:
            vae = AutoencoderKL.from_pretrained(str(path), subfolder=subfolder, use_safetensors=True)
    except (OSError, ValueError, KeyError, SafetensorError, SingleFileComponentError) as error:
        raise unloadable("autoencoder", path, error) from error
    _check_vae_fits(path, vae, like)
    return vae


def _vae_subfolder(path: str | Path) -> str | None:
    return "vae" if (Path(path) / "vae" / "config.json").is_file() else None


def _check_vae_fits(path: str | Path, vae: AutoencoderKL, like: AutoencoderKL) -> None:
    other, own = (
        f"{one.config.latent_channels} latent channels of 1/{2 ** (len(one.config.block_out_channels) - 1)}"
        for one in (vae, like)
    )
    if other != own:
        raise ValueError(
            f"autoencoder {path} makes {other} of a picture's size, and the base's own {own}: name one that fits"
        )


def make_scheduler(name: str, current: SchedulerMixin) -> SchedulerMixin:
    """Another of diffusers' schedulers, with the noise schedule and the prediction of the base's own.

    Args:
        name: of the class, with or without "Scheduler" at its end, upper or lower case.

    Raises:
        ValueError: listing those that go with the base.
    """
    known = {cls.__name__.removesuffix("Scheduler").lower(): cls for cls in current.compatibles}
    wanted = known.get(name.lower().removesuffix("scheduler"))
    if wanted is None:
        names = ", ".join(sorted(cls.__name__.removesuffix("Scheduler") for cls in known.values()))
        raise ValueError(f"--scheduler {name} is none that goes with this base: choose one of {names}")
    if prediction_of(current).zero_snr and not knows_zero_snr(wanted):
        names = ", ".join(
            sorted(cls.__name__.removesuffix("Scheduler") for cls in known.values() if knows_zero_snr(cls))
        )
        raise ValueError(f"--scheduler {name} can't begin at noise alone, as this base does: choose one of {names}")
    try:
        return wanted.from_config(current.config)
    except ImportError as error:  # one of them needs torchsde
        raise ValueError(f"--scheduler {name}: {first_line(error)}") from error


def load_refiner(
    path: str, base: StableDiffusionXLPipeline, torch_dtype: torch.dtype, device: str | torch.device | None
) -> StableDiffusionXLImg2ImgPipeline:
    """SDXL's refiner; it has the base's autoencoder and scheduler, because it goes on with the base's noisy latents.

    Raises:
        ValueError: if there is none, or if it is of another family.
    """
    scheduler = type(base.scheduler).from_config(base.scheduler.config)
    options = {"dtype": torch_dtype, "vae": base.vae, "scheduler": scheduler, "add_watermarker": False}
    try:
        if Path(path).is_file():
            refiner = StableDiffusionXLImg2ImgPipeline.from_single_file(path, **options)
        else:
            refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(path, use_safetensors=True, **options)
    except (OSError, ValueError, SafetensorError, SingleFileComponentError) as error:
        raise unloadable("--refiner", path, error) from error
    if refiner.unet.config.in_channels != base.unet.config.in_channels:
        raise ValueError(
            f"--refiner {path} has {refiner.unet.config.in_channels} input channels: another base's refiner"
        )
    return refiner.to(device or default_device())


def check_device(name: str | None) -> torch.device:
    """The device of a --device flag; None: a GPU where there is one.

    Raises:
        ValueError: if it is none, or not here.
    """
    try:
        device = torch.device(name) if name is not None else default_device()
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        gpus = torch.cuda.device_count()
        raise ValueError(
            f"--device {name} can't be used (this machine has {gpus} CUDA GPUs): say cpu or cuda"
        ) from error
    if device.type == "meta":
        raise ValueError("--device meta computes nothing: say cpu or cuda")
    return device


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def attention_line(device: torch.device, xformers: bool) -> str:
    """One sentence: whose attention is in use, and why."""
    if xformers:
        return f"attention: xformers {version('xformers')}, as asked"
    if device.type != "cuda":
        return f"attention: PyTorch's own (SDPA), on the {device.type}: no GPU is in use"
    return "attention: PyTorch's own (SDPA), whose memory-efficient kernels serve this GPU; xformers is not asked for"


def check_xformers(device: torch.device | str) -> None:
    """Raise ValueError, with the way out, where xformers' attention can't serve."""
    way_out = "leave --enable_xformers_memory_efficient_attention out, PyTorch's own attention is used then"
    if torch.device(device).type != "cuda":
        raise ValueError(f"xformers' attention needs a CUDA GPU and the device is {device}: {way_out}")
    if not is_xformers_available():
        raise ValueError(f"xformers is not installed: see requirements-xformers.txt, or {way_out}")
    try:
        from xformers.ops import memory_efficient_attention

        query = torch.zeros(1, 2, 40, device=device)  # fp32, as in the trial that diffusers makes
        memory_efficient_attention(query, query, query)
    except (ImportError, NotImplementedError, RuntimeError) as error:  # built for another PyTorch, or for other GPUs
        reason = first_line(error)
        raise ValueError(
            f"xformers' attention does not run on {device} ({reason}): a wheel for this PyTorch's CUDA "
            f"({torch.version.cuda}) is needed, see requirements-xformers.txt, or {way_out}"
        ) from error
