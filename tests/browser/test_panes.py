"""What is seen of an image: the panes against the pixels that they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from browser import address, page_at, screen
from view_pages import MODELS

from capacitor_rt.evaluation.view import pictures
from capacitor_rt.evaluation.view.latents import map_levels

ZOOM = 8


def looked_at(page, pane: str, x: float, y: float, reach: int = 2) -> np.ndarray:
    """Colours on the screen of the pixels around the point (x, y) of the image, which is in the middle of a pane."""
    box = page.locator(f"[data-pane={pane}]").bounding_box()
    centre = np.array([box["y"] + box["height"] / 2, box["x"] + box["width"] / 2])
    corner = centre.astype(int) - 32
    picture = screen(page, {"x": int(corner[1]), "y": int(corner[0]), "width": 64, "height": 64})
    places = ((centre - corner)[:, None] + (np.arange(-reach, reach + 1) + 0.5) * ZOOM).astype(int)
    return picture[np.ix_(*places)]


def around(pixels: np.ndarray, x: int, y: int, reach: int = 2) -> np.ndarray:
    return pixels[y - reach : y + reach + 1, x - reach : x + reach + 1]


def close_up(index: Path, **state) -> str:
    return page_at(index, zoom=ZOOM, x=20, y=24, **state)


def pictures_of(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


class TestPanes:
    def test_slider_divides_original_and_reconstruction(self, visit, results, items):
        page = visit.open(close_up(results, split=100))
        for m, model in enumerate(MODELS):
            got = looked_at(page, f"slider-{m}", 20, 24)
            np.testing.assert_array_equal(got, around(items[0].pixels, 20, 24))
            page.locator("#split").fill("0")
            got = looked_at(page, f"slider-{m}", 20, 24)
            np.testing.assert_array_equal(got, around(items[0].decoded[model.name], 20, 24))
            page.locator("#split").fill("100")
        assert not (around(items[0].pixels, 20, 24) == around(items[0].decoded["first"], 20, 24)).all()

    def test_slider_is_dragged(self, visit, results):
        page = visit.open(page_at(results))
        pane = page.locator("[data-pane=slider-0]")
        box = pane.bounding_box()
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] / 2, middle)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.25, middle, steps=4)
        page.mouse.up()
        assert float(page.locator("#split").input_value()) == pytest.approx(50, abs=26)
        assert float(address(page)["split"]) == pytest.approx(25, abs=0.5)
        divider = pane.locator(".divider").bounding_box()
        assert divider["x"] + divider["width"] / 2 == pytest.approx(box["x"] + box["width"] * 0.25, abs=1.5)

    def test_a_held_key_shows_the_original(self, visit, results, items):
        page = visit.open(close_up(results, split=0))
        page.keyboard.down("o")
        np.testing.assert_array_equal(looked_at(page, "slider-0", 20, 24), around(items[0].pixels, 20, 24))
        page.keyboard.up("o")
        np.testing.assert_array_equal(looked_at(page, "slider-0", 20, 24), around(items[0].decoded["first"], 20, 24))
        hold = page.locator("#hold")
        hold.hover()
        page.mouse.down()
        assert hold.get_attribute("aria-pressed") == "true"
        np.testing.assert_array_equal(looked_at(page, "slider-1", 20, 24), around(items[0].pixels, 20, 24))
        page.mouse.up()
        assert hold.get_attribute("aria-pressed") == "false"

    def test_difference_is_multiplied(self, visit, results, items):
        page = visit.open(close_up(results))
        for gain in (1, 8):
            page.locator("#gain").fill(str(gain))
            for m, model in enumerate(MODELS):
                difference = np.abs(items[0].pixels.astype(int) - items[0].decoded[model.name]) * gain
                want = around(difference.clip(0, 255), 20, 24)
                got = looked_at(page, f"difference-{m}", 20, 24).astype(int)
                # the browser may blend in other than 8 bits
                assert np.abs(got - want).max() <= gain // 4 + 1, (got - want).tolist()
                assert want.max() > 3

    def test_models_are_compared_with_each_other(self, visit, results, items):
        page = visit.open(close_up(results, gain=8, split=100))
        page.locator("#reference").select_option("1")
        np.testing.assert_array_equal(looked_at(page, "slider-0", 20, 24), around(items[0].decoded["second"], 20, 24))
        assert looked_at(page, "difference-1", 20, 24).max() == 0
        assert address(page)["reference"] == "1"

    def test_latents_as_colours_and_as_a_map(self, visit, results, items):
        page = visit.open(close_up(results, channel1=5))
        folder = results.parent / "images"
        for m, model in enumerate(MODELS):
            colours = pictures_of(folder / f"000000-{m}-pca.webp")
            maps = pictures.DIVERGING[map_levels(items[0].latents[model.name][5:6])][:, :4]
            for choice, want in (("pca", colours), ("5", maps)):
                page.get_by_label(f"Latents of {model.name}").select_option(choice)
                # the point (20, 24) lies in the latent (1, 1) of 16x16 pixels
                got = looked_at(page, f"latent-{m}", 20, 24)
                np.testing.assert_array_equal(got[2, 2], want[1, 1])
        page.locator("#maps summary").click()
        page.get_by_role("button", name="Channel 3 of first").click()
        assert address(page) | {"channel0": "3", "channel1": "5"} == address(page)
        assert page.locator("#maps-of img").count() == 16

    def test_zoom_and_movement_are_in_step(self, visit, results):
        page = visit.open(page_at(results))
        panes = page.locator(".pane")
        assert panes.count() == 6
        box = page.locator("[data-pane=difference-0]").bounding_box()
        x, y = box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.25
        page.mouse.move(x, y)
        page.mouse.wheel(0, -500)
        page.locator("#zoom").filter(has_text="x").wait_for()

        def placed():
            return page.eval_on_selector_all(".stage", "all => all.map(s => getComputedStyle(s).transform)")

        before = placed()
        assert len(before) == 2 * 4 and len(set(before)) == 1
        state = address(page)
        # what was under the pointer stayed there: a quarter of the image from its corner
        assert float(state["x"]) + (x - box["x"] - box["width"] / 2) / float(state["zoom"]) == pytest.approx(
            16, abs=0.5
        )
        page.mouse.down()
        page.mouse.move(x + 40, y + 30, steps=3)
        page.mouse.up()
        after = placed()
        assert len(set(after)) == 1 and after != before
        moved = address(page)
        assert float(moved["x"]) - float(state["x"]) == pytest.approx(-40 / float(state["zoom"]), abs=0.1)
        page.keyboard.press("0")
        assert page.locator("#zoom").text_content() == "fit"
        page.keyboard.press("+")
        assert page.locator("#zoom").text_content() != "fit"
