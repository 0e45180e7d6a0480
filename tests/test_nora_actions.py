"""What a PEFT user may do with a NoRA model besides training, saving and loading it: right numbers, or one sentence."""

import copy
import inspect
import json
import math
from pathlib import Path

import accelerate
import pytest
import torch
from nora_models import (
    MLP,
    adapt,
    assert_close,
    build_clip_text,
    build_gpt2,
    build_llama,
    config_for,
    seeded,
    tokens,
)
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

import nora.model
from nora import NoraConfig, NoraLinear, fold_nora, load_inner, preprocess_nora, save_inner


def no_decomposition(*_, **__):
    raise AssertionError("a weight is decomposed")


def calibrated(base, *, seed, **kwargs):
    """An adapter of the base on inputs of its own, so with another statistic and other outer factors."""
    inputs = torch.randn(7, 16, generator=torch.Generator().manual_seed(seed)).exp()
    model, config = copy.deepcopy(base), config_for(["lin0", "lin1"], **kwargs)
    torch.manual_seed(seed)
    preprocess_nora(model, config, lambda: model(inputs))
    return get_peft_model(model, config).eval()


@pytest.fixture
def base():
    torch.manual_seed(0)
    return MLP().eval()


@pytest.fixture
def pair(base):
    """A live model and another adapter of the same base."""
    return calibrated(base, seed=1), calibrated(base, seed=2)


X = seeded(5, 16)


# ---------------------------------------------------------------------- loading onto a live model


