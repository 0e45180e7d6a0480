"""trainer.compare: several methods on one subject, one table, one page."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from scipy import stats
from tiny_sdxl import saved_base
from waiting import until

from inference.gallery import read_scores
from judging.copies import Copies
from judging.statistics import interval
from judging.tables import score_table
from settings.columns import CompareConfig
from trainer.compare import Run, main, of_columns, plan, summarise, train, train_all

ASSETS = Path(__file__).parent.parent / "assets"
ROBOT = str(ASSETS / "subjects" / "robot")
TRAIN = ["--pretrained_model_name_or_path", str(saved_base()), "--instance_data_dir", ROBOT]
TRAIN += ["--instance_prompt", "a photo of [V] robot", "--max_train_steps", "1", "--train_batch_size", "1"]
TRAIN += ["--num_validation_images", "0", "--report_to", "none"]
JUDGES = ["--clip", str(ASSETS / "tiny-clip"), "--dino", str(ASSETS / "tiny-dino")]


def test_trainings_scores_table_and_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["--methods", "lora", "--train_seeds", "0", "1", "--num_inference_steps", "1", "--seeds", "7"]
    command += [*JUDGES, "--output_dir", str(tmp_path), "--", *TRAIN]
    main(command)
    printed = capsys.readouterr().out
    table = (tmp_path / "table.md").read_text()
    assert "| lora |" in printed and "at 3" not in printed
    for cost in ("Trainable parameters", "Smallest exact file", "Seconds per step", "Peak memory", "Start-up"):
        assert f"| {cost} |" in table
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert set(scores) == {"base", "lora-seed0", "lora-seed1"}
    page = (tmp_path / "gallery.html").read_text()
    assert "lora-seed0" in page and "lora-seed1" not in page and scores["lora-seed0"] != scores["lora-seed1"]
    assert 'id="sort"' in page  # by the scores of single pictures
    assert json.loads((tmp_path / "lora-seed1" / "run.json").read_text())["seed"] == 1
    main(command)  # all is there: neither trained nor drawn again
    assert capsys.readouterr().out.count("there already") == 2


def test_a_comparison_that_is_ended_ends_its_training_which_saves_and_begins_no_other(tmp_path):
    flags = [*TRAIN, "--max_train_steps", "100000", "--learning_rate", "1e-6"]
    command = [sys.executable, "-m", "trainer.compare", "--methods", "lora", "nora", *JUDGES]
    command += ["--output_dir", str(tmp_path), "--", *flags]
    comparison = psutil.Popen(command, cwd=ASSETS.parent, stderr=subprocess.DEVNULL)
    try:
        until(lambda: (metrics := tmp_path / "lora" / "metrics.jsonl").is_file() and metrics.read_text())
        [training] = comparison.children()
    finally:
        comparison.terminate()
        assert comparison.wait(60) == 128 + signal.SIGTERM
    assert not training.is_running()
    assert list((tmp_path / "lora").glob("checkpoint-*")) and not (tmp_path / "nora").exists()


def test_a_comparison_runs_in_a_thread_too():
    """Where no signal can be handled: those who run it there handle them."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train_all, [], 1).result()


@pytest.fixture
def trainings(monkeypatch):
    """What `train` starts, in the place of it: a function of the run's folder that may be cut off."""
    started = []

    def start(command, **options):
        started.append(command)
        trainings.commands.append(command)
        trainings.tokens.append(options["env"].get("HF_TOKEN"))
        folder = Path(command[command.index("--output_dir") + 1])
        if len(started) in trainings.cut_off:
            raise KeyboardInterrupt
        (folder / "run.json").write_text(json.dumps({"training": len(started)}))
        if len(started) in trainings.cut_off_late:
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(command, 0)

    def trainings(run):
        with contextlib.suppress(KeyboardInterrupt):
            train(run, None)
        return len(started), "--resume_from_checkpoint" in started[-1]

    trainings.cut_off, trainings.cut_off_late = (), ()
    trainings.commands, trainings.tokens = [], []
    monkeypatch.setattr(subprocess, "run", start)
    return trainings


