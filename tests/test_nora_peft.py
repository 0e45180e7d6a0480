"""`nora` under PEFT's, diffusers' and transformers' own calls, on small models of every kind."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from nora_models import (
    MLP,
    adapt,
    assert_close,
    build_clip_text,
    build_clip_vision,
    build_gpt2,
    build_llama,
    build_mlp,
    build_unet,
    config_for,
    seeded,
    tokens,
)
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file, save_file
from torch import nn

from nora import NoraConfig, NoraLinear, calibration_mask, check_targets, fold_nora, preprocess_nora

BUILDERS = [build_mlp, build_unet, build_clip_text, build_clip_vision, build_llama, build_gpt2]


@pytest.fixture(params=BUILDERS, ids=lambda builder: builder.__name__.removeprefix("build_"))
def case(request):
    torch.manual_seed(0)
    model, targets, run = request.param()
    return model.eval().requires_grad_(False), targets, run


# ---------------------------------------------------------------------- the contract, on every model


def test_adapts_disables_and_unloads(case):
    _, _, run = case
    model, before = adapt(case)
    after = run(model)
    assert (after - before).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(run(model), before)
    assert torch.equal(run(model), after)
    assert torch.equal(run(model.unload()), before)


def test_matched_start_is_the_base(case):
    model, before = adapt(case, inner_init="matched")
    assert torch.equal(case[2](model), before)


def test_merging_equals_live_and_unmerging_restores_the_bits(case):
    _, _, run = case
    model, before = adapt(case)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    after = run(model)
    model.merge_adapter(safe_merge=True)
    assert_close(run(model), after)
    with pytest.warns(UserWarning, match="merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name]), name
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, NoraLinear) for module in merged.modules())
    assert_close(run(merged), after)


def test_folded_lora_equals_live(case):
    _, _, run = case
    model, before = adapt(case, nora_alpha=3.0)
    after, folded = run(model), fold_nora(model)
    base = model.unload()
    for name in {key.rpartition(".lora_")[0] for key in folded}:
        layer = base.get_submodule(name)
        delta = folded[f"{name}.lora_B.weight"] @ folded[f"{name}.lora_A.weight"]
        layer.weight.data += delta if isinstance(layer, nn.Linear) else delta.T
    assert_close(run(base), after)


@pytest.mark.parametrize(
    ("outer_init", "low_cpu_mem_usage"), [("awsvd", False), ("awsvd", True), ("svd", False), ("random", True)]
)
def test_save_pretrained_round_trip(case, outer_init, low_cpu_mem_usage, tmp_path):
    model, _, run = case
    base = copy.deepcopy(model)
    adapted, _ = adapt(case, outer_init=outer_init)
    after = run(adapted)
    adapted.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert not any("outer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(run(loaded), after)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_state_dict_round_trip_under_another_name(case):
    model, targets, run = case
    base = copy.deepcopy(model)
    adapted, _ = adapt(case)
    state = get_peft_model_state_dict(adapted)
    other = PeftModel(
        base, config_for(targets, saved=True, basis="iterated", side="narrower"), adapter_name="other"
    ).eval()
    with pytest.raises(ValueError, match="no outer factors at .*load_adapter"):
        run(other)
    result = set_peft_model_state_dict(other, state, adapter_name="other")
    assert not result.unexpected_keys
    assert torch.equal(run(other), run(adapted))


def test_only_inner_factors_get_gradients(case):
    model, _ = adapt(case)
    case[2](model).float().square().mean().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == ("nora_inner" in name)
        if p.requires_grad:
            assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_half_precision_base(case):
    model, targets, run = case
    if "UNet" in type(model).__name__ or "CLIPVision" in type(model).__name__:
        pytest.skip("these take float inputs of their own dtype")
    if isinstance(model, MLP):
        run = lambda m: m(seeded(5, 16).bfloat16())  # noqa: E731
    model.to(torch.bfloat16)
    adapted, before = adapt((model, targets, run))
    for module in adapted.modules():
        if isinstance(module, NoraLinear):
            assert module.nora_inner_A["default"].weight.dtype == torch.float32
            assert module.nora_outer_A["default"].dtype == torch.bfloat16
    after = run(adapted)
    assert after.dtype == before.dtype and (after - before).abs().max() > 1e-3
    weights = {name: p.clone() for name, p in adapted.named_parameters()}
    adapted.merge_adapter()
    assert (run(adapted) - after).abs().mean() < 0.05 * (after - before).abs().mean() + 2e-2
    adapted.unmerge_adapter()
    assert all(torch.equal(p, weights[name]) for name, p in adapted.named_parameters())


# ---------------------------------------------------------------------- several adapters


@pytest.fixture
def two_adapters():
    torch.manual_seed(0)
    model, targets, run = build_mlp()
    model.eval()
    adapted, before = adapt((model, targets, run), outer_r=8)
    adapted.add_adapter("other", config_for(targets, r=3, outer_r=8))
    return adapted, before, run


def test_several_adapters(two_adapters):
    model, before, run = two_adapters
    first = run(model)
    model.set_adapter("other")
    second = run(model)
    assert (first - second).abs().max() > 1e-3
    model.base_model.set_adapter(["default", "other"])
    both = run(model)
    model.merge_adapter(["default", "other"])
    assert_close(run(model), both)
    model.unmerge_adapter()
    model.set_adapter("other")
    model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert torch.equal(run(model), first)
    layer = model.base_model.model.lin0
    assert all("other" not in getattr(layer, name) for name in layer.adapter_layer_names + layer.other_param_names)


def test_mixed_batch(two_adapters):
    model, before, _ = two_adapters
    x = seeded(5, 16)
    expected = []
    for name in ("default", "other"):
        model.set_adapter(name)
        expected.append(model(x))
    names = ["default", "other", "__base__", "other", "default"]
    rows = {"default": expected[0], "other": expected[1], "__base__": before}
    assert_close(model(x, adapter_names=names), torch.stack([rows[name][i] for i, name in enumerate(names)]))
    with pytest.raises(ValueError, match="nobody"):
        model(x, adapter_names=["nobody"] * 5)
    model.train()
    with pytest.raises(ValueError, match="training mode. Call model.eval"):
        model(x, adapter_names=names)


def test_weighted_sum_is_exact(two_adapters):
    model, _, _ = two_adapters
    layer = model.base_model.model.lin0
    deltas = layer.get_delta_weight("default"), layer.get_delta_weight("other")
    model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "sum")
    assert_close(layer.get_delta_weight("sum"), 0.7 * deltas[0] - 0.4 * deltas[1])
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "low", combination_type="svd", svd_rank=2)
    assert layer.r["low"] == 2
    U, sigma, Vt = torch.linalg.svd(sum(deltas))
    assert_close(layer.get_delta_weight("low"), (U[:, :2] * sigma[:2]) @ Vt[:2], atol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"combination_type": "linear"}, "not the sum"),
        ({"adapters": ["default", "nobody"]}, "nobody"),
        ({"weights": [1.0]}, "one weight for each"),
        ({"adapter_name": "other"}, "exists already"),
        ({"combination_type": "svd", "svd_rank": 99}, "exceeds outer_r"),
    ],
)
def test_weighted_sum_refusals(two_adapters, kwargs, message):
    model, _, _ = two_adapters
    arguments = {"adapters": ["default", "other"], "weights": [1.0, 1.0], "adapter_name": "sum"} | kwargs
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**arguments)
    assert "sum" not in model.peft_config


def test_weighted_sum_refuses_other_bases(two_adapters):
    model, _, _ = two_adapters
    model.add_adapter("plain", config_for(["lin0", "lin1"], outer_init="svd"))
    with pytest.raises(ValueError, match="different outer factors at lin0"):
        model.add_weighted_adapter(["default", "plain"], [1.0, 1.0], "sum")


def test_adding_to_a_merged_layer_is_refused(two_adapters):
    model, _, _ = two_adapters
    model.merge_adapter()
    with pytest.raises(ValueError, match="lin0 has merged adapters"):
        model.add_adapter("third", config_for(["lin0"], outer_init="svd"))


def test_merge_refuses_nan(two_adapters):
    model, _, _ = two_adapters
    layer = model.base_model.model.lin0
    weight = layer.base_layer.weight.clone()
    layer.nora_inner_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="broken"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)


def test_scale_methods(two_adapters):
    model, _, _ = two_adapters
    layer = model.base_model.model.lin0
    delta = layer.get_delta_weight("default")
    layer.scale_layer(0.5)
    assert_close(layer.get_delta_weight("default"), 0.5 * delta)
    layer.unscale_layer(0.5)
    layer.set_scale("default", 3.0)
    assert_close(layer.get_delta_weight("default"), 3 * delta)
    assert_close(layer.fold("default")[1] @ layer.fold("default")[0], delta)
    layer.unscale_layer()
    assert_close(layer.get_delta_weight("default"), delta)


def test_conversion_to_lora():
    from peft.tuners.lora.conversion import convert_to_lora

    torch.manual_seed(0)
    model, before = adapt(build_mlp())
    assert model.supports_lora_conversion()
    _, state = convert_to_lora(model, rank=2)
    folded = fold_nora(model)
    for name in ("lin0", "lin1"):
        lora = {letter: state[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB"}
        assert_close(lora["B"] @ lora["A"], folded[f"{name}.lora_B.weight"] @ folded[f"{name}.lora_A.weight"], 1e-4)


# ---------------------------------------------------------------------- diffusers and transformers


def test_diffusers_calls():
    torch.manual_seed(0)
    unet, targets, run = build_unet()
    unet.eval()
    before = run(unet)
    config = config_for(targets)
    preprocess_nora(unet, config, lambda: run(unet))
    unet.add_adapter(config)
    after = run(unet)
    unet.disable_adapters()
    assert torch.equal(run(unet), before)
    unet.enable_adapters()
    unet.set_adapters("default", weights=0.0)
    assert_close(run(unet), before)
    unet.set_adapters("default", weights=1.0)
    assert torch.equal(run(unet), after)
    unet.add_adapter(config_for(["to_q"], outer_init="svd"), "other")
    unet.set_adapters(["default", "other"], [1.0, 0.5])
    assert (run(unet) - after).abs().max() > 1e-4
    unet.delete_adapters("other")
    unet.fuse_lora()
    assert_close(run(unet), after)
    unet.unfuse_lora()
    unet.unload_lora()
    assert torch.equal(run(unet), before)


def test_failed_add_adapter_leaves_the_model_ready():
    torch.manual_seed(0)
    unet, targets, run = build_unet()
    names = list(unet.state_dict())
    with pytest.raises(ValueError, match="outer_r=17 exceeds"):
        unet.add_adapter(config_for(["to_out.0", "time_embedding.linear_1"], outer_r=17, outer_init="svd"))
    assert list(unet.state_dict()) == names
    unet.add_adapter(config_for(targets, outer_init="svd"))
    with pytest.raises(ValueError, match="conv_in is a Conv2d"):
        unet.add_adapter(config_for(["to_q", "conv_in"], outer_init="svd"), "other")
    assert list(unet.peft_config) == ["default"]
    unet.add_adapter(config_for(["to_q"], outer_init="svd"), "other")


def test_transformers_save_and_load(tmp_path):
    torch.manual_seed(0)
    model, targets, run = build_llama()
    model.eval()
    model.save_pretrained(tmp_path / "base")
    config = config_for(targets)
    preprocess_nora(model, config, lambda: run(model))
    model.add_adapter(config)
    after = run(model)
    model.save_pretrained(tmp_path / "adapter")
    fresh = type(model).from_pretrained(tmp_path / "base").eval()
    fresh.load_adapter(str(tmp_path / "adapter"))
    assert_close(run(fresh), after)

    other = type(model).from_pretrained(tmp_path / "base").eval()
    other.model.layers[0].self_attn.k_proj.weight.data.neg_()
    with pytest.raises(ValueError, match="layers.0.self_attn.k_proj: the base weight differs"):
        other.load_adapter(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="no outer factors at"):
        run(other)


def test_casting_the_model_leaves_the_record_exact():
    torch.manual_seed(0)
    model, _ = adapt(build_mlp())
    layer = model.base_model.model.lin0
    before = {
        name: tensor.clone() for name, tensor in model.state_dict().items() if "nora_f" in name or "nora_s" in name
    }
    assert len(before) == 4
    model.to(torch.bfloat16)
    assert layer.nora_outer_A["default"].dtype == torch.bfloat16
    after = model.state_dict()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )


def test_nora_on_top_of_lora():
    from peft import LoraConfig

    torch.manual_seed(0)
    unet, targets, run = build_unet()
    unet.eval()
    unet.add_adapter(LoraConfig(target_modules=targets, r=2, init_lora_weights=False), "lora")
    with_lora = run(unet)
    unet.add_adapter(config_for(targets, outer_init="svd"), "nora")
    unet.set_adapters(["lora", "nora"])
    assert (run(unet) - with_lora).abs().max() > 1e-4


# ---------------------------------------------------------------------- registration and configs


def test_registration_is_a_real_member_and_idempotent():
    import pickle

    import nora

    assert PeftType("NORA") is PeftType.NORA is PeftType["NORA"]
    assert PeftType.NORA in list(PeftType) and PeftType.NORA == "NORA" and PeftType.NORA.value == "NORA"
    assert copy.deepcopy(PeftType.NORA) is PeftType.NORA and pickle.loads(pickle.dumps(PeftType.NORA)) is PeftType.NORA
    assert json.dumps(PeftType.NORA) == '"NORA"' and {PeftType.NORA: 1}["NORA"] == 1
    nora.ensure_peft_type()
    nora.register(NoraConfig, nora.NoraModel)


def import_nora_after(preparation):
    """Import nora in a process of its own whose PEFT has been changed by the preparation; returns what it prints."""
    script = preparation + "\nimport nora\nprint(type(nora.NoraConfig(target_modules=['x'])).__name__)"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_a_peft_with_a_nora_of_its_own_is_named():
    """As it would be if PEFT added the member to its enum and registered a tuner for it."""
    process = import_nora_after("""
