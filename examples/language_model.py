"""NoRA on a causal language model with plain PEFT, beside LoRA, DoRA, VeRA and LoRA-XS.

    OMP_NUM_THREADS=2 python -m examples.language_model                  # minutes, no download
    python -m examples.language_model --pretrain_steps 30 --steps 5 --seeds 0

A small Llama (3.3 million parameters, bytes for tokens) learns Python's own reference manual, which Python ships; then
each method adapts its seven projections, as the paper's Table 1 does (arXiv 2408.10280), to Python's source code. The
trained parameters stand to each other as in that table: LoRA-XS and NoRA the same r² a layer, VeRA about as many,
LoRA of rank 1 twice, DoRA thrice. Each method's learning rate is the best of three or four on source files for
validation; the table has the perplexity a byte on other files.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import math
import pydoc_data.topics
import statistics
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import nora

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WIDTH, CONTEXT, BATCH = 256, 64, 8
RANK = 20  # of the frozen factors: a thirteenth of the width, which meets the table's ratios (there 64 of 4096)


class Texts(NamedTuple):
    """Bytes (N,) of each split."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor


class Method(NamedTuple):
    config: PeftConfig | None  # None: every weight is trained
    rates: tuple[float, ...]


def methods() -> dict[str, Method]:
    """Rates around each one's best on the validation split, so that none of the best is at an end."""
    lora = LoraConfig(r=1, lora_alpha=1, target_modules=PROJECTIONS)
    wide = LoraConfig(r=16, lora_alpha=16, target_modules=PROJECTIONS)
    dora = LoraConfig(r=1, lora_alpha=1, use_dora=True, target_modules=PROJECTIONS)
    vera = VeraConfig(r=WIDTH // 4, vera_dropout=0.0, target_modules=PROJECTIONS)
    lora_xs = nora.NoraConfig(r=RANK, structure="adapter", outer_init="svd", sigma_side="A", target_modules=PROJECTIONS)
    own = nora.NoraConfig(r=RANK // 2, outer_r=RANK, target_modules=PROJECTIONS)
    return {
        "full fine-tuning": Method(None, (1e-4, 3e-4, 1e-3)),
        "LoRA, rank 16": Method(wide, (1e-3, 3e-3, 1e-2, 3e-2)),
        "LoRA, rank 1": Method(lora, (3e-3, 1e-2, 3e-2, 1e-1)),
        "DoRA, rank 1": Method(dora, (3e-3, 1e-2, 3e-2, 1e-1)),
        f"VeRA, rank {WIDTH // 4}": Method(vera, (1e-2, 3e-2, 1e-1, 3e-1)),
        f"LoRA-XS, rank {RANK}": Method(lora_xs, (1e-3, 3e-3, 1e-2, 3e-2)),
        f"NoRA ({RANK}, {RANK // 2})": Method(own, (3e-4, 1e-3, 3e-3, 1e-2)),
    }


def as_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def manual() -> torch.Tensor:
    return as_bytes("\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())))


def source_code(limit: int = 120_000) -> Texts:
    """Modules of the standard library, every module in one split alone."""
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for number, file in enumerate(file for file in files if not file.name.startswith("_")):
        name = {0: "validation", 1: "test"}.get(number % 5, "train")
        splits[name].append(file.read_text(encoding="utf-8"))
    return Texts(*(as_bytes("\n".join(found))[:limit] for found in splits.values()))


def new_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=WIDTH,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
        )
    )


def batch_of(text: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=generator)
    tokens = torch.stack([text[start : start + CONTEXT] for start in starts.tolist()])
    return {"input_ids": tokens, "labels": tokens}


def train(model: torch.nn.Module, text: torch.Tensor, steps: int, rate: float, seed: int) -> None:
    """AdamW with a cosine that falls to 0."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = model(**batch_of(text, generator)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def perplexity(model: torch.nn.Module, text: torch.Tensor, batches: int = 12) -> float:
    """A byte's, over the same pieces each time."""
    generator = torch.Generator().manual_seed(1234)
    losses = [model(**batch_of(text, generator)).loss.item() for _ in range(batches)]
    return math.exp(statistics.mean(losses))


def adapted(base: LlamaForCausalLM, config: PeftConfig | None, text: torch.Tensor, seed: int) -> torch.nn.Module:
    """The base with fresh adapters. NoRA's frozen factors follow the activations of the new text."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    if config is None:
        return model
    config = copy.deepcopy(config)
    if isinstance(config, nora.NoraConfig) and config.needs_statistics:
        generator = torch.Generator().manual_seed(seed)
        nora.preprocess_nora(model, config, lambda: model(**batch_of(text, generator)))
    return get_peft_model(model, config)


def fine_tuned(
    base: LlamaForCausalLM, config: PeftConfig | None, text: torch.Tensor, steps: int, rate: float, seed: int
) -> torch.nn.Module:
    model = adapted(base, config, text, seed)
    train(model, text, steps, rate, seed)
    return model


def trained_parameters(model: torch.nn.Module) -> int:
    return sum(one.numel() for one in model.parameters() if one.requires_grad)


def run(pretrain_steps: int, steps: int, seeds: Sequence[int], names: Sequence[str] = ()) -> list[dict]:
    """A row a method: trained parameters, chosen rate, and test perplexities by seed."""
    torch.manual_seed(0)
    base, texts = new_model(), source_code()
    train(base, manual(), pretrain_steps, 2e-3, 0)
    rows = [{"method": "base", "trained": 0, "rate": None, "perplexities": [perplexity(base, texts.test)]}]
    for name, (config, rates) in methods().items():
        if names and name not in names:
            continue
        by_rate = {
            rate: perplexity(fine_tuned(base, config, texts.train, steps, rate, 100), texts.validation)
            for rate in rates
        }
        best = min(by_rate, key=by_rate.__getitem__)
        models = [fine_tuned(base, config, texts.train, steps, best, seed) for seed in seeds]
        found = [perplexity(model, texts.test) for model in models]
        rows.append({"method": name, "trained": trained_parameters(models[0]), "rate": best, "perplexities": found})
        print(f"{name}: {found}", flush=True)
    return rows


def table(rows: Sequence[dict]) -> str:
    lines = ["| method | trained | learning rate | perplexity a byte |", "|---|---|---|---|"]
    for row in rows:
        found = row["perplexities"]
        spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
        rate = f"{row['rate']:g}" if row["rate"] else "–"
        lines.append(f"| {row['method']} | {row['trained']:,} | {rate} | {statistics.mean(found):.3f}{spread} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").split("\n")[0])
    parser.add_argument("--pretrain_steps", type=int, default=1500, help="of the base, on the manual")
    parser.add_argument("--steps", type=int, default=100, help="of each method, on source code")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one training each")
    parser.add_argument("--methods", nargs="+", default=[], help="some of the table's rows alone")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.methods if name not in methods()]:
        parser.error(f"no method {unknown[0]!r}: choose of {', '.join(map(repr, methods()))}")
    print(table(run(args.pretrain_steps, args.steps, args.seeds, args.methods)))


if __name__ == "__main__":
    main()
