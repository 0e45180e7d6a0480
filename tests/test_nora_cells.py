"""Every cell of the design space and both generators: formula, count, gradients, files, folding."""

import copy
import math

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from nora import NoraConfig, load_inner, read_inner, save_inner
from nora.cells import CELLS
from nora.functional import outer_factors

M, N, R, K = 20, 24, 6, 3
X = torch.randn(5, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
# written out by hand, and not from the chains in `nora.cells`
FORMULAS = {
    ("serial", "a"): lambda A, B, t: B @ t["inner_B"] @ t["inner_A"] @ A,
    ("adapter", "a"): lambda A, B, t: B @ t["core"] @ A,
    ("parallel", "a"): lambda A, B, t: B @ t["inner_B"] @ t["inner_A"],
    ("serial", "b"): lambda A, B, t: t["inner_B"] @ t["inner_A"] @ B @ A,
    ("adapter", "b"): lambda A, B, t: t["core"] @ B @ A,
    ("parallel", "b"): lambda A, B, t: t["inner_B"] @ t["inner_A"] @ A,
    ("serial", "ab"): lambda A, B, t: t["wide_B"] @ t["wide_A"] @ B @ t["inner_B"] @ t["inner_A"] @ A,
    ("plain", "a"): lambda A, B, t: t["inner_B"] @ t["inner_A"],
}
COUNTS = {
    ("serial", "a"): 2 * R * K,
    ("adapter", "a"): R * R,
    ("parallel", "a"): K * (N + R),
    ("serial", "b"): 2 * M * K,
    ("adapter", "b"): M * M,
    ("parallel", "b"): K * (M + R),
    ("serial", "ab"): 2 * K * (R + M),
    ("plain", "a"): K * (M + N),
}
OPTIONS = [
    *({"structure": structure, "position": position} for structure, position in CELLS),
    {"inner_init": "diag"},
    {"inner_init": "diag", "sigma_side": "both"},
    {"inner_init": "normal", "inner_std": 0.3, "residual": True, "structure": "serial", "position": "ab"},
    {"outer_part": "last"},
    {"structure": "parallel", "outer_init": "random"},
    {"generator": "nola", "coefficients": 10},
    {"generator": "nola", "coefficients": 10, "structure": "plain", "inner_init": "zero_uniform"},
    {"generator": "nola", "coefficients": 10, "structure": "adapter"},
]


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(N, M)).double()


def adapted(init_weights: bool = True, **options):
    structure = options.get("structure", "serial")
    wide = structure == "adapter"
    config = NoraConfig(
        r=R if wide else K,
        outer_r=None if structure in ("adapter", "plain") else R,
        target_modules=["0"],
        init_weights=init_weights,
        **({} if structure == "plain" else {"outer_init": "svd"}) | options,
    )
    return get_peft_model(base(), config)


def parameters(model) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_a_cell_is_its_formula_with_its_count_and_gradients(cell):
    model = adapted(False, structure=cell[0], position=cell[1], nora_alpha=2.0)
    layer = model.base_model.model[0]
    W = base()[0].weight.detach()
    factors = outer_factors(W, R)
    A, B = factors.A.double().numpy(), factors.B.double().numpy()
    trained = {name: module.weight.detach().double().numpy() for name, module in layer.trained("default").items()}
    scaling = 2.0 / layer.r["default"]
    delta = scaling * FORMULAS[cell](A, B, trained)
    expected = base()(X).detach().numpy() + X.numpy() @ delta.T
    np.testing.assert_allclose(model(X).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.get_delta_weight("default").numpy(), delta, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in parameters(model)) == COUNTS[cell]
    model.double()
    x = X[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *parameters(model)), fast_mode=True)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options.values())))
def test_it_starts_at_the_base_and_every_file_gives_it_back(options, tmp_path):
    model = adapted(**options)
    before = base()(X)
    torch.testing.assert_close(model(X), before, rtol=0, atol=1e-12)
    optimizer = torch.optim.Adam(parameters(model), 1e-2)
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    live = model(X).detach()
    assert (live - before).abs().max() > 1e-3
    assert torch.equal(copy.deepcopy(model)(X), live)
    with model.disable_adapter():
        assert torch.equal(model(X), before)

    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path)(X), live, rtol=0, atol=1e-10)
    path = tmp_path / "inner.safetensors"
    save_inner(path, {"net": model.get_base_model()})
    again = base()
    load_inner(path, {"net": again})
    torch.testing.assert_close(again(X), live, rtol=0, atol=1e-10)
    folded = base()
    down, up = read_inner(path, {"net": folded})["net"]["0"]
    folded[0].weight.data += up.double() @ down.double()
    torch.testing.assert_close(folded(X), live, rtol=0, atol=1e-5)

    model.merge_adapter()
    torch.testing.assert_close(model(X), live, rtol=0, atol=1e-10)
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert torch.equal(model.base_model.model[0].base_layer.weight, base()[0].weight)