def load_with_accelerate(live, other, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(other)
    accelerator.save_state(tmp_path)
    accelerator._models.clear()
    accelerator.prepare(live)
    accelerator.load_state(tmp_path)


LOADS = {
    "load_state_dict": lambda live, other, _: live.load_state_dict(other.state_dict()),
    "assign": lambda live, other, _: live.load_state_dict(copy.deepcopy(other.state_dict()), assign=True),
    "around": lambda live, other, _: nn.ModuleDict({"x": live}).load_state_dict(
        nn.ModuleDict({"x": other}).state_dict()
    ),
    "set_peft_model_state_dict": lambda live, other, _: set_peft_model_state_dict(
        live, get_peft_model_state_dict(other)
    ),
    "set_model_state_dict": lambda live, other, _: set_model_state_dict(
        live, other.state_dict(), options=StateDictOptions(full_state_dict=True)
    ),
    "load_state": load_with_accelerate,
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_loading_a_state_onto_a_live_model_gives_that_states_outputs(pair, load, tmp_path):
    live, other = pair
    assert (live(X) - other(X)).abs().max() > 1e-2
    load(live, other, tmp_path)
    assert torch.equal(live(X), other(X))
    live.merge_adapter()
    assert_close(live(X), other(X))


@pytest.mark.parametrize("outer_init", ["awsvd", "svd", "random"])
def test_loading_a_whole_state_of_another_base_gives_that_models_outputs(base, outer_init):
    live = calibrated(base, seed=1, outer_init=outer_init)
    torch.manual_seed(9)
    other = calibrated(MLP().eval(), seed=2, outer_init=outer_init)
    live.load_state_dict(other.state_dict())
    assert torch.equal(live(X), other(X))


def test_loading_the_same_state_again_decomposes_nothing(pair, monkeypatch):
    live, _ = pair
    before = live(X)
    monkeypatch.setattr("nora.basis.outer_factors", no_decomposition)
    live.load_state_dict(live.state_dict())
    assert torch.equal(live(X), before)


def test_loading_onto_a_copy_leaves_the_original_alone(pair):
    live, other = pair
    before, twin = live(X), copy.deepcopy(live)
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin(X), other(X)) and torch.equal(live(X), before)


def test_loading_another_base_under_a_live_adapter_is_refused_and_a_right_load_mends_it(base, pair):
    live, other = pair
    states = live.state_dict(), copy.deepcopy(base)
    states[1].lin1.weight.data.neg_()
    weights = {f"base_model.model.lin1.base_layer.{k}": v for k, v in states[1].lin1.state_dict().items()}
    good = {name: tensor.clone() for name, tensor in states[0].items()}
    with pytest.raises(ValueError, match="lin1: the base weight differs"):
        live.load_state_dict(weights, strict=False)
    with pytest.raises(ValueError, match="no outer factors at lin1.*load_adapter"):
        live(X)
    live.load_state_dict(good)
    assert torch.isfinite(live(X)).all()


def test_loading_an_adapter_of_another_base_onto_a_live_model_is_refused(base, pair):
    live, _ = pair
    before = live(X)
    changed = copy.deepcopy(base)
    changed.lin0.weight.data += 0.1 * seeded(32, 16)
    foreign = get_peft_model_state_dict(calibrated(changed, seed=3))
    with pytest.raises(ValueError, match="lin0: the base weight differs"):
        set_peft_model_state_dict(live, foreign)
    assert torch.equal(live(X), before)  # PEFT's own way checks before it changes anything
    named = {key.replace(".weight", ".default.weight"): value for key, value in foreign.items() if "inner" in key}
    named |= {f"{key}.default": value for key, value in foreign.items() if "inner" not in key}
    with pytest.raises(ValueError, match="lin0: the base weight differs"):
        live.load_state_dict(named, strict=False)
    with pytest.raises(ValueError, match="no outer factors at lin0"):
        live(X)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_completes_an_adapter_with_a_saved_config(base, pair, assign, monkeypatch):
    _, other = pair
    waiting = get_peft_model(copy.deepcopy(base), config_for(["lin0", "lin1"], saved=True)).eval()
    waiting.load_state_dict(base.state_dict(), strict=False)  # has nothing to do with it
    with pytest.raises(ValueError, match="'default' has no outer factors at lin0.*set_peft_model_state_dict"):
        waiting(X)
    waiting.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    monkeypatch.setattr("nora.basis.outer_factors", no_decomposition)
    assert torch.equal(waiting(X), other(X))


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("build", [build_llama, build_clip_text, build_gpt2])
def test_transformers_load_adapter_decomposes_while_it_loads(build, is_trainable, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, targets, run = build()
    model.eval().save_pretrained(tmp_path / "base")
    config = config_for(targets)
    preprocess_nora(model, config, lambda: run(model))
    model.add_adapter(config)
    model.save_pretrained(tmp_path / "adapter")
    fresh = type(model).from_pretrained(tmp_path / "base")
    fresh.load_adapter(str(tmp_path / "adapter"), is_trainable=is_trainable)
    monkeypatch.setattr("nora.basis.outer_factors", no_decomposition)
    assert_close(run(fresh.eval()), run(model))
    assert all(layer.nora_inner_A["default"].weight.requires_grad is is_trainable for layer in nora_layers_of(fresh))


def nora_layers_of(model):
    return [module for module in model.modules() if isinstance(module, NoraLinear)]


def test_transformers_loads_the_adapters_folder_by_itself(tmp_path):
    torch.manual_seed(0)
    model, targets, run = build_llama()
    model.eval().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    adapted, _ = adapt((model, targets, run))
    adapted.save_pretrained(tmp_path / "adapter")
    assert_close(run(LlamaForCausalLM.from_pretrained(tmp_path / "adapter").eval()), run(adapted))


# ---------------------------------------------------------------------- batches that mix adapters


def two_adapters(model, targets):
    """The model with adapters "one" and "two", whose outputs differ."""
    torch.manual_seed(1)
    settings = {"outer_init": "svd", "inner_std": 0.8}
    adapted = get_peft_model(model, config_for(targets, **settings), "one")
    adapted.add_adapter("two", config_for(targets, **settings))
    return adapted.eval()


def small_t5():
    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("given", [{"num_beams": 4}, {"num_beams": 1}], ids=["beams", "greedy"])
@pytest.mark.parametrize(
    ("build", "targets"),
    [(lambda: build_llama()[0].eval(), ["q_proj", "v_proj", "down_proj"]), (small_t5, ["q", "v", "wo"])],
    ids=["llama", "t5"],
)
def test_generate_with_adapter_names_gives_each_row_its_adapter(build, targets, given):
    torch.manual_seed(0)
    model = two_adapters(build(), targets)
    ids = torch.randint(1, 98, (3, 6), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **given}
    names = ["two", "__base__", "one"]
    found = model.generate(input_ids=ids, adapter_names=names, **options)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(input_ids=ids[row : row + 1], **options)
        else:
            model.set_adapter(name)
            expected = model.generate(input_ids=ids[row : row + 1], **options)
        assert found[row].tolist() == expected[0].tolist()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_beams_by_generation_config_count_too():
    torch.manual_seed(0)
    model = two_adapters(build_llama()[0], ["q_proj", "v_proj"])
    options = {"max_new_tokens": 4, "pad_token_id": 0}
    by_config = copy.deepcopy(model.generation_config)
    by_config.update(num_beams=3, **options)
    names = ["one", "two"]
    one = model.generate(input_ids=tokens(), adapter_names=names, generation_config=by_config)
    assert torch.equal(one, model.generate(input_ids=tokens(), adapter_names=names, num_beams=3, **options))


def test_modules_that_see_the_batch_flattened_take_no_adapter_names():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    }
    opt = OPTForCausalLM(OPTConfig(vocab_size=99, max_position_embeddings=32, **sizes)).eval()
    attention = two_adapters(copy.deepcopy(opt), ["q_proj", "v_proj"])
    names = ["one", "two"]
    found = attention(tokens(), adapter_names=names).logits
    for row, name in enumerate(names):
        attention.set_adapter(name)
        assert_close(found[row], attention(tokens()).logits[row])
    flattened = two_adapters(opt, ["fc1"])
    message = "number of inputs, but got 2 and 14 respectively: .*model.decoder.layers.0.fc1 out of target_modules"
    with pytest.raises(ValueError, match=message):
        flattened(tokens(), adapter_names=names)


def test_too_few_or_too_many_adapter_names_are_refused(base):
    model = two_adapters(base, ["lin0", "lin1"])
    for names in (["one"] * 4, ["one"] * 6):
        with pytest.raises(ValueError, match=f"number of inputs, but got {len(names)} and 5 respectively"):
            model(X, adapter_names=names)
    with pytest.raises(ValueError, match="adapter_names='one' must be a list"):
        model(X, adapter_names="one")
    with pytest.raises(ValueError, match="got 2 and 6 respectively"):
        llama = two_adapters(build_llama()[0], ["q_proj"])
        options = {"do_sample": True, "max_new_tokens": 2, "pad_token_id": 0}
        llama.generate(input_ids=tokens(), adapter_names=["one", "two"], num_return_sequences=3, **options)


def test_adapter_names_on_merged_weights_are_refused_and_nothing_is_unmerged(base):
    model = two_adapters(base, ["lin0", "lin1"])
    model.set_adapter("one")
    model.merge_adapter()
    merged = model(X)
    with pytest.raises(ValueError, match="when there are merged adapters, please call `unmerge_adapter` first"):
        model(X, adapter_names=["two"] * 5)
    assert torch.equal(model(X), merged) and model.base_model.model.lin0.merged


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merging_keeps_the_bases_own_precision(base, dtype):
    base.to(dtype)
    model = get_peft_model(base, config_for(["lin0", "lin1"], outer_init="svd", nora_alpha=3.0))
    layer = model.base_model.model.lin0
    weight = layer.base_layer.weight.detach().clone()
    A, B = (factor.double() for factor in layer.outer("default"))
    inner_A, inner_B = (side["default"].weight.detach().double() for side in (layer.nora_inner_A, layer.nora_inner_B))
    delta = 1.5 * B @ inner_B @ inner_A @ A
    exact = weight.double() + delta
    model.merge_adapter(safe_merge=True)
    size = torch.finfo(dtype).eps * exact.abs().max()
    assert layer.base_layer.weight.dtype == dtype
    assert (layer.base_layer.weight.double() - exact).abs().max() <= 2 * size
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, weight)
    merged = model.merge_and_unload()
    assert (merged.lin0.weight.double() - exact).abs().max() <= 2 * size


