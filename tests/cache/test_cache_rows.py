"""What a cache holds: the latents of the right pixels, for every kind of file; and typed reasons for the rest."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from cache_cases import index_rows, pixels, snapshot, stamps, task_files, task_layout, write_images
from models import random_model
from PIL import Image
from safetensors.torch import load_file

from capacitor_rt.cache import CacheRequest, LatentDataset, LatentRow, RunOptions, cache_images
from capacitor_rt.cache import pipeline as pipeline_module
from capacitor_rt.cache.sources import files as files_module
from capacitor_rt.cache.sources.files import MAX_FILE_BYTES
from capacitor_rt.cache.verify import verify
from capacitor_rt.errors import CacheError
from capacitor_rt.images.decode import decode_image
from capacitor_rt.images.geometry import Size, apply, place
from capacitor_rt.images.scan import path_to_id


def run(src, out, model, request, workers=0, **options):
    chosen = RunOptions(workers=workers, progress=False, backoff=(0.0,), **options)
    return cache_images(src, out, model, request, options=chosen)


def quarantine(out):
    return {e["path"]: e["reason"] for e in map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())}


def index(out):
    return {row["id"]: row for row in index_rows(out)}


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_rows_are_the_models_latents_of_the_resized_pixels(tmp_path, dtype, torch_dtype):
    model = random_model()
    paths = write_images(tmp_path / "src", 7)
    run(tmp_path / "src", tmp_path / "out", model, CacheRequest(64, area=True, dtype=dtype, task_inputs=3, batch=1))
    rows = LatentDataset(tmp_path / "out", verify=True)
    assert [rows[i]["id"] for i in range(7)] == [p.name for p in paths]
    for i, path in enumerate(paths):
        image = decode_image(path.read_bytes()).pixels
        bucket = rows.bucket(i)
        framed = apply(image, place(Size(*image.shape[:2]), bucket))
        expected = model.encode(torch.from_numpy(framed)[None])[0].to(getattr(torch, torch_dtype))
        assert rows[i]["latents"].dtype == expected.dtype
        assert torch.equal(rows[i]["latents"], expected)


def test_posterior_and_mirror_images(tmp_path):
    model = random_model()
    paths = write_images(tmp_path / "src", 3, sizes=((64, 64),))
    request = CacheRequest(64, dtype="fp32", posterior=True, flip=True, batch=3)
    run(tmp_path / "src", tmp_path / "out", model, request)
    rows = LatentDataset(tmp_path / "out", verify=True)
    beside = {"label", "caption"}
    assert set(rows[0]) == (LatentRow.__required_keys__ | LatentRow.__optional_keys__) - beside
    batch = torch.from_numpy(np.stack([np.array(Image.open(p)) for p in paths]))
    for suffix, images in (("", batch), ("_flip", batch.flip(2))):
        stored = {k: torch.stack([rows[i][k + suffix] for i in range(3)]) for k in ("latents", "logsnr")}
        assert torch.equal(stored["latents"], model.encode(images))
        assert torch.equal(stored["logsnr"], model.encode_posterior(images).logsnr)


@pytest.mark.parametrize("latent_patch", [1, 2])
def test_draws_have_the_posteriors_mean_and_spread(tmp_path, latent_patch):
    model = random_model(latent_patch=latent_patch)
    path = write_images(tmp_path / "src", 1, sizes=((64, 64),))[0]
    run(tmp_path / "src", tmp_path / "out", model, CacheRequest(64, dtype="fp32", posterior=True))
    rows = LatentDataset(tmp_path / "out")
    row = rows[0]
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([rows.draw(row, generator) for _ in range(4000)])
    mean, logsnr = model.encode_posterior(torch.from_numpy(np.array(Image.open(path)))[None])
    # from the model itself: samples of the raw posterior, patched and whitened
    noise = torch.randn(4000, *mean.shape[1:], generator=generator)
    raw = torch.sigmoid(logsnr).sqrt() * mean + torch.sigmoid(-logsnr).sqrt() * noise
    if latent_patch == 2:
        raw = torch.nn.functional.pixel_unshuffle(raw, 2)
    expected = model.whiten(raw)
    error = expected.std(0) / 4000**0.5
    assert ((draws.mean(0) - expected.mean(0)).abs() < 6 * 2**0.5 * error).all()
    assert torch.allclose(draws.std(0), expected.std(0), rtol=0.1)


def test_tasks_are_plain_safetensors_with_aligned_data(tmp_path):
    """Every tensor on a 4 KiB boundary, which padding between them makes, and one for each bucket and kind."""
    src, out = tmp_path / "src", tmp_path / "out"
    write_images(src, 7, sizes=((64, 64), (32, 128), (128, 32)))
    run(src, out, random_model(), CacheRequest(64, area=True, posterior=True, flip=True, task_inputs=4))
    for task, rows in ((0, {"64x64": 2, "32x128": 1, "128x32": 1}), (1, {"64x64": 1, "32x128": 1, "128x32": 1})):
        tensors = load_file(task_files(out, task)[1])
        kinds = ("latents", "logsnr", "latents_flip", "logsnr_flip")
        padding = {name for name in tensors if name.startswith("padding/")}
        assert set(tensors) - padding == {f"{kind}/{bucket}" for kind in kinds for bucket in rows}
        for name, t in tensors.items():
            if name in padding:
                assert t.dtype == torch.uint8 and not t.any() and len(t) < 4096
                continue
            height, width = map(int, name.partition("/")[2].split("x"))
            assert t.shape == (rows[f"{height}x{width}"], 8, height // 16, width // 16) and t.dtype == torch.bfloat16
        placed = task_layout(out, task)
        assert all(t.begin % 4096 == 0 for t in placed.tensors.values())
        assert task_files(out, task)[1].stat().st_size == placed.nbytes


def test_index_says_what_became_of_each_input(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    # stored lying, shown upright: 40 wide, 100 high
    Image.fromarray(pixels(40, 100)).save(src / "turned.png", exif=exif)
    run(src, out, random_model(), CacheRequest(64, dtype="fp32"))
    row = index(out)["turned.png"]
    placement = place(Size(100, 40), Size(64, 64))
    assert (row["width"], row["height"], row["orientation"]) == (40, 100, 6)
    assert (row["resize_height"], row["resize_width"]) == (placement.resize.height, placement.resize.width) == (160, 64)
    assert (row["crop_top"], row["crop_left"]) == (48, 0)
    latents = LatentDataset(out)[0]["latents"]
    assert row["min"] == latents.min() and row["max"] == latents.max()
    assert row["mean"] == pytest.approx(float(latents.mean()), abs=1e-6)
    assert row["std"] == pytest.approx(float(latents.std(correction=0)), rel=1e-5)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and ends there."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = b"IEND"
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
        + struct.pack(">I", 0) + end + struct.pack(">I", zlib.crc32(end))
    )  # fmt: skip


def bad_folder(src) -> dict[str, str | None]:
    """Fill `src` with the difficult files of the world; id -> reason, None for those that are good."""
    src.mkdir()
    good = pixels(50, 70)
    expected: dict[str, str | None] = {}

    def put(name: str | bytes, reason: str | None, data: bytes) -> None:
        path = os.path.join(os.fsencode(src), os.fsencode(name))
        with open(path, "wb") as f:
            f.write(data)
        expected[path_to_id(os.fsencode(name))] = reason

    def image(name: str, picture: Image.Image, **options) -> None:
        picture.save(src / name, **options)
        expected[name] = None

    rgb = Image.fromarray(good)
    image("rgb.jpg", rgb)
    image("rgb.png", rgb)
    image("cmyk.jpg", rgb.convert("CMYK"))
    image("grey16.png", Image.fromarray((good[..., 0].astype(np.uint16) << 8) + 7))
    image("palette.png", rgb.quantize(16), transparency=3)
    image("greyalpha.png", rgb.convert("LA"))
    image("rgba.webp", rgb.convert("RGBA"))
    image("dot.png", Image.new("RGB", (1, 1), (9, 8, 7)))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image(f"exif{orientation}.jpg", rgb, exif=exif)
    data = (src / "rgb.png").read_bytes()
    put("with space.png", None, data)
    put("new\nline.png", None, data)
    put(b"not-utf8-\xff.png", None, data)
    put("zero.jpg", "empty", b"")
    put("text.jpg", "not_an_image", b"hello, I am a letter")
    put("cut.png", "truncated", data[: len(data) // 2])
    put("cut.jpg", "truncated", (src / "rgb.jpg").read_bytes()[:700])
    put("bomb.png", "too_large", png_header(60000, 60000))
    image("sliver.png", Image.new("RGB", (1, 60000)))
    expected["sliver.png"] = "too_large"
    put("photo.heic", "unsupported", b"\0\0\0\x18ftypheic" + bytes(40))
    put("private.png", "unreadable", data)
    os.chmod(src / "private.png", 0)
    os.mkfifo(src / "pipe.png")
    (src / "gone.png").symlink_to("nowhere")
    expected |= {"pipe.png": "unreadable", "gone.png": "unreadable"}
    with open(src / "huge.tif", "wb") as f:
        f.truncate(MAX_FILE_BYTES + 1)
    expected["huge.tif"] = "too_large"
    (src / "loop").symlink_to(".")
    return expected


def test_difficult_files_are_cached_right_or_quarantined_with_a_reason(tmp_path, as_nobody):
    src = tmp_path / "src"
    expected = bad_folder(src)
    model = random_model()
    work = tmp_path / "work"
    work.mkdir(mode=0o777)
    work.chmod(0o777)
    before = stamps(src)
    with as_nobody(tmp_path):
        report = run(src, work / "out", model, CacheRequest(64, dtype="fp32", task_inputs=4, batch=1))
    assert report.exit_code == 3
    assert stamps(src) == before
    rows = index(work / "out")
    assert {name: row["reason"] for name, row in rows.items()} == expected
    assert quarantine(work / "out") == {name: reason for name, reason in expected.items() if reason}
    found = LatentDataset(work / "out", verify=True)
    assert len(found) == report.cached == sum(reason is None for reason in expected.values())
    for i in range(len(found)):
        image = decode_image((src / found.path(i)).read_bytes()).pixels
        framed = apply(image, place(Size(*image.shape[:2]), Size(64, 64)))
        assert torch.equal(found[i]["latents"], model.encode(torch.from_numpy(framed)[None])[0]), found[i]["id"]
    # upright and lying images of one stored picture
    assert {rows[f"exif{n}.jpg"]["width"] for n in (1, 2, 3, 4)} == {70}
    assert {rows[f"exif{n}.jpg"]["width"] for n in (5, 6, 7, 8)} == {50}
    assert verify(work / "out").problems == []


def test_messages_do_not_depend_on_the_place(tmp_path, as_nobody):
    expected = bad_folder(tmp_path / "one")
    shutil.copytree(
        tmp_path / "one", tmp_path / "two", symlinks=True, ignore=shutil.ignore_patterns("pipe.png", "*.tif")
    )
    for name in ("pipe.png", "huge.tif"):
        (tmp_path / "one" / name).unlink()
    for name in ("one", "two"):
        run(tmp_path / name, tmp_path / f"{name}-out", random_model(), CacheRequest(64))
    one, two = snapshot(tmp_path / "one-out"), snapshot(tmp_path / "two-out")
    assert one["quarantine.jsonl"] == two["quarantine.jsonl"]
    assert len(one["quarantine.jsonl"].splitlines()) >= sum(r is not None for r in expected.values()) - 3
    del one["source.parquet"], two["source.parquet"]
    assert one == two


def test_two_files_of_one_stem_are_two_rows(tmp_path):
    src = tmp_path / "src"
    write_images(src, 1)
    Image.fromarray(pixels(40, 40, seed=5)).save(src / "000.jpg")
    run(src, tmp_path / "out", random_model(), CacheRequest(32))
    rows = LatentDataset(tmp_path / "out")
    assert [rows[i]["id"] for i in range(2)] == ["000.jpg", "000.png"]
    assert not torch.equal(rows[0]["latents"], rows[1]["latents"])


def test_only_the_image_whose_latent_overflows_is_quarantined(tmp_path):
    # a grey image lies at the mean of this model's statistics, and whitening magnifies what does not beyond float16
    model = random_model(latent_running_stats_eps=1e-16)
    model.encoder.blocks[0].layer_scale.zero_()
    src = tmp_path / "src"
    src.mkdir()
    grey = Image.new("RGB", (32, 32), (100, 100, 100))
    mode = model.encode_posterior(torch.from_numpy(np.array(grey))[None])
    model.latent_norm_running_mean.copy_((torch.sigmoid(mode.logsnr).sqrt() * mode.mean)[0, :, 0, 0])
    model.latent_norm_running_var.zero_()
    for name, colour in (("a", 100), ("b", 250), ("c", 100)):
        Image.new("RGB", (32, 32), (colour,) * 3).save(src / f"{name}.png")
    report = run(src, tmp_path / "out", model, CacheRequest(32, dtype="fp16", batch=3))
    assert report.exit_code == 3
    assert quarantine(tmp_path / "out") == {"b.png": "nan_latent"}
    rows = LatentDataset(tmp_path / "out", verify=True)
    assert [rows[i]["id"] for i in range(2)] == ["a.png", "c.png"]
    assert all(rows[i]["latents"].isfinite().all() for i in range(2))


def test_a_model_of_nans_writes_no_rows(tmp_path):
    model = random_model()
    model.encoder.to_bottleneck.bias.fill_(float("nan"))
    write_images(tmp_path / "src", 3)
    report = run(tmp_path / "src", tmp_path / "out", model, CacheRequest(32))
    assert (report.cached, report.quarantined) == (0, {"nan_latent": 3})
    assert set(load_file(task_files(tmp_path / "out", 0)[1])) == set()
    assert verify(tmp_path / "out").problems == []
    with pytest.raises(CacheError, match="none of its 3 inputs could be cached"):
        LatentDataset(tmp_path / "out")


def run_with_change(monkeypatch, change, *args, **options):
    """`run`, where `change` is called after the inputs have been listed and before they are read."""
    original = pipeline_module.Pipeline.run

    def changed(self, tasks):
        change()
        original(self, tasks)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline_module.Pipeline, "run", changed)
        return run(*args, **options)


def test_files_that_change_after_planning_keep_their_task_from_being_finished(tmp_path, monkeypatch):
    src, out, model, request = tmp_path / "src", tmp_path / "out", random_model(), CacheRequest(32, task_inputs=2)
    paths = write_images(src, 6, sizes=((40, 40),), suffix=".bmp")
    before = paths[0].read_bytes(), paths[2].read_bytes()

    def change():
        paths[0].write_bytes(before[0] + b"more")
        paths[2].unlink()

    report = run_with_change(monkeypatch, change, src, out, model, request)
    assert (report.cached, report.unfinished, report.failed, report.exit_code) == (2, 2, {"changed": 2}, 1)
    assert quarantine(out) == {}
    with pytest.raises(CacheError, match=r"1 removed: '002\.bmp'"):
        run(src, out, model, request)
    for path, data in zip((paths[0], paths[2]), before, strict=True):
        path.write_bytes(data)
    assert run(src, out, model, request).cached == 6
    run(src, tmp_path / "undisturbed", model, request)
    one, two = snapshot(out), snapshot(tmp_path / "undisturbed")
    assert {k for k in two if one[k] != two[k]} == {"source.parquet"} and one.keys() == two.keys()


def fail_reading(monkeypatch, failures: dict[bytes, list[OSError]]) -> list[bytes]:
    """Let reads of these files fail, each error once; the names of the files that are read."""
    original, read = files_module._read_all, []
    opened: dict[int, bytes] = {}
    real_open = os.open

    def opening(path, *args, **options):
        fd = real_open(path, *args, **options)
        opened[fd] = os.path.basename(path) if isinstance(path, bytes) else b""
        return fd

    def reading(fd, size):
        name = opened.get(fd, b"")
        read.append(name)
        if failures.get(name):
            raise failures[name].pop(0)
        return original(fd, size)

    monkeypatch.setattr(files_module.os, "open", opening)
    monkeypatch.setattr(files_module, "_read_all", reading)
    return read


def test_an_io_error_that_passes_leaves_no_trace(tmp_path, monkeypatch):
    src, model = tmp_path / "src", random_model()
    write_images(src, 4)
    run(src, tmp_path / "undisturbed", model, CacheRequest(32))
    with monkeypatch.context() as patch:
        read = fail_reading(patch, {b"002.png": [OSError(errno.EIO, "I/O error")]})
        report = run(src, tmp_path / "out", model, CacheRequest(32), workers=0)
    assert (report.cached, report.exit_code) == (4, 0) and read.count(b"002.png") == 2
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "undisturbed")


def test_an_io_error_that_stays_is_tried_again_by_the_next_run(tmp_path, monkeypatch):
    src, out, model, request = tmp_path / "src", tmp_path / "out", random_model(), CacheRequest(32, task_inputs=2)
    write_images(src, 6)
    with monkeypatch.context() as patch:
        fail_reading(patch, {b"002.png": [OSError(errno.EIO, "I/O error")] * 9})
        report = run(src, out, model, request, workers=0)
    assert (report.cached, report.unfinished, report.failed, report.exit_code) == (4, 1, {"io_error": 1}, 1)
    assert report.examples == ["002.png: Input/output error"]
    found = verify(out)
    assert (found.problems, found.unfinished, quarantine(out)) == ([], 1, {})
    report = run(src, out, model, request)
    assert (report.cached, report.new_images, report.exit_code) == (6, 2, 0)
    run(src, tmp_path / "undisturbed", model, request)
    assert snapshot(out) == snapshot(tmp_path / "undisturbed")


def test_giving_up_quarantines_what_keeps_failing(tmp_path, monkeypatch):
    src, out, model, request = tmp_path / "src", tmp_path / "out", random_model(), CacheRequest(32, task_inputs=2)
    write_images(src, 4)
    fail_reading(monkeypatch, {b"002.png": [OSError(errno.EIO, "I/O error")] * 9})
    report = run(src, out, model, request, workers=0, give_up=True)
    assert (report.cached, report.quarantined, report.exit_code) == (3, {"io_error": 1}, 3)
    assert quarantine(out) == {"002.png": "io_error"}


def test_a_source_that_goes_away_stops_the_run_and_quarantines_nothing(tmp_path, monkeypatch):
    src, out, model = tmp_path / "src", tmp_path / "out", random_model()
    write_images(src, 4)
    with pytest.raises(CacheError, match="went away during the run"):
        run_with_change(monkeypatch, lambda: src.rename(tmp_path / "unmounted"), src, out, model, CacheRequest(32))
    assert (out / "quarantine.jsonl").read_bytes() == b""
    (tmp_path / "unmounted").rename(src)
    assert run(src, out, model, CacheRequest(32)).cached == 4
    run(src, tmp_path / "undisturbed", model, CacheRequest(32))
    assert snapshot(out) == snapshot(tmp_path / "undisturbed")
