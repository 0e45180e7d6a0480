"""methods.components and inference.load, on a tiny SDXL with random weights built here (no network, no assets)."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoHaConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny_sdxl import (
    TEXT_TARGETS,
    UNET_TARGETS,
    build_pipeline,
    inject_nora,
    max_error,
    outputs,
    randomise_adapter,
    saved_base,
    saved_lora,
    saved_nora,
)
from transformers import CLIPTextModel

import inference.load
import nora
from inference.adapter_files import inspect_adapter, recorded_base
from inference.base import base_geometry, check_base, check_xformers, load_outline, load_pipeline
from inference.generate import encode_prompts
from inference.load import load_adapter, loaded_adapters, set_adapter_scale, swap_adapter, unload_adapters
from methods.components import EMBEDDINGS, FOLDED_WEIGHTS, INNER_WEIGHTS, RUN_RECORD, adapter_components


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    return load_pipeline(saved_base(), torch_dtype=torch.float32, device="cpu")


@pytest.fixture(autouse=True)
def clean(request):
    yield
    if "pipeline" in request.fixturenames:
        unload_adapters(request.getfixturevalue("pipeline"))


# --- components -------------------------------------------------------------------------------------------------------


def test_component_prefixes_match_the_files_spelling(pipeline):
    components = adapter_components(pipeline)
    assert [prefix.split(".")[0] for prefix in components] == ["unet", "text_encoder", "text_encoder_2"]
    for prefix, module in components.items():
        layers = [f"{prefix}.{name}" for name, _ in module.named_modules()]
        if prefix != "unet":
            assert any(name.endswith("text_model.encoder.layers.0.self_attn.q_proj") for name in layers)
            assert not any("text_model.text_model" in name for name in layers)
    assert list(adapter_components({"unet": pipeline.unet, "text_encoder": None})) == ["unet"]


# --- the base ---------------------------------------------------------------------------------------------------------


def test_every_model_is_cast_to_the_dtype_asked_for():
    loaded = load_pipeline(saved_base(), torch_dtype=torch.bfloat16, device="cpu")
    models = {name: part for name, part in loaded.components.items() if isinstance(part, torch.nn.Module)}
    assert {name: model.dtype for name, model in models.items()} == dict.fromkeys(models, torch.bfloat16)


def test_text_encoders_stored_in_another_dtype_are_cast(tmp_path):
    shutil.copytree(saved_base(), tmp_path / "base")
    CLIPTextModel.from_pretrained(saved_base() / "text_encoder").half().save_pretrained(tmp_path / "base/text_encoder")
    loaded = load_pipeline(tmp_path / "base", torch_dtype=torch.float32, device="cpu")
    assert loaded.text_encoder.dtype == loaded.text_encoder_2.dtype == torch.float32


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2", "tokenizer", "scheduler", "model_index.json"])
def test_an_incomplete_base_is_refused_by_name(tmp_path, part):
    shutil.copytree(saved_base(), tmp_path / "base")
    path = tmp_path / "base" / part
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(ValueError, match=part):
        load_pipeline(tmp_path / "base")


def test_bases_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        check_base(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not exist"):
        check_base("sdxl.safetensors")
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(ValueError, match="not a .safetensors"):
        check_base(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="holds an adapter"):
        check_base(saved_lora() / FOLDED_WEIGHTS)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="StableDiffusionPipeline, and SDXL"):
        check_base(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        check_base(tmp_path)
    check_base("stabilityai/stable-diffusion-xl-base-1.0")


def test_a_damaged_base_and_a_hub_id_that_is_not_cached_are_one_sentence(tmp_path, monkeypatch):
    shutil.copytree(saved_base(), tmp_path / "base")
    (tmp_path / "base/unet/diffusion_pytorch_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="could not be loaded"):
        load_pipeline(tmp_path / "base")
    with pytest.raises(ValueError, match="could not be loaded"):
        load_pipeline("nobody/nothing", local_files_only=True)


def test_offline_a_base_that_was_never_downloaded_is_said_to_be_that(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for asked in (load_pipeline, base_geometry, load_outline):
        with pytest.raises(
            ValueError, match="base nobody/nothing, which is no folder in .*: unset that, or name a fol"
        ):
            asked("nobody/nothing")


def test_a_training_in_the_place_of_the_base_is_said_to_be_one(tmp_path):
    (tmp_path / RUN_RECORD).write_text("{}")
    with pytest.raises(ValueError, match="is that of a training: name the base that it was trained on"):
        check_base(tmp_path)


def test_recorded_base(tmp_path):
    assert recorded_base(saved_lora()) == str(saved_base())
    assert recorded_base(saved_lora() / FOLDED_WEIGHTS) == str(saved_base())
    with pytest.raises(ValueError, match="--base"):
        recorded_base(tmp_path)
    (tmp_path / "run.json").write_text('{"config": {"pretrained_model_name_or_path": "../gone/base"}}')
    with pytest.raises(ValueError, match=r"\.\./gone/base does not exist.*--base"):
        recorded_base(tmp_path)


def test_xformers_where_it_cannot_serve():
    with pytest.raises(ValueError, match="CUDA GPU.*leave --enable_xformers"):
        check_xformers("cpu")


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_folder_and_file_load_the_same_as_diffusers_does(pipeline):
    base = outputs(pipeline)
    pipeline.load_lora_weights(saved_lora(), adapter_name="stock")
    stock = outputs(pipeline)
    pipeline.unload_lora_weights()
    for path in (saved_lora(), saved_lora() / FOLDED_WEIGHTS):
        name = load_adapter(pipeline, path)
        assert loaded_adapters(pipeline) == [name]
        assert max_error(outputs(pipeline), stock) == 0
        unload_adapters(pipeline, name)
    effects = {part: (stock[part] - base[part]).abs().max() for part in base}
    assert min(effects.values()) > 1e-2, effects  # both text encoders and the UNet are adapted


@pytest.mark.parametrize("new", ["same shape", "no text encoders", "nora", "inner"])
def test_swapping_in_place_is_loading_anew(pipeline, new, monkeypatch):
    path = {
        "same shape": saved_lora(seed=2),
        "no text encoders": saved_lora(seed=2, text=False),
        "nora": saved_nora(),
        "inner": saved_nora() / INNER_WEIGHTS,
    }[new]
    base = outputs(pipeline)
    load_adapter(pipeline, path)
    expected = outputs(pipeline)
    unload_adapters(pipeline)
    load_adapter(pipeline, saved_lora(), name="mine", scale=0.5)
    before = [module for module in pipeline.unet.modules() if isinstance(module, BaseTunerLayer)]
    swap_adapter(pipeline, path, "mine")
    after = [module for module in pipeline.unet.modules() if isinstance(module, BaseTunerLayer)]
    assert loaded_adapters(pipeline) == ["mine"]
    assert all(one is other for one, other in zip(before, after)) == (new != "no text encoders")
    now = outputs(pipeline)
    set_adapter_scale(pipeline, "mine", 0.5)
    assert max_error(outputs(pipeline), now) == 0 and max_error(now, expected) > 1e-3  # the scale was kept
    set_adapter_scale(pipeline, "mine", 1.0)
    assert max_error(outputs(pipeline), expected) < 1e-6
    unload_adapters(pipeline)
    assert max_error(outputs(pipeline), base) == 0


@pytest.mark.parametrize("old", ["dora", "new words"])
def test_nothing_of_a_richer_adapter_stays_after_a_swap(pipeline, tmp_path, old):
    load_adapter(pipeline, saved_lora(text=False))
    expected, prompt = outputs(pipeline), encode_prompts(pipeline, ["a [V] cat"])["a [V] cat"]["prompt_embeds"]
    unload_adapters(pipeline)
    own = build_pipeline()
    own.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, use_dora=old == "dora", target_modules=UNET_TARGETS))
    randomise_adapter(own.unet, seed=5)
    layers = get_peft_model_state_dict(own.unet)
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    if old == "new words":
        words = {key: torch.ones(1, 32) for key in ("clip_l", "clip_g")}
        save_file(words, tmp_path / EMBEDDINGS, metadata={"word": "[V]"})
    load_adapter(pipeline, tmp_path, name="mine")
    swap_adapter(pipeline, saved_lora(text=False), "mine")
    assert max_error(outputs(pipeline), expected) < 1e-6
    assert torch.equal(encode_prompts(pipeline, ["a [V] cat"])["a [V] cat"]["prompt_embeds"], prompt)


@pytest.mark.parametrize("new", ["same shape", "no text encoders"])
def test_a_swap_of_merged_weights_takes_them_out_first(pipeline, new):
    base, path = outputs(pipeline), saved_lora(seed=2, text=new == "same shape")
    load_adapter(pipeline, path)
    expected = outputs(pipeline)
    unload_adapters(pipeline)
    load_adapter(pipeline, saved_lora(), name="mine")
    pipeline.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    swap_adapter(pipeline, path, "mine")
    assert max_error(outputs(pipeline), expected) < 1e-4
    unload_adapters(pipeline)
    assert max_error(outputs(pipeline), base) < 1e-4


def test_a_swap_needs_an_adapter_to_take_the_place_of(pipeline):
    load_adapter(pipeline, saved_lora(), name="mine")
    with pytest.raises(ValueError, match=r'no adapter "yours" is loaded \(loaded: mine\)'):
        swap_adapter(pipeline, saved_lora(seed=2), "yours")


def test_a_swap_to_another_base_s_adapter_leaves_the_old_one(pipeline):
    load_adapter(pipeline, saved_lora(), name="mine")
    before = outputs(pipeline)
    with pytest.raises(ValueError, match="belongs to another base"):
        swap_adapter(pipeline, saved_lora(hidden=64), "mine")
    assert loaded_adapters(pipeline) == ["mine"] and max_error(outputs(pipeline), before) == 0


def test_kohya_files_load_the_same(pipeline, tmp_path):
    weights = load_file(saved_lora() / FOLDED_WEIGHTS)
    save_file(convert_state_dict_to_kohya(weights), tmp_path / "from_civitai.safetensors")
    load_adapter(pipeline, saved_lora())
    expected = outputs(pipeline)
    unload_adapters(pipeline)
    for path in (tmp_path, tmp_path / "from_civitai.safetensors"):  # a folder with one LoRA file, too
        assert inspect_adapter(path).kind == "kohya"
        load_adapter(pipeline, path)
        assert max_error(outputs(pipeline), expected) < 1e-5
        unload_adapters(pipeline)
    with pytest.raises(ValueError, match="belongs to another base"):
        load_adapter(load_pipeline(saved_base(64), torch.float32, "cpu"), tmp_path)


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "nora"])
def test_peft_folders_of_any_method(pipeline, tmp_path, method):
    """Written by PEFT's own save_pretrained, component by component, and read as one adapter."""
    config = {
        "lora": LoraConfig(r=4, target_modules=UNET_TARGETS + TEXT_TARGETS),
        "dora": LoraConfig(r=4, use_dora=True, target_modules=UNET_TARGETS),
        "loha": LoHaConfig(r=4, target_modules=UNET_TARGETS),
        "nora": nora.NoraConfig(r=4, outer_r=8, target_modules=UNET_TARGETS),
    }[method]
    own = build_pipeline()
    parts = ("unet", "text_encoder") if method == "lora" else ("unet",)
    for part in parts:
        model = getattr(own, part)
        if method == "nora":
            nora.preprocess_nora(model, config, lambda *_: outputs(own))
        wrapped = get_peft_model(model, config)
        randomise_adapter(wrapped, seed=4)
        wrapped.save_pretrained(tmp_path / part)
    expected = outputs(own)
    base = outputs(pipeline)
    name = load_adapter(pipeline, tmp_path)
    assert max_error(outputs(pipeline), expected) < 1e-4 and max_error(base, expected) > 1e-3
    set_adapter_scale(pipeline, name, 0.0)
    assert max_error(outputs(pipeline), base) == 0
    unload_adapters(pipeline)
    assert max_error(outputs(pipeline), base) == 0
    if method == "lora":
        with pytest.raises(ValueError, match="belongs to another base"):
            load_adapter(load_pipeline(saved_base(64), torch.float32, "cpu"), tmp_path)
    load_adapter(pipeline, tmp_path / "unet")  # a single PEFT folder
    assert max_error(outputs(pipeline), base) > 1e-3


