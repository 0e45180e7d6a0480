"""--targets and --rank_pattern: which layers are adapted, and at which rank, for every method."""

import functools
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from test_trainer import run
from tiny_sdxl import outputs, saved_base
from torch import nn

from benchmarks.sdxl_shape import build_sdxl_shape
from inference.base import load_pipeline
from inference.load import load_adapter
from methods.adapter import Passes, Places, make_adapter, target_layers
from methods.base_passes import encode_generic_prompts, run_base
from methods.components import COMPONENT_NAMES, FOLDED_WEIGHTS
from methods.files import save_files
from methods.registry import METHODS, resolve
from settings.method import MethodOptions

OPTIONS = {
    "dylora": ["rank=2"],
    "oft": ["block_size=8"],
    "vera": ["rank=4"],
    "adalora": ["init_rank=4", "target_rank=2"],
    "fourierft": ["n_frequency=20"],
    "hra": ["rank=2"],
    "nola": ["rank=2", "coefficients=20"],
    "nola-nora": ["rank=2", "coefficients=20"],
}


def base_pipeline():
    pipeline = load_pipeline(str(saved_base()), torch.float32, "cpu")
    for name in COMPONENT_NAMES:
        getattr(pipeline, name).eval().requires_grad_(False)
    return pipeline


@functools.cache
def sdxl():
    with init_empty_weights():
        return build_sdxl_shape("full")


@pytest.mark.parametrize(
    ("where", "counts"),
    [("attention", (560, 48, 128)), ("attention-mlp", (700, 72, 192)), ("all-linear", (743, 72, 193))],
)
def test_sets_on_sdxl(where, counts):
    """Of its real layers: 70 blocks of 8 attention layers; all-linear is every nn.Linear that there is."""
    for component, count in zip(COMPONENT_NAMES, counts):
        model = getattr(sdxl(), component)
        names = target_layers(component, model, Places(where))
        assert len(names) == count and all(isinstance(layer, nn.Linear) for layer in names.values())
        if where == "all-linear":
            assert set(names) == {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


@pytest.mark.parametrize("where", ["attention-mlp", "all-linear", r".*(attn2\.to_v|mlp\.fc1|ff\.net\.2)"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_adapts_them_and_its_files_read_back(method, where, tmp_path):
    if where != "attention-mlp" and method not in ("nora", "lora", "oft"):
        pytest.skip("one method of each kind of file")
    pipeline, places = base_pipeline(), Places(where)
    adapter = make_adapter(method, resolve(method, OPTIONS.get(method, ["rank=2"]), {}), total_steps=2, places=places)
    components = COMPONENT_NAMES[:1] if METHODS[method].no_text_encoders else COMPONENT_NAMES
    torch.manual_seed(0)
    for component in components:
        model = getattr(pipeline, component)
        expected = set(target_layers(component, model, places))
        adapter.check_fits(component, model)
        base = functools.partial(run_base, component, model, encode_generic_prompts(pipeline), pipeline.scheduler)
        adapter.inject(component, model, Passes(lambda count, base=base: base(), base, "generic-1", "x"))
        assert {layer for layer, _ in adapter.updates(component)} == expected
    adapter.before_step(0)
    with torch.no_grad():
        for component in components:
            for parameter in getattr(pipeline, component).parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape))
    if method == "dylora":
        adapter.use(None)
    live = outputs(pipeline)
    files = save_files(adapter, tmp_path, peft=True)
    assert files
    fresh = base_pipeline()
    load_adapter(fresh, tmp_path)
    found = outputs(fresh)
    for name in live:
        assert torch.allclose(found[name], live[name], rtol=1e-3, atol=1e-4 * float(live[name].abs().max())), name


def test_ranks_of_some_layers(tmp_path):
    """The file has them, NoRA's outer rank follows, and the scale stays 1, for diffusers' own loading too."""
    for method in ("lora", "nora"):
        folder = tmp_path / method
        options = {
            "method": method,
            "rank": 2,
            "max_train_steps": 2,
            "targets": "attention-mlp",
            "output_kohya_dtype": "fp32",
        }
        run(folder, rank_pattern=["attn2=1", r"ff\.net=3"], **options)
        for key, tensor in load_file(folder / FOLDED_WEIGHTS).items():
            if ".lora_A." in key:
                assert tensor.shape[0] == (1 if "attn2" in key else 3 if "ff.net" in key else 2), key
        load_adapter(ours := base_pipeline(), folder)
        for name in (FOLDED_WEIGHTS, f"{method}.safetensors"):
            stock = base_pipeline()
            stock.load_lora_weights(str(folder), weight_name=name)
            live = outputs(ours)
            for component, found in outputs(stock).items():
                assert torch.allclose(found, live[component], rtol=1e-4, atol=1e-5), (name, component)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "attn"}, "--targets attn fits no layer of unet: it is attention, attention-mlp, all-linear or a"),
        ({"targets": ".*to_vv", "method": "nora"}, r"--targets .*to_vv fits no layer of unet: .* such as .*to_v"),
        ({"targets": r".*attn1"}, "which is no linear layer: let it end as the layers do, such as"),
        ({"targets": "to_(q"}, r"--targets to_\(q is no regular expression"),
        ({"rank_pattern": ["attn2"]}, "--rank_pattern attn2 must look like down_blocks.2=8, with a rank of at least 1"),
        ({"rank_pattern": ["attn2=0"]}, "with a rank of at least 1"),
        ({"rank_pattern": ["a=1", "a=2"]}, "--rank_pattern a is given twice"),
        ({"rank_pattern": ["attn2=999"]}, "--rank 999 exceeds min"),
        ({"rank_pattern": ["(=2"]}, r"--rank_pattern \( is no regular expression"),
        (
            {"rank_pattern": ["to_q=1", "attn3=2"]},
            "--rank_pattern attn3 fits no adapted layer: their paths are such as",
        ),
        ({"method": "vera", "rank_pattern": ["attn2=2"]}, "--method vera has one rank for all layers"),
    ],
)
def test_what_fits_nothing_is_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **{"method": "lora", "rank": 2, **options})
    assert not (tmp_path / "run").exists() or not list(Path(tmp_path / "run").iterdir())


def test_flags_about_all_methods_are_no_options_of_one():
    options = MethodOptions(method="lora", targets="all-linear", rank_pattern=["mid_block=2"])
    assert options.settled().targets == "all-linear" and options.ranks() == {"mid_block": 2}
