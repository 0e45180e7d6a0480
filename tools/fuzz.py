"""Damaged files of every kind through the suite's own readers: each is read right or refused with one sentence.

    python -m tools.fuzz --exif 2000 --headers 500 --pictures 500 --configs 200

Prints a table of what happened and, of each case that went wrong, the seed and the traceback; the exit status is then
1. Wrong is any exception but those that commands answer with a sentence (`ValueError`, `OSError`), a message that is no
sentence, a file that was left behind, anything unpickled, and a picture that lies on its side though its orientation is
undamaged.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import struct
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import convert_state_dict_to_kohya
from PIL import Image, ImageCms
from safetensors.torch import save_file

from dreambooth.encoded_cache import EncodedCache, checksum
from inference.base import check_base, load_pipeline
from inference.load import load_adapter, unload_adapters
from inference.single_file import FIRST_ENCODER, SECOND_ENCODER, UNET, VAE, VELOCITY
from inference.tokens import read_new_word
from methods.adapter_file import inspect_adapter
from methods.components import EMBEDDINGS, ENCODERS, FOLDED_WEIGHTS, INNER_WEIGHTS
from methods.peft_folder import write_lora_folder
from methods.reading import read_adapter
from methods.update import Update
from nora import NoraConfig, save_inner
from settings.command_line import USER_ERROR, parse_config, quiet_libraries
from settings.training import FLAGS, TrainConfig
from storage.pictures import open_image, open_mask

BASE = Path(__file__).parent.parent / "assets" / "tiny-sdxl"
LONGEST_MESSAGE = 1000
PICTURES = ("JPEG", "PNG", "WEBP")
OTHER_PICTURES = ("GIF", "TIFF", "BMP", "AVIF", "HEIF")
UPRIGHT = (40, 24)  # width, height of what `photo` shows
ORIENTATION = 0x0112


@dataclass
class FuzzConfig:
    """How many cases of each kind."""

    exif: int = field(default=2000, metadata={"help": "Damaged EXIF blocks, in JPEG, PNG, WebP and HEIF."})
    headers: int = field(
        default=500, metadata={"help": "Damaged safetensors headers, of adapters and what else is read."}
    )
    pictures: int = field(default=500, metadata={"help": "Damaged JPEG, PNG and WebP files."})
    configs: int = field(default=200, metadata={"help": "Random YAML for --config."})
    seed: int = field(default=0, metadata={"help": "Of the first case of each kind."})


@dataclass(frozen=True)
class Case:
    """One damaged file, ready to be read."""

    kind: str
    files: Sequence[Path]  # that are there
    read: Callable[[], object]


# --- damage -----------------------------------------------------------------------------------------------------------


def damage(
    data: bytes, rng: random.Random, start: int = 0, end: int | None = None, spare: Sequence[range] = ()
) -> bytes:
    """Some bytes of a part changed, left out, doubled or cut off.

    Args:
        start, end: the part.
        spare: places that stay; nothing is shifted then.
    """
    end = len(data) if end is None else end
    found = bytearray(data)
    way = rng.choice(("change", "change", "change", "leave out", "double", "cut off")) if not spare else "change"
    place = rng.randrange(start, end)
    if way == "change":
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            place = rng.randrange(start, end)
            if not any(place in some for some in spare):
                found[place] = rng.choice((0, 0xFF, 0x7F, rng.randrange(256), found[place] ^ (1 << rng.randrange(8))))
    elif way == "leave out":
        del found[place : place + rng.randrange(1, 9)]
    elif way == "double":
        found[place:place] = found[place : place + rng.randrange(1, 9)]
    else:
        del found[place:]
    return bytes(found)


# --- pictures ---------------------------------------------------------------------------------------------------------


@cache
def photo() -> Image.Image:
    """As a camera stores it that was held upright: on its side."""
    x, y = np.meshgrid(np.linspace(20, 235, UPRIGHT[0]), np.linspace(20, 235, UPRIGHT[1]))
    upright = Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))
    return upright.transpose(Image.Transpose.ROTATE_90)


@cache
def exif_block() -> bytes:
    """What a camera writes: maker, model, times, resolution, place, a colour space."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010F], exif[0x0110] = 6, "Canon", "EOS"
    exif[0x011A], exif[0x011B], exif[0x0128] = 72.0, 72.0, 2
    own = exif.get_ifd(0x8769)
    own[0x9003], own[0xA001], own[0xA005], own[0x927C] = "2026:01:01 00:00:00", 65535, {1: "R03"}, b"maker's note"
    exif.get_ifd(0x8825)[1] = "N"
    return exif.tobytes()