def test_the_kind_is_in_the_header_and_not_in_the_name(tmp_path):
    shutil.copy(saved_lora() / FOLDED_WEIGHTS, tmp_path / "nora_inner_weights.safetensors")
    assert inspect_adapter(tmp_path).kind == "folded"


def test_swapping_leaves_no_residue(pipeline):
    base = outputs(pipeline)
    alone = {}
    for seed in (1, 2, 1):
        name = load_adapter(pipeline, saved_lora(seed))
        now = outputs(pipeline)
        assert max_error(now, alone.setdefault(seed, now)) == 0
        assert max_error(now, base) > 1e-2
        unload_adapters(pipeline)
        assert max_error(outputs(pipeline), base) == 0
        assert name not in loaded_adapters(pipeline)
    for module in adapter_components(pipeline).values():
        assert not any(isinstance(layer, BaseTunerLayer) for layer in module.modules())


def test_scale_zero_is_the_base_and_scale_one_is_the_default(pipeline):
    base = outputs(pipeline)
    name = load_adapter(pipeline, saved_lora(), scale=0.0)
    assert max_error(outputs(pipeline), base) == 0
    set_adapter_scale(pipeline, name, 1.0)
    full = outputs(pipeline)
    unload_adapters(pipeline, name)
    load_adapter(pipeline, saved_lora())
    assert max_error(outputs(pipeline), full) == 0


