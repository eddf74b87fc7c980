"""A list of two thousand images: only what is seen is made."""

from __future__ import annotations

import os

import numpy as np
import pytest
from browser import page_at, settle
from view_pages import MODELS, make_page, shown

from capacitor_rt.evaluation.view import site

ROWS = 2000
# of a frame, at 30 a second
MILLISECONDS = 33.4


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
    page = visit.open(page_at(long_results))
    assert page.locator("#count").text_content() == "2000 images"
    settle(page)
    client = visit.context.new_cdp_session(page)
    client.send("Performance.enable")

    def script_seconds():
        metrics = client.send("Performance.getMetrics")["metrics"]
        return sum(
            m["value"] for m in metrics if m["name"] in ("ScriptDuration", "LayoutDuration", "RecalcStyleDuration")
        )

    # other processes may take the machine away for a while: the first of a few tries that was let
    for _ in range(5):
        before = script_seconds()
        found = page.evaluate(SCROLL)
        per_step = (script_seconds() - before) / 90
        if found["median"] < MILLISECONDS:
            break
        page.locator("#list").evaluate("list => { list.scrollTop = 0; }")
    record_property("frames_per_second", found["perSecond"])
    print(
        f"{found['perSecond']:.0f} frames/s, median {found['median']:.1f} ms, {1e3 * per_step:.2f} ms of work per step"
    )
    # a window of rows, whatever their number: it is this that makes the rate
    assert found["most"] < 40
    assert found["median"] < MILLISECONDS and 1e3 * per_step < MILLISECONDS
    page.locator("#list").evaluate("list => { list.scrollTop = list.scrollHeight; }")
    page.locator(".row[aria-posinset='2000']").wait_for()
    page.locator("#tab-overall").click()
    assert page.locator("#scatter .point").count() == ROWS
