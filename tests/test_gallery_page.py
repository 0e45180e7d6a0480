"""inference.page: the gallery's page, as text and in a browser that opens it from disk."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
from browser_pages import broken_figures, decode, sideways, visits
from PIL import Image

from inference.page import Page, PageColumn, PagePicture, render_page

NAMES = ("stock", "plain-lora", "nested-nora")  # words that the page has no use for elsewhere
PROMPTS = ("a cat in the Jungle", "a cat on the beach", "a dog in the jungle")
SEEDS = (0, 7)
STEPS, SCALES = (100, 200), (0.5, 1.0)
MISSING = (NAMES[2], PROMPTS[2], 7)
HOSTILE = """</script><img src=x onerror="window.hacked = 1"> "quoted" & 'single' {{ 7 * 7 }} <!-- -->"""


def picture(*place: int) -> Image.Image:
    """A picture whose colour is its place, so that a test can tell what it sees."""
    return Image.new("RGB", (24, 16), tuple(place))


def columns(count: int = 3) -> list[PageColumn]:
    figures = {"Method": "NoRA", "Trainable parameters": "2,290,000"}
    return [PageColumn(NAMES[0], "no adapter", {}, {"DINO": "0.31 ± 0.02"})] + [
        PageColumn(name, "rank 4", figures, {"DINO": f"0.7{index} ± 0.02"}) for index, name in enumerate(NAMES[1:count])
    ]


def example() -> Page:
    """The base; a column with two steps at two scales; one with only its last step, and a picture that is missing.

    Colours are (column, row, shot's position).
    """
    pictures: dict[tuple[str, str, int], list[PagePicture]] = {}
    rows, scores = [(prompt, seed) for prompt in PROMPTS for seed in SEEDS], {}
    for row, (prompt, seed) in enumerate(rows):
        ladder = [(scale, step) for step in STEPS for scale in SCALES]
        pictures[NAMES[0], prompt, seed] = [PagePicture(None, None, picture(0, row, 0))]
        pictures[NAMES[1], prompt, seed] = [
            PagePicture(*rung, picture(1, row, place)) for place, rung in enumerate(ladder)
        ]
        command = f"python -m inference.generate --adapter={NAMES[2]} --prompt='{prompt}' --seed={seed}"
        pictures[NAMES[2], prompt, seed] = [PagePicture(1.0, 200, picture(2, row, 0), command)]
        scores[NAMES[1], prompt, seed] = {"DINO ↑": (0.2, 0.3, 0.9, 0.7, 0.5, 0.6)[row]}
        if seed == 0:
            scores[NAMES[2], prompt, seed] = {"Drift ↓": 0.1 * row}
    del pictures[MISSING]
    settings = {"Base": "tiny", "Columns": ", ".join(NAMES)}
    instances = [("cat.png", Image.new("RGB", (400, 200), "red"))]
    title, findings = "Side by side: " + ", ".join(NAMES), [f"{NAMES[1]} is 0.1 higher than {NAMES[2]} in DINO."]
    return Page(title, settings, columns(), PROMPTS, SEEDS, pictures, instances, findings, scores)


def simple(names: list[str], prompts: list[str], size: tuple[int, int] = (24, 16), **options) -> Page:
    """One seed, one picture a cell."""
    keys = [(name, prompt, 0) for name in names for prompt in prompts]
    pictures = {key: [PagePicture(None, None, Image.new("RGB", size, (place, 9, 9)))] for place, key in enumerate(keys)}
    made = [PageColumn(name, "", {}, {}) for name in names]
    return Page(options.get("title", "t"), options.get("settings", {}), made, prompts, [0], pictures)


# --- the text ---------------------------------------------------------------------------------------------------------


def uris(text: str) -> list[str]:
    return re.findall(r"data:image/[a-z]+;base64,[\w+/=]+", text)


def test_each_picture_is_in_the_page_once_and_nothing_is_fetched():
    page = example()
    text = render_page(page)
    found = uris(text)
    assert len(found) == len(set(found)) == 1 + sum(len(pictures) for pictures in page.pictures.values())
    rest = re.sub(r"base64,[\w+/=]+", "", text)
    assert not re.search(r"https?:|//[a-z]+\.|url\(|@import|<link|<iframe|<script[^>]* src|innerHTML", rest)
    assert "default-src 'none'; img-src data:" in rest  # and the browser holds the page to it


def test_pictures_are_exact_up_to_256_pixels_and_webp_above():
    for side, kind in ((256, "PNG"), (257, "WEBP")):
        drawn = Image.radial_gradient("L").resize((side, 64)).convert("RGB")
        page = replace(simple(["x"], ["a"]), pictures={("x", "a", 0): [PagePicture(None, None, drawn)]})
        (uri,) = uris(render_page(page))
        with decode(uri) as image:
            assert (image.format, image.size) == (kind, (side, 64))
            if kind == "PNG":
                assert image.tobytes() == drawn.tobytes()


def test_instance_images_are_shrunk_and_small_ones_left():
    large, small = Image.new("RGB", (2000, 1000), "red"), Image.new("RGB", (30, 40), "blue")
    page = replace(simple(["x"], ["a"]), instances=[("l.jpg", large), ("s.png", small)])
    assert [decode(uri).size for uri in uris(render_page(page))[:2]] == [(320, 160), (30, 40)]
    assert large.size == (2000, 1000)  # the caller's picture is not touched


def test_a_cell_shows_the_last_step_at_the_scale_nearest_to_one():
    ladder = [(1.0, 300), (0.5, 400), (0.9, 400), (1.5, 400), (1.0, 100)]
    pictures = [PagePicture(scale, step, picture(9, 9, place)) for place, (scale, step) in enumerate(ladder)]
    text = render_page(replace(simple(["x"], ["a"]), pictures={("x", "a", 0): pictures}))
    assert decode(re.search(r'class="picture"><img src="([^"]+)"', text)[1]).getpixel((0, 0)) == (9, 9, 2)


def test_texts_are_escaped_and_come_back_whole():
    page = replace(simple([HOSTILE], [HOSTILE], title=HOSTILE, settings={HOSTILE: HOSTILE}))
    page = replace(page, columns=[PageColumn(HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE})])
    text = render_page(page)
    assert "<img src=x" not in text and HOSTILE not in text and text.count("</script>") == 2
    assert escape(HOSTILE).replace("&quot;", "&#34;").replace("&#x27;", "&#39;") in text
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])
    assert data["names"] == [HOSTILE] and data["rows"][0]["prompt"] == HOSTILE


def test_what_the_scores_show_is_said_in_sentences():
    assert "is 0.1 higher than" in render_page(example()) and "What the scores show" in render_page(example())
    assert "What the scores show" not in render_page(simple(["a"], ["p"]))


def test_a_picture_without_a_place_is_refused():
    page = simple(["x"], ["a"])
    with pytest.raises(AssertionError, match="without a place"):
        render_page(replace(page, prompts=["b"]))


# --- the browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The pages that tests open, rendered once."""
    folder = tmp_path_factory.mktemp("pages")
    pages = {
        "example": example(),
        "flat": simple(["x", "y"], ["a"]),
        "hostile": simple(["<b>x</b>", HOSTILE], [HOSTILE, "a"], title=HOSTILE, settings={"Base": HOSTILE}),
        "large": simple(["x"], ["a"], size=(600, 500)),
        "wide": simple([f"column-{index}" for index in range(10)], ["w" * 200]),
    }
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(render_page(page), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in pages}


@pytest.fixture
def visit(browser, files):
    with visits(browser, files) as visit:
        yield visit


def colours(page, selector=".cell img") -> list[tuple[int, ...]]:
    """The pixel of each picture that is on show, which tells its column, row and place."""
    sources = page.locator(selector).evaluate_all("images => images.filter(i => i.offsetParent).map(i => i.src)")
    return [decode(source).getpixel((0, 0)) for source in sources]


def clip(page, selector) -> str:
    return page.locator(selector).first.evaluate("image => getComputedStyle(image).clipPath")


def focused(page) -> str:
    """The text of the picture that has the focus."""
    return page.evaluate("document.activeElement.querySelector('img')?.alt ?? document.activeElement.ariaLabel")


def comes_to_focus(page, alt):
    """Whether the focus gets there: a closing dialog gives it back in an event of its own."""
    for _ in range(100):
        if focused(page) == alt:
            return True
        page.wait_for_timeout(50)
    return False


def test_every_image_is_loaded_and_has_an_alt_text(visit):
    page = visit()
    images = page.locator("img").evaluate_all(
        "images => Promise.all(images.map(i => i.decode().then(() => [i.naturalWidth, i.alt])))"
    )
    assert len(images) == 1 + len(PROMPTS) * len(SEEDS) * 3 - 1
    assert all(width > 0 for width, _ in images)
    assert images[0][1] == "training picture cat.png"
    alts = [alt for _, alt in images[1:]]
    assert len(set(alts)) == len(alts) and alts[1] == f"{NAMES[1]}, seed 0: {PROMPTS[0]}"
    assert page.locator(".missing").inner_text() == "no picture"
    text = page.inner_text("body")
    for word in ("0.31 ± 0.02", "2,290,000", "rank 4", "tiny", *NAMES, *PROMPTS):
        assert word in text, word
    assert page.locator(".figures").get_attribute("open") is not None


def test_headers_and_bar_stay_while_scrolling(visit):
    page = visit(height=500)
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.wait_for_function("() => scrollY > 300")  # a function: the page forbids to evaluate text again
    bar, head = page.locator(".top").bounding_box(), page.locator(".head").first.bounding_box()
    assert bar["y"] == 0 and bar["height"] <= head["y"] < bar["height"] + 20


def test_zoom_opens_by_click_and_walks_to_neighbours(visit):
    page = visit()
    page.click(f"img[alt='{NAMES[1]}, seed 0: {PROMPTS[0]}']")
    caption, large = page.locator("#zoom .caption"), page.locator("#zoom .stage img")
    assert caption.inner_text() == f"{NAMES[1]} · {PROMPTS[0]} · seed 0 · scale 1 · step 200 · DINO ↑ 0.2"
    assert large.evaluate("image => [image.width / 24, getComputedStyle(image).imageRendering]") == [32, "auto"]
    assert colours(page, "#zoom img") == [(1, 0, 3)]
    walk = {"ArrowRight": (2, 0, 0), "ArrowDown": (2, 1, 0), "ArrowLeft": (1, 1, 3), "ArrowUp": (1, 0, 3)}
    for key, expected in walk.items():
        page.keyboard.press(key)
        assert colours(page, "#zoom img") == [expected], key
    page.keyboard.press("ArrowUp")  # the edge
    assert colours(page, "#zoom img") == [(1, 0, 3)]
    page.click("#zoom button[value=ArrowLeft]")
    assert caption.inner_text() == f"{NAMES[0]} · {PROMPTS[0]} · seed 0"  # the base has neither scale nor step
    assert page.locator("#zoom button[value=ArrowLeft]").is_disabled()
    page.keyboard.press("Escape")
    assert not page.locator("#zoom").is_visible()
    assert comes_to_focus(page, f"{NAMES[0]}, seed 0: {PROMPTS[0]}")  # where the walk ended


def test_keys_still_walk_after_a_button_reached_the_edge(visit):
    page = visit()
    page.locator(".picture").nth(1).click()
    page.click("#zoom button[value=ArrowLeft]")  # there is no column further left, so the button gives up its focus
    page.keyboard.press("ArrowRight")
    assert colours(page, "#zoom img") == [(1, 0, 3)]


def test_the_browsers_own_keys_are_left_to_it(visit):
    page = visit()
    page.locator(".picture").nth(1).focus()
    page.evaluate("document.addEventListener('keydown', event => { window.taken = event.defaultPrevented; })")
    page.keyboard.press("Control+ArrowDown")
    assert page.evaluate("window.taken") is False
    page.keyboard.press("ArrowDown")
    assert page.evaluate("window.taken") is True


def test_zoom_fits_large_pictures_and_shows_training_pictures(visit):
    page = visit("large", width=390, height=800)
    page.click(".picture")
    box = page.locator("#zoom .stage img").bounding_box()
    assert box["width"] <= 390 and abs(box["width"] / box["height"] - 600 / 500) < 0.01
    page = visit()
    page.click(".instance")
    assert page.locator("#zoom .caption").inner_text() == "training picture cat.png"
    assert page.locator("#zoom .steps button:visible").count() == 0
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    assert comes_to_focus(page, "training picture cat.png")


def test_the_grid_is_walked_by_keyboard(visit):
    page = visit()
    assert page.locator(".picture[tabindex='0']").count() == 1
    page.locator(".picture").first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert focused(page) == f"{NAMES[2]}, seed 7: {PROMPTS[0]}"
    for _ in range(9):  # to the last row that has a picture in this column
        page.keyboard.press("ArrowDown")
    assert focused(page) == f"{NAMES[2]}, seed 0: {PROMPTS[2]}"
    assert page.locator(".picture[tabindex='0']").count() == 1
    page.keyboard.press("Enter")
    assert colours(page, "#zoom img") == [(2, 4, 0)]
    page.keyboard.press("Escape")
    assert comes_to_focus(page, f"{NAMES[2]}, seed 0: {PROMPTS[2]}")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("b")  # not while a dialog is open
    assert page.locator("body").get_attribute("data-mode") == "grid"
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("b/c?")
    assert page.locator("#filter").input_value() == "b/c?" and not page.locator("#keys").is_visible()
    assert page.locator("body").get_attribute("data-mode") == "grid"


def test_filter_matches_any_case_and_counts(visit):
    page = visit()
    count, headings = page.locator("#count"), page.locator(".block h2:visible")
    assert count.inner_text() == "3 of 3 prompts"
    page.fill("#filter", "JUNGLE")
    assert count.inner_text() == "2 of 3 prompts" and headings.all_inner_texts() == [PROMPTS[0], PROMPTS[2]]
    page.locator(".picture:visible").nth(3).focus()  # down from here passes over the hidden prompt
    page.keyboard.press("ArrowDown")
    assert comes_to_focus(page, f"{NAMES[0]}, seed 0: {PROMPTS[2]}")
    page.fill("#filter", "zebra")
    assert count.inner_text() == "0 of 3 prompts" and headings.count() == 0
    assert page.locator("#nothing").is_visible()
    page.fill("#filter", "")
    assert headings.count() == 3 and not page.locator("#nothing").is_visible()


def test_step_and_scale_choose_the_nearest_picture(visit):
    page = visit()
    assert colours(page)[:3] == [(0, 0, 0), (1, 0, 3), (2, 0, 0)]
    output = {key: page.locator(f"output[for={key}]") for key in ("step", "scale")}
    assert (output["step"].inner_text(), output["scale"].inner_text()) == ("200", "1")
    page.focus("#step")
    page.keyboard.press("ArrowLeft")
    assert output["step"].inner_text() == "100"
    assert colours(page)[:3] == [(0, 0, 0), (1, 0, 1), (2, 0, 0)]
    assert page.locator(".row").first.locator(".note").all_inner_texts() == ["", "", "step 200"]
    page.focus("#scale")
    page.keyboard.press("ArrowLeft")
    assert output["scale"].inner_text() == "0.5"
    assert colours(page)[:3] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    page.locator(".picture").nth(1).click()
    assert page.locator("#zoom .caption").inner_text().endswith("scale 0.5 · step 100 · DINO ↑ 0.2")
    width = page.evaluate(
        """() => {
          document.querySelector("#zoom").close();
          const step = document.querySelector("#step");
          step.value = 1;
          step.dispatchEvent(new Event("input"));
          document.querySelectorAll(".picture")[1].click();
          return document.querySelector("#zoom .stage img").width;
        }"""
    )
    assert width == 768  # the size is known before the browser has read the new picture
    page = visit("flat")
    assert page.locator(".choice").count() == 0


def test_compare_moves_its_divider_by_keyboard_mouse_and_touch(visit):
    page = visit(has_touch=True)
    page.keyboard.press("c")
    assert page.locator(".pair figcaption span").all_inner_texts()[:2] == [f"A {NAMES[0]}", f"B {NAMES[2]}"]
    assert page.locator(".pair input").count() == 5 and "no picture of both" in page.inner_text("main")
    assert colours(page, ".row .over")[0] == (0, 0, 0) and colours(page, ".row .under")[0] == (2, 0, 0)
    slider, split = page.locator(".pair input").first, page.locator(".split").first
    assert slider.get_attribute("aria-label").startswith(f"Divider between {NAMES[0]} and {NAMES[2]}")
    assert "50%" in clip(page, ".over")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert "49%" in clip(page, ".over")  # clipped from the right: more of A
    box = split.bounding_box()
    x, y = box["x"], box["y"] + box["height"] / 2
    page.mouse.move(x + 0.5 * box["width"], y)
    page.mouse.down()
    page.mouse.move(x + 0.25 * box["width"], y, steps=3)
    page.mouse.up()
    assert "75%" in clip(page, ".over") and slider.input_value() == "25"
    page.mouse.move(x + 0.9 * box["width"], y)  # released
    assert slider.input_value() == "25"
    touch = page.context.new_cdp_session(page)
    for kind, where in (("touchStart", 0.3), ("touchMove", 0.6), ("touchMove", 0.8), ("touchEnd", None)):
        points = [] if where is None else [{"x": x + where * box["width"], "y": y}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.wait_for_function("() => document.querySelector('.pair input').value === '80'")
    assert "20%" in clip(page, ".over")


def test_compare_takes_any_two_columns_and_zooms(visit):
    page = visit()
    page.click("#compare")
    page.select_option("#side-a", label=NAMES[1])
    page.select_option("#side-b", label=NAMES[0])
    assert colours(page, ".row .over")[0] == (1, 0, 3) and colours(page, ".row .under")[0] == (0, 0, 0)
    assert page.locator(".pair input").count() == 6  # this pair of columns has all
    page.locator(".pair input").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert colours(page, "#zoom .over") == [(1, 1, 3)]
    page.keyboard.press("ArrowLeft")
    assert "51%" in clip(page, "#zoom .over")
    page.keyboard.press("ArrowUp")
    assert colours(page, "#zoom .over") == [(1, 0, 3)] and "50%" in clip(page, "#zoom .over")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Escape")
    page.wait_for_function("() => !document.querySelector('#zoom .stage').children.length")  # closed in its own event
    assert focused(page).endswith(f"seed 7: {PROMPTS[0]}")
    assert page.locator(".row .pair input").nth(1).input_value() == "49"  # as it was left in the dialog
    page.keyboard.press("c")
    assert page.locator(".pair").count() == 0 and len(colours(page)) == 17


# --- columns, order, commands, export --------------------------------------------------------------------------------


def test_columns_are_chosen_in_every_mode(visit):
    page = visit(setup=SEEDED)
    page.click(".menu summary")
    page.click(f"#columns label:has-text('{NAMES[0]}')")
    assert {colour[0] for colour in colours(page)} == {1, 2}
    assert page.locator(".head strong:visible").all_inner_texts() == list(NAMES[1:])
    left, right = (page.locator(place).first.bounding_box()["x"] for place in (".head:visible", ".cell:visible"))
    assert abs(left - right) < 2  # a header stands above its column
    page.locator(".picture:visible").first.focus()
    page.keyboard.press("ArrowLeft")  # no column there any more
    page.keyboard.press("ArrowRight")
    assert focused(page) == f"{NAMES[2]}, seed 0: {PROMPTS[0]}"
    page.keyboard.press("b")
    assert {colour[0] for row in rows_of(page) for colour in row if colour} >= {1, 2}
    assert page.locator(".row").nth(5).locator(".best:visible").count() == 0  # a single picture is no choice
    page.locator(".row").first.locator(".best:visible").first.click()
    page.keyboard.press("b")
    assert page.locator("#tally tbody th").all_inner_texts() == [*NAMES[1:], "no difference"]
    page.keyboard.press("b")
    page.click(f"#columns label:has-text('{NAMES[1]}')")
    last = page.locator("#columns input").nth(2)
    assert last.is_checked() and last.is_disabled() and {colour[0] for colour in colours(page)} == {2}
    page.click(f"#columns label:has-text('{NAMES[0]}')")
    assert colours(page)[:2] == [(0, 0, 0), (2, 0, 0)]  # back in its place, though blind mode had moved it


def test_rows_are_sorted_by_a_score_prompts_together(visit):
    page = visit()
    page.click(".menu summary")
    page.select_option("#sort", label=f"DINO ↑ {NAMES[1]}")
    assert page.locator(".block h2").all_inner_texts() == [PROMPTS[1], PROMPTS[2], PROMPTS[0]]
    assert [colour[1] for colour in colours(page) if colour[0] == 1] == [2, 3, 5, 4, 1, 0]
    assert page.locator(".row").first.locator(".note").nth(1).inner_text() == "DINO ↑ 0.9"
    page.locator(".picture").first.focus()
    page.keyboard.press("ArrowDown")  # keys follow the order on show
    assert focused(page) == f"{NAMES[0]}, seed 7: {PROMPTS[1]}"
    page.select_option("#sort", label=f"Drift ↓ {NAMES[2]}")  # low is good; what has no score comes last
    assert [colour[1] for colour in colours(page) if colour[0] == 0] == [0, 1, 2, 3, 4, 5]
    page.select_option("#sort", value="")
    assert page.locator(".block h2").all_inner_texts() == list(PROMPTS)


def test_the_command_of_a_picture_is_copied(visit):
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".picture").nth(1).click()
    assert not page.locator("#copy-command").is_visible()  # nobody knows how that one was drawn
    page.keyboard.press("ArrowRight")
    page.click("#copy-command")
    page.wait_for_selector("#command-copied:not(:empty)")
    command = f"python -m inference.generate --adapter={NAMES[2]} --prompt='{PROMPTS[0]}' --seed=0"
    assert page.evaluate("navigator.clipboard.readText()") == command
    assert not page.locator("#command").is_visible()
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }")
    page.click("#copy-command")
    page.wait_for_selector("#command:visible")
    assert page.evaluate("getSelection().toString()") == command


