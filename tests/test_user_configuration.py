"""Flags as users write them: in YAML, with ``~``, in other encodings."""

import contextlib
import io
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_flags import REQUIRED_FLAGS

from settings.columns import CompareConfig, EvaluateConfig, GalleryConfig, parse_named_paths
from settings.command_line import dataclass_flags, parse_config, record_flags
from settings.sampling import GenerateConfig
from settings.training import FLAGS, RECORDS, TrainConfig

ROOT = Path(__file__).parent.parent


def parsed(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode())
    return parse_config(TrainConfig, [*REQUIRED_FLAGS, f"--config={path}"]).flags()


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("mixed_precision: no", "mixed_precision", "no"),
        ("output_dir: 0042", "output_dir", "0042"),
        ("output_dir: 2024-01-01", "output_dir", "2024-01-01"),
        ("output_dir: 1_000", "output_dir", "1_000"),
        ("output_dir: 1:30", "output_dir", "1:30"),
        ("output_dir: off", "output_dir", "off"),
        ("validation_prompt: yes", "validation_prompt", ["yes"]),
        ("validation_prompt: [no, 010]", "validation_prompt", ["no", "010"]),
        ("validation_prompt: ['--a dash', '-1']", "validation_prompt", ["--a dash", "-1"]),
        ('validation_prompt: "a\u2028b"', "validation_prompt", ["a\u2028b"]),
        ("seed: 010", "seed", 10),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("max_train_steps: 1_000", "max_train_steps", 1000),
        ("center_crop: on", "center_crop", True),
        ("prodigy_decouple: off", "prodigy_decouple", False),
        ("output_dir:", "output_dir", "lora-dreambooth-model"),
        ("output_dir: null", "output_dir", "lora-dreambooth-model"),
        ('{"seed": 7,\t"center_crop": true}', "seed", 7),
        ("\ufeffseed: 7\r\nrank: 3\r\n", "seed", 7),
    ],
)
def test_a_config_file_means_what_was_written(tmp_path, text, name, value):
    assert parsed(tmp_path, text)[name] == value


@pytest.mark.parametrize("name", ["mixed_precision_no.yaml", "octal.yaml"])
def test_configs_that_were_read_wrongly(name):
    path = ROOT.parent / "shared" / "faults" / "inputs" / name
    if not path.is_file():
        pytest.skip("the shared inputs are not here")
    flags = parse_config(TrainConfig, [*REQUIRED_FLAGS, f"--config={path}"]).flags()
    expected = {"mixed_precision": "no"} if name.startswith("mixed") else {"seed": 10, "output_dir": "0042"}
    assert {name: flags[name] for name in expected} == expected


# --- home folders, and texts that can be written ---------------------------------------------------------------------

DRAWING_COMMANDS = (GenerateConfig, GalleryConfig, EvaluateConfig, CompareConfig)


def path_flags(flags):
    return [flag.name for flag in flags if re.search("_dir|_path|folder|Folder|Hub id|file", flag.name + flag.help)]


def test_every_flag_of_a_path_knows_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    no_path = {"method", "caption_column", "variant", "validation_prompt", "validation_loss_steps", "push_to_hub"}
    no_path |= {"output_kohya_format", "output_kohya_dtype", "license", "prediction_type", "zero_terminal_snr"}
    no_path |= {"class_prompt", "num_class_images", "hub_model_id", "output_peft_format", "convert_to_lora", "revision"}
    for part, record in RECORDS.items():
        for name in path_flags(record_flags(record)):
            if name in no_path:
                continue
            given = {"pretrained_model_name_or_path": "base"} if part == "base" else {}
            assert getattr(record(**given | {name: "~/x"}), name) == str(tmp_path / "x"), name
    for config_class in DRAWING_COMMANDS:
        for flag in dataclass_flags(config_class):
            if flag.name in no_path | {"adapters", "images", "methods"} or flag.name not in path_flags([flag]):
                continue
            value = ["~/x"] if flag.is_list else "~/x"
            found = getattr(config_class(**{flag.name: value}), flag.name)
            assert found == ([str(tmp_path / "x")] if flag.is_list else str(tmp_path / "x")), flag.name
    assert parse_named_paths(["a=~/x"], "--adapters") == {"a": tmp_path / "x"}


