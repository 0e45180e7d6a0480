"""NoRA's layer with one frozen factor, on either side of W: the same numbers and gradients as the formula with both."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nora_models import MLP, config_for, seeded
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nora import preprocess_nora
from nora.functional import awsvd_scale, outer_factors
from nora.nested import left_factor, nested_input, right_factor

SIDES = ("B", "A", "both")


def drawn(shape, seed, dtype=torch.float64):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(m=st.integers(2, 9), n=st.integers(2, 9), side=st.sampled_from(SIDES), data=st.data())
def test_b_is_w_times_the_right_factor(m, n, side, data):
    """Against NumPy's SVD: W R = B and A R = I; and from B alone, L W = A, with B for L's R."""
    r = data.draw(st.integers(1, min(m, n)))
    seed = data.draw(st.integers(0, 999))
    W, S = drawn((m, n), seed), 0.2 + drawn((n,), seed + 1).abs()
    A, stored_B = (one.double() for one in outer_factors(W, r, S, side))
    right = right_factor(A, S)
    R = np.diag(right.channel.double()) @ A.T.numpy() @ np.diag(right.row.double())
    U, sigma, _ = np.linalg.svd(W.numpy() * S.numpy(), full_matrices=False)
    power = {"B": 1.0, "A": 0.0, "both": 0.5}[side]
    B = W.numpy() @ R
    np.testing.assert_allclose(A.numpy() @ R, np.eye(r), atol=1e-5)
    np.testing.assert_allclose(np.abs(U[:, :r].T @ B), np.diag(sigma[:r] ** power), atol=1e-4 * max(1, sigma[0]))
    L = left_factor(stored_B)
    torch.testing.assert_close(L.T * right_factor(L, None).row, stored_B)
    np.testing.assert_allclose(L @ W, A, atol=1e-4 * max(1, sigma[0] / sigma[r - 1]))


@pytest.mark.parametrize("keep_input", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3 + drawn((7,), 5).abs()], ids=["svd", "awsvd"])
def test_gradients_are_the_formulas(scale, keep_input):
    """Against autograd of the formula written out, and finite differences, in float64."""
    x, A, inner_A, inner_B = drawn((2, 3, 7), 0), drawn((4, 7), 1), drawn((2, 4), 2), drawn((4, 2), 3)
    right = right_factor(A, scale)
    R = torch.diag(right.channel) @ A.T @ torch.diag(right.row)
    given = [one.clone().requires_grad_() for one in (x, inner_A, inner_B)]

    def formula(x, inner_A, inner_B):
        return x + 0.7 * x @ A.T @ inner_A.T @ inner_B.T @ R.T

    def ours(x, inner_A, inner_B):
        return nested_input(x, inner_A, inner_B, A, right, 0.7, keep_input)

    torch.testing.assert_close(ours(*given), formula(*given))
    g = drawn((2, 3, 7), 4)
    for found, expected in zip(
        torch.autograd.grad(ours(*given), given, g), torch.autograd.grad(formula(*given), given, g), strict=True
    ):
        torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(ours, given)


def both_sides():
    """An MLP with an adapter's product on lin0's input, and on lin1's output: 24 of 32 inputs, without a bias."""
    base = MLP().eval()
    base.lin1.bias = None
    return base


def adapted(side="B", dtype=torch.float32, **kwargs):
    """An MLP with a clearly non-zero AwSVD adapter, and the same without."""
    torch.manual_seed(0)
    base = both_sides().to(dtype)
    config = config_for(["lin0", "lin1"], sigma_side=side, init_weights=False, **kwargs)
    x = seeded(9, 16).to(dtype)
    model = copy.deepcopy(base)
    preprocess_nora(model, config, lambda: model(x))
    return get_peft_model(model, config), base


def written_out(layer, x):
    """h = W x + s B B' A' A x with B = U Σ from NumPy's SVD, not from the layer."""
    W = layer.base_layer.weight.detach().double()
    config = layer._origins["default"].config
    stats = layer.nora_stats.get("default")
    S = awsvd_scale(stats, config.awsvd_gamma) if stats is not None else torch.ones(W.shape[1])
    U, sigma, Vt = np.linalg.svd((W * S).numpy(), full_matrices=False)
    r = layer.outer_rank("default")
    power = {"B": 1.0, "A": 0.0, "both": 0.5}[config.sigma_side]
    A = layer.outer("default").A.double()
    signs = torch.sign((torch.from_numpy(Vt[:r]) / S * A).sum(1))
    B = torch.from_numpy(U[:, :r] * sigma[:r] ** power) * signs
    inner_A, inner_B = (one.detach().double() for one in layer.inner("default"))
    update = x.double() @ A.T @ inner_A.T @ inner_B.T @ B.T
    bias = layer.base_layer.bias
    return F.linear(x.double(), W, None if bias is None else bias.double()) + layer.scaling["default"] * update


