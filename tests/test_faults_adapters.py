"""Adapter files as users bring them, on the embedded base: what each may do wrong, named after what the user does."""

from __future__ import annotations

import functools
import json
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file, save_file
from tiny_sdxl import max_error, outputs
from torch import nn

import nora
from inference.base import load_pipeline
from inference.load import load_adapter, loaded_adapters, set_adapter_scale, swap_adapter, unload_adapters
from inference.sampling import check_finite, encode_prompts, generate_images
from methods.adapter import adapted_layers
from methods.adapter_file import inspect_adapter
from methods.components import COMPONENT_NAMES, EMBEDDINGS, FOLDED_WEIGHTS
from methods.formats.layers import base_layers, layer_names
from methods.reading import read_adapter
from methods.update import measured_update

ROOT = Path(__file__).parent.parent
INPUTS = ROOT.parent / "shared" / "faults" / "inputs"
given = pytest.mark.skipif(not INPUTS.is_dir(), reason=f"the files that were found to fail are not in {INPUTS}")
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_"}


def fresh(dtype: torch.dtype = torch.float32) -> StableDiffusionXLPipeline:
    return load_pipeline(ROOT / "assets" / "tiny-sdxl", dtype, "cpu")


@pytest.fixture(scope="module")
def shared() -> StableDiffusionXLPipeline:
    return fresh()


@pytest.fixture
def pipeline(shared):
    yield shared
    unload_adapters(shared)
    assert same(shared), "the base is not what it was"


@functools.cache
def base() -> dict[str, torch.Tensor]:
    return outputs(fresh())


def same(pipeline, expected: dict[str, torch.Tensor] | None = None) -> bool:
    now = outputs(pipeline)
    return all(torch.equal(now[name], value) for name, value in (expected or base()).items())


def components(pipeline) -> dict[str, nn.Module]:
    return {name: getattr(pipeline, name) for name in COMPONENT_NAMES}


def layer(pipeline, name: str) -> nn.Module:
    component, _, path = name.partition(".")
    return base_layers(getattr(pipeline, component))[path]


def loaded(pipeline) -> dict[str, torch.Tensor]:
    """What the LoRA layers that are on add to each layer's weight, at their scales."""
    found = {}
    for component, model in components(pipeline).items():
        for path, one in adapted_layers(model).items():
            parts = [
                one.scaling[name] * (one.lora_B[name].weight.flatten(1) @ one.lora_A[name].weight.flatten(1))
                for name in one.lora_A
            ]
            found[f"{component}.{path}"] = sum(parts).reshape(one.get_base_layer().weight.shape)
    return found


def check_loaded(pipeline, expected: dict[str, torch.Tensor], scale: float = 1.0) -> None:
    found = loaded(pipeline)
    assert set(found) == set(expected)
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], scale * delta, atol=2e-6, rtol=2e-5, msg=lambda text: f"{name}: {text}")  # noqa: B023


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def normal(*shape: int, seed: int = 0, std: float = 0.1) -> torch.Tensor:
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


SOME = (  # of every kind: attention, feed-forward, projections, resnets, convolutions, both text encoders
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "unet.up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj",
    "unet.up_blocks.0.attentions.0.proj_in",
    "unet.conv_in",
    "unet.down_blocks.1.resnets.0.conv1",
    "unet.up_blocks.0.upsamplers.0.conv",
    "unet.down_blocks.1.resnets.0.conv_shortcut",
    "unet.time_embedding.linear_1",
    "text_encoder.encoder.layers.0.self_attn.q_proj",
    "text_encoder.encoder.layers.1.mlp.fc1",
    "text_encoder_2.text_model.encoder.layers.0.self_attn.out_proj",
    "text_encoder_2.text_projection",
)


def kohya_name(name: str) -> str:
    component, _, path = name.partition(".")
    return KOHYA[component] + path.replace(".", "_")


def lora_parts(weight: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """up and down of a layer, with the kernel in down."""
    ones = [1] * (weight.ndim - 2)
    return normal(len(weight), rank, *ones, seed=seed), normal(rank, *weight.shape[1:], seed=seed + 1)


def product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return torch.einsum("mr,r...->m...", up.flatten(1), down)


# --- A1 ---------------------------------------------------------------------------------------------------------------


@given
def test_a_kohya_file_resized_layer_by_layer(pipeline):
    tensors = load_file(INPUTS / "kohya_mixalpha.safetensors")
    expected = {}
    for component, model in components(pipeline).items():
        for path in base_layers(model):
            key = kohya_name(f"{component}.{path}")
            if f"{key}.alpha" in tensors:
                up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
                expected[f"{component}.{path}"] = tensors[f"{key}.alpha"] / len(down) * up @ down
    assert 3 * len(expected) == len(tensors)
    load_adapter(pipeline, INPUTS / "kohya_mixalpha.safetensors")
    check_loaded(pipeline, expected)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, -1.0])
def test_mixed_alphas_and_ranks_in_every_kind_of_layer(pipeline, tmp_path, scale):
    tensors, expected = {}, {}
    for number, name in enumerate(SOME):
        rank, alpha = 1 + number % 4, [None, 1.0, 0.25, 7.0][number % 4]
        up, down = lora_parts(layer(pipeline, name).weight, rank, number)
        key = kohya_name(name)
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha) if number % 2 else torch.tensor([alpha])
        expected[name] = (rank if alpha is None else alpha) / rank * product(up, down)
    load_adapter(pipeline, write(tmp_path / "a.safetensors", tensors), scale)
    check_loaded(pipeline, expected, scale)


