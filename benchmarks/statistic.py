"""AwSVD's statistic of the base against the subject's: does it matter? By the loss on held-out pictures.

    python -m benchmarks.statistic --base assets/tiny-sdxl --steps 400 --seeds 0 1 2 --results out/statistic.json

Trains NoRA on every sample subject with each seed and either statistic, and compares the loss on held-out pictures in
pairs of the same subject and seed. Every training is written to --results as it ends; a second call goes on from there.
"""

from __future__ import annotations

import inference  # noqa: F401 -- before the libraries, because it quietens what they print on import

# isort: split
import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.heldout_loss import SUBJECTS, heldout_loss
from inference.base import load_pipeline
from inference.load import load_adapter, unload_adapters
from judging.statistics import differences
from runs.interval import describe_difference
from settings.command_line import quiet_libraries
from settings.training import TrainConfig
from storage.files import write_atomic
from storage.text import expand_home, home_path
from train_dreambooth_nora_sdxl import train

STATISTICS = ("subject", "base")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=expand_home, default="assets/tiny-sdxl")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=home_path, default=Path("out/statistic.json"))
    args = parser.parse_args(argv)
    quiet_libraries()
    subjects = sorted(folder.name for folder in (SUBJECTS / "heldout").iterdir())
    pipeline = load_pipeline(args.base, torch.float32)
    found = json.loads(args.results.read_text()) if args.results.exists() else {}

    def loss(subject: str) -> float:
        return heldout_loss(pipeline, SUBJECTS / "heldout" / subject, f"a photo of [V] {subject}")

    for subject in subjects:
        base = loss(subject)
        for seed in args.seeds:
            for statistic in STATISTICS:
                key = f"{statistic} {subject} {seed} {args.steps} {args.learning_rate}"
                if key in found:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    train(
                        TrainConfig.of(
                            pretrained_model_name_or_path=args.base,
                            instance_data_dir=str(SUBJECTS / subject),
                            instance_prompt=f"a photo of [V] {subject}",
                            output_dir=folder,
                            learning_rate=args.learning_rate,
                            lr_scheduler="cosine",
                            method="nora",
                            method_args=[f"statistic={statistic}"],
                            seed=seed,
                            max_train_steps=args.steps,
                            num_validation_images=0,
                            report_to="none",
                        )
                    )
                    load_adapter(pipeline, folder)
                    found[key] = loss(subject) / base
                    unload_adapters(pipeline)
                args.results.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(args.results, json.dumps(found, indent=1) + "\n")
                print(f"{key}: {found[key]:.4f}", flush=True)
    draws = {
        statistic: {
            seed: {
                subject: {0: found[f"{statistic} {subject} {seed} {args.steps} {args.learning_rate}"]}
                for subject in subjects
            }
            for seed in args.seeds
        }
        for statistic in STATISTICS
    }
    print("| statistic | " + " | ".join(subjects) + " | mean |\n" + "|---" * (len(subjects) + 2) + "|")
    for statistic, trainings in draws.items():
        means = [sum(own[subject][0] for own in trainings.values()) / len(trainings) for subject in subjects]
        row = " | ".join(f"{mean:.4f}" for mean in means)
        print(f"| {statistic} | {row} | {sum(means) / len(means):.4f} |")
    for difference in differences(draws["subject"], {"base": draws["base"]}).values():
        print(describe_difference("statistic=base", "statistic=subject", "the loss on held-out pictures", difference))


if __name__ == "__main__":
    main()
