"""The mathematics of `nora`, against the formulas computed here in NumPy float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from nora import NoraConfig, preprocess_nora
from nora.basis import build_basis, rebuild_basis
from nora.cells import CELLS
from nora.combine import concatenated, truncated
from nora.functional import (
    awsvd_scale,
    canonical_statistic,
    fingerprint,
    matched_std,
    outer_factors,
    random_factors,
    rounding_gain,
    sketch,
    sketch_distance,
)

SIDES = ("B", "A", "both")


def numpy_factors(W, r, S, sigma_side):
    """B = U_r Σ_r and A = V_rᵀ S⁻¹ by NumPy's own SVD, signs by the largest entry of each row of A."""
    U, sigma, Vt = np.linalg.svd(W * S, full_matrices=False)
    U, sigma, Vt = U[:, :r], sigma[:r], Vt[:r]
    power = {"B": (1.0, 0.0), "A": (0.0, 1.0), "both": (0.5, 0.5)}[sigma_side]
    B, A = U * sigma ** power[0], (sigma ** power[1])[:, None] * Vt / S
    for i in range(r):
        if A[i, np.abs(A[i]).argmax()] < 0:
            A[i], B[:, i] = -A[i], -B[:, i]
    return A, B


def numpy_scale(statistic, gamma):
    return numpy_scale_of_stored((statistic / statistic.mean()).astype(np.float16), gamma)


def numpy_scale_of_stored(stored, gamma):
    S = stored.astype(np.float64) ** gamma
    S = np.maximum(S, 1e-3 * S.mean())
    return S / S.mean()


def weight(m, n, seed=0):
    """A matrix with distinct, slowly falling singular values, as trained weights have."""
    draws = np.random.default_rng(seed)
    U = np.linalg.qr(draws.standard_normal((m, min(m, n))))[0]
    V = np.linalg.qr(draws.standard_normal((n, min(m, n))))[0]
    return (U * np.arange(1, min(m, n) + 1) ** -0.7) @ V.T


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(2, 40),
    n=st.integers(2, 40),
    part=st.floats(0, 1),
    gamma=st.floats(0, 1.5),
    side=st.sampled_from(SIDES),
    seed=st.integers(0, 999),
)
def test_outer_factors_are_the_papers(m, n, part, gamma, side, seed):
    r = 1 + int(part * (min(m, n) - 1))
    W = weight(m, n, seed)
    statistic = np.exp(np.random.default_rng(seed + 1).standard_normal(n))
    stored = canonical_statistic(torch.tensor(statistic))
    # A value half-way between two float16 numbers may go either way, with the last bit of the mean.
    np.testing.assert_allclose(stored.double().numpy(), statistic / statistic.mean(), rtol=1.01 * 2**-11)
    S = numpy_scale_of_stored(stored.numpy(), gamma)
    A, B = numpy_factors(W, r, S, side)
    scale = awsvd_scale(stored, gamma)
    np.testing.assert_allclose(scale.numpy(), S, rtol=1e-12)
    found = outer_factors(torch.tensor(W), r, scale, side)
    np.testing.assert_allclose(found.B.numpy() @ found.A.numpy(), B @ A, atol=1e-5 * np.abs(W).max() * r)
    np.testing.assert_allclose(found.A.numpy(), A, atol=2e-5 * np.abs(A).max())
    np.testing.assert_allclose(found.B.numpy(), B, atol=2e-5 * np.abs(B).max())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_full_rank_reconstructs_the_weight(shape):
    W = weight(*shape)
    scale = awsvd_scale(canonical_statistic(torch.rand(shape[1]) + 0.1), 0.5)
    A, B = outer_factors(torch.tensor(W), 24, scale)
    np.testing.assert_allclose(B.numpy() @ A.numpy(), W, atol=1e-6)


def test_rank_deficient_weight_takes_the_precise_route():
    W = torch.tensor(weight(30, 20))
    W[:, 10:] = W[:, :10]  # rank 10
    A, B = outer_factors(W, 15)
    assert torch.isfinite(A).all() and torch.isfinite(B).all()
    np.testing.assert_allclose(B.numpy() @ A.numpy(), W.numpy(), atol=1e-6)
    np.testing.assert_allclose(A.double() @ A.double().T, np.eye(15), atol=1e-5)


