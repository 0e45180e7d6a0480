"""What ``--method help`` and ``--method NAME --method_args help`` print."""

from __future__ import annotations

from methods.options import Method
from methods.registry import METHODS, find_method


def methods_help() -> str:
    """What ``--method help`` prints: a line a method."""
    width = max(map(len, METHODS))
    lines = [f"  {method.name:<{width}}  {method.title}: {method.formula}" for method in METHODS.values()]
    return "\n".join(
        [
            "Adapter methods (--method NAME; its options: --method NAME --method_args help):",
            *lines,
            "A run writes a PEFT folder, and a LoRA file where the update is a pair of factors; see docs/methods.md.",
        ]
    )


def method_help(name: str) -> str:
    """What ``--method NAME --method_args help`` prints: options with defaults, what a run writes, what it can't do."""
    method = find_method(name)
    lines = [f"{method.title} ({method.source}): {method.formula}", f"Starts at the base: {method.start}.", "Options:"]
    width = max(len(option.name) for option in method.options)
    for option in method.options:
        default = option.shown or (f"{option.default:g}" if isinstance(option.default, float) else option.default)
        choices = f" One of {', '.join(option.choices)}." if option.choices else ""
        flag = f" Also --{option.flag}." if option.flag else ""
        lines.append(f"  {option.name:<{width}}  {option.help}{choices} Default: {default}.{flag}")
    lines.append(f"Learning rate: {method.rates or '1e-4, as LoRA'}.")
    lines.append(f"Writes: {written(method)}.")
    text = f"no: {method.no_text_encoders}" if method.no_text_encoders else "yes, with --train_text_encoder"
    lines.append(f"Text encoders: {text}.")
    lines += [f"Can't: {limit}." for limit in method.limits]
    return "\n".join(lines)


def written(method: Method) -> str:
    """The adapter files of a run, in words."""
    files = ["a PEFT folder (peft/)"]
    if method.low_rank or method.name == "dora":
        files.append("a LoRA file (pytorch_lora_weights.safetensors)")
    if method.adapter == "methods.nora:Nora":
        files.append("the inner factors alone (nora_inner_weights.safetensors)")
    if not method.low_rank:
        files.append("with --convert_to_lora RANK an approximate LoRA file")
    return ", ".join(files)
