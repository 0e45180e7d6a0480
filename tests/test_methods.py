"""One contract for every method of the registry, on the embedded base: train, save, load, scale, stack, take off."""

import copy
import functools
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny_sdxl import outputs

import methods.__main__
from inference.base import load_pipeline
from inference.load import load_adapter, set_adapter_scale, swap_adapter, unload_adapters
from methods.adapter import Passes, adapted_layers, make_adapter, without_adapters
from methods.base_passes import LABEL, encode_generic_prompts, run_base
from methods.components import COMPONENT_NAMES, FOLDED_WEIGHTS, INNER_WEIGHTS
from methods.files import PEFT_FOLDER, approximate_file, has_lora_file, save_approximation, save_files
from methods.registry import METHODS, resolve
from settings.method import MethodOptions

ROOT = Path(__file__).parent.parent
STEPS = 3
LATENTS = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(1))
ROUNDING = 5e-5  # relative, in float32: the first text encoder has hidden states of some hundreds
PROMPTS = ["a photo of a cat", "a photo of a robot in the jungle"]
# Rates at which three steps leave rounding far behind.
RATES = {"vera": 0.2, "fourierft": 0.3, "adalora": 0.1, "dylora": 0.1, "hra": 0.1, "loha": 0.1, "lokr": 0.1}
OPTIONS = {"dylora": ["save_rank=3"], "oft": ["block_size=16"], "lora-xs": ["rank=8"]}


@functools.cache
def base_outputs() -> dict[str, torch.Tensor]:
    return outputs(base_pipeline())


def base_pipeline():
    pipeline = load_pipeline(ROOT / "assets" / "tiny-sdxl", torch.float32, "cpu")
    for name in COMPONENT_NAMES:
        getattr(pipeline, name).eval().requires_grad_(False)
    return pipeline


def prediction(pipeline) -> torch.Tensor:
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    conditioning = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    return pipeline.unet(LATENTS, torch.tensor([100, 700]), embeds, added_cond_kwargs=conditioning).sample


def passes(pipeline, component: str) -> Passes:
    generic = encode_generic_prompts(pipeline)
    of_base = functools.partial(run_base, component, getattr(pipeline, component), generic, pipeline.scheduler)
    identity = generic.identity if component == "unet" else ""
    return Passes(lambda count: prediction(pipeline), of_base, LABEL, identity)


class Trained:
    """A method after three steps on the UNet and, where it can, both text encoders, with its files."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.pipeline = name, folder, base_pipeline()
        options = resolve(name, OPTIONS.get(name, []), {})
        self.adapter = make_adapter(name, options, seed=0, total_steps=STEPS)
        self.components = COMPONENT_NAMES[:1] if METHODS[name].no_text_encoders else COMPONENT_NAMES
        torch.manual_seed(0)
        for component in self.components:
            model = getattr(self.pipeline, component)
            self.adapter.check_fits(component, model)
            self.adapter.inject(component, model, passes(self.pipeline, component))
        self.started = outputs(self.pipeline)
        self.first = {key: value.detach().clone() for key, value in self.parameters().items()}
        self.train()
        self.live = self.look()
        with ExitStack() as off:
            for component in self.components:
                off.enter_context(without_adapters(getattr(self.pipeline, component)))
            self.off = outputs(self.pipeline)
        self.files = save_files(self.adapter, folder)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        named = ((c, getattr(self.pipeline, c).named_parameters()) for c in self.components)
        return {f"{c}.{name}": p for c, parameters in named for name, p in parameters if p.requires_grad}

    def train(self) -> None:
        rate = RATES.get(self.name, 2e-2)
        groups = [
            {"params": [p], "lr": rate * self.adapter.rate(name), "weight_decay": 1e-2 * self.adapter.decays(name)}
            for name, p in self.parameters().items()
        ]
        optimizer = torch.optim.AdamW(groups)
        target = torch.randn(LATENTS.shape, generator=torch.Generator().manual_seed(2))
        for step in range(STEPS):
            self.adapter.before_step(step)
            loss = (prediction(self.pipeline) - target).square().mean()
            penalty = self.adapter.penalty()
            (loss if penalty is None else loss + penalty).backward()
            self.adapter.before_update()
            optimizer.step()
            self.adapter.after_update(step + 1)
            optimizer.zero_grad()

    def look(self) -> dict[str, torch.Tensor]:
        """Outputs of the model in memory; of DyLoRA with the components that its files hold."""
        if self.name == "dylora":
            self.adapter.use(self.adapter.args["save_rank"])
        try:
            return outputs(self.pipeline)
        finally:
            if self.name == "dylora":
                self.adapter.use(None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return functools.cache(lambda name: Trained(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(params=METHODS)
def run(request, trained) -> Trained:
    return trained(request.param)


@pytest.fixture(scope="module")
def other(trained) -> Path:
    """A LoRA to stack and swap with."""
    return trained("lora").folder / FOLDED_WEIGHTS


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of an output."""
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in one)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def kinds(run: Trained) -> list[Path]:
    """The run's folder, and each of its files or folders alone."""
    parts = [run.folder / name for name in (FOLDED_WEIGHTS, INNER_WEIGHTS) if name in run.files]
    return [run.folder, *parts, run.folder / PEFT_FOLDER]


