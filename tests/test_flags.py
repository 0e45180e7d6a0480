"""Every flag of diffusers' train_dreambooth_lora_sdxl.py is a flag of ours: same name, default and meaning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from settings.command_line import parse_config, read_config_file
from settings.idle import IDLE, IDLE_AS_IN_DIFFUSERS
from settings.learning import LR_SCHEDULES, LoopOptions
from settings.method import TextOptions
from settings.training import FLAGS, TrainConfig, is_first_process
from trainer.optimizer import check_optimizer
from trainer.preflight import check_hub

ROOT = Path(__file__).parent.parent
REQUIRED = "required"
# Read from the script's parser, version 0.42.
NO_DEFAULT = """
    pretrained_vae_model_name_or_path revision variant dataset_name dataset_config_name instance_data_dir cache_dir
    caption_column class_data_dir class_prompt validation_prompt seed max_train_steps checkpoints_total_limit
    resume_from_checkpoint snr_gamma prodigy_beta3 hub_token hub_model_id mixed_precision prior_generation_precision
"""
SWITCHES = """
    do_edm_style_training with_prior_preservation output_kohya_format center_crop random_flip train_text_encoder
    gradient_checkpointing scale_lr use_8bit_adam push_to_hub allow_tf32 enable_xformers_memory_efficient_attention
    use_dora