def test_a_run_is_trained_again_if_what_it_was_trained_on_changed(tmp_path, trainings):
    pictures, base = tmp_path / "pictures", tmp_path / "base"
    shutil.copytree(ROBOT, pictures)
    base.mkdir()
    (base / "unet.safetensors").write_bytes(b"one")
    flags = [f"--instance_data_dir={pictures}", "--pretrained_model_name_or_path", str(base)]
    (run,) = plan(CompareConfig(methods=["lora"], output_dir=str(tmp_path / "out")), flags)
    assert trainings(run) == (1, True)
    assert trainings(run)[0] == 1  # there already
    shutil.copy(pictures / "01_portrait_white.png", pictures / "another.png")
    assert trainings(run) == (2, False) and trainings(run)[0] == 2
    (base / "unet.safetensors").write_bytes(b"other")
    assert trainings(run) == (3, False) and trainings(run)[0] == 3


def test_a_changed_picture_of_a_concept_and_in_a_sub_folder_is_seen(tmp_path, trainings):
    folders = {name: tmp_path / name for name in ("cat", "dog", "classes", "held", "masks")}
    for folder in folders.values():
        (folder / "sub").mkdir(parents=True)
        (folder / "a.png").write_bytes(b"one")
    entries = [
        {"instance_data_dir": str(folders["cat"]), "instance_prompt": "a [V] cat"},
        {
            "instance_data_dir": str(folders["dog"]),
            "instance_prompt": "a dog",
            "class_data_dir": str(folders["classes"]),
        },
    ]
    (tmp_path / "concepts.json").write_text(json.dumps(entries))
    flags = [f"--concepts_list={tmp_path / 'concepts.json'}", "--pretrained_model_name_or_path", "base"]
    flags += ["--validation_data_dir", str(folders["held"])]
    (run,) = plan(CompareConfig(methods=["lora"], output_dir=str(tmp_path / "out")), flags)
    count = trainings(run)[0]
    for changed in ("cat/a.png", "dog/b.png", "dog/a.txt", "classes/own.png", "held/a.txt", "cat/sub/c.png"):
        (tmp_path / changed).write_bytes(b"another")
        assert trainings(run)[0] == count + 1, changed
        count += 1
        assert trainings(run)[0] == count
    (tmp_path / "cat/sub/c.png").rename(tmp_path / "cat/c.png")  # of the same name, in another folder
    assert trainings(run)[0] == count + 1
    (folders["classes"] / "class-01234567-seed000001.png").write_bytes(b"drawn by the run")
    assert trainings(run)[0] == count + 1


def test_a_hub_token_stands_in_no_file_and_on_no_command_line(tmp_path, trainings):
    for said in (["--hub_token", "hf_secret"], ["--hub_token=hf_secret"], ["--hub-token=hf_secret"]):
        flags = [*TRAIN, *said, "--push_to_hub", "--validation_prompt", "a cat"]
        (run,) = plan(CompareConfig(methods=["lora=--method lora --rank 2"], output_dir=str(tmp_path / "out")), flags)
        assert trainings(run)[0] == 1  # another way of saying the same
    assert trainings.tokens == ["hf_secret"] and "hf_secret" not in " ".join(trainings.commands[0])
    assert trainings.commands[0][2 : 2 + len(TRAIN)] == TRAIN and "a cat" in trainings.commands[0]
    # a file of before, which had it
    command_file = tmp_path / "out" / "lora" / "compare.json"
    begun = json.loads(command_file.read_text())
    command_file.write_text(json.dumps(begun | {"flags": [*begun["flags"], "--hub_token", "hf_secret"]}))
    assert trainings(run)[0] == 1
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not [path for path in written if b"hf_secret" in path.read_bytes()]


