"""`python -m inference.adapters`, on adapters of the tiny base; mathematics against NumPy in float64."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_sdxl import build_pipeline, max_error, outputs, saved_base, saved_lora, saved_nora

from inference.adapters import main
from inference.base import load_pipeline
from inference.load import load_adapter
from inference.outline import sdxl_outline
from methods.arithmetic import added, compressed, conditioned, largest_difference, rounded
from methods.components import FOLDED_WEIGHTS, INNER_WEIGHTS
from methods.formats.keys import split_key
from methods.formats.kohya import kohya_names
from methods.formats.layers import layer_names
from methods.update import Update

LORA = ("lora_A", "lora_B")


@pytest.fixture(scope="module")
def lora() -> str:
    return str(saved_lora() / FOLDED_WEIGHTS)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    return build_pipeline()


def components(pipeline) -> dict[str, torch.nn.Module]:
    return {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")}


def deltas(pipeline, path) -> dict[str, np.ndarray]:
    """Layer -> ΔW in float64 of a file of lora_up and lora_down, or lora_A and lora_B, by an independent reading."""
    files = sorted(Path(path).glob("*/adapter_model.safetensors")) if Path(path).is_dir() else [Path(path)]
    names, parts = layer_names(components(pipeline)), {}
    for file in files:
        for key, tensor in load_file(file).items():
            name, part = split_key(key)
            if Path(path).is_dir():
                name = f"{file.parent.name}.{name.removeprefix('base_model.model.')}"
            parts.setdefault(names[name].name, {})[part] = tensor.double().numpy()
    found = {}
    for name, part in parts.items():
        scale = float(part["alpha"]) / len(part["down"]) if "alpha" in part else 1.0
        found[name] = scale * part["up"] @ part["down"]
    return found


def relative(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    assert set(found) == set(expected)
    return max(np.linalg.norm(found[name] - one) / np.linalg.norm(one) for name, one in expected.items())


def header(path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        return opened.metadata()


def refused(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(lines) == 1 and "Traceback" not in printed.err
    return lines[0]


# --- mathematics ------------------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


UPDATES = {
    "thin": Update(normal(12, 5, seed=0), normal(5, 9, seed=1)),
    "wide factors": Update(normal(6, 11, seed=2), normal(11, 8, seed=3)),
    "convolution": Update(normal(7, 4, 1, 1, seed=4), normal(4, 3, 3, 3, seed=5)),
    "bias": Update(normal(6, 3, seed=6), normal(3, 6, seed=7), normal(6, seed=8)),
}


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("size", [{"rank": 2}, {"energy": 0.8}, {"rank": 99}])
def test_compressing_is_numpy_s_truncated_svd(name, size):
    update = UPDATES[name]
    delta = (update.up.flatten(1).double() @ update.down.flatten(1).double()).numpy()
    U, sigma, Vt = np.linalg.svd(delta, full_matrices=False)
    energies = np.cumsum(sigma**2) / np.sum(sigma**2)
    k = size.get("rank") or next(i + 1 for i, share in enumerate(energies) if share >= size["energy"])
    small, kept, whole = compressed(update, **size)
    k = min(k, small.rank)
    np.testing.assert_allclose(small.weight().flatten(1).double(), (U[:, :k] * sigma[:k]) @ Vt[:k], atol=1e-5)
    assert small.weight().shape == update.weight().shape and small.bias is update.bias
    assert kept / whole == pytest.approx(energies[k - 1], rel=1e-10)
    if "energy" in size:
        assert small.rank == k and kept / whole >= size["energy"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_keeps_what_cancels_and_what_is_small(dtype):
    """PiSSA's update is the small difference of large products; after one step of training updates are tiny."""
    B, A = normal(12, 4, seed=12), normal(4, 9, seed=13)
    moved = B + 1e-4 * normal(12, 4, seed=14)
    for update in (Update(torch.cat([moved, -B], 1), torch.cat([A, A])), Update(1e-7 * B, 1e-3 * A), Update(0 * B, A)):
        expected = update.up.double() @ update.down.double()
        found = rounded(update if dtype == torch.float32 else conditioned(update), dtype)
        error = (found.up.double() @ found.down.double() - expected).norm()
        assert error <= max(2 * torch.finfo(dtype).eps, 1e-6) * expected.norm()
    with pytest.raises(ValueError, match=r"too large for float16: take fp32"):
        rounded(Update(1e6 * B, A), torch.float16)


