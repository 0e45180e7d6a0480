"""What a user of the installed package runs, outside the checkout: `python package_client.py FOLDER`."""

import copy
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import nora


def mlp():
    return (
        nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)),
        ["0", "2"],
        lambda m, x: m(x),
        torch.randn(5, 16),
    )


def clip_text():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = CLIPTextModel(CLIPTextConfig(vocab_size=99, max_position_embeddings=16, **sizes))
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    return model, targets, lambda m, x: m(x).last_hidden_state, torch.randint(0, 98, (2, 7))


def use(build, folder: Path) -> None:
    """Calibrate, train a step, save and load in both formats, fold."""
    torch.manual_seed(0)
    model, targets, run, x = build()
    base = copy.deepcopy(model.eval())
    config = nora.NoraConfig(r=2, target_modules=targets)
    nora.preprocess_nora(model, config, lambda: run(model, x))
    model = get_peft_model(model, config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    run(model, x).square().mean().backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        trained, before = run(model, x), run(base, x)
        assert (trained - before).abs().max() > 1e-4
        model.save_pretrained(folder / "peft")
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder / "peft").eval()
        assert torch.equal(run(loaded, x), trained)
        nora.save_inner(folder / "inner.safetensors", {"model": model.get_base_model()})
        inner = copy.deepcopy(base)
        nora.load_inner(folder / "inner.safetensors", {"model": inner})
        torch.testing.assert_close(run(inner.eval(), x), trained)
        folded = nora.fold_nora(model)
        for name in {key.rpartition(".lora_")[0] for key in folded}:
            delta = folded[f"{name}.lora_B.weight"] @ folded[f"{name}.lora_A.weight"]
            base.get_submodule(name).weight.data += delta
        torch.testing.assert_close(run(base, x), trained, atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    for build in (mlp, clip_text):
        use(build, Path(sys.argv[1]) / build.__name__)
    print(nora.__version__, Path(nora.__file__).parent)
