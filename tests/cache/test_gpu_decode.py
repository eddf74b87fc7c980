"""`decode gpu`, with torchvision played by one that is as strict and as careless: whole runs, and their failures."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
from pathlib import Path

import image_files as files
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cache_cases import snapshot
from fake_torchvision import FakeTorchvision
from models import random_model
from PIL import Image
from waiting import HANG_SECONDS

from capacitor_kernels.launch import INTERPRETED
from capacitor_kernels.ops.resize import ResizeConfig
from capacitor_kernels.tuning import using
from capacitor_rt import CacheError, InputError
from capacitor_rt.cache import CacheRequest, LatentDataset, begin, cache_images, coordinator, gpu_decoding, resizing
from capacitor_rt.cache.decoding import DecodePool
from capacitor_rt.cache.gpu_decoding import GpuDecoder
from capacitor_rt.cache.nvjpeg import JpegDecoder
from capacitor_rt.cache.options import RunOptions
from capacitor_rt.cache.outlook import dry_run
from capacitor_rt.cache.run import cache_images as run_cache
from capacitor_rt.cache.sources import ColumnsRequest
from capacitor_rt.cache.sources.files import folder_source
from capacitor_rt.cache.views import parse_views
from capacitor_rt.cache.views_run import cache_views
from capacitor_rt.cli import app
from capacitor_rt.errors import HungError
from capacitor_rt.images import gpu_jpeg
from capacitor_rt.images.encoded import RECORD_BYTES
from capacitor_rt.images.geometry import Size
from capacitor_rt.images.load import PixelPolicy, load_image

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU it is one of tests/cache/test_cache_gpu.py")
REQUEST = CacheRequest(32, batch=3, task_inputs=7, decode="gpu", dtype="fp32")
SIZES = ((70, 90), (90, 70), (33, 35), (40, 40), (200, 61), (48, 48))


@pytest.fixture(scope="module")
def src(tmp_path_factory) -> Path:
    """Photographs of many kinds: every orientation, a profile, other processes and colours, three that are damaged."""
    folder = tmp_path_factory.mktemp("src")
    for i in range(20):
        picture, options = Image.fromarray(files.texture(*SIZES[i % len(SIZES)], i)), {"exif": files.exif(i % 8 + 1)}
        options |= {9: {"icc_profile": files.icc_profile()}, 10: {"progressive": True}}.get(i, {})
        picture = picture.convert({11: "CMYK", 12: "L"}.get(i, "RGB"))
        data = files.encoded(picture, "PNG" if i == 7 else "JPEG", **({} if i == 7 else options))
        # without its end, with a hole that was never filled, without anything of the picture
        hole = data[: len(data) // 2] + bytes(600) + data[len(data) // 2 + 600 :]
        data = {5: data[:-90], 6: hole, 13: data[:400]}.get(i, data)
        (folder / f"{i:03}.{'png' if i == 7 else 'jpg'}").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def few(src, tmp_path_factory) -> Path:
    """The first seven of them."""
    folder = tmp_path_factory.mktemp("few")
    for path in sorted(src.iterdir())[:7]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(autouse=True)
def large_tiles():
    # few programs: the interpreter takes as long for a large tile as for a small one
    with using("resize", ResizeConfig(64, 512, 4)):
        yield


@pytest.fixture(autouse=True)
def nvjpeg(monkeypatch) -> FakeTorchvision:
    return FakeTorchvision().install(monkeypatch)


def run(src, out, request=REQUEST, workers=0, **options):
    chosen = RunOptions(workers=workers, progress=False, backoff=(), **options)
    return cache_images(src, out, random_model(), request, options=chosen)


def by_turns(data: bytes) -> bool:
    return sum(data[-40:]) % 3 == 0


def test_files_are_the_same_whoever_decodes_when_and_after_kills(src, tmp_path, monkeypatch, nvjpeg):
    monkeypatch.setattr(begin, "BYTES_PER_WORKER", 1)
    nvjpeg.refused = by_turns
    report = run(src, tmp_path / "one")
    assert report.cached == 18 and report.quarantined == {"truncated": 2}
    assert report.meters is not None and report.meters.seconds["gpu_decode"] > 0 and max(nvjpeg.calls) > 2
    run(src, tmp_path / "four", workers=4)
    assert snapshot(tmp_path / "four") == snapshot(tmp_path / "one")
    # a run that ended after its first task, with memory for less, in pieces of one picture
    monkeypatch.setattr(gpu_decoding, "_pieces", lambda pictures, most: ([p] for p in pictures))
    run(src, tmp_path / "resumed")
    log = tmp_path / "resumed" / "commits.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:1]))
    nvjpeg.most_bytes = 3 * 200 * 61
    assert run(src, tmp_path / "resumed").cached == 18
    assert snapshot(tmp_path / "resumed") == snapshot(tmp_path / "one")


def test_killed_while_it_decodes_and_gone_on_with(src, tmp_path, nvjpeg):
    """A process is killed while it decodes, two tasks on disk, and another one takes over."""
    request = CacheRequest(32, batch=3, task_inputs=3, decode="gpu", dtype="fp32")
    nvjpeg.refused = by_turns
    run(src, tmp_path / "whole", request)
    child = os.fork()
    if child == 0:
        log = tmp_path / "out" / "commits.jsonl"

        def die() -> None:
            if log.exists() and log.read_bytes().count(b"\n") >= 2:
                os.kill(os.getpid(), signal.SIGKILL)

        nvjpeg.before = die
        try:
            run(src, tmp_path / "out", request)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    committed = (tmp_path / "out" / "commits.jsonl").read_text().count("\n")
    assert 2 <= committed < 7
    run(src, tmp_path / "out", request, stale=0.5, heartbeat=0.1)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_pixels_of_the_gpu_are_taken_where_they_should_be_and_nowhere_else(src, tmp_path):
    """The same inputs by `exact`: rows of those that the GPU decodes differ, the others are equal to the bit."""
    for decode in ("gpu", "exact"):
        run(src, tmp_path / decode, CacheRequest(32, batch=3, decode=decode, dtype="fp32"), resize="auto")
    one, other = (LatentDataset(tmp_path / decode, verify=True) for decode in ("gpu", "exact"))
    by_id = [{row["id"]: row["latents"] for row in (rows[i] for i in range(len(rows)))} for rows in (one, other)]
    assert by_id[0].keys() == by_id[1].keys() and len(by_id[0]) == 18
    taken = 0
    for name, latents in by_id[0].items():
        stream = gpu_jpeg.stream_of((src / name).read_bytes())
        is_taken = stream is not None and name != "009.jpg"
        taken += is_taken
        assert torch.equal(latents, by_id[1][name]) != is_taken, name
    assert taken == 12


def test_each_picture_is_where_its_row_is(src, nvjpeg):
    """Pixel by pixel against the decoder's picture resized by the CPU, in buckets of three shapes."""
    buckets = (Size(32, 48), Size(40, 40), Size(48, 32))
    source = folder_source(src, src / "none", ColumnsRequest())
    decoder = GpuDecoder(torch.device("cpu"), JpegDecoder(torch.device("cpu")), 1 << 16)
    found = {}
    with DecodePool(source, PixelPolicy("gpu"), buckets, workers=0, record_bytes=RECORD_BYTES) as pool:
        for chunk in decoder.ahead(pool.decode([range(9), range(9, 20)])):
            decoder.take(chunk)
            for rows, bucket in chunk.groups():
                batch = torch.zeros(len(rows) + 1, buckets[bucket].height, buckets[bucket].width, 3, dtype=torch.uint8)
                decoder.put(chunk.offsets(rows[::-1]), batch, 1)
                found |= {chunk.columns["input"][int(r)].as_py(): p for r, p in zip(rows[::-1], batch[1:], strict=True)}
    decoder.finish()
    assert sorted(found) == [i for i in range(20) if i not in (5, 13)]
    for ordinal, pixels in found.items():
        data = sorted(src.iterdir())[ordinal].read_bytes()
        stream = None if ordinal == 9 else gpu_jpeg.stream_of(data)
        if stream is not None:
            # what the decoder makes of it, as a file that is decoded exactly
            given = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
            (planes,) = nvjpeg.decode_jpeg([given], "RGB", "cpu")
            orientation = Image.open(io.BytesIO(data)).getexif().get(0x0112, 1)
            data = files.encoded(Image.fromarray(planes.permute(1, 2, 0).numpy()), "TIFF", exif=files.exif(orientation))
        np.testing.assert_array_equal(pixels, load_image(data, PixelPolicy(), buckets).pixels, str(ordinal))