def test_adding_is_the_sum_whatever_the_ranks():
    one, other = UPDATES["thin"], Update(normal(12, 7, seed=9), normal(7, 9, seed=10), normal(12, seed=11))
    for parts in ([(0.5, one), (-2.0, other)], [(1.0, one)] * 3):
        total = added(parts)
        expected = sum(w * (u.up.double() @ u.down.double()) for w, u in parts)
        torch.testing.assert_close(total.weight().double(), expected, atol=1e-5, rtol=1e-5)
        assert total.rank <= 9
    assert torch.equal(added([(-2.0, other), (1.0, one)]).bias, -2 * other.bias)


def test_the_largest_difference_is_found_where_it_is():
    layers = {"unet": {"a": UPDATES["thin"], "b": UPDATES["bias"]}}
    assert largest_difference(layers, layers)[0] < 1e-12
    up, down = normal(12, 4, seed=12), normal(4, 9, seed=13)
    nothing = Update(torch.cat([up, -up], 1), torch.cat([down, down]))  # a PiSSA layer that learned nothing
    assert largest_difference({"unet": {"a": conditioned(nothing)}}, {"unet": {"a": nothing}})[0] < 1e-6
    off = UPDATES["bias"]._replace(up=UPDATES["bias"].up * 1.01)
    error, layer = largest_difference({"unet": {"a": UPDATES["thin"], "b": off}}, layers)
    assert error == pytest.approx(0.01, rel=1e-4) and layer == "unet.b"
    assert largest_difference({"unet": {"a": UPDATES["thin"]}}, layers) == (np.inf, "unet.b")


# --- commands ---------------------------------------------------------------------------------------------------------


def test_round_trips_through_every_format(lora, pipeline, tmp_path, capsys):
    """kohya -> PEFT -> diffusers -> kohya: the update, to 1e-6, and in fp16 to its rounding."""
    expected, base = deltas(pipeline, lora), ["--base", str(saved_base())]
    source = lora
    for to, name in (
        ("kohya", "k.safetensors"),
        ("peft", "p"),
        ("diffusers", "d.safetensors"),
        ("kohya", "l.safetensors"),
    ):
        main(["convert", source, "--to", to, "--output", str(tmp_path / name), "--dtype", "fp32", *base])
        assert "read back, the largest relative difference is" in capsys.readouterr().out
        source = str(tmp_path / name)
        assert relative(deltas(pipeline, source), expected) < 1e-6, name
    main(["convert", source, "--to", "kohya", "--output", str(tmp_path / "half.safetensors"), *base])
    assert 1e-6 < relative(deltas(pipeline, tmp_path / "half.safetensors"), expected) < 1e-3
    stock = load_pipeline(saved_base(), torch.float32, "cpu")
    stock.load_lora_weights(str(tmp_path), weight_name="l.safetensors")
    load_adapter(pipeline_of_ours := load_pipeline(saved_base(), torch.float32, "cpu"), lora)
    assert max_error(outputs(stock), outputs(pipeline_of_ours)) < 1e-4


def test_what_a_kohya_file_says_of_itself(lora, pipeline, tmp_path, capsys):
    """From the run's record; an edited title stays out, the hash is anew, and inspect reads all of it."""
    path, count = tmp_path / "mine.safetensors", len(deltas(pipeline, lora))
    main(["convert", lora, "--to", "kohya", "--output", str(path)])
    found, data = header(path), path.read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert found["sshs_model_hash"] == digest and found["ss_output_name"] == found["modelspec.title"] == "mine"
    assert found["ss_network_dim"] == found["ss_network_alpha"] == "4" and found["ss_max_train_steps"] == "500"
    capsys.readouterr()
    main(["inspect", str(path), lora, "--json"])
    ours, theirs = json.loads(capsys.readouterr().out)
    assert ours["format"] == "kohya" and ours["blocks"] == "Stability's (SGM)" and ours["kinds"] == {"LoRA": count}
    assert ours["hash"] == "as in the header" and ours["alphas"] == {"4": count} and ours["ranks"] == {"4": count}
    assert theirs["steps"] == 500 and theirs["method"] == "lora" and set(theirs["layers"]) == set(ours["layers"])
    main(["inspect", str(path)])
    assert "sdxl_base_v1-0" in capsys.readouterr().out


