"""The files of an adapter: readable elsewhere, and compared with what is in memory before a run calls itself done."""

import base64
import hashlib
import io
import json
import re
from collections import Counter
from datetime import datetime

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_trainer import CAT, run
from tiny_sdxl import live_outputs, outputs, saved_base
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import trainer.accelerator
import trainer.finish
import trainer.run
from inference.base import load_pipeline
from inference.load import load_adapter, unload_adapters
from inference.sampling import encode_prompts
from methods.components import EMBEDDINGS, FOLDED_WEIGHTS, INNER_WEIGHTS
from methods.files import PEFT_FOLDER, tools_file
from nora.files import parse_inner
from runs.card import write_card
from runs.exports import check_files
from runs.interval import Interval, format_interval
from runs.tools_header import run_header

FORMATS = {"output_peft_format": True, "train_text_encoder": True, "output_kohya_dtype": "fp32"}
METHODS = {
    "nora": {},
    "lora": {"method": "lora"},
    "lora with alpha": {"method": "lora", "lora_alpha": 8},
    "nora with alpha": {"lora_alpha": 16},
    "dora": {"use_dora": True, "train_text_encoder": False, "output_kohya_dtype": "fp16"},
}


@pytest.fixture(scope="module", params=METHODS)
def exported(request, tmp_path_factory):
    """A run folder, and what the live modules computed at its end."""
    folder, live = tmp_path_factory.mktemp("exported"), {}
    save = trainer.run.save_adapter

    def look(adapter, models, target, **formats):
        names = save(adapter, models, target, **formats)
        if target == folder:
            live.update(live_outputs(models))
        return names

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.run, "save_adapter", look)
        run(folder, max_train_steps=3, learning_rate=5e-2, text_encoder_lr=5e-2, **(FORMATS | METHODS[request.param]))
    return request.param, folder, live


def agrees(pipeline, live):
    return max((outputs(pipeline)[name] - live[name]).abs().max().item() for name in live) < 1e-4


def test_diffusers_file(exported):
    _, folder, live = exported
    pipeline = StableDiffusionXLPipeline.from_pretrained(saved_base(), torch_dtype=torch.float32)
    base = outputs(pipeline)
    pipeline.load_lora_weights(str(folder), weight_name=FOLDED_WEIGHTS)
    assert agrees(pipeline, live) and not agrees_with_base(base, live)


def agrees_with_base(base, live):
    return all((base[name] - live[name]).abs().max().item() < 1e-3 for name in live)


def test_kohya_file(exported):
    method, folder, live = exported
    if method == "dora":
        assert not (folder / tools_file(folder)).exists()
        return
    weights = load_file(folder / tools_file(folder))
    assert {key.rsplit(".", 1)[-1] for key in weights} == {"weight", "alpha"}
    assert {key.split("_")[1] for key in weights} == {"unet", "te1", "te2"}
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in weights
    pipeline = StableDiffusionXLPipeline.from_pretrained(saved_base(), torch_dtype=torch.float32)
    assert "lora_te2_text_model_encoder_layers_1_self_attn_out_proj.lora_up.weight" in weights
    assert "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q.alpha" in weights
    pipeline.load_lora_weights(str(folder), weight_name=tools_file(folder))
    assert agrees(pipeline, live)


