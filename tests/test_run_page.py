"""A run's page: as text, as curves, and in a browser that opens it from disk."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser_pages import broken_figures, decode, sideways, visits
from PIL import Image

from inference.charts import Series, chart, thinned, ticks
from inference.page import picture_data
from inference.run_page import RunPage, RunPicture, render_run_page
from runs.record import is_run_page
from trainer import report

HOSTILE = """</script><img src=x onerror="window.hacked = 1"> "quoted" {{ 7 * 7 }} <!-- -->"""
PROMPTS = ("a [V] cat", "a [V] cat on the beach")


def interval(estimate: float) -> dict:
    own = {"low": estimate - 0.04, "high": estimate + 0.04, "level": 0.95, "varies": ["prompts"], "count": [6]}
    return {"estimate": estimate, **own}


def metrics() -> list[dict]:
    """400 steps, looked at every 100."""
    losses = 0.1 + 0.1 * np.exp(-np.arange(400) / 100) + 0.02 * np.sin(np.arange(400))
    lines = []
    for step, loss in enumerate(losses, start=1):
        lines.append({"step": step, "loss": float(loss), "learning_rate": 1e-4 * (1 - step / 500), "seconds": 0.5})
        if step % 100 == 0:
            lines.append({"step": step, "validation_loss": 0.2 - step / 5000})
            scores = {"dino": 0.5 + step / 2000, "clip_i": 0.6, "clip_t": 0.2, "val_loss": 0.15, "copies": 0.25}
            intervals = {name: interval(scores[name]) for name in ("dino", "clip_i", "clip_t")}
            lines.append({"step": step, **scores, "intervals": intervals, "warnings": []})
    return lines


def picture(step: int, row: int, seed: int) -> RunPicture:
    image = Image.new("RGB", (24, 16), (step // 2, 100 * row, 100 * seed))
    return RunPicture(step, PROMPTS[row], seed, picture_data(image))


def example() -> RunPage:
    """Two prompts with two seeds at three steps; the second seed of the second prompt was first drawn at step 200."""
    places = [(row, seed) for row in (0, 1) for seed in (0, 1)]
    pictures = [picture(step, *place) for step in (100, 200, 300) for place in places if (step, place) != (100, (1, 1))]
    return RunPage(
        title="cat: NoRA",
        state="At step 400 of 500",
        alarms=["step 300 draws its training images"],
        facts={"Base": "tiny", "Written": "2020-01-01 00:00"},
        costs={"Trainable parameters": "2,290,000", "Seconds per step": "0.5 s", "Peak memory": "1.5 GB"},
        flags={"rank": 16, "instance_prompt": PROMPTS[0], "validation_prompt": list(PROMPTS), "snr_gamma": None},
        changed={"instance_prompt", "validation_prompt"},
        metrics=metrics(),
        last_step=500,
        pictures=pictures,
        best_step=400,
    )


# --- curves -----------------------------------------------------------------------------------------------------------


def coordinates(path: str) -> np.ndarray:
    return np.array(
        [[float(number) for number in pair.split(" ")] for pair in re.findall(r"[ML]([^ML]+?) ?(?=[ML]|$)", path)]
    )


def test_a_curve_stands_where_its_values_are():
    points = [(1, 0.5), (50, 0.25), (100, 0.3)]
    drawn = chart("t", [Series("a", "line", points, [(50, 0.2, 0.35)])], 200)
    found = coordinates(drawn["series"][0]["path"])
    steps, values = np.array(points).T
    low, high = 0.2 - 0.05 * 0.3, 0.5 + 0.05 * 0.3  # a twentieth more than the highest and lowest end of an interval
    assert found == pytest.approx(
        np.stack([1000 * steps / 200, 1000 * (high - values) / (high - low)], axis=1), rel=1e-3
    )
    bar = coordinates(drawn["series"][0]["bars"])
    assert bar[:, 0] == pytest.approx([250, 250]) and bar[0, 1] > found[1, 1] > bar[1, 1]
    assert all(0 <= row["place"] <= 100 for row in drawn["rows"] + drawn["columns"])
    assert drawn["summary"] == "step 100: a 0.3"
    assert chart("t", [Series("a", "line", [])], 10) is None


def test_one_outlier_does_not_flatten_the_steps():
    losses = [(step, 0.1 + 0.001 * (step % 7)) for step in range(1, 301)]
    losses[7] = (8, 50.0)
    assert float(chart("t", [Series("each step", "faint", losses)], 300)["rows"][-1]["text"]) < 0.2
    assert float(chart("t", [Series("validation", "points", losses)], 300)["rows"][-1]["text"]) > 20


def test_long_curves_are_thinned_and_end_at_their_end():
    assert thinned(range(10), 4) == [0, 3, 6, 9] and thinned([1, 2], 4) == [1, 2] and thinned(range(7), 2) == [2, 6]
    drawn = chart("t", [Series("a", "line", [(step, step) for step in range(1, 50_001)])], 50_000)
    assert len(drawn["series"][0]["steps"]) == 1000 and drawn["series"][0]["steps"][-1] == 50_000


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (3, 3, [3]), (0, 7e-5, [0, 2e-5, 4e-5, 6e-5])]
)
def test_ticks_are_round_numbers(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


# --- the text ---------------------------------------------------------------------------------------------------------


def test_the_text_holds_each_picture_once_and_fetches_nothing(tmp_path):
    page = replace(example(), title=HOSTILE, alarms=[HOSTILE], facts={HOSTILE: HOSTILE}, flags={"a": HOSTILE})
    page = replace(
        page,
        pictures=[
            *page.pictures,
            replace(page.pictures[0], prompt=HOSTILE, data=picture_data(Image.new("RGB", (9, 9)))),
        ],
    )
    text = render_run_page(page)
    found = re.findall(r"data:image/[a-z]+;base64,[\w+/=]+", text)
    assert len(found) == len(set(found)) == len(page.pictures)
    rest = re.sub(r"base64,[\w+/=]+", "", text)
    assert not re.search(r"https?:|//[a-z]+\.|url\(|@import|<link|<iframe|<script[^>]* src|innerHTML", rest)
    assert "<img src=x" not in text and HOSTILE not in text and text.count("</script>") == 2
    assert text.lstrip().startswith("<!doctype html>")
    (tmp_path / "run.html").write_text(text)
    assert is_run_page(tmp_path / "run.html")


def test_pictures_stay_within_the_limit(monkeypatch):
    pictures = [picture(step, 0, seed) for step in range(100, 500, 10) for seed in (0, 1)]
    size = len(pictures[0].data["uri"])
    monkeypatch.setattr(report, "MOST_BYTES", 25 * size)
    kept = report.within_limit(pictures)
    steps = sorted({one.step for one in kept})
    assert sum(len(one.data["uri"]) for one in kept) <= 25 * size and len(steps) >= 10
    assert steps[-1] == 490 and len(set(np.diff(steps))) == 1  # evenly, the last among them
    monkeypatch.setattr(report, "MOST_BYTES", 3 * size // 2)
    assert len(report.within_limit(pictures)) == 1


# --- the browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("run-pages")
    empty = RunPage("empty", "At step 1 of 2", [], {}, {}, {"rank": 1}, set(), metrics()[:1], 2)
    for name, page in {"example": example(), "empty": empty}.items():
        (folder / f"{name}.html").write_text(render_run_page(page), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in ("example", "empty")}


@pytest.fixture
def visit(browser, files):
    with visits(browser, files) as visit:
        yield visit


def colours(page) -> list[tuple[int, ...]]:
    sources = page.locator(".sample img").evaluate_all("images => images.map(image => image.src)")
    return [decode(source).getpixel((0, 0)) for source in sources]


def test_the_slider_walks_through_the_samples_and_points_at_the_curves(visit):
    page = visit()
    assert colours(page) == [(150, 0, 0), (150, 0, 100), (150, 100, 0), (150, 100, 100)]
    page.focus("#step")
    page.keyboard.press("Home")
    assert page.locator("output[for=step]").inner_text() == "100"
    assert colours(page) == [(50, 0, 0), (50, 0, 100), (50, 100, 0), (100, 100, 100)]  # the last has none of then
    captions = page.locator(".sample figcaption").all_inner_texts()
    assert captions[0] == "seed 0 · step 100" and captions[3] == "seed 1 · step 200"
    readings = page.locator(".reading").all_inner_texts()
    loss = next(line["loss"] for line in metrics() if line["step"] == 100)
    assert readings[0].startswith(f"step 100: each step {float(f'{loss:.5g}')}; mean of the last 40 steps")
    assert "validation, fixed timesteps and noise 0.18" in readings[0] and "DINO" in readings[2]
    assert page.locator(".cursor:visible").count() == len(readings) == 5
    page.locator(".chart").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".reading").first.inner_text().startswith("step 105:")
    page.keyboard.press("End")
    assert page.locator(".reading").first.inner_text().startswith("step 400:")  # as far as the run is
    box = page.locator(".plot").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    assert page.locator(".reading").nth(1).inner_text().startswith("step 250:")
    rows = page.locator(".config tr:visible")
    assert rows.count() == 4
    page.fill("#filter", "PROMPT")
    assert page.locator(".config tr:visible th").all_inner_texts() == ["instance_prompt", "validation_prompt"]
    page.fill("#filter", "")
    page.check("#changed")
    assert rows.count() == 2 and page.locator("#count").inner_text() == "2 of 4 flags"
    text = page.inner_text("main")
    for word in ("At step 400 of 500", "draws its training images", "0.700 [0.660, 0.740]", "400 (best)", "2,290,000"):
        assert word in text, word


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_all_in_one_direction(visit, scheme):
    page = visit(width=390, height=844, has_touch=True, is_mobile=True, color_scheme=scheme)
    assert sideways(page) <= 0
    assert broken_figures(page, "#scores td, #costs dd, .plot span") == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(27, 27, 27)"
    assert dark == (scheme == "dark")
    left, right = (page.locator(".sample").nth(place).bounding_box() for place in (0, 1))
    assert left["y"] == right["y"] and left["width"] > 150


def test_without_scripts_curves_samples_and_flags_are_there(visit):
    page = visit(java_script_enabled=False)
    assert not page.locator(".bar").is_visible() and not page.locator(".tools").is_visible()
    assert page.locator(".plot path.line").count() == 2 and len(colours(page)) == 4
    assert page.locator(".reading").nth(1).inner_text() == "step 400: learning rate 2e-05"
    assert page.locator(".config tr").count() == 4


def test_a_run_of_one_step_has_a_page(visit):
    page = visit("empty")
    assert "None yet" in page.inner_text("#samples") and "Nothing to warn of" in page.inner_text("#alarm")
    assert page.locator("#step").count() == 0 and page.locator("#scores").count() == 0
