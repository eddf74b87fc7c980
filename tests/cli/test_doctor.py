"""The doctor: what it finds, what it says is missing, and that a broken machine is examined to the end."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json

import pytest
import torch
import typer
from bench_lines import GPU, caching, call, write
from typer.testing import CliRunner

from capacitor_rt.cli import doctor as module

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without a GPU")
ROW = "card: encode 256x256, batch 128"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call the command; gives (exit code, findings by topic)."""
    monkeypatch.setattr(module, "PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(module, "PROBE_SECONDS", 0.01)
    app = typer.Typer()
    app.command()(module.doctor)

    def run(*options: str) -> tuple[int, dict[str, dict[str, str]]]:
        result = CliRunner().invoke(app, ["--json", "--folder", str(tmp_path), *options])
        return result.exit_code, {finding["topic"]: finding for finding in json.loads(result.stdout)}

    return run


@CPU_ONLY
def test_a_machine_without_a_gpu_is_no_problem(run, tmp_path):
    code, found = run("--results", str(tmp_path))
    assert code == 0
    assert torch.__version__ in found["torch"]["found"]
    assert found["GPU"]["status"] == "missing" and "8.0 or later" in found["GPU"]["hint"]
    assert found["images/s"]["found"].startswith("not measured yet")
    assert {"system", "CPU", "triton", "nvJPEG", "disk", "JPEG decoding", "pillow", "diffusers"} <= set(found)
    assert list(tmp_path.iterdir()) == []


def test_text_has_one_line_per_finding(tmp_path):
    app = typer.Typer()
    app.command()(module.doctor)
    result = CliRunner().invoke(app, ["--folder", str(tmp_path / "absent"), "--results", str(tmp_path)])
    assert result.exit_code == 0
    assert "missing: " in result.stdout and "absent cannot be written to -> give --folder" in result.stdout


def test_versions_out_of_the_window_are_problems(run, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.10.0" if name == "triton" else real(name))
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu126")
    code, found = run()
    assert code == 1
    assert found["triton"]["status"] == found["torch"]["status"] == "problem"
    assert "before 3.10" in found["triton"]["found"] and found["torch"]["hint"] == "pip install 'torch>=2.8'"


def test_what_is_missing_names_the_extra(run, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "simplejpeg" else real(name, *rest)
    )
    code, found = run()
    assert code == 0
    assert found["simplejpeg"]["status"] == "missing" and found["simplejpeg"]["hint"].endswith("'capacitor-rt[cache]'")


def test_a_probe_that_fails_does_not_end_the_examination(run, monkeypatch):
    def _gpus():
        raise RuntimeError("driver went away")
        yield

    monkeypatch.setattr(module, "_gpus", _gpus)
    code, found = run()
    assert code == 1
    assert found["gpus"]["found"] == "RuntimeError: driver went away" and "disk" in found


@pytest.mark.parametrize(
    ("cc", "says"),
    [
        (75, "the torch backend runs on this GPU"),
        (80, "sm_80.json: rows for"),
        (86, "the nearest to sm_86"),
        (90, "227 KiB per CTA"),
        (120, "99 KiB per CTA"),
    ],
)
def test_configs_are_those_that_serve_the_gpu(cc, says):
    (finding,) = module._configs(0, cc)
    assert says in finding.found
    if cc >= 80:
        assert "expand" in finding.found and "project" in finding.found


def test_rates_are_the_newest_measured_on_this_gpu(tmp_path):
    old = call("model", "ours", 9.0, row=ROW)
    new = call("model", "ours", 8.0, row=ROW, date="2026-02-01T00:00:00Z")
    elsewhere, eager = call("model", "ours", 1.0, row=ROW, gpu="another"), call("model", "eager", 2.0, row=ROW)
    write(tmp_path / "run" / "model.jsonl", new, old, elsewhere, eager, caching(5000.0))
    (tmp_path / "broken.jsonl").write_text("{\n")
    rates = module.measured_rates(tmp_path, GPU)
    assert rates == {"encode 256x256, batch 128": pytest.approx(16000), "caching JPEG files at 256x256": 5000.0}
    assert module.measured_rates(tmp_path, "unknown") == module.measured_rates(tmp_path / "absent", GPU) == {}


@pytest.mark.gpu
def test_a_gpu_is_named_with_its_configs(run):
    code, found = run()
    assert code == 0 and torch.cuda.get_device_name(0) in found["GPU 0"]["found"]
    assert "sm_" in found["configs 0"]["found"]