def test_what_is_on_show_is_saved_as_one_png_from_disk(visit, tmp_path):
    page = visit()
    assert page.url.startswith("file:")
    page.fill("#filter", "jungle")
    page.click(".menu summary")
    page.click(f"#columns label:has-text('{NAMES[0]}')")
    with page.expect_download() as waiting:
        page.click("#export")
    waiting.value.save_as(tmp_path / "selection.png")
    assert waiting.value.suggested_filename == "example-selection.png"
    with Image.open(tmp_path / "selection.png") as image:
        assert image.format == "PNG"
        found = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 20)}
        places = [(1, row, 3) for row in (0, 1, 4, 5)] + [(2, row, 0) for row in (0, 1, 4)]
        assert {colour for colour in found if colour[2] in (0, 3) and colour[0] < 3 and colour[1] < 6} >= set(places)
        assert all(found[place] >= 0.98 * 192 * 128 for place in places)  # whole, two columns of four rows
        assert not any(colour in found for colour in [(0, 4, 0), (0, 5, 0), (1, 2, 3)])  # not what was filtered out
        assert f"{image.width} × {image.height}" in page.inner_text("#exported")


# --- the blind vote ---------------------------------------------------------------------------------------------------

SEEDED = "let state = 3; Math.random = () => (state = (state * 48271) % 2147483647) / 2147483647;"


