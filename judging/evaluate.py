"""Measured fidelity: DINO, CLIP-I, CLIP-T, drift and diversity of adapters, paired differences, and copies.

    python -m judging.evaluate --adapters lora=out/lora nora=out/nora --output out/scores.json

The same command gives the same file, to the last bit on a CPU: pictures are drawn with fixed seeds, or read again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.manifest import listed_images
from inference.score_labels import SCORES_VERSION
from judging.plan import Plan, instance_folder, instance_pictures, plan_images, read_protocol
from judging.tables import score_table, warn_of_copies
from settings.columns import BASE_COLUMN, EVALUATE_DRAWING, EvaluateConfig
from settings.command_line import parse_config, quiet_libraries, run_command
from storage.files import check_own_output, check_writable_target, read_json, write_atomic

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from judging.scorer import Scorer


def check(config: EvaluateConfig, recorded: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for what `run` would refuse once runs of these flags are there."""
    plan_images(config, recorded)
    folder = instance_folder(config.instance_images, recorded)
    instances = instance_pictures(folder)
    quiet_libraries()
    import torch

    from inference.pipelines import check_hardware

    check_hardware(config)
    load_scorer(config, folder, instances, torch.device("cpu"))


def load_scorer(config: EvaluateConfig, folder: str, instances: Sequence[Image.Image], device: torch.device) -> Scorer:
    """The encoders, and the reader of attributes if one is asked for, for the subject with these pictures."""
    from judging.attributes import SubjectReading
    from judging.scorer import Scorer

    reading = SubjectReading(Path(config.attributes), Path(folder)) if config.attributes else None
    return Scorer(config.clip, config.dino, instances, device, reading)


def is_scores(path: Path) -> bool:
    """Whether a file is one that `run` wrote."""
    try:
        return isinstance(read_json(path).get("scores"), dict)
    except ValueError:
        return False


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Draw what is missing, score it, write the scores and return them. Flags are checked before anything is loaded."""
    adapters, folders = config.named_columns(EVALUATE_DRAWING)
    listed = {name: listed_images(name, folder) for name, folder in folders.items()}
    for name, files in listed.items():
        if len(scales := list(dict.fromkeys(scale for _, _, scale in files))) > 1:
            several = ", ".join("none" if scale is None else f"{scale:g}" for scale in scales)
            raise ValueError(
                f"--images {name} has pictures at scales {several}: keep each scale in a folder of its own"
            )
    output = Path(config.output)
    check_writable_target(output, "--output", folder=False)
    check_own_output(output, "--output", "file of scores", is_scores)
    if len(config.scales) > 1:
        raise ValueError("--scale: scores are of one scale; run the command once for each, with another --output")
    if adapters:
        protocol = read_protocol(config)
        config.check_ranges(config.prompts or protocol.prompts, config.seeds or protocol.seeds)

    # PyTorch and diffusers take seconds to import: wrong flags have been refused by now
    quiet_libraries()
    from inference.adapter_files import inspect_adapter, recorded_config
    from inference.base import check_device
    from inference.columns import open_listed
    from inference.pipelines import check_hardware, choose_base
    from judging.comparison import method_differences, score_summary

    check_hardware(config)
    for path in adapters.values():
        inspect_adapter(path)
    recorded = [recorded_config(path) for path in adapters.values()]
    plan = None
    if adapters:
        plan = plan_images(config, recorded)
        config = choose_base(config, str(next(iter(adapters.values()))))
    folder = instance_folder(config.instance_images, recorded)
    instances = instance_pictures(folder)
    scorer = load_scorer(config, folder, instances, check_device(config.device))
    scores = score_adapters(config, adapters, plan, scorer) if plan else {}
    for name, files in listed.items():
        drawn = open_listed(files)
        scores[name] = {**scorer.score(drawn), "copies": scorer.copies(drawn)}
    result = {
        "version": SCORES_VERSION,
        "encoders": {"clip": config.clip, "dino": config.dino}
        | ({"attributes": config.attributes} if config.attributes else {}),
        "protocol": config.protocol if adapters and not config.prompts else None,
        "seeds": plan.seeds if plan else None,
        "prompts": plan.prompts["subject"] if plan else None,
        "instance_images": len(instances),
        "scores": {name: score_summary([one]) for name, one in scores.items()},
        "differences": method_differences({name: {0: one} for name, one in scores.items() if name != BASE_COLUMN}),
        "draws": {name: {key: one[key] for key in one if key != "copies"} for name, one in scores.items()},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def score_adapters(
    config: EvaluateConfig, adapters: Mapping[str, Path], plan: Plan, scorer: Scorer
) -> dict[str, dict[str, Any]]:
    """Draws and copies of the base and of each adapter, by column; of the adapters also how far they drift from it."""
    from inference.columns import CachedSampler, SampleSet, picture_folder

    models: dict[str, Path | None] = {BASE_COLUMN: None, **adapters}
    sets = {
        (name, kind): SampleSet(name, path, prompts, config.scales[0] if path else 1.0)
        for name, path in models.items()
        for kind, prompts in plan.prompts.items()
    }
    sampler = CachedSampler(config, picture_folder(Path(config.output)))
    drawn = dict(zip(sets, sampler.draw(list(sets.values()), plan.seeds)))
    scores: dict[str, dict[str, Any]] = {name: dict(scorer.score(drawn[name, "subject"])) for name in models}
    for name in models:
        scores[name]["copies"] = scorer.copies(drawn[name, "subject"])
    for kind in ("drift", "class_drift"):
        base = scorer.features(drawn[BASE_COLUMN, kind])
        for name in adapters:
            scores[name][kind] = scorer.drift(drawn[name, kind], base)
    return scores


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(
        EvaluateConfig, argv, prog="python -m judging.evaluate", description="Score adapters on a subject."
    )

    def command() -> None:
        result = run(config)
        print(score_table(result))
        for name, scores in result["scores"].items():
            warn_of_copies(name, scores["copies"])
        print(f"scores: {config.output}")

    run_command(command)


if __name__ == "__main__":
    main()
