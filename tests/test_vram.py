"""What a run needs, from SDXL's own shape and nothing else, and what --vram makes of it."""

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from test_trainer import run
from tiny_sdxl import build_pipeline

from benchmarks.sdxl_shape import build_unet
from inference.base import attention_line
from methods.adapter import Places, make_adapter
from methods.registry import METHODS, resolve
from settings.learning import HardwareOptions
from settings.training import TrainConfig
from trainer import vram
from trainer.vram import RunShape, adapter_settings, candidates, fit_card, need

CPU = torch.device("cpu")
PERFORMANCE = (Path(__file__).parent.parent / "docs" / "performance.md").read_text()


@pytest.fixture(scope="module")
def unet():
    with init_empty_weights():
        return build_unet("full")


def shape(unet, method="lora", batch_size=1, pixels=1024, places=None, **args):
    adapter = make_adapter(method, resolve(method, [], {}) | args, places=places or Places())
    latents = (pixels // 8, pixels // 8)
    return RunShape({"unet": unet}, ["unet"], adapter, batch_size, latents, 77, torch.float16)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_counted(method):
    (found,) = adapter_settings(shape(build_pipeline().unet, method))
    assert found.parameters > 0


def test_ranks_of_some_layers_are_counted(unet):
    """LoRA: r (m + n) in each layer, written out."""
    places = Places("attention", {"down_blocks": 64})
    found = adapter_settings(shape(unet, places=places, rank=16))
    layers = {
        name: layer.weight.shape
        for name, layer in unet.named_modules()
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    }
    expected = sum((64 if "down_blocks" in name else 16) * (m + n) for name, (m, n) in layers.items())
    assert sum(one.parameters for one in found) == expected


def documented(method: int = 2) -> dict[str, float]:
    """Checkpointing -> GB at 1024 pixels, batch 1, of docs/performance.md's computed table; LoRA 16 is its last."""
    rows = [line.split("|") for line in PERFORMANCE.splitlines() if line.startswith("| 1024, 1 |")]
    return {cells[2].strip(): float(cells[2 + method]) for cells in rows}


def test_sdxl_needs_what_the_table_says(unet):
    """The table has PEFT's own LoRA of rank 16 put in, and this the method's count beside LoRA 1's activations."""
    found = need(shape(unet, rank=16), HardwareOptions(gradient_checkpointing=True))
    assert found.weights == 2 * sum(p.numel() for p in unet.parameters())
    assert found.total / 1e9 == pytest.approx(documented()["all"], rel=0.03)


def test_dearer_settings_need_less():
    one = shape(build_pipeline().unet, pixels=256, batch_size=8, rank=2)
    totals = [need(one, hardware).total for hardware, _ in candidates(HardwareOptions())]
    assert len(totals) == 5 and totals == sorted(totals, reverse=True) and len(set(totals)) == 5


def test_settings_follow_from_what_is_needed(monkeypatch):
    """SDXL's own needs, from the table: each card gets the cheapest settings that fit."""
    table = documented()

    def known(_, hardware):
        name = "all" if hardware.gradient_checkpointing else hardware.selective_checkpointing
        return vram.Need(int(table[name] * 1e9 / (2 if hardware.quantize_base == "int8" else 1)), 0, 0)

    monkeypatch.setattr(vram, "need", known)
    one, chosen = RunShape({}, [], None, 1, (128, 128), 77, torch.float16), {}
    for card in ("8", "12", "16", "24"):
        hardware, said = fit_card(HardwareOptions(vram=card), one, CPU)
        chosen[card] = (hardware.selective_checkpointing, hardware.gradient_checkpointing, hardware.quantize_base)
        assert f"a card of {card} GB, though no GPU is here, leaves" in said
        assert ("so --vram sets nothing" in said) == (int(card) > 12)
    assert chosen["16"] == chosen["24"] == ("none", False, "none")
    assert chosen["12"] == ("feed_forward", False, "none") and chosen["8"] == ("none", True, "none")
    table["all"] = 12.0
    assert fit_card(HardwareOptions(vram="8"), one, CPU)[0].quantize_base == "int8"


def test_flags_that_are_given_stay():
    given = HardwareOptions(selective_checkpointing="feed_forward", quantize_base="none")
    assert [(one.selective_checkpointing, one.quantize_base) for one, _ in candidates(given)] == [
        ("feed_forward", "none")
    ]
    asked = [one for one, _ in candidates(HardwareOptions(gradient_checkpointing=True))]
    assert all(one.gradient_checkpointing for one in asked) and asked[-1].quantize_base == "int8"
    assert all(one.quantize_base == "none" for one, _ in candidates(HardwareOptions(), may_quantize=False))


@pytest.mark.parametrize(("asked", "sets"), [(True, True), (False, False)])
def test_what_would_not_fit_is_said_with_the_flag_that_makes_it_fit(monkeypatch, asked, sets):
    needs = {False: vram.Need(5 * 2**30, 0, 20 * 2**30), True: vram.Need(5 * 2**30, 0, 2**30)}
    monkeypatch.setattr(vram, "need", lambda one, hardware: needs[hardware.gradient_checkpointing])
    monkeypatch.setattr(vram, "card_budget", lambda *_: ("this card", 8 * 2**30))
    one = RunShape({}, [], None, 4, (8, 8), 77, torch.float16)
    hardware, said = fit_card(HardwareOptions(vram="auto" if asked else None), one, CPU)
    assert hardware.gradient_checkpointing is sets
    assert ("--vram sets --gradient_checkpointing" if asked else "will not do: add --gradient_checkpointing") in said
    needs[True] = vram.Need(9 * 2**30, 0, 0)
    _, said = fit_card(HardwareOptions(vram="auto" if asked else None), one, CPU)
    assert "will not either: lower --resolution, or --train_batch_size" in said


def test_a_cpu_has_no_card(tmp_path, capsys):
    run(tmp_path / "run", method="lora", max_train_steps=1, vram="auto")
    said = capsys.readouterr().out
    assert "vram: no GPU is here, so --vram auto sets nothing" in said
    assert "attention: PyTorch's own (SDPA), on the cpu: no GPU is in use" in said
    assert "base: predicts noise (epsilon), as its scheduler's configuration says" in said
    assert fit_card(HardwareOptions(), None, CPU)[1] is None
    assert "whose memory-efficient kernels serve" in attention_line(torch.device("cuda"), xformers=False)
    flags = {"pretrained_model_name_or_path": "x", "instance_data_dir": "y", "instance_prompt": "z"}
    with pytest.raises(ValueError, match="--low_vram is --vram 8, and --vram 12 is given too: leave one out"):
        TrainConfig.of(**flags, low_vram=True, vram="12")


def test_low_vram_is_vram_8():
    flags = {"pretrained_model_name_or_path": "x", "instance_data_dir": "y", "instance_prompt": "z"}
    short, long = TrainConfig.of(**flags, low_vram=True), TrainConfig.of(**flags, vram="8")
    assert short.hardware.replace(low_vram=False) == long.hardware