def test_resizing_and_what_is_kept(lora, pipeline, tmp_path, capsys):
    expected = deltas(pipeline, lora)
    main(["resize", lora, "--rank", "2", "--output", str(tmp_path / "two.safetensors")])
    said = capsys.readouterr().out
    best, kept, whole = {}, 0.0, 0.0
    for name, delta in expected.items():
        U, sigma, Vt = np.linalg.svd(delta, full_matrices=False)
        best[name] = (U[:, :2] * sigma[:2]) @ Vt[:2]
        kept, whole = kept + np.sum(sigma[:2] ** 2), whole + np.sum(sigma**2)
    assert relative(deltas(pipeline, tmp_path / "two.safetensors"), best) < 1e-5
    assert f"energy kept: {kept / whole:.4%}" in said and "rank 4 -> 2" in said
    out = tmp_path / "energy.safetensors"
    main(["resize", lora, "--energy", "0.9", "--to", "kohya", "--dtype", "fp32", "--output", str(out)])
    found, tensors = deltas(pipeline, out), load_file(out)
    ranks = {len(one) for key, one in tensors.items() if key.endswith("lora_down.weight")}
    assert len(ranks) > 1 and {float(one) for key, one in tensors.items() if key.endswith("alpha")} == {
        float(max(ranks))
    }
    for name, delta in expected.items():
        assert np.linalg.norm(found[name]) ** 2 >= 0.9 * np.linalg.norm(delta) ** 2 * (1 - 1e-6)
    stock = load_pipeline(saved_base(), torch.float32, "cpu")
    stock.load_lora_weights(str(tmp_path), weight_name=out.name)  # diffusers takes one alpha for all
    load_adapter(ours := load_pipeline(saved_base(), torch.float32, "cpu"), out)
    assert max_error(outputs(stock), outputs(ours)) < 1e-4


def test_merging_is_the_weighted_sum(lora, pipeline, tmp_path):
    other = str(saved_lora(seed=2, text=False) / FOLDED_WEIGHTS)
    one, two = deltas(pipeline, lora), deltas(pipeline, other)
    expected = {name: 0.5 * delta - 2 * two.get(name, 0) for name, delta in one.items()}
    main(["merge", lora, other, "--weights", "0.5", "-2", "--output", str(tmp_path / "sum.safetensors")])
    assert relative(deltas(pipeline, tmp_path / "sum.safetensors"), expected) < 1e-6
    main(
        ["merge", lora, other, "--rank", "3", "--to", "kohya", "--dtype", "fp32"]
        + ["--output", str(tmp_path / "3.safetensors")]
    )
    for name, found in deltas(pipeline, tmp_path / "3.safetensors").items():
        U, sigma, Vt = np.linalg.svd(one[name] + two.get(name, 0), full_matrices=False)
        np.testing.assert_allclose(found, (U[:, :3] * sigma[:3]) @ Vt[:3], atol=1e-5 * sigma[0])
    assert header(tmp_path / "3.safetensors")["modelspec.merged_from"].count(",") == 1


def test_merged_files_keep_what_they_share(lora, tmp_path):
    own = {"ss_base_model_version": "sdxl_base_v1-0", "ss_sd_model_name": "base", "modelspec.license": "CC0"}
    main(["convert", lora, "--to", "kohya", "--output", str(tmp_path / "a.safetensors")])
    tensors = load_file(tmp_path / "a.safetensors")
    for name, more in (("cat", {"ss_steps": "10"}), ("dog", {"ss_steps": "20"})):
        words = {"modelspec.title": name, "modelspec.trigger_phrase": f"[V] {name}"}
        save_file(tensors, tmp_path / f"{name}.safetensors", own | words | more)
    both = [str(tmp_path / f"{name}.safetensors") for name in ("cat", "dog")]
    base = ["--base", str(saved_base())]
    main(["merge", *both, *base, "--to", "kohya", "--output", str(tmp_path / "both.safetensors")])
    found = header(tmp_path / "both.safetensors")
    assert found.items() >= own.items() and found["modelspec.merged_from"] == "cat, dog"
    assert found["modelspec.trigger_phrase"] == "[V] cat, [V] dog" and "ss_steps" not in found
    assert found["modelspec.title"] == "both"


