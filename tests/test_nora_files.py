"""The inner-only file and the cache of outer factors: what they hold and refuse, and nothing half-done."""

import copy
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from methods.basis_cache import basis_cache, configured_cache
from nora import (
    BasisCache,
    NoraConfig,
    NoraLinear,
    inner_prefixes,
    load_inner,
    preprocess_nora,
    save_inner,
    use_basis_cache,
)
from nora.basis import build_basis
from nora.cache import SMALLEST_SIDE, cached_tensors
from nora.functional import outer_factors

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def unet_base():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        cross_attention_dim=24,
        use_linear_projection=True,
    )
    return unet.eval()


def text_base():
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CLIPTextModel(CLIPTextConfig(vocab_size=99, max_position_embeddings=16, **sizes)).eval()


def plain_base():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8))


RUNS = {
    "unet": lambda model: model(seeded(2, 4, 8, 8), 7, seeded(2, 5, 24)).sample,
    "text_encoder.text_model": lambda model: model(torch.arange(7)[None]).last_hidden_state,
    "plain": lambda model: model(seeded(5, 12)),
}
BASES = {"unet": unet_base, "text_encoder.text_model": text_base, "plain": plain_base}
TARGETS = {"unet": UNET_TARGETS, "text_encoder.text_model": TEXT_TARGETS, "plain": ["0", "2"]}


def adapted(prefix, **kwargs):
    model, run = BASES[prefix](), RUNS[prefix]
    settings = {"r": 2, "target_modules": TARGETS[prefix], "inner_init": "normal", "inner_std": 0.3} | kwargs
    config = NoraConfig(**settings)
    preprocess_nora(model, config, lambda: run(model))
    if hasattr(model, "add_adapter"):
        model.add_adapter(config)
        return model
    return get_peft_model(model, config)


@pytest.fixture
def trained():
    return {prefix: adapted(prefix) for prefix in BASES}


@pytest.fixture
def plain():
    return adapted("plain")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "nora_inner_weights.safetensors"


@torch.no_grad()
def outputs(components):
    return {prefix: RUNS[prefix](model) for prefix, model in components.items()}


def rewrite(path, change_tensors=lambda tensors: tensors, change_header=lambda header: header):
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    tensors = change_tensors(load_file(path))
    save_file(tensors, path, metadata=change_header(header))


def assert_refused(path, components, message, **kwargs):
    """load_inner refuses, and not one module, parameter or attribute of the components has changed."""
    before = {p: ([type(m) for m in c.modules()], copy.deepcopy(c.state_dict())) for p, c in components.items()}
    with pytest.raises(ValueError, match=message):
        load_inner(path, components, **kwargs)
    for prefix, component in components.items():
        kinds, state = before[prefix]
        assert [type(m) for m in component.modules()] == kinds
        assert all(torch.equal(state[k], v) for k, v in component.state_dict().items())
        assert not getattr(component, "_hf_peft_config_loaded", False) and not hasattr(component, "peft_config")


def fresh(*prefixes):
    return {prefix: BASES[prefix]() for prefix in prefixes or BASES}


# ---------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"awsvd_stat": "rms", "awsvd_gamma": 1.0, "sigma_side": "both"},
        {"awsvd_stat": "weight"},
        {"outer_init": "svd", "sigma_side": "A", "nora_alpha": 5.0},
        {"outer_init": "random", "outer_seed": 7},
        {"outer_r": 8, "rank_pattern": {".*2": 3, ".*k_proj": 3, ".*to_v": 1}},
    ],
)
def test_round_trip(path, kwargs):
    trained = {prefix: adapted(prefix, **kwargs) for prefix in BASES}
    expected = outputs(trained)
    save_inner(path, trained)
    assert inner_prefixes(path) == list(BASES)
    components = fresh()
    load_inner(path, components)
    for prefix, found in outputs(components).items():
        torch.testing.assert_close(found, expected[prefix], atol=1e-6, rtol=0)
    assert components["unet"]._hf_peft_config_loaded and list(components["unet"].peft_config) == ["default"]


