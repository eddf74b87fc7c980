"""The results page in a real browser: what is on the screen is compared with the pixels that it stands for."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from browser import Visit, address, page_at, serious_violations, settle
from view_pages import HOSTILE, MARKUP, MODELS

from capacitor_rt.evaluation.view.serve import PageServer
from capacitor_rt.evaluation.view.writer import CacheFacts, LeftOut, PageWriter

ROWS = 2000
ZOOM = 8


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
        page = visit.open(page_at(results))
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

        page = visit.open(page_at(results))
        page.locator("#filter").fill("0003")
        assert names(page) == ["image 0003.png"] and page.locator("#count").text_content() == "1 of 12 images"
        page.locator("#filter").fill("png psnr<30")
        want = [i.name for i in items if psnr(i.pixels, i.decoded["first"]) < 30 and "<" not in i.name]
        assert [n for n in names(page) if "<" not in n] == want and 0 < len(want) < 11
        assert address(page)["filter"] == "png psnr<30"
        page.locator("#filter").fill("nothing has this name")
        assert names(page) == [] and page.locator("#count").text_content() == "0 of 12 images"

    def test_keys_go_from_image_to_image(self, visit, results):
        page = visit.open(page_at(results))
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
    page = visit.open(page_at(results, tab="overall"))
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
    page = visit.open(page_at(results, tab="overall"))
    assert page.locator("#histogram svg").count() == 1 and page.locator("#cosines svg").count() == 1
    assert page.locator("#whitening svg").count() == 4
    page.locator("#histogram-of").select_option("delta")
    page.locator("#scatter-x").select_option("bpp")
    assert page.locator("#scatter .point").count() == 12
    assert "Cosine" in page.locator("#overall").text_content()


def test_a_link_leads_to_what_one_saw(visit, results):
    page = visit.open(page_at(results))
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
    page = visit.open(page_at(results))
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
    page = visit.open(page_at(cache_results, image=11))
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
    page = visit.open(page_at(results))
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
    for _ in range(600):
        if any("img-src" in text for text in visit.complaints):
            break
        page.wait_for_timeout(100)
    visit.context.close()
    assert any("img-src" in text for text in visit.complaints)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_violation_of_accessibility(browser, cache_results, scheme):
    visit = Visit(browser, color_scheme=scheme)
    page = visit.open(page_at(cache_results))
    page.locator("#maps summary").click()
    # the schemes differ in colours alone
    rules = None if scheme == "light" else ["color-contrast"]
    for tab in ("images", "overall", "cache", "left-out"):
        page.locator(f"#tab-{tab}").click()
        settle(page)
        assert serious_violations(page, rules) == [], tab
    visit.close()


def test_theme_is_chosen_by_hand(visit, results):
    page = visit.open(page_at(results))
    papers = set()
    for _ in range(3):
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.locator("#theme").click()
    assert len(papers) == 2 and page.locator("#theme").text_content() == "Theme: auto"


def test_on_a_phone_nothing_is_cut_off(browser, cache_results):
    visit = Visit(browser, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page = visit.open(page_at(cache_results))
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