def test_too_little_memory_for_one_fails_for_now(few, tmp_path, nvjpeg):
    whole = run(few, tmp_path / "whole")
    nvjpeg.most_bytes = 3 * 90 * 70
    report = run(few, tmp_path / "out")
    assert {name: reason for name, (reason, _) in report.failures.items()} == {"004.jpg": "out_of_memory"}
    assert report.exit_code == 1 and report.unfinished == 1 and report.cached == 0
    nvjpeg.most_bytes = 1 << 40
    assert run(few, tmp_path / "out").cached == whole.cached == 6
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_a_file_that_the_decoder_chokes_on_fails_for_now_and_alone(few, tmp_path, nvjpeg):
    run(few, tmp_path / "whole")
    stream = gpu_jpeg.stream_of((few / "003.jpg").read_bytes())
    nvjpeg.choked = lambda data: data == stream
    report = run(few, tmp_path / "out")
    assert {k: v[0] for k, v in report.failures.items()} == {"003.jpg": "crashed"}
    assert "Failed to decode jpeg stream: 6" in report.failures["003.jpg"][1]
    assert "crashed" not in report.quarantined and report.unfinished == 1
    # asked to, it is given up, and never called corrupt
    assert run(few, tmp_path / "given up", give_up=True).quarantined == {"truncated": 1, "crashed": 1}
    nvjpeg.choked = lambda data: False
    run(few, tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_a_broken_decoder_ends_the_run_and_quarantines_nothing(few, tmp_path, nvjpeg):
    request = CacheRequest(32, batch=3, task_inputs=3, decode="gpu", dtype="fp32")
    run(few, tmp_path / "whole", request)
    calls = []

    def breaks() -> None:
        calls.append(1)
        nvjpeg.broken = len(calls) > 3

    nvjpeg.before = breaks
    with pytest.raises(CacheError, match=r"does not decode JPEGs any more .* run the same command again"):
        run(few, tmp_path / "out", request)
    for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines():
        assert json.loads(line)["reason"] == "truncated"
    nvjpeg.before, nvjpeg.broken = lambda: None, False
    run(few, tmp_path / "out", request)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_a_decoder_that_hangs_ends_the_run_and_nothing_else_decodes_for_it(few, tmp_path, nvjpeg):
    request = CacheRequest(32, batch=2, task_inputs=2, decode="gpu", dtype="fp32")
    run(few, tmp_path / "whole", request)
    let_go, calls = threading.Event(), []

    def hang() -> None:
        calls.append(0)
        if len(calls) == 3:
            let_go.wait(HANG_SECONDS)
            # the process would have ended
            raise SystemExit

    nvjpeg.before = hang
    try:
        message = (
            r"does not come back from decoding \(00\d.jpg.*\) after 0.5 s: what is committed is safe.*--decode exact"
        )
        with pytest.raises(HungError, match=message):
            run(few, tmp_path / "out", request, image_timeout=0.5)
        # which was not waited for
        assert any(thread.name == "gpu-decode" for thread in threading.enumerate())
    finally:
        let_go.set()
        for thread in threading.enumerate():
            if thread.name == "gpu-decode":
                thread.join(HANG_SECONDS)
    assert not (tmp_path / "out" / "leases").exists() and snapshot(tmp_path / "out") != snapshot(tmp_path / "whole")
    nvjpeg.before = lambda: None
    run(few, tmp_path / "out", request)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_the_command_and_coordinators_end_although_a_thread_hangs(monkeypatch, capsys):
    """As of a driver's call, for which an orderly end of a process waits."""
    ended = []
    monkeypatch.setattr(os, "_exit", lambda code: ended.append(code) or (_ for _ in ()).throw(SystemExit(code)))
    monkeypatch.setattr(app, "app", lambda **options: (_ for _ in ()).throw(HungError("the GPU does not come back")))
    with pytest.raises(SystemExit):
        app._run()
    assert ended == [1] and "does not come back" in capsys.readouterr().err

    monkeypatch.undo()
    ours, theirs = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            coordinator.coordinate = lambda setup, tell, helper: tell(coordinator.ERROR, HungError("it hangs"))
            coordinator.main(os.dup(theirs.fileno()))
        finally:
            os._exit(70)
    theirs.close()
    ours.send(coordinator.Setup("src", "out", random_model(), REQUEST, RunOptions(workers=0)))
    ours.send(coordinator.GO)
    word, error = ours.recv()
    assert word == coordinator.ERROR and isinstance(error, HungError)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_what_neither_decodes_is_damaged(tmp_path, nvjpeg, monkeypatch):
    """A stream that nvJPEG refuses and Pillow, the judge, cannot decode."""
    (tmp_path / "src").mkdir()
    for i in range(3):
        (tmp_path / "src" / f"{i}.jpg").write_bytes(files.encoded(files.texture(40, 40, i), "JPEG"))
    bad = gpu_jpeg.stream_of((tmp_path / "src" / "1.jpg").read_bytes())
    nvjpeg.refused = lambda data: data == bad
    exact = gpu_decoding.exact_pixels

    def judged(stream, *, name):
        return exact(stream[:300] if stream.tobytes() == bad else stream, name=name)

    monkeypatch.setattr(gpu_decoding, "exact_pixels", judged)
    report = run(tmp_path / "src", tmp_path / "out")
    assert report.quarantined == {"truncated": 1} and report.cached == 2
    index = pq.read_table(tmp_path / "out" / "index").to_pylist()
    (row,) = [row for row in index if row["status"] != "ok"]
    assert row["id"] == "1.jpg" and row["width"] is None and row["bucket"] is None and row["bytes_hash"] is not None
    assert "nvJPEG: bad JPEG" in row["message"]


def test_a_cache_goes_on_by_the_same_decoder_only(few, tmp_path, nvjpeg):
    run(few, tmp_path / "out")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["pixels"]["decode"] == "gpu" and plan["gpu_decode"] == {"torchvision": "0.28.0", **nvjpeg.facts}
    before = snapshot(tmp_path / "out")
    facts = nvjpeg.facts
    for name, value in {"nvjpeg": "12.8.0", "decoded_by": "cuda", "compute_capability": 120}.items():
        nvjpeg.facts = facts | {name: value}
        for options in ({}, {"update": True}):
            with pytest.raises(CacheError, match="from another JPEG decoder") as error:
                run(few, tmp_path / "out", **options)
            assert error.value.problems == [f"{name} {facts[name]} -> {value}"]
    assert snapshot(tmp_path / "out") == before
    run(few, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "plan.json").read_text())["gpu_decode"]["compute_capability"] == 120


