"""A real browser for the tests of pages: Debian's chromium, driven by Playwright, told to leave the network alone."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    # starting processes is what most tests would spend their time on
    "--renderer-process-limit=1",
    "--disable-site-isolation-trials",
    "--disable-features=IsolateOrigins,site-per-process,SpareRendererForSitePerProcess",
    "--in-process-gpu",
]


def missing() -> str | None:
    """Why there is no browser to test with, None where there is one."""
    if not any(map(shutil.which, NAMES)):
        return "no browser: apt-get install chromium"
    if find_spec("playwright") is None:
        return "Playwright is not installed: pip install playwright"
    return None


@contextmanager
def launched() -> Iterator[Any]:
    """A headless browser, or the test is skipped with the reason."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, NAMES)))
    # chromium's sandbox refuses to be started by root
    arguments = [*QUIET, "--no-sandbox"] if os.geteuid() == 0 else QUIET
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """Pages opened in one context; everything that they ask for or complain of is kept."""

    def __init__(self, browser: Any, **options: Any):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
        self.context.set_default_timeout(120_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def open(self, url: str) -> Any:
        """A page in a tab of its own."""
        page = self.context.new_page()
        page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("requestfailed", self._failed)
        page.on("request", lambda r: self.requests.append(r.url))
        page.goto(url)
        return page

    def _failed(self, request: Any) -> None:
        # a picture that another took the place of before it had arrived is no failure
        if "ERR_ABORTED" not in request.failure:
            self.complaints.append(f"{request.url}: {request.failure}")

    def leave(self, origin: str = "file://") -> None:
        """Close the pages; an error, a complaint or a request for anything but files of `origin` fails the test."""
        for page in self.context.pages:
            page.close()
        complaints, requests = self.complaints, self.requests
        self.complaints, self.requests = [], []
        assert not complaints, complaints
        assert requests and all(url.startswith(origin) for url in requests), requests

    def close(self, origin: str = "file://") -> None:
        """`leave`, for good."""
        try:
            self.leave(origin)
        finally:
            self.context.close()


def settle(page: Any) -> None:
    """Wait until every picture that is shown has arrived, and two frames more."""
    page.evaluate(
        """async () => {
          const asked = [...document.images].filter((image) => image.getAttribute("src") && image.loading !== "lazy");
          await Promise.all(asked.map((image) => image.decode().catch(() => 0)));
          await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
        }"""
    )


def screen(page: Any, clip: dict[str, float] | None = None) -> np.ndarray:
    """What is on the screen, or on a part of it: uint8 `[H,W,3]`."""
    settle(page)
    return np.asarray(Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB"))


def serious_violations(page: Any, rules: list[str] | None = None) -> list[str]:
    """What axe-core finds serious or critical about the accessibility of what is shown, by all rules or some."""
    source = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    page.evaluate(source)
    options = {"preload": False} | ({"runOnly": rules} if rules else {})
    found = page.evaluate("async (options) => (await axe.run(options)).violations", options)
    bad = [v for v in found if v["impact"] in ("serious", "critical")]
    return [f"{v['id']}: {v['help']}: {[node['html'][:200] for node in v['nodes'][:3]]}" for v in bad]


def page_at(index: Path, **state: object) -> str:
    """The address of a page that shows `state`."""
    return f"{index.as_uri()}#{'&'.join(f'{key}={value}' for key, value in state.items())}"


def address(page: Any) -> dict[str, str]:
    """What the address of a page says of what it shows."""
    # timers of the page that were set before end before this one, however slow it is
    page.evaluate("() => new Promise((done) => setTimeout(done, 200))")
    return {key: values[0] for key, values in parse_qs(urlsplit(page.url).fragment).items()}