@pytest.fixture(scope="module")
def merged(lora, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "base"
    main(["merge", lora, "--weights", "0.5", "--into", str(folder)])
    return folder


def test_merging_into_the_base_and_extracting_it_again(lora, pipeline, merged, tmp_path, capsys):
    """The base with the adapter in it draws as the base with it on; what extract finds is the adapter."""
    ours, expected = load_pipeline(saved_base(), torch.float32, "cpu"), deltas(pipeline, lora)
    load_adapter(ours, lora, 0.5)
    assert max_error(outputs(load_pipeline(merged, torch.float32, "cpu")), outputs(ours)) < 1e-4
    bases = ["--base", str(saved_base()), "--tuned", str(merged)]
    main(["extract", *bases, "--rank", "4", "--dtype", "fp32", "--output", str(tmp_path / "x.safetensors")])
    assert "energy kept: 100.0000% of these layers' difference, 100.0000% of all" in capsys.readouterr().out
    halved = {name: 0.5 * delta for name, delta in expected.items()}
    assert relative(deltas(pipeline, tmp_path / "x.safetensors"), halved) < 1e-5
    target = ["--targets", "attention", "--to", "diffusers", "--output", str(tmp_path / "y.safetensors")]
    main(["extract", *bases, "--rank", "1", *target])
    for name, found in deltas(pipeline, tmp_path / "y.safetensors").items():
        U, sigma, Vt = np.linalg.svd(halved[name], full_matrices=False)
        np.testing.assert_allclose(found, sigma[0] * np.outer(U[:, 0], Vt[0]), atol=1e-4 * sigma[0])


def test_inner_factors_of_a_folded_nora_and_of_nothing_else(pipeline, tmp_path, capsys):
    """From the folded file, by the record's configuration, the run's own inner file comes again; a LoRA has none."""
    record = json.loads((saved_nora() / "run.json").read_text())
    record["config"] |= {"rank": 4, "outer_rank": 8, "method": "nora", "outer_init": "svd"}
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps(record))
    base = ["--base", str(saved_base())]
    main(
        ["extract", *base, "--tuned", str(merged_nora(tmp_path)), "--to", "inner", "--rank", "4", "--outer_rank", "8"]
        + ["--targets", "attention", "--output", str(run / INNER_WEIGHTS)]
    )
    assert "energy kept" in capsys.readouterr().out
    main(["convert", str(run / INNER_WEIGHTS), "--to", "diffusers", "--output", str(run / FOLDED_WEIGHTS), *base])
    record["config"].pop("outer_init")
    (run / "run.json").write_text(json.dumps(record))
    out = tmp_path / "inner.safetensors"
    main(["convert", str(run / FOLDED_WEIGHTS), "--to", "inner", "--output", str(out), *base])
    main(["convert", str(out), "--to", "diffusers", "--output", str(tmp_path / "again.safetensors"), *base])
    assert relative(deltas(pipeline, tmp_path / "again.safetensors"), deltas(pipeline, run / FOLDED_WEIGHTS)) < 1e-4
    assert "is inner-only already" in refused(
        capsys, "convert", str(out), "--to", "inner", "--output", str(tmp_path / "no"), *base
    )
    shutil.copy(saved_lora() / FOLDED_WEIGHTS, run / FOLDED_WEIGHTS)
    said = refused(
        capsys, "convert", str(run / FOLDED_WEIGHTS), "--to", "inner", "--output", str(tmp_path / "no"), *base
    )
    assert "lies outside what this base's NoRA can hold" in said and not (tmp_path / "no").exists()
    lone = str(saved_lora() / FOLDED_WEIGHTS)
    assert "says that it is a NoRA" in refused(
        capsys, "convert", lone, "--to", "inner", "--output", str(tmp_path / "no"), *base
    )


def merged_nora(tmp_path) -> Path:
    main(["merge", str(saved_nora() / FOLDED_WEIGHTS), "--into", str(tmp_path / "nora-base")])
    return tmp_path / "nora-base"


