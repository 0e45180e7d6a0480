"""NoRA on CLIP with a few pictures a class, by plain PEFT, beside LoRA with as many trained parameters.

    OMP_NUM_THREADS=2 python -m examples.few_shot_clip                   # minutes, no download
    python -m examples.few_shot_clip --classes kind --steps 10 --shots 4 --seeds 0

After the paper's Tables 3 and 12 (arXiv 2408.10280): q, k and v of both towers, 400 iterations, 4 and 16 pictures a
class. The CLIP is the embedded one and the pictures are drawn (tools/world): which of twelve colours does a figure
have, or which of eleven kinds is it? The frozen rank is half of the layers' width and the trained one a thirty-second,
as 256 and 16 are of 512, the width of the paper's text tower (its other tower is 768 wide). Each method's learning rate
is the best of four on validation pictures, for each number of shots; the table has the accuracy on others.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

import nora

ROOT = Path(__file__).parent.parent
PROJECTIONS = ["q_proj", "k_proj", "v_proj"]
BATCH = 8
RATES = (1.25e-4, 5e-4, 2e-3, 8e-3)


class Classes(NamedTuple):
    attribute: str  # of a figure of tools/world
    prompt: str  # with a place for a name
    names: tuple[str, ...]


KINDS = ("cat", "dog", "robot", "teapot", "rabbit", "bear", "fox", "bird", "car", "mug", "house")
COLORS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "gray", "white", "black")
CLASSES = {
    "kind": Classes("kind", "a photo of a {}", KINDS),
    "color": Classes("main", "a photo of a {} figure", COLORS),
}


class Pictures(NamedTuple):
    pixels: torch.Tensor  # (N, 3, side, side), as the CLIP wants them
    labels: torch.Tensor  # (N,)


def draw_pictures(processor: CLIPProcessor, classes: Classes, each: int, seed: int) -> Pictures:
    """`each` pictures of every class."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import world
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name}, which draws the pictures, isn't installed: pip install -r requirements-dev.txt")

    rng = np.random.default_rng(seed)
    images: list[Image.Image] = []
    labels: list[int] = []
    for label, name in enumerate(classes.names):
        while len(labels) < each * (label + 1):
            who = world.draw_who(rng)
            if getattr(who, classes.attribute) == name:
                pose, place = world.draw_pose(rng, who.kind), world.draw_place(rng, who.main)
                images.append(world.draw(who, pose, place, rng, size=64))
                labels.append(label)
    return Pictures(processor(images=images, return_tensors="pt").pixel_values, torch.tensor(labels))


class Classifier(torch.nn.Module):
    """Logits of pictures by the cosine with each class's prompt, as CLIP classifies without training."""

    def __init__(self, clip: torch.nn.Module, processor: CLIPProcessor, classes: Classes) -> None:
        super().__init__()
        self.clip = clip
        prompts = [classes.prompt.format(name) for name in classes.names]
        self.tokens = processor.tokenizer(prompts, return_tensors="pt", padding=True)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, side, side) -> (B, classes)."""
        found = self.clip(pixel_values=pixels, **self.tokens)
        return found.logits_per_image


def methods(clip: CLIPModel) -> dict[str, PeftConfig]:
    """NoRA, and LoRA with the same number of trained parameters a layer: 2 r' r of NoRA are 2 k width of LoRA."""
    width = clip.config.vision_config.hidden_size
    outer_r, r = width // 2, width // 32
    k = outer_r * r // width
    return {
        f"LoRA, rank {k}": LoraConfig(r=k, lora_alpha=k, target_modules=PROJECTIONS),
        f"NoRA ({outer_r}, {r})": nora.NoraConfig(r=r, outer_r=outer_r, target_modules=PROJECTIONS),
    }


def fine_tuned(
    zero_shot: Classifier, config: PeftConfig, shots: Pictures, steps: int, rate: float, seed: int
) -> Classifier:
    """AdamW with a cosine; NoRA's frozen factors follow the activations of the shots."""
    classifier, config = copy.deepcopy(zero_shot), copy.deepcopy(config)
    torch.manual_seed(seed)
    if isinstance(config, nora.NoraConfig):
        nora.preprocess_nora(classifier.clip, config, lambda: classifier(shots.pixels))
    classifier.clip = get_peft_model(classifier.clip, config)
    optimizer = torch.optim.AdamW([one for one in classifier.parameters() if one.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(shots.labels), (BATCH,), generator=generator)
        loss = F.cross_entropy(classifier(shots.pixels[rows]), shots.labels[rows])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return classifier


@torch.no_grad()
def accuracy(classifier: Classifier, pictures: Pictures) -> float:
    parts = [classifier(pixels).argmax(-1) for pixels in pictures.pixels.split(100)]
    return (torch.cat(parts) == pictures.labels).float().mean().item()


def run(
    clip_folder: str, classes: Classes, shots: Sequence[int], steps: int, seeds: Sequence[int], test: int = 50
) -> list[dict]:
    """A row a method and number of shots; `test` pictures of each class are held out."""
    clip, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    validation, held_out = (draw_pictures(processor, classes, test, seed) for seed in (1001, 1002))
    zero_shot = Classifier(clip, processor, classes)
    rows = [{"method": "zero-shot", "shots": 0, "accuracies": [accuracy(zero_shot, held_out)]}]
    for number in shots:
        sets = {seed: draw_pictures(processor, classes, number, seed) for seed in (*seeds, 100)}
        for name, config in methods(clip).items():
            by_rate = {
                rate: accuracy(fine_tuned(zero_shot, config, sets[100], steps, rate, 100), validation) for rate in RATES
            }
            best = max(by_rate, key=by_rate.__getitem__)
            models = [fine_tuned(zero_shot, config, sets[seed], steps, best, seed) for seed in seeds]
            found = [accuracy(model, held_out) for model in models]
            trained = sum(one.numel() for one in models[0].parameters() if one.requires_grad)
            rows.append({"method": name, "shots": number, "trained": trained, "rate": best, "accuracies": found})
            print(f"{name}, {number} shots: {found}", flush=True)
    return rows


def table(rows: Sequence[dict]) -> str:
    lines = ["| method | shots a class | trained | learning rate | accuracy |", "|---|---|---|---|---|"]
    for row in rows:
        found = row["accuracies"]
        spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
        rate = f"{row['rate']:g}" if "rate" in row else "–"
        cells = [row["method"], str(row["shots"]), f"{row.get('trained', 0):,}", rate]
        lines.append(f"| {' | '.join(cells)} | {statistics.mean(found):.3f}{spread} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clip", default=str(ROOT / "assets" / "tiny-clip"), help="a CLIP of transformers")
    parser.add_argument("--classes", choices=CLASSES, default="color", help="what is to be told apart")
    parser.add_argument("--shots", type=int, nargs="+", default=[4, 16], help="pictures of each class")
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one training each")
    args = parser.parse_args(argv)
    print(table(run(args.clip, CLASSES[args.classes], args.shots, args.steps, args.seeds)))


if __name__ == "__main__":
    main()
