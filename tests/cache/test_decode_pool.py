"""The pool: the same rows and pixels whatever befalls its processes, and nothing left of them."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import image_files as files
import numpy as np
import pytest
from decode_sources import Images, contents, mixed, ranges
from descendants import workers_of
from waiting import HANG_SECONDS, runs, until

from capacitor_rt.cache.decoding import DecodePool, chunk_schema
from capacitor_rt.cache.decoding import coordinator as coordinator_module
from capacitor_rt.cache.decoding.ring import Allocator, Span
from capacitor_rt.errors import CacheError, InputError
from capacitor_rt.images import together
from capacitor_rt.images.decode import decode_image
from capacitor_rt.images.geometry import apply, bucket_table
from capacitor_rt.images.load import PixelPolicy, load_image

BUCKETS = bucket_table(64, 16)
COUNT = 60
DATA = mixed(COUNT)


def pool(source: Images, workers: int = 2, **options) -> DecodePool:
    options = {"image_timeout": HANG_SECONDS, "backoff": (0.01,)} | options
    return DecodePool(source, PixelPolicy(), BUCKETS, workers=workers, **options)


def rows_of(source: Images, workers: int = 2, length: int = 7, **options) -> list[tuple]:
    with pool(source, workers, **options) as decoder:
        return contents(decoder.decode(ranges(COUNT, length)))


# harm in the second, third, ... repetition of the images: one pool serves them all, as starting one takes a second
HARM = {
    1: {17: "segfault"},
    2: {17: "read:segfault"},
    3: {17: "hang"},
    4: {17: "read:hang"},
    5: {3: "kill once", 40: "kill once"},
    6: {9: "read:eio once", 30: "read:eio once"},
    7: {9: "read:eio", 30: "raise", 31: "read:raise"},
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    harm = {COUNT * part + i: word for part, words in HARM.items() for i, word in words.items()}
    source = Images(DATA, harm, tmp_path_factory.mktemp("marks"))
    with pool(source) as decoder:
        yield decoder


@pytest.fixture
def impatient(shared, monkeypatch):
    """The coordinator's clock is ahead by what an image may take once nothing but an image that hangs is left to do: so
    that is late at once, and no other is, on however busy a machine."""
    coordinator = shared._coordinator
    hung = {COUNT * part + i for part, words in HARM.items() for i, word in words.items() if word.endswith("hang")}

    def monotonic() -> float:
        # no seat is given anything between this and the look at it
        busy = [number for number, seat in enumerate(coordinator._seats) if seat.orders]
        is_alone = not coordinator._queue and len(busy) == 1 and coordinator._memory.inputs[busy[0]] in hung
        return time.monotonic() + (2 * HANG_SECONDS if is_alone else 0.0)

    clock = SimpleNamespace(monotonic=monotonic, perf_counter=time.perf_counter)
    monkeypatch.setattr(coordinator_module, "time", clock)


def part_of(decoder: DecodePool, part: int) -> list[tuple]:
    """Rows of one repetition, numbered as in the first."""
    shift = COUNT * part
    rows = contents(decoder.decode([range(r.start + shift, r.stop + shift) for r in ranges(COUNT, 7)]))
    for row, _ in rows:
        name = f"images/{row['input']}"
        row["input"] -= shift
        if row["message"] is not None:
            row["message"] = row["message"].replace(name, f"images/{row['input']}")
    return rows


@pytest.fixture(scope="module")
def expected() -> list[tuple]:
    return rows_of(Images(DATA), workers=0)


def kill(pid: int) -> None:
    # who died of an earlier blow may be gone by now
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class TestRows:
    def test_say_what_load_image_says(self, expected):
        assert [row["input"] for row, _ in expected] == list(range(COUNT))
        for (row, pixels), data in zip(expected, DATA, strict=True):
            if row["input"] % 9 == 5:
                assert row["status"] == "quarantined" and row["reason"] in ("truncated", "corrupt"), row
                assert row["message"].startswith(f"images/{row['input']}") and row["retryable"] is False
                assert row["bytes_hash"] and row["bucket"] is None and pixels is None
                continue
            loaded = load_image(data, PixelPolicy(), BUCKETS)
            assert pixels == (loaded.pixels.shape, loaded.pixels.tobytes())
            assert (row["width"], row["height"]) == (loaded.header.width, loaded.header.height)
            assert BUCKETS[row["bucket"]] == loaded.placement.crop
            assert (row["crop_top"], row["resize_width"]) == (loaded.placement.top, loaded.placement.resize.width)
            np.testing.assert_array_equal(loaded.pixels, apply(decode_image(data).pixels, loaded.placement))

    def test_name_the_image_that_could_not_be_resized(self, monkeypatch, expected):
        def failing(pixels, *args, **options):
            if pixels.shape[0] == 41:
                raise MemoryError
            return original(pixels, *args, **options)

        def failing_all(pictures, *args, **options):
            if pictures.shape[1] in (41, 42):
                raise RuntimeError("no weights")
            return original_all(pictures, *args, **options)

        original, original_all = together.resample, together.resample_all
        monkeypatch.setattr(together, "resample", failing)
        monkeypatch.setattr(together, "resample_all", failing_all)
        heights = (40, 41, 41, 42, 43, 42, 42)
        datas = [files.encoded(files.texture(height, 60, seed), "JPEG") for seed, height in enumerate(heights)]
        with pool(Images(datas), workers=0) as decoder:
            rows = contents(decoder.decode([range(len(datas))]))
        for (row, pixels), data, height in zip(rows, datas, heights, strict=True):
            if height == 41:
                assert pixels is None and row["width"] is row["bucket"] is None and row["bytes_hash"]
                assert (row["status"], row["reason"], row["retryable"]) == ("quarantined", "out_of_memory", True)
                assert row["message"] == f"images/{row['input']}: no memory to resize it"
            elif row["input"] == 3:
                assert row["reason"] == "crashed" and row["message"].endswith("in RuntimeError: no weights")
            else:
                assert pixels[1] == load_image(data, PixelPolicy(), BUCKETS).pixels.tobytes()

    def test_do_not_depend_on_the_workers(self, shared, expected):
        assert part_of(shared, 0) == expected
        assert rows_of(Images(DATA), workers=1) == expected

    def test_come_as_arrow_batches_of_one_schema_one_for_each_range(self, shared):
        wanted = [range(5, 9), range(9, 9), range(9, 10), range(0, 2)]
        with pool(Images(DATA), 0) as here:
            for decoder in (shared, here):
                chunks = []
                for chunk in decoder.decode(wanted):
                    chunks.append(chunk.columns)
                    chunk.release()
                assert [c.column("input").to_pylist() for c in chunks] == [list(r) for r in wanted]
                assert all(c.schema == chunk_schema() for c in chunks)

    def test_failures_for_now_are_tried_again_and_then_say_so(self, shared, expected):
        assert part_of(shared, 6) == expected
        rows = part_of(shared, 7)
        found = {row["input"]: row for row, _ in rows if row["retryable"]}
        assert {i: row["reason"] for i, row in found.items()} == {9: "io_error", 30: "crashed", 31: "crashed"}
        assert "ZeroDivisionError: unforeseen" in found[30]["message"]
        others = [pair for pair in rows if pair[0]["input"] not in found]
        assert others == [pair for pair in expected if pair[0]["input"] not in found]


class TestHarm:
    @pytest.mark.parametrize(
        ("part", "reason", "said"),
        [
            (1, "crashed", "SIGSEGV, 3 times"),
            (2, "crashed", "SIGSEGV, 3 times"),
            (3, "timeout", "longer than 600 s"),
            (4, "timeout", "longer than 600 s"),
        ],
    )
    def test_costs_the_image_at_fault_alone(self, part, reason, said, shared, expected, request):
        if reason == "timeout":
            request.getfixturevalue("impatient")
        rows = part_of(shared, part)
        (row, pixels) = rows[17]
        assert (row["status"], row["reason"], row["retryable"], pixels) == ("quarantined", reason, True, None)
        assert said in row["message"]
        assert rows[:17] + rows[18:] == expected[:17] + expected[18:]

    def test_a_worker_that_is_killed_once_costs_nothing(self, shared, expected):
        assert part_of(shared, 5) == expected

    def test_kills_from_outside_of_workers_and_helper(self, expected):
        source = Images(DATA, {i: "sleep" for i in range(0, COUNT, 3)})
        with pool(source) as decoder:
            chunks = decoder.decode(ranges(COUNT, 4))
            rows = contents([next(chunks)])
            for i in range(4):
                victims = workers_of(decoder)
                if victims:
                    kill(victims[i % len(victims)])
                rows += contents([next(chunks)])
            os.kill(decoder._coordinator._helper.pid, signal.SIGKILL)
            rows += contents(chunks)
        assert rows == expected

    def test_workers_that_never_live_are_given_up(self, monkeypatch):
        source = Images(DATA, {}, None)
        monkeypatch.setattr("capacitor_rt.cache.decoding.coordinator._MOST_DEATHS", 1)
        with pool(source, workers=1) as decoder:

            def given_up() -> bool:
                for pid in workers_of(decoder):
                    kill(pid)
                return decoder._coordinator._error is not None

            until(lambda: workers_of(decoder))
            decoder._coordinator._memory.inputs[0] = -1
            until(given_up)
            with pytest.raises(CacheError, match=r"end before they decode anything .*SIGKILL.*fewer workers"):
                contents(decoder.decode(ranges(COUNT, 4)))

    def test_a_source_that_cannot_be_opened_says_why(self):
        with pytest.raises(CacheError, match="no such bucket"), pool(Unopenable(DATA)) as decoder:
            contents(decoder.decode(ranges(COUNT, 4)))


class Unopenable(Images):
    def open(self):
        raise CacheError("no such bucket: give one that exists")


@dataclass(frozen=True)
class Groups(Images):
    """Images in containers of 6, which are streamed; who reads of which leaves a mark."""

    is_streaming: bool = True

    @property
    def containers(self) -> np.ndarray:
        return np.arange(COUNT) // 6

    def read(self, ordinal: int) -> bytes:
        (self.marks / f"{ordinal // 6}-{os.getpid()}").touch()
        return super().read(ordinal)


class TestContainers:
    def test_workers_share_containers_out_and_not_the_inputs_of_one(self, expected, tmp_path):
        slow = dict.fromkeys(range(0, COUNT, 2), "sleep")
        with pool(Groups(DATA, slow, tmp_path), 2) as decoder:
            assert contents(decoder.decode(ranges(COUNT, 2))) == expected
        marks = [tuple(map(int, mark.name.split("-"))) for mark in tmp_path.iterdir() if "-" in mark.name]
        # 10 containers, of which the last may be shared
        assert 10 <= len(marks) <= 11 and len({pid for _, pid in marks}) == 2

    def test_a_dead_worker_costs_nothing_and_who_is_free_helps_with_the_last_container(self, expected, tmp_path):
        harm = dict.fromkeys(range(0, COUNT), "sleep") | {20: "kill once"}
        with pool(Groups(DATA, harm, tmp_path), 3) as decoder:
            assert contents(decoder.decode([range(0, 6), *ranges(COUNT, 2)[3:]])) == expected

    def test_views_and_lists_of_inputs_too(self, expected, tmp_path):
        with pool(Groups(DATA, {}, tmp_path), 2, ring_bytes=12 * 3 * max(b.area for b in BUCKETS)) as decoder:
            lists = [[*part] for part in ranges(COUNT, decoder.chunk)]
            assert contents(decoder.decode(lists)) == expected


class TestRing:
    def test_a_slow_reader_holds_the_workers_up_and_no_chunk_is_overwritten(self, expected):
        slot = 3 * max(b.area for b in BUCKETS)
        with pool(Images(DATA), 2, ring_bytes=12 * slot) as decoder:
            rows = []
            for chunk in decoder.decode(ranges(COUNT, decoder.chunk)):
                time.sleep(0.005)
                rows += contents([chunk])
            assert rows == expected
            # holding all of it is an error and not a hang
            held = []
            with pytest.raises(CacheError, match="all of which is held: release chunks"):
                held.extend(decoder.decode(ranges(COUNT, decoder.chunk)))
            # and it goes on when they are released
            for chunk in held:
                chunk.release()
            assert contents(decoder.decode(ranges(COUNT, decoder.chunk))) == expected
            with pytest.raises(InputError, match="shorter ranges"):
                next(decoder.decode([range(0, 1000)]))

    def test_where_decoding_is_slow_a_few_places_take_turns(self, expected, tmp_path):
        places = set()
        slot = 3 * max(b.area for b in BUCKETS)
        # slower than whoever takes the chunks, however slow that is
        slow = Images(DATA, dict.fromkeys(range(0, COUNT, 2), "turn"), tmp_path)
        released = (tmp_path / "released").open("wb", buffering=0)
        with pool(slow, 2, ring_bytes=64 * slot) as decoder:
            rows = []
            for chunk in decoder.decode(ranges(COUNT, 2)):
                places.add(chunk._pixels.__array_interface__["data"][0] // (2 * slot))
                rows += contents([chunk])
                released.write(b"1")
            released.close()
            assert rows == expected
            # of 30 chunks
            assert len(places) <= 10
            until(lambda: decoder._coordinator._allocator._free == [Span(0, decoder._ring_bytes)])
            assert decoder._coordinator.ready == 0

    def test_the_last_who_holds_a_chunk_releases_it(self, shared):
        coordinator = shared._coordinator
        (chunk,) = shared.decode([range(4)])
        chunk.hold()
        chunk.of(0).release()
        assert coordinator._allocator._free != [Span(0, shared._ring_bytes)]
        chunk.release()
        assert coordinator._allocator._free == [Span(0, shared._ring_bytes)]
        # once too often harms nobody
        chunk.release()
        assert coordinator._allocator._free == [Span(0, shared._ring_bytes)]

    def test_leaving_early_gives_everything_back(self, shared, expected):
        chunks = shared.decode(ranges(COUNT, 4))
        next(chunks).release()
        chunks.close()
        assert part_of(shared, 0) == expected
        until(lambda: shared._coordinator._allocator._free == [Span(0, shared._ring_bytes)])

    def test_spans_are_disjoint_and_join_again(self):
        ring, rng, held = Allocator(1000), np.random.default_rng(0), []
        for _ in range(2000):
            if held and rng.random() < 0.5:
                ring.give(held.pop(rng.integers(len(held))))
            elif (span := ring.take(int(rng.integers(1, 200)))) is not None:
                assert all(span.end <= other.begin or other.end <= span.begin for other in held)
                assert span.begin >= 0 and span.end <= 1000
                held.append(span)
        for span in held:
            ring.give(span)
        assert ring.take(1000) == Span(0, 1000)


class TestEnd:
    def test_the_process_that_forks_has_one_thread(self, shared):
        assert part_of(shared, 0)
        assert len(os.listdir(f"/proc/{shared._coordinator._helper.pid}/task")) == 1

    def test_no_process_and_no_descriptor_is_left(self):
        before_fds = set(os.listdir("/proc/self/fd"))
        with pool(Images(DATA)) as decoder:
            assert len(contents(decoder.decode(ranges(COUNT, 7)))) == COUNT
            helper, workers = decoder._coordinator._helper.pid, workers_of(decoder)
        assert workers and not Path(f"/proc/{helper}").exists()
        # those of a helper that had to be killed end a moment later
        until(lambda: not any(map(runs, workers)))
        assert set(os.listdir("/proc/self/fd")) <= before_fds

    @pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
    def test_with_the_coordinator(self, how, tmp_path):
        script = tmp_path / "script.py"
        # no guard of __main__, a module of a name of the standard library beside it
        (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
        script.write_text(
            textwrap.dedent(
                f"""
                import sys
                sys.path[:] = {sys.path!r}
                from test_decode_pool import DATA, Images, pool, ranges, until, workers_of
                with pool(Images(DATA, {{40: "hang"}})) as decoder:
                    until(lambda: len(workers_of(decoder)) == 2)
                    for chunk in decoder.decode(ranges(60, 4)):
                        chunk.release()
                        print(decoder._coordinator._helper.pid, *workers_of(decoder), flush=True)
                """
            )
        )
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        env = os.environ | {"PYTHONPATH": path}
        run = subprocess.Popen(
            [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            cwd=tmp_path,
            text=True,
        )
        pids = [int(pid) for pid in run.stdout.readline().split()]
        assert len(pids) == 3
        run.send_signal(getattr(signal, how))
        _, errors = run.communicate(timeout=HANG_SECONDS)
        assert run.returncode == -getattr(signal, how) or (how == "SIGINT" and errors.endswith("KeyboardInterrupt\n"))
        until(lambda: not any(map(runs, pids)))


@pytest.mark.parametrize(
    "option", [{"workers": -1}, {"image_timeout": 0}, {"pixel_budget": 0}, {"ring_bytes": 0}, {"readers": 0}]
)
def test_arguments_are_checked(option):
    with pytest.raises(InputError, match=next(iter(option))):
        DecodePool(Images(DATA), PixelPolicy(), BUCKETS, **{"workers": 1} | option)


def test_a_source_that_cannot_be_pickled_is_refused_in_words():
    class Local(Images):
        pass

    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(Local(DATA))
    with pytest.raises(CacheError, match="define it in a module"), pool(Local(DATA)):
        pass


def test_a_closed_pool_is_refused():
    with pytest.raises(InputError, match="with statement"):
        next(pool(Images(DATA)).decode([range(1)]))


def test_a_pool_that_ends_before_its_helper_is_ready_says_nothing(capfd):
    with pool(Images(DATA), 1):
        pass
    assert capfd.readouterr().err == ""