def test_a_foreign_file_needs_no_base(tmp_path, capsys):
    """Of SDXL's shapes, of any origin: read against SDXL's own layers, without a weight."""
    names, tensors = kohya_names("unet", sdxl_outline()["unet"]), {}
    for path in ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.attentions.0.proj_in"):
        n = 2048 if "attn2" in path else 1280
        m = 640 if "attn2" in path else 1280
        tensors |= {
            f"{names[path]}.lora_down.weight": torch.ones(2, n),
            f"{names[path]}.lora_up.weight": torch.ones(m, 2),
        }
        tensors[f"{names[path]}.alpha"] = torch.tensor(1.0)
    source = tmp_path / "found.safetensors"
    save_file(tensors, source, {"ss_base_model_version": "sdxl_base_v1-0", "ss_training_comment": "by hand"})
    main(["convert", str(source), "--to", "peft", "--output", str(tmp_path / "peft")])
    main(
        ["convert", str(tmp_path / "peft"), "--to", "kohya", "--dtype", "fp32"]
        + ["--output", str(tmp_path / "k.safetensors")]
    )
    again = load_file(tmp_path / "k.safetensors")
    key = names["mid_block.attentions.0.proj_in"]
    found = float(again[f"{key}.alpha"]) / 2 * again[f"{key}.lora_up.weight"] @ again[f"{key}.lora_down.weight"]
    assert torch.equal(found, torch.ones(1280, 1280))
    main(["resize", str(source), "--rank", "1", "--output", str(tmp_path / "one.safetensors")])
    assert header(tmp_path / "one.safetensors")["ss_training_comment"] == "by hand"
    capsys.readouterr()
    main(["inspect", str(source)])
    assert "SDXL" in capsys.readouterr().out


def test_a_dora_becomes_its_whole_update(pipeline, tmp_path, capsys):
    """Its magnitudes act on the base's weights: with the base exactly, at full rank; without it a sentence."""
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    W = pipeline.unet.get_submodule(layer).weight.double().numpy()
    up, down, size = (
        np.random.RandomState(seed).randn(*shape) for seed, shape in enumerate(((32, 2), (2, 32), (32, 1)))
    )
    name = kohya_names("unet", pipeline.unet)[layer]
    parts = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": size, "alpha": np.array(2.0)}
    source = tmp_path / "dora.safetensors"
    save_file({f"{name}.{part}": torch.tensor(value).float() for part, value in parts.items()}, source)
    out = ["--to", "kohya", "--dtype", "fp32", "--output", str(tmp_path / "lora.safetensors")]
    assert "name it with --base" in refused(capsys, "convert", str(source), *out)
    main(["convert", str(source), *out, "--base", str(saved_base())])
    whole = W + up @ down
    expected = size * whole / np.linalg.norm(whole, axis=1, keepdims=True) - W
    assert relative(deltas(pipeline, tmp_path / "lora.safetensors"), {f"unet.{layer}": expected}) < 1e-5


