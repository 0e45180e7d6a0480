"""The study: what it compares, how it chooses rates, what it measures and how it is written down."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from scipy import stats
from waiting import until

from benchmarks.study import trainings
from benchmarks.study.__main__ import main, report
from benchmarks.study.plots import less_first
from benchmarks.study.report import by_seeds, difference_table, draws, group_table, other_scores, paired_differences
from benchmarks.study.settings import (
    BUDGETS,
    attention_layers,
    groups_of,
    rank_said,
    rates_of,
    setting,
    trained_parameters,
)
from benchmarks.study.trainings import Laboratory, NotMeasured, Training
from benchmarks.study.tuning import Tuning, rates_table, shortfall, tune
from judging import statistics
from methods.registry import METHODS, PRESETS, resolve
from trainer.diagnostics import TrainingFailure
from trainer.models import make_run_adapter
from trainer.preflight import check_fits_base, preflight

ASSETS = Path(__file__).parent.parent / "assets"
BASE = str(ASSETS / "tiny-sdxl")


@pytest.fixture(scope="module")
def groups():
    return groups_of(attention_layers(BASE))


def test_every_method_is_compared_within_the_budgets(groups):
    layers = attention_layers(BASE)
    sides = sum(layer.number * (layer.m + layer.n) for layer in layers)
    for rank, rows in zip(BUDGETS, groups.values()):
        for one in rows.values():
            assert 0 < trained_parameters(one, layers) <= rank * sides, one.key
    middle = list(groups.values())[BUDGETS.index(4)]
    assert {one.method for one in middle.values()} == set(METHODS)
    assert next(iter(middle.values())).method == "lora"  # what the others are compared with


def test_every_preset_of_nora_is_among_the_ranks(groups):
    measured = [resolve("nora", one.args, {}) for one in groups["NoRA: outer and inner rank"].values()]
    for preset in PRESETS:
        assert resolve("nora", [], {"preset": preset}) | {"preset": "default"} in measured, preset


def test_one_setting_has_one_key():
    assert setting("nora", ["rank=8", "structure=serial", "position=a"]).key == "nora rank=8"
    assert setting("nora", ["outer_rank=64", "rank=8"]) == setting("nora", ["rank=8", "outer_rank=64"])


def test_rates_lie_around_the_sources():
    assert rates_of("lora") == (3.3e-4, 1e-3, 3e-3, 9e-3)
    assert all(len(set(rates_of(name))) == 4 and min(rates_of(name)) > 0 for name in METHODS)


def test_the_trainer_takes_every_setting(groups, tmp_path):
    laboratory = Laboratory(BASE, ASSETS / "subjects", tmp_path, "", "")
    robot = ASSETS / "subjects" / "robot"
    for key, one in {one.key: one for rows in groups.values() for one in rows.values()}.items():
        flags = laboratory.flags(
            Training(one, "robot", 0, 1e-3, 10), robot, None, "a photo of [V] robot", tmp_path / key
        )
        config, pictures = preflight(flags)
        check_fits_base(config.base, config.loss, config.text, make_run_adapter(config), pictures, ())


class Parabola(Laboratory):
    """A laboratory whose loss is known: least at one rate, NaN from another on, and no training far beyond it."""

    best, diverges = 1e-3, math.inf
    asked: list

    def measure(self, training, scored):
        assert not scored
        self.asked.append(training)
        if training.rate > 3 * self.diverges:
            return {"failed": "the loss is nan at step 3"}
        distance = abs(math.log(training.rate / self.best))
        return {"held_out": math.nan if training.rate >= self.diverges else distance}


@pytest.mark.parametrize(
    ("best", "diverges", "chosen"),
    [(3e-3, math.inf, 3e-3), (8e-2, math.inf, 8.1e-2), (1.2e-5, math.inf, 1.2e-5), (1.0, 5e-3, 3e-3)],
    ids=["inside", "above", "below", "at the edge of divergence"],
)
def test_the_best_rate_is_found_inside_and_beyond_the_ends(best, diverges, chosen, tmp_path):
    laboratory = Parabola(BASE, tmp_path, tmp_path, "", "")
    object.__setattr__(laboratory, "asked", [])
    object.__setattr__(laboratory, "best", best)
    object.__setattr__(laboratory, "diverges", diverges)
    found = tune(laboratory, setting("lora", []), ["dog", "robot"], 100)
    assert found.rate == pytest.approx(chosen, rel=0.05)
    short = [one for one in laboratory.asked if one.steps == 50]
    assert len(short) == 4 and {one.subject for one in short} == {"dog"}  # the first rung is cheap


def test_of_rates_that_learn_nothing_the_higher_is_taken(tmp_path):
    """AdaLoRA's pictures were the base's at four rates, and lower ones yet were tried."""

    class Flat(Laboratory):
        def measure(self, training, scored):
            kept = {"attributes": 0.2, "scene": 1.0} if training.rate < 0.05 else {"attributes": 0.6, "scene": 1.0}
            return {"failed": "nan"} if training.rate > 0.1 else {"reading": kept}

    assert tune(Flat(BASE, tmp_path, tmp_path, "", ""), setting("adalora", []), ["dog"], 100).rate == 8.1e-2


def test_what_a_rate_was_chosen_by_is_written_down():
    tried = Tuning({1e-3: 0.4, 9e-3: math.inf, 3e-3: 0.25}, {1e-3: 0.3, 3e-3: 0.2})
    row = "| lora | 0.001: 0.600, 0.003: 0.750, 0.009: diverged | 0.001: 0.700, **0.003: 0.800** |"
    assert rates_table({"lora": tried}, read=True).splitlines()[2] == row
    assert "| 0.001: 0.300, **0.003: 0.200** |" in rates_table({"lora": tried}, read=False)


def record(subject, seed, loss, **scores):
    return {
        **{"subject": subject, "seed": seed, "held_out": loss, "rate": 1e-3, "seconds": 5.0, "copies": 0.0},
        **{"trained_parameters": 1000, "scores": scores, "base": {"dino": 0.5}},
    }


def test_tables_hold_means_and_paired_differences():
    noise = {("cat", 0): 0.0, ("cat", 1): 0.2, ("dog", 0): 0.4, ("dog", 1): 0.1, ("fox", 0): 0.3, ("fox", 1): 0.25}
    first = [record(*place, 0.9 + size, dino=0.6) for place, size in noise.items()]
    other = [record(*place, 0.8 + size + size / 100, dino=0.6) for place, size in noise.items()]
    rows = {"LoRA": first, "NoRA": other}
    ranks = {"LoRA": "4 (3–4 %)"}
    assert group_table(rows, ranks).splitlines() == [
        "|  | rank, of the layers | trained | learning rate | Held-out loss ↓ | DINO ↑ "
        "| Held-out loss ↓, less LoRA's | detectable |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| base | – | – | – | 1.000 | 0.500 | – | – |",
        "| LoRA | 4 (3–4 %) | 1,000 | 0.001 | 1.108 | 0.600 | – | – |",
        "| NoRA | – | 1,000 | 0.001 | 1.010 | 0.600 | -0.098 [-0.101, -0.095], p 0.002 | 0.004 |",
    ]
    paper = group_table(rows, ranks, ("the paper's Table 4", {"NoRA": "44.3"})).splitlines()
    assert [line.split(" | ")[:2] for line in paper[2:]] == [["| base", "–"], ["| LoRA", "–"], ["| NoRA", "44.3"]]
    assert other_scores(rows).splitlines()[::2] == [
        "|  | CPU s | Copies ↓ |",
        "| base | – | – |",
        "| NoRA | 5 | 0.000 |",
    ]
    assert "NoRA − LoRA | -0.098" in difference_table(rows)
    # far apart when paired, though each varies more between subjects than they differ
    found = {
        score: statistics.differences(draws(first, score), {"NoRA": draws(other, score)})["NoRA"].shown
        for score in ("held_out", "dino", "copies")
    }
    assert found == {"held_out": True, "dino": False, "copies": False}
    assert difference_table({"LoRA": rows["LoRA"]}) is None
    assert paired_differences({"LoRA": first, "NoRA": other[:-1]}, "held_out") == {}  # on other subjects and seeds


def test_few_trainings_are_not_taken_for_many():
    """Six subjects that hardly differ, two training seeds that do: the interval is Student's over the two."""
    subjects = ("cat", "dog", "fox", "hen", "owl", "pig")
    first = [record(subject, seed, 1.0) for subject in subjects for seed in (0, 1)]
    other = [record(subject, seed, 1.0 + seed / 10) for subject in subjects for seed in (0, 1)]
    found = paired_differences({"LoRA": first, "NoRA": other}, "held_out")["NoRA"].interval
    half = stats.t.ppf(0.975, 1) * 0.05
    assert (found.low, found.high) == (pytest.approx(0.05 - half), pytest.approx(0.05 + half))