def test_adapters_stack_and_come_off_one_by_one(pipeline):
    load_adapter(pipeline, saved_lora(1), name="first", scale=0.5)
    first = outputs(pipeline)
    load_adapter(pipeline, saved_lora(2, text=False), name="second", scale=0.25)
    both = outputs(pipeline)
    assert max_error(both, first) > 1e-3
    assert max_error({"prompt_embeds": both["prompt_embeds"]}, {"prompt_embeds": first["prompt_embeds"]}) == 0
    unload_adapters(pipeline, "second")
    assert max_error(outputs(pipeline), first) == 0
    # the other order, and with diffusers' own set_adapters: the same sum
    unload_adapters(pipeline)
    load_adapter(pipeline, saved_lora(2, text=False), name="second")
    load_adapter(pipeline, saved_lora(1), name="first")
    pipeline.set_adapters(["first", "second"], [0.5, 0.25])
    assert max_error(outputs(pipeline), both) < 1e-4


@pytest.fixture
def with_words(tmp_path):
    """A function that writes an adapter with a new word."""

    def write(folder: str, word: str = "[V]", **vectors: torch.Tensor) -> Path:
        shutil.copytree(saved_lora(text=False), tmp_path / folder)
        words = {key: torch.ones(2, 32) * len(folder) for key in ("clip_l", "clip_g")} | vectors
        save_file(words, tmp_path / folder / EMBEDDINGS, metadata={"word": word})
        return tmp_path / folder

    return write