"""
DIFFUSERS = {
    "pretrained_model_name_or_path": REQUIRED,
    "instance_prompt": REQUIRED,
    **dict.fromkeys(NO_DEFAULT.split()),
    **dict.fromkeys(SWITCHES.split(), False),
    "prodigy_decouple": True,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
    "image_column": "image",
    "repeats": 1,
    "num_validation_images": 4,
    "validation_epochs": 50,
    "prior_loss_weight": 1.0,
    "num_class_images": 100,
    "resolution": 1024,
    "image_interpolation_mode": "lanczos",
    "output_dir": "lora-dreambooth-model",
    "logging_dir": "logs",
    "report_to": "tensorboard",
    "train_batch_size": 4,
    "sample_batch_size": 4,
    "num_train_epochs": 1,
    "checkpointing_steps": 500,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "local_rank": -1,
    "learning_rate": 1e-4,
    "text_encoder_lr": 5e-6,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "optimizer": "AdamW",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-4,
    "adam_weight_decay_text_encoder": 1e-3,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "rank": 4,
    "lora_dropout": 0.0,
}
# Ours differ on purpose: docs/flags.md says why.
DIFFERENT = {
    "output_kohya_format": None,
    "instance_prompt": None,
    "seed": 0,
    "resolution": None,
    "num_train_epochs": None,
    "lr_warmup_steps": 0,
    "rank": None,
}
TABLE = (ROOT / "docs" / "flags.md").read_text()


@pytest.mark.parametrize("name", DIFFUSERS)
def test_every_flag_is_there_with_its_default(name):
    expected = DIFFERENT.get(name, DIFFUSERS[name])
    assert FLAGS[name].is_required() if expected == REQUIRED else FLAGS[name].default == expected
    row = next(line for line in TABLE.splitlines() if line.startswith(f"| `{name}` |"))
    diffusers_default, here = [cell.strip(" `") for cell in row.split("|")[2:4]]
    assert diffusers_default == str(DIFFUSERS[name]).replace("None", "–")
    assert (here == "the same") == (name not in DIFFERENT)


def test_the_table_has_no_flag_that_is_not_there():
    listed = set(re.findall(r"^\| `(\w+)` \|", TABLE, flags=re.MULTILINE))
    ours = set(FLAGS)
    assert set(DIFFUSERS) <= listed <= ours
    assert ours - listed == set(), "flags without a row"


REFUSED = {
    "noise_offset": (1e30, "--noise_offset 1e.30 must be from 0 to 1"),
    "prior_loss_weight": (1e39, "--prior_loss_weight 1e.39 must be from 0 to 1000"),
    "awsvd_gamma": (1e6, "--awsvd_gamma 1000000.0 must be from 0 to 4"),
    "inner_std": (0.0, "--inner_std 0.0 must be above 0"),
    "max_train_steps": (10**11, "--max_train_steps 100000000000 must be from 1 to 1000000"),
    "num_train_epochs": (10**9, "must be from 1 to 1000000"),
    "repeats": (10**12, "must be from 1 to 1000000"),
    "mask_data_dir": ("", "--mask_data_dir is empty"),
    "dataset_name": (" ", "--dataset_name is empty"),
    "num_new_tokens_per_abstraction": (3, "has no effect without --train_text_encoder_ti"),
    "train_text_encoder_ti_frac": (0.3, "has no effect without --train_text_encoder_ti"),
    "logging_dir": ("../logs", "--logging_dir ../logs must be inside --output_dir"),
    "hub_model_id": ("a b/c/d", "--push_to_hub needs another --hub_model_id"),
    "learning_rate": (1e-8, "--learning_rate 1e-08 must be above 1e-07, where --lr_scheduler polynomial ends"),
}
BESIDE = {
    "inner_std": {"inner_init": "normal"},
    "hub_model_id": {"push_to_hub": True},
    "learning_rate": {"lr_scheduler": "polynomial"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_can_t_be_meant_are_refused(name):
    value, words = REFUSED[name]
    given = {"pretrained_model_name_or_path": "base", "instance_data_dir": "x", "instance_prompt": "y", name: value}
    with pytest.raises(ValueError, match=words):
        check_hub(TrainConfig.of(**given, **BESIDE.get(name, {})).output)


PRIOR = {"with_prior_preservation": True, "class_prompt": "c"}
# Each is refused, and taken with what is beside it.
IDLE_CASES = (
    ({"base_config": "x"}, {"pretrained_model_name_or_path": "x.safetensors"}),
    ({"dataset_config_name": "x"}, {"dataset_name": "d", "instance_data_dir": None}),
    ({"center_crop": True, "cache_variants": 8}, {"random_flip": True}),
    ({"center_crop": True, "cache_variants": 8}, {"cache_variants": 1}),
    ({"prior_loss_weight": 0.5}, PRIOR | {"class_data_dir": "d"}),
    (PRIOR | {"prior_teacher": True, "num_class_images": 7}, {"prior_teacher": False, "class_data_dir": "d"}),
    ({"huber_c": 0.2}, {"loss_type": "huber"}),
    ({"train_text_encoder_frac": 0.5}, {"train_text_encoder": True}),
    ({"token_abstraction": "<x>"}, {"train_text_encoder_ti": True}),
    ({"validation_data_dir": "d"}, {"validation_loss_steps": 5}),
    ({"clip": "x"}, {"eval_steps": 5}),
    ({"hub_token": "secret"}, {"push_to_hub": True}),
    ({"output_kohya_dtype": "fp32", "method": "loha"}, {"method": "lora"}),
)
# diffusers takes these: each is a warning, and none with what is beside it.
WARNED_CASES = (
    ({"image_column": "x"}, {"dataset_name": "d", "instance_data_dir": None}),
    ({"prior_generation_precision": "fp16"}, PRIOR | {"class_data_dir": "d"}),
    (PRIOR | {"prior_teacher": True, "prior_generation_precision": "fp16"}, {"prior_generation_precision": None}),
    ({"text_encoder_lr": 1e-3}, {"train_text_encoder": True}),
    ({"adam_weight_decay_text_encoder": 1.0}, {"train_text_encoder_ti": True}),
    ({"text_encoder_lr": 1e-3, "train_text_encoder": True, "optimizer": "Prodigy"}, {"optimizer": "AdamW"}),
    ({"prodigy_decouple": False}, {"optimizer": "prodigy"}),
    ({"prodigy_beta3": 0.5}, {"optimizer": "prodigy"}),
    ({"adam_beta1": 0.5, "optimizer": "SGD"}, {"optimizer": "nadam"}),
    ({"adam_epsilon": 1e-6, "optimizer": "Adafactor"}, {"optimizer": "prodigy"}),
    ({"lr_warmup_steps": 100}, {"lr_scheduler": "constant_with_warmup"}),
    ({"lr_num_cycles": 5}, {"lr_scheduler": "cosine_with_restarts"}),
    ({"lr_power": 2.0}, {"lr_scheduler": "polynomial"}),
    ({"max_train_steps": 5, "num_train_epochs": 7}, {"max_train_steps": None}),
    ({"validation_epochs": 1}, {"validation_prompt": ["a cat"]}),
)


def check(**options):
    given = {"pretrained_model_name_or_path": "base", "instance_data_dir": "x", "instance_prompt": "y"} | options
    config = TrainConfig.of(**given)
    for warning in check_optimizer(config.optimizer):
        if is_first_process():
            print(f"warning: {warning}", file=sys.stderr)


@pytest.mark.parametrize(("idle", "beside"), IDLE_CASES)
def test_a_flag_without_effect_is_refused(idle, beside, capsys):
    with pytest.raises(ValueError, match="has no effect with.*: leave it out") as error:
        check(**idle)
    assert "secret" not in str(error.value)
    check(**idle | beside)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("idle", "beside"), WARNED_CASES)
def test_diffusers_flags_without_effect_are_warned_of(idle, beside, capsys, monkeypatch):
    check(**idle)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: --") and any(f"--{name} has no effect " in line for name in idle)
    check(**idle | beside)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "1")
    check(**idle)
    assert capsys.readouterr().err == "", "one process says it"


def test_only_these_flags_of_diffusers_are_refused_where_idle():
    """Those of diffusers that are refused belong to a group of flags that its script needs together, too."""
    warned, refused = ({name for names, _, _ in table for name in names} for table in (IDLE_AS_IN_DIFFUSERS, IDLE))
    assert warned <= set(DIFFUSERS)
    assert refused & set(DIFFUSERS) == {
        *("dataset_config_name", "class_data_dir", "class_prompt", "prior_loss_weight", "num_class_images"),
        *("hub_model_id", "hub_token"),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"train_text_encoder": True, "train_text_encoder_frac": 0.0},
        {"train_text_encoder_ti": True, "train_text_encoder_ti_frac": 0.0},
        {"train_text_encoder_ti": True, "max_train_steps": 1},
    ],
)
def test_text_encoders_need_a_step(options):
    with pytest.raises(ValueError, match="leave the text encoders none: raise it"):
        steps = options.pop("max_train_steps", 500)
        assert TextOptions(**options).steps(steps)


def test_epochs_have_a_most():
    one = LoopOptions(num_train_epochs=1000)
    assert one.total_steps(1000) == 10**6
    with pytest.raises(ValueError, match="--num_train_epochs 1000 of 1001 steps each are more than 1000000"):
        one.total_steps(1001)


REQUIRED_FLAGS = (
    *("--pretrained_model_name_or_path", "base"),
    *("--instance_data_dir", "dog", "--instance_prompt", "a photo of [V] dog"),
)
COMMAND = """
    --pretrained_model_name_or_path=base --instance_data_dir=dog --pretrained_vae_model_name_or_path=vae
    --output_dir=out --mixed_precision=bf16 --instance_prompt=dog --resolution=1024 --train_batch_size=1
    --gradient_accumulation_steps=4 --learning_rate=1e-4 --report_to=tensorboard --lr_scheduler=constant
    --lr_warmup_steps=0 --max_train_steps=500 --validation_prompt=bucket --validation_epochs=25 --seed=0
    --optimizer=prodigy --prodigy_safeguard_warmup=True --prodigy_use_bias_correction=True --snr_gamma=5.0
    --train_text_encoder --enable_xformers_memory_efficient_attention --gradient_checkpointing --push_to_hub
