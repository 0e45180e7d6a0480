"""Encoding once: the cache, what its keys hold, and what is encoded of a picture and a prompt."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_sdxl import build_pipeline

from dreambooth.batches import PromptEmbedder
from dreambooth.data import Example
from dreambooth.encode import (
    CropSettings,
    cut_picture,
    encode_pictures,
    encode_prompts,
    encode_prompts_cached,
    inspect_picture,
    scale_latents,
    tokenize,
)
from dreambooth.encoded_cache import EncodedCache, checksum
from nora.cache import cache_key
from storage.tensors import module_fingerprint

SQUARE = CropSettings([(32, 32)])


@pytest.fixture(scope="module")
def pipeline():
    return build_pipeline()


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (40, 32)), ("b.png", (70, 90)), ("c.png", (32, 32))):
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def encode(pipeline, folder, crop=SQUARE, cache=None, fingerprint="vae", **options):
    cuts = [
        cut_picture(inspect_picture(Example(path, path.name, "a cat")), crop) for path in sorted(folder.glob("*.png"))
    ]
    cache = cache or EncodedCache(folder / "cache")
    return encode_pictures(pipeline.vae, fingerprint, cuts, range(len(cuts)), crop, cache, **options)


def entries(folder):
    return sorted((folder / "cache").rglob("*.safetensors"))


def count_encodings(pipeline, monkeypatch):
    calls = []
    vae_encode = pipeline.vae.encode
    monkeypatch.setattr(pipeline.vae, "encode", lambda pixels: calls.append(len(pixels)) or vae_encode(pixels))
    return calls


# --- pictures ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_latents_are_the_autoencoder_s(pipeline, folder):
    encoded = encode(pipeline, folder)
    pixels = torch.from_numpy(np.array(Image.open(folder / "c.png"))).permute(2, 0, 1)[None].float() / 127.5 - 1
    posterior = pipeline.vae.encode(pixels).latent_dist
    factor = pipeline.vae.config.scaling_factor
    assert torch.allclose(encoded[2].mean, posterior.mean * factor, atol=1e-6)
    assert torch.allclose(encoded[2].std, posterior.std * factor, atol=1e-6)
    assert [one.prompt for one in encoded] == [0, 1, 2]


def test_every_picture_keeps_its_own_size_and_crop(pipeline, folder):
    """diffusers gives class images the instance's."""
    encoded = encode(pipeline, folder, CropSettings([(32, 32)], center_crop=True, variants=1))
    assert [one.time_ids[0].tolist() for one in encoded] == [
        [32, 40, 0, 4, 32, 32],
        [90, 70, 4, 0, 32, 32],
        [32, 32, 0, 0, 32, 32],
    ]


def test_variants_differ_and_are_cached_apart(pipeline, folder):
    """diffusers freezes crop and flip at the start."""
    encoded = encode(pipeline, folder, CropSettings([(32, 32)], random_flip=True, variants=4))
    assert [len(one.mean) for one in encoded][2] == 2  # a square has one crop, and its mirror image
    assert len(encoded[0].mean) == 4 and len({one.sum().item() for one in encoded[0].mean}) == 4
    assert len({tuple(row.tolist()) for row in encoded[0].time_ids}) > 1


def test_pictures_are_encoded_once(pipeline, folder, monkeypatch):
    calls = count_encodings(pipeline, monkeypatch)
    first = encode(pipeline, folder)
    assert len(calls) == len(entries(folder))
    again = encode(pipeline, folder)
    assert len(calls) == len(entries(folder))
    assert all(torch.equal(one.mean, other.mean) for one, other in zip(first, again))


def test_an_interrupted_encoding_goes_on(pipeline, folder, monkeypatch):
    calls = count_encodings(pipeline, monkeypatch)
    whole = encode(pipeline, folder)
    total = len(calls)
    for path in entries(folder)[:2]:
        path.unlink()
    again = encode(pipeline, folder)
    assert len(calls) == total + 2 and torch.equal(whole[0].mean, again[0].mean)


@pytest.mark.parametrize("damage", ["cut", "bits", "another entry", "another format"])
def test_torn_and_stale_entries_are_made_anew(pipeline, folder, monkeypatch, damage):
    whole = encode(pipeline, folder)
    first, second = entries(folder)[:2]
    if damage == "cut":
        first.write_bytes(first.read_bytes()[:-7])
    elif damage == "bits":
        content = bytearray(first.read_bytes())
        content[-1] ^= 0xFF
        first.write_bytes(content)
    elif damage == "another entry":
        first.write_bytes(second.read_bytes())
    else:
        first.write_text("not a tensor")
    calls = count_encodings(pipeline, monkeypatch)
    again = encode(pipeline, folder)
    assert len(calls) == 1
    assert all(torch.equal(one.mean, other.mean) for one, other in zip(whole, again))