def test_awsvd_loses_less_of_the_output_than_svd():
    draws = np.random.default_rng(0)
    channel = np.exp(draws.standard_normal(64))
    X = draws.standard_normal((4000, 64)) * channel
    W = weight(48, 64)
    statistic = torch.tensor(np.abs(X).mean(axis=0))

    def output_error(factors):
        A, B = (f.numpy() for f in factors)
        return np.linalg.norm(X @ (W - B @ A).T) / np.linalg.norm(X @ W.T)

    svd = output_error(outer_factors(torch.tensor(W), 8))
    for gamma in (0.5, 1.0):
        scale = awsvd_scale(canonical_statistic(statistic), gamma)
        assert output_error(outer_factors(torch.tensor(W), 8, scale)) < 0.9 * svd


def test_global_rescale_of_the_statistic_changes_nothing():
    W, statistic = torch.tensor(weight(20, 30)), torch.rand(30, dtype=torch.float64) + 0.1
    one = outer_factors(W, 6, awsvd_scale(canonical_statistic(statistic), 0.5))
    other = outer_factors(W, 6, awsvd_scale(canonical_statistic(statistic * 4096), 0.5))
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dead", [1, 10, 29])
def test_dead_channels_stay_finite_and_bounded(dead):
    W, statistic = torch.tensor(weight(20, 30)), torch.rand(30) + 0.1
    statistic[:dead] = 0
    scale = awsvd_scale(canonical_statistic(statistic), 0.5)
    assert scale.min() >= 0.99e-3 * scale.max() / 30
    A, B = outer_factors(W, 8, scale)
    assert torch.isfinite(A).all() and torch.isfinite(B).all()


@pytest.mark.parametrize("bad", [torch.zeros(5), torch.tensor([1.0, -1.0]), torch.tensor([1.0, math.nan])])
def test_impossible_statistics_are_refused(bad):
    with pytest.raises(ValueError, match="statistic"):
        canonical_statistic(bad)


def test_canonical_statistic_is_idempotent():
    once = canonical_statistic(torch.rand(1000) * 7)
    assert torch.equal(canonical_statistic(once), once)


def test_signs_do_not_depend_on_rounding_in_ties():
    W = torch.tensor([[1.0, -1.0, 0.5], [0.2, -0.2, -3.0]], dtype=torch.float64)
    A, _ = outer_factors(W, 2)
    nudged, _ = outer_factors(W * (1 + 1e-15 * torch.randn_like(W)), 2)
    torch.testing.assert_close(A, nudged)
    assert (A[:, 0] > 0).any()


@pytest.mark.parametrize("side", SIDES)
def test_random_factors_have_the_svds_norms_and_repeat(side):
    W = torch.tensor(weight(20, 30))
    svd, random = outer_factors(W, 6, sigma_side=side), random_factors(W, 6, 3, side)
    for ours, theirs in zip(random, svd):
        torch.testing.assert_close(ours.norm(), theirs.norm())
    assert torch.equal(random.A, random_factors(W, 6, 3, side).A)
    assert not torch.equal(random.A, random_factors(W, 6, 4, side).A)


