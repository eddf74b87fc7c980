"""The results page in a real browser: what is on the screen is compared with the pixels that it stands for."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from browser import Visit, launched, screen, serious_violations, settle
from view_pages import HOSTILE, MARKUP, MODELS, make_page, shown

from capacitor_rt.evaluation.view import pictures, site
from capacitor_rt.evaluation.view.latents import map_levels
from capacitor_rt.evaluation.view.serve import PageServer
from capacitor_rt.evaluation.view.writer import CacheFacts, LeftOut, PageWriter

ROWS = 2000
ZOOM = 8


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def items():
    # wide and tall ones, of which the twelfth has a name that no page should trust
    sizes = ((48, 64), (64, 48))
    return [shown(i, *sizes[i % 2], name=HOSTILE if i == 11 else None) for i in range(12)]


@pytest.fixture(scope="module")
def results(tmp_path_factory, items):
    return make_page(tmp_path_factory.mktemp("page") / "out", items).index


@pytest.fixture(scope="module")
def cache_results(tmp_path_factory, items):
    facts = CacheFacts(
        "ab" * 32, HOSTILE, 12, 14, [("source.kind", HOSTILE)], [(48, 64, 6), (64, 48, 6)], {"corrupt": 2}
    )
    with PageWriter(tmp_path_factory.mktemp("cache") / "out", MODELS, HOSTILE, workers=1) as page:
        for item in items:
            page.add(item)
        page.notes.append(HOSTILE)
        page.leave_out(LeftOut(HOSTILE, "corrupt", HOSTILE, items[0].pixels))
        page.leave_out(LeftOut("other.png", "corrupt", "cannot be decoded"))
        return page.finish(cache=facts).index


@pytest.fixture(scope="module")
def context(browser):
    visit = Visit(browser)
    yield visit
    visit.context.close()


@pytest.fixture
def visit(context):
    yield context
    context.leave()


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


def at(index: Path, **state) -> str:
    return f"{index.as_uri()}#{'&'.join(f'{key}={value}' for key, value in state.items())}"


def close_up(index: Path, **state) -> str:
    return at(index, zoom=ZOOM, x=20, y=24, **state)


def address(page) -> dict[str, str]:
    page.wait_for_timeout(200)
    return {key: values[0] for key, values in parse_qs(urlsplit(page.url).fragment).items()}


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
        page = visit.open(at(results))
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
        page = visit.open(at(results))
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


def pictures_of(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def names(page) -> list[str]:
    """What the list shows, from the top."""
    return page.evaluate(
        """() => [...document.querySelectorAll(".row:not([hidden])")]
          .sort((a, b) => a.getAttribute("aria-posinset") - b.getAttribute("aria-posinset"))
          .map((row) => row.querySelector(".name").textContent)"""
    )


class TestList:
    def test_sorting_sorts(self, visit, results, items):
        from capacitor_rt.evaluation.metrics import psnr

        scores = {m.name: [psnr(i.pixels, i.decoded[m.name]) for i in items] for m in MODELS}
        delta = [a - b for a, b in zip(*scores.values(), strict=True)]
        page = visit.open(at(results))
        for key, values in (("psnr", scores["first"]), ("psnr2", scores["second"]), ("delta", delta)):
            page.locator("#sort").select_option(key)
            want = [items[i].name for i in np.argsort(values, kind="stable")]
            # the hostile name is shown with its escapes
            assert [n for n in names(page) if "<" not in n] == [n for n in want if "<" not in n]
            page.locator("#order").click()
            assert [n for n in names(page) if "<" not in n] == [n for n in want[::-1] if "<" not in n]
            page.locator("#order").click()
        assert address(page)["sort"] == "delta"

    def test_filter_by_name_and_by_figure(self, visit, results, items):
        from capacitor_rt.evaluation.metrics import psnr

        page = visit.open(at(results))
        page.locator("#filter").fill("0003")
        assert names(page) == ["image 0003.png"] and page.locator("#count").text_content() == "1 of 12 images"
        page.locator("#filter").fill("png psnr<30")
        want = [i.name for i in items if psnr(i.pixels, i.decoded["first"]) < 30 and "<" not in i.name]
        assert [n for n in names(page) if "<" not in n] == want and 0 < len(want) < 11
        assert address(page)["filter"] == "png psnr<30"
        page.locator("#filter").fill("nothing has this name")
        assert names(page) == [] and page.locator("#count").text_content() == "0 of 12 images"

    def test_keys_go_from_image_to_image(self, visit, results):
        page = visit.open(at(results))
        page.keyboard.press("j")
        page.keyboard.press("ArrowRight")
        assert page.locator("#name").text_content() == "image 0002.png"
        page.keyboard.press("k")
        assert page.locator(".row[aria-selected=true] .name").text_content() == "image 0001.png"
        page.locator("#list").focus()
        page.keyboard.press("End")
        assert address(page)["image"] == "11"
        page.keyboard.press("/")
        page.keyboard.type("0004")
        assert names(page) == ["image 0004.png"]
        page.locator("#tab-images").focus()
        page.keyboard.press("ArrowRight")
        assert page.locator("#overall").is_visible() and not page.locator("#images").is_visible()


def test_a_point_opens_its_image(visit, results, items):
    page = visit.open(at(results, tab="overall"))
    points = page.locator("#scatter .point")
    assert points.count() == len(items)
    places = page.eval_on_selector_all(
        "#scatter .point", "all => all.map(p => [+p.getAttribute('cx'), +p.getAttribute('cy')])"
    )
    # that of the worst reconstruction by the second model is leftmost
    from capacitor_rt.evaluation.metrics import psnr

    scores = [psnr(i.pixels, i.decoded["second"]) for i in items]
    number = int(np.argmin([x for x, _ in places]))
    points.nth(number).click()
    assert page.locator("#images").is_visible()
    assert page.locator("#name").text_content() == items[int(np.argmin(scores))].name
    # by the keyboard: the next one
    page.locator("#tab-overall").click()
    page.locator("#scatter svg").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("#name").text_content() == items[int(np.argsort(scores)[1])].name


def test_overall_draws_every_part(visit, results):
    page = visit.open(at(results, tab="overall"))
    assert page.locator("#histogram svg").count() == 1 and page.locator("#cosines svg").count() == 1
    assert page.locator("#whitening svg").count() == 4
    page.locator("#histogram-of").select_option("delta")
    page.locator("#scatter-x").select_option("bpp")
    assert page.locator("#scatter .point").count() == 12
    assert "Cosine" in page.locator("#overall").text_content()


def test_a_link_leads_to_what_one_saw(visit, results):
    page = visit.open(at(results))
    for key in ("j", "j", "+", "+", "]", "."):
        page.keyboard.press(key)
    page.locator("#sort").select_option("delta")
    page.locator("#filter").fill("image")
    state = address(page)
    link = page.locator("#link").get_attribute("href")
    again = visit.open(results.as_uri() + link)
    assert address(again) == state
    assert {k: state[k] for k in ("image", "gain", "split", "sort", "filter")} == {
        "image": "2",
        "gain": "16",
        "split": "55",
        "sort": "delta",
        "filter": "image",
    }
    assert again.locator("#name").text_content() == "image 0002.png"


def test_an_address_is_not_trusted(visit, results):
    page = visit.open(at(results))
    for fragment in (
        "image=99&split=-1&gain=1e9&zoom=nan",
        "image=1.5&channel0=abc&sort=__proto__&tab=x",
        "%%%&=&&filter=%3Cscript%3E",
    ):
        page.evaluate("fragment => { location.hash = fragment; }", fragment)
        state = address(page)
        assert page.locator("#name").text_content() == "image 0000.png"
        assert (state["split"], state["gain"], state["sort"], state["tab"]) == ("50", "8", "order", "images")


def test_a_hostile_name_stays_text(visit, cache_results):
    page = visit.open(at(cache_results, image=11))
    assert MARKUP in page.locator("#name").text_content()
    for tab in ("overall", "cache", "left-out", "images"):
        page.locator(f"#tab-{tab}").click()
    settle(page)
    page.keyboard.press("j")
    assert MARKUP in page.locator("#left-out .name").first.text_content()
    assert page.evaluate("window.owned") is None
    assert page.locator("script").count() == 8 and page.locator("img[onerror]").count() == 0


def test_policy_stops_what_would_slip_through(browser, results):
    visit = Visit(browser)
    page = visit.open(at(results))
    assert page.evaluate("() => { try { document.body.innerHTML += 'x'; return false; } catch { return true; } }")
    page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.append("window.owned = 1");
          document.body.append(script);
        }"""
    )
    assert page.evaluate("window.owned") is None
    page.evaluate("document.body.append(Object.assign(new Image(), { src: 'https://127.0.0.1:1/x.png' }))")
    page.wait_for_timeout(100)
    visit.context.close()
    assert any("img-src" in text for text in visit.complaints)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_violation_of_accessibility(browser, cache_results, scheme):
    visit = Visit(browser, color_scheme=scheme)
    page = visit.open(at(cache_results))
    page.locator("#maps summary").click()
    # the schemes differ in colours alone
    rules = None if scheme == "light" else ["color-contrast"]
    for tab in ("images", "overall", "cache", "left-out"):
        page.locator(f"#tab-{tab}").click()
        settle(page)
        assert serious_violations(page, rules) == [], tab
    visit.close()