@pytest.mark.parametrize("change", ["picture", "autoencoder", "interpolation", "bucket"])
def test_another_content_is_another_entry(pipeline, folder, change):
    encode(pipeline, folder)
    before, crop, fingerprint = set(entries(folder)), SQUARE, "vae"
    if change == "picture":
        Image.new("RGB", (40, 32), "red").save(folder / "a.png")
    elif change == "autoencoder":
        fingerprint = "another"
    elif change == "interpolation":
        crop = CropSettings([(32, 32)], interpolation="nearest")
    else:
        crop = CropSettings([(32, 48)])
    encode(pipeline, folder, crop, fingerprint=fingerprint)
    assert set(entries(folder)) > before


CONFIGURATIONS = {
    "scaling_factor": 0.13025 / 2,
    "shift_factor": 0.1,
    "latents_mean": [0.1, 0.2, 0.3, 0.4],
    "latents_std": [1.0, 2.0, 1.0, 2.0],
    "act_fn": "relu",
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_autoencoder_of_another_configuration_gets_no_stale_latents(folder, name):
    """Of the same weights; latents of half their size came back."""
    pipeline = build_pipeline()
    encode(pipeline, folder)
    before = set(entries(folder))
    pipeline.vae.register_to_config(**{name: CONFIGURATIONS[name]})
    encode(pipeline, folder)
    assert not before & (set(entries(folder)) - before) and len(entries(folder)) == 2 * len(before)


def test_where_an_autoencoder_was_loaded_from_changes_no_entry(folder):
    pipeline = build_pipeline()
    encode(pipeline, folder)
    before = entries(folder)
    pipeline.vae.register_to_config(_name_or_path="elsewhere", _diffusers_version="0.1")
    encode(pipeline, folder)
    assert entries(folder) == before


@pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"eos_token_id": 5}, {"layer_norm_eps": 1e-3}])
def test_text_encoders_of_another_configuration_get_no_stale_embeddings(tmp_path, change):
    pipeline, cache = build_pipeline(), EncodedCache(tmp_path)
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    tokens = tokenize([pipeline.tokenizer, pipeline.tokenizer_2], ["a cat"])
    encode_prompts_cached(encoders, "text", tokens, cache)
    encode_prompts_cached(encoders, "text", tokens, cache)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    for name, value in change.items():
        setattr(pipeline.text_encoder_2.config, name, value)
    encode_prompts_cached(encoders, "text", tokens, cache)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_a_process_on_another_disk_encodes_the_prompts_itself(tmp_path):
    pipeline = build_pipeline()
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    tokens = tokenize([pipeline.tokenizer, pipeline.tokenizer_2], ["a cat", "a dog"])
    one = encode_prompts_cached(encoders, "text", tokens, EncodedCache(tmp_path / "one"))
    other = encode_prompts_cached(encoders, "text", tokens, EncodedCache(tmp_path / "other"), is_main_process=False)
    assert all(torch.equal(*pair) for pair in zip(one, other))


def test_two_processes_share_the_work(pipeline, folder, monkeypatch):
    calls = count_encodings(pipeline, monkeypatch)
    meeting = threading.Barrier(2)

    def process(index):
        return encode(pipeline, folder, process_index=index, num_processes=2, wait=meeting.wait)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(process, range(2))
    assert len(calls) == len(entries(folder))
    assert all(torch.equal(one.mean, other.mean) for one, other in zip(first, second))


def test_another_run_fills_the_shared_cache_meanwhile(pipeline, folder):
    """One process finds an entry that the other did not: what each of them misses differs."""
    whole = encode(pipeline, folder)
    first, *rest = [path.relative_to(folder / "cache") for path in entries(folder)]

    class Late(EncodedCache):
        """Sees what another run wrote after the other process had looked."""

        def read(self, key):
            return EncodedCache(folder / "cache").read(key) if self.path(key).name == first.name else super().read(key)

    meeting = threading.Barrier(2)
    for late in (0, 1):
        shared = folder / f"shared-{late}"
        caches = [EncodedCache(shared), EncodedCache(shared)]
        caches[late] = Late(shared)

        def process(index, caches=caches):
            options = {"process_index": index, "num_processes": 2, "wait": meeting.wait}
            return encode(pipeline, folder, cache=caches[index], **options)

        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(process, range(2)))
        assert all(torch.equal(a.mean, b.mean) for one in found for a, b in zip(whole, one))


def test_what_is_half_there_is_shared_too(pipeline, folder, monkeypatch):
    """A picture's crops and mirror images lie side by side; an earlier run may have needed the crops alone."""
    plain = CropSettings([(32, 32)], center_crop=True, variants=1)
    for number in range(13):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / f"d{number}.png")
    encode(pipeline, folder, plain)
    meeting, shares = threading.Barrier(2), []

    def process(index):
        sizes = []
        options = {"process_index": index, "num_processes": 2, "wait": meeting.wait}
        options["progress"] = lambda total: sizes.append(total) or range(total)
        encode(pipeline, folder, CropSettings([(32, 32)], True, True, 2), **options)
        shares.append(sum(sizes))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(process, range(2)))
    assert sum(shares) == 16 and min(shares) >= 4