def test_float64_sums_of_adapters_are_exact_to_float64(base):
    base.double()
    model = two_adapters(base, ["lin0", "lin1"])
    layer = model.base_model.model.lin0
    deltas = layer.get_delta_weight("one"), layer.get_delta_weight("two")
    model.add_weighted_adapter(["one", "two"], [0.3, -0.7], "sum")
    assert_close(layer.get_delta_weight("sum"), 0.3 * deltas[0] - 0.7 * deltas[1], atol=1e-13)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "low", combination_type="svd", svd_rank=4)
    assert_close(layer.get_delta_weight("low"), deltas[0] + deltas[1], atol=1e-12)


# ---------------------------------------------------------------------- random factors and module names


def random_pair(model, config=None):
    config = config or config_for(["lin0"], outer_init="random")
    adapted = get_peft_model(model, config)
    (layer,) = nora_layers_of(adapted)
    return layer.outer("default").A


class Trunk(nn.Module):
    """A model of the user's own whose attributes have the names that wrappers use."""

    def __init__(self, inner):
        super().__init__()
        self.module = inner


def test_random_factors_depend_on_the_modules_own_name_only(base):
    plain = random_pair(copy.deepcopy(base))
    wrapped = {
        "torch.compile": torch.compile(copy.deepcopy(base)),
        "DataParallel": nn.DataParallel(copy.deepcopy(base)),
        "PeftModel": get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["head"])),
        "both": torch.compile(nn.DataParallel(copy.deepcopy(base))),
    }
    for name, model in wrapped.items():
        assert torch.equal(random_pair(model), plain), name
    assert not torch.equal(random_pair(Trunk(copy.deepcopy(base))), plain)  # its own name is module.lin0
    second = get_peft_model(copy.deepcopy(base), config_for(["lin0"], outer_init="random"))
    second.add_adapter("second", config_for(["lin0"], outer_init="random"))
    assert torch.equal(second.base_model.model.lin0.outer("second").A, plain)
    injected = inject_adapter_in_model(config_for(["lin0"], outer_init="random"), copy.deepcopy(base))
    assert torch.equal(injected.lin0.outer("default").A, plain)