def test_a_run_that_was_cut_off_goes_on(tmp_path, trainings):
    (run,) = plan(CompareConfig(methods=["lora"], output_dir=str(tmp_path)), TRAIN)
    trainings.cut_off, trainings.cut_off_late = (1, 4), (2,)
    assert trainings(run) == (1, True)
    assert trainings(run) == (2, True)  # cut off after its record was written, while it drew its samples
    assert trainings(run)[0] == 2
    (other,) = plan(CompareConfig(methods=["lora"], output_dir=str(tmp_path)), [*TRAIN, "--rank", "2"])
    assert trainings(other) == (3, False)
    assert trainings(run) == (4, False)  # cut off before its first step: the other's record is still there
    assert trainings(run) == (5, False) and trainings(run)[0] == 5


def test_plan_and_its_refusals():
    config = CompareConfig(methods=["nora", "lora16=--method lora --rank 16"], train_seeds=[3, 4], output_dir="out")
    runs = plan(config, ["--learning_rate", "1e-3"])
    assert [run.folder.name for run in runs] == ["nora-seed3", "nora-seed4", "lora16-seed3", "lora16-seed4"]
    assert [run.folder for run in plan(CompareConfig(), [])] == [Path("out/compare/nora"), Path("out/compare/lora")]
    assert runs[3].flags == ["--learning_rate", "1e-3", "--method", "lora", "--rank", "16", "--seed", "4"]
    for options, flags, words in (
        ({"methods": ["lora", "lora"]}, [], "--methods has lora twice"),
        ({"train_seeds": [1, 1]}, [], "a seed is given twice"),
        ({}, ["--seed", "3"], "--seed is this command's own"),
        ({}, ["--output_dir=x"], "--output_dir is this command's own"),
        ({"methods": ["x=--method lora --seed 7"]}, [], "--seed is this command's own"),
        ({"methods": ["x='"]}, [], "--methods x=': No closing quotation"),
        ({"methods": ["base=--method lora"]}, [], "base is no name"),
        ({"methods": ["..=--method lora"]}, [], "is no name for a folder"),
        ({"methods": ["a/b=--method lora"]}, [], "a/b is no name"),
    ):
        with pytest.raises(ValueError, match=words):
            plan(CompareConfig(**options), flags)


def training(folder, mean, copies=0, trained=1000, seconds=0.25):
    """A finished training whose pictures, two prompts with two seeds each, scored around a mean."""
    folder.mkdir(parents=True)
    record = {"trainable_parameters": trained, "timings": {"seconds_per_step": seconds, "encode_seconds": 2.0}}
    record |= {"peak_memory_mb": 77.0, "files": {"pytorch_lora_weights.safetensors": 5000}}
    record["timings"]["inject_seconds"] = 1.5
    (folder / "run.json").write_text(json.dumps(record))
    dino = {"a": {0: mean - 0.1, 1: mean + 0.1}, "b": {0: mean - 0.2, 1: mean + 0.2}}
    return {"dino": dino}, Copies.of(copies, 4).fields()


@pytest.fixture
def compared(tmp_path):
    """Three trainings of each of two methods, and the base."""
    runs, draws, scores = [], {}, {}
    for method, means in (("lora", (0.1, 0.2, 0.3)), ("nora", (0.15, 0.25, 0.38))):
        for seed, mean in enumerate(means):
            name = f"{method}-seed{seed}"
            runs.append(Run(name, method, seed, tmp_path / name, []))
            draws[name], copies = training(tmp_path / name, mean, copies=3 * (method == "lora"))
            scores[name] = {"copies": copies}
    base = {"dino": interval([{"a": {0: 0.0, 1: 0.1}}]).fields(), "copies": Copies.of(0, 4).fields()}
    return summarise({"scores": scores | {"base": base}, "draws": draws}, runs)