def orientation_places(block: bytes) -> list[range]:
    """What has to stay of an EXIF block for its orientation to be said: the header, the count, the entry."""
    tiff = len(b"Exif\0\0")
    (count,) = struct.unpack_from("<H" if block[tiff : tiff + 2] == b"II" else ">H", block, tiff + 8)
    entries = [range(place, place + 12) for place in range(tiff + 10, tiff + 10 + 12 * count, 12)]
    order = "<H" if block[tiff : tiff + 2] == b"II" else ">H"
    own = next(entry for entry in entries if struct.unpack_from(order, block, entry.start)[0] == ORIENTATION)
    return [range(tiff + 10), own]


def exif_case(folder: Path, rng: random.Random) -> Case:
    block, kind = exif_block(), rng.choice((*PICTURES, "HEIF"))
    kept = rng.random() < 0.5
    path = folder / f"photo.{kind.lower()}"
    damaged = damage(block, rng, start=6, spare=orientation_places(block) if kept else ())
    photo().save(path, kind, exif=damaged)

    def read() -> None:
        image, mask = open_image(path), open_mask(path)
        assert image.mode == "RGB" and mask.mode == "L" and image.size == mask.size
        if kept:
            assert image.size == UPRIGHT, "not upright"

    return Case(kind, [path], read)


def picture_case(folder: Path, rng: random.Random) -> Case:
    kind = rng.choice(PICTURES if rng.random() < 0.8 else OTHER_PICTURES)
    image = photo().convert(rng.choice(("RGB", "L") if kind != "PNG" else ("RGB", "L", "RGBA", "P", "1", "LA")))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    stream = io.BytesIO()
    image.save(stream, kind, exif=exif_block(), icc_profile=profile, **({"progressive": rng.random() < 0.5}))
    path = folder / f"photo.{kind.lower()}"
    path.write_bytes(damage(stream.getvalue(), rng))

    def read() -> None:
        with contextlib.suppress(ValueError):
            open_mask(path)
        assert open_image(path).mode == "RGB"

    return Case(kind, [path], read)


# --- safetensors ------------------------------------------------------------------------------------------------------


@cache
def pipeline():
    quiet_libraries()
    return load_pipeline(BASE, torch.float32, "cpu")


def layers() -> list[str]:
    """A few of the UNet's."""
    names = [name for name, module in pipeline().unet.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in names if name.endswith(("attn1.to_q", "attn2.to_k"))][:3]


@cache
def sound_files() -> Path:
    """A folder with one of each file that is read, every one of them sound."""
    sound_files.keep = keep = tempfile.TemporaryDirectory(prefix="fuzz-")  # removed at exit
    folder = Path(keep.name)
    generator = torch.Generator().manual_seed(0)
    modules = dict(pipeline().unet.named_modules())
    updates = {}
    for name in layers():
        out, into = modules[name].weight.shape
        updates[name] = Update(torch.randn(out, 2, generator=generator), torch.randn(2, into, generator=generator))
    lora = {f"unet.{n}.lora_{k}.weight": t for n, u in updates.items() for k, t in (("A", u.down), ("B", u.up))}
    save_file(lora, folder / FOLDED_WEIGHTS, {"format": "pt"})
    save_file(convert_state_dict_to_kohya(dict(lora)), folder / "kohya.safetensors", {"ss_network_dim": "2"})
    (folder / "peft").mkdir()
    write_lora_folder(folder / "peft", updates)
    vectors = {key: torch.randn(2, 32, generator=generator) for key in ENCODERS}
    save_file(vectors, folder / EMBEDDINGS, {"word": "[V]"})
    parts = (f"{UNET}label_emb.0.0.weight", f"{FIRST_ENCODER}x", f"{SECOND_ENCODER}x", f"{VAE}x", VELOCITY)
    conv_in = {f"{UNET}input_blocks.0.0.weight": torch.zeros(2, 4, 1, 1)}
    save_file(conv_in | {key: torch.zeros(4) for key in parts}, folder / "base.safetensors")
    unet = load_pipeline(BASE, torch.float32, "cpu").unet
    unet.add_adapter(NoraConfig(r=2, outer_r=4, outer_init="svd", target_modules=layers()))
    save_inner(folder / INNER_WEIGHTS, {"unet": unet})
    entry = {"mean": torch.zeros(1, 4, 8, 8), "std": torch.ones(1, 4, 8, 8)}
    save_file(entry, folder / "entry.safetensors", {"key": "ab" * 32, "checksum": checksum(entry)})
    return folder