KINDS = {
    "DoRA": {"lora_unet_x.dora_scale": (4, 1), "lora_unet_x.lora_down.weight": (2, 3)},
    "LoHa": {"lora_unet_x.hada_w1_a": (4, 2), "lora_unet_x.hada_w1_b": (2, 3)},
    "LoKr": {"lora_unet_x.lokr_w1": (2, 2), "lora_unet_x.lokr_w2": (2, 2)},
    "full difference": {"lora_unet_x.diff": (4, 3)},
    "LoRA of a convolution": {"lora_unet_x.lora_down.weight": (2, 3, 3, 3), "lora_unet_x.lora_up.weight": (4, 2, 1, 1)},
    "OFT or BOFT": {"oft_unet_x.oft_blocks": (2, 4, 4)},
    "an adapter of Flux": {"lora_unet_double_blocks_0_x.set_weight": (2, 4)},
    "a textual inversion": {"clip_l": (1, 768), "clip_g": (1, 1280)},
    "Stable Diffusion 1 or 2": {"lora_te_x.lora_down.weight": (2, 3), "lora_te_x.lora_up.weight": (4, 2)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_names_what_it_sees(tmp_path, capsys, kind):
    save_file({key: torch.zeros(shape) for key, shape in KINDS[kind].items()}, tmp_path / "a.safetensors")
    main(["inspect", str(tmp_path / "a.safetensors")])
    said = capsys.readouterr().out
    assert kind in said or kind == "an adapter of Flux" and "replaced weights" in said, said


def test_inspect_of_a_run_s_folder_and_inner_file(capsys):
    main(["inspect", str(saved_nora()), str(saved_nora() / INNER_WEIGHTS), "--json"])
    folded, inner = json.loads(capsys.readouterr().out)
    assert folded["method"] == inner["method"] == "nora" and inner["kinds"] == {"NoRA": sum(inner["layers"].values())}
    assert folded["layers"] == inner["layers"] and set(inner["ranks"]) == {"4"}


def test_bad_input_is_one_sentence_and_writes_nothing(lora, tmp_path, capsys):
    taken, base = tmp_path / "taken.safetensors", ["--base", str(saved_base())]
    taken.write_text("mine")
    out = ["--output", str(tmp_path / "new.safetensors")]
    other = str(saved_lora(hidden=64) / FOLDED_WEIGHTS)
    oft = tmp_path / "oft.safetensors"
    save_file({"oft_unet_x.oft_blocks": torch.zeros(1, 2, 2)}, oft)
    before = sorted(tmp_path.rglob("*"))
    for argv, words in (
        ([], "no command: choose one of inspect, convert"),
        (["shrink"], "shrink: choose one of"),
        (["inspect"], "required: --adapter"),
        (["inspect", str(tmp_path / "gone")], "does not exist"),
        (["convert", lora, *out], "--to is missing"),
        (["convert", lora, "--to", "inner", "--dtype", "fp16", *out], "inner factors are written in fp32"),
        (["convert", lora, lora, "--to", "peft", *out], "convert takes one adapter, and 2 are named"),
        (["convert", lora, "--to", "peft", "--output", str(taken)], "is there: add --overwrite"),
        (["convert", lora, "--to", "kohya", "--output", lora, "--overwrite"], "it would be lost"),
        (["convert", other, "--to", "kohya", *out, *base], "belongs to another base"),
        (["convert", str(oft), "--to", "kohya", *out, *base], "is of OFT or BOFT"),
        (["resize", lora, *out], "--rank or --energy must say how small"),
        (["resize", lora, "--rank", "2", "--energy", "0.5", *out], "leave one out"),
        (["resize", lora, "--energy", "1.5", *out], "--energy 1.5 must be between 0 and 1"),
        (["resize", lora, "--rank", "2", "--to", "inner", *out], "is no NoRA of the base"),
        (["merge", lora], "give one of them"),
        (["merge", lora, "--weights", "1", "2", *out], "2 numbers for 1 adapters"),
        (["merge", lora, "--weights", "nan", *out], "--weights nan must be"),
        (["merge", lora, "--into", str(tmp_path / "b"), "--rank", "2"], "leave them out"),
        (["extract", *base, "--tuned", str(saved_base()), "--rank", "2", *out], "there is no difference"),
        (["extract", *base, "--tuned", str(saved_base(64)), "--rank", "2", *out], "is built otherwise"),
        (["extract", *base, "--tuned", "x", "--energy", "0.5", "--to", "inner", *out], "say it with --rank"),
    ):
        assert words in refused(capsys, *argv), argv
        assert sorted(tmp_path.rglob("*")) == before and taken.read_text() == "mine", argv


def test_a_file_that_reads_back_otherwise_is_not_kept(lora, tmp_path, capsys, monkeypatch):
    import inference.adapter_work as work

    write = work.write_adapter

    def damaged(path, *rest):
        write(path, *rest)
        tensors = load_file(path)
        key = next(key for key in tensors if "lora_up" in key)
        save_file(tensors | {key: tensors[key] + 1}, path, header(path))

    monkeypatch.setattr(work, "write_adapter", damaged)
    said = refused(capsys, "convert", lora, "--to", "kohya", "--output", str(tmp_path / "a.safetensors"))
    assert "read back differs" in said and not list(tmp_path.iterdir())


def test_an_older_kohya_file_of_diffusers_block_names_is_read(lora, pipeline, tmp_path):
    from diffusers.utils import convert_state_dict_to_kohya

    save_file(convert_state_dict_to_kohya(load_file(lora)), tmp_path / "old.safetensors")
    base = ["--base", str(saved_base())]
    main(
        ["convert", str(tmp_path / "old.safetensors"), "--to", "kohya", "--dtype", "fp32", *base]
        + ["--output", str(tmp_path / "new.safetensors")]
    )
    assert relative(deltas(pipeline, tmp_path / "new.safetensors"), deltas(pipeline, lora)) < 1e-6
    assert any("input_blocks" in key for key in load_file(tmp_path / "new.safetensors"))