def test_theme_is_chosen_by_hand(visit, results):
    page = visit.open(at(results))
    papers = set()
    for _ in range(3):
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.locator("#theme").click()
    assert len(papers) == 2 and page.locator("#theme").text_content() == "Theme: auto"


def test_on_a_phone_nothing_is_cut_off(browser, cache_results):
    visit = Visit(browser, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page = visit.open(at(cache_results))
    for tab in ("images", "overall", "cache", "left-out"):
        page.locator(f"#tab-{tab}").tap()
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
    page.locator("#tab-images").tap()
    page.locator(".row").nth(1).tap()
    assert page.locator("#name").text_content() == "image 0001.png"
    visit.close()


def test_served_on_loopback(browser, results):
    visit = Visit(browser)
    with PageServer(results.parent) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        page = visit.open(f"{server.url}#image=3")
        assert page.locator("#name").text_content() == "image 0003.png"
        settle(page)
        visit.close(server.url)
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def long_results(tmp_path_factory):
    """A page of 2,000 rows: the files of one image under all their names, and data as the writer writes them."""
    index = make_page(tmp_path_factory.mktemp("long") / "out", [shown(0)]).index
    folder = index.parent
    rng = np.random.default_rng(0)
    for i in range(1, ROWS):
        for name in (
            "thumbs/{:06d}.webp",
            "images/{:06d}-original.webp",
            "images/{:06d}-0.webp",
            "images/{:06d}-1.webp",
        ):
            os.link(folder / name.format(0), folder / name.format(i))
    images = {
        "name": [f"image {i:04d}.png" for i in range(ROWS)],
        "note": [""] * ROWS,
        "width": [64] * ROWS,
        "height": [48] * ROWS,
        "fileBytes": [1000 + i for i in range(ROWS)],
        "latentBytes": [[192, 192]] * ROWS,
    }
    scores = {"psnr": rng.normal(36, 4, (2, ROWS)).tolist(), "ssim": rng.uniform(0.8, 1, (2, ROWS)).tolist()}
    models = [
        {"name": m.name, "channels": 8, "stride": 16, "share": 0.5, "mean": [0.0] * 8, "std": [1.0] * 8} for m in MODELS
    ]
    data = {"models": models, "images": images, "hasOriginals": True, "measures": scores, "cosines": []}
    data |= {"maps": {"columns": 16, "clip": 4.0}}
    (folder / "data.js").write_text(site.script_of("capacitorPage", data), encoding="ascii")
    return index


SCROLL = """async () => {
  const list = document.getElementById("list");
  const [frames, nodes] = [[], []];
  let last = performance.now();
  for (let step = 0; step < 90; step += 1) {
    list.scrollTop += 317;
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    frames.push(now - last);
    last = now;
    nodes.push(list.querySelectorAll(".row").length);
  }
  frames.sort((a, b) => a - b);
  return { most: Math.max(...nodes), median: frames[45], perSecond: 1000 / (frames.reduce((a, b) => a + b) / 90) };
}"""


def test_two_thousand_rows_scroll(visit, long_results, record_property):
    page = visit.open(at(long_results))
    assert page.locator("#count").text_content() == "2000 images"
    settle(page)
    client = visit.context.new_cdp_session(page)
    client.send("Performance.enable")

    def script_seconds():
        metrics = client.send("Performance.getMetrics")["metrics"]
        return sum(
            m["value"] for m in metrics if m["name"] in ("ScriptDuration", "LayoutDuration", "RecalcStyleDuration")
        )

    before = script_seconds()
    found = page.evaluate(SCROLL)
    per_step = (script_seconds() - before) / 90
    record_property("frames_per_second", found["perSecond"])
    print(
        f"{found['perSecond']:.0f} frames/s, median {found['median']:.1f} ms, {1e3 * per_step:.2f} ms of work per step"
    )
    # a window of rows, whatever their number: it is this that makes the rate
    assert found["most"] < 40
    # 30 frames a second are 33 ms each; the median, since other processes may take the machine away for a while
    assert found["median"] < 33.4 and per_step < 0.0334
    page.locator("#list").evaluate("list => { list.scrollTop = list.scrollHeight; }")
    page.locator(".row[aria-posinset='2000']").wait_for()
    page.locator("#tab-overall").click()
    assert page.locator("#scatter .point").count() == ROWS