def test_a_home_folder_in_a_config_file(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parsed(tmp_path, "output_dir: ~/x\nencoded_cache_dir: ~/y")["output_dir"] == str(tmp_path / "x")
    assert parse_config(TrainConfig, [*REQUIRED_FLAGS, "--config=~/run.yaml"]).output.output_dir == str(tmp_path / "x")


def test_an_unknown_home_folder_is_one_sentence(capsys):
    for config_class, flags in (
        (TrainConfig, [*REQUIRED_FLAGS, "--output_dir=~no-such-user/x"]),
        (GenerateConfig, ["--vae=~no-such-user/x"]),
    ):
        with pytest.raises(SystemExit):
            parse_config(config_class, flags)
        assert "~no-such-user/x names a home folder that is not known here" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["instance_prompt", "output_dir", "validation_prompt", "hub_model_id"])
def test_arguments_that_are_not_utf8_are_refused_first(flag, capsys):
    argv = [*REQUIRED_FLAGS, f"--{flag}", "caf\udce9"]
    with pytest.raises(SystemExit):
        parse_config(TrainConfig, argv)
    assert f"--{flag} caf\\udce9 is not UTF-8" in capsys.readouterr().err


def test_prompts_that_are_not_utf8_are_refused_by_the_other_commands(capsys):
    for config_class, flag in (
        (GenerateConfig, "--prompt"),
        (GalleryConfig, "--prompts"),
        (EvaluateConfig, "--subject"),
    ):
        with pytest.raises(SystemExit):
            parse_config(config_class, [flag, "caf\udce9"])
        assert "is not UTF-8" in capsys.readouterr().err


def test_a_token_is_not_shown_to_a_tracker_that_keeps_the_command_line(capsys):
    for tracker in ("wandb", "all", "comet_ml"):
        with pytest.raises(SystemExit):
            parse_config(TrainConfig, [*REQUIRED_FLAGS, "--push_to_hub", "--hub_token=hf_x", "--report_to", tracker])
        error = capsys.readouterr().err
        assert f"--hub_token with --report_to {tracker}" in error and "hf_x" not in error
    assert parse_config(TrainConfig, [*REQUIRED_FLAGS, "--push_to_hub", "--hub_token=hf_x"]).output.hub_token == "hf_x"


def test_a_token_is_not_in_what_a_configuration_looks_like():
    config = parse_config(TrainConfig, [*REQUIRED_FLAGS, "--push_to_hub", "--hub_token=hf_secret"])
    assert "hf_secret" not in repr(config) and "hf_secret" not in str(config.output)


WORDS = (
    "no",
    "010",
    "1:30",
    "1e-4",
    "-1",
    "~",
    "null",
    "[a, b]",
    "{a: b}",
    "'x'",
    "0x1F",
    "2024-01-01",
    "!!int 3",
    "&a",
)
WORDS += ("*a", "true", ".inf", "nan", "1_000", "9" * 400, "|\n  a\n  b", "~no-such-user/x", '"\\ud83d"', '"\\0"', "")


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(st.sampled_from([*FLAGS, "config", "x y", "--rank", "<<"]), st.sampled_from(WORDS))))
@example(pairs=[("config", "|\n  a\n  b")])
def test_no_config_file_ends_in_a_traceback(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in pairs))
    stderr = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(stderr):
        parse_config(TrainConfig, [*REQUIRED_FLAGS, f"--config={path}"])
    errors = [line for line in stderr.getvalue().split("\n") if line and not line.startswith("warning: ")]
    assert len(errors) <= 1 and all(line.startswith("error: ") for line in errors)