import importlib.util, pathlib, types, peft
from dataclasses import dataclass
from peft.utils.peft_types import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
spec = importlib.util.find_spec("nora")
alone = types.ModuleType("registration")  # the enum member, without importing the package
exec(pathlib.Path(spec.submodule_search_locations[0], "registration.py").read_text(), alone.__dict__)
alone.ensure_peft_type()
class NoraModel(peft.tuners.lora.LoraModel): pass
NoraModel.__module__ = "peft.tuners.nora.model"
PEFT_TYPE_TO_TUNER_MAPPING[PeftType.NORA] = NoraModel
""")
    assert process.returncode == 1
    message = "has a method NORA of its own (peft.tuners.nora.model.NoraModel), and neither it nor this package reads"
    assert message in process.stderr.strip().splitlines()[-1]
    assert process.stderr.strip().splitlines()[-1].startswith("ImportError: peft ")


def test_a_use_nora_field_of_lora_is_no_clash(tmp_path):
    """As in the proposal for PEFT: normalised LoRA as a switch of LoraConfig."""
    process = import_nora_after("""
import peft
from dataclasses import dataclass, field
@dataclass
class LoraConfig(peft.LoraConfig):
    use_nora: bool = field(default=False)
peft.LoraConfig = peft.tuners.lora.LoraConfig = LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType
PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = LoraConfig
assert LoraConfig(use_nora=True).use_nora
""")
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "NoraConfig"


def test_import_alone_registers(tmp_path):
    torch.manual_seed(0)
    adapted, _ = adapt(build_mlp())
    adapted.save_pretrained(tmp_path)
    script = (
        f"import nora; from peft import PeftConfig; print(type(PeftConfig.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "NoraConfig"


def test_config_round_trip(tmp_path):
    config = config_for(
        ["a", "b"], outer_init="svd", outer_r=8, rank_pattern={"a": 1}, nora_alpha=2.0, layers_to_transform=[1]
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    for name, value in config.to_dict().items():
        if name not in ("inference_mode", "saved"):
            assert getattr(loaded, name) == value, name
    assert copy.deepcopy(config) == config
    assert loaded.saved and not config.saved


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"r": 0}, "r=0 must be an integer"),
        ({"r": 2.5}, "r=2.5"),
        ({"outer_r": -1}, "outer_r=-1"),
        ({"r": 9, "outer_r": 8}, "r=9 exceeds outer_r=8"),
        ({"nora_alpha": 0}, "nora_alpha=0"),
        ({"outer_init": "pca"}, "outer_init='pca' is not known: choose one of awsvd, svd, random"),
        ({"awsvd_gamma": -1}, "awsvd_gamma=-1"),
        ({"awsvd_stat": "max"}, "awsvd_stat='max'"),
        ({"sigma_side": "C"}, "sigma_side='C'"),
        ({"inner_init": "ones"}, "inner_init='ones'"),
        ({"inner_std": 0}, "inner_std=0"),
        ({"nora_dropout": 1.0}, "nora_dropout=1.0"),
        ({"rank_pattern": {"a": 0}}, "rank_pattern"),
        ({"outer_rank_pattern": {"a": "x"}}, "outer_rank_pattern"),
        ({"alpha_pattern": {"a": -1}}, "alpha_pattern"),
        ({"outer_seed": -1}, "outer_seed=-1"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"layers_to_transform": 1, "target_modules": "x.*"}, "layers_to_transform=1"),
    ],
)
def test_wrong_configs_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NoraConfig(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"outer_r": 20}, "outer_r=20 exceeds min\\(out, in\\)=16 at lin0"),
        ({"r": 17}, "r=17 exceeds min\\(out, in\\)=16 at lin0"),
        ({"rank_pattern": {"lin1": 9}, "outer_r": 8}, "r=9 exceeds outer_r=8 at lin1"),
        ({"target_modules": ["lin0", "lin9x"], "outer_init": "awsvd"}, "lin0 has none: call preprocess_nora"),
        ({"target_modules": ["nothing"]}, "not found in the base model"),
        ({"target_modules": None}, "specify `target_modules`"),
    ],
)
def test_wrong_configs_for_the_model_leave_it_untouched(kwargs, message):
    model = build_mlp()[0]
    modules = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(
            model, NoraConfig(**({"r": 2, "target_modules": ["lin0", "lin1"], "outer_init": "svd"} | kwargs))
        )
    assert [type(m) for m in model.modules()] == modules


def test_broken_bases_are_refused():
    model = build_mlp()[0]
    model.lin1.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="lin1 has NaN or infinity"):
        get_peft_model(model, config_for(["lin0", "lin1"], outer_init="svd"))
    attention = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match="never calls it"):
        get_peft_model(attention, config_for(["out_proj"], outer_init="svd"))


def test_default_outer_rank_is_said_once(caplog):
    model = build_mlp()[0]
    adapted = get_peft_model(model, config_for(["lin0", "lin1"], r=4, outer_init="svd"))
    assert [r.getMessage() for r in caplog.records if r.name.startswith("nora")] == [
        "outer_r is 8 * r, or the smaller side where that is less: 2 modules, the first lin0 (16)"
    ]
    assert adapted.base_model.model.lin0.nora_outer_A["default"].shape == (16, 16)
    assert adapted.base_model.model.lin1.nora_outer_A["default"].shape == (24, 32)


def test_patterns():
    config = config_for(
        "all-linear",
        outer_init="svd",
        r=2,
        rank_pattern={"lin1": 3},
        outer_rank_pattern={"lin0": 5},
        alpha_pattern={"head": 1},
    )
    model = get_peft_model(build_mlp()[0], config).base_model.model
    assert [layer.r["default"] for layer in (model.lin0, model.lin1, model.head)] == [2, 3, 2]
    assert [layer.nora_outer_A["default"].shape[0] for layer in (model.lin0, model.lin1, model.head)] == [5, 24, 3]
    assert [layer.scaling["default"] for layer in (model.lin0, model.lin1, model.head)] == [1, 1, 0.5]


def test_default_targets_and_modules_to_save(tmp_path):
    torch.manual_seed(0)
    model, _, run = build_llama()
    base = copy.deepcopy(model).eval()
    config = NoraConfig(r=2, outer_init="svd", modules_to_save=["lm_head"], init_weights=False)
    adapted = get_peft_model(model, config).eval()
    assert set(adapted.peft_config["default"].target_modules) == {"q_proj", "v_proj"}
    adapted.base_model.model.lm_head.modules_to_save["default"].weight.data += 0.1
    assert (run(adapted) - run(base)).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    assert_close(run(PeftModel.from_pretrained(base, tmp_path).eval()), run(adapted))


def test_dropout_acts_on_the_update_only():
    torch.manual_seed(0)
    model = get_peft_model(build_mlp()[0], config_for(["lin0"], outer_init="svd", nora_dropout=0.5))
    x = seeded(5, 16)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


# ---------------------------------------------------------------------- calibration


@pytest.mark.parametrize("kind", ["mean_abs", "rms"])
def test_statistics_are_the_means_over_all_passes(kind):
    model = build_mlp()[0]
    batches = [seeded(5, 16), seeded(2, 3, 16), seeded(1, 16)]
    config = config_for(["lin0", "lin1"], awsvd_stat=kind)
    stats = preprocess_nora(model, config, lambda: [model(x) for x in batches])
    x = torch.cat([b.reshape(-1, 16) for b in batches]).double()
    for name, inputs in {"lin0": x, "lin1": model.lin0(x.float()).relu().detach().double()}.items():
        expected = inputs.abs().mean(0) if kind == "mean_abs" else inputs.square().mean(0).sqrt()
        torch.testing.assert_close(stats[name].double(), expected, rtol=1e-5, atol=1e-7)


def test_shared_inputs_are_measured_once(monkeypatch):
    from nora import calibration

    torch.manual_seed(0)
    unet, targets, run = build_unet()
    counted = []
    plain = calibration._ChannelSums._input_sum

    def counting(self, name, values, x):
        fresh = id(x) not in self._recent
        counted.append(fresh)
        return plain(self, name, values, x)

    monkeypatch.setattr(calibration._ChannelSums, "_input_sum", counting)
    stats = preprocess_nora(unet, config_for(targets), lambda: run(unet))
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    assert torch.equal(stats[f"{block}.attn1.to_q"], stats[f"{block}.attn1.to_k"])
    assert torch.equal(stats[f"{block}.attn2.to_k"], stats["mid_block.attentions.0.transformer_blocks.1.attn2.to_v"])
    assert sum(counted) < 0.6 * len(counted)


def test_mask_counts_real_tokens_only():
    torch.manual_seed(0)
    encoder, targets, _ = build_clip_text()
    encoder.eval()
    padded = tokens()
    padded[:, 4:] = 98
    mask = (padded != 98).long()

    def masked():
        with calibration_mask(mask):
            encoder(padded)

    config = config_for(targets)
    with_mask = preprocess_nora(encoder, config, masked)
    short = preprocess_nora(
        encoder, config, lambda: encoder(padded[:, :4])
    )  # causal: the padding changes nothing before it
    for name, statistic in short.items():
        torch.testing.assert_close(with_mask[name], statistic, rtol=1e-4, atol=1e-6)

    def misfit():
        with calibration_mask(mask[:, :3]):
            encoder(padded)

    with pytest.raises(ValueError, match="calibration_mask has shape"):
        preprocess_nora(encoder, config, misfit)


def test_given_statistics_run_nothing_and_give_the_same_adapter():
    torch.manual_seed(0)
    model, targets, run = build_mlp()
    other = copy.deepcopy(model)
    config = config_for(targets)
    stats = preprocess_nora(model, config, lambda: run(model))
    assert preprocess_nora(other, copy.deepcopy(config), stats=stats).keys() == stats.keys()
    pairs = []
    for m in (model, other):
        pairs.append(get_peft_model(m, copy.deepcopy(config)).base_model.model.lin1.outer("default"))
    assert torch.equal(pairs[0].A, pairs[1].A) and torch.equal(pairs[0].B, pairs[1].B)


def test_calibration_refusals():
    model, targets, run = build_mlp()
    config = config_for([*targets, "head"])
    with pytest.raises(ValueError, match="neither of run_model and stats"):
        preprocess_nora(model, config)
    with pytest.raises(ValueError, match="1 of 3 targeted modules saw no input in calibration: head"):
        preprocess_nora(model, config, lambda: model.lin1(model.lin0(seeded(5, 16))))
    with pytest.raises(ValueError, match="no entry for the targeted module lin1"):
        preprocess_nora(model, config, stats={"lin0": torch.ones(16)})
    with pytest.raises(ValueError, match="16 input channels"):
        preprocess_nora(model, config, stats={"lin0": torch.ones(3)})
    with pytest.raises(ValueError, match="matches no module"):
        preprocess_nora(model, config_for(["nothing"]), lambda: run(model))
    with pytest.raises(ValueError, match="lin0 saw NaN"):
        preprocess_nora(model, config, lambda: model(seeded(5, 16) * float("nan")))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert preprocess_nora(model, config_for(targets, outer_init="svd"), lambda: 1 / 0) == {}
    assert preprocess_nora(model, config_for(targets, awsvd_stat="weight"), lambda: 1 / 0) == {}


def calibrate_in_process(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(5, 6)
    config = NoraConfig(r=1, target_modules=["0"])
    stats = preprocess_nora(model, config, lambda: model(x[:2] if rank else x[2:]))
    torch.testing.assert_close(stats["0"], x.abs().mean(0))
    dist.destroy_process_group()


def test_sums_are_reduced_over_processes(tmp_path):
    """Two processes with different batches get what one process gets from both."""
    fork = torch.multiprocessing.get_context("fork")  # a fresh interpreter would spend its time importing
    processes = [fork.Process(target=calibrate_in_process, args=(rank, tmp_path / "store")) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]


# ---------------------------------------------------------------------- refusals of PEFT's own files


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    base = build_mlp()[0]
    adapted, _ = adapt((copy.deepcopy(base), *build_mlp()[1:]))
    adapted.save_pretrained(tmp_path)
    return base, tmp_path


def test_from_pretrained_refuses_another_base(saved):
    base, path = saved
    base.lin1.weight.data = base.lin1.weight.data.flip(0)
    with pytest.raises(ValueError, match="lin1: the base weight differs.*another basis.*a LoRA that fold_nora made"):
        PeftModel.from_pretrained(base, path)


@pytest.mark.parametrize(
    ("key", "message"),
    [(key, f"lin0: the weights come without {key}") for key in ("nora_fingerprint", "nora_stats")],
)
def test_from_pretrained_refuses_incomplete_files(saved, key, message):
    base, path = saved
    file = path / "adapter_model.safetensors"
    state = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(f"lin0.{key}")}
    save_file(state, file)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, path)


def test_from_pretrained_refuses_other_statistics(saved):
    base, path = saved
    file = path / "adapter_model.safetensors"
    state = load_file(file)
    state["base_model.model.lin0.nora_stats"] = state["base_model.model.lin0.nora_stats"].flip(0).contiguous()
    save_file(state, file)
    with pytest.raises(ValueError, match="lin0: the outer factor . differs"):
        PeftModel.from_pretrained(base, path)


def test_check_targets_changes_nothing():
    model, targets, _ = build_mlp()
    modules = [type(m) for m in model.modules()]
    config = config_for(targets)
    check_targets(model, config)
    with pytest.raises(ValueError, match="outer_r=20 exceeds"):
        check_targets(model, config_for(targets, outer_r=20))
    with pytest.raises(ValueError, match="matches no module of MLP"):
        check_targets(model, config_for(["nothing"]))
    assert [type(m) for m in model.modules()] == modules and config == config_for(targets)