def test_other_policies_are_other_caches(few, tmp_path):
    run(few, tmp_path / "out")
    with pytest.raises(CacheError, match="planned otherwise") as error:
        run(few, tmp_path / "out", CacheRequest(32, batch=3, task_inputs=7, dtype="fp32"))
    assert error.value.problems == ["pixels.decode gpu -> exact"]


def test_updates_keep_rows(src, few, tmp_path, nvjpeg):
    shutil.copytree(few, tmp_path / "src")
    run(tmp_path / "src", tmp_path / "out")
    for path in sorted(src.iterdir())[14:17]:
        shutil.copy(path, tmp_path / "src")
    nvjpeg.calls.clear()
    report = run(tmp_path / "src", tmp_path / "out", update=True)
    assert report.cached == 9 and report.reused >= 6
    # those that are new, beside the picture that the decoder is tried with
    assert [n for n in nvjpeg.calls if n > 1] == [3] and len(LatentDataset(tmp_path / "out", verify=True)) == 9


def test_several_views_are_decoded_once_and_have_the_bytes_of_each_alone(few, tmp_path, monkeypatch, nvjpeg):
    monkeypatch.setattr(begin, "BYTES_PER_WORKER", 1)
    # one that is refused is refused for all
    stream = gpu_jpeg.stream_of((few / "002.jpg").read_bytes())
    nvjpeg.refused = lambda data: data == stream
    views = parse_views(["32", "48@area+flip"], REQUEST)
    for name, request in views.items():
        run(few, tmp_path / f"alone-{name}", request)
    nvjpeg.calls.clear()
    options = RunOptions(workers=2, progress=False, backoff=())
    report = cache_views(few, tmp_path / "out", random_model(), views, note=lambda line: None, options=options)
    assert report.meters is not None and report.meters.seconds["gpu_decode"] > 0
    assert max(nvjpeg.calls) == 5 and nvjpeg.calls.count(5) == 1
    # what one has already is not decoded for it again
    shutil.copytree(tmp_path / "alone-32", tmp_path / "second" / "32")
    options = RunOptions(workers=0, progress=False, backoff=())
    cache_views(few, tmp_path / "second", random_model(), views, note=lambda line: None, options=options)
    for name in views:
        assert snapshot(tmp_path / "out" / name) == snapshot(tmp_path / f"alone-{name}")
        assert snapshot(tmp_path / "second" / name) == snapshot(tmp_path / f"alone-{name}")


def test_refused_before_anything_is_written(src, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="decode gpu resizes on the GPU, and resize is cpu"):
        run(src, out, resize="cpu")
    monkeypatch.setattr(resizing, "INTERPRETED", False)
    with pytest.raises(InputError, match="decode gpu needs an NVIDIA GPU that the kernels run on: use decode exact"):
        run(src, out)
    with pytest.raises(InputError, match="decode gpu needs an NVIDIA GPU"):
        dry_run(src, out, random_model(), REQUEST)
    assert not out.exists() and run_cache is cache_images


def test_a_dry_run_and_retries(few, tmp_path):
    found = dry_run(few, tmp_path / "out", random_model(), REQUEST)
    assert sum(found.buckets.values()) == 7 and not (tmp_path / "out").exists()
    assert any("nvJPEG 13.0.2 on the JPEG engine of compute capability 9.0" in line for line in found.notes)
    run(few, tmp_path / "out")
    report = run(few, tmp_path / "out", retry_quarantined=True)
    assert report.quarantined == {"truncated": 1}