"""


def test_diffusers_own_command_is_taken(capsys):
    """The command of diffusers' README for SDXL, with flags of its later sections."""
    config = parse_config(TrainConfig, COMMAND.split())
    assert capsys.readouterr().err == ""
    assert config.optimizer.optimizer == "prodigy" and config.validation.validation_prompt == ["bucket"]
    assert config.optimizer.prodigy_decouple and config.text.train_text_encoder and config.loop.train_batch_size == 1
    assert config.loss.snr_gamma == 5.0


@pytest.mark.parametrize(("given", "value"), [("--prodigy_decouple=False", False), ("--prodigy_decouple", True)])
def test_false_is_false(given, value):
    """In diffusers' script the word False is true."""
    flags = [*REQUIRED_FLAGS, "--optimizer", "prodigy", given]
    assert parse_config(TrainConfig, flags).optimizer.prodigy_decouple is value


def test_config_file_holds_the_same_names_and_the_command_line_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "pretrained_model_name_or_path: base\nlearning_rate: 1e-3\nrank: 7\nrandom_flip: true\n"
        "prodigy_decouple: false\n"
        "validation_prompt: [a cat, a -dog]\nclass_prompt:\nadam_epsilon: 1.0e-7\n"
    )
    config = parse_config(TrainConfig, [*REQUIRED_FLAGS, "--config", str(path), "--rank", "9"]).flags()
    names = ("learning_rate", "rank", "random_flip", "prodigy_decouple", "adam_epsilon")
    assert [config[name] for name in names] == [1e-3, 9, True, False, 1e-7]
    assert config["validation_prompt"] == ["a cat", "a -dog"] and config["class_prompt"] is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n", "must map"),
        ("a: {b: c}", "is a mapping"),
        ("a: [", "is not YAML"),
        ("ranks: 3", "--ranks=3"),
        ("rank: 3\nrank: 4", "rank is there twice"),
        ("instance_prompt: [a, b]", "instance_prompt is a list, and this flag takes one value"),
        ("lora-alpha: 3\nlora_alpha: 4", "lora-alpha and lora_alpha are the same flag"),
        ("validation_prompt: [[a]]", "has a list, a mapping or nothing"),
        ("validation_prompt: &a [*a]", "has a list, a mapping or nothing"),
        ("seed: 1:30", "invalid int value: '1:30'"),
        ("rank: 1e1", "invalid int value: '1e1'"),
        ("center_crop: maybe", "must be true or false"),
        ("rank: 2024-01-01", "invalid int value"),
    ],
)
def test_bad_config_files_are_one_sentence(tmp_path, capsys, text, words):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit_:
        parse_config(TrainConfig, ["--pretrained_model_name_or_path", "b", "--config", str(tmp_path / "run.yaml")])
    assert exit_.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and len(error.splitlines()) == 1 and words in error
    with pytest.raises(OSError, match="none.yaml"):
        read_config_file(tmp_path / "none.yaml")