def test_names_of_sdxl_s_blocks_in_stability_s_code():
    """files.md's table by hand: SDXL has two resnets in a downward block."""
    config = UNet2DConditionModel.load_config(ROOT / "assets" / "tiny-sdxl" / "unet")
    config |= {"layers_per_block": 2}
    with torch.device("meta"):
        names = layer_names({"unet": UNet2DConditionModel.from_config(config)})
    block = "transformer_blocks_0_attn1_to_q"
    for kohya, path in {
        "input_blocks_0_0": "conv_in",
        "input_blocks_2_0_in_layers_2": "down_blocks.0.resnets.1.conv1",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        f"input_blocks_4_1_{block}": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        f"input_blocks_8_1_{block}": "down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_q",
        "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
        f"middle_block_1_{block}": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        f"output_blocks_1_1_{block}": "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
        "output_blocks_8_0_in_layers_2": "up_blocks.2.resnets.2.conv1",
        "out_2": "conv_out",
        "time_embed_2": "time_embedding.linear_2",
        "label_emb_0_0": "add_embedding.linear_1",
    }.items():
        assert names[f"lora_unet_{kohya}"].path == path
        assert names[f"lora_unet_{path.replace('.', '_')}"].path == path
    assert not any(name.startswith("lora_unet_input_blocks_9") for name in names)


def test_a_diffusers_file_with_patterns_of_alphas_in_its_header(pipeline, tmp_path):
    """Written by diffusers, from a live adapter: the header's alpha_pattern and rslora hold."""
    own = fresh()
    config = peft.LoraConfig(
        r=4, lora_alpha=6, rank_pattern={"attn2.to_k": 2}, alpha_pattern={"attn2.to_k": 7}, use_rslora=True
    )
    config.target_modules = ["to_k", "conv1"]
    own.unet.add_adapter(config)
    expected = {}
    for path, one in adapted_layers(own.unet).items():
        for side in (one.lora_A, one.lora_B):
            side["default"].weight.data = normal(*side["default"].weight.shape, seed=len(expected))
        expected[f"unet.{path}"] = one.get_delta_weight("default")
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(own.unet), **_collate_lora_metadata({"unet": own.unet})
    )
    load_adapter(pipeline, tmp_path)
    check_loaded(pipeline, {name: delta.detach() for name, delta in expected.items()})


def test_a_small_alpha_in_half_precision_keeps_its_digits(tmp_path):
    name, half = SOME[0], fresh(torch.float16)
    up, down = lora_parts(layer(half, name).weight, 64, 0)
    up, down = 1e-4 * up, 10 * down  # up · alpha / rank is about 2e-7, where float16 has two digits left
    key = kohya_name(name)
    tensors = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(1.0)}
    load_adapter(half, write(tmp_path / "a.safetensors", tensors), name="x")
    one = adapted_layers(half.unet)[name.removeprefix("unet.")]
    found = one.lora_B["x"].weight.double() @ one.lora_A["x"].weight.double()
    assert one.lora_B["x"].weight.dtype == torch.float16
    expected = (up.double() @ down.double()) / 64
    assert (found - expected).norm() < 1e-3 * expected.norm()


# --- A2, A10: DoRA, LoHa, LoKr, Tucker, full differences, computed in another way -------------------------------------