def test_fold_is_the_product():
    draws = np.random.default_rng(0)
    A, B = draws.standard_normal((6, 30)), draws.standard_normal((20, 6))
    inner_A, inner_B = draws.standard_normal((2, 6)), draws.standard_normal((6, 2))
    matrices = {"A": A, "inner_A": inner_A, "inner_B": inner_B, "B": B}
    up, down = CELLS["serial", "a"].factors({name: torch.tensor(matrix) for name, matrix in matrices.items()})
    lora_A, lora_B = down, 1.5 * up
    np.testing.assert_allclose((lora_B @ lora_A).numpy(), 1.5 * B @ inner_B @ inner_A @ A, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- the layer


def nora_linear(m=20, n=30, r=3, outer_r=6, **kwargs):
    """A float64 linear layer with an adapter, its calibration inputs X and its weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m)).double()
    model[0].weight.data = torch.tensor(weight(m, n))
    W = model[0].weight.detach().numpy().copy()
    X = torch.randn(200, n, dtype=torch.float64) * torch.exp(torch.randn(n, dtype=torch.float64))
    settings_ = {"inner_init": "normal", "inner_std": 0.3, "target_modules": ["0"]} | kwargs
    config = NoraConfig(r=r, outer_r=outer_r, **settings_)
    preprocess_nora(model, config, lambda: model(X))
    adapted = get_peft_model(model, config)
    return adapted, adapted.base_model.model[0], X, W


def expected_update(layer, X, W, alpha_over_r=1.0, gamma=0.5):
    S = numpy_scale(np.abs(X.numpy()).mean(axis=0).astype(np.float32).astype(np.float64), gamma)
    A, B = numpy_factors(W, layer.nora_inner_A["default"].in_features, S, "B")
    inner_A = layer.nora_inner_A["default"].weight.detach().numpy()
    inner_B = layer.nora_inner_B["default"].weight.detach().numpy()
    return alpha_over_r * B @ inner_B @ inner_A @ A, A, B


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_forward_and_delta_weight_follow_the_formula(alpha):
    model, layer, X, W = nora_linear(nora_alpha=alpha)
    delta, _, _ = expected_update(layer, X, W, 1.0 if alpha is None else alpha / 3)
    np.testing.assert_allclose(layer.get_delta_weight("default").numpy(), delta, atol=1e-5)
    bias = layer.base_layer.bias.detach().numpy()
    np.testing.assert_allclose(model(X).detach().numpy(), X.numpy() @ (W + delta).T + bias, atol=1e-4)


def test_gradients_are_the_formulas_and_the_finite_differences():
    model, layer, X, W = nora_linear()
    X = X[:5]
    G = np.random.default_rng(2).standard_normal((5, 20))  # dL/dh for L = Σ G ⊙ h
    (model(X) * torch.tensor(G)).sum().backward()
    inner_A, inner_B = layer.nora_inner_A["default"].weight, layer.nora_inner_B["default"].weight
    A, B = (f.double().numpy() for f in layer.outer("default"))
    a, b = inner_A.detach().numpy(), inner_B.detach().numpy()
    Z = X.numpy() @ A.T  # (tokens, r)
    np.testing.assert_allclose(inner_A.grad.numpy(), (B @ b).T @ G.T @ Z, rtol=1e-8)
    np.testing.assert_allclose(inner_B.grad.numpy(), B.T @ G.T @ (Z @ a.T), rtol=1e-8)

    def loss(a, b):
        return (G * (X.numpy() @ (W + B @ b @ a @ A).T)).sum()

    for index in [(0, 0), (2, 5), (1, 3)]:
        step = np.zeros_like(a)
        step[index] = 1e-6
        numeric = (loss(a + step, b) - loss(a - step, b)) / 2e-6
        assert inner_A.grad[index].item() == pytest.approx(numeric, rel=1e-5, abs=1e-6)
        numeric = (loss(a, b + step.T) - loss(a, b - step.T)) / 2e-6
        assert inner_B.grad[index[::-1]].item() == pytest.approx(numeric, rel=1e-5, abs=1e-6)


def test_only_the_inner_factors_are_parameters():
    model, _, _, _ = nora_linear()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"base_model.model.0.nora_inner_{x}.default.weight" for x in "AB"}
    assert not any("outer" in name for name in model.state_dict())


@pytest.mark.parametrize("side", SIDES)
def test_rounding_gain_is_how_far_rounded_outputs_move_the_outer_product(side):
    """By NumPy, on 20000 inputs of covariance S² with a relative error of 1e-3 in each number of W x."""
    draws = np.random.default_rng(0)
    S = 0.5 + draws.random(64)
    W = weight(48, 64) / S
    A, B = (one.double().numpy() for one in outer_factors(torch.tensor(W), 16, torch.tensor(S), side))
    x = draws.standard_normal((20000, 64)) * S
    y = x @ W.T
    z, L = x @ A.T, (B / np.square(B).sum(0)).T
    error = (y * (1 + 1e-3 * draws.standard_normal(y.shape))) @ L.T - z
    moved = np.sqrt(np.mean(np.square(error).mean(0) / np.square(z).mean(0))) / 1e-3
    found = rounding_gain(torch.tensor(W), torch.tensor(S), torch.tensor(A), torch.tensor(L))
    assert found == pytest.approx(moved, rel=0.1)


# ---------------------------------------------------------------------- inner init


def first_step_ratio(outer_init, seed, channel_spread=1.0):
    """‖δ(ΔW X)‖ of Adam's first step at lr 1e-4, matched NoRA (64, 8) over LoRA rank 4 with A ~ N(0, 1/4²)."""
    torch.manual_seed(seed)
    m, n, lr = 160, 192, 1e-4
    X = torch.randn(512, n) * torch.exp(channel_spread * torch.randn(n))
    W = torch.tensor(weight(m, n, seed)).float()
    target = X @ (W + 0.1 * W.std() * torch.randn(m, n)).T

    model = nn.Sequential(nn.Linear(n, m, bias=False))
    model[0].weight.data = W.clone()
    config = NoraConfig(r=8, outer_r=64, target_modules=["0"], outer_init=outer_init)
    preprocess_nora(model, config, lambda: model(X))
    model = get_peft_model(model, config)
    layer = model.base_model.model[0]
    assert torch.equal(model(X), X @ W.T)  # it starts exactly at the base
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    (model(X) - target).square().mean().backward()
    adam.step()
    nora_step = X @ layer.get_delta_weight("default").T

    lora_A, lora_B = torch.randn(4, n) / 4, torch.zeros(m, 4, requires_grad=True)
    adam = torch.optim.Adam([lora_B], lr=lr)
    (X @ (W + lora_B @ lora_A).T - target).square().mean().backward()
    adam.step()
    lora_step = X @ (lora_B.detach() @ lora_A).T
    return (nora_step.norm() / lora_step.norm()).item()


@pytest.mark.parametrize("outer_init", ["awsvd", "svd", "random"])
def test_matched_init_takes_loras_first_step(outer_init):
    ratios = [first_step_ratio(outer_init, seed) for seed in range(4)]
    assert 0.6 < np.mean(ratios) < 1.6, ratios


def test_matched_std_is_the_formula():
    W = torch.tensor(weight(20, 30))
    outer = outer_factors(W, 6)
    norms = np.linalg.norm(outer.A.numpy()) * np.linalg.norm(outer.B.numpy())
    std = matched_std((20, 30), 3, 2.0, outer.A, float(outer.B.norm()))
    assert std == pytest.approx(math.sqrt(600) / (2 * math.sqrt(12) * norms), rel=1e-6)


@pytest.mark.parametrize("inner_init", ["matched", "normal", "zero_uniform"])
def test_inner_inits(inner_init):
    def start(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64))
        torch.manual_seed(seed + 1)
        model = get_peft_model(
            model, NoraConfig(r=4, target_modules=["0"], outer_init="svd", inner_init=inner_init, inner_std=0.02)
        )
        layer = model.base_model.model[0]
        return layer.nora_inner_A["default"].weight.detach(), layer.nora_inner_B["default"].weight.detach()

    inner_A, inner_B = start(0)
    again_A, again_B = start(0)
    assert torch.equal(inner_A, again_A) and torch.equal(inner_B, again_B)
    assert (inner_B == 0).all() == (inner_init != "normal")
    if inner_init == "normal":
        assert inner_A.std().item() == pytest.approx(0.02, rel=0.3)
        assert inner_B.std().item() == pytest.approx(0.02, rel=0.3)
    if inner_init == "zero_uniform":
        assert inner_A.abs().max() <= 1 / math.sqrt(32)