@pytest.mark.parametrize("name, held", [("lin0", (16, 16)), ("lin1", (16, 24))], ids=["input", "output"])
@pytest.mark.parametrize("side", SIDES)
def test_the_layer_computes_both_factors_formula(side, name, held):
    model, _ = adapted(side)
    layer = getattr(model.base_model.model, name)
    x = seeded(5, layer.in_features)
    assert "default" not in layer.nora_outer_B and layer.nora_outer_A["default"].shape == held
    torch.testing.assert_close(layer(x).double(), written_out(layer, x), atol=1e-5, rtol=1e-5)
    lora_A, lora_B = layer.fold("default")
    torch.testing.assert_close((layer(x) - layer.base_layer(x)), x @ lora_A.T @ lora_B.T, atol=1e-5, rtol=1e-4)
    one = layer(x)
    layer.hold_both_factors("default")
    torch.testing.assert_close(layer(x), one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape, bias, width", [((96, 128), True, 128), ((96, 128), False, 96), ((128, 96), False, 96)])
def test_frozen_memory_is_one_factor(shape, bias, width):
    """At SDXL's widths the other would be as large; what stands in for it is k + r numbers."""
    config = config_for(["0"], r=4, outer_r=32, outer_init="svd")
    layer = get_peft_model(nn.Sequential(nn.Linear(shape[1], shape[0], bias).half()), config).base_model.model[0]
    buffers = dict(layer.named_buffers())
    frozen = sum(b.nbytes for name, b in buffers.items() if "outer" in name or "right" in name)
    assert frozen == 2 * 32 * width + 4 * (width + 32)


@pytest.mark.parametrize("r", [2, 16], ids=["small values", "zeros"])
def test_what_amplifies_rounding_stays_on_the_input(r):
    """Where the spectrum falls steeply, A's last rows would be small differences of W x."""
    base = nn.Sequential(nn.Linear(32, 24, bias=False))
    base[0].weight.data = torch.diag(torch.tensor([1.0, 0.01] + [0.0] * 22)) @ torch.eye(24, 32)
    layer = get_peft_model(base, config_for(["0"], outer_r=r, outer_init="svd")).base_model.model[0]
    assert layer.nora_outer_A["default"].shape == (r, 32)


@pytest.mark.parametrize(
    "choice",
    [{"side": "input"}, {"nora_dropout": 0.1}, {"inner_init": "diag"}, {"structure": "adapter", "r": 16}],
    ids=str,
)
def test_only_the_bare_form_is_on_the_output(choice):
    model = get_peft_model(both_sides(), config_for(["lin1"], outer_init="svd", **choice))
    assert model.base_model.model.lin1.nora_outer_A["default"].shape == (16, 32)


@pytest.mark.parametrize("name", ["0", "to_out"], ids=["keeps A x", "keeps x"])
def test_what_autograd_keeps(name):
    """r + r' numbers a token, or the input where attention keeps that itself."""
    base = nn.Sequential()
    base.add_module(name, nn.Sequential(nn.Linear(64, 48)) if name == "to_out" else nn.Linear(64, 48))
    target = "to_out.0" if name == "to_out" else name
    model = get_peft_model(base, config_for([target], r=4, outer_r=16, outer_init="svd"))
    x, frozen = torch.randn(100, 64), {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in frozen:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    own = 4 * 100 * (4 if name == "to_out" else 16 + 4)
    assert sum(size for place, size in kept.items() if place != x.data_ptr()) == own
    assert (x.data_ptr() in kept) == (name == "to_out")


def gradients(model, x, call=None):
    model.zero_grad()
    out = (model if call is None else call)(x)
    out.float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_functional_calls_and_copies_give_the_same_gradients():
    model, _ = adapted()
    x = seeded(5, 16)
    expected = gradients(model, x)
    assert expected and all(float(one.abs().max()) > 0 for one in expected.values())
    ways = {
        "checkpoint": lambda: gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False)),
        "functional_call": lambda: gradients(
            model, x, lambda x: torch.func.functional_call(model, dict(model.named_parameters()), (x,))
        ),
        "deepcopy": lambda: gradients(copy.deepcopy(model), x),
    }
    for way, run in ways.items():
        for name, found in run().items():
            torch.testing.assert_close(found, expected[name], msg=f"{way} {name}")