def lycoris(kind: str, weight: torch.Tensor, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of a layer as LyCORIS writes them, and ΔW by loops over entries (numpy)."""
    m, n, kernel = weight.shape[0], weight.shape[1], tuple(weight.shape[2:])
    flat, r, alpha = weight[0].numel(), 3, 1.5
    s = alpha / r

    def draw(*shape: int) -> torch.Tensor:
        nonlocal seed
        seed += 1
        return normal(*shape, seed=seed, std=0.3)

    if kind == "tucker":
        t = {"lora_mid.weight": draw(r, r, *kernel), "lora_up.weight": draw(m, r, 1, 1)}
        t["lora_down.weight"] = draw(r, n, 1, 1)
        mid = t["lora_mid.weight"].numpy()
        up, down = t["lora_up.weight"].numpy()[:, :, 0, 0], t["lora_down.weight"].numpy()[:, :, 0, 0]
        delta = s * sum(
            np.multiply.outer(np.multiply.outer(up[:, i], down[j]), mid[i, j]) for i in range(r) for j in range(r)
        )
    elif kind == "loha":
        t = {"hada_w1_a": draw(m, r), "hada_w1_b": draw(r, flat), "hada_w2_a": draw(m, r), "hada_w2_b": draw(r, flat)}
        a = {key: value.numpy() for key, value in t.items()}
        delta = s * (a["hada_w1_a"] @ a["hada_w1_b"]) * (a["hada_w2_a"] @ a["hada_w2_b"])
    elif kind == "loha tucker":
        t = {f"hada_w{i}_{x}": draw(r, m if x == "a" else n) for i in "12" for x in "ab"}
        t |= {f"hada_t{i}": draw(r, r, *kernel) for i in "12"}
        halves = []
        for i in "12":
            core, wa, wb = (t[key].numpy() for key in (f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b"))
            halves.append(
                sum(np.multiply.outer(np.multiply.outer(wa[p], wb[q]), core[p, q]) for p in range(r) for q in range(r))
            )
        delta = s * halves[0] * halves[1]
    else:
        factor = 4
        w1_full, w2_full = "both" in kind or "w1" in kind, "both" in kind or "w2" in kind
        t = {}
        if w1_full:
            t["lokr_w1"] = draw(factor, factor)
            w1 = t["lokr_w1"].numpy()
        else:
            t["lokr_w1_a"], t["lokr_w1_b"] = draw(factor, r), draw(r, factor)
            w1 = t["lokr_w1_a"].numpy() @ t["lokr_w1_b"].numpy()
        if w2_full:
            t["lokr_w2"] = draw(m // factor, n // factor, *kernel)
            w2 = t["lokr_w2"].numpy()
        elif "tucker" in kind:
            t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"] = (
                draw(r, r, *kernel),
                draw(r, m // factor),
                draw(r, n // factor),
            )
            wa, wb, core = t["lokr_w2_a"].numpy(), t["lokr_w2_b"].numpy(), t["lokr_t2"].numpy()
            w2 = sum(np.multiply.outer(np.multiply.outer(wa[p], wb[q]), core[p, q]) for p in range(r) for q in range(r))
        else:
            t["lokr_w2_a"], t["lokr_w2_b"] = draw(m // factor, r), draw(r, flat // factor)
            w2 = (t["lokr_w2_a"].numpy() @ t["lokr_w2_b"].numpy()).reshape(m // factor, n // factor, *kernel)
        if w1_full and w2_full:
            s = 1.0  # whatever alpha says
        rows = []
        for i in range(factor):  # block (i, j) of the product is w1[i, j] w2
            rows.append(np.concatenate([w1[i, j] * w2 for j in range(factor)], axis=1))
        delta = s * np.concatenate(rows, axis=0)
    return t | {"alpha": torch.tensor(alpha)}, torch.from_numpy(np.asarray(delta)).reshape(weight.shape)


KINDS = ("loha", "lokr", "lokr w1", "lokr w2", "lokr both")
CONVOLUTIONS = ("tucker", "loha tucker", "lokr tucker", "lokr tucker w1")


@pytest.mark.parametrize("kind", KINDS + CONVOLUTIONS)
@pytest.mark.parametrize("magnitudes", [None, "outputs", "inputs"])
def test_a_file_of_lycoris(pipeline, tmp_path, kind, magnitudes):
    linear = [SOME[i] for i in (0, 2, 9, 11)] if kind in KINDS else []
    names = [*linear, "unet.down_blocks.1.resnets.0.conv1"]
    tensors, expected = {}, {}
    for number, name in enumerate(names):
        weight = layer(pipeline, name).weight.detach()
        parts, delta = lycoris(kind, weight, 10 * number)
        if magnitudes:
            axes = [d for d in range(weight.ndim) if d != (0 if magnitudes == "outputs" else 1)]
            shape = [size if d not in axes else 1 for d, size in enumerate(weight.shape)]
            parts["dora_scale"] = 1 + normal(*shape, seed=number).abs()
            whole = (weight + delta).numpy()
            norm = np.sqrt((whole**2).sum(axis=tuple(axes), keepdims=True))
            delta = torch.from_numpy(parts["dora_scale"].numpy() * whole / norm) - weight
        tensors |= {f"{kohya_name(name)}.{part}": tensor for part, tensor in parts.items()}
        expected[name] = delta
    path = write(tmp_path / "a.safetensors", tensors)
    name = load_adapter(pipeline, path)
    check_loaded(pipeline, expected)
    set_adapter_scale(pipeline, name, 0.0)
    assert same(pipeline)


def test_a_kohya_dora_whose_magnitudes_matter(pipeline, tmp_path):
    """On square layers too, where only the shape says of which side they are; PEFT's are of the outputs."""
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = layer(pipeline, name).weight.detach()
    up, down = lora_parts(weight, 4, 1)
    magnitude = 1 + normal(len(weight), seed=5).abs()
    whole = weight + 0.5 * up @ down
    by_output = magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True) - weight
    by_input = magnitude[None] * whole / whole.norm(dim=0, keepdim=True) - weight
    common = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(2.0)}
    for part, value, expected in (
        ("dora_scale", magnitude[:, None], by_output),
        ("dora_scale", magnitude[None], by_input),
        ("lora_magnitude_vector", magnitude, by_output),
    ):
        tensors = {f"{kohya_name(name)}.{key}": tensor for key, tensor in (common | {part: value}).items()}
        load_adapter(pipeline, write(tmp_path / "a.safetensors", tensors))
        check_loaded(pipeline, {name: expected})
        unload_adapters(pipeline)


def test_a_full_difference_with_biases(pipeline, tmp_path):
    linear, conv = "unet.time_embedding.linear_1", "unet.conv_in"
    deltas = {name: normal(*layer(pipeline, name).weight.shape) for name in (linear, conv)}
    biases = {name: normal(len(delta), seed=3) for name, delta in deltas.items()}
    tensors = {f"{kohya_name(name)}.diff": delta for name, delta in deltas.items()}
    tensors |= {f"{kohya_name(name)}.diff_b": bias for name, bias in biases.items()}
    tensors[f"{kohya_name('unet.conv_out')}.diff_b"] = normal(8, seed=4)
    load_adapter(pipeline, write(tmp_path / "a.safetensors", tensors), name="x")
    check_loaded(pipeline, deltas | {"unet.conv_out": torch.zeros_like(layer(pipeline, "unet.conv_out").weight)})
    live = outputs(pipeline)
    unload_adapters(pipeline)
    own = fresh()
    with torch.no_grad():
        for name, delta in deltas.items():
            layer(own, name).weight += delta
            layer(own, name).bias += biases[name]
        own.unet.conv_out.bias += normal(8, seed=4)
    assert max_error(outputs(own), live) < 1e-5
    load_adapter(pipeline, tmp_path / "a.safetensors", name="x")
    pipeline.fuse_lora(components=list(COMPONENT_NAMES))
    assert max_error(outputs(pipeline), live) < 1e-5
    restore(pipeline)