def test_random_adapters_move_between_wrapped_and_plain_models(base, tmp_path):
    model = inject_adapter_in_model(config_for(["lin0"], outer_init="random"), copy.deepcopy(base))
    save_inner(tmp_path / "inner.safetensors", {"mlp": model})
    compiled = torch.compile(copy.deepcopy(base))
    load_inner(tmp_path / "inner.safetensors", {"mlp": compiled._orig_mod})
    assert torch.equal(compiled._orig_mod(X), model(X))


def test_random_adapters_that_were_saved_under_a_wrappers_name_still_load(base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(nora.model, "own_name", lambda _, name: name)  # as it was
        old = get_peft_model(nn.DataParallel(copy.deepcopy(base)), config_for(["lin0"], outer_init="random")).eval()
        old.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nn.DataParallel(copy.deepcopy(base)), tmp_path).eval()
    assert torch.equal(loaded(X), old(X))


# ---------------------------------------------------------------------- configs


def test_reading_a_config_changes_nothing(base):
    config = config_for(["lin0"], outer_init="svd")
    values = config.to_dict()
    assert not values["saved"] and not config.saved
    again = NoraConfig(**values)
    assert torch.isfinite(get_peft_model(copy.deepcopy(base), again)(X)).all()
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    assert torch.isfinite(
        get_peft_model(copy.deepcopy(base), NoraConfig(**model.peft_config["default"].to_dict()))(X)
    ).all()


def test_saving_marks_the_file_and_not_the_config(base, tmp_path):
    model = calibrated(base, seed=1)
    model.save_pretrained(tmp_path)
    assert not model.peft_config["default"].saved
    assert json.loads((tmp_path / "adapter_config.json").read_text())["saved"] is True
    assert PeftConfig.from_pretrained(tmp_path).saved
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(X), model(X))


def test_a_saved_config_without_outer_init_keeps_its_meaning():
    assert NoraConfig(saved=True).outer_init == "awsvd"


def test_a_bare_config_works_and_says_which_factors_it_took(base, tmp_path):
    config = NoraConfig(target_modules=["lin0", "lin1"], init_weights=False)
    with pytest.warns(UserWarning, match="outer_init is None and the model was not calibrated") as said:
        model = get_peft_model(copy.deepcopy(base), config).eval()
    assert len([w for w in said if "outer_init" in str(w.message)]) == 1
    explicit = get_peft_model(copy.deepcopy(base), config_for(["lin0"], outer_init="svd", r=8))
    assert torch.equal(
        model.base_model.model.lin0.outer("default").A, explicit.base_model.model.lin0.outer("default").A
    )
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["outer_init"] == "svd"
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(X), model(X))