def rows_of(page) -> list[list[tuple[int, ...]]]:
    """The colours row by row, in the order on show."""
    rows = page.locator(".row").evaluate_all(
        "rows => rows.map(row => [...row.querySelectorAll('.cell img')].map(image => image.src))"
    )
    return [[decode(source).getpixel((0, 0)) for source in row] for row in rows]


def test_blind_mode_gives_no_name_away(visit):
    page = visit(setup=SEEDED)
    page.focus("#step")
    page.keyboard.press("ArrowLeft")  # the columns that lack this step say so, which would tell them apart
    page.click("#compare")
    page.locator(".enlarge").first.click()  # what the other modes have left behind must not tell either
    page.keyboard.press("Escape")
    page.keyboard.press("c")
    before = rows_of(page)
    page.keyboard.press("b")
    assert page.locator("#compare").is_disabled()
    page.keyboard.press("c")
    assert page.locator("body").get_attribute("data-mode") == "blind"
    page.locator(".picture").nth(1).click()
    assert page.locator("#zoom .caption").inner_text() == f"B · {PROMPTS[0]} · seed 0"
    for _ in range(2):  # with the dialog open, and without
        seen = page.evaluate(
            """() => [document.body.innerText, document.title].concat(
              [...document.querySelectorAll("*")].flatMap(e => [...e.attributes]).filter(a => a.name !== "src")
                .map(a => a.value)).join("\\n").toLowerCase()"""
        )
        assert [name for name in (*NAMES, "0.31", "rank 4", "no adapter", "step 200") if name in seen] == []
        page.keyboard.press("Escape")
    after = rows_of(page)
    assert [sorted(row) for row in after] == [sorted(row) for row in before] and after != before
    orders = {tuple(colour[0] for colour in row) for row in after if len(row) == 3}
    assert len(orders) > 1  # each row has an order of its own
    letters = page.locator(".row").first.locator(".name").all_inner_texts()
    assert letters == ["A", "B", "C"] and page.locator(".choice:visible").count() == 0
    page.keyboard.press("b")
    assert rows_of(page) == before and NAMES[1] in page.inner_text("body")
    page.keyboard.press("b")
    assert rows_of(page) != after