def test_peft_folders(exported):
    method, folder, live = exported
    pipeline = StableDiffusionXLPipeline.from_pretrained(saved_base(), torch_dtype=torch.float32)
    trained = {path.name for path in (folder / PEFT_FOLDER).iterdir()}
    assert trained == ({"unet"} if method == "dora" else {"unet", "text_encoder", "text_encoder_2"})
    classes = {
        "unet": UNet2DConditionModel,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    for name in trained:
        cls = classes[name]
        model = cls.from_pretrained(saved_base(), subfolder=name, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, folder / PEFT_FOLDER / name).eval()
        pipeline.register_modules(**{name: model.get_base_model()})
    assert agrees(pipeline, live)


def test_record_lists_every_file(exported):
    method, folder, _ = exported
    files = json.loads((folder / "run.json").read_text())["files"]
    assert {FOLDED_WEIGHTS, *([INNER_WEIGHTS] if "nora" in method else [])} <= set(files)
    assert all((folder / name).stat().st_size == size for name, size in files.items())
    assert f"{PEFT_FOLDER}/unet/adapter_config.json" in files


@pytest.mark.parametrize("file", [FOLDED_WEIGHTS, INNER_WEIGHTS, "tools", f"{PEFT_FOLDER}/unet/adapter_model"])
def test_a_wrong_file_is_noticed(tmp_path, monkeypatch, file):
    file = tools_file(tmp_path) if file == "tools" else file
    file = file if file.endswith("safetensors") else f"{file}.safetensors"

    def check_after_damage(adapter, folder, files, *dtype):
        if file not in files:
            return check_files(adapter, folder, files, *dtype)
        header = header_of(folder / file)
        weights = load_file(folder / file)
        key = next(key for key in sorted(weights) if key.endswith(".weight") and "stats" not in key)
        weights[key] = weights[key] + 0.1
        save_file(weights, folder / file, metadata=header)
        return check_files(adapter, folder, files, *dtype)

    monkeypatch.setattr(trainer.finish, "check_files", check_after_damage)
    with pytest.raises(ValueError, match="read back differs"):
        run(tmp_path, output_peft_format=True)


# --- the file for drawing programs ------------------------------------------------------------------------------------


def header_of(path):
    with safe_open(path, "pt") as opened:
        return opened.metadata()


def test_the_header_of_the_tools_file(tmp_path):
    """What ComfyUI's, A1111's and other managers show, sort and filter by; the hash is of the file as it is."""
    folder = run(tmp_path / "cat", num_validation_images=1, license="mit", max_train_steps=1)
    header, data = header_of(folder / "cat.safetensors"), (folder / "cat.safetensors").read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    expected = {
        "sshs_model_hash": digest,
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_output_name": "cat",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "cat",
        "modelspec.trigger_phrase": "a photo of [V] cat",
        "modelspec.resolution": "32x32",
        "modelspec.license": "mit",
        "modelspec.prediction_type": "epsilon",
        "modelspec.hash_sha256": f"0x{digest}",
    }
    assert expected.items() <= header.items()
    assert json.loads(header["ss_tag_frequency"]) == {"cat": {"a photo of [V] cat": 6}}
    assert datetime.fromisoformat(header["modelspec.date"]).tzinfo is not None
    picture = Image.open(io.BytesIO(base64.b64decode(header["modelspec.thumbnail"].partition(",")[2])))
    assert picture.format == "JPEG" and picture.size == (256, 256)
    assert str(folder) not in str(header), "a folder's name is the user's"
    tensors = load_file(folder / "cat.safetensors")
    assert {value.dtype for key, value in tensors.items() if key.endswith(".weight")} == {torch.float16}
    assert {tuple(value.shape) for key, value in tensors.items() if key.endswith(".alpha")} == {()}
    assert json.loads((folder / "run.json").read_text())["files"]["cat.safetensors"] == len(data)
    assert "license: mit" in (folder / "README.md").read_text()
    run(folder, max_train_steps=1, output_kohya_format=False)  # an earlier run's file leaves with it
    assert not (folder / "cat.safetensors").exists()
    (folder / "cat.safetensors").write_bytes(data.replace(b"nora_suite.method", b"other_suit.method"))
    with pytest.raises(ValueError, match=r"cat\.safetensors is there and is no file of a run"):
        run(folder, max_train_steps=1)


def test_the_header_of_a_run_on_other_targets():
    """v-prediction, as a record may say it; several subjects; captions of tags; new words as they are to be written."""
    config = {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0", "resolution": 1024}
    record = {"config": config, "method": "lora", "new_words": {"[V]": "<v0>"}, "prediction_type": "v_prediction"}
    captions = [Counter({"[V] cat, sofa": 2, "[V] cat, sky,": 1}), Counter({"[W] dog": 4})]
    header = run_header("two", record, ["a [V] cat", "a [W] dog"], captions)
    assert header["modelspec.prediction_type"] == "v" and header["modelspec.license"] == "openrail++"
    assert header["modelspec.trigger_phrase"] == "a <v0> cat, a [W] dog" and header["ss_num_train_images"] == "7"
    tags = {"two_1": {"<v0> cat": 3, "sofa": 2, "sky": 1}, "two_2": {"[W] dog": 4}}
    assert json.loads(header["ss_tag_frequency"]) == tags
    assert all(isinstance(value, str) for value in header.values())


@pytest.mark.parametrize(
    ("folder", "file"),
    [("cat", "cat"), ("caf\udce9", "caf_"), (".out", "out"), ("nora_inner_weights", "nora_inner_weights_kohya")],
)
def test_the_tools_file_has_the_folder_s_name(tmp_path, folder, file):
    assert tools_file(tmp_path / folder) == f"{file}.safetensors"


# --- new tokens -------------------------------------------------------------------------------------------------------


def test_new_tokens_are_loaded_with_the_adapter_and_leave_with_it(tmp_path):
    folder = run(tmp_path, train_text_encoder_ti=True, text_encoder_lr=1e-1, max_train_steps=4, token_abstraction="[V]")
    learned = load_file(folder / EMBEDDINGS)
    assert {key: tuple(value.shape) for key, value in learned.items()} == {"clip_l": (2, 32), "clip_g": (2, 32)}
    pipeline = load_pipeline(saved_base(), torch.float32, "cpu")
    before = encode_prompts(pipeline, ["a [V] cat", "a cat"])
    name = load_adapter(pipeline, folder)
    ids = pipeline.tokenizer("<v0><v1>").input_ids[1:-1]
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[ids], learned["clip_l"])
    after = encode_prompts(pipeline, ["a [V] cat", "a cat"])
    assert not torch.allclose(before["a [V] cat"]["prompt_embeds"], after["a [V] cat"]["prompt_embeds"], atol=1e-2)
    assert torch.equal(before["a cat"]["prompt_embeds"], after["a cat"]["prompt_embeds"])
    unload_adapters(pipeline, name)
    gone = encode_prompts(pipeline, ["a [V] cat"])
    assert torch.equal(before["a [V] cat"]["prompt_embeds"], gone["a [V] cat"]["prompt_embeds"])


def test_the_card_s_snippet_runs_and_knows_the_new_tokens(tmp_path, monkeypatch):
    folder = run(tmp_path, train_text_encoder_ti=True, max_train_steps=2, num_new_tokens_per_abstraction=3)
    card = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert 'pipeline("a photo of <v0><v1><v2> cat")' in code
    monkeypatch.chdir(folder)
    names = {}
    exec(code, names)
    learned = load_file(folder / EMBEDDINGS)
    ids = names["pipeline"].tokenizer("<v0><v1><v2>").input_ids[1:-1]
    assert torch.equal(names["pipeline"].text_encoder.get_input_embeddings().weight[ids], learned["clip_l"])
    assert names["image"].size == (32, 32)


def test_a_card_of_two_subjects_shows_the_first(tmp_path):
    concepts = [
        {"instance_data_dir": str(CAT), "instance_prompt": "a photo of [V] cat"},
        {"instance_data_dir": str(CAT.parent / "dog"), "instance_prompt": "a photo of [W] dog"},
    ]
    (tmp_path / "subjects.json").write_text(json.dumps(concepts))
    options = {"concepts_list": str(tmp_path / "subjects.json"), "instance_data_dir": None, "instance_prompt": None}
    card = (run(tmp_path / "run", max_train_steps=1, method="lora", **options) / "README.md").read_text()
    assert "adapter: a photo of [V] cat" in card and "None" not in card


def test_the_card_shows_the_best_score_as_tables_do(tmp_path):
    """E3: one kind of interval everywhere, here of one training's pictures; a loss has none."""
    folder = run(tmp_path, max_train_steps=1)
    record = json.loads((folder / "run.json").read_text())
    assert "best adapter" not in (folder / "README.md").read_text()
    score = Interval(0.897, 0.875, 0.919, 0.95, ("prompts", "seeds"), (6, 2))
    alike = Interval(1.0, varies=("prompts", "seeds"), count=(6, 2))
    for best, words in (
        ({"step": 1, "by": "dino", "dino": 0.897, "interval": score.fields()}, f"dino: {format_interval(score)} (95% "),
        (
            {"step": 1, "by": "scene", "scene": 1.0, "interval": alike.fields()},
            "by scene: 1.000 (6 prompts × 2 seeds; ",
        ),
        ({"step": 1, "by": "val_loss", "val_loss": 0.125}, "by val_loss: 0.125."),
    ):
        write_card(folder, record | {"best": best})
        card = (folder / "README.md").read_text()
        assert "The best adapter is that of step 1, by" in card and words in card


def test_new_tokens_stop_learning_after_their_share_of_the_steps(tmp_path):
    options = {"train_text_encoder_ti": True, "text_encoder_lr": 1e-1, "max_train_steps": 4, "checkpointing_steps": 1}
    folder = run(tmp_path, train_text_encoder_ti_frac=0.5, **options)
    learned = [load_file(folder / f"checkpoint-{step}" / EMBEDDINGS)["clip_l"] for step in (1, 2, 3, 4)]
    assert not torch.equal(learned[0], learned[1]) and torch.equal(learned[1], learned[3])


def test_text_encoders_stop_learning_after_their_share_of_the_steps(tmp_path):
    options = {"train_text_encoder": True, "max_train_steps": 4, "checkpointing_steps": 1}
    folder = run(tmp_path, train_text_encoder_frac=0.5, **options)
    one, other = (parse_inner(folder / f"checkpoint-{step}" / INNER_WEIGHTS).trained for step in (2, 4))
    changed = {
        key.split(".")[0]
        for key, entries in one.items()
        if not all(torch.equal(tensor, other[key][entry]) for entry, tensor in entries.items())
    }
    assert changed == {"unet"}


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def uploaded(monkeypatch):
    """What a hub would get, instead of a hub."""
    from huggingface_hub.utils import filter_repo_objects

    got = {}

    def upload(folder_path, allow_patterns, token, **options):
        files = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        got.update(files=set(filter_repo_objects(files, allow_patterns=allow_patterns)), token=token, **options)

    monkeypatch.setattr(trainer.accelerator, "upload_folder", upload)
    monkeypatch.setattr(
        trainer.accelerator, "create_repo", lambda name, token, exist_ok: type("Url", (), {"repo_id": f"me/{name}"})
    )
    return got


def test_only_the_adapter_is_uploaded(tmp_path, uploaded):
    """diffusers uploads the checkpoints too."""
    options = {"num_validation_images": 1, "checkpointing_steps": 1, "report_to": "tensorboard"}
    folder = run(tmp_path / "my-cat", push_to_hub=True, hub_token="secret", **options)
    sample = "samples/a-photo-of-v-cat-seed0.png"
    record = {"README.md", "loss.png", "run.json", "metrics.jsonl"}
    peft = {f"peft/unet/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")}
    assert uploaded["files"] == {FOLDED_WEIGHTS, INNER_WEIGHTS, "my-cat.safetensors", sample, *record, *peft}
    assert uploaded["repo_id"] == "me/my-cat" and uploaded["token"] == "secret"
    kept = [path for path in folder.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]
    assert not kept, "the token is written nowhere"