def test_a_bare_config_takes_the_statistics_that_are_there(base, tmp_path, recwarn):
    model = calibrated(base, seed=1)  # its config leaves outer_init out
    assert model.peft_config["default"].outer_init == "awsvd"
    assert not [w for w in recwarn if "outer_init" in str(w.message)]
    weight = get_peft_model(copy.deepcopy(base), NoraConfig(r=2, target_modules=["lin0"], awsvd_stat="weight"))
    assert weight.peft_config["default"].outer_init == "awsvd"
    assert not [w for w in recwarn if "outer_init" in str(w.message)]


def test_explicit_awsvd_without_statistics_is_refused(base):
    with pytest.raises(ValueError, match="lin0 has none: call preprocess_nora"):
        get_peft_model(base, config_for(["lin0"], outer_init="awsvd"))


def test_half_calibrated_modules_are_refused(base):
    preprocess_nora(base, config_for(["lin0"]), lambda: base(X))
    config = config_for(["lin0", "lin1"])
    with pytest.raises(ValueError, match="1 of 2 targeted modules were not calibrated, the first lin1"):
        get_peft_model(base, config)
    preprocess_nora(base, config, lambda: base(X))
    assert get_peft_model(base, config).peft_config["default"].outer_init == "awsvd"


@pytest.mark.filterwarnings("ignore:outer_init is None")
def test_calibrating_with_a_config_that_became_svd_is_refused(base):
    config = config_for(["lin0"])
    with pytest.raises(ValueError, match="outer_r=99 exceeds"):
        get_peft_model(copy.deepcopy(base), NoraConfig(target_modules=["lin0"], outer_r=99))
    get_peft_model(copy.deepcopy(base), config)
    with pytest.raises(ValueError, match='outer_init was None and became "svd".*make a new config'):
        preprocess_nora(base, config, lambda: base(X))


# ---------------------------------------------------------------------- bases that NoRA can't take as they are