def wilson(count: int, total: int) -> list[int]:
    """The two shares p with |count / total - p| = z √(p (1 - p) / total), in percent: roots of a quadratic."""
    z2, share = 1.959964**2, count / total
    a, b, c = 1 + z2 / total, -(2 * share + z2 / total), share**2
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    return [round(100 * (-b + sign * root) / (2 * a)) for sign in (-1, 1)]


def test_votes_are_counted_for_the_right_column(visit):
    page = visit(setup=SEEDED)
    page.click("#blind")
    voted = page.locator("#voted")
    assert voted.inner_text() == "voted 0 of 6 rows"
    order = [[colour[0] for colour in row] for row in rows_of(page)]
    for index, column in enumerate((1, 1, 2, 1)):
        row = page.locator(".row").nth(index)
        place = order[index].index(column)
        row.locator(".best").nth((place + 1) % 3).click()  # changed before the reveal
        row.locator(".best").nth(place).click()
        assert row.locator("[aria-pressed=true]").count() == 1
    last = page.locator(".row").nth(5)  # the third column's picture is missing here
    assert last.locator(".best").count() == 2
    last.locator(".same").click()
    last.locator(".same").click()  # taken back
    assert voted.inner_text() == "voted 4 of 6 rows"
    last.locator(".same").click()
    assert voted.inner_text() == "voted 5 of 6 rows"
    page.click("#reveal")
    table = [line.locator("th, td").all_inner_texts() for line in page.locator("#tally tbody tr").all()]
    for line, (name, count, total) in zip(
        table, [(NAMES[0], 0, 5), (NAMES[1], 3, 5), (NAMES[2], 1, 4), ("no difference", 1, 5)], strict=True
    ):
        low, high = wilson(count, total)
        share = round(100 * count / total)
        assert line == [name, f"{count} of {total}", f"{share} %", f"{low} % – {high} %"]
    shown = page.locator(".row").nth(2).locator(".name").all_inner_texts()
    assert shown == [NAMES[column] for column in order[2]]  # the names are back, each with its picture
    assert page.locator(".best:visible").count() == 4 and page.locator(".best:enabled").count() == 0
    record = json.loads(page.locator("#tally textarea").input_value())
    assert [vote["best"] for vote in record["votes"]] == [NAMES[1], NAMES[1], NAMES[2], NAMES[1], None]
    assert record["votes"][4]["seed"] == 7 and sorted(record["votes"][0]["shown"]) == sorted(NAMES)
    assert [line["votes"] for line in record["tally"]] == [0, 3, 1, 1]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#tally summary")
    page.click("#copy")
    page.wait_for_selector("#copied:not(:empty)")
    assert page.locator("#copied").inner_text() == "copied"
    assert json.loads(page.evaluate("navigator.clipboard.readText()")) == record
    page.click("#blind")  # leaving asks nothing, and a new vote starts from nothing
    page.click("#blind")
    assert voted.inner_text() == "voted 0 of 6 rows" and not page.locator("#tally").is_visible()