def test_attributes_and_scene_count_alike():
    rows = {"LoRA": [record("cat", 0, 1.0, attributes=0.25, scene=1.0)]}
    table = group_table(rows, {}).splitlines()
    assert table[0].split(" | ")[4] == "Attributes and scene ↑" and table[3].split(" | ")[4] == "0.625"


def test_settings_are_compared_by_the_seeds_that_they_share():
    def measured(*seeds):
        return [record(subject, seed, 1.0) for subject in ("cat", "dog") for seed in seeds]

    def tables(**rows):
        found = by_seeds(rows, ["cat", "dog"])
        assert all(
            {one["seed"] for one in own} == set(seeds) for seeds, there in found.items() for own in there.values()
        )
        return {seeds: list(there) for seeds, there in found.items()}

    three, one = measured(0, 1, 2), measured(0)
    assert tables(lora=three, nora=three) == {(0, 1, 2): ["lora", "nora"]}
    assert tables(lora=three, nora=three, dora=one) == {(0, 1, 2): ["lora", "nora"], (0,): ["lora", "nora", "dora"]}
    assert tables(lora=three, dora=one) == {(0,): ["lora", "dora"]}  # one alone isn't compared
    assert tables(lora=[*one, record("cat", 1, 1.0)], nora=one, dora=[]) == {(0,): ["lora", "nora"]}
    assert tables(lora=three) == {(0, 1, 2): ["lora"]} and tables(lora=[]) == {}