# --- A3, A4: PEFT folders of any method -------------------------------------------------------------------------------

OPTIONS = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 16},
    "FROD": {"target_modules": ["attn2.to_k"], "progressbar": False},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["norm1"]},
    "OFT": {"r": 0, "oft_block_size": 16},
    "ROAD": {"group_size": 8},
    "TINYLORA": {"init_weights": True},
    "VBLORA": {"vector_length": 16, "num_vectors": 32},
}
REFUSED = {  # nothing that is added to a layer's weight, or not the same for every input
    *("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "LILY", "LN_TUNING", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING"),
    *("PROMPT_TUNING", "P_TUNING", "SHADOW", "TRAINABLE_TOKENS", "XLORA"),
    "ADAMSS",  # which wants scikit-learn
}


def train(model: nn.Module, config: peft.PeftConfig, folder: Path) -> dict[str, torch.Tensor]:
    """Write a folder with PEFT, its parameters moved by a little noise; ΔW of each layer, by its outputs."""
    fields = vars(config)
    for name in ("init_weights", "init_ia3_weights"):
        if name in fields and config.peft_type.value not in ("TINYLORA", "FOURIERFT"):
            setattr(config, name, False)
    torch.manual_seed(1)
    before = base_layers(fresh_part(model))
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    wrapped.eval().save_pretrained(folder)
    return {
        path: measured_update(layer, before[path]).weight()
        for path, layer in adapted_layers(model).items()
        if isinstance(before[path], nn.Linear)
    }


def fresh_part(model: nn.Module) -> nn.Module:
    return getattr(fresh(), "unet" if isinstance(model, UNet2DConditionModel) else "text_encoder")


def walk() -> list[str]:
    return [kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING]


@pytest.mark.parametrize("kind", walk())
def test_a_peft_folder_of_any_method_loads_rightly_or_is_refused(pipeline, tmp_path, kind):
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[next(k for k in PEFT_TYPE_TO_CONFIG_MAPPING if k.value == kind)]
    folder = tmp_path / "unet"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            options = {"target_modules": ["attn1.to_q", "attn2.to_v"]} | OPTIONS.get(kind, {})
            own = fresh()
            config = config_class(**options)
            if kind == "NORA":
                nora.preprocess_nora(own.unet, config, lambda *_: outputs(own))
            expected = train(own.unet, config, folder)
        except Exception as error:  # a method that no UNet can have: its folder as PEFT would name it
            if kind not in REFUSED:
                raise
            expected = None
            folder.mkdir(exist_ok=True)
            (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
            write(folder / "adapter_model.safetensors", {"prompt_embeddings": torch.ones(2, 2)})
            assert error
    if kind in REFUSED:
        with pytest.raises(ValueError, match=str(folder)) as refusal:
            load_adapter(pipeline, folder)
        assert len(str(refusal.value)) < 500 and "\n" not in str(refusal.value)
        assert loaded_adapters(pipeline) == [] and same(pipeline)
        return
    name = load_adapter(pipeline, folder)
    found = loaded(pipeline)
    assert found.keys() == {f"unet.{path}" for path in expected}
    for path, delta in expected.items():
        size = layer(pipeline, f"unet.{path}").weight.norm() + delta.norm()
        assert (found[f"unet.{path}"] - delta).norm() < 1e-5 * size, path
    live = outputs(pipeline)
    set_adapter_scale(pipeline, name, 0.5)
    check_loaded(pipeline, {name: delta / 2 for name, delta in found.items()})
    set_adapter_scale(pipeline, name, 0.0)
    assert same(pipeline)
    set_adapter_scale(pipeline, name, 1.0)
    assert same(pipeline, live)


@given
def test_the_ia3_folder_that_left_itself_on(pipeline):
    """(IA)³ of outputs scales rows: ΔW = (l − 1) W, and of the bias as well."""
    tensors = load_file(INPUTS / "IA3" / "adapter_model.safetensors")
    expected = {}
    for key, scale in tensors.items():
        name = f"unet.{key.removeprefix('base_model.model.').removesuffix('.ia3_l')}"
        expected[name] = (scale - 1) * layer(pipeline, name).weight.detach()
    load_adapter(pipeline, INPUTS / "IA3")
    check_loaded(pipeline, expected)


@pytest.mark.parametrize("component", COMPONENT_NAMES)
@pytest.mark.parametrize("kind", ["pissa", "olora", "pissa_niter_4", "adalora", "dora", "bias", "convolutions"])
def test_a_peft_folder_of_any_component_and_what_it_does_to_the_base(pipeline, tmp_path, component, kind):
    targets = ["to_q", "to_out.0", "ff.net.2"] if component == "unet" else ["q_proj", "fc1"]
    if kind == "adalora":
        config = peft.AdaLoraConfig(total_step=10, init_r=6, target_modules=targets)
    else:
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets)
        if kind == "dora":
            config.use_dora = True
        elif kind == "bias":
            config.target_modules, config.lora_bias = ["ff.net.2"] if component == "unet" else targets, True
        elif kind == "convolutions":
            if component != "unet":
                pytest.skip("text encoders have none")
            config.target_modules, config.use_dora = ["conv1", "conv_shortcut"], True
        else:
            config.init_lora_weights = kind
    own = fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        wrapped = get_peft_model(getattr(own, component), config)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        wrapped.eval().save_pretrained(tmp_path / component)
    live = outputs(own)
    name = load_adapter(pipeline, tmp_path / component)
    atol = 3e-2 if "niter" in kind else 2e-4  # whose start is drawn at random
    now = outputs(pipeline)
    assert max(float((now[one] - live[one]).norm() / live[one].norm()) for one in now) < atol
    assert any(not torch.equal(now[one], base()[one]) for one in now)
    set_adapter_scale(pipeline, name, 0.0)
    assert same(pipeline)
    weights = fresh()
    unload_adapters(pipeline)
    for one in COMPONENT_NAMES:
        mine, theirs = (getattr(p, one).state_dict() for p in (pipeline, weights))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_an_adalora_folder_whose_ranks_were_taken_away(pipeline, tmp_path):
    own = fresh()
    config = peft.AdaLoraConfig(total_step=10, init_r=6, lora_alpha=9, target_modules=["attn1.to_q", "attn2.to_v"])
    wrapped = get_peft_model(own.unet, config)
    keep, expected = {}, {}
    for number, (path, one) in enumerate(adapted_layers(own.unet).items()):
        for side in (one.lora_A, one.lora_B, one.lora_E):
            side["default"].data = normal(*side["default"].shape, seed=number)
        kept = torch.tensor([i < number % 4 for i in range(6)])  # none of some layers
        one.lora_E["default"].data[~kept] = 0
        keep[f"{path}.lora_E.default"] = kept.tolist()
        A, B, E = (side["default"].detach() for side in (one.lora_A, one.lora_B, one.lora_E))
        expected[f"unet.{path}"] = 9 / (6 + 1e-5) * B @ (E * A)
    wrapped.peft_config["default"].rank_pattern = keep
    wrapped.save_pretrained(tmp_path)
    load_adapter(pipeline, tmp_path)
    check_loaded(pipeline, expected)


