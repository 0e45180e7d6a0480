"""The frozen factors by subspace iteration: as much of W as the exact SVD, the same everywhere; older files' own."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from nora_models import MLP, config_for, seeded
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from nora import NoraConfig, load_inner, save_inner
from nora.functional import FINGERPRINT_TOLERANCE, fingerprint, iterated_factors, outer_factors, sketch_distance
from nora.nested import left_factor

BASE = Path(__file__).parent.parent / "assets" / "tiny-sdxl"


def energy(W, S, A):
    """Of W S in the row space of A S, by NumPy, as a share of what the best subspace of that rank has."""
    Q = np.linalg.qr((A.double() * S).T.numpy())[0]
    M = (W.double() * S).numpy()
    best = np.linalg.svd(M, compute_uv=False)[: A.shape[0]]
    return float(np.square(M @ Q).sum() / np.square(best).sum())


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(40, 60), (60, 40), (50, 50)]),
    r=st.integers(1, 20),
    fall=st.floats(0.2, 2.0),
    side=st.sampled_from(["B", "A", "both"]),
    seed=st.integers(0, 99),
)
def test_it_captures_what_the_svd_does(shape, r, fall, side, seed):
    draws = np.random.RandomState(seed)
    left, right = (np.linalg.qr(draws.standard_normal((side_, 40)))[0] for side_ in shape)
    W = torch.from_numpy((left * np.arange(1, 41) ** -fall) @ right.T).float()
    S = torch.from_numpy(0.3 + np.abs(draws.standard_normal(shape[1])))
    A, B = iterated_factors(W, r, S, side)
    assert energy(W, S, A) > 0.995
    exact = outer_factors(W, r, S, side)
    for one, other in ((A, exact.A), (B, exact.B)):
        assert float(one.norm()) == pytest.approx(float(other.norm()), rel=0.02)
    torch.testing.assert_close(B @ A @ torch.linalg.pinv(A.double()).float(), B, rtol=1e-4, atol=1e-5)
    if shape[0] < shape[1]:
        A, B = iterated_factors(W, r, S, side, "output")
        torch.testing.assert_close(left_factor(B) @ W, A, rtol=1e-3, atol=1e-4 * float(A.abs().max()))


def attention_weights(model):
    ends = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
    return [m.weight.detach() for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.endswith(ends)]


def test_energy_on_every_layer_of_the_embedded_base():
    """At half, a quarter and an eighth of each side: .998 of the optimum in the mean, .99 in the worst layer."""
    models = [
        UNet2DConditionModel.from_pretrained(BASE, subfolder="unet"),
        CLIPTextModel.from_pretrained(BASE, subfolder="text_encoder"),
        CLIPTextModelWithProjection.from_pretrained(BASE, subfolder="text_encoder_2"),
    ]
    weights = [weight.float() for model in models for weight in attention_weights(model)]
    assert len(weights) == 112
    shares = []
    for W in weights:
        wide = (W if W.shape[0] < W.shape[1] else W.T).double()
        squares = torch.linalg.eigvalsh(wide @ wide.T).flip(0)
        for part in (2, 4, 8):
            r = max(4, min(W.shape) // part)
            Q = torch.linalg.qr(iterated_factors(W, r).A.double().T)[0]
            shares.append(float((W.double() @ Q).square().sum() / squares[:r].sum()))
    assert np.mean(shares) >= 0.998 and min(shares) >= 0.99, (np.mean(shares), min(shares))


def test_rounding_moves_it_far_less_than_the_fingerprints_tolerance():
    """Neighbouring values turn exact singular vectors; a fixed number of steps from a fixed start stays put."""
    draws = np.random.RandomState(0)
    W = torch.from_numpy(draws.standard_normal((200, 160)) / 12).float()
    nudged = W * (1 + 2e-7 * torch.from_numpy(draws.standard_normal(W.shape)).float())
    one, other = (fingerprint(W, iterated_factors(w, 40)) for w in (W, nudged))
    assert max(sketch_distance(a, b) for a, b in zip(one, other)) < FINGERPRINT_TOLERANCE / 5


@pytest.mark.parametrize("shape, r", [((20, 30), 15), ((64, 64), 60)])
def test_a_subspace_that_is_nearly_all_is_the_exact_one(shape, r):
    W = torch.from_numpy(np.random.RandomState(0).standard_normal(shape)).float()
    for one, other in zip(iterated_factors(W, r), outer_factors(W, r)):
        assert torch.equal(one, other)


def test_rank_deficient_weights_take_the_exact_way():
    W = torch.from_numpy(np.random.RandomState(0).standard_normal((60, 3))).float()
    W = W @ torch.from_numpy(np.random.RandomState(1).standard_normal((3, 50))).float()
    for one, other in zip(iterated_factors(W, 8), outer_factors(W, 8)):
        assert torch.equal(one, other) and bool(torch.isfinite(one).all())


@pytest.mark.parametrize("choice, before", [("basis", "exact"), ("side", "input")])
def test_files_from_before_a_choice_keep_their_factors(tmp_path, choice, before):
    """Their configs don't name it: exact and on the input those were, and so they draw what they drew."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 48, bias=False))
    config = config_for(["0"], r=4, outer_r=16, outer_init="svd", init_weights=False, **{choice: before})
    model = get_peft_model(copy.deepcopy(base), config)
    save_inner(tmp_path / "new.safetensors", {"model": model.base_model.model})
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        header = file.metadata()
    configs = json.loads(header["nora_config"])
    assert configs["model"].pop(choice) == before
    header["nora_config"] = json.dumps(configs)
    save_file(load_file(tmp_path / "new.safetensors"), tmp_path / "old.safetensors", header)
    loaded, x = copy.deepcopy(base), seeded(5, 64)
    load_inner(tmp_path / "old.safetensors", {"model": loaded})
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_new_config_iterates_and_a_saved_one_says_so(tmp_path):
    assert NoraConfig(target_modules=["a"]).basis == "iterated"
    assert NoraConfig(target_modules=["a"], saved=True, outer_init="svd").basis == "exact"
    model = get_peft_model(MLP(), config_for(["lin0"], outer_init="svd"))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["basis"] == "iterated"
