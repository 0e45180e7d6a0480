"""Words for scores: instance prompts as people write them, and the protocols."""

import pytest

from inference.prompts import Protocol, with_article, without_identifier


def test_prompts_in_plain_words():
    assert without_identifier("a photo of [V] robot in the snow") == "a photo of a robot in the snow"
    assert without_identifier("a [V] robot") == without_identifier("[V] robot") == "a robot"
    assert without_identifier("[V] photo of a cat") == "a photo of a cat"
    assert without_identifier("the dog") == "the dog"
    assert with_article("a photo of a {}", "owl") == "a photo of an owl"
    assert with_article("a {} in the snow", "[V] owl") == "a [V] owl in the snow"


def test_the_papers_protocol():
    thing, animal = (Protocol.read("dreambooth", name, False) for name in ("teapot", "dog6"))
    assert len(thing.prompts) == len(animal.prompts) == 25 and thing.images_per_prompt == 4
    assert len(set(thing.prompts) & set(animal.prompts)) == 15
    assert "a {} with the Eiffel Tower in the background" in thing.prompts
    assert "a {} in a chef outfit" in animal.prompts and animal.class_name == "dog"
    assert Protocol.read("dreambooth", None, True).prompts == animal.prompts
    assert Protocol.read("dreambooth", "bear_plushie", False).class_name == "stuffed animal"


def test_a_protocol_that_says_something_twice_is_refused(tmp_path):
    (tmp_path / "twice.yaml").write_text('images_per_prompt: 2\nboth_prompts: ["a {}"]\nboth_prompts: ["the {}"]\n')
    with pytest.raises(ValueError, match="both_prompts is there twice"):
        Protocol.read(str(tmp_path / "twice.yaml"), None, False)