def test_leaving_a_vote_counts_it_first(visit):
    page = visit()
    page.keyboard.press("b")
    page.locator(".best").first.click()
    page.keyboard.press("b")
    assert page.locator("#tally").is_visible() and "1 of 1" in page.locator("#tally tbody").inner_text()
    page.keyboard.press("b")
    assert page.locator("body").get_attribute("data-mode") == "grid"


def test_a_reveal_without_votes_has_no_shares(visit):
    page = visit("flat")
    page.click("#blind")
    page.click("#reveal")
    assert page.locator("#tally tbody tr").first.locator("th, td").all_inner_texts() == ["x", "0 of 0", "–", "–"]


# --- looks ------------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(page, selector: str) -> float:
    """WCAG's ratio between a text and the nearest background behind it."""
    text, behind = page.locator(selector).first.evaluate(
        """element => {
          let behind = element;
          while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
          return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
        }"""
    )
    low, high = sorted((luminance(text), luminance(behind)))
    return (high + 0.05) / (low + 0.05)


def test_themes_are_legible_and_remembered(visit):
    page = visit(color_scheme="dark", reduced_motion="reduce")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    texts = ("h1", ".settings dt", "h3", ".head small", ".head dd", "#count", "#theme", ".missing", "summary")
    assert luminance(dark) < 0.05
    assert min(contrast(page, text) for text in texts) >= 4.5
    assert page.locator(".picture img").first.evaluate("image => getComputedStyle(image).transitionDuration") == "0s"
    page.click("#theme")
    assert page.locator("#theme").inner_text() == "Theme: light"
    light = page.evaluate(background)
    assert luminance(light) > 0.5
    assert min(contrast(page, text) for text in texts) >= 4.5
    for colour in (dark, light):  # a tint would shift how the pictures' colours look
        assert len(set(re.findall(r"\d+", colour)[:3])) == 1
    page.reload()
    assert page.locator("#theme").inner_text() == "Theme: light" and page.evaluate(background) == light
    page.click("#theme")
    assert page.evaluate(background) == dark
    page.click("#theme")
    assert page.locator("#theme").inner_text() == "Theme: auto"


