"""Where pictures and captions come from, how pictures are cut, and SDXL's size conditioning."""

import json

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dreambooth.buckets import SDXL_BUCKETS, nearest_bucket, read_buckets
from dreambooth.data import Crop, cover, crops, find_examples, read_concepts
from dreambooth.encode import CropSettings, check_masks, cut_picture, inspect_picture
from dreambooth.prepare import PromptTable, read_pictures
from dreambooth.prior import class_image_name, class_images, missing_seeds
from settings.training import TrainConfig


def config(**options) -> TrainConfig:
    given = {"pretrained_model_name_or_path": "base", "instance_prompt": "a photo of [V] cat", "resolution": 32}
    return TrainConfig.of(**(given | options))


def _pictures(one: TrainConfig):
    return read_pictures(one.data, one.prior, 8)


def save_pictures(folder, *names, size=(40, 30)):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", size, (number * 20, 90, 200)).save(folder / name)
    return folder


def examples(**options):
    one = config(**options)
    return find_examples(one.data, None, read_concepts(one.data, one.prior))


# --- sources ----------------------------------------------------------------------------------------------------------


def test_captions_beside_pictures_and_the_prompt_where_there_is_none(tmp_path):
    save_pictures(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "a.txt").write_text("[V] cat\n  on a sofa \n")
    (tmp_path / "b.caption").write_text("[V] cat asleep")
    found = examples(instance_data_dir=str(tmp_path))
    assert [one.prompt for one in found] == ["[V] cat on a sofa", "[V] cat asleep", "a photo of [V] cat"]


