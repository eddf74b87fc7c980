"""The page of the benchmarks: what it draws is what the files say, and what nobody measured is called so."""

from __future__ import annotations

import json
import re

import pytest
from bench_lines import GPU, caching, call, ceilings, check, launch, write
from browser import Visit, serious_violations, settle

from bench import _page, report
from bench._records import RESULTS, read_folder
from capacitor_rt.errors import InputError

ROW = "card: encode 256x256, batch 128"
# the ops of a plan of the encoder
OPS = {"patchify": 90.0, "dwconv": 110.0, "expand": 300.0, "grn": 12.0, "project": 280.0, "head": 35.0}


def results(folder) -> report.Results:
    return report.Results(read_folder(folder))


def data_of(index) -> dict:
    return json.loads((index.parent / "data.js").read_text().split(" = ", 1)[1].removesuffix(";\n"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The page of made-up figures of two commits on a GPU that has a namesake among the modelled ones."""
    folder = tmp_path_factory.mktemp("results")
    gpu = {"gpu": "NVIDIA H200"}
    later = gpu | {"commit": "bbbbbbbbbbbb", "date": "2026-02-01T00:00:00Z"}
    over = {"full_capacitor/eager": 1.9}
    (folder / "model.md").write_bytes((RESULTS / "model.md").read_bytes())
    write(
        folder / "a.jsonl",
        ceilings(**gpu),
        check("encode", **gpu),
        call("model", "ours", 7.5, row=ROW, over=over, **gpu),
        call("model", "ours", 7.25, row=ROW, over=over, **later),
        *(call("model", "ours", 0.1 * n, shape=("encode", n, 512), **gpu) for n in (1, 8, 32)),
        call("flux2", "eager", 140.0, model="flux2", row=ROW, **gpu),
        *(launch(op, us, **gpu) for op, us in OPS.items()),
        caching(5000.0, **gpu),
    )
    return _page.write_page(results(folder), folder, folder / "page")


@pytest.fixture(scope="module")
def unmeasured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nothing")
    return _page.write_page(results(folder), folder, folder / "page")


def test_charts_hold_what_the_files_say(measured):
    data = data_of(measured)
    (roof,) = data["rooflines"]
    assert roof["gpu"] == "NVIDIA H200" and (roof["tflops"], roof["gbps"]) == (800, 4000)
    assert {p["op"] for p in roof["points"]} == set(OPS)
    expand = next(p for p in roof["points"] if p["op"] == "expand")
    assert expand["x"] == pytest.approx(2e11 / 3e8) and expand["y"] == pytest.approx(2e5 / 300)
    (history,) = data["history"]
    assert history["commits"] == ["aaaaaaa", "bbbbbbb"] and history["series"][0]["points"] == [[0, 7.5], [1, 7.25]]
    (throughput,) = data["throughput"]
    series = {s["name"]: s["points"] for s in throughput["series"]}
    assert [batch for batch, _ in series["ours 512x512"]] == [1, 8, 32]
    assert series["FLUX.2 256x256"] == [[128, pytest.approx(128 / 0.140 * 256**2 / 1e6)]]


def test_a_timeline_is_the_plan_in_order(measured):
    timelines = {(t["call"], t["gpu"]): t["lanes"] for t in data_of(measured)["timelines"]}
    lanes = {lane["name"]: lane for lane in timelines["encode 128x256x256", "H200"]}
    assert list(lanes) == [
        "NVIDIA H200 (measured)",
        "from machine code (modelled)",
        "every launch at its ceiling (modelled)",
    ]
    mine = lanes["NVIDIA H200 (measured)"]
    assert mine["ops"][0] == "patchify" and mine["ops"][-1] == "head" and mine["ops"].count("expand") == 8
    assert mine["us"] == [OPS[op] for op in mine["ops"]]
    # the totals of the page that they are read from
    text = (RESULTS / "model.md").read_text()
    (whole,) = re.findall(r"^\| H200 \| encode 128x256² \| [\d.]+ \| ([\d.]+) \|", text, re.M)
    assert sum(lanes["from machine code (modelled)"]["us"]) / 1e3 == pytest.approx(float(whole), rel=0.01)
    assert [lane["name"] for lane in timelines["encode 128x256x256", "RTX 5090"]] == list(lanes)[1:]


def test_nothing_measured_is_said(unmeasured):
    data, html = data_of(unmeasured), unmeasured.read_text()
    assert data["rooflines"] == data["throughput"] == data["history"] == []
    assert "Nothing has been measured on a GPU yet" in html and "42.56" in html
    lanes = [lane["name"] for t in data["timelines"] for lane in t["lanes"]]
    assert lanes and all(name.endswith("(modelled)") for name in lanes)


def test_command(tmp_path, capsys):
    write(tmp_path / "results/a.jsonl", ceilings(), launch("expand", 400.0))
    options = ["--results", str(tmp_path / "results"), "--readme", str(tmp_path / "README.md"), "--html"]
    assert report.main([*options, str(tmp_path / "page")]) == 0
    assert str(tmp_path / "page/index.html") in capsys.readouterr().out
    assert GPU in (tmp_path / "page/index.html").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    assert report.main([*options, str(tmp_path / "mine")]) == 1
    assert "no part of a page" in capsys.readouterr().err
    with pytest.raises(InputError):
        _page.write_page(results(tmp_path / "results"), tmp_path / "results", tmp_path / "mine")


def test_in_a_browser(browser, measured, unmeasured):
    # light: the tests of the results page; the style sheet is the same
    visit = Visit(browser, color_scheme="dark")
    page = visit.open(measured.as_uri())
    lanes = page.locator("#timeline rect")
    ops = page.locator("#timeline .legend").first.locator("span").count()
    assert ops == len(OPS) and lanes.count() % 3 == 0
    widths = page.eval_on_selector_all("#timeline rect", "all => all.map(r => +r.getAttribute('width'))")
    # in the measured lane an expand takes 300 us and a dwconv 110
    assert widths[2] / widths[1] == pytest.approx(300 / 110, rel=0.1)
    page.locator("#gpu").select_option("RTX 5090")
    assert page.locator("#timeline rect").count() == lanes.count()
    assert page.locator("#rooflines circle").count() == len(OPS)
    assert page.locator("#timeline circle").count() >= 4
    for tab in ("launches", "throughput", "history", "tables"):
        page.locator(f"#tab-{tab}").click()
        settle(page)
        assert serious_violations(page) == [], tab
    assert "7.25" in page.locator("#tables").text_content()
    again = visit.open(f"{unmeasured.as_uri()}#history")
    assert again.locator("#commits").text_content() == "Not measured yet."
    visit.close()


def test_on_a_phone_nothing_is_cut_off(browser, measured):
    visit = Visit(browser, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page = visit.open(measured.as_uri())
    for tab in ("launches", "throughput", "history", "tables"):
        page.locator(f"#tab-{tab}").tap()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
    visit.close()
