"""judging.evaluate: the command on a tiny base, and refusals."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tiny_sdxl import saved_base, saved_lora, saved_nora

from inference.manifest import write_manifest
from judging.evaluate import main
from judging.scorer import Scorer
from storage.pictures import open_image

ASSETS = Path(__file__).parent.parent / "assets"
ROBOT = ASSETS / "subjects" / "robot"
JUDGES = ["--clip", str(ASSETS / "tiny-clip"), "--dino", str(ASSETS / "tiny-dino")]
QUICK = ["--num_inference_steps", "1", "--batch_size", "8", "--seeds", "5", "6"]
SUBJECT = ["--subject", "[V] robot", "--instance_images", str(ROBOT)]
NORA = [
    *JUDGES,
    *QUICK,
    *SUBJECT,
    "--adapters",
    f"nora={saved_nora()}",
    "--prompts",
    "a [V] robot",
    "[V] robot at night",
]


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    output = tmp_path_factory.mktemp("scores") / "scores.json"
    main([*NORA, "--output", str(output)])
    return output


def test_the_same_command_gives_the_same_file(scores, tmp_path, capsys, monkeypatch):
    first = scores.read_bytes()
    with monkeypatch.context() as patch:  # with the pictures of the first: not even the base is loaded
        patch.setattr("inference.columns.pipeline_for", lambda *args: pytest.fail("nothing is missing"))
        main([*NORA, "--output", str(scores)])
    printed = capsys.readouterr().out
    assert scores.read_bytes() == first
    main([*NORA, "--output", str(tmp_path / "scores.json")])  # with its own
    assert (tmp_path / "scores.json").read_bytes() == first
    assert "| nora |" in printed and "DINO" in printed


def test_what_is_scored(scores):
    result = json.loads(scores.read_text())
    assert set(result["scores"]) == {"base", "nora"} and result["instance_images"] == 6
    base, nora = result["scores"]["base"], result["scores"]["nora"]
    assert set(nora) == {"dino", "clip_i", "clip_t", "diversity", "drift", "class_drift", "copies"}
    assert set(base) == {"dino", "clip_i", "clip_t", "diversity", "copies"}  # the base drifts from nothing
    known = ("dino", "clip_i", "clip_t")
    assert nora["drift"]["estimate"] > 1e-4 and all(-1 <= nora[key]["estimate"] <= 1 for key in known)
    assert nora["dino"]["varies"] == ["prompts", "seeds"] and nora["dino"]["count"] == [2, 2]
    assert nora["dino"]["low"] < nora["dino"]["estimate"] < nora["dino"]["high"] and nora["dino"]["level"] == 0.95
    assert nora["diversity"]["varies"] == ["prompts"] and nora["drift"]["count"] == [10, 2]
    drawn = [value for seeds in result["draws"]["nora"]["dino"].values() for value in seeds.values()]
    assert len(drawn) == 4 and nora["dino"]["estimate"] == pytest.approx(sum(drawn) / 4)
    assert result["version"] == 2 and result["differences"] is None and nora["copies"]["pictures"] == 4
    pictures = list((scores.parent / "pictures" / "nora").glob("*.png"))
    assert len(pictures) == 2 * (2 + 10 + 3)  # subject, unrelated and class prompts, with two seeds each


def test_an_adapter_at_scale_zero_does_not_drift(tmp_path):
    main([*NORA, "--scale", "0", "--output", str(tmp_path / "scores.json")])
    result = json.loads((tmp_path / "scores.json").read_text())["scores"]
    for kind in ("drift", "class_drift"):
        assert abs(result["nora"][kind]["estimate"]) < 1e-6
    assert result["nora"]["dino"] == result["base"]["dino"]


def test_pictures_of_a_manifest_and_the_alarm(tmp_path, capsys):
    """Training images as if they had been drawn: fidelity is theirs among themselves, and the alarm is raised."""
    records = []
    for seed, path in enumerate(sorted(ROBOT.glob("*.png"))):
        shutil.copy(path, tmp_path / path.name)
        records.append({"file": path.name, "prompt": "a photo of [V] robot", "seed": seed})
    write_manifest(tmp_path, records)
    flags = [*JUDGES, "--instance_images", str(ROBOT), "--images", f"copies={tmp_path}"]
    main([*flags, "--output", str(tmp_path / "scores.json")])
    found = json.loads((tmp_path / "scores.json").read_text())["scores"]["copies"]
    assert found["copies"]["count"] == found["copies"]["pictures"] == 6 and found["copies"]["alarm"]
    assert found["dino"]["varies"] == ["seeds"]
    scorer = Scorer(*JUDGES[1::2], [open_image(path) for path in sorted(ROBOT.glob("*.png"))], "cpu")
    own = scorer.dino_instances @ scorer.dino_instances.T
    assert found["dino"]["estimate"] == pytest.approx(own.mean().item(), abs=1e-6)
    printed = capsys.readouterr()
    assert "warning: copies draws its training images: 6 of its 6 pictures are copies" in printed.err
    assert "| 6 of 6 **COPIES** |" in printed.out


def test_methods_are_compared_in_pairs(tmp_path, capsys):
    """Two adapters of the same prompts and seeds: which differences are shown, and which would have been."""
    command = [*NORA, f"--adapters=lora={saved_lora()}", "--output", str(tmp_path / "scores.json")]
    main(command)
    result, printed = json.loads((tmp_path / "scores.json").read_text()), capsys.readouterr().out
    assert result["differences"]["first"] == "nora" and set(result["differences"]["others"]) == {"lora"}
    found = result["differences"]["others"]["lora"]
    assert set(found) == {"dino", "clip_i", "clip_t", "diversity", "drift", "class_drift"}
    for key, difference in found.items():
        own = result["scores"]["lora"][key]["estimate"] - result["scores"]["nora"][key]["estimate"]
        assert difference["estimate"] == pytest.approx(own, abs=1e-9) and 0 <= difference["p_value"] <= 1, key
    assert "| lora − nora |" in printed and "- lora " in printed and "at 2 prompts × 2 seeds" in printed


def test_pictures_of_several_scales_are_not_mixed(tmp_path, capsys):
    records = []
    for scale, path in zip((0, 0.5, 1), sorted(ROBOT.glob("*.png"))):
        shutil.copy(path, tmp_path / path.name)
        records.append({"file": path.name, "prompt": "a [V] robot", "seed": 0, "adapter": ["x"], "scale": scale})
    write_manifest(tmp_path, records)
    flags = [
        *JUDGES,
        "--instance_images",
        str(ROBOT),
        "--images",
        f"x={tmp_path}",
        "--output",
        str(tmp_path / "s.json"),
    ]
    with pytest.raises(SystemExit):
        main(flags)
    assert "--images x has pictures at scales 0, 0.5, 1: keep each" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag",
    ["--vae=x", "--refiner=x", "--refiner_start=.5", "--scheduler=x", "--num_inference_steps=7", "--guidance_scale=1"]
    + ["--height=64", "--batch_size=1", "--dtype=fp32", "--negative_prompt=x", "--base=x", "--scale=.5"]
    + ["--live_subject", "--protocol=dreambooth", "--protocol_subject=dog", "--seeds=1", "--class_name=x"],
)
def test_flags_of_drawing_are_refused_where_nothing_is_drawn(flag, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*JUDGES, *SUBJECT[2:], "--images", f"x={tmp_path}", flag])
    name = flag.split("=")[0]
    assert f"error: {name} is for what is drawn, and --images are there already" in capsys.readouterr().err


def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "protocol.yaml").write_text("images_per_prompt: 2\nboth_prompts: [a cat]\n")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "none.yaml").write_text('images_per_prompt: 0\nboth_prompts: ["a {} {x}"]\n')
    good = [*JUDGES, *SUBJECT, "--adapters", f"x={saved_lora()}"]
    cases = {
        "nothing": ([*JUDGES, *SUBJECT], "no adapter: give at least one"),
        "no subject": ([*JUDGES, "--adapters", f"x={saved_lora()}", "--instance_images", str(ROBOT)], "add --subject"),
        "no class": (
            [*good, "--subject", "TOK robot"],
            "no word stands in brackets, .* --class_name",
        ),
        "no pictures": ([*JUDGES, *SUBJECT[:2], "--adapters", f"x={saved_lora()}"], "with --instance_images"),
        "no protocol": ([*good, "--protocol", "mine"], "choose one of dreambooth, scenes"),
        "protocol without a place": ([*good, "--protocol", str(tmp_path / "protocol.yaml")], "with one {} for the"),
        "protocol of another form": ([*good, "--protocol", str(tmp_path / "list.yaml")], "must have both_prompts"),
        "protocol of no pictures": ([*good, "--protocol", str(tmp_path / "none.yaml")], "a whole number from 1"),
        "prompts for pictures that are there": ([*JUDGES, *SUBJECT, "--images", f"x={tmp_path}"], "--subject is for"),
        "empty subject": ([*good, "--subject", " "], "--subject is empty"),
        "no such subject": ([*good, "--protocol", "dreambooth", "--protocol_subject", "x"], "x is not in --protocol"),
        "no manifest": ([*JUDGES, *SUBJECT[2:], "--images", f"x={tmp_path / 'empty'}"], "has no manifest"),
        "animals of a protocol without": ([*good, "--live_subject"], "scenes has no prompts for animals"),
        "animals twice": (
            [*good, "--protocol", "dreambooth", "--protocol_subject", "dog6", "--live_subject"],
            "--protocol_subject dog6 says it already",
        ),
        "prompts twice": (
            [*good, "--protocol", "dreambooth", "--prompts", "a"],
            "--protocol has no effect on --prompts",
        ),
        "half a refiner": ([*good, "--refiner_start", "0.5"], "--refiner_start has no effect without --refiner"),
        "two scales": ([*good, "--scales", "0", "1"], "scores are of one scale"),
        "no CLIP": ([*good, "--clip", str(ASSETS / "tiny-dino")], "name a CLIP"),
        "no encoder": ([*good, "--dino", str(tmp_path / "empty")], "--dino .* could not be loaded"),
        "another base's": ([*good[:-1], f"x={saved_lora(hidden=64)}", "--base", str(saved_base())], "another base"),
    }
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for case, (command, words) in cases.items():
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--output", str(tmp_path / "new" / "scores.json")])
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert stopped.value.code == 2 and len(errors) == 1, (case, printed.err)
        assert re.search(words, errors[0]), (case, errors)
        assert sorted(tmp_path.rglob("*")) == before, case