def test_trainings_are_what_varies_and_are_paired_by_their_seed(compared):
    lora, found = compared["scores"]["lora"]["dino"], compared["differences"]["others"]["nora"]["dino"]
    assert lora["estimate"] == pytest.approx(0.2)
    assert lora["varies"] == ("trainings", "prompts", "seeds") and lora["count"] == (3, 2, 2)
    assert lora["high"] - lora["low"] >= 2 * 4.30265 * 0.1 / 3**0.5 - 1e-9  # Student's over the trainings alone
    expected = stats.ttest_rel([0.15, 0.25, 0.38], [0.1, 0.2, 0.3])
    assert found["estimate"] == pytest.approx(0.06) and found["p_value"] == pytest.approx(expected.pvalue, rel=0.01)
    assert found["high"] - found["estimate"] < 0.05 < lora["high"] - lora["estimate"]  # what they share cancels
    assert compared["scores"]["lora"]["copies"]["count"] == 9 and compared["scores"]["lora"]["copies"]["alarm"]


def test_the_table_says_costs_scores_and_what_follows(compared):
    text = score_table(compared)
    assert "| lora | 1,000 | 5 kB | 0.25 s | 77 MB | 3.5 s | 0.200 [" in text and "| 9 of 12 **COPIES** |" in text
    assert text.splitlines()[0].endswith("| Start-up | DINO ↑ | Copies of training images ↓ |")
    assert "| nora − lora | +0.060 [" in text and "- nora is 0.060 higher than lora in DINO: " in text


def test_page_and_table_show_the_same_figures(compared, tmp_path):
    """E3: they showed ± 0.012 and ± 0.004 of the same scores."""
    columns = {"lora": "lora-seed0", "nora": "nora-seed0"}
    (tmp_path / "summary.json").write_text(json.dumps(of_columns(compared, columns)))
    read, cells = read_scores(str(tmp_path / "summary.json")), score_table(compared)
    assert set(read.cells) == {"base", "lora-seed0", "nora-seed0"}
    for texts in (*read.cells.values(), *read.costs.values()):
        for text in texts.values():
            assert text.replace(" COPIES", " **COPIES**") in cells, text
    assert len(read.sentences) == 1
    for sentence in read.sentences:
        assert sentence.replace("-seed0", "") in cells


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--jobs", "0", "--", *TRAIN], "--jobs 0 must be at least 1"),
        (["--scales", "0", "1", "--", *TRAIN], "a comparison is at one scale"),
        (["--clip", "no/such", "--", *TRAIN], "--clip no/such"),
        ([*JUDGES, "--", *TRAIN, "--instance_prompt", "a photo of sks robot"], "stands in brackets, as [V] does: add"),
        ([*JUDGES, "--", *TRAIN, "--instance_prompt=a photo of sks robot"], "stands in brackets, as [V] does: add"),
        ([*JUDGES, "--", *TRAIN[:2], "--dataset_name", ROBOT, *TRAIN[4:]], "name the subject's with --instance_images"),
        ([*JUDGES, "--", *TRAIN, "--instance_data_dir", "gone"], "--instance_data_dir gone"),
        ([*JUDGES, "--", *TRAIN[:2], "--concepts_list", "x.json"], "no run says what the subject is: add --subject"),
        ([*JUDGES, "--instance_images", "gone", "--", *TRAIN], "--instance_images gone does not exist"),
        ([*JUDGES, "--protocol", "mine", "--", *TRAIN], "--protocol mine does not exist"),
        (
            [*JUDGES, "--methods", "lora", "--", *TRAIN, "--learning_rate", "-1"],
            "lora: --learning_rate -1.0 must be above 0",
        ),
        (
            [*JUDGES, "--methods", "nora", "lora=--method lora --rank 999", "--", *TRAIN],
            "lora: unet: --rank 999 exceeds min(out, in)=32",
        ),
        ([*JUDGES, "--", *TRAIN, "--instance_prompt", "[V] robot" + " robot" * 40], "nora: the prompt"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as stopped:
        main(["--output_dir", str(tmp_path / "new"), *flags])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(errors) == 1 and words in errors[0], errors
    assert not (tmp_path / "new").exists()