@pytest.mark.parametrize("damage", ["lacks", "extra", "cut", "pickle", "corda", "modules_to_save", "unknown"])
def test_a_peft_folder_that_is_not_whole(pipeline, tmp_path, damage):
    own = fresh()
    get_peft_model(own.unet, peft.LoraConfig(target_modules=["to_q"])).save_pretrained(tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, values = load_file(file), json.loads(config.read_text())
    if damage == "lacks":
        layer_name = next(iter(tensors)).rpartition(".lora_")[0]
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(layer_name)}
    elif damage == "extra":
        tensors[next(iter(tensors)).replace("lora_A", "lora_C")] = torch.ones(2)
    elif damage == "cut":
        tensors.popitem()
    elif damage == "corda":
        values["init_lora_weights"] = "corda"
    elif damage == "modules_to_save":
        values["modules_to_save"] = ["conv_in"]
    elif damage == "unknown":
        values["peft_type"] = "SOMETHING"
    write(file, tensors)
    config.write_text(json.dumps(values))
    if damage == "pickle":
        file.unlink()
        torch.save(tensors, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=str(tmp_path)) as refusal:
        load_adapter(pipeline, tmp_path)
    assert len(str(refusal.value)) < 500 and "\n" not in str(refusal.value)
    assert loaded_adapters(pipeline) == [] and same(pipeline)


def test_a_run_folder_that_holds_peft_folders_alone(pipeline, tmp_path):
    expected = {}
    for component in ("unet", "text_encoder"):
        own, targets = fresh(), ["to_q"] if component == "unet" else ["fc1"]
        config = peft.HRAConfig(r=2, target_modules=targets)
        deltas = train(getattr(own, component), config, tmp_path / "peft" / component)
        expected |= {f"{component}.{path}": delta for path, delta in deltas.items()}
    for path in (tmp_path, tmp_path / "peft"):
        load_adapter(pipeline, path)
        assert inspect_adapter(path).kind == "peft"
        found = loaded(pipeline)
        assert found.keys() == expected.keys()
        assert all((found[name] - delta).norm() < 1e-4 * (1 + delta.norm()) for name, delta in expected.items())
        unload_adapters(pipeline)


# --- A5, A6: scales and merged weights --------------------------------------------------------------------------------


@pytest.fixture
def dora(pipeline, tmp_path) -> Path:
    return dora_file(pipeline, tmp_path / "dora.safetensors", 0)


def dora_file(pipeline, path: Path, seed: int) -> Path:
    tensors = {}
    for number, name in enumerate(SOME):
        weight = layer(pipeline, name).weight.detach()
        up, down = lora_parts(weight, 2, number + seed)
        one = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(1.0)}
        norm = (weight.flatten(1).norm(dim=1) * (1.2 + normal(len(weight), seed=number + seed))).reshape(
            -1, *[1] * (weight.ndim - 1)
        )
        tensors |= {f"{kohya_name(name)}.{key}": value for key, value in (one | {"dora_scale": norm}).items()}
    return write(path, tensors)


def test_a_scale_of_a_dora_is_of_its_whole_update(pipeline, dora):
    name = load_adapter(pipeline, dora)
    whole = loaded(pipeline)
    for scale in (0.5, -1.0, 2.0):
        set_adapter_scale(pipeline, name, scale)
        check_loaded(pipeline, whole, scale)
    set_adapter_scale(pipeline, name, 0.0)
    assert same(pipeline)


