"""Draw the sample subjects: six pictures of each to train on and six held out.

    python tools/make_subjects.py --output assets/subjects

The subjects are those of ``world.SUBJECTS``, settings that the base has never seen, nor any near them. The training
pictures show every view of the kind before plain colours and easy scenes; the held-out ones other poses in every scene.
``attributes.json`` says who each one is, so that the attribute reader can look for it.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from world import SCENES, SUBJECTS, Who, draw, draw_pose, views_of
from world.attributes import with_pose

PLACES = ("white", "grass", "gray", "beach", "brown", "snow")


def pictures_of(who: Who, seed: int, places) -> list:
    """One picture in each place, the views of the kind in turn."""
    views, pictures = views_of(who.kind), []
    for number, place in enumerate(places):
        rng = np.random.default_rng((seed, number, who.shades))
        place = "yellow" if place == who.main else place  # the figure stands out from its background
        pose = with_pose(draw_pose(rng, who.kind), view=views[number % len(views)])
        pictures.append((pose.view, place, draw(who, pose, place, rng)))
    return pictures


def write(directory: Path, pictures) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for number, (view, place, image) in enumerate(pictures, start=1):
        image.save(directory / f"{number:02}_{view}_{place}.png", optimize=True)


def write_subjects(output: Path, seed: int) -> None:
    """All subjects with their held-out pictures, and ``attributes.json``."""
    for name, who in SUBJECTS.items():
        write(output / name, pictures_of(who, 2 * seed, PLACES))
        write(output / "heldout" / name, pictures_of(who, 2 * seed + 1, SCENES))
    facts = {name: asdict(who) for name, who in SUBJECTS.items()}
    (output / "attributes.json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("assets/subjects"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_subjects(args.output, args.seed)


if __name__ == "__main__":
    main()
