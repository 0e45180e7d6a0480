"""What a run records of itself: memory, and a card that survives what users write."""

import ast
import re

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.registry import METHODS
from runs.card import card_text, code, one_line, plain
from runs.record import PeakMemory


def take(megabytes):
    np.ones(megabytes * 10**6, dtype=np.uint8)


def test_the_peak_is_the_trainings_and_not_that_of_the_looks_between_its_steps():
    earlier = PeakMemory(torch.device("cpu"))
    take(600)
    peak = earlier.megabytes
    if PeakMemory(torch.device("cpu")).megabytes > peak - 300:
        pytest.skip("this system can't forget a peak")
    memory = PeakMemory(torch.device("cpu"))
    start = memory.megabytes
    take(300)
    with memory.pause():
        take(600)
    assert start + 250 < memory.megabytes < start + 450


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_peak_of_a_gpu_leaves_pauses_out():
    memory = PeakMemory(torch.device("cuda"))
    start = memory.megabytes
    with memory.pause():
        torch.ones(200_000_000, dtype=torch.uint8, device="cuda")
    assert memory.megabytes == pytest.approx(start, abs=1)
    torch.ones(100_000_000, dtype=torch.uint8, device="cuda")
    assert memory.megabytes > start + 90


# --- the card ---------------------------------------------------------------------------------------------------------


def card_of(prompt, base="base", words=None, method="lora", files=("pytorch_lora_weights.safetensors",)):
    config = {
        "instance_prompt": prompt,
        "pretrained_model_name_or_path": base,
        "with_prior_preservation": False,
        "max_train_steps": 1,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "rank": 4,
    }
    record = {
        "method": method,
        "config": config,
        "new_words": words or {},
        "num_processes": 1,
        "trainable_parameters": 10,
        "outer_ranks": [],
        "files": dict.fromkeys(files, 10),
    }
    return card_text(record, [(prompt, "samples/a.png")])


def check_card(text, prompt, base):
    assert ModelCard(text).data.instance_prompt == one_line(prompt) and ModelCard(text).data.base_model == base
    python = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1]
    values = [node.value for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Constant)]
    assert prompt in values and base in values
    (row,) = [line for line in text.split("\n") if line.endswith("(samples/a.png) |")]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3  # cells: neither more nor fewer
    (title,) = [line for line in text.split("\n") if line.startswith("# ") and " adapter: " in line]
    assert not re.search(r"(?<!\\)(?:\\\\)*[<`*_]", title)


NASTY = {
    "quotes": 'a "quoted" photo of [V] cat\'s "toy"',
    "backslash at the end": "a [V] cat \\",
    "a newline": 'a cat\n---\nlicense: "x"\n',
    "a fence": "a ``` cat\n```\nimport os",
    "html": "<script>alert(1)</script> &copy; <!-- [V]",
    "a link": "[click](http://e.vil) ![x](y) [a][b]",
    "yaml": "- {a: b} # no: 'x' %TAG & *",
    "jinja": "{{ record }} {% raw %}",
    "table": "a | b \\| c \\\\| d",
    "separators": "a\u2028b\x85c\u2029d",
    "emoji": "a \U0001f600 [V] cat",
}


@pytest.mark.parametrize("case", NASTY)
def test_a_card_survives_the_prompt(case):
    check_card(card_of(NASTY[case], base="C:\\my `base`"), NASTY[case], "C:\\my `base`")


@pytest.mark.parametrize("method", METHODS)
def test_a_card_names_its_method_and_how_its_files_are_loaded(method):
    lora_file = METHODS[method].low_rank
    files = ("pytorch_lora_weights.safetensors",) if lora_file else ("peft/unet/adapter_model.safetensors",)
    text = card_of("a [V] cat", method=method, files=files)
    assert f"# {METHODS[method].title} adapter: a [V] cat" in text
    assert ("load_lora_weights" in text) == lora_file and ("load_adapter(" in text) != lora_file


def test_a_readable_prompt_stays_readable_in_the_card():
    text = card_of("a photo of [V] cat")
    assert "adapter: a photo of [V] cat" in text and 'pipeline("a photo of [V] cat")' in text
    assert "\n\n## Use\n\n" in text


def test_the_card_says_a_new_words_tokens_as_a_whole_word():
    text = card_of("a sks cat on desks", words={"sks": "<sks0><sks1>"})
    assert 'pipeline("a <sks0><sks1> cat on desks")' in text
    assert ModelCard(text).data.instance_prompt == "a <sks0><sks1> cat on desks"


@settings(max_examples=100, deadline=None)
@given(prompt=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=30))
def test_a_card_survives_any_prompt(prompt):
    if prompt.strip():
        check_card(card_of(prompt), prompt, "base")


def test_markdown_of_users_texts():
    assert plain("a|b\n`c` <d> *e* _f_") == "a\\|b \\`c\\` \\<d\\> \\*e\\* \\_f\\_"
    assert code("a`b") == "`` a`b ``" and code("a") == "`a`"