# --- trained ----------------------------------------------------------------------------------------------------------


def test_it_starts_at_the_base_and_leaves_it(run):
    assert distance(run.started, base_outputs()) < 3e-6
    changed = {name: value for name, value in run.parameters().items() if not torch.equal(value, run.first[name])}
    assert {name.partition(".")[0] for name in changed} == set(run.components)
    assert distance(run.live, base_outputs()) > 3e-3
    if len(run.components) > 1:
        for name in ("text_encoder", "prompt_embeds", "pooled"):
            assert not torch.equal(run.live[name], base_outputs()[name]), name


def test_only_the_method_s_own_parameters_learn(run):
    base = base_pipeline()
    for component in run.components:
        frozen = dict(getattr(base, component).named_parameters())
        for name, parameter in getattr(run.pipeline, component).named_parameters():
            if (own := frozen.get(name.replace(".base_layer.", "."))) is not None:
                assert not parameter.requires_grad and torch.equal(parameter, own), name


def test_without_it_the_model_is_the_base_to_the_bit(run):
    assert same(run.off, base_outputs())


def test_what_learns_is_the_same_after_a_look_at_the_base(run):
    before = set(run.parameters())
    with without_adapters(run.pipeline.unet):
        pass
    assert set(run.parameters()) == before == set(run.first)


def test_weight_decay_pulls_towards_the_base_or_not_at_all(run):
    parameters = run.parameters()
    kept = {name: value.detach().clone() for name, value in parameters.items()}
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(torch.zeros_like(value) if run.adapter.decays(name) else run.first[name])
        decayed = outputs(run.pipeline)
        for name, value in parameters.items():
            value.copy_(kept[name])
    assert distance(decayed, base_outputs()) < 3e-6


def test_text_encoders_are_refused_with_a_reason_where_it_can_t(run):
    assert (len(run.components) == 1) == bool(METHODS[run.name].no_text_encoders)


# --- read back --------------------------------------------------------------------------------------------------------


def test_every_file_gives_the_model_in_memory_on_a_fresh_base(run):
    for path in kinds(run):
        pipeline = base_pipeline()
        load_adapter(pipeline, path)
        error = distance(outputs(pipeline), run.live)
        assert error < ROUNDING and error < distance(run.live, base_outputs()) / 300, (path, error)


def test_peft_itself_reads_the_folder(run):
    pipeline = base_pipeline()
    for component in run.components:
        model = getattr(pipeline, component)
        wrapped = PeftModel.from_pretrained(model, run.folder / PEFT_FOLDER / component)
        assert wrapped.get_base_model() is model
    assert distance(outputs(pipeline), run.live) < ROUNDING


def test_stock_diffusers_reads_the_lora_file(run):
    if not has_lora_file(run.adapter):
        assert FOLDED_WEIGHTS not in run.files
        return
    pipeline = base_pipeline()
    pipeline.load_lora_weights(run.folder, weight_name=FOLDED_WEIGHTS)
    assert distance(outputs(pipeline), run.live) < ROUNDING


# --- scaled, stacked, swapped, merged, off ----------------------------------------------------------------------------


def layer_inputs(layers) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = {name: layer.get_base_layer().in_features for name, layer in layers.items()}
    return {name: torch.randn(5, size, generator=generator) for name, size in sizes.items()}


def layer_deltas(pipeline, layers, inputs) -> dict[str, torch.Tensor]:
    """What each adapted layer adds to its base layer's output."""
    with torch.no_grad():
        return {name: layer(inputs[name]) - layer.get_base_layer()(inputs[name]) for name, layer in layers.items()}


def test_half_the_scale_is_half_the_update(run):
    pipeline = base_pipeline()
    name = load_adapter(pipeline, run.folder)
    layers = adapted_layers(pipeline.unet)
    generator = torch.Generator().manual_seed(3)
    inputs = {
        key: torch.randn(5, layer.get_base_layer().in_features, generator=generator) for key, layer in layers.items()
    }
    whole = layer_deltas(pipeline, layers, inputs)
    set_adapter_scale(pipeline, name, 0.5)
    half = layer_deltas(pipeline, layers, inputs)
    for key in layers:
        torch.testing.assert_close(half[key], whole[key] / 2, atol=2e-6, rtol=1e-4)


