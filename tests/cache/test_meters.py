"""Advice that follows from what the stages did, and the file that says so."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from typing import ClassVar

import pytest
from cache_cases import write_images
from models import random_model

from capacitor_rt.cache import CacheRequest, cache_images
from capacitor_rt.cache import meters as meters_module
from capacitor_rt.cache import prepare as prepare_module
from capacitor_rt.cache import run as run_module
from capacitor_rt.cache.encoder import BatchEncoder
from capacitor_rt.cache.meters import GPU_DECODE, Meters, prometheus, write_metrics
from capacitor_rt.cache.options import RunOptions
from capacitor_rt.cache.sources.files import FileReader, FileSource
from capacitor_rt.cache.store import TaskStore
from capacitor_rt.errors import InputError


def meters(workers=4, cores=8, device="gpu", wall=10.0, decoded="exact", **seconds) -> Meters:
    found = Meters(workers, cores, device, wall=wall, images=1000, decoded=decoded)
    if decoded == "gpu":
        found.seconds[GPU_DECODE] = found.waits[GPU_DECODE] = 0.0
    for name, value in seconds.items():
        if name in found.seconds:
            found.seconds[name] = value
        else:
            found.waits[name.removeprefix("wait_")] = value
    return found


@pytest.mark.parametrize(
    ("found", "limit", "said"),
    [
        (meters(encode=9.7), "encode", "GPU works 97% of the time"),
        (
            meters(encode=5.9, decode=36.0, wait_decode=4.0),
            "decode",
            "GPU waits 41% for decode: add --workers, or --decode gpu",
        ),
        (meters(workers=8, encode=5.9, decode=76.0, wait_decode=4.0), "decode", "use --decode gpu, smaller images"),
        (meters(encode=2.0, decode=3.0, wait_decode=7.0, starved=30.0), "decode", "for reading: the storage is slow"),
        (meters(encode=2.0, decode=3.0, wait_decode=7.0, queued=30.0), "decode", "for memory for large images"),
        (meters(encode=5.0, wait_write=4.0, wait_decode=1.0), "write", "GPU waits 50% for write: the disk is slow"),
        (meters(encode=5.0, fill=4.0, wait_decode=1.0), "fill", "for pixels copied into batches"),
        (meters(decoded="fast", encode=5.0, decode=36.0, wait_decode=4.0), "decode", "add --workers, or --decode gpu"),
        (meters(decoded="gpu", encode=5.0, decode=36.0, wait_decode=4.0), "decode", "for decode: add --workers"),
        (meters(8, decoded="gpu", encode=5.0, wait_decode=4.0), "decode", "use smaller images, or more than 8 cores"),
        (meters(device="cpu", encode=5.0, wait_decode=4.0), "decode", "add --workers, or --decode fast"),
        (
            meters(decoded="gpu", encode=5.0, gpu_decode=4.0, wait_gpu_decode=3.0, wait_decode=1.0),
            "gpu_decode",
            "GPU waits 50% for its JPEG decoder: use --decode fast with many --workers, or share",
        ),
        (
            meters(workers=0, device="cpu", encode=5.0, decode=4.0),
            "decode",
            "encoder waits 50% for decode: give --work",
        ),
    ],
)
def test_what_limits_and_what_to_do(found, limit, said):
    assert found.limit() == limit
    assert said in found.advice() and found.advice() in str(found)


def test_a_short_run_says_nothing():
    assert "too short" in meters(wall=1.0, encode=0.1, decode=3.0).advice()


def test_shares_of_the_workers_time():
    found = meters(decode=30.0, encode=7.0, write=1.0, fill=2.0)
    assert found.occupancy() == pytest.approx({"decode": 0.75, "fill": 0.2, "encode": 0.7, "write": 0.1})
    assert "decode 75% of 4 workers" in str(found)


def test_files(tmp_path):
    report = meters(encode=5.0, decode=8.0).report()
    write_metrics(tmp_path / "m.json", report)
    assert json.loads((tmp_path / "m.json").read_text())["images_per_second"] == 100.0
    write_metrics(tmp_path / "m.prom", report)
    lines = (tmp_path / "m.prom").read_text().splitlines()
    assert 'capacitor_cache_seconds{stage="decode"} 8.0' in lines
    assert "# TYPE capacitor_cache_device_waiting gauge" in lines and "capacitor_cache_device_waiting 0.5" in lines
    # every sample is a name, perhaps one label, and a number
    assert all(line.startswith("# TYPE ") or float(line.rsplit(" ", 1)[1]) >= 0 for line in lines)
    assert prometheus({"text": "no number"}) == "\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "m.prom"]
    with pytest.raises(InputError, match="cannot write metrics"):
        write_metrics(tmp_path / "nowhere" / "m.json", report)


def test_of_a_run(tmp_path):
    write_images(tmp_path / "src", 6)
    options = RunOptions(workers=0, progress=False, metrics=tmp_path / "m.json")
    report = cache_images(tmp_path / "src", tmp_path / "out", random_model(), CacheRequest(32), options=options)
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["images"] == report.meters.images == 6 and found["advice"] == report.meters.advice()
    seconds = found["seconds"]
    assert all(seconds[stage] > 0 for stage in ("read", "decode", "fill", "encode", "write"))
    assert sum(seconds[stage] for stage in ("decode", "fill", "encode")) <= found["wall"]


def test_processes_of_which_one_had_nothing_to_decode():
    one, other = meters(decoded="gpu", encode=5.0, gpu_decode=4.0, wait_gpu_decode=3.0), meters(encode=1.0)
    for several in ([one, other], [other, one]):
        joined = Meters.joined(several)
        assert joined.seconds[GPU_DECODE] == 4.0 and joined.waits[GPU_DECODE] == 3.0 and joined.seconds["encode"] == 6.0
        assert "GPU decode 20%" in str(joined) and joined.occupancy()["gpu_decode"] == pytest.approx(0.2)


def modelled(seconds: float):
    """A class of encoders that take as long for a batch as a device would, beside the CPU, and compute nothing."""

    class ModelledEncoder(BatchEncoder):
        known: ClassVar[dict] = {}
        free = computed = 0.0

        def submit(self, pixels):
            key = tuple(pixels.shape)
            if key not in self.known:
                self.known[key] = super().submit(pixels)
                self.busy = 0.0
            type(self).free = max(time.perf_counter(), self.free) + seconds
            type(self).computed += seconds
            found = replace(self.known[key])
            found.done = self.free
            return found

        def fetch(self, encoded):
            begin = time.perf_counter()
            time.sleep(max(0.0, encoded.done - begin))
            self.waited += time.perf_counter() - begin
            self.seconds += time.perf_counter() - begin
            self.busy += seconds
            return encoded

    return ModelledEncoder


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """The meters of a run with a modelled encoder, and the share of the time that this did nothing."""
    # how long these runs take is the machine's affair
    monkeypatch.setattr(meters_module, "ADVICE_SECONDS", 0.0)

    def run(src, seconds, workers=1, side=32, task_inputs=1024, batch=4):
        encoder = modelled(seconds)
        monkeypatch.setattr(run_module, "BatchEncoder", encoder)
        request = CacheRequest(side, batch=batch, task_inputs=task_inputs)
        options = RunOptions(workers=workers, progress=False)
        found = cache_images(src, tmp_path / "out", random_model(), request, options=options).meters
        return found, 1 - encoder.computed / found.running

    return run


def test_a_device_that_is_fed_is_said_to_work(tmp_path, measured):
    write_images(tmp_path / "src", 96, sizes=((40, 40),))
    found, idle = measured(tmp_path / "src", 0.1)
    assert found.device_waiting() == pytest.approx(idle, abs=0.02)
    # but for the first images and the last file it has always something to do
    assert idle < 0.2 and found.waits["encode"] > 1.5
    assert found.limit() == "encode" or idle > 0.05


def test_what_a_device_waits_for_is_named(tmp_path, measured):
    (image,) = write_images(tmp_path / "src", 1, sizes=((900, 1200),), suffix=".jpg")
    for i in range(1, 96):
        os.link(image, tmp_path / "src" / f"{i:03d}.jpg")
    found, idle = measured(tmp_path / "src", 0.001)
    assert found.device_waiting() == pytest.approx(idle, abs=0.02) and idle > 0.8
    assert found.limit() == "decode" and f"encoder waits {found.device_waiting():.0%} for decode" in found.advice()
    assert found.seconds["decode"] > 4 * found.seconds["fill"] and found.waits["starved"] < found.seconds["decode"]


def test_a_slow_disk_is_named(tmp_path, measured, monkeypatch):
    write_images(tmp_path / "src", 32, sizes=((40, 40),))
    write = TaskStore.write
    monkeypatch.setattr(TaskStore, "write", lambda self, *args: time.sleep(0.25) or write(self, *args))
    found, idle = measured(tmp_path / "src", 0.001, task_inputs=4)
    assert found.device_waiting() == pytest.approx(idle, abs=0.02) and idle > 0.9
    assert found.limit() == "write" and "for write: the disk is slow" in found.advice()
    assert found.waits["write"] > 1 and found.seconds["write"] > 2


class SlowReader(FileReader):
    def read(self, ordinal):
        time.sleep(0.03)
        return super().read(ordinal)


class SlowSource(FileSource):
    """Files on storage that takes its time for each."""

    def open(self):
        return SlowReader(self.root, self.listing)


def test_slow_storage_is_told_from_slow_decoding(tmp_path, measured, monkeypatch):
    write_images(tmp_path / "src", 96, sizes=((40, 40),))
    opened = prepare_module.open_source
    monkeypatch.setattr(prepare_module, "open_source", lambda *args: SlowSource(**vars(opened(*args))))
    found, idle = measured(tmp_path / "src", 0.001)
    assert found.device_waiting() == pytest.approx(idle, abs=0.02) and idle > 0.8
    assert found.waits["starved"] > found.seconds["decode"] and found.limit() == "decode"
    assert "for reading: the storage is slow" in found.advice()