def test_compiled_without_a_graph_break():
    torch._dynamo.reset()
    model, _ = adapted()
    x = seeded(5, 16)
    expected = gradients(model, x)
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    for name, found in gradients(model, x, compiled).items():
        torch.testing.assert_close(found, expected[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision_bases_stay_near_float32(dtype):
    model, _ = adapted()
    x = seeded(5, 16)
    exact, expected = model(x), gradients(model, x)
    size = max(float(one.norm()) for one in expected.values())
    half = copy.deepcopy(model)
    for layer in (half.base_model.model.lin0, half.base_model.model.lin1):
        layer.base_layer.to(dtype)
        layer.nora_outer_A["default"] = layer.nora_outer_A["default"].to(dtype)
    for one in (model, half):
        with torch.autocast("cpu", dtype):
            out, found = one(x), gradients(one, x)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), exact, rtol=3e-2, atol=3e-2)
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32
            assert float((gradient - expected[name]).norm()) < 3e-2 * size, name


def test_dropout_sees_the_adapters_input_only():
    """The mean over many masks is the update without dropout; the base's own path is never dropped."""
    model, base = adapted(nora_dropout=0.5)
    x = seeded(5, 16)
    layer = model.base_model.model.lin0
    model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        mean = layer(x.expand(4000, 5, 16)).mean(dim=0)
    model.eval()
    update = layer(x) - base.lin0(x)
    assert float((mean - layer(x)).norm()) < 0.1 * float(update.norm())


@pytest.mark.parametrize("name", ["lin0", "lin1"])
def test_adapters_merged_one_after_another_are_those_merged_together(name):
    """The second one's pair is W's, not that of W with the first one in it."""
    torch.manual_seed(0)
    model = get_peft_model(both_sides(), config_for([name], outer_init="svd", init_weights=False))
    model.add_adapter("other", config_for([name], outer_init="svd", init_weights=False))
    layer = getattr(model.base_model.model, name)
    weight = layer.base_layer.weight.detach().clone()
    deltas = [layer.get_delta_weight(name) for name in ("default", "other")]
    for name in ("default", "other"):
        layer.merge(adapter_names=[name])
    torch.testing.assert_close(layer.base_layer.weight.detach(), weight + sum(deltas))
    torch.testing.assert_close(layer.get_delta_weight("other"), deltas[1])
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight)


def test_adapters_on_both_sides_of_one_layer_add_up():
    """Each one's update is of x alone, in a sum and in a batch with one adapter for each sample."""
    torch.manual_seed(0)
    model = get_peft_model(both_sides(), config_for(["lin1"], outer_init="svd", init_weights=False))
    model.add_adapter("input", config_for(["lin1"], outer_init="svd", init_weights=False, side="input"))
    model.add_adapter("drawn", config_for(["lin1"], outer_init="random", init_weights=False))
    model.add_adapter("other", config_for(["lin1"], outer_init="svd", init_weights=False, outer_r=8))
    layer, names = model.base_model.model.lin1.eval(), ["default", "input", "drawn", "other"]
    x = seeded(4, 32)
    updates = torch.stack([x @ A.T @ B.T for A, B in (layer.fold(name) for name in names)])
    bare = layer.base_layer(x)
    layer.set_adapter(names)
    torch.testing.assert_close(layer(x), bare + updates.sum(0), rtol=1e-4, atol=1e-5)
    each = torch.stack([updates[i, i] for i in range(4)])
    torch.testing.assert_close(layer(x, adapter_names=names), bare + each, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lin0", "lin1"])
def test_around_a_loras_layer_both_updates_are_added(name):
    torch.manual_seed(0)
    base = both_sides()
    x = seeded(5, getattr(base, name).in_features)
    lora = inject_adapter_in_model(LoraConfig(target_modules=[name], init_lora_weights=False), copy.deepcopy(base))
    with_lora = getattr(lora, name)(x)
    config = config_for([name], outer_init="svd", init_weights=False)
    both = inject_adapter_in_model(config, lora, "second").eval()
    layer = getattr(both, name)
    layer.set_adapter("second")
    lora_A, lora_B = layer.fold("second")
    torch.testing.assert_close(layer(x), with_lora + x @ lora_A.T @ lora_B.T, rtol=1e-4, atol=1e-5)