def test_worker_processes_read_the_same(pipeline, folder):
    plain = encode(pipeline, folder)
    workers = encode(pipeline, folder, cache=EncodedCache(folder / "other"), num_workers=2)
    assert all(torch.equal(one.mean, other.mean) for one, other in zip(plain, workers))


def test_bucket_shapes(pipeline, folder):
    encoded = encode(pipeline, folder, CropSettings([(32, 32), (48, 32)]))
    assert [one.shape for one in encoded] == [(8, 8), (12, 8), (8, 8)]


def test_masks_are_cut_like_their_pictures(pipeline, tmp_path):
    pixels = np.zeros((32, 64, 4), np.uint8)
    pixels[:, 32:, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    crop = CropSettings([(32, 32)], variants=3, random_flip=True, alpha_mask=True)
    (encoded,) = encode(pipeline, tmp_path, crop)
    for mask, time_ids in zip(encoded.mask, encoded.time_ids):
        left = int(time_ids[3])
        assert abs(mask.mean().item() - left / 32) < 0.05 or abs(mask.mean().item() - (1 - left / 32)) < 0.05
    assert encoded.mask.shape == (3, 1, 8, 8)


def test_bases_that_shift_their_latents():
    vae = build_pipeline().vae
    latents = torch.randn(2, 4, 3, 3)
    vae.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[1.0, 2.0, 4.0, 8.0], scaling_factor=0.5)
    expected = (latents - torch.tensor([1.0, 2, 3, 4]).reshape(1, 4, 1, 1)) * 0.5
    expected = expected / torch.tensor([1.0, 2, 4, 8]).reshape(1, 4, 1, 1)
    assert torch.allclose(scale_latents(vae, latents), expected)


def test_hashes_on_users_disks_stay():
    """Entries of both caches are found by them, and a resumed run's base is compared by them."""
    tensors = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(2, dtype=torch.bfloat16)}
    module = torch.nn.ParameterDict({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()})
    assert checksum(tensors) == "1337bbef9da8ff7721ce681690db3ed2"
    assert module_fingerprint(module) == "6847abdcd17837420dd0451a77172f3c572f5c43ae1f3e8acb26f44ea22e747c"
    assert cache_key(tensors["b"], tensors["a"].half(), ("svd", 2)) == "5de3394354f5a5f9a36ab89555ef1cb4cbcd8c67"


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_are_encoded_once_and_alone(pipeline, tmp_path, monkeypatch):
    encoders, tokenizers = [pipeline.text_encoder, pipeline.text_encoder_2], [pipeline.tokenizer, pipeline.tokenizer_2]
    cache, texts = EncodedCache(tmp_path), ["a cat", "a dog", ""]
    first = encode_prompts_cached(encoders, "text", tokenize(tokenizers, texts), cache)
    with torch.no_grad():
        expected = encode_prompts(encoders, tokenize(tokenizers, texts))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(first, expected))
    monkeypatch.setattr(type(encoders[0]), "forward", None)  # nothing is encoded any more
    again = encode_prompts_cached(encoders, "text", tokenize(tokenizers, texts[::-1]), cache)
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(first, again))


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_rows_of_a_batch_get_their_own_prompts(rows):
    pipeline = build_pipeline()
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    tokens = tokenize([pipeline.tokenizer, pipeline.tokenizer_2], ["a cat", "a dog", "two"])
    with torch.no_grad():
        everything, some = encode_prompts(encoders, tokens), encode_prompts(encoders, tokens, torch.tensor(rows))
    for row, prompt_embeds, pooled in zip(rows, *some):
        assert torch.allclose(prompt_embeds, everything.prompt_embeds[row], atol=1e-5)
        assert torch.allclose(pooled, everything.pooled_prompt_embeds[row], atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.text(max_size=3), min_size=2, max_size=3), st.lists(st.text(max_size=3), min_size=2, max_size=3))
def test_keys_tell_lists_apart(one, other):
    from dreambooth.data import content_hash

    assert (content_hash(*one) == content_hash(*other)) == (one == other)


def test_prompts_of_now_are_read_without_dropout(pipeline, monkeypatch):
    monkeypatch.setattr("dreambooth.prepare.PROMPTS_AT_ONCE", 2)
    tokens = tokenize([pipeline.tokenizer, pipeline.tokenizer_2], ["a cat", "a dog", "an owl"])
    models = {"text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}
    expected = encode_prompts(list(models.values()), tokens)
    for model in models.values():
        model.train()
        for layer in model.modules():
            if hasattr(layer, "dropout"):
                layer.dropout = 0.5
    encoded = SimpleNamespace(prompts=expected, tokens=tokens, class_rows=expected.prompt_embeds, clip_skip=0)
    found = PromptEmbedder(encoded, list(models.values())).current()
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected))
    assert all(model.training for model in models.values())
