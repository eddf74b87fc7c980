"""`doctor --check`: a report of every error beside its bound, and an exit code that says whether one is over it."""

from __future__ import annotations

import importlib
import json
import re
import sys

import pytest
import torch

from capacitor_kernels.launch import INTERPRETED
from capacitor_rt.cli.app import main
from capacitor_rt.runtime import platform


@pytest.fixture
def check(monkeypatch, capsys, tmp_path):
    """Call `doctor --check` with options; gives (exit code, standard output, standard error)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    platform.why_not_triton.cache_clear()

    def check(*options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["capacitor-rt", "doctor", "--check", *options])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    yield check
    platform.why_not_triton.cache_clear()


@pytest.fixture
def broken(monkeypatch):
    """A launch that goes wrong: the mean of the posterior is off by a twentieth."""
    op = importlib.import_module("capacitor_kernels.ops.head")
    real = op.head

    def head(x, w, b, **options):
        real(x, w * 1.05, b, **options)

    monkeypatch.setattr(op, "head", head)


def test_a_report_for_an_issue(check):
    code, out, err = check()
    assert code == 0 and "up to half a minute" in err
    assert out.startswith("```\n") and out.rstrip().endswith("```")
    for name in ("GPU", "CUDA", "torch", "Triton", "capacitor_rt", "commit", "Python", "OS", "checked in"):
        assert re.search(rf"^{name}: +\S", out, re.M), name
    rows = re.findall(r"^(\w+) [^\n]*? (\d\.\d\de[-+]\d\d)  +(\d\.\d\de-\d\d)  (ok|WRONG)", out, re.M)
    assert {row[0] for row in rows} >= {"patchify", "expand", "project", "dewhiten", "encode", "decode"}
    assert all(float(error) <= float(bound) and verdict == "ok" for _, error, bound, verdict in rows)
    assert re.search(rf"^{len(rows)} checks in [\d.]+ s, all within their bounds$", out, re.M)


def test_what_disagrees_is_named_and_ends_with_one(check, broken):
    code, out, err = check()
    assert code == 1 and "please report all of the above" in err
    wrong = re.findall(r"^(\w+) .*WRONG: the error is \S+ times its bound$", out, re.M)
    assert set(wrong) == {"head", "encode"}
    assert f"{len(wrong)} of them wrong" in out


def test_json(check, broken):
    code, out, _ = check("--json")
    report = json.loads(out)
    assert code == 1 and report["ok"] is False
    assert report["machine"]["torch"] == torch.__version__
    assert {row["name"].split()[0] for row in report["rows"] if not row["ok"]} == {"head", "encode"}
    assert all(row["error"] <= row["bound"] for row in report["rows"] if row["ok"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without a GPU")
def test_without_a_gpu_there_is_nothing_to_check(check, monkeypatch):
    monkeypatch.setattr(platform, "interpreted", lambda: False)
    code, out, _ = check()
    assert code == 0 and out.startswith("nothing to check: the kernels need an NVIDIA GPU") and out.count("\n") == 1
    code, out, _ = check("--json")
    assert code == 0 and "NVIDIA GPU" in json.loads(out)["nothing_to_check"]


def test_a_device_that_is_not_there_is_wrong_usage(check):
    code, out, err = check("--device", "cuda:63")
    assert code == 2 and out == "" and "device 'cuda:63' is not there" in err


@pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")
def test_the_interpreter_is_not_asked_for_bfloat16(check):
    code, out, err = check("--compute-dtype", "bf16")
    assert code == 2 and out == "" and "pass --compute-dtype fp16 or fp32" in err