def test_a_generated_matrix_is_the_sum_over_numpy_s_bases_and_leaves_other_draws_alone():
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    from nora.generators import Generated, shared_bases

    layer = Generated("inner_A", 4, 2, 3, seed=5)
    other = Generated("inner_A", 4, 2, 3, seed=5)
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    assert torch.equal(layer.weight, other.weight) and layer._bases is other._bases  # one for all layers of a shape
    layer.coefficients.data = torch.tensor([0.5, -1.0, 2.0])
    layer.offset_scale.fill_(0.25)
    found = shared_bases("inner_A", (2, 4), 3, 5, torch.device("cpu"))
    expected = 0.25 * found.offset.numpy() + np.array([0.5, -1.0, 2.0]) @ found.bases.numpy()
    np.testing.assert_allclose(layer.weight.detach().numpy().ravel(), expected, rtol=1e-6)
    assert found.bases.abs().max() <= 1 / math.sqrt(3) and found.offset.abs().max() <= 1
    assert not torch.equal(layer.weight, Generated("inner_A", 4, 2, 3, seed=6).weight)


@pytest.mark.parametrize("part", ["middle", "last"])
def test_outer_parts_are_the_svd_s_own_directions(part):
    W = torch.randn(M, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    W[0] = W[1]  # one direction vanishes: it is no part
    U, sigma, Vt = np.linalg.svd(W.numpy())
    first = {"middle": (M - 1 - R) // 2, "last": M - 1 - R}[part]
    kept = slice(first, first + R)
    outer = outer_factors(W, R, part=part)
    expected = (U[:, kept] * sigma[kept]) @ Vt[kept]
    np.testing.assert_allclose((outer.B @ outer.A).numpy(), expected, atol=1e-5)
    with pytest.raises(ValueError, match="lower outer_r to at most 19"):
        outer_factors(W, M, part=part)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"structure": "adapter", "position": "ab"}, "no cell of the design space"),
        ({"structure": "adapter", "outer_r": 4}, "rank r = outer_r"),
        ({"structure": "parallel", "inner_init": "diag"}, 'inner_init="diag" is a start of'),
        ({"inner_init": "diag", "residual": False}, "residual=False leaves"),
        ({"generator": "nola", "inner_init": "normal"}, "starts at the base"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        NoraConfig(r=2, **options)


def test_a_large_output_core_is_refused_and_cells_are_not_summed():
    config = NoraConfig(r=2, structure="adapter", position="b")
    with pytest.raises(ValueError, match=r"matrix of 2000 x 2000 at up\.0"):
        config.layer_ranks("up.0", (2000, 30))
    model = adapted(structure="adapter")
    with pytest.raises(ValueError, match="fold them and add LoRAs"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")


def gradients(model, run, x=X) -> dict[str, torch.Tensor]:
    model.zero_grad()
    run(x).float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ids(options) -> str:
    return " ".join(map(str, options.values()))


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_checkpointing_functional_calls_copies_and_compilation_change_nothing(options):
    model = adapted(init_weights=False, **options)
    twin = copy.deepcopy(model)
    expected = gradients(model, model)
    assert len(expected) == len(parameters(model)) and all(bool(one.any()) for one in expected.values())
    torch._dynamo.reset()
    ways = {
        "checkpoint": lambda: gradients(model, lambda x: checkpoint(model, x, use_reentrant=False)),
        "functional_call": lambda: gradients(
            model, lambda x: torch.func.functional_call(model, dict(model.named_parameters()), (x,))
        ),
        "deepcopy": lambda: gradients(twin, twin),
        "compiled": lambda: gradients(
            model, torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
        ),
    }
    for way, run in ways.items():
        for name, found in run().items():
            torch.testing.assert_close(found, expected[name], msg=f"{way} {name}")


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_autocast_stays_near_float32(options):
    model, x = adapted(init_weights=False, **options).float(), X.float()
    exact, expected = model(x), gradients(model, model, x)
    with torch.autocast("cpu", torch.bfloat16):
        out, found = model(x), gradients(model, model, x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=5e-2, atol=5e-2 * float(exact.abs().max()))
    size = max(float(one.norm()) for one in expected.values())
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32 and float((gradient - expected[name]).norm()) < 5e-2 * size, name