def test_metadata_goes_before_everything(tmp_path):
    save_pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("from the text file")
    lines = [{"file_name": "a.png", "text": "from the metadata", "other": "from its other column"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert examples(instance_data_dir=str(tmp_path))[0].prompt == "from the metadata"
    other = examples(instance_data_dir=str(tmp_path), caption_column="other")
    assert [one.prompt for one in other] == ["from its other column", "a photo of [V] cat"]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("a.txt", b"  \n", "a.txt is empty"),
        ("a.txt", b"\xff\xfe\xfa", "a.txt is not UTF-8"),
        ("metadata.jsonl", b'{"file_name": "a.png"}', "line 1: each line needs file_name and text"),
        ("metadata.jsonl", b"\n{nonsense", "line 2"),
        ("metadata.jsonl", b'{"file_name": "z.png", "text": "x"}', "no picture z.png"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": " "}', "caption of a.png is empty"),
        ("metadata.jsonl", b'{"file_name": ["a.png"], "text": "x"}', "line 1: there is no picture"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n' * 2, "line 2: a.png has a caption already"),
        ("metadata.jsonl", b"\xff\xfe\xfa", "metadata.jsonl is not UTF-8"),
    ],
)
def test_bad_captions_are_named(tmp_path, file, content, words):
    save_pictures(tmp_path, "a.png")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        examples(instance_data_dir=str(tmp_path))


def test_captions_as_other_systems_write_them(tmp_path):
    """An upper-case suffix, a byte order mark, and a line separator inside a caption."""
    save_pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbf[V] cat")
    line = json.dumps({"file_name": "b.png", "text": "[V] cat\u2028asleep"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + line + "\r\n")
    assert [one.prompt for one in examples(instance_data_dir=str(tmp_path))] == ["[V] cat", "[V] cat\u2028asleep"]
    (tmp_path / "a.caption").write_text("another")
    with pytest.raises(ValueError, match=r"a.TXT and .*a.caption are for the same picture"):
        examples(instance_data_dir=str(tmp_path))


@pytest.mark.parametrize(("column", "words"), [([1], "holds no pictures"), ([None], "row 0 has no picture")])
def test_datasets_without_pictures(monkeypatch, column, words):
    kind = datasets.Value("int64") if column == [1] else datasets.Image()
    made = datasets.Dataset.from_dict({"image": column}, features=datasets.Features({"image": kind}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: {"train": made})
    with pytest.raises(ValueError, match=words):
        examples(dataset_name="x")


def test_hugging_face_dataset_on_disk(tmp_path):
    save_pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "text": "two"}\n'
    )
    options = {"dataset_name": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    captioned = examples(caption_column="text", **options)
    assert [one.prompt for one in captioned] == ["one", "two"]
    assert [inspect_picture(one).size for one in captioned] == [(30, 40)] * 2
    assert {one.prompt for one in examples(**options)} == {"a photo of [V] cat"}
    with pytest.raises(ValueError, match="--image_column picture is not in"):
        examples(image_column="picture", **options)
    with pytest.raises(ValueError, match="--caption_column words is not in"):
        examples(caption_column="words", **options)


def test_several_concepts(tmp_path):
    save_pictures(tmp_path / "cat", "a.png")
    save_pictures(tmp_path / "dog", "a.png", "b.png")
    entries = [
        {"instance_data_dir": str(tmp_path / "cat"), "instance_prompt": "a [V] cat", "class_prompt": "a cat"},
        {"instance_data_dir": str(tmp_path / "dog"), "instance_prompt": "a [W] dog", "repeats": 3},
    ]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    one = config(concepts_list=str(tmp_path / "list.json"), instance_prompt=None)
    found = find_examples(one.data, None, read_concepts(one.data, one.prior))
    assert [(e.prompt, e.concept, e.repeats) for e in found] == [("a [V] cat", 0, 1), *[("a [W] dog", 1, 3)] * 2]
    table = PromptTable(read_concepts(one.data, one.prior), [inspect_picture(example) for example in found])
    assert table.texts == ["a [V] cat", "a [W] dog", "a cat"]
    assert table.class_rows.tolist() == [2, 1, 2]  # a subject without a class keeps its own


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ("{", "neither JSON nor YAML"),
        ("[]", "must be a list"),
        ('[{"instance_prompt": "x"}]', "entry 1 lacks instance_data_dir"),
        ('[{"instance_data_dir": "x", "instance_prompt": "y", "colour": 1}]', "entry 1 has colour"),
        ('[{"instance_data_dir": "x", "instance_prompt": "y", "repeats": 0}]', "repeats 0"),
        ('[{"instance_data_dir": 5, "instance_prompt": "y"}]', "entry 1 has instance_data_dir 5: write it as a text"),
        ('[{"instance_data_dir": "x", "instance_prompt": ["y"]}]', "entry 1 has instance_prompt"),
        ("- {1: 2, a: 3, instance_data_dir: x, instance_prompt: y}", "entry 1 has 1"),
        ("- {instance_data_dir: x, instance_prompt: y, instance_prompt: z}", "instance_prompt is there twice"),
        ('[{"instance_data_dir": "q", "instance_prompt": "y"}]', "entry 1's instance_data_dir q does not exist"),
    ],
)
def test_bad_concepts_are_named(tmp_path, entries, words):
    (tmp_path / "list.json").write_text(entries)
    with pytest.raises(ValueError, match=words):
        examples(concepts_list=str(tmp_path / "list.json"), instance_prompt=None)


def test_dry_run_report(tmp_path):
    save_pictures(tmp_path / "cat", "a.png", "b.png", size=(20, 16))
    options = {"class_data_dir": str(tmp_path / "class"), "class_prompt": "a cat", "num_class_images": 7}
    one = config(instance_data_dir=str(tmp_path / "cat"), with_prior_preservation=True, repeats=5, **options)
    report = _pictures(one).report(one.loop, one.prior, one.text.token_abstraction)
    for words in (
        "2 instance pictures",
        "2 x a photo of [V] cat",
        "32x32: 2",
        "an epoch is 3 steps",
        "a.png",
        "7 have",
    ):
        assert words in report, report


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_sdxl_buckets():
    assert read_buckets("sdxl", 1024, 32) == SDXL_BUCKETS and len(set(SDXL_BUCKETS)) == 41
    assert all(height % 64 == width % 64 == 0 for height, width in SDXL_BUCKETS)
    assert all(0.85 < height * width / 1024**2 <= 1.0 for height, width in SDXL_BUCKETS)
    assert {(width, height) for height, width in SDXL_BUCKETS} == set(SDXL_BUCKETS)
    assert nearest_bucket((2000, 3000), SDXL_BUCKETS) == (832, 1216)


def test_other_resolutions_and_own_buckets():
    small = read_buckets("sdxl", 64, 16)
    assert (64, 64) in small and all(h % 16 == w % 16 == 0 and 0.7 < h * w / 64**2 < 1.3 for h, w in small[2:-2])
    assert read_buckets("64,64; 48,96", 64, 16) == [(64, 64), (48, 96)]
    assert read_buckets(None, 64, 16) == [(64, 64)]
    for text, words in (("64x64", "64x64"), ("60,64", "multiples of 16"), ("", "empty")):
        with pytest.raises(ValueError, match=words):
            read_buckets(text, 64, 16)


# --- cutting ----------------------------------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(1, 90), st.integers(1, 90))


@settings(deadline=None, max_examples=60)
@given(SIZES, st.sampled_from([(32, 32), (16, 64), (64, 48)]), st.booleans(), st.booleans(), st.integers(1, 6))
def test_every_crop_lies_inside_and_covers_its_bucket(size, target, center_crop, random_flip, variants):
    generator = torch.Generator().manual_seed(0)
    options = {"center_crop": center_crop, "random_flip": random_flip, "variants": variants, "generator": generator}
    found = crops(size, target, **options)
    assert 1 <= len(found) == len(set(found)) <= variants
    for crop in found:
        assert (crop.height, crop.width) == target and crop.resized == cover(size, target)
        assert 0 <= crop.top <= crop.resized[0] - target[0] and 0 <= crop.left <= crop.resized[1] - target[1]
        assert min(crop.resized[0] - target[0], crop.resized[1] - target[1]) == 0  # no more is cut off than needed
        image = crop.of(Image.new("RGB", size[::-1], (1, 2, 3)), "lanczos")
        assert image.size == target[::-1] and image.getpixel((0, 0)) == (1, 2, 3)
    assert random_flip or not any(crop.mirrored for crop in found)
    if random_flip and variants > 1:
        assert {crop.mirrored for crop in found} == {True, False}


def test_middle_is_cut_out_with_its_conditioning():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    (crop,) = crops((10, 30), (10, 10), center_crop=True, random_flip=False, variants=4, generator=torch.Generator())
    assert (np.asarray(crop.of(Image.fromarray(pixels), "lanczos")) == 255).all()
    assert crop.time_ids((10, 30)).tolist() == [10, 30, 0, 10, 10, 10]


def test_a_mirrored_crop_is_counted_from_the_other_side():
    crop = Crop(resized=(10, 30), top=0, left=4, height=10, width=10, mirrored=True)
    assert crop.time_ids((20, 60)).tolist() == [20, 60, 0, 16, 10, 10]
    ramp = Image.fromarray(np.tile(np.arange(30, dtype=np.uint8), (10, 1)))
    mirrored_whole = np.asarray(ramp)[:, ::-1]
    assert np.array_equal(np.asarray(crop.of(ramp, "nearest")), mirrored_whole[:, 16:26])


def test_crops_differ_between_pictures_but_not_between_runs(tmp_path):
    save_pictures(tmp_path, "a.png", "b.png", size=(90, 30))
    found = [inspect_picture(one) for one in examples(instance_data_dir=str(tmp_path))]
    settings_ = CropSettings([(32, 32)], variants=3)
    first, again = ([cut_picture(one, settings_).crops for one in found] for _ in range(2))
    assert first == again and first[0] != first[1] and len(first[0]) == 3
    assert [cut_picture(one, CropSettings([(32, 32)], variants=3, seed=1)).crops for one in found] != first


def test_masks(tmp_path):
    save_pictures(tmp_path / "cat", "a.png", "b.jpg")
    save_pictures(tmp_path / "masks", "a.png")
    with pytest.raises(ValueError, match="no mask for b.jpg"):
        examples(instance_data_dir=str(tmp_path / "cat"), mask_data_dir=str(tmp_path / "masks"))
    Image.new("L", (40, 30), 0).save(tmp_path / "masks" / "b.png")
    found = examples(instance_data_dir=str(tmp_path / "cat"), mask_data_dir=str(tmp_path / "masks"))
    assert [one.mask.name for one in found] == ["a.png", "b.png"]
    pictures = [inspect_picture(one) for one in found]
    with pytest.raises(ValueError, match="b.png masks out all of the 32 x 32 pixels cut at"):
        check_masks(pictures, CropSettings([(32, 32)]))
    Image.new("L", (40, 20), 255).save(tmp_path / "masks" / "b.png")
    with pytest.raises(ValueError, match="b.png is 40 x 20 and its picture 40 x 30: give it the picture's shape"):
        inspect_picture(found[1])
    Image.new("L", (40, 30), 255).save(tmp_path / "masks" / "b.webp")
    with pytest.raises(ValueError, match="b.png and .*b.webp are for the same picture"):
        examples(instance_data_dir=str(tmp_path / "cat"), mask_data_dir=str(tmp_path / "masks"))


def test_masks_and_class_prompts_are_part_of_a_run(tmp_path):
    save_pictures(tmp_path / "cat", "a.png")
    options = {"instance_data_dir": str(tmp_path / "cat"), "with_prior_preservation": True, "prior_teacher": True}

    def digest(**more):
        return _pictures(config(**options, **({"class_prompt": "a cat"} | more))).hash()

    hashes = [digest(), digest(class_prompt="a dog")]
    for shade in (100, 200):
        save_pictures(tmp_path / "masks", "a.png")
        Image.new("L", (40, 30), shade).save(tmp_path / "masks" / "a.png")
        hashes.append(digest(mask_data_dir=str(tmp_path / "masks")))
    assert len(set(hashes)) == 4


def test_a_transparent_picture_is_named(tmp_path):
    for name, alpha in (("a.png", 255), ("b.png", 0)):
        Image.new("RGBA", (40, 30), (90, 90, 90, alpha)).save(tmp_path / name)
    with pytest.raises(ValueError, match="b.png masks out all"):
        _pictures(config(instance_data_dir=str(tmp_path), alpha_mask=True))
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match="--alpha_mask finds no picture"):
        _pictures(config(instance_data_dir=str(tmp_path), alpha_mask=True))


# --- class images -----------------------------------------------------------------------------------------------------


def test_class_images_of_another_prompt_do_not_count(tmp_path):
    save_pictures(tmp_path, "mine.jpg", class_image_name("a cat", 0), class_image_name("a dog", 0))
    assert [path.name for path in class_images(tmp_path, "a cat")] == ["mine.jpg", class_image_name("a cat", 0)]
    assert missing_seeds(tmp_path, "a cat", 4) == [1, 2]
    assert missing_seeds(tmp_path, "a dog", 2) == [] and missing_seeds(tmp_path / "none", "a dog", 2) == [0, 1]


def test_a_class_folder_of_litter_has_no_pictures_yet(tmp_path):
    """Also a temporary folder, with which another process tries whether it can write there."""
    for name in (".gitkeep", ".DS_Store", "Thumbs.db", f".{class_image_name('a cat', 0)}.x.part"):
        (tmp_path / name).write_text("")
    (tmp_path / "tmp1").mkdir()
    assert class_images(tmp_path, "a cat") == [] and missing_seeds(tmp_path, "a cat", 2) == [0, 1]