# ---------------------------------------------------------------------- fingerprints


def test_sketch_distance_estimates_the_relative_distance():
    M = torch.tensor(weight(60, 80))
    for size in (1e-6, 1e-4, 1e-2):
        estimates = []
        for seed in range(20):
            E = torch.tensor(np.random.default_rng(seed).standard_normal((60, 80)))
            estimates.append(sketch_distance(sketch(M), sketch(M + E * (size * M.norm() / E.norm()))))
        assert 0.5 * size < np.mean(estimates) < 2 * size


@pytest.mark.parametrize("change", ["flip", "swap", "rotate", "permute", "rescale"])
def test_fingerprint_sees_another_basis(change):
    W = torch.tensor(weight(60, 80))
    outer = outer_factors(W, 32)
    A, B = outer.A.clone(), outer.B.clone()
    if change == "flip":
        A[-1], B[:, -1] = -A[-1], -B[:, -1]
    elif change == "swap":
        A[[30, 31]], B[:, [30, 31]] = A[[31, 30]], B[:, [31, 30]]
    elif change == "rotate":
        Q = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
        A, B = Q @ A, B @ Q.T
    elif change == "permute":
        A = A[:, torch.randperm(80, generator=torch.Generator().manual_seed(0))]
    else:
        A, B = 1.01 * A, B / 1.01
    saved, found = fingerprint(W, outer), fingerprint(W, type(outer)(A, B))
    assert max(sketch_distance(s, f) for s, f in zip(saved, found)) > 5e-3