def test_a_browser_that_refuses_storage_is_no_obstacle(visit):
    refuse = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no') } })"
    page = visit("flat", setup=refuse)
    page.click("#theme")
    assert page.locator("#theme").inner_text() == "Theme: light"


@pytest.mark.parametrize("name", ["example", "hostile", "wide"])
def test_a_phone_scrolls_in_one_direction(visit, name):
    page = visit(name, width=390, height=844, has_touch=True, is_mobile=True)
    assert sideways(page) <= 0
    assert page.locator(".top").bounding_box()["height"] < 844 / 5
    assert page.locator(".instances[open], .figures[open]").count() == 0
    left, right = (page.locator(".cell").nth(place).bounding_box() for place in (0, 1))
    assert left["y"] == right["y"] and left["width"] > 150  # two beside each other
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert broken_figures(page, ".figures td, .figures th, .head dd") == []  # a figure is never broken over lines
    assert sideways(page) <= 0
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = false; })")
    assert page.locator(".cell .name").first.is_visible()  # as there are no headers above the pictures
    for mode in ("#compare", "#blind", "#reveal"):
        page.click(mode)
        assert sideways(page) <= 0, mode


def test_many_columns_wrap_on_a_desk(visit):
    page = visit("wide")
    assert sideways(page) <= 0
    assert page.locator(".cell").first.bounding_box()["width"] > 120


def test_hostile_texts_are_shown_and_run_nothing(visit):
    page = visit("hostile")
    assert page.locator(".block h2").first.inner_text() == HOSTILE
    assert page.locator(".head strong").all_inner_texts() == ["<b>x</b>", HOSTILE]
    page.locator(".picture").nth(1).click()
    assert page.locator("#zoom .caption").inner_text() == f"{HOSTILE} · {HOSTILE} · seed 0"
    page.keyboard.press("Escape")
    page.fill("#filter", "onerror=")
    assert page.locator("#count").inner_text() == "1 of 2 prompts"
    for button in ("#compare", "#blind", "#reveal"):
        page.click(button)
    assert page.locator("#tally tbody th").nth(1).inner_text() == HOSTILE
    assert page.evaluate("window.hacked") is None and page.locator("img").count() == 4


def test_without_scripts_the_pictures_are_there(visit):
    page = visit(java_script_enabled=False)
    assert colours(page)[:3] == [(0, 0, 0), (1, 0, 3), (2, 0, 0)] and len(colours(page)) == 17
    assert not page.locator(".bar").is_visible()
    assert page.locator(".head strong").all_inner_texts() == list(NAMES)