def header_case(folder: Path, rng: random.Random) -> Case:
    kind = rng.choice(("diffusers", "kohya", "inner", "peft", "new word", "base", "encoded", "load"))
    names = {"diffusers": FOLDED_WEIGHTS, "load": FOLDED_WEIGHTS, "kohya": "kohya.safetensors", "inner": INNER_WEIGHTS}
    names |= {"peft": "peft/adapter_model.safetensors", "new word": EMBEDDINGS, "base": "base.safetensors"}
    name = names.get(kind, "entry.safetensors")
    data = (sound_files() / name).read_bytes()
    length = 8 + struct.unpack_from("<Q", data)[0]
    data = damage(data, rng, end=length) if rng.random() < 0.6 else other_header(data, length, rng)
    key = "ab" * 32
    path = EncodedCache(folder).path(key) if kind == "encoded" else folder / Path(name).name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    files = [path]
    if kind == "peft":
        files.append(folder / "adapter_config.json")
        files[1].write_bytes((sound_files() / "peft" / "adapter_config.json").read_bytes())
    components = {"unet": pipeline().unet}
    readers: dict[str, Callable[[], object]] = {
        "new word": lambda: read_new_word(path),
        "base": lambda: check_base(path),
        "encoded": lambda: EncodedCache(folder).read(key),
        "load": lambda: load_and_unload(path),
        "peft": lambda: read_adapter(folder, components),
    }
    return Case(kind, files, readers.get(kind, lambda: (inspect_adapter(path), read_adapter(path, components))))


def load_and_unload(path: Path) -> None:
    """Onto the pipeline, which a refusal leaves as it was."""
    names = [name for name, _ in pipeline().unet.named_modules()]
    try:
        load_adapter(pipeline(), path)
        unload_adapters(pipeline())
    finally:
        assert names == [name for name, _ in pipeline().unet.named_modules()], "an adapter is still on"


def other_header(data: bytes, length: int, rng: random.Random) -> bytes:
    """JSON that says something else: types, shapes, places, names, metadata."""
    header = json.loads(data[8:length])
    name = "__metadata__" if rng.random() < 0.4 and "__metadata__" in header else rng.choice(sorted(header))
    odd = [None, 0, -1, 2**63, 1e300, "", "x", [], {}, [[]], True, "\0", "[" * 200]
    if name == "__metadata__":
        part = rng.choice(sorted(header[name]))
        header[name][part] = rng.choice(
            ["", "{}", "[]", "null", "1", "[" * 500, '{"a": 1}', '{"unet": {"r": 0}}', "\0", 5]
        )
    else:
        part = rng.choice(("dtype", "shape", "data_offsets", "name", "whole", "gone"))
        if part == "dtype":
            header[name][part] = rng.choice(
                ("I32", "F64", "F16", "BF16", "U8", "BOOL", "F8_E4M3", "U32", "F4", "C64", 7)
            )
        elif part in ("shape", "data_offsets"):
            value = header[name][part]
            header[name][part] = rng.choice((value[::-1], [*value, 1], value[:-1], [0, *value], [-1], [2**62] * 2, "x"))
        elif part == "name":
            header[rng.choice(("", "x", "unet", f"{name}.x", name.upper(), name[::-1]))] = header.pop(name)
        elif part == "whole":
            header[name] = rng.choice(odd)
        else:
            del header[name]
    made = json.dumps(header).encode()
    return struct.pack("<Q", len(made)) + made + data[length:]


# --- configurations ---------------------------------------------------------------------------------------------------

# what YAML 1.1 takes for something else than text, and what isn't YAML
_TEXT = "no yes on off true 0042 010 0x1f 1_000 1e-4 1E5 .5 5. -1 .inf .nan 2026-01-01 12:30:45 1:2 ä 猫"
_OTHER = "null ~ '' 'no' nora !!python/object:os.system !!binary !!set [] {} [1,[2]] <<: *a &a - ? : | % @"
_WORDS, _SCALARS = _TEXT.split(), f"{_TEXT} {_OTHER}".split()