def test_loads_beside_another_adapter_and_can_be_saved_again(path, trained, tmp_path):
    save_inner(path, {"unet": trained["unet"]})
    expected = outputs({"unet": trained["unet"]})["unet"]
    unet = unet_base()
    unet.add_adapter(NoraConfig(r=2, outer_init="svd", target_modules=UNET_TARGETS), "first")
    load_inner(path, {"unet": unet}, adapter_name="second")
    unet.set_adapters(["second"])
    torch.testing.assert_close(RUNS["unet"](unet), expected, atol=1e-6, rtol=0)
    save_inner(tmp_path / "again.safetensors", {"unet": unet}, adapter_name="second")
    one, other = load_file(path), load_file(tmp_path / "again.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_what_the_file_holds(path, trained):
    save_inner(path, trained, metadata={"step": "500"})
    with safe_open(path, framework="pt") as file:
        header, keys = file.metadata(), set(file.keys())
    tensors = load_file(path)
    layers = {n: m for n, m in trained["unet"].named_modules() if isinstance(m, NoraLinear)}
    for name, layer in layers.items():
        inner_A, inner_B = tensors[f"unet.{name}.lora_A.weight"], tensors[f"unet.{name}.lora_B.weight"]
        assert inner_A.shape == (2, 16) and inner_B.shape == (16, 2)
        assert torch.equal(inner_A, layer.nora_inner_A["default"].weight)
    assert header["step"] == "500" and header["format_version"] == "1"
    config = json.loads(header["nora_config"])
    assert list(config) == list(BASES) and config["unet"]["r"] == 2
    assert set(json.loads(header["fingerprints"])) == {k.rpartition(".lora_")[0] for k in keys if ".lora_" in k}

    # per block: attn1's q, k, v share one statistic; attn2's k and v share the prompt's with every other block
    stats = {k for k in keys if "awsvd_stats" in k and k.startswith("unet.")}
    blocks = len(layers) // 8
    assert len(stats) == 4 * blocks + 1
    aliases = json.loads(header["awsvd_stats_aliases"])
    assert all(f"{owner}.awsvd_stats" in keys for owner in aliases.values())
    assert len(stats) + sum(k.startswith("unet.") for k in aliases) == len(layers)


def test_half_precision_file(path, trained):
    save_inner(path, {"unet": trained["unet"]}, dtype=torch.float16)
    assert {t.dtype for t in load_file(path).values()} == {torch.float16}
    components = fresh("unet")
    load_inner(path, components)
    expected = outputs({"unet": trained["unet"]})["unet"]
    torch.testing.assert_close(outputs(components)["unet"], expected, atol=5e-3, rtol=0)


def test_half_precision_base_that_agrees(path):
    """A base that holds float16 numbers loads an adapter in either dtype: the numbers are the same."""
    base = plain_base().half()
    config = NoraConfig(r=2, outer_init="svd", target_modules=["0", "2"], inner_init="normal", inner_std=0.3)
    save_inner(path, {"plain": get_peft_model(copy.deepcopy(base), config)})
    load_inner(path, {"plain": copy.deepcopy(base).float()})


def test_writing_is_atomic(path, trained, monkeypatch):
    save_inner(path, {"unet": trained["unet"]})
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_inner(path, {"plain": trained["plain"]})
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


# ---------------------------------------------------------------------- another basis is refused


def flip(weight):
    weight[3] = -weight[3]


def permute(weight):
    weight.copy_(weight.flip(1))


def rotate(weight):
    weight.copy_(weight @ torch.linalg.qr(seeded(weight.shape[1], weight.shape[1]))[0])


def finetune(weight):
    weight += 0.02 * weight.std() * seeded(*weight.shape)


@pytest.mark.parametrize("change", [flip, permute, rotate, finetune])
def test_another_base_is_refused_with_the_layers_name(path, trained, change):
    save_inner(path, trained)
    components = fresh()
    name = "layers.1.self_attn.k_proj"
    layer = next(m for n, m in components["text_encoder.text_model"].named_modules() if n.endswith(name))
    with torch.no_grad():
        change(layer.weight)
    message = rf"text_encoder.text_model\..*{name}: the base weight differs.*another basis.*a LoRA that fold_nora made"
    assert_refused(path, components, message)


def test_swapped_statistics_are_refused(path, trained):
    save_inner(path, trained)

    def swap(tensors):
        key = next(k for k in tensors if k.startswith("plain.") and k.endswith("awsvd_stats"))
        return tensors | {key: tensors[key].flip(0).contiguous()}

    rewrite(path, swap)
    assert_refused(path, fresh(), "plain.0: the outer factor . differs")


def test_edited_config_is_refused(path, plain):
    save_inner(path, {"plain": plain})
    rewrite(path, change_header=lambda h: h | {"nora_config": h["nora_config"].replace('"B"', '"A"')})
    assert_refused(path, fresh("plain"), "plain.0: the outer factor . differs")


def test_rounded_base_is_refused_where_its_basis_turned(path):
    """float16 rounding turns singular vectors that lie close together: the weight passes, the pair must not."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(96, 96))  # random entries: the singular values lie close
    config = NoraConfig(r=4, outer_r=64, outer_init="svd", target_modules=["0"])
    save_inner(path, {"plain": get_peft_model(copy.deepcopy(base), config)})
    with pytest.raises(ValueError, match="plain.0: the outer factor . differs"):
        load_inner(path, {"plain": copy.deepcopy(base).half()})


# ---------------------------------------------------------------------- files and components that don't fit


def without(*endings):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(endings)}


def with_header(**entries):
    return lambda header: header | entries


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        (without("0.lora_A.weight"), None, r"lacks the key plain.0.lora_A.weight"),
        (without("2.lora_B.weight"), None, r"lacks the key plain.2.lora_B.weight"),
        (without("2.lora_A.weight", "2.lora_B.weight"), None, r"lacks the weights of plain.2"),
        (without("0.awsvd_stats"), None, r"lacks the AwSVD statistic of plain.0"),
        (lambda t: t | {"plain.0.alpha": torch.ones(1)}, None, "unexpected key plain.0.alpha"),
        (lambda t: t | {f"vae.0.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}, None, "unexpected key vae.0"),
        (lambda t: t | {"plain.0.lora_A.weight": torch.ones(3, 12)}, None, r"shapes \(3, 12\)"),
        (lambda t: t | {"plain.0.awsvd_stats": torch.ones(5)}, None, r"and 5 in the file"),
        (None, with_header(format_version="99"), "format_version 99, this code reads up to 2"),
        (None, with_header(format_version="x"), "format_version x"),
        (None, with_header(nora_config="{"), "nora_config that can't be read"),
        (None, with_header(nora_config='{"plain": {"colour": 1}}'), "nora_config that can't be read"),
        (None, with_header(fingerprints="[]"), "fingerprints"),
        (None, with_header(fingerprints="{}"), "no fingerprint for plain.0"),
        (None, with_header(awsvd_stats_aliases='{"plain.0": "plain.9"}'), r"lacks the key plain.9.awsvd_stats"),
        (None, lambda h: {"format": "pt"}, "not an inner-only NoRA file"),
    ],
)
def test_damaged_files_are_refused(path, plain, tensors, header, message):
    save_inner(path, {"plain": plain})
    rewrite(path, tensors or (lambda t: t), header or (lambda h: h))
    assert_refused(path, fresh("plain"), message)


def test_not_a_file_at_all(path):
    assert_refused(path, fresh("plain"), "is not a file")
    path.write_bytes(b"\x00" * 100)
    assert_refused(path, fresh("plain"), "not a readable safetensors file")


def test_cut_off_file(path, plain):
    save_inner(path, {"plain": plain})
    path.write_bytes(path.read_bytes()[:-50])
    assert_refused(path, fresh("plain"), "not a readable safetensors file")


def test_components_that_do_not_fit(path, plain):
    save_inner(path, {"plain": plain})
    assert_refused(path, fresh("unet", "plain"), "holds .'plain'. but the components given are")
    assert_refused(path, {"plain": nn.Sequential(nn.Linear(12, 20))}, "weights for plain.2")
    assert_refused(
        path,
        {"plain": nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 9))},
        r"shapes \(2, 8\), \(8, 2\) for plain.2",
    )
    assert_refused(path, {"plain": nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Linear(20, 8))}, "0 is a Conv2d")
    with torch.device("meta"):
        ghost = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8))
    with pytest.raises(ValueError, match="plain.0 has no weight"):
        load_inner(path, {"plain": ghost})
    with pytest.raises(ValueError, match="is a PeftModel"):
        load_inner(path, {"plain": plain})
    loaded = fresh("plain")
    load_inner(path, loaded)
    with pytest.raises(ValueError, match="already has an adapter 'default'"):
        load_inner(path, loaded)


def test_saving_refusals(path, plain):
    with pytest.raises(ValueError, match="'plain' has no NoRA adapter 'x'"):
        save_inner(path, {"plain": plain_base()}, adapter_name="x")
    with pytest.raises(ValueError, match="format_version"):
        save_inner(path, plain, metadata={"format_version": "2"})
    config = NoraConfig(r=2, outer_init="svd", target_modules=["0"], modules_to_save=["2"])
    with pytest.raises(ValueError, match="also trains modules_to_save"):
        save_inner(path, {"plain": get_peft_model(plain_base(), config)})
    assert not path.exists()


# ---------------------------------------------------------------------- the cache


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def large_base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SMALLEST_SIDE, SMALLEST_SIDE))


def never():
    raise AssertionError("the cache should have answered")


def test_cache_answers_for_the_same_content_only(folder):
    W = large_base()[0].weight.detach()
    calls = []

    def compute():
        calls.append(1)
        return outer_factors(W, 8)._asdict()

    settings = ("svd", 8, "B")
    with use_basis_cache(BasisCache(folder)):
        first = cached_tensors(W, None, settings, compute)
        again = cached_tensors(W.clone(), None, settings, never)
        assert all(torch.equal(first[name], again[name]) for name in ("A", "B"))
        nudged = W.clone()
        nudged[0, 0] += 1e-6
        statistic = torch.ones(W.shape[1]).half()
        for other in [(nudged, None, settings), (W, statistic, settings), (W, None, ("svd", 9, "B"))]:
            cached_tensors(*other, compute)
    assert len(calls) == 4
    assert all(name.endswith(".safetensors") for name in os.listdir(folder))


def test_cache_tells_the_sides_apart(folder):
    layer, widths = nn.Linear(SMALLEST_SIDE + 40, SMALLEST_SIDE, bias=False), []
    with use_basis_cache(BasisCache(folder)):
        for side in ("narrower", "input", "narrower"):
            config = NoraConfig(target_modules=["0"], outer_init="svd", side=side)
            widths.append(build_basis("0", layer, config, 8).A.shape[1])
    assert widths == [SMALLEST_SIDE, SMALLEST_SIDE + 40, SMALLEST_SIDE] and len(list(folder.iterdir())) == 2


def test_without_a_cache_and_for_small_layers_nothing_is_written(folder, monkeypatch):
    monkeypatch.setenv("NORA_CACHE_DIR", str(folder))  # the library asks no environment
    W, small = large_base()[0].weight.detach(), torch.randn(SMALLEST_SIDE - 1, SMALLEST_SIDE)
    with use_basis_cache(BasisCache(folder)):
        cached_tensors(small, None, (), lambda: outer_factors(small, 4)._asdict())
        with use_basis_cache(None):
            cached_tensors(W, None, (), lambda: outer_factors(W, 4)._asdict())
    cached_tensors(W, None, (), lambda: outer_factors(W, 4)._asdict())
    assert not folder.exists()


def test_broken_and_unwritable_caches_only_cost_time(folder, tmp_path):
    W = large_base()[0].weight.detach()
    with use_basis_cache(BasisCache(folder)):
        cached_tensors(W, None, (), lambda: outer_factors(W, 4)._asdict())
        entry = next(folder.iterdir())
        entry.write_bytes(b"junk")
        found = cached_tensors(W, None, (), lambda: outer_factors(W, 4)._asdict())
        assert torch.equal(found["A"], cached_tensors(W, None, (), never)["A"])
    (tmp_path / "occupied").write_text("a file where the folder should be")
    with use_basis_cache(BasisCache(tmp_path / "occupied")):
        cached_tensors(W, None, (), lambda: outer_factors(W, 4)._asdict())


def test_the_least_recently_used_entries_go(folder):
    """Every subject has a statistic of its own, and so entries of its own."""
    W = large_base()[0].weight.detach()

    def use(number, limit=math.inf):
        before = set(os.listdir(folder)) if folder.exists() else set()
        with use_basis_cache(BasisCache(folder, limit)):
            cached_tensors(W, None, (number,), lambda: outer_factors(W, 4)._asdict())
        return set(os.listdir(folder)) - before

    (first,), (second,), (third,) = map(use, range(3))
    size = (folder / first).stat().st_size
    for age, name in enumerate((third, second, first)):
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    (folder / "mine.safetensors").write_bytes(bytes(9 * size))
    assert use(0) == set()  # read, so the second is now the least recently used
    (fourth,) = use(3, limit=3 * size)
    assert set(os.listdir(folder)) == {first, third, fourth, "mine.safetensors"}


def test_the_cache_is_evicted_beside_others(folder):
    folder.mkdir()
    (folder / "outer-1.safetensors").symlink_to("gone")  # as one that goes between listing and looking
    BasisCache(folder, 0).evict()


def test_injection_uses_the_cache(folder, monkeypatch):
    config = NoraConfig(r=2, outer_r=8, outer_init="svd", target_modules=["0"])
    with use_basis_cache(BasisCache(folder)):
        first = get_peft_model(large_base(), config).base_model.model[0].outer("default")
        assert len(os.listdir(folder)) == 1
        monkeypatch.setattr("nora.basis.outer_factors", never)
        again = get_peft_model(large_base(), config).base_model.model[0].outer("default")
    assert torch.equal(first.A, again.A)


# ---------------------------------------------------------------------- where the suite keeps it


def test_the_suite_keeps_its_cache_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.delenv("NORA_CACHE_DIR")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert configured_cache() == BasisCache(tmp_path / ".cache" / "nora", 8e9)
    monkeypatch.setenv("NORA_CACHE_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("NORA_CACHE_GB", "0.5")
    assert configured_cache() == BasisCache(tmp_path / "elsewhere", 5e8)
    monkeypatch.setenv("NORA_CACHE_GB", "0")
    assert configured_cache().limit_bytes == math.inf
    monkeypatch.setenv("NORA_CACHE_DIR", "")
    assert configured_cache() is None


def test_the_suite_fills_its_cache(tmp_path, monkeypatch):
    config = NoraConfig(r=2, outer_r=8, outer_init="svd", target_modules=["0"])
    inject = basis_cache()(get_peft_model)  # as its loaders are decorated: the environment is read at every call
    for folder in (tmp_path / "one", tmp_path / "two"):
        monkeypatch.setenv("NORA_CACHE_DIR", str(folder))
        inject(large_base(), config)
        assert len(os.listdir(folder)) == 1
    get_peft_model(large_base(), replace(config, outer_r=4))
    assert len(os.listdir(folder)) == 1


@pytest.mark.parametrize("wrong", ["lots", "-1", "nan"])
def test_a_limit_that_says_no_size_is_refused(wrong, monkeypatch):
    monkeypatch.setenv("NORA_CACHE_GB", wrong)
    with pytest.raises(ValueError, match=f"NORA_CACHE_GB={wrong} must be a number of gigabytes"):
        configured_cache()