def test_another_scale_for_merged_weights_is_refused(pipeline, dora):
    name = load_adapter(pipeline, dora)
    pipeline.fuse_lora(components=list(COMPONENT_NAMES))
    before = outputs(pipeline)
    with pytest.raises(ValueError, match="is merged.*unfuse_lora"):
        set_adapter_scale(pipeline, name, 0.5)
    assert same(pipeline, before)
    pipeline.unfuse_lora(components=list(COMPONENT_NAMES))
    restore(pipeline)


def restore(pipeline) -> None:
    """Merging and unmerging rounds, which is PEFT's."""
    unload_adapters(pipeline)
    whole = fresh()
    for name in COMPONENT_NAMES:
        getattr(pipeline, name).load_state_dict(getattr(whole, name).state_dict())


@pytest.mark.parametrize("broken", ["nan", "other base", "not there", "a good one"])
def test_a_load_that_fails_leaves_merged_weights_merged(pipeline, dora, tmp_path, broken):
    load_adapter(pipeline, dora, name="mine")
    pipeline.fuse_lora(components=list(COMPONENT_NAMES))
    before = outputs(pipeline)
    tensors = load_file(dora)
    key = next(key for key in tensors if "lora_up" in key)
    if broken == "nan":
        tensors[key][0] = float("nan")
    elif broken == "other base":
        tensors[key] = tensors[key].repeat(2, *[1] * (tensors[key].ndim - 1))
    path = write(tmp_path / "new.safetensors", tensors)
    if broken == "not there":
        path.unlink()
    for put in (
        lambda: load_adapter(pipeline, path, name="new"),
        *([lambda: swap_adapter(pipeline, path, "mine")] if broken != "a good one" else []),
    ):
        with pytest.raises(ValueError):
            put()
        assert loaded_adapters(pipeline) == ["mine"] and same(pipeline, before)
        assert all(one.merged for one in adapted_layers(pipeline.unet).values())
    restore(pipeline)