def embeds(pipeline) -> torch.Tensor:
    return encode_prompts(pipeline, ["[V] and [W]"])["[V] and [W]"]["prompt_embeds"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({}, r"another adapter has the word '\[V\]' too"),
        ({"word": "[W]", "clip_g": torch.ones(1, 48)}, r"new word '\[W\]' has clip_g of width 48"),
    ],
)
def test_an_adapter_whose_word_is_refused_leaves_nothing(pipeline, with_words, wrong, message):
    load_adapter(pipeline, with_words("one"), name="one")
    before, prompt, other = outputs(pipeline), embeds(pipeline), with_words("other", **wrong)
    for _ in range(2):  # nothing of the first try is in the way of the second
        with pytest.raises(ValueError, match=message):
            load_adapter(pipeline, other, name="other")
    assert loaded_adapters(pipeline) == ["one"]
    assert max_error(outputs(pipeline), before) == 0 and torch.equal(embeds(pipeline), prompt)


def test_new_words_come_off_with_their_adapter(pipeline, with_words):
    first, second = with_words("first"), with_words("second", "[W]")
    plain = embeds(pipeline)
    load_adapter(pipeline, second, name="second")
    alone = embeds(pipeline)
    unload_adapters(pipeline)
    load_adapter(pipeline, first, name="first")
    load_adapter(pipeline, second, name="second")
    both = embeds(pipeline)
    unload_adapters(pipeline, "first")
    assert torch.equal(embeds(pipeline), alone) and not torch.equal(alone, both)
    load_adapter(pipeline, first, name="first")
    assert torch.equal(embeds(pipeline), both)
    swap_adapter(pipeline, saved_lora(text=False), "first")
    assert torch.equal(embeds(pipeline), alone)
    unload_adapters(pipeline)
    assert torch.equal(embeds(pipeline), plain)


