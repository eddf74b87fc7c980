"""The bench of many inputs and of huge ones: what it calls flat, how it measures memory, and that it runs."""

from __future__ import annotations

import json
import time

import pytest

from bench import _memory, scale
from bench._memory import watched
from capacitor_rt.errors import ImageError
from capacitor_rt.images.geometry import Size
from capacitor_rt.images.load import PixelPolicy, load_image

MB = 1 << 20


def test_growth_is_from_a_fifth_of_the_run_to_its_end():
    leaking = [(t, 100 * MB + t * MB, 50 * MB) for t in range(101)]
    assert scale.growth(leaking) == (70 * MB, 0)
    # what is loaded at the begin, and what is given back at the end, is none
    flat = [(t, 100 * MB * (t > 5), 50 * MB * (t < 97)) for t in range(101)]
    assert scale.growth(flat) == (0, 0)


def test_memory_is_that_of_all_processes_and_what_they_share_counts_once(tmp_path, monkeypatch):
    ready, seen = tmp_path / "ready", tmp_path / "seen"
    code = f"""
import json, os, pathlib, time
held = bytearray(os.urandom(1)) * {60 * MB}
child = os.fork()
if not child:
    own = bytearray(os.urandom(1)) * {30 * MB}
    pathlib.Path({str(ready)!r}).touch()
    while not os.path.exists({str(seen)!r}):
        time.sleep(0.01)
    os._exit(0)
os.waitpid(child, 0)
print("said"); print(json.dumps(dict(a=1)))
"""
    resident, looks = _memory.resident, []

    def looked(pid: int) -> int:
        """Both processes stay as they are until they have been looked at together."""
        looks.append(ready.exists())
        nbytes = resident(pid)
        if sum(looks) >= 4:
            seen.touch()
        return nbytes

    monkeypatch.setattr(_memory, "resident", looked)
    said = []
    found = watched(["-c", code], 0.1, said.append)
    assert found["result"] == {"a": 1} and said == ["said"]
    assert 85 * MB < found["peak"] < 125 * MB
    with pytest.raises(SystemExit, match="ended with 3"):
        watched(["-c", "raise SystemExit(3)"], 0.1)


def test_hostile_files_are_refused_at_once_but_for_the_strip():
    refused = {}
    for name, data in scale.hostile().items():
        begin = time.process_time()
        try:
            loaded = load_image(data, PixelPolicy(), [Size(64, 64)])
            assert (loaded.placement.resize.height, loaded.pixels.shape) == (41_600, (64, 64, 3))
        except ImageError as e:
            refused[name] = e.reason
        assert time.process_time() - begin < 2
    assert refused == dict.fromkeys(("65535.jpg", "2147483647.png", "65535.gif"), "too_large")


@pytest.mark.slow
def test_the_bench_runs(tmp_path, capsys):
    arguments = ["--rows", "20000", "--workers", "4", "--pixels", "4000000", "--folder", str(tmp_path)]
    assert scale.main([*arguments, "--out", str(tmp_path / "r.jsonl")]) == 0
    rows, pixels = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
    assert rows["run"]["result"]["cached"] == 20_000 and rows["is_flat"] is None and rows["again"]["result"]["new"] == 0
    assert rows["update"]["result"]["new"] and rows["verify"]["result"]["problems"] == 0
    assert pixels["run"]["result"]["cached"] == 13 and pixels["run"]["result"]["quarantined"] == {"too_large": 3}
    assert "20000 rows" in capsys.readouterr().out