# --- at once ----------------------------------------------------------------------------------------------------------

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy")
AT_ONCE = {
    "help": ["--help"],
    "methods": ["--method", "help"],
    "options": ["--method", "lokr", "--method_args", "help"],
    "unknown flag": [*REQUIRED_FLAGS, "--ranks", "4"],
    "wrong value": [*REQUIRED_FLAGS, "--rank", "0"],
    "another method's option": [*REQUIRED_FLAGS, "--method", "lora", "--method_args", "factor=8"],
    "contradiction": [*REQUIRED_FLAGS, "--snr_gamma", "5", "--debiased_estimation"],
}


@pytest.mark.parametrize("case", AT_ONCE)
def test_help_and_refusals_import_no_library(case):
    code = (
        "import runpy, sys\n"
        f"sys.argv = {['train_dreambooth_nora_sdxl.py', *AT_ONCE[case]]!r}\n"
        "try:\n    runpy.run_path('train_dreambooth_nora_sdxl.py', run_name='__main__')\n"
        f"except SystemExit as end:\n    print('CODE', end.code, [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    expected = 0 if case in ("help", "methods", "options") else 2
    assert done.stdout.splitlines()[-1] == f"CODE {expected} []", done.stdout + done.stderr
    assert expected == 0 or done.stderr.startswith("error: ")


def test_schedules_are_those_of_diffusers():
    from diffusers.optimization import SchedulerType

    assert {*LR_SCHEDULES, "piecewise_constant"} == {one.value for one in SchedulerType}
