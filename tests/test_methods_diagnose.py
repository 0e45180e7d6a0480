"""The diagnosis against NumPy, and its command on a base."""

import json

import numpy as np
import pytest
import torch
from test_trainer import run
from tiny_sdxl import saved_base

from methods import diagnose
from methods.update import Update

M, N, R = 14, 18, 5


@pytest.fixture(scope="module")
def layer():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(N, 400)) * np.exp(draw.normal(size=(N, 1)))
    W, dW = draw.normal(size=(M, N)), draw.normal(size=(M, 3)) @ draw.normal(size=(3, N))
    return W, X, dW


@pytest.mark.parametrize("part", diagnose.PARTS)
def test_output_error(layer, part):
    W, X, _ = layer
    scale = np.abs(X).mean(axis=1) ** 0.5
    A, right = diagnose.right_directions(torch.tensor(W), torch.tensor(scale), R)[part]
    found = diagnose.output_error(torch.tensor(W), A, right, torch.tensor(X @ X.T) / X.shape[1])
    if part == "random":
        P = np.linalg.pinv(A.numpy()) @ A.numpy()
    else:
        S = np.diag(scale if part != "SVD" else np.ones(N))
        _, _, Vt = np.linalg.svd(W @ S, full_matrices=False)
        rows = {"middle": slice((M - R) // 2, (M - R) // 2 + R), "last": slice(M - R, M)}.get(part, slice(0, R))
        P = S @ Vt[rows].T @ Vt[rows] @ np.linalg.inv(S)
    assert found == pytest.approx(np.linalg.norm((W - W @ P) @ X) / np.linalg.norm(W @ X), rel=1e-9)


def test_what_is_outside(layer):
    """By least squares over all B X A, and the truncated SVD of what is inside."""
    W, _, dW = layer
    A, right = diagnose.right_directions(torch.tensor(W), torch.ones(N, dtype=torch.float64), R)["SVD"]
    A, B = A.numpy(), W @ right.numpy()
    X = np.linalg.pinv(B) @ dW @ np.linalg.pinv(A)
    inside = B @ X @ A
    outside, missed = diagnose.shares_outside(torch.tensor(dW), torch.tensor(A), torch.tensor(B), 2)
    assert outside == pytest.approx(np.linalg.norm(dW - inside) ** 2 / np.linalg.norm(dW) ** 2, rel=1e-9)
    values = np.linalg.svd(inside, compute_uv=False)
    assert missed == pytest.approx(1 - (values[:2] ** 2).sum() / np.linalg.norm(dW) ** 2, rel=1e-9)
    own = B @ np.ones((R, 1)) @ np.ones((1, R)) @ A
    assert diagnose.shares_outside(torch.tensor(own), torch.tensor(A), torch.tensor(B), 1)[1] < 1e-9


def test_a_layer_with_its_own_update(layer):
    W, X, dW = layer
    seen = diagnose.Seen(torch.tensor(np.abs(X).mean(axis=1)), torch.tensor(X @ X.T) / X.shape[1])
    up, down = torch.tensor(dW).float(), torch.eye(N)
    found = diagnose.diagnose_layer("to_q", torch.tensor(W), seen, seen, R, 2, Update(up, down))
    assert found.errors["AwSVD"] < found.errors["random"] < 1.5 and found.errors["last"] > found.errors["AwSVD"]
    assert 0 < found.energy < 1 and 0 < found.outside <= found.missed < 1


def test_the_command(tmp_path, capsys):
    run(tmp_path / "lora", method="lora", rank=2, max_train_steps=2)
    capsys.readouterr()
    flags = ["--base", str(saved_base()), "--outer_rank", "6", "--rank", "2", "--output_dir", str(tmp_path / "out")]
    diagnose.main([*flags, "--lora", str(tmp_path / "lora")])
    assert "AwSVD's error / SVD's" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert {one["layer"].rpartition(".")[2] for one in found} == {"to_q", "to_k", "to_v", "0"}
    assert all(0 < one["outside"] < 1 and one["errors"]["AwSVD"] < one["errors"]["last"] for one in found)
    assert (tmp_path / "out" / "diagnosis.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_base(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        diagnose.main(["--base", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert end.value.code == 2 and "can't be loaded" in capsys.readouterr().err and not (tmp_path / "out").exists()