def test_a_groups_report_has_its_plot_where_settings_are_compared(tmp_path):
    curves = {"curve": [[1, 0.2], [2, 0.1]], "losses": [[1, 0.3], [2, 0.2]]}
    rows = {
        name: [record("cat", seed, loss + seed / 10) | curves for seed in (0, 1)]
        for name, loss in (("LoRA", 0.9), ("NoRA", 0.8))
    }
    text = report("Rank 4, both", rows | {"DoRA": []}, ["cat"], {}, tmp_path)
    assert "loss, first fifth ↓ | 1000 × loss, last fifth ↓" in text and "| 300.000 | 200.000 |" in text
    assert "Training seeds 0, 1:" in text and text.endswith("\n\nNot measured: DoRA.")
    assert "![Rank 4, both](" + tmp_path.name + "/rank-4-both.png)" in text
    with Image.open(tmp_path / "rank-4-both.png") as picture:
        assert picture.format == "PNG" and picture.width > 500
    assert "![" not in report("LoRA alone", {"LoRA": rows["LoRA"]}, ["cat"], {}, tmp_path)
    text = report("Both", rows | {"DoRA": rows["NoRA"][:1]}, ["cat"], {}, tmp_path)
    assert "Training seed 0:" in text and "Not measured" not in text
    assert {file.name for file in tmp_path.glob("both*")} == {"both.png", "both-seeds-0-1.png"}
    lost = {"subject": "cat", "seed": 0, "failed": "the loss is nan at step 3"}
    assert "Diverged on a subject at the rate that was chosen: DoRA." in report(
        "x", rows | {"DoRA": [lost]}, ["cat"], {}
    )
    assert report("none", {"LoRA": [], "NoRA": []}, ["cat"], {}, tmp_path) == "## none\n\nNot measured: LoRA; NoRA."


