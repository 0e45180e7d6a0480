"""The examples, in a short form: they train what they say, and what they make is plain PEFT."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import CLIPModel, CLIPProcessor

from examples import few_shot_clip, language_model

CLIP = Path(__file__).parent.parent / "assets" / "tiny-clip"


@pytest.fixture(scope="module")
def texts():
    return language_model.source_code(4000)


@pytest.mark.parametrize("name", language_model.methods())
def test_each_method_learns_on_a_language_model(name, texts, tmp_path):
    torch.manual_seed(0)
    base = language_model.new_model()
    config, rates = language_model.methods()[name]
    model = language_model.adapted(base, config, texts.train, seed=0)
    before = language_model.perplexity(model, texts.train, batches=1)
    torch.testing.assert_close(before, language_model.perplexity(base, texts.train, batches=1), rtol=1e-4, atol=0)
    language_model.train(model, texts.train, 4, rates[1], 0)
    assert language_model.perplexity(model, texts.train, batches=1) < before
    if config is not None:  # by plain PEFT, on a base of its own
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        tokens = texts.test[None, :40]
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_trained_parameters_stand_as_in_the_papers_table():
    base = language_model.new_model()
    counts = {
        name: language_model.trained_parameters(language_model.get_peft_model(copy.deepcopy(base), config))
        for name, (config, _) in language_model.methods().items()
        if config is not None
    }
    own = counts["NoRA (20, 10)"]
    assert own == counts["LoRA-XS, rank 20"] == 20 * 20 * 7 * 4
    # Mistral-7B in Table 1: VeRA 0.98, LoRA of rank 1 1.77, DoRA 2.55 and NoRA 0.92 million
    assert 0.9 < counts["VeRA, rank 64"] / own < 1.2
    assert 1.6 < counts["LoRA, rank 1"] / own < 2.1 and 2.3 < counts["DoRA, rank 1"] / own < 3.0


def test_texts_do_not_share_files(texts):
    assert len({bytes(split[:500].tolist()) for split in texts}) == 3


@pytest.mark.parametrize("name", few_shot_clip.CLASSES)
def test_clip_learns_from_a_few_pictures(name):
    pytest.importorskip("resvg_py")
    clip, processor = CLIPModel.from_pretrained(CLIP).eval(), CLIPProcessor.from_pretrained(CLIP)
    classes = few_shot_clip.CLASSES[name]
    shots = few_shot_clip.draw_pictures(processor, classes, 1, 0)
    import world

    assert classes.names == tuple({"kind": world.KINDS, "color": world.COLORS}[name])
    assert shots.labels.tolist() == list(range(len(classes.names)))
    untrained = few_shot_clip.Classifier(clip, processor, classes)
    configs = few_shot_clip.methods(clip)
    counts = {}
    for method, config in configs.items():
        model = few_shot_clip.fine_tuned(untrained, config, shots, 12, 3e-3, 0)
        loss = torch.nn.functional.cross_entropy(model(shots.pixels), shots.labels)
        assert loss < torch.nn.functional.cross_entropy(untrained(shots.pixels), shots.labels), method
        counts[method] = language_model.trained_parameters(model)
    assert counts["LoRA, rank 2"] == counts["NoRA (64, 4)"] == 2 * 64 * 4 * 3 * (3 + 4)


def test_what_draws_the_pictures_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    for name in [name for name in sys.modules if name.split(".")[0] == "world"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match="resvg_py.* pip install -r requirements-dev.txt"):
        few_shot_clip.draw_pictures(None, few_shot_clip.CLASSES["kind"], 1, 0)