def test_nothing_of_a_sub_folder_is_uploaded_unasked(tmp_path, uploaded):
    """Encodings are the user's pictures, and may be kept anywhere inside the folder."""
    wanted = {"a.safetensors", "[V].safetensors", "samples/a.png", "samples/step-000050/a.png"}
    wanted |= {"peft/unet/adapter_model.safetensors", "peft/unet/adapter_config.json"}
    at_home = {"best/a.safetensors", "enc/ab/ab1.safetensors", "encoded/ab/ab1.safetensors", "peft/ab/ab1.safetensors"}
    at_home |= {"peft/.unet.partial/adapter_model.safetensors", "checkpoint-2/a.safetensors", "logs/run.json", "x.png"}
    at_home |= {".checkpoint-2.partial/a.safetensors", "V.safetensors/x.safetensors"}
    for name in wanted | at_home:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    trainer.accelerator.push_to_hub(tmp_path, None, None)
    assert uploaded["files"] == wanted


@pytest.mark.parametrize(("error", "words"), [(RuntimeError("no\nroute"), "no .the run is"), (Exception(), "Exc")])
def test_a_hub_that_is_not_reached_is_one_sentence(tmp_path, monkeypatch, error, words):
    """An error of the hub's HTTP library is no OSError, and may say nothing."""

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(trainer.accelerator, "create_repo", fail)
    with pytest.raises(ValueError, match=f"^--push_to_hub me/x: {words}"):
        trainer.accelerator.push_to_hub(tmp_path, "me/x", None)