def test_losses_over_steps_are_less_the_first_rows_of_the_same_subject_and_seed():
    def curves(offset, *seeds):
        return [
            {"subject": "cat", "seed": seed, "curve": [[5, 0.4 + offset + seed], [10, 0.3 + 2 * offset + seed]]}
            for seed in seeds
        ]

    found = less_first({"LoRA": curves(0, 0, 1), "NoRA": curves(-0.1, 0), "DoRA": curves(0.1, 2)}, "curve")
    np.testing.assert_allclose(found["NoRA"], [[5, 10], [-100, -200]])  # and not by its own start, which is lower
    np.testing.assert_allclose(found["LoRA"], [[5, 10], [0, 0]])
    assert list(found) == ["LoRA", "NoRA"]  # DoRA shares no seed with LoRA
    assert less_first({"LoRA": curves(0, 0)}, "curve") == less_first({"LoRA": [], "NoRA": []}, "losses") == {}


RESULTS = ["--work", str(ASSETS.parent / "benchmarks" / "study" / "results")]
STUDY = ["--tuning_subjects", "bear", "bird", "--measured"]


def test_the_tables_in_the_docs_are_of_the_results(monkeypatch, tmp_path):
    monkeypatch.chdir(ASSETS.parent)
    monkeypatch.delattr(trainings, "train")
    main([*STUDY, *RESULTS, "--attributes", "assets/tiny-attributes", "--output", str(tmp_path / "tables.md")])
    tables = (tmp_path / "tables.md").read_text()
    kept = Path("docs/study-tables.md").read_text()
    assert re.sub(r"\n*!\[.*\)", "", kept) == tables
    rows = [
        line for line in Path("docs/study.md").read_text().splitlines() if re.search(r"\| \d+,\d{3} \| [\d.]+ \|", line)
    ]
    assert len(rows) > 20 and [row for row in rows if row not in tables] == []


def test_the_docs_say_how_much_is_measured(groups):
    root = ASSETS.parent
    lines = (root / "benchmarks/study/results/trainings.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    scored = {one["training"].split(f" {one['subject']} seed ")[0] for one in records if "scores" in one}
    settings = {one.key for rows in groups.values() for one in rows.values()}
    assert scored <= settings
    page, readme = (" ".join((root / name).read_text().split()) for name in ("docs/study.md", "README.md"))
    assert f"Measured are {len(scored)} of {len(settings)} settings" in page
    assert f"{len(scored)} of the study's {len(settings)} settings are measured" in readme
    assert f"The {len(records)} that are measured" in page
    middle = next(rows for title, rows in groups.items() if "rank 4" in title)
    assert {one.key for one in middle.values()} <= scored and "every method of the registry" in page


def test_tables_of_no_results_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*STUDY, "--work", str(tmp_path / "new")])
    assert "new has no trainings: leave --measured out to make some" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("method", "args", "said"),
    [
        ("lora", ["rank=16"], "16 (10–17 %)"),
        ("nora", ["rank=8"], "8 (5–8 %) in 64 (40–67 %)"),
        ("nora", ["rank=16"], "16 (10–17 %) in 128 (80–100 %)"),  # 96 in layers that are 96 wide
        ("adalora", ["init_rank=9", "target_rank=8"], "8 (5–8 %)"),
        ("oft", [], None),
    ],
)
def test_ranks_are_said_as_shares_of_the_layers(method, args, said):
    assert rank_said(setting(method, args), attention_layers(BASE)) == said


def test_training_losses_are_means_over_parts_of_the_steps():
    lines = [{"step": step, "loss": step / 10} for step in range(1, 11)] + [{"step": 10, "validation_loss": 9.0}]
    assert trainings.mean_losses(lines, 5) == [(step, pytest.approx((2 * step - 1) / 20)) for step in range(2, 11, 2)]
    assert trainings.mean_losses(lines[:2], 5) == [(1, 0.1), (2, 0.2)]