def test_scale_0_and_taking_it_off_are_the_base_to_the_bit(run):
    pipeline = base_pipeline()
    name = load_adapter(pipeline, run.folder)
    set_adapter_scale(pipeline, name, 0.0)
    assert same(outputs(pipeline), base_outputs())
    set_adapter_scale(pipeline, name, 1.0)
    assert distance(outputs(pipeline), run.live) < ROUNDING
    unload_adapters(pipeline, name)
    assert same(outputs(pipeline), base_outputs())
    fresh = base_pipeline()
    for component in COMPONENT_NAMES:
        mine, theirs = (getattr(one, component).state_dict() for one in (pipeline, fresh))
        assert list(mine) == list(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_it_stacks_with_another(run, other):
    pipeline = base_pipeline()
    load_adapter(pipeline, other, name="other")
    layers = adapted_layers(pipeline.unet)
    generator = torch.Generator().manual_seed(3)
    inputs = {
        key: torch.randn(5, layer.get_base_layer().in_features, generator=generator) for key, layer in layers.items()
    }
    first = layer_deltas(pipeline, layers, inputs)
    name = load_adapter(pipeline, run.folder)
    both = layer_deltas(pipeline, adapted_layers(pipeline.unet), inputs)
    unload_adapters(pipeline, "other")
    second = layer_deltas(pipeline, adapted_layers(pipeline.unet), inputs)
    for key in layers:
        torch.testing.assert_close(both[key], first[key] + second[key], atol=1e-5, rtol=1e-4)
    assert distance(outputs(pipeline), run.live) < ROUNDING
    unload_adapters(pipeline, name)
    assert same(outputs(pipeline), base_outputs())


def test_it_takes_another_s_place(run, other):
    pipeline = base_pipeline()
    load_adapter(pipeline, other, name="one")
    before = outputs(pipeline)
    swap_adapter(pipeline, run.folder, "one")
    assert distance(outputs(pipeline), run.live) < ROUNDING
    swap_adapter(pipeline, other, "one")
    assert distance(outputs(pipeline), before) < 1e-6
    unload_adapters(pipeline)
    assert same(outputs(pipeline), base_outputs())


def test_it_merges(run):
    pipeline = base_pipeline()
    load_adapter(pipeline, run.folder)
    pipeline.fuse_lora(components=list(run.components))
    merged = outputs(pipeline)
    assert all(layer.merged for layer in adapted_layers(pipeline.unet).values())
    assert distance(merged, run.live) < 1e-4


# --- a nearest LoRA, on request ---------------------------------------------------------------------------------------


def test_the_nearest_lora_is_named_approximate_with_its_error(run, tmp_path):
    name, error = save_approximation(run.adapter, 4, tmp_path)
    assert name == approximate_file(4) and (tmp_path / name).is_file()
    missed = whole = 0.0
    pipeline = base_pipeline()
    load_adapter(pipeline, tmp_path / name, name="near")
    for component in run.components:
        layers = adapted_layers(getattr(pipeline, component))
        for path, update in run.adapter.updates(component):
            factors = layers[path]
            near = factors.scaling["near"] * factors.lora_B["near"].weight @ factors.lora_A["near"].weight
            missed += float((near - update.weight()).double().square().sum())
            whole += float(update.weight().double().square().sum())
    assert error == pytest.approx((missed / whole) ** 0.5, abs=1e-5)
    exact = METHODS[run.name].low_rank and all(u.rank <= 4 for _, u in run.adapter.updates("unet"))
    assert error < 1e-5 if exact else error > 0


# --- the registry -----------------------------------------------------------------------------------------------------


def test_a_method_of_peft_is_a_line():
    """Its options are fields of its configuration, so that none can be misspelled."""
    for name, method in METHODS.items():
        adapter = make_adapter(name, resolve(name, [], {}))
        config = adapter.config("unet")
        for option in method.options:
            assert option.field is None or hasattr(config, option.field), (name, option.name)
        assert isinstance(copy.copy(config), type(config)) and set(config.target_modules)


def test_flags_and_options_of_one_name_take_the_same_values():
    hints = get_type_hints(MethodOptions)
    options = {option.flag: option for method in METHODS.values() for option in method.options if option.flag}
    checked = set()
    for flag, option in options.items():
        if option.choices:
            literals = [one for one in get_args(hints[flag]) if get_origin(one) is Literal]
            assert [get_args(one) for one in literals] == [tuple(option.choices)], flag
            checked.add(flag)
    assert {"outer_init", "inner_init", "sigma_side"} <= checked


def test_the_published_names_are_there():
    names = "nora lora dora rslora pissa olora vera adalora lokr loha randlora oft hra fourierft mica lora-fa loraplus"
    assert set(f"{names} moslora dylora".split()) <= set(METHODS)
    assert LoraConfig is type(make_adapter("mica", resolve("mica", [], {})).config("unet"))


def test_the_table_in_the_docs_is_the_code_s():
    assert methods.__main__.page() == (ROOT / "docs" / "methods.md").read_text()