def config_case(folder: Path, rng: random.Random) -> Case:
    word = rng.choice(_WORDS)
    lines = [f"output_dir: {word}"]
    sound = rng.random() < 0.4  # then it is read, as it was written
    for _ in range(0 if sound else rng.randrange(0, 5)):
        name = rng.choice((*rng.sample(sorted(FLAGS), 4), rng.choice(_SCALARS), "no_such_flag"))
        value = " ".join(rng.choice(_SCALARS) for _ in range(rng.choice((1, 1, 1, 2))))
        lines.append(f"{name}{rng.choice((': ', ': ', ': ', ':', ' '))}{value}")
    data = "\n".join(lines).encode()
    data = damage(data, rng) if not sound and rng.random() < 0.3 else data
    path = folder / "run.yaml"
    path.write_bytes(data)
    needed = ("pretrained_model_name_or_path=base", "instance_data_dir=x", "instance_prompt=a [V] cat")
    argv = ["--config", str(path), *(f"--{flag}" for flag in needed)]

    def read() -> None:
        stream = io.StringIO()
        try:
            with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
                config = parse_config(TrainConfig, argv)
        except SystemExit as exit_:
            said = [line for line in stream.getvalue().splitlines() if "error: " in line]
            assert exit_.code == USER_ERROR and len(said) == 1, stream.getvalue()
            assert not sound, f"{word} is text: {said[0]}"
            raise ValueError(said[0]) from exit_
        assert not sound or config.output.output_dir == word, f"{word} is {config.output.output_dir}"

    return Case("yaml", [path], read)


# --- what happened ----------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Path, random.Random], Case]] = {
    "exif": exif_case,
    "headers": header_case,
    "pictures": picture_case,
    "configs": config_case,
}
_unpickled: list[str] = []


@cache
def _watch_pickle() -> None:
    """Every class that is looked up for a pickle is noted."""
    sys.addaudithook(lambda event, args: _unpickled.append(str(args)) if event == "pickle.find_class" else None)


def run_case(kind: str, seed: int) -> tuple[str, str, str | None]:
    """(what was damaged, outcome, what went wrong) of one case: "read", "refused" or "wrong"."""
    _watch_pickle()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        case = KINDS[kind](folder, random.Random(f"{kind} {seed}"))
        before = {path: path.read_bytes() for path in case.files}
        _unpickled.clear()
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                case.read()
            outcome, problem = "read", None
        except (ValueError, OSError) as error:
            outcome, problem = "refused", _not_a_sentence(str(error), case.files[0])
        except Exception:
            outcome, problem = "wrong", traceback.format_exc()
        problem = problem or (f"unpickled {_unpickled[0]}" if _unpickled else None)
        if {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} != before:
            problem = problem or "files were written, changed or deleted"
        return case.kind, "wrong" if problem else outcome, problem


def _not_a_sentence(message: str, file: Path) -> str | None:
    if file.name not in message and str(file.parent) not in message and file.suffix != ".yaml":  # it may name a flag
        return f"this names no file: {message[:LONGEST_MESSAGE]!r}"
    if not message.strip() or len(message) > LONGEST_MESSAGE or "Traceback" in message:
        return f"this is no sentence: {message[:LONGEST_MESSAGE]!r}"
    return None


def outcomes(kind: str, count: int, seed: int = 0) -> Iterator[tuple[int, str, str, str | None]]:
    """(seed, what was damaged, outcome, what went wrong) of each case."""
    for number in range(seed, seed + count):
        yield number, *run_case(kind, number)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(FuzzConfig, argv, prog="python -m tools.fuzz", description=__doc__.split("\n")[0])
    table: Counter[tuple[str, str, str]] = Counter()
    for kind in KINDS:
        for seed, damaged, outcome, problem in outcomes(kind, getattr(config, kind), config.seed):
            table[kind, damaged, outcome] += 1
            if problem:
                print(f"{kind}, seed {seed}, {damaged}: {problem}\n", file=sys.stderr)
    print(f"{'kind':10}{'damaged':12}{'read':>8}{'refused':>9}{'wrong':>7}")
    for kind, damaged in sorted({row[:2] for row in table}):
        counts = [table[kind, damaged, outcome] for outcome in ("read", "refused", "wrong")]
        print(f"{kind:10}{damaged:12}{counts[0]:8}{counts[1]:9}{counts[2]:7}")
    sys.exit(1 if any(outcome == "wrong" for _, _, outcome in table) else 0)


if __name__ == "__main__":
    main()