def test_adapters_of_stock_diffusers_and_of_here_lie_side_by_side(pipeline, dora, tmp_path):
    """Added here to stock's, scaled by diffusers' own calls, merged together, taken off one by one."""
    name = SOME[0]
    up, down = lora_parts(layer(pipeline, name).weight, 4, 9)
    write(tmp_path / "s.safetensors", {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
    pipeline.load_lora_weights(tmp_path, weight_name="s.safetensors", adapter_name="stock")
    stock = outputs(pipeline)
    load_adapter(pipeline, dora, name="dora")
    both = outputs(pipeline)
    assert loaded_adapters(pipeline) == ["stock", "dora"] and max_error(both, stock) > 1e-3
    pipeline.set_adapters(["stock", "dora"], [1.0, 0.0])
    assert max_error(outputs(pipeline), stock) == 0
    pipeline.set_adapters(["stock", "dora"], [1.0, 1.0])
    assert max_error(outputs(pipeline), both) < 1e-5
    pipeline.delete_adapters("dora")
    assert max_error(outputs(pipeline), stock) == 0
    swap_adapter(pipeline, dora, "stock")
    unload_adapters(pipeline)


# --- A7: values that are not finite -----------------------------------------------------------------------------------


@given
def test_a_file_with_nan_names_the_layer(pipeline):
    with pytest.raises(ValueError, match=r"unet\.down_blocks.*not finite"):
        load_adapter(pipeline, INPUTS / "nan.safetensors")
    assert loaded_adapters(pipeline) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_up.weight", "lora_down.weight", "alpha", "dora_scale"])
def test_values_that_are_not_finite_anywhere_in_a_file(pipeline, dora, value, part):
    tensors = load_file(dora)
    key = f"{kohya_name(SOME[9])}.{part}"
    tensors[key].view(-1)[0] = value
    write(dora, tensors)
    with pytest.raises(ValueError, match=f"{key}.*not finite"):
        load_adapter(pipeline, dora)


def test_finite_factors_whose_update_is_not_in_half_precision(tmp_path):
    half, key = fresh(torch.float16), kohya_name(SOME[0])
    m, n = layer(half, SOME[0]).weight.shape
    tensors = {f"{key}.lora_up.weight": torch.full((m, 1), 1e9), f"{key}.lora_down.weight": torch.full((1, n), 1e9)}
    with pytest.raises(ValueError, match=r"too large for torch.float16 in unet\."):
        load_adapter(half, write(tmp_path / "a.safetensors", tensors))
    assert loaded_adapters(half) == []


def test_a_picture_that_is_not_finite_is_an_error(pipeline, monkeypatch):
    forward = pipeline.unet.forward
    monkeypatch.setattr(pipeline.unet, "forward", lambda *a, **k: tuple(x * torch.nan for x in forward(*a, **k)))
    with pytest.raises(ValueError, match="'a cat' with seed 0 has values that are not finite"):
        list(generate_images(pipeline, ["a cat"], [0], num_inference_steps=1, height=64, width=64))
    check_finite(np.zeros((2, 2, 3)), "a cat", 0)


# --- A8, A9: spellings ------------------------------------------------------------------------------------------------


@given
@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_a_file_of_the_script_of_2023(pipeline, tmp_path, prefix):
    tensors = load_file(INPUTS / "old_unet.safetensors")
    path = write(tmp_path / "a.safetensors", {prefix + key.removeprefix("unet."): t for key, t in tensors.items()})
    stock = fresh()
    stock.load_lora_weights(INPUTS, weight_name="old_unet.safetensors")
    load_adapter(pipeline, path)
    assert max_error(outputs(pipeline), outputs(stock)) < 1e-5
    assert max_error(outputs(pipeline), base()) > 1e-3


@pytest.mark.parametrize("spelling", ["to_q_lora.{}.weight", "q_proj.lora_linear_layer.{}.weight"])
def test_text_encoders_of_2023(pipeline, tmp_path, spelling):
    tensors, expected = {}, {}
    for component, path in (("text_encoder", "encoder"), ("text_encoder_2", "text_model.encoder")):
        name = f"{component}.{path}.layers.0.self_attn.q_proj"
        up, down = lora_parts(layer(pipeline, name).weight, 4, len(path))
        old = f"{component}.text_model.encoder.layers.0.self_attn.{spelling}"
        tensors |= {old.format("up"): up, old.format("down"): down}
        expected[name] = up @ down
    load_adapter(pipeline, write(tmp_path / "a.safetensors", tensors))
    check_loaded(pipeline, expected)


@pytest.mark.parametrize(
    "spell",
    [
        lambda path, sgm: f"{path}.lora_{{}}.weight",
        lambda path, sgm: f"unet.{path}.lora.{{}}.weight",
        lambda path, sgm: f"diffusion_model.{sgm}.lora_{{}}.weight",
        lambda path, sgm: f"lora_unet_{sgm.replace('.', '_')}.lora_{{}}.weight",
        lambda path, sgm: f"lora_unet_{path.replace('.', '_')}.lora_{{}}.weight",
        lambda path, sgm: f"lycoris_{path.replace('.', '_')}.lora_{{}}.weight",
    ],
)
def test_the_right_base_is_not_called_another_one(pipeline, tmp_path, spell):
    """The embedded base has one resnet in a downward block, so two in an upward one: input_blocks.{2 i + j + 1}."""
    tensors, expected = {}, {}
    for path, sgm in {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
            "input_blocks.3.1.transformer_blocks.0.attn1.to_q"
        ),
        "up_blocks.0.resnets.1.conv2": "output_blocks.1.0.out_layers.3",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
        "mid_block.attentions.0.proj_out": "middle_block.1.proj_out",
    }.items():
        up, down = lora_parts(layer(pipeline, f"unet.{path}").weight, 2, len(path))
        key = spell(path, sgm)
        tensors |= {key.format("up"): up, key.format("down"): down}
        expected[f"unet.{path}"] = product(up, down)
    load_adapter(pipeline, write(tmp_path / "a.safetensors", tensors))
    check_loaded(pipeline, expected)


@given
def test_weights_of_a_peft_folder_alone_say_what_they_lack(pipeline, tmp_path):
    with pytest.raises(ValueError, match="PEFT folder without the adapter_config.json"):
        load_adapter(pipeline, INPUTS / "adapter_model.safetensors")
    targets = ["attn1.to_q", "attn1.to_k", "attn2.to_v", "attn2.to_out.0"]
    shutil.copy(INPUTS / "adapter_model.safetensors", tmp_path)
    peft.LoraConfig(r=4, lora_alpha=2, target_modules=targets).save_pretrained(tmp_path)
    load_adapter(pipeline, tmp_path / "adapter_model.safetensors")
    assert len(loaded(pipeline)) == 44


@pytest.mark.parametrize(
    "keys, said",
    [
        (["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"], "of Flux"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "of Flux"),
        (["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"], "Stable Diffusion 1 or 2"),
        (["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.oft_blocks"], "OFT or BOFT"),
        (["lora_unet_input_blocks_4_1_proj_in.a1.weight"], "GLoRA"),
        (["lora_unet_out_0.w_norm"], "norm layers"),
        (["clip_l", "clip_g"], "textual inversion"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a whole model"),
        (["first_stage_model.encoder.conv_in.weight"], "autoencoder"),
        (["unet.conv_norm_out.lora_A.weight", "unet.conv_norm_out.lora_B.weight"], "GroupNorm"),
        (["unet.nowhere.lora_A.weight", "unet.nowhere.lora_B.weight"], "none of the layers"),
        (["unet.conv_in.something"], "no LoRA matrices"),
    ],
)
def test_what_is_no_adapter_for_sdxl_is_called_what_it_is(pipeline, tmp_path, keys, said):
    path = write(tmp_path / "a.safetensors", {key: torch.ones(2, 2) for key in keys})
    with pytest.raises(ValueError, match=said) as refusal:
        load_adapter(pipeline, path)
    assert str(path) in str(refusal.value) and len(str(refusal.value)) < 500


# --- A10: the library's own messages ----------------------------------------------------------------------------------


@given
@pytest.mark.parametrize("name", ["loha", "alpha"])
def test_files_that_the_libraries_refused_at_length(pipeline, name):
    tensors = load_file(INPUTS / f"{name}.safetensors")
    expected = {}
    for path in base_layers(pipeline.unet):
        key = kohya_name(f"unet.{path}") if name == "loha" else f"unet.{path}"
        if f"{key}.alpha" not in tensors:
            continue
        if name == "loha":
            a, b, c, d = (tensors[f"{key}.hada_{part}"] for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
            delta, rank = (a @ b) * (c @ d), len(b)
        else:
            delta = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
            rank = len(tensors[f"{key}.lora_A.weight"])
        expected[f"unet.{path}"] = tensors[f"{key}.alpha"] / rank * delta
    load_adapter(pipeline, INPUTS / f"{name}.safetensors")
    assert len(expected) == 44
    check_loaded(pipeline, expected)


def test_half_a_text_encoder_loads(pipeline, tmp_path):
    name = SOME[9]
    up, down = lora_parts(layer(pipeline, name).weight, 4, 0)
    key = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    write(tmp_path / "a.safetensors", {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up})
    load_adapter(pipeline, tmp_path)
    check_loaded(pipeline, {name: up @ down})


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda t, key: t.pop(f"{key}.lora_up.weight"), "has only lora_A for"),
        (lambda t, key: t.pop(f"{key}.lora_down.weight"), "has only lora_B for"),
        (lambda t, key: t.update({f"{key}.hada_w1_a": torch.ones(2, 2)}), "no place beside"),
        (lambda t, key: t.update({f"{key}.lora_mid.weight": torch.ones(3, 5, 1)}), "has rank|don't fit"),
        (lambda t, key: t.update({f"{key}.alpha": torch.ones(2)}), "alpha of shape"),
        (lambda t, key: t.update({f"{key}.dora_scale": torch.ones(3)}), "magnitude of shape"),
        (lambda t, key: t.update({f"{key}.lora_up.weight": torch.ones(3, 2)}), "another base|rank"),
        (lambda t, key: t.update({f"{key}.something": torch.ones(2)}), "is not a key"),
        (lambda t, key: t.update({f"{key}.scale_x.lora_up.weight": torch.ones(2, 2)}), "no layer"),
        (lambda t, key: t.update({"lora_unet_conv_in.lora_A.weight": torch.ones(2, 4, 3, 3)}), "same layer"),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(pipeline, dora, damage, said):
    tensors = load_file(dora)
    damage(tensors, kohya_name(SOME[0]) if "same" not in said else kohya_name("unet.conv_in"))
    write(dora, tensors)
    with pytest.raises(ValueError, match=said) as refusal:
        load_adapter(pipeline, dora)
    assert str(dora) in str(refusal.value) and len(str(refusal.value)) < 500 and "\n" not in str(refusal.value)
    assert loaded_adapters(pipeline) == []


# --- A11 to A13 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cat.safetensors.bak", "cat", "cat.bin", "cat.pt"])
def test_a_renamed_file_is_read_by_its_content(pipeline, dora, name):
    load_adapter(pipeline, dora)
    expected = outputs(pipeline)
    unload_adapters(pipeline)
    load_adapter(pipeline, dora.rename(dora.with_name(name)))
    assert same(pipeline, expected)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


@pytest.mark.parametrize("name", ["cat.bin", "cat.safetensors", "pytorch_lora_weights.safetensors"])
def test_a_pickle_is_never_opened(pipeline, tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    for path in (tmp_path / name, *([tmp_path] if name.endswith(".safetensors") else [])):
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            load_adapter(pipeline, path)


def test_learned_embeddings_go_to_their_own_run_s_adapter(pipeline, dora, tmp_path):
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    other = shutil.copy(dora, run / "downloaded.safetensors")
    shutil.copy(dora, run / FOLDED_WEIGHTS)
    widths = {"clip_l": pipeline.text_encoder, "clip_g": pipeline.text_encoder_2}
    words = {key: torch.ones(1, model.get_input_embeddings().weight.shape[1]) for key, model in widths.items()}
    write(run / EMBEDDINGS, words, {"word": "[V]"})
    for name in (FOLDED_WEIGHTS, EMBEDDINGS):
        shutil.copy(run / name, run / "best")

    def word() -> torch.Tensor:
        return encode_prompts(pipeline, ["[V]"])["[V]"]["prompt_embeds"]

    load_adapter(pipeline, other, name="other")
    without = word()
    for path in (run, run / FOLDED_WEIGHTS, run / "best"):  # which is not refused because another took it
        load_adapter(pipeline, path, name="own")
        assert not torch.equal(word(), without)
        unload_adapters(pipeline, "own")
        assert torch.equal(word(), without)
    unload_adapters(pipeline)
    (run / FOLDED_WEIGHTS).unlink()
    assert inspect_adapter(run).path == Path(other) and inspect_adapter(run).new_word is None


@pytest.mark.parametrize("what", ["kohya", "diffusers", "peft"])
def test_loading_from_python_says_nothing(pipeline, dora, tmp_path, capfd, what):
    path = dora
    if what == "diffusers":
        tensors = {}
        for name in SOME:
            up, down = lora_parts(layer(pipeline, name).weight, 2, 0)
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        path = write(tmp_path / "a.safetensors", tensors)
    elif what == "peft":
        path = tmp_path / "text_encoder"
        train(fresh().text_encoder, peft.LoHaConfig(target_modules=["q_proj"]), path)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(pipeline, path, name="one")
        load_adapter(pipeline, path, name="two")
        swap_adapter(pipeline, path, "one")
    assert capfd.readouterr() == ("", "")


# --- the live model's own file ----------------------------------------------------------------------------------------


def test_a_file_is_read_against_the_base_beneath_a_live_adapter(pipeline, dora):
    alone = read_adapter(dora, components(pipeline))
    load_adapter(pipeline, dora)
    beneath = read_adapter(dora, components(pipeline))
    for component, updates in alone.items():
        assert updates.keys() == beneath[component].keys()
        for path, update in updates.items():
            assert torch.equal(update.up, beneath[component][path].up)
            assert torch.equal(update.down, beneath[component][path].down)
