"""The results page as files: what is written, what is refused, and that no name is ever part of a path or of markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_cases import snapshot
from PIL import Image
from view_pages import HOSTILE, MODELS, make_page, shown

from capacitor_rt.errors import InputError
from capacitor_rt.evaluation.metrics import psnr
from capacitor_rt.evaluation.view import pictures, site
from capacitor_rt.evaluation.view.folder import MANIFEST, read_manifest
from capacitor_rt.evaluation.view.latents import (
    COMPONENT_CLIP,
    MAP_CLIP,
    MAP_COLUMNS,
    LatentMoments,
    PrincipalBasis,
    map_levels,
)
from capacitor_rt.evaluation.view.writer import CacheFacts, LeftOut, PageWriter


def data_of(folder: Path) -> dict:
    text = (folder / "data.js").read_text(encoding="ascii")
    found = re.fullmatch(r'"use strict";\nwindow\.capacitorPage = (.*);\n', text, re.S)
    assert found
    return json.loads(found[1])


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def items():
    return [shown(0), shown(1, 64, 48), shown(2, name=HOSTILE)]


@pytest.fixture(scope="module")
def page(tmp_path_factory, items):
    return make_page(tmp_path_factory.mktemp("page") / "out", items).index.parent


def test_pictures_are_the_pixels(page, items):
    for i, item in enumerate(items):
        np.testing.assert_array_equal(pixels_of(page / f"images/{i:06d}-original.webp"), item.pixels)
        for m, model in enumerate(MODELS):
            np.testing.assert_array_equal(pixels_of(page / f"images/{i:06d}-{m}.webp"), item.decoded[model.name])
            maps = pixels_of(page / f"images/{i:06d}-{m}-maps.webp")
            np.testing.assert_array_equal(maps, pictures.DIVERGING[map_levels(item.latents[model.name])])
        assert max(pixels_of(page / f"thumbs/{i:06d}.webp").shape) <= pictures.THUMB_SIDE


def test_scores_are_those_of_the_pictures(page, items):
    data = data_of(page)
    for m, model in enumerate(MODELS):
        for i, item in enumerate(items):
            assert data["measures"]["psnr"][m][i] == pytest.approx(psnr(item.pixels, item.decoded[model.name]))
    assert data["images"]["width"] == [64, 48, 64] and data["images"]["height"] == [48, 64, 48]
    assert data["images"]["fileBytes"] == [1000, 1001, 1002]
    # two bytes per element of 8 channels at 3x4 places
    assert data["images"]["latentBytes"][0] == [8 * 12 * 2] * 2
    html = (page / "index.html").read_text()
    mean = np.mean(data["measures"]["psnr"][0])
    assert f"<td>{mean:.2f}</td>" in html


def test_one_basis_for_all_models(page, items):
    moments = LatentMoments()
    for model in MODELS:
        for item in items:
            moments.update(item.latents[model.name].half())
    basis = PrincipalBasis(moments)
    for i, item in enumerate(items):
        for m, model in enumerate(MODELS):
            got = pixels_of(page / f"images/{i:06d}-{m}-pca.webp").astype(int)
            assert np.abs(got - basis.colours(item.latents[model.name].half())).max() <= 1
    share = data_of(page)["models"][0]["share"]
    assert share == pytest.approx(basis.share, abs=1e-3) and share == data_of(page)["models"][1]["share"]


def test_no_name_is_part_of_a_path_or_of_markup(page):
    names = [p.relative_to(page).as_posix() for p in page.rglob("*") if p.is_file()]
    assert all(re.fullmatch(r"[a-z0-9./-]+", name) for name in names), names
    assert sorted(read_manifest(page)) == sorted(names)
    text = (page / "data.js").read_text(encoding="ascii")
    assert not set("<>&\x00") & set(text)
    assert text.count("\n") == 2
    name = data_of(page)["images"]["name"][2]
    assert name.startswith('"><img src=x') and name.endswith("\\u2028\\n\\x00\\xff\\u202e{{7*7}}.png")


class _Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_every_text_of_the_outside_is_escaped(tmp_path, items):
    facts = CacheFacts(HOSTILE, HOSTILE, 3, 4, [(HOSTILE, HOSTILE)], [(48, 64, 3)], {HOSTILE: 1})
    with PageWriter(tmp_path / "out", MODELS, HOSTILE, workers=1) as page:
        for item in items:
            page.add(item)
        page.notes.append(HOSTILE)
        page.remarks.append(HOSTILE)
        page.leave_out(LeftOut(HOSTILE, HOSTILE, HOSTILE, items[0].pixels))
        out = page.finish(cache=facts).index.parent
    html = (out / "index.html").read_text(encoding="utf-8")
    elements = _Elements()
    elements.feed(html)
    scripts = [attrs for tag, attrs in elements.tags if tag == "script"]
    assert len(scripts) == 8 and all(list(attrs) == ["src"] for attrs in scripts)
    assert [attrs["src"] for tag, attrs in elements.tags if tag == "img"] == ["left-out/000000.webp"]
    assert not any(name.startswith("on") for _, attrs in elements.tags for name in attrs)
    assert not set("\u2028\x00\u202e") & set(html) and "49.png" not in html


def test_policy_allows_nothing_but_the_page(page):
    html = (page / "index.html").read_text()
    assert (
        "default-src &#39;none&#39;" in html and "unsafe" not in html and "http:" not in html and "https:" not in html
    )
    assert "style=" not in html


def test_identical_pixels_and_odd_values_survive(tmp_path):
    item = shown(0)
    exact = type(item)(item.name, item.pixels, item.decoded | {"first": item.pixels}, item.latents)
    report = make_page(tmp_path / "out", [exact, shown(1)])
    data = data_of(tmp_path / "out")
    assert data["measures"]["psnr"][0][0] is None and data["measures"]["ssim"][0][0] == pytest.approx(1)
    assert report.psnr.values["first"][0] == float("inf")
    assert "first: 1 reproduced exactly" in (tmp_path / "out/index.html").read_text()


def test_a_page_without_originals_has_no_scores(tmp_path):
    make_page(tmp_path / "out", [shown(0, originals=False)])
    data = data_of(tmp_path / "out")
    assert data["measures"] == {} and data["hasOriginals"] is False
    assert not (tmp_path / "out/images/000000-original.webp").exists()
    assert "there are no figures" in (tmp_path / "out/index.html").read_text()


class TestPlace:
    def test_an_older_page_is_replaced_whole(self, tmp_path):
        make_page(tmp_path / "out", [shown(0), shown(1)])
        make_page(tmp_path / "out", [shown(0)])
        assert not (tmp_path / "out/images/000001-original.webp").exists()
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("name", ["notes.txt", "images/mine.webp", "page.json"])
    def test_what_is_not_ours_is_never_touched(self, tmp_path, name):
        out = tmp_path / "out"
        if name != "page.json":
            make_page(out, [shown(0)])
        path = out / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"files": ["page.json"]}')
        before = snapshot(tmp_path)
        with pytest.raises(InputError, match=re.escape(name)):
            make_page(out, [shown(0)])
        assert snapshot(tmp_path) == before

    def test_what_came_meanwhile_is_not_touched(self, tmp_path):
        out = tmp_path / "out"
        with PageWriter(out, MODELS, "", workers=1) as page, pytest.raises(InputError, match=r"mine\.txt"):
            page.add(shown(0))
            out.mkdir()
            (out / "mine.txt").write_text("mine")
            page.finish()
        assert snapshot(tmp_path) == {"out/mine.txt": b"mine"}

    def test_a_failure_leaves_nothing(self, tmp_path):
        with pytest.raises(ZeroDivisionError), PageWriter(tmp_path / "out", MODELS, "", workers=1) as page:
            page.add(shown(0))
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []

    def test_a_page_needs_an_image(self, tmp_path):
        reason = pytest.raises(InputError, match=r"no image can be shown \(corrupt 1\)")
        with reason, PageWriter(tmp_path / "out", MODELS, "", workers=1) as page:
            page.leave_out(LeftOut("a", "corrupt", "cannot be decoded"))
            page.finish()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "files", ['["../x"]', '["/etc/passwd"]', '["a/../../b"]', '["a\\\\b"]', "[3]", '"x"', '["a//b"]']
    )
    def test_a_manifest_cannot_name_what_lies_outside(self, tmp_path, files):
        (tmp_path / MANIFEST).write_text(f'{{"format": "capacitor-view/1", "files": {files}}}')
        assert read_manifest(tmp_path) is None

    def test_a_link_goes_on_pointing_at_the_page(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        make_page(tmp_path / "link", [shown(0)])
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real/index.html").is_file()


class TestLatents:
    def test_moments_are_those_of_all_positions(self):
        g = torch.Generator().manual_seed(0)
        parts = [torch.randn(5, h, 7, generator=g) * 3 + 1 for h in (2, 4)]
        one, other = LatentMoments(), LatentMoments()
        one.update(parts[0])
        other.update(parts[1])
        one.merge(other)
        vectors = torch.cat([p.flatten(1) for p in parts], 1).double()
        torch.testing.assert_close(one.mean, vectors.mean(1))
        torch.testing.assert_close(one.covariance, torch.cov(vectors, correction=0))
        torch.testing.assert_close(one.std, vectors.std(1, correction=0))

    def test_colours_are_components_in_deviations(self):
        g = torch.Generator().manual_seed(0)
        axes = torch.linalg.qr(torch.randn(10, 10, generator=g))[0]
        # the largest weight of a direction is positive
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        strengths = torch.tensor([5.0, 3.0, 1.0])
        weights = torch.randn(3, 4000, generator=g)
        weights -= weights.mean(1, keepdim=True)
        weights = torch.linalg.qr(weights.T)[0].T * 4000**0.5
        latents = (axes[:, :3] @ (weights * strengths[:, None])).reshape(10, 40, 100) + 7
        moments = LatentMoments()
        moments.update(latents)
        basis = PrincipalBasis(moments)
        assert basis.share == pytest.approx(1)
        got = basis.colours(latents).reshape(-1, 3).T.astype(float)
        want = (weights / COMPONENT_CLIP * 127.5 + 127.5).clamp(0, 255).numpy()
        signs = np.sign([np.corrcoef(a, b)[0, 1] for a, b in zip(got, want, strict=True)])
        assert np.abs((got - 127.5) * signs[:, None] - (want - 127.5)).max() <= 1

    @pytest.mark.parametrize("channels", [1, 2])
    def test_fewer_channels_than_colours(self, channels):
        moments = LatentMoments()
        z = torch.randn(channels, 4, 5)
        moments.update(z)
        colours = PrincipalBasis(moments).colours(z)
        assert colours.shape == (4, 5, 3) and (colours[..., channels:] == 127).all() and colours[..., 0].std() > 10

    def test_maps_lie_row_after_row(self):
        z = torch.linspace(-5, 5, 20 * 2 * 3).reshape(20, 2, 3)
        levels = map_levels(z)
        assert levels.shape == (2 * 2, MAP_COLUMNS * 3)
        for c in range(20):
            r, k = divmod(c, MAP_COLUMNS)
            tile = levels[r * 2 : r * 2 + 2, k * 3 : k * 3 + 3]
            want = (z[c] / MAP_CLIP * 127.5 + 127.5).round().clamp(0, 255).numpy()
            np.testing.assert_array_equal(tile, want)
        assert (levels[2:, 4 * 3 :] == 127).all()

    def test_a_latent_that_is_not_finite_is_a_colour(self):
        levels = map_levels(torch.tensor([float("nan"), float("inf"), -float("inf")]).reshape(1, 1, 3))
        assert levels[0, :3].tolist() == [127, 255, 0]


def test_script_holds_what_json_lacks():
    text = site.script_of("x", {"a": [float("nan"), float("inf"), 1.5], "</script>": "\ud800"})
    assert text == '"use strict";\nwindow.x = {"a":[null,null,1.5],"\\u003c/script\\u003e":"\\\\ud800"};\n'


class TestGlimpse:
    def test_of_a_file_cut_short(self, tmp_path):
        rng = np.random.default_rng(0)
        whole = tmp_path / "a.jpg"
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(whole)
        whole.write_bytes(whole.read_bytes()[:-1500])
        got = pictures.glimpse(whole)
        assert got is not None and got.shape == (64, 64, 3) and got[:16].std() > 20

    def test_of_nothing(self, tmp_path):
        (tmp_path / "a.jpg").write_bytes(b"no picture")
        assert pictures.glimpse(tmp_path / "a.jpg") is None and pictures.glimpse(tmp_path / "absent.jpg") is None