def test_merged_weights_give_the_same_outputs(pipeline):
    base = outputs(pipeline)
    load_adapter(pipeline, saved_lora())
    live = outputs(pipeline)
    pipeline.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    assert max_error(outputs(pipeline), live) < 1e-4
    unload_adapters(pipeline)
    assert max_error(outputs(pipeline), base) < 1e-4


# --- NoRA -------------------------------------------------------------------------------------------------------------


def test_live_folded_inner_and_merged_nora_are_one_model(pipeline):
    live_pipeline = build_pipeline()
    inject_nora(live_pipeline)
    live, base = outputs(live_pipeline), outputs(pipeline)
    assert min((live[part] - base[part]).abs().max() for part in base) > 1e-2  # all three parts are adapted
    errors = {}
    pipeline.load_lora_weights(saved_nora())  # diffusers alone
    errors["stock"] = max_error(outputs(pipeline), live)
    unload_adapters(pipeline)
    for kind, path in (("folder", saved_nora()), ("inner", saved_nora() / INNER_WEIGHTS)):
        load_adapter(pipeline, path)
        errors[kind] = max_error(outputs(pipeline), live)
        if kind == "inner":
            set_adapter_scale(pipeline, loaded_adapters(pipeline)[0], 0.0)
            assert max_error(outputs(pipeline), base) == 0
        unload_adapters(pipeline)
        assert max_error(outputs(pipeline), base) == 0
    live_pipeline.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    errors["merged"] = max_error(outputs(live_pipeline), live)
    assert max(errors.values()) < 1e-4, errors


def test_folder_prefers_the_folded_file_and_falls_back_to_the_inner(tmp_path):
    assert inspect_adapter(saved_nora()).path.name == FOLDED_WEIGHTS
    shutil.copy(saved_nora() / INNER_WEIGHTS, tmp_path)
    assert inspect_adapter(tmp_path).kind == "inner"
    shutil.copy(saved_nora() / INNER_WEIGHTS, tmp_path / "renamed.safetensors")
    assert inspect_adapter(tmp_path / "renamed.safetensors").kind == "inner"


def test_inner_and_lora_adapters_stack(pipeline):
    load_adapter(pipeline, saved_nora(), name="nora", scale=0.5)
    load_adapter(pipeline, saved_lora(), name="lora", scale=0.25)
    folded = outputs(pipeline)
    for order in ("nora lora", "lora nora"):
        unload_adapters(pipeline)
        for name in order.split():
            path = saved_nora() / INNER_WEIGHTS if name == "nora" else saved_lora()
            load_adapter(pipeline, path, name=name, scale=0.5 if name == "nora" else 0.25)
        assert max_error(outputs(pipeline), folded) < 1e-4, order


@pytest.mark.parametrize("other", [{"hidden": 64}, {"base_seed": 5}])
def test_inner_weights_of_another_base_are_refused_and_nothing_is_left(pipeline, other):
    load_adapter(pipeline, saved_lora(), name="cat", scale=0.5)
    before = outputs(pipeline)
    with pytest.raises(ValueError, match="another base: unet|unet.*a LoRA that fold_nora made"):
        load_adapter(pipeline, saved_nora(**other) / INNER_WEIGHTS, name="alien")
    assert loaded_adapters(pipeline) == ["cat"]
    assert max_error(outputs(pipeline), before) == 0