def test_fingerprint_survives_rounding():
    W = torch.tensor(weight(60, 80))
    saved = fingerprint(W, outer_factors(W, 16))
    found = fingerprint(W.float(), outer_factors(W.float(), 16))
    assert max(sketch_distance(s, f) for s, f in zip(saved, found)) < 1e-4


# ---------------------------------------------------------------------- sums of adapters


def test_sums_of_inner_factors():
    draws = torch.Generator().manual_seed(0)
    outer = outer_factors(torch.tensor(weight(20, 30)), 8)
    pairs = [(torch.randn(2, 8, generator=draws), torch.randn(8, 2, generator=draws)) for _ in range(2)]
    inner_A, inner_B = concatenated([(0.5, pairs[0]), (-2.0, pairs[1])])
    core = 0.5 * pairs[0][1] @ pairs[0][0] - 2 * pairs[1][1] @ pairs[1][0]
    torch.testing.assert_close(inner_B @ inner_A, core)

    cut_A, cut_B = truncated((inner_A, inner_B), outer, 2)
    full = (outer.B @ core @ outer.A).double().numpy()
    U, sigma, Vt = np.linalg.svd(full)
    best = (U[:, :2] * sigma[:2]) @ Vt[:2]
    np.testing.assert_allclose(
        (outer.B.double() @ cut_B @ cut_A @ outer.A.double()).numpy(), best, atol=1e-4 * sigma[0]
    )


# ---------------------------------------------------------------------- a device without float64


class MpsTensor(torch.Tensor):
    """A tensor of the device "mps", computed on the CPU: float64 is a TypeError there, and so is mixing devices."""

    __module__ = "torch"  # torchao's tensors, which are refused, have another

    @staticmethod
    def __new__(cls, held):
        if held.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        size, strides = held.size(), held.stride()
        return torch.Tensor._make_wrapper_subclass(cls, size, strides=strides, dtype=held.dtype, device="mps")

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim]
        moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if not moves and not all(isinstance(x, cls) for x in tensors):
            raise TypeError(f"{func} mixes devices")
        device = kwargs.pop("device", None) or args[0].device
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, cls) else x, (args, kwargs))
        result = func(*args, **kwargs)
        if torch.device(device).type != "mps":
            return result
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, result)


