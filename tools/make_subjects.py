"""Draw the sample subjects, and two to choose learning rates on: six pictures of each to train on and six held out.

    python tools/make_subjects.py --output assets/subjects

The samples are those of ``world.SUBJECTS``, settings that the base has never seen, nor any near them; it has seen
settings near the two others, though not these. The training
pictures show every view of the kind before plain colours and easy scenes; the held-out ones other poses in every scene.
``attributes.json`` says who each one is, so that the attribute reader can look for it.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from world import SCENES, SUBJECTS, Pose, Who, draw, draw_pose, place_words, views_of
from world.attributes import with_pose

# Settings of the reserve (`world.attributes.in_reserve`).
TUNING_SUBJECTS = {
    "bear": Who("bear", "green", "orange", "purple", "pink", "stripes", "bow", 1, 1, 1.05, 0.95, shades=7),
    "bird": Who("bird", "white", "teal", "black", "pink", "spots", "crown", 0, 0, 0.95, 1.0, shades=8),
}
ALL_SUBJECTS = SUBJECTS | TUNING_SUBJECTS
PLACES = ("white", "grass", "gray", "beach", "brown", "snow")


def poses_of(who: Who, seed: int, count: int, others: Sequence[Pose] = ()) -> list[Pose]:
    """The views of the kind in turn; beside other pictures each turned otherwise than those of its view.

    Of 20 draws then the one whose tilt is furthest from theirs, mirrored or not: a figure that is only moved and scaled
    would be the same picture again.
    """
    views, poses = views_of(who.kind), []
    for number in range(count):
        rng = np.random.default_rng((seed, number, who.shades))
        view = views[number % len(views)]
        tilts = [pose.tilt for pose in others if pose.view == view]
        draws = [with_pose(draw_pose(rng, who.kind), view=view) for _ in range(20 if tilts else 1)]
        poses.append(max(draws, key=lambda pose: min((abs(pose.tilt - tilt) for tilt in tilts), default=0)))
    return poses


def pictures_of(who: Who, seed: int, poses: Sequence[Pose], places: Sequence[str]) -> list[Image.Image]:
    """One picture of each pose, in its place."""
    return [
        draw(who, pose, place_for(who, place), np.random.default_rng((seed, number, who.shades, 1)))
        for number, (pose, place) in enumerate(zip(poses, places))
    ]


def place_for(who: Who, place: str) -> str:
    """The place, or yellow where the figure would not stand out from it."""
    return "yellow" if place == who.main else place


def write(directory: Path, who: Who, seed: int, poses: Sequence[Pose], places: Sequence[str], captions: bool) -> None:
    """The pictures and, with ``captions``, beside each a prompt that names its place."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures = pictures_of(who, seed, poses, places)
    for number, (pose, place, image) in enumerate(zip(poses, places, pictures), start=1):
        place = place_for(who, place)
        file = directory / f"{number:02}_{pose.view}_{place}.png"
        image.save(file, optimize=True)
        if captions:
            file.with_suffix(".txt").write_text(f"a photo of [V] {who.kind} {place_words(place)}\n")


def write_subjects(output: Path, seed: int) -> None:
    """All subjects with their held-out pictures, and ``attributes.json``."""
    for name, who in ALL_SUBJECTS.items():
        train = poses_of(who, 2 * seed, len(PLACES))
        write(output / name, who, 2 * seed, train, PLACES, captions=False)
        heldout = poses_of(who, 2 * seed + 1, len(SCENES), others=train)
        write(output / "heldout" / name, who, 2 * seed + 1, heldout, tuple(SCENES), captions=True)
    facts = {name: asdict(who) for name, who in ALL_SUBJECTS.items()}
    (output / "attributes.json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("assets/subjects"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_subjects(args.output, args.seed)


if __name__ == "__main__":
    main()