def test_inner_weights_for_a_part_that_the_pipeline_lacks(monkeypatch, pipeline):
    monkeypatch.setattr(pipeline, "text_encoder", None)
    with pytest.raises(ValueError, match="no text_encoder.text_model"):
        load_adapter(pipeline, saved_nora() / INNER_WEIGHTS)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "out", "e", "encoder", "lora", "proj"])
def test_an_adapter_named_like_a_parameter_does_no_harm(pipeline, name):
    base = outputs(pipeline)
    load_adapter(pipeline, saved_lora(), name="fine")
    fine = outputs(pipeline)
    unload_adapters(pipeline)
    load_adapter(pipeline, saved_lora(), name=name)
    assert max_error(outputs(pipeline), fine) == 0
    unload_adapters(pipeline)
    assert max_error(outputs(pipeline), base) == 0


def test_a_name_in_use_is_refused_and_the_loaded_adapter_stays(pipeline):
    load_adapter(pipeline, saved_lora(1), name="cat")
    before = outputs(pipeline)
    with pytest.raises(ValueError, match='"cat" is already loaded'):
        load_adapter(pipeline, saved_lora(2), name="cat")
    assert max_error(outputs(pipeline), before) == 0
    with pytest.raises(ValueError, match="letters, digits"):
        load_adapter(pipeline, saved_lora(2), name="a.b")
    with pytest.raises(ValueError, match="finite"):
        load_adapter(pipeline, saved_lora(2), name="b", scale=float("nan"))
    with pytest.raises(ValueError, match='no adapter "dog"'):
        set_adapter_scale(pipeline, "dog", 1.0)


def test_an_adapter_of_another_base_is_refused_before_anything_is_touched(pipeline):
    load_adapter(pipeline, saved_lora(1), name="cat", scale=0.5)
    before = outputs(pipeline)
    with pytest.raises(ValueError, match=r"another base: .* is \d+×\d+ in the file and \d+×\d+ in this base"):
        load_adapter(pipeline, saved_lora(1, hidden=64), name="alien")
    assert loaded_adapters(pipeline) == ["cat"]
    assert max_error(outputs(pipeline), before) == 0


def test_a_load_that_fails_midway_is_rolled_back(pipeline, monkeypatch):
    base = outputs(pipeline)
    load_adapter(pipeline, saved_lora(1), name="cat", scale=0.5)
    before = outputs(pipeline)

    def cut(model, updates, name):
        inject(model, updates, name)
        if model is pipeline.text_encoder:
            raise RuntimeError("cut")

    inject = inference.load._inject
    monkeypatch.setattr(inference.load, "_inject", cut)
    with pytest.raises(RuntimeError, match="cut"):
        load_adapter(pipeline, saved_lora(2), name="dog")
    assert loaded_adapters(pipeline) == ["cat"]
    assert max_error(outputs(pipeline), before) == 0
    unload_adapters(pipeline)
    with pytest.raises(RuntimeError, match="cut"):
        load_adapter(pipeline, saved_lora(2), name="dog")
    assert max_error(outputs(pipeline), base) == 0


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda weights: weights.pop(next(key for key in weights if "lora_B" in key)), "incomplete"),
        (lambda weights: weights.update({"unet.conv_in.lora_A.weight": torch.ones(4, 4, 3, 3)}), "only lora_A"),
        (
            lambda weights: weights.update({f"unet.gone.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}),
            "no layer unet.gone",
        ),
        (lambda weights: weights.update({"unet.conv_in.hada_w1": torch.ones(1)}), "not a key of a LoRA"),
    ],
)
def test_damaged_adapter_files(pipeline, tmp_path, damage, message):
    weights = load_file(saved_lora() / FOLDED_WEIGHTS)
    damage(weights)
    save_file(weights, tmp_path / FOLDED_WEIGHTS)
    with pytest.raises(ValueError, match=message):
        load_adapter(pipeline, tmp_path)
    assert loaded_adapters(pipeline) == []


def test_paths_that_hold_no_adapter(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        inspect_adapter(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither pytorch_lora_weights.safetensors nor nora_inner_weights.safetensors"):
        inspect_adapter(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        inspect_adapter(tmp_path / "a.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="no LoRA matrices"):
        inspect_adapter(tmp_path / "b.safetensors")
