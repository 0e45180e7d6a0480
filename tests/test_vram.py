"""What a run needs, from SDXL's own shape and nothing else, and what --vram makes of it."""

import pytest
import torch
from accelerate import init_empty_weights
from test_trainer import run

from benchmarks import cards
from benchmarks.gpu import LORA_16
from benchmarks.sdxl_shape import build_unet
from inference.base import attention_line
from methods.adapter import Places, make_adapter
from methods.registry import METHODS, resolve
from settings.learning import HardwareOptions
from settings.training import TrainConfig
from trainer import vram
from trainer.vram import RunShape, adapter_settings, candidates, fit_card, need

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def unet():
    with init_empty_weights():
        return build_unet("full")


def shape(unet, method="lora", batch_size=1, pixels=1024, places=None, **args):
    adapter = make_adapter(method, resolve(method, [], {}) | args, places=places)
    latents = (pixels // 8, pixels // 8)
    return RunShape({"unet": unet}, ["unet"], adapter, batch_size, latents, 77, torch.float16)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_counted(unet, method):
    (found,) = adapter_settings(shape(unet, method))
    assert 0 < found.parameters < 2e9


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


def test_settings_follow_from_what_is_needed(unet, monkeypatch):
    """Each card gets the first settings that fit, in the order of their price; all is from the shape."""
    known = {}

    def once(one, hardware):
        return known.setdefault((hardware.replace(vram=None), one.batch_size), need(one, hardware))

    monkeypatch.setattr(vram, "need", once)
    one = shape(unet, rank=16)
    chosen = {}
    for card in ("8", "12", "16", "24"):
        hardware, said = fit_card(HardwareOptions(vram=card), one, CPU)
        chosen[card] = hardware
        budget = int(card) * 2**30 - 1.5 * 2**30
        assert known[hardware.replace(vram=None), 1].total <= budget, said
        cheaper = [other for other, _ in candidates(HardwareOptions())]
        for other in cheaper[: cheaper.index(hardware.replace(vram=None))]:
            assert known[other, 1].total > budget
    assert chosen["24"].selective_checkpointing == "none" and not chosen["24"].gradient_checkpointing
    assert chosen["8"].gradient_checkpointing and chosen["8"].quantize_base == "none"
    assert chosen["12"].selective_checkpointing != "none"
    # the computed table of docs/performance.md, which PEFT's own LoRA was put in for
    lora = cards.need(cards.unet_without_numbers("full", LORA_16), 1024, "none")
    plain = known[HardwareOptions(quantize_base="none"), 1]
    assert plain.total == pytest.approx(lora.weights + lora.learning + lora.activations, rel=0.06)


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
    with pytest.raises(ValueError, match="--low_vram sets all that --vram chooses from: leave one out"):
        TrainConfig.of(**flags, low_vram=True, vram="8")