class PackedTensor(torch.Tensor):
    """As torchao's: a tensor that says bfloat16 and implements next to no operation but a linear layer's."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=torch.bfloat16)

    def __init__(self, weight):
        self.weight = weight

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            return nn.functional.linear(args[0].float(), args[1].weight, *args[2:]).to(args[0])
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].weight)
        raise NotImplementedError(f"PackedTensor dispatch: {func} is not implemented")


@pytest.mark.parametrize("outer_init", ["awsvd", "svd", None])
def test_adding_to_a_quantised_layer_is_refused(base, outer_init):
    base.lin0.weight = nn.Parameter(PackedTensor(base.lin0.weight.detach()), requires_grad=False)
    with pytest.raises(
        ValueError, match="lin0 has a weight that is no plain matrix .PackedTensor.*quantised.*load the base without"
    ):
        get_peft_model(base, config_for(["lin0"], outer_init=outer_init))
    assert type(base.lin0) is nn.Linear


def test_adding_to_a_torchao_layer_is_refused(base):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="lin0 has a weight that is no plain matrix"):
        get_peft_model(base, config_for(["lin0"], outer_init="svd"))


@pytest.mark.parametrize("name", ["lin0", "lin1"], ids=["input", "output"])
def test_merging_into_a_base_that_was_quantised_afterwards_is_refused(base, name):
    base.lin1.bias = None
    model = get_peft_model(base, config_for([name], outer_init="svd"))
    layer = getattr(model.base_model.model, name)
    delta = layer.get_delta_weight("default")
    weight = layer.base_layer.weight.detach()
    layer.base_layer.weight = nn.Parameter(PackedTensor(weight), requires_grad=False)
    with pytest.raises(ValueError, match=f"{name} has a weight that is no plain matrix .PackedTensor"):
        layer.merge()
    found = layer.get_delta_weight("default").float()  # of what the quantised layer computes
    assert_close(found, delta, atol=1e-2)


def test_adding_to_an_offloaded_base_is_refused(base):
    accelerate.cpu_offload(base, execution_device="cpu")
    for config in (config_for(["lin0"], outer_init="svd"), config_for(["lin0"], outer_init="svd", saved=True)):
        with pytest.raises(ValueError, match="lin0 is offloaded by accelerate.*load the base without offloading"):
            get_peft_model(base, config)
    with pytest.raises(ValueError, match="lin0 is offloaded by accelerate"):
        preprocess_nora(base, config_for(["lin0"]), lambda: base(X))


def test_an_adapted_base_may_be_offloaded_afterwards(pair):
    live, other = pair
    before, state = live(X), copy.deepcopy(get_peft_model_state_dict(other))
    accelerate.cpu_offload(live.base_model.model, execution_device="cpu")
    assert_close(live(X), before)
    for action in (
        lambda: live.base_model.model.lin0.merge(),
        lambda: live.base_model.model.lin0.get_delta_weight("default"),
        lambda: set_peft_model_state_dict(live, state),
    ):
        with pytest.raises(ValueError, match="lin0 has no weight in memory.*accelerate"):
            action()


def test_adding_or_loading_on_merged_weights_says_that_they_are_merged(base, pair, tmp_path):
    live, other = pair
    other.save_pretrained(tmp_path)
    inner = inject_adapter_in_model(config_for(["lin0"], outer_init="svd"), copy.deepcopy(base))
    save_inner(tmp_path / "inner.safetensors", {"mlp": inner})
    live.merge_adapter()
    merged, state = live(X), other.state_dict()
    for action in (
        lambda: live.add_adapter("third", config_for(["lin0"], outer_init="svd")),
        lambda: live.load_adapter(str(tmp_path), "third"),
        lambda: set_peft_model_state_dict(live, get_peft_model_state_dict(other)),
        lambda: live.load_state_dict(state),
        lambda: load_inner(tmp_path / "inner.safetensors", {"mlp": live.base_model.model}, "third"),
    ):
        with pytest.raises(ValueError, match=r"lin0 has merged adapters \['default'\].*unmerge them before"):
            action()
        assert torch.equal(live(X), merged) and list(live.peft_config) == ["default"]


def test_adding_around_a_merged_lora_is_refused(base):
    model = get_peft_model(base, LoraConfig(target_modules=["lin0"], init_lora_weights=False))
    both = get_peft_model(model.base_model.model, config_for(["lin0"], outer_init="svd"), "nora")
    model.base_model.model.lin0.base_layer.merge()
    with pytest.raises(ValueError, match=r"lin0 has merged adapters \['default'\]"):
        both.add_adapter("second", config_for(["lin0"], outer_init="svd"))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_adapter_is_refused_in_pefts_words(base, broken):
    model = get_peft_model(base, config_for(["lin0", "lin1"], outer_init="svd"))
    model.base_model.model.lin1.nora_inner_B["default"].weight.data[0, 0] = broken
    weight = base.lin1.base_layer.weight.clone()
    message = "NaNs detected in the merged weights. The adapter default seems to be broken: lin1 would get"
    with pytest.raises(ValueError, match=message):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(base.lin1.base_layer.weight, weight)


# ---------------------------------------------------------------------- bases in unusual states


def test_adding_to_a_float8_base_is_refused(base):
    base.lin0.weight.data = base.lin0.weight.data.to(torch.float8_e4m3fn)  # as diffusers' layerwise casting stores it
    for config in (config_for(["lin0"], outer_init="svd"), config_for(["lin0"], outer_init="svd", saved=True)):
        with pytest.raises(ValueError, match="lin0 has a weight that is no plain matrix .*float8_e4m3fn"):
            get_peft_model(base, config)


def test_adding_to_a_dynamically_quantised_layer_is_refused(base):
    quantised = torch.ao.quantization.quantize_dynamic(base, {nn.Linear})
    with pytest.raises(ValueError, match="lin0 is a Linear of torch.ao.nn.quantized.dynamic"):
        get_peft_model(quantised, config_for(["lin0"], outer_init="svd"))


def test_a_model_that_was_made_on_the_meta_device_refuses_to_run_or_save_without_weights(base, tmp_path):
    with torch.device("meta"):
        model = get_peft_model(MLP(), config_for(["lin0"], outer_init="svd"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) > 0  # what the meta device is for
    model.to_empty(device="cpu")
    layer = model.base_model.model.lin0
    for action in (
        lambda: model(X),
        lambda: layer.fold("default"),
        lambda: model.save_pretrained(tmp_path / "folder"),
        lambda: save_inner(tmp_path / "inner.safetensors", {"model": model.base_model.model}),
    ):
        with pytest.raises(ValueError, match="lin0.* meta device"):
            action()
    assert not (tmp_path / "inner.safetensors").exists()


def test_emptying_a_live_model_and_loading_its_state_again_gives_its_outputs(pair):
    live, other = pair
    expected, state = other(X), copy.deepcopy(other.state_dict())
    live.to_empty(device="cpu")
    for buffer in (live.base_model.model.lin0.nora_outer_A, live.base_model.model.lin0.nora_right_row):
        buffer["default"].fill_(math.nan)  # what memory happens to hold
    live.load_state_dict(state)
    assert_close(live(X), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_the_same_half_precision_state_again_decomposes_nothing(base, dtype, monkeypatch):
    model = get_peft_model(base.to(dtype), config_for(["lin0"], outer_init="svd"))
    monkeypatch.setattr(nora.layer, "rebuild_basis", no_decomposition)
    model.load_state_dict(copy.deepcopy(model.state_dict()))


def test_an_offloaded_adapter_is_refused_where_its_numbers_are_needed(pair, tmp_path):
    live, _ = pair
    inside = live.base_model.model
    accelerate.cpu_offload(inside, execution_device="cpu")
    for action in (
        lambda: inside.lin0.fold("default"),
        lambda: fold_nora(live),
        lambda: live.save_pretrained(tmp_path / "folder"),
        lambda: save_inner(tmp_path / "inner.safetensors", {"model": inside}),
    ):
        with pytest.raises(ValueError, match="lin0.*offloading"):
            action()
    assert not (tmp_path / "folder" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("normalise", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_merging_into_a_weight_that_is_computed_anew_is_refused(base, normalise):
    normalise(base.lin0)
    model = get_peft_model(base, config_for(["lin0"], outer_init="svd", init_weights=False)).eval()
    before = model(X)
    with pytest.raises(ValueError, match="lin0 computes its weight from other parameters"):
        model.merge_adapter()
    assert torch.equal(model(X), before)


def test_several_adapters_are_merged_with_one_rounding_and_all_or_none(base):
    model = get_peft_model(base.bfloat16(), config_for(["lin0"], outer_init="svd", init_weights=False))
    model.add_adapter("other", config_for(["lin0"], outer_init="svd", init_weights=False))
    layer = model.base_model.model.lin0
    weight = layer.base_layer.weight.detach().clone()
    exact = weight.float() + sum(layer._delta_weight(name) for name in ("default", "other"))
    layer.merge(adapter_names=["default", "other"])
    assert torch.equal(layer.base_layer.weight, exact.bfloat16())
    layer.unmerge()
    with torch.no_grad():
        layer.nora_inner_A["other"].weight[0] = math.nan
    with pytest.raises(ValueError, match="NaNs detected.* adapter other "):
        layer.merge(safe_merge=True, adapter_names=["default", "other"])
    assert not layer.merged
    assert torch.equal(layer.base_layer.weight, weight)


def test_calibrating_a_model_with_merged_adapters_is_refused(pair):
    live, _ = pair
    live.merge_adapter()
    with pytest.raises(ValueError, match="lin0 has merged adapters .*unmerge them before calibrating"):
        preprocess_nora(live, config_for(["lin0"]), lambda: live(X))


def test_a_file_of_an_adapter_that_still_waited_for_its_weights_is_refused(base, tmp_path):
    model = get_peft_model(copy.deepcopy(base), config_for(["lin0"], outer_init="svd", saved=True))
    assert get_peft_model_state_dict(model)["base_model.model.lin0.nora_inner_A.weight"].shape  # as a loader may ask
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lin0: the base weight differs"):
        PeftModel.from_pretrained(base, tmp_path)


def test_a_config_that_was_saved_before_any_injection_still_chooses_its_factors(base, tmp_path):
    NoraConfig(target_modules=["lin0"]).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.outer_init is None
    with pytest.warns(UserWarning, match="plain SVD"):
        get_peft_model(base, config)(X)


def test_the_library_asks_no_environment_and_knows_no_home():
    """Read from the source, as is that a forward pass knows of no decomposition."""
    for path in Path(nora.__file__).parent.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert not any(word in source for word in ("os.environ", "getenv", "expanduser", "home()")), path
        assert not any(f"import {name}" in source for name in ("fcntl", "resource", "pwd", "storage")), path
    forward = "".join(inspect.getsource(getattr(NoraLinear, name)) for name in ("forward", "_nested", "_outer_update"))
    assert not any(word in forward for word in ("build_basis", "rebuil", "refresh"))
