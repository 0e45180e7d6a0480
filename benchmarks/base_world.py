"""What the embedded base draws of its world, read by the attribute reader.

    python -m benchmarks.base_world

Every kind in every scene, asked for as "a photo of a cat in the jungle": in which share of the pictures are kind and
place the ones that were asked for? And the most that a method can reach in "attributes": what the reader finds of each
subject in its held-out pictures, as drawn and after the base's autoencoder, through which all that the base draws has
come. The reader's own accuracy stands in its config.json.
"""

from __future__ import annotations

import inference  # noqa: F401 -- before the libraries, because it quietens what they print on import

# isort: split
import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from diffusers import StableDiffusionXLPipeline

from benchmarks.copies import through_autoencoder
from inference.base import load_pipeline
from inference.sampling import generate_images
from judging.attributes import AttributeReader, SubjectReading, attributes_kept
from settings.command_line import quiet_libraries, run_command
from storage.pictures import find_images, open_image
from storage.text import expand_home, home_path


def kept_at_most(
    pipeline: StableDiffusionXLPipeline, reader: Path, heldout: Sequence[Path]
) -> dict[str, dict[str, float]]:
    """How pictures are shown -> subject -> the share of its attributes that the reader finds in held-out ones.

    Args:
        heldout: a folder of each subject's, beside whose parent lies the subject's own.
    """
    found: dict[str, dict[str, float]] = {"as drawn": {}, "through the autoencoder": {}}
    for folder in heldout:
        reading = SubjectReading(reader, folder.parent.parent / folder.name)
        pictures = [open_image(path) for path in find_images(folder, "subjects_dir")]
        for how, shown in zip(found, (pictures, through_autoencoder(pipeline, pictures))):
            kept = [attributes_kept(reading.subject, one) for one in reading.reader.read(shown)]
            found[how][folder.name] = fmean(kept)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=expand_home, default="assets/tiny-sdxl")
    parser.add_argument("--reader", type=home_path, default=Path("assets/tiny-attributes"))
    parser.add_argument("--subjects_dir", type=home_path, default=Path("assets/subjects"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000, 1001])
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args(argv)
    quiet_libraries()
    subjects = sorted(folder for folder in (args.subjects_dir / "heldout").glob("*") if folder.is_dir())
    if not subjects:
        parser.error(f"--subjects_dir {args.subjects_dir} has no folder of a subject in heldout")
    reader = AttributeReader.load(args.reader)
    pipeline = load_pipeline(args.base, torch.float32)
    for how, shares in kept_at_most(pipeline, args.reader, subjects).items():
        said = ", ".join(f"{subject} {share:.3f}" for subject, share in shares.items())
        print(f"attributes in held-out pictures {how}: {said}; mean {fmean(shares.values()):.3f}")
    scenes = {words: place for words, place in reader.places.items() if "background" not in words}
    asked = {
        f"a photo of a {kind} {words}": (kind, place)
        for kind in reader.answers["kind"]
        for words, place in scenes.items()
    }
    drawn = list(generate_images(pipeline, list(asked), args.seeds, num_inference_steps=args.steps, batch_size=4))
    right: dict[str, list[bool]] = {}
    for one, found in zip(drawn, reader.read([one.image for one in drawn])):
        kind, place = asked[one.prompt]
        for key, correct in (("kind", found["kind"] == kind), ("place", found["place"] == place)):
            right.setdefault(key, []).append(correct)
        right.setdefault(f"kind: {kind}", []).append(found["kind"] == kind)
        right.setdefault(f"place: {place}", []).append(found["place"] == place)
    for key, found in right.items():
        print(f"{key}: {sum(found)} of {len(found)} ({sum(found) / len(found):.3f})")


if __name__ == "__main__":
    run_command(main)