class Mps(TorchFunctionMode):
    """Inside, ``tensor.to("mps")`` works, without a machine that has it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            tensor, *rest = args
            target = rest[0] if rest else kwargs.get("device")
            if isinstance(target, torch.Tensor):
                rest, target = [target.dtype], target.device
            elif isinstance(target, (str, torch.device)):
                rest = [dtype for dtype in rest[1:] if isinstance(dtype, torch.dtype)]
                kwargs.pop("device", None)
            else:
                target = tensor.device
            target = torch.device(target)
            tensor = func(tensor, *rest, **kwargs) if rest or kwargs else tensor
            if target.type == "mps":
                return tensor if isinstance(tensor, MpsTensor) else MpsTensor(tensor)
            return tensor.cpu()
        return func(*args, **kwargs)


@pytest.mark.parametrize("statistic", [None, torch.arange(1.0, 25)], ids=["svd", "awsvd"])
@pytest.mark.parametrize("side", SIDES)
def test_a_device_without_float64_gets_the_same_factors(statistic, side):
    W = torch.tensor(weight(40, 24)).float()
    scale = None if statistic is None else awsvd_scale(canonical_statistic(statistic), 0.5)
    expected = outer_factors(W, 6, scale, side), random_factors(W, 6, 3, side)
    inner = torch.randn(2, 6), torch.randn(6, 2)
    with Mps():
        there = W.to("mps")
        with pytest.raises(TypeError, match="float64"):
            there.double()
        used = None if statistic is None else canonical_statistic(statistic.to("mps"))
        scale = None if used is None else awsvd_scale(used, 0.5)
        found = outer_factors(there, 6, scale, side), random_factors(there, 6, 3, side)
        for one, other in zip(expected, found):
            assert other.A.device.type == other.B.device.type == "mps"
            assert torch.equal(other.A.cpu(), one.A) and torch.equal(other.B.cpu(), one.B)
        assert torch.equal(fingerprint(there, found[0]), fingerprint(W, expected[0]))
        std = matched_std((40, 24), 2, 1.0, found[0].A, 3.0, used)
        core = truncated(tuple(factor.to("mps") for factor in inner), found[0], 2)
    plain = None if statistic is None else canonical_statistic(statistic)
    assert std == matched_std((40, 24), 2, 1.0, expected[0].A, 3.0, plain)
    for one, other in zip(core, truncated(inner, expected[0], 2)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kwargs", [{}, {"awsvd_stat": "rms"}, {"awsvd_stat": "weight"}, {"outer_init": "random"}])
@pytest.mark.parametrize("m, n", [(40, 24), (24, 40)])
def test_a_layer_on_a_device_without_float64_is_calibrated_and_decomposed(kwargs, m, n):
    x, W, bases = torch.randn(5, n), torch.tensor(weight(m, n)).float(), {}
    config = NoraConfig(r=2, target_modules=["0"], **({"outer_init": "awsvd"} | kwargs))
    for device in ("cpu", "mps"):
        with Mps():
            model = nn.Sequential(nn.Linear(n, m, bias=False))
            model[0].weight = nn.Parameter(W.to(device), requires_grad=False)
            statistic = preprocess_nora(model, config, lambda: model(x.to(device))).get("0")  # noqa: B023
            bases[device] = build_basis("0", model[0], config, 6, statistic)
            rebuild_basis("0", ("0",), model[0], config, 6, bases[device].statistic, bases["cpu"].fingerprint)
    plain, there = bases["cpu"], bases["mps"]
    second = (plain.B, there.B) if plain.right is None else (plain.right.row, there.right.row)
    for one, other in ((plain.A, there.A), second):
        assert other.device.type == "mps" and torch.equal(other.cpu(), one)


# ---------------------------------------------------------------------- parameter counts, nothing allocated


def trained_parameters(model, r, outer_r, targets):
    config = NoraConfig(r=r, outer_r=outer_r, target_modules=targets, outer_init="svd")
    adapted = get_peft_model(model, config)
    assert all(p.is_meta for p in adapted.parameters())
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_parameter_count_of_mistral():
    from transformers import MistralConfig, MistralForCausalLM

    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig())  # the defaults are Mistral-7B's shapes
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    count = trained_parameters(model, 32, 64, projections)
    assert count == 32 * 7 * 2 * 64 * 32  # 917,504: the paper's 0.92 M (Table 1)


def test_parameter_count_of_clip_vit_b16():
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(vision_config={"patch_size": 16}, text_config={})
    with torch.device("meta"):
        model = CLIPModel(config)
    count = trained_parameters(model, 16, 256, ["q_proj", "k_proj", "v_proj"])
    assert count == (12 + 12) * 3 * 2 * 256 * 16  # both towers: 589,824, the paper's 0.59 M


@pytest.fixture(scope="module")
def sdxl_unet_config():
    return {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }


@pytest.mark.parametrize(
    ("r", "outer_r", "unet", "clip_l", "big_g"),
    [(32, 64, 2.29e6, 0.197e6, 0.524e6), (8, 64, 0.573e6, 0.049e6, 0.131e6), (16, 128, 2.29e6, 0.197e6, 0.524e6)],
)
def test_parameter_counts_of_sdxl(sdxl_unet_config, r, outer_r, unet, clip_l, big_g):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        model = UNet2DConditionModel(**sdxl_unet_config)
        small = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12))
        big = CLIPTextModel(
            CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
        )
    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    projections = ["q_proj", "k_proj", "v_proj", "out_proj"]
    assert trained_parameters(model, r, outer_r, attention) == 560 * 2 * r * outer_r
    assert 560 * 2 * r * outer_r == pytest.approx(unet, rel=0.01)
    assert trained_parameters(small, r, outer_r, projections) == pytest.approx(clip_l, rel=0.01)
    assert trained_parameters(big, r, outer_r, projections) == pytest.approx(big_g, rel=0.01)
