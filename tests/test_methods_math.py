"""The methods that are ours, or driven by us, against PEFT's own way or a computation beside it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from torch import nn

from methods.adapter import NAME, Passes, adapted_layers, make_adapter
from methods.options import Option
from methods.registry import METHODS, resolve
from methods.update import Update, measured_update

STEPS = 4


class Attention(nn.Module):
    """Two layers by names that the UNet's methods adapt, and a loss in its output as transformers' models have it."""

    def __init__(self, widths=(12, 10, 8)) -> None:
        super().__init__()
        first, middle, last = widths
        self.attn = nn.ModuleDict({"to_q": nn.Linear(first, middle), "to_k": nn.Linear(middle, last)})

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        output = self.attn["to_k"](torch.tanh(self.attn["to_q"](x)))
        return SimpleNamespace(output=output, loss=(output - 1).square().mean())


@pytest.fixture
def model() -> Attention:
    torch.manual_seed(0)
    return Attention().requires_grad_(False)


X = torch.randn(16, 12, generator=torch.Generator().manual_seed(5))


def adapted(name: str, model: nn.Module, *arguments: str, total_steps: int = STEPS):
    torch.manual_seed(1)
    adapter = make_adapter(name, resolve(name, arguments, {}), seed=0, total_steps=total_steps)
    adapter.check_fits("unet", model)
    adapter.inject("unet", model, Passes(lambda passes: model(X), lambda: model(X), "", ""))
    return adapter


def learning(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(adapter, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    for step in range(steps):
        adapter.before_step(step)
        loss, penalty = model(X).loss, adapter.penalty()
        (loss if penalty is None else loss + penalty).backward()
        adapter.before_update()
        optimizer.step()
        adapter.after_update(step + 1)
        optimizer.zero_grad()


# --- PiSSA, OLoRA: the base keeps its bits, and learning is PEFT's own ------------------------------------------------


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize("arguments", [["rank=3"], ["rank=3", "alpha=6"]], ids=["scale 1", "scale 2"])
def test_it_learns_as_peft_s_own_which_changes_the_base(model, name, arguments):
    theirs = copy.deepcopy(model)
    alpha = 6 if len(arguments) > 1 else 3
    config = LoraConfig(r=3, lora_alpha=alpha, init_lora_weights=name, target_modules=["to_q", "to_k"])
    theirs = get_peft_model(theirs, config)
    before = copy.deepcopy(model.state_dict())
    adapter = adapted(name, model, *arguments)
    train(adapter, model, torch.optim.SGD(learning(model), lr=0.1))
    optimizer = torch.optim.SGD(learning(theirs), lr=0.1)
    for _ in range(STEPS):
        theirs(X).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(model(X).output, theirs(X).output, atol=1e-5, rtol=1e-5)
    for key, value in before.items():
        layer, _, kind = key.rpartition(".")
        assert torch.equal(getattr(model.get_submodule(layer).get_base_layer(), kind), value)


# --- MoSLoRA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kaiming", "orthogonal"])
def test_the_mixer_stands_between_the_factors(model, init):
    adapted("moslora", model, "rank=3", "alpha=6", f"mixer_init={init}")
    layer = model.attn["to_q"]
    with torch.no_grad():
        layer.lora_B[NAME].weight.normal_()
    A = layer.lora_A[NAME].parametrizations.weight.original
    M = layer.lora_A[NAME].parametrizations.weight[0].mixer
    expected = layer.base_layer(X) + 2 * X @ A.T @ M.T @ layer.lora_B[NAME].weight.T
    torch.testing.assert_close(layer(X), expected)
    layer(X).sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in (A, M, layer.lora_B[NAME].weight))
    if init == "orthogonal":
        torch.testing.assert_close(M @ M.T, torch.eye(3), atol=1e-6, rtol=0)
    else:
        assert float(M.detach().abs().max()) <= 3**-0.5


# --- DyLoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_step_sees_the_first_components_at_their_own_scale(model, frozen, count):
    adapter = adapted("dylora", model, "rank=4", "alpha=8", f"frozen={frozen}")
    layer = model.attn["to_q"]
    A, B = (side[NAME].parametrizations.weight.original for side in (layer.lora_A, layer.lora_B))
    with torch.no_grad():
        B.normal_()
    adapter.use(count)
    expected = layer.base_layer(X) + 8 / count * X @ A[:count].T @ B[:, :count].T
    torch.testing.assert_close(layer(X), expected)
    layer(X).square().sum().backward()
    moved = A.grad.abs().sum(dim=1) > 0
    assert torch.equal(moved, B.grad.abs().sum(dim=0) > 0)
    assert moved.tolist() == [(i == count - 1) if frozen else (i < count) for i in range(4)]


def test_the_drawn_rank_is_a_function_of_seed_and_step(model):
    adapter = adapted("dylora", model, "rank=4")
    first = model.attn["to_q"].lora_A[NAME].parametrizations.weight[0]
    second = model.attn["to_k"].lora_B[NAME].parametrizations.weight[0]

    def draw(step: int) -> int:
        adapter.before_step(step)
        assert first.count == second.count  # the same in all layers
        return first.count

    drawn = [draw(step) for step in range(400)]
    assert drawn[:20] == [draw(step) for step in range(20)]
    counts = [drawn.count(rank) for rank in (1, 2, 3, 4)]
    assert sum(counts) == 400 and all(70 < count < 130 for count in counts)  # 100 ± 3.5 standard deviations
    adapter.after_update(400)
    assert first.count is None


def test_files_of_fewer_components_have_these_alone_at_their_scale(model):
    adapter = adapted("dylora", model, "rank=4", "alpha=8", "save_rank=2")
    layer = model.attn["to_q"]
    A, B = (side[NAME].parametrizations.weight.original for side in (layer.lora_A, layer.lora_B))
    with torch.no_grad():
        B.normal_()
    update = dict(adapter.updates("unet"))["attn.to_q"]
    assert update.rank == 2
    torch.testing.assert_close(update.weight(), 8 / 2 * B[:, :2] @ A[:2])


# --- LoRA-FA ----------------------------------------------------------------------------------------------------------


def test_the_gradient_is_the_update_nearest_to_full_fine_tuning(model):
    """min over g of ‖s g A − G‖_F, by least squares; G is the gradient of W."""
    adapter = adapted("lora-fa", model, "rank=3", "alpha=6")
    layer = model.attn["to_q"]
    A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    x, g = X, torch.randn(16, 10, generator=torch.Generator().manual_seed(2))
    (layer(x) * g).sum().backward()
    adapter.before_update()
    G = g.T @ x  # (m, n)
    expected = torch.linalg.lstsq(2 * A.detach().T, G.T).solution.T
    torch.testing.assert_close(B.grad, expected, atol=1e-4, rtol=1e-4)
    assert A.grad is None and not A.requires_grad


def test_it_learns_as_peft_s_optimizer_does(model):
    theirs = copy.deepcopy(model)
    adapter = adapted("lora-fa", model, "rank=3", "alpha=6")
    config = LoraConfig(r=3, lora_alpha=6, init_lora_weights="gaussian", target_modules=["to_q", "to_k"])
    torch.manual_seed(1)
    theirs = get_peft_model(theirs, config)
    optimizer = create_lorafa_optimizer(theirs, r=3, lora_alpha=6, lr=0.01)
    for _ in range(STEPS):
        theirs(X).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    train(adapter, model, torch.optim.Adam(learning(model), lr=0.01, eps=1e-6))
    # theirs multiplies in bfloat16 where the machine has it
    torch.testing.assert_close(model(X).output, theirs(X).output, atol=3e-3, rtol=3e-2)


# --- AdaLoRA ----------------------------------------------------------------------------------------------------------


def test_allocator_and_penalty_are_peft_s_on_a_model_with_a_loss(model):
    theirs = copy.deepcopy(model)
    arguments = "init_rank=4", "target_rank=2", "tinit=1", "tfinal=2"
    adapter = adapted("adalora", model, *arguments, total_steps=8)
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1, lora_alpha=4, total_step=8, target_modules=["to_q", "to_k"]
    )
    torch.manual_seed(1)
    theirs = get_peft_model(theirs, config)
    optimizer = torch.optim.AdamW(learning(theirs), lr=0.05)
    for step in range(8):
        theirs.base_model(X).loss.backward()  # PEFT adds the penalty in here
        optimizer.step()
        theirs.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    train(adapter, model, torch.optim.AdamW(learning(model), lr=0.05), steps=8)
    torch.testing.assert_close(model(X).output, theirs.base_model.model(X).output, atol=1e-6, rtol=1e-5)
    ranks = [update.rank for _, update in adapter.updates("unet")]
    assert sum(ranks) == 4 and set(ranks) != {4}  # the budget, 2 a layer in the mean


def test_a_restored_allocator_goes_on_as_the_one_that_was_never_stopped(model):
    arguments = "init_rank=4", "target_rank=2", "interval=2"
    stopped = copy.deepcopy(model)
    whole = adapted("adalora", model, *arguments, total_steps=8)
    train(whole, model, torch.optim.SGD(learning(model), lr=0.5), steps=8)

    first = adapted("adalora", stopped, *arguments, total_steps=8)
    train(first, stopped, torch.optim.SGD(learning(stopped), lr=0.5), steps=5)
    state, tensors = copy.deepcopy(first.state_dict()), copy.deepcopy(stopped.state_dict())
    torch.manual_seed(0)
    again = Attention().requires_grad_(False)
    second = adapted("adalora", again, *arguments, total_steps=8)
    again.load_state_dict(tensors)
    second.load_state_dict(state)
    optimizer = torch.optim.SGD(learning(again), lr=0.5)
    for step in range(5, 8):
        (again(X).loss + second.penalty()).backward()
        optimizer.step()
        second.after_update(step + 1)
        optimizer.zero_grad()
    assert torch.equal(again(X).output, model(X).output)


# --- updates ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 6), st.booleans())
@settings(max_examples=30, deadline=None)
def test_any_linear_map_is_measured_whole(m, n, bias):
    torch.manual_seed(m * 10 + n)
    base, other = nn.Linear(n, m, bias=bias), nn.Linear(n, m, bias=bias)
    update = measured_update(other, base)
    x = torch.randn(3, n)
    found = base(x) + x @ update.weight().T + (0 if update.bias is None else update.bias)
    torch.testing.assert_close(found, other(x), atol=1e-5, rtol=1e-5)
    assert update.rank == min(m, n) and update.is_finite()


def test_a_dense_update_of_a_convolution_is_exact():
    delta = torch.randn(6, 4, 3, 3)
    for one in (delta, delta[:, :, :1, :1], torch.randn(30, 2, 3, 3)):
        assert torch.equal(Update.dense(one).weight(), one)


# --- the registry -----------------------------------------------------------------------------------------------------


REFUSED = {
    "unknown": ("lokx", [], {}, r"--method lokx is not known .did you mean lokr\?.: choose one of nora, lora"),
    "another's": ("lora", ["factor=8"], {}, "--method lora has rank, alpha, dropout, lr_ratio"),
    "another's flag": (
        "lokr",
        [],
        {"outer_rank": 64},
        "--outer_rank 64 is an option of NoRA and NOLA-NoRA: leave it out",
    ),
    "no value": ("lora", ["rank"], {}, "--method_args rank must look like rank=8"),
    "no number": ("lora", ["rank=four"], {}, "--method_args rank=four must be a whole number"),
    "half a number": ("lora", ["rank=4.5"], {}, "rank=4.5 must be a whole number"),
    "not finite": ("lora", ["alpha=nan"], {}, "alpha=nan must be a finite number"),
    "too small": ("vera", ["rank=0"], {}, "rank=0 must be at least 1"),
    "too large": ("lora", ["dropout=1"], {}, "dropout=1 must be at least 0 and below 1"),
    "no choice": ("nora", ["outer_init=qr"], {}, "outer_init=qr is not known: choose one of awsvd, svd, random"),
    "no boolean": ("lokr", ["decompose_both=maybe"], {}, "decompose_both=maybe must be true or false"),
    "twice": ("lora", ["rank=4"], {"rank": 8}, "rank is given twice, as 8 too"),
    "twice in a row": ("lora", ["rank=4", "rank=5"], {}, "rank is given twice, as 4 too"),
    "odd reflections": ("hra", ["rank=3"], {}, "rank=3 must be even"),
    "no rank to take": ("adalora", ["target_rank=12"], {}, "target_rank=12 must be below init_rank=12"),
    "more than there is": ("dylora", ["save_rank=9"], {}, "save_rank=9 exceeds rank=4"),
    "inside out": ("nora", ["rank=64"], {"outer_rank": 32}, "--rank 64 exceeds --outer_rank 32"),
    "idle": ("nora", ["inner_std=1"], {}, "--inner_std 1.0 has no effect with matched"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_can_t_be_meant_are_refused(case):
    name, arguments, flags, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        resolve(name, arguments, flags)


def test_flags_of_before_and_arguments_say_the_same():
    by_flag = resolve("nora", [], {"preset": "paper", "rank": 24, "lora_alpha": 12, "lora_dropout": 0.1})
    by_argument = resolve("nora", ["preset=paper", "rank=24", "alpha=12", "dropout=0.1"], {})
    assert by_flag == by_argument and by_flag["outer_rank"] == 64 and by_flag["inner_init"] == "normal"


@pytest.mark.parametrize("name", METHODS)
def test_every_option_takes_its_own_default_in_words(name):
    for option in METHODS[name].options:
        assert isinstance(option, Option) and option.help.endswith(".")
        assert option.parse(str(option.default), option.name) == option.default


LIMITS = {
    "oft": (["block_size=5"], "block_size=5 does not divide the 12 inputs of attn.to_q"),
    "hra": (["rank=14"], "--rank 14 exceeds the 12 inputs of attn.to_q"),
    "fourierft": (["n_frequency=121"], "n_frequency=121 exceeds the 120 entries of attn.to_q"),
    "adalora": (["init_rank=11", "target_rank=2"], r"init_rank=11 exceeds min\(out, in\)=10 at attn.to_q"),
    "lora": (["rank=11"], r"--rank 11 exceeds min\(out, in\)=10 at attn.to_q"),
    "pissa": (["rank=9"], r"--rank 9 exceeds min\(out, in\)=8 at attn.to_k"),
    "nora": (["rank=4", "outer_rank=11"], "outer_r=11 exceeds"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_what_a_layer_can_t_hold_is_refused_by_its_name(model, name):
    arguments, words = LIMITS[name]
    with pytest.raises(ValueError, match=f"^unet: .*{words}"):
        adapted(name, model, *arguments)
    assert not adapted_layers(model)


def test_a_run_too_short_to_take_rank_away_is_refused(model):
    with pytest.raises(ValueError, match="tinit=3 and tfinal=1 leave none of the 4 steps"):
        adapted("adalora", model, "init_rank=4", "target_rank=2", "tinit=3", "tfinal=1")