def test_results_are_of_one_base(tmp_path, monkeypatch):
    subject = tmp_path / "subjects" / "robot"
    subject.mkdir(parents=True)
    laboratory = Laboratory(BASE, tmp_path / "subjects", tmp_path / "work", "clip", "dino")
    laboratory.claim()
    elsewhere = shutil.copytree(tmp_path / "subjects", tmp_path / "copied")
    Laboratory(BASE, elsewhere, tmp_path / "work", "clip", "dino").claim()  # as in another checkout
    (subject.parent / "README.md").write_text("who drew them")
    laboratory.claim()
    for changed, name in (
        (replace(laboratory, base="a/hub-id"), "base"),
        (replace(laboratory, clip="another/hub-id"), "clip"),
        (replace(laboratory, attributes="reader"), "attributes"),
    ):
        with pytest.raises(ValueError, match=rf"has results of other files or numbers \({name}\)"):
            changed.claim()
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"\(protocol\)"):
        patch.setattr(trainings, "PICTURE_SEEDS", [1000])
        laboratory.claim()
    (subject / "new.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"\(subjects\)"):
        laboratory.claim()


def test_a_training_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "DRAWING_STEPS", 1)
    monkeypatch.setattr(trainings, "PICTURE_SEEDS", [1000])
    monkeypatch.setattr(trainings, "HELDOUT_SAMPLES", 16)
    laboratory = Laboratory(BASE, ASSETS / "subjects", tmp_path, str(ASSETS / "tiny-clip"), str(ASSETS / "tiny-dino"))
    training = Training(setting("nora", ["rank=2"]), "robot", 0, 1e-3, 1)
    assert laboratory.found(training, scored=False) is None
    found = laboratory.measure(training, scored=True)
    assert 0.5 < found["held_out"] < 1.5 and found["curve"][0][0] == 1
    assert [step for step, _ in found["losses"]] == [1]
    assert {"dino", "clip_i", "clip_t", "drift"} <= set(found["scores"]) and "dino" in found["base"]
    laboratory = replace(laboratory, attributes=str(ASSETS / "tiny-attributes"))
    tried = laboratory.measure(tuning := training._replace(seed=100), scored=False)
    assert set(tried["reading"]) == {"attributes", "scene"} and "scores" not in tried
    assert shortfall(tried) == 1 - sum(tried["reading"].values()) / 2

    def diverges(config):
        raise TrainingFailure("the loss is nan at step 3")

    monkeypatch.setattr(trainings, "train", diverges)
    lost = laboratory.measure(training._replace(rate=1e3), scored=True)
    assert lost["failed"] == "the loss is nan at step 3" and shortfall(lost) == math.inf
    monkeypatch.delattr(trainings, "train")
    assert laboratory.measure(training._replace(rate=1e3), scored=True) == lost
    assert laboratory.records([training, training._replace(rate=1e3)]) == [json.loads(json.dumps(found)), lost]
    with pytest.raises(NotMeasured, match="seed 1 "):
        replace(laboratory, trains=False).measure(training._replace(seed=1), scored=True)
    assert laboratory.measure(training, scored=True) == json.loads(json.dumps(found))
    assert laboratory.measure(tuning, scored=False) == tried
    assert laboratory.found(tuning, scored=True) is None


def test_workers_end_with_a_command_that_is_killed():
    work = "import time; from benchmarks.study.workers import in_processes; in_processes(1, time.sleep, [600])"
    command = subprocess.Popen([sys.executable, "-c", work], cwd=ASSETS.parent)
    own = psutil.Process(command.pid)
    try:
        workers = until(lambda: [one for one in own.children() if "spawn_main" in " ".join(one.cmdline())])
        until(lambda: workers[0].num_threads() > 1 and workers[0].cpu_times().user > 1)  # it has its libraries
    finally:
        command.kill()
        command.wait()
    until(lambda: not workers[0].is_running() or workers[0].status() == psutil.STATUS_ZOMBIE)
