"""What fits a budget: counts against the layers themselves and published figures of SDXL, files against files."""

import functools

import pytest
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from tiny_sdxl import saved_base
from torch import nn

from benchmarks.sdxl_shape import build_sdxl_shape
from methods import budget
from methods.adapter import Passes, Places, make_adapter
from methods.components import INNER_WEIGHTS
from methods.files import save_files
from methods.registry import METHODS, find_method, resolve
from nora.files import parse_inner

# Trained parameters in SDXL's UNet, 560 attention layers, of the methods' own papers and code (Σ(m + n) = 1,451,520).
SDXL = {
    "lora": (["rank=4"], 5_806_080),
    "dora": (["rank=4"], 6_471_680),
    "mica": (["rank=4"], 3_143_680),
    "lora-fa": (["rank=4"], 2_662_400),
    "adalora": (["init_rank=12"], 17_424_960),
    "vera": (["rank=256"], 808_960),
    "moslora": (["rank=4"], 5_815_040),
    "lokr": (["rank=8", "factor=-1"], 904_640),
    "loha": (["rank=4"], 11_612_160),
    "randlora": (["rank=32"], 26_265_600),
    "oft": (["block_size=32"], 12_181_760),
    "hra": (["rank=8"], 6_287_360),
    "fourierft": (["n_frequency=1000"], 560_000),
    "nora": (["rank=16", "outer_rank=128"], 2_293_760),
    "lora-xs": (["rank=64"], 2_293_760),
    "nola": (["coefficients=512"], 573_440),
}


@functools.cache
def sdxl_layers():
    with init_empty_weights():
        return budget.layers_of({"unet": build_sdxl_shape("full").unet}, Places())


@pytest.mark.parametrize("name", SDXL)
def test_counts_on_sdxl(name):
    arguments, expected = SDXL[name]
    found = budget.setting(find_method(name), resolve(name, arguments, {}), sdxl_layers())
    assert found.parameters == expected


OPTIONS = {"oft": ["block_size=4"], "adalora": ["init_rank=3", "target_rank=2"], "fourierft": ["n_frequency=50"]}
OPTIONS |= {"nola": ["rank=2", "coefficients=40"], "nola-nora": ["rank=2", "coefficients=40"]}


@pytest.mark.parametrize("name", METHODS)
def test_counts_are_those_of_the_layers_and_of_the_smallest_file(name, tmp_path):
    torch.manual_seed(0)
    model = nn.Module()
    model.attn = nn.ModuleDict({"to_q": nn.Linear(24, 16), "to_k": nn.Linear(32, 48, bias=False)})
    args = resolve(name, OPTIONS.get(name, ["rank=2"]), {})
    adapter = make_adapter(name, args, total_steps=2)
    inputs = torch.randn(3, 24), torch.randn(3, 32)

    def run(*_):
        model.attn["to_q"](inputs[0])
        model.attn["to_k"](inputs[1])

    adapter.inject("unet", model, Passes(run, run, "test", ""))
    layers = [budget.Layer(16, 24, 1), budget.Layer(48, 32, 1)]
    found = budget.setting(find_method(name), args, layers)
    assert found.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    files = [path for path in save_files(adapter, tmp_path, peft=True) if path.endswith(".safetensors")]
    sizes = []
    for path in files:
        if path == INNER_WEIGHTS:  # without the fingerprints
            entries = parse_inner(tmp_path / path).trained.values()
            sizes.append(sum(tensor.numel() for one in entries for tensor in one.values()))
            continue
        with safe_open(tmp_path / path, "pt") as file:
            keys = [key for key in file.keys() if not key.endswith("fingerprint")]  # noqa: SIM118 (no mapping)
            sizes.append(sum(file.get_tensor(key).numel() for key in keys))
    if name == "adalora":  # nothing was trained, so that all but one component of a layer are left out
        assert found.file_numbers == 2 * (16 + 24 + 48 + 32)
    else:
        assert found.file_numbers == pytest.approx(min(sizes), rel=0.05)


@pytest.mark.parametrize("limit", [2.3e6, 30e6])
@pytest.mark.parametrize("name", METHODS)
def test_no_other_setting_is_nearer_to_the_budget(name, limit):
    """Of every value near the one found, and of all where a step of it may take more or less."""
    layers, method = sdxl_layers(), find_method(name)
    option, values = budget.SIZES.get(name, ("rank", range(1, budget.LARGEST + 1)))
    found = budget.nearest(method, layers, lambda one: one.parameters, limit)
    if found is None:
        assert all(budget._at(method, value, layers).parameters > limit for value in values[:3])
        return
    place = list(values).index(int(found.said.partition("=")[2].split()[0]))
    others = values if name in budget.UNEVEN else values[max(0, place - 3) : place + 4]
    settings = [one for value in others if (one := budget._at(method, value, layers)) is not None]
    assert found.parameters == max(one.parameters for one in settings if one.parameters <= limit)


@pytest.mark.parametrize("flags", [["--params", "20K"], ["--file", "60KB", "--text_encoders"], ["--memory", "1GB"]])
def test_the_command(flags, capsys):
    budget.main(["--base", str(saved_base()), *flags])
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[1:]] == list(METHODS)
    shares = [float(row.split(" | ")[-1].rstrip(" |")) for row in rows[1:] if "none fits" not in row]
    assert len(shares) > 10 and max(shares) <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--params", "many"], "many must look like 2.3M"),
        (["--file", "1"], "1 must look like 1MB or 6GB"),
        ([], "give one of --params, --file and --memory"),
        (["--params", "1M", "--file", "1MB"], "give one of"),
    ],
)
def test_what_is_no_budget(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        budget.main(["--base", str(saved_base()), *flags])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_that_is_no_base(tmp_path, capsys):
    with pytest.raises(SystemExit):
        budget.main(["--base", str(tmp_path), "--params", "1M"])
    assert "has no configuration of an SDXL base" in capsys.readouterr().err
