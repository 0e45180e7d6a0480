"""AwSVD's statistic of the base alone: the same for every run, machine and process; files leave it out."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_trainer import run
from tiny_sdxl import saved_base

import nora
from benchmarks.sdxl_shape import build_unet
from inference.base import load_pipeline
from inference.base_statistics import base_statistics
from inference.load import load_adapter
from methods import base_passes
from methods.base_passes import LABEL, encode_generic_prompts, run_base
from methods.base_statistic import base_identity, base_in_float32
from methods.components import FOLDED_WEIGHTS, INNER_WEIGHTS, TARGETS, TEXT_ENCODERS, adapter_components
from methods.reading import read_adapter
from nora import NoraConfig, measure_statistics
from nora.files import parse_inner, save_inner
from nora.functional import FINGERPRINT_SHAPE
from nora.model import nora_layers


def pipeline(dtype=torch.float32):
    return load_pipeline(str(saved_base()), dtype, "cpu")


def measured(base, component="unet"):
    model = getattr(base, component)
    config = NoraConfig(r=2, target_modules=list(TARGETS[component]))
    generic = encode_generic_prompts(base)
    with base_in_float32(model):
        return measure_statistics(model, config, lambda: run_base(component, model, generic, base.scheduler))


def test_it_does_not_depend_on_the_run(tmp_path, monkeypatch):
    """Other pictures, prompt, batch and seed: the same basis, to the bit."""
    monkeypatch.setenv("NORA_CACHE_DIR", "")
    options = {"train_text_encoder": True, "max_train_steps": 1}
    run(tmp_path / "one", **options)
    run(tmp_path / "other", instance_prompt="a photo of sks dog in a box", train_batch_size=3, seed=7, **options)
    headers = []
    for name in ("one", "other"):
        with safe_open(tmp_path / name / INNER_WEIGHTS, "pt") as file:
            assert not [key for key in file.keys() if "stats" in key]  # noqa: SIM118 (no mapping)
            headers.append(file.metadata())
    assert headers[0]["base_statistic"] == LABEL and headers[0]["format_version"] == "2"
    one, other = (parse_inner(tmp_path / name / INNER_WEIGHTS).fingerprints for name in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("component", ["unet", *TEXT_ENCODERS])
def test_half_precision_weights_are_measured_in_float32(component):
    half = pipeline(torch.bfloat16)
    before = {name: p.clone() for name, p in getattr(half, component).named_parameters()}
    found = measured(half, component)
    after = dict(getattr(half, component).named_parameters())
    assert all(after[name].dtype == p.dtype and torch.equal(after[name], p) for name, p in before.items())
    same = measured(half.to(torch.float32), component)
    assert found.keys() == same.keys() and all(torch.equal(found[name], same[name]) for name in found)


def test_it_is_the_mean_over_what_the_base_draws_by_itself(monkeypatch):
    """Recorded by a hook of our own on one layer, and whatever is drawn at once."""
    base, seen = pipeline(), []
    name = next(name for name, _ in base.unet.named_modules() if name.endswith("attn1.to_q"))
    found = measured(base)[name]
    monkeypatch.setattr(base_passes, "AT_ONCE", 3)
    handle = base.unet.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    again = measured(base)[name]
    handle.remove()
    tokens = torch.cat([x.flatten(0, -2) for x in seen]).double()
    assert sum(len(x) for x in seen) == len(base_passes.PROMPTS) * base_passes.STEPS
    assert torch.allclose(again.double(), tokens.abs().mean(dim=0), rtol=1e-6)
    assert torch.allclose(found, again, rtol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(folder, train_text_encoder=True, max_train_steps=2, learning_rate=0.01)
    return folder


def test_a_file_without_it_is_read_beside_another_adapter_and_without_a_cache(trained, monkeypatch):
    monkeypatch.setenv("NORA_CACHE_DIR", "")
    base = pipeline()
    load_adapter(base, trained / FOLDED_WEIGHTS, name="first")
    components = {name: getattr(base, name) for name in ("unet", *TEXT_ENCODERS)}
    folded = read_adapter(trained / FOLDED_WEIGHTS, components)
    inner = read_adapter(trained / INNER_WEIGHTS, components, base_statistics(base))
    for component, updates in folded.items():
        for layer, update in updates.items():
            expected = update.weight()
            assert torch.allclose(inner[component][layer].weight(), expected, atol=1e-5 * float(expected.abs().max()))


def test_the_library_says_what_a_file_leaves_out(trained):
    components = adapter_components(pipeline())
    with pytest.raises(ValueError, match=f"leaves out the statistics of its base, which the passes '{LABEL}' measure"):
        nora.load_inner(trained / INNER_WEIGHTS, components)
    assert not any("lora" in name for name, _ in components["unet"].named_parameters())


def test_a_file_of_other_passes_is_refused(trained):
    base = pipeline()
    with pytest.raises(ValueError, match="comes from the passes 'generic-0', and this code has"):
        base_statistics(base)("generic-0", "unet", base.unet, NoraConfig(target_modules=["to_q"]))


def test_the_subject_s_own_statistic_stays_in_the_file(tmp_path):
    run(tmp_path, method_args=["statistic=subject"], max_train_steps=1)
    with safe_open(tmp_path / INNER_WEIGHTS, "pt") as file:
        assert [key for key in file.keys() if key.endswith("awsvd_stats")]  # noqa: SIM118 (no mapping)
        assert file.metadata()["format_version"] == "1"
    nora.load_inner(tmp_path / INNER_WEIGHTS, {"unet": pipeline().unet})


def test_which_base_it_is_does_not_depend_on_adapters_and_tells_a_trained_one():
    base = pipeline()
    before = base_identity(base.unet)
    base.unet.add_adapter(NoraConfig(r=2, target_modules=list(TARGETS["unet"]), outer_init="svd"))
    assert base_identity(base.unet) == before != base_identity(base.unet, "more")
    with torch.no_grad():
        for parameter in base.unet.parameters():
            parameter.add_(1e-3)
    assert base_identity(base.unet) != before


def test_bases_that_predict_something_else_have_statistics_of_their_own(tmp_path, monkeypatch):
    """Two bases of the same weights, one cache; which sampler the user draws with makes no difference."""
    base = pipeline()

    def statistic(cache, scheduler=DDIMScheduler, **changes):
        monkeypatch.setenv("NORA_CACHE_DIR", cache)
        base.scheduler = scheduler.from_config(base.scheduler.config, **changes)
        return base_statistics(base)(LABEL, "unet", base.unet, NoraConfig(target_modules=["to_q"]))

    cache = str(tmp_path)
    noise, velocity = statistic(cache), statistic(cache, prediction_type="v_prediction")
    fresh = statistic("", DPMSolverMultistepScheduler, use_karras_sigmas=True)
    assert all(torch.equal(velocity[name], fresh[name]) for name in fresh)
    assert any(not torch.allclose(noise[name].float(), fresh[name].float(), rtol=0.1) for name in fresh)
    statistic(cache, DPMSolverMultistepScheduler)
    assert len(list(tmp_path.glob("statistic-*"))) == 2


@pytest.mark.parametrize(("ranks", "limit"), [((64, 8), 1.2e6), ((32, 4), 0.35e6)], ids=str)
def test_the_file_of_an_sdxl_unet_is_small(tmp_path, ranks, limit):
    """In fp16, with header, from its 560 real layers' shapes; with statistics it was 1.6 MB more."""
    with torch.device("meta"):
        unet = build_unet("full").requires_grad_(False)
    outer_r, r = ranks
    unet.add_adapter(NoraConfig(r=r, outer_r=outer_r, target_modules=list(TARGETS["unet"]), outer_init="svd"))
    unet.to_empty(device="cpu")  # never touched, so never taken
    for layer in nora_layers(unet, "default").values():
        layer.nora_fingerprint["default"] = torch.ones(FINGERPRINT_SHAPE)
    path = tmp_path / INNER_WEIGHTS
    save_inner(path, {"unet": unet}, dtype=torch.float16, base_statistic=LABEL)
    inner = parse_inner(path)
    assert len(inner.trained) == 560 and path.stat().st_size <= limit
    assert {tuple(one.shape) for one in inner.trained[min(inner.trained)].values()} == {(r, outer_r), (outer_r, r)}


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("{", "layout that can't be read"),
        ("[]", "doesn't fit its layout"),
        ('[{"unet":{}}]', "layout that can't be read"),
    ],
)
def test_a_damaged_layout_is_refused_with_a_sentence(trained, tmp_path, layout, message):
    with safe_open(trained / INNER_WEIGHTS, "pt") as file:
        header = dict(file.metadata()) | {"layout": layout}
    save_file(load_file(trained / INNER_WEIGHTS), tmp_path / INNER_WEIGHTS, header)
    with pytest.raises(ValueError, match=message):
        parse_inner(tmp_path / INNER_WEIGHTS)
