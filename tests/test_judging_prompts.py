"""Words for scores: instance prompts as people write them, and the protocols."""

import pytest

from judging.prompts import Protocol, class_of, subject_of_prompt, with_article, without_identifier


def test_prompts_in_plain_words():
    assert without_identifier("a photo of [V] robot in the snow") == "a photo of a robot in the snow"
    assert without_identifier("a [V] robot") == without_identifier("[V] robot") == "a robot"
    assert without_identifier("[V] photo of a cat") == "a photo of a cat"
    assert without_identifier("the dog") == "the dog"
    assert with_article("a photo of a {}", "owl") == "a photo of an owl"
    assert with_article("a {} in the snow", "[V] owl") == "a [V] owl in the snow"


@pytest.mark.parametrize(
    ("instance_prompt", "subject", "class_name"),
    [
        ("a photo of [V] robot", "[V] robot", "robot"),
        ("a [V] dog", "[V] dog", "dog"),  # the DreamBooth paper's own form
        ("A photo of  [V] dog", "[V] dog", "dog"),
        ("a close-up photo of a [V] dog", "[V] dog", "dog"),
        ("black and white Photograph of my [V] owl", "[V] owl", "owl"),
        ("[V] photo of a cat", "[V] cat", "cat"),  # the name is the subject's, wherever it stands
        ("the [V] cat", "[V] cat", "cat"),
        ("a [V] cat in a painting of a garden", "[V] cat in a painting of a garden", "cat in a painting of a garden"),
        ("a photo of sks dog", "sks dog", None),
        ("sks photo of a dog", "sks dog", None),
        ("a photo of [V]", "[V]", None),
        ("the", "the", None),
    ],
)
def test_the_subject_of_an_instance_prompt(instance_prompt, subject, class_name):
    assert subject_of_prompt(instance_prompt) == subject
    if class_name is None:
        with pytest.raises(ValueError, match="is not known, because .*: add --class_name"):
            class_of(subject)
    else:
        assert class_of(subject) == class_name


def test_articles_go_with_the_word_that_follows():
    for word in ("owl", "apple", "umbrella", "hourglass", "elephant"):
        assert with_article("a photo of a {}", word) == f"a photo of an {word}"
        assert without_identifier(f"A [V] {word}") == f"An {word}"
    for word in ("dog", "unicorn", "[V] owl", "one-eyed robot"):
        assert with_article("an {} at night", word) == f"a {word} at night"
    assert with_article("an umbrella and the {}", "umbrella") == "an umbrella and the umbrella"
    assert without_identifier("an [V] dog") == without_identifier("[V] [W] dog") == "a dog"
    assert without_identifier("[V] the dog, a banana a day") == "the dog, a banana a day"
    assert without_identifier("my [V] dog") == "my dog" and without_identifier("a photo of [V]") == "a photo of"


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
