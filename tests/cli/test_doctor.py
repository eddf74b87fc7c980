"""The doctor: what it finds, what it says is missing, and that a broken machine is examined to the end."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
import typer
from bench_lines import GPU, caching, call, write
from typer.testing import CliRunner

from capacitor_rt.cli import doctor as module
from capacitor_rt.images import resample
from capacitor_rt.images.resample import torch_agrees

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


def test_the_nvjpeg_of_torchvision_comes_before_others(run, tmp_path, monkeypatch):
    for name in ("nvidia/nvjpeg/lib/libnvjpeg.so.12", "torchvision.libs/libnvjpeg.36e11081.so.13"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run()[1]["nvJPEG"]["found"].startswith("found (libnvjpeg.36e11081.so.13)")


def test_a_torch_without_lanczos_is_told(run, monkeypatch):
    assert run()[1]["resizing"]["found"].startswith("by torch" if torch_agrees("lanczos") else "by matrix products")
    monkeypatch.setattr(resample, "torch_agrees", lambda filter: False)
    code, found = run()
    assert code == 0 and "torch>=2.12" in found["resizing"]["hint"] and "--resize gpu" in found["resizing"]["hint"]


def test_text_has_one_line_per_finding(tmp_path):
    app = typer.Typer()
    app.command()(module.doctor)
    result = CliRunner().invoke(app, ["--folder", str(tmp_path / "absent"), "--results", str(tmp_path)])
    assert result.exit_code == 0
    assert "missing: " in result.stdout and "absent cannot be written to -> give --folder" in result.stdout


def test_versions_out_of_the_window_are_problems(run, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.10.0" if name == "triton" else real(name))
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    code, found = run()
    assert code == 1
    assert found["triton"]["status"] == found["torch"]["status"] == "problem"
    assert "before 3.10" in found["triton"]["found"] and found["torch"]["hint"] == "pip install 'torch>=2.10'"


def test_what_is_missing_names_the_extra(run, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "simplejpeg" else real(name, *rest)
    )
    code, found = run()
    assert code == 0
    assert found["simplejpeg"]["status"] == "missing" and found["simplejpeg"]["hint"].endswith("pip install '.[cache]'")


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
        (80, "sm_80.json: rows for"),
        (86, "the nearest to sm_86"),
        (90, "227 KiB per CTA"),
        (120, "99 KiB per CTA"),
    ],
)
def test_configs_are_those_that_serve_the_gpu(cc, says):
    finding, tuned = module._configs(0, cc)
    assert tuned.found == "CAPACITOR_CONFIGS=shipped: rows of yours are left out"
    assert says in finding.found and "expand" in finding.found and "project" in finding.found


def test_rates_are_the_newest_measured_on_this_gpu(tmp_path):
    old = call("model", "ours", 9.0, row=ROW)
    new = call("model", "ours", 8.0, row=ROW, date="2026-02-01T00:00:00Z")
    elsewhere, eager = call("model", "ours", 1.0, row=ROW, gpu="another"), call("model", "eager", 2.0, row=ROW)
    write(tmp_path / "run" / "model.jsonl", new, old, elsewhere, eager, caching(5000.0))
    (tmp_path / "broken.jsonl").write_text("{\n")
    rates = module.measured_rates(tmp_path, GPU)
    assert rates == {"encode 256x256, batch 128": pytest.approx(16000), "caching JPEG files at 256x256": 5000.0}
    assert module.measured_rates(tmp_path, "unknown") == module.measured_rates(tmp_path / "absent", GPU) == {}


@pytest.fixture
def one_gpu(monkeypatch):
    """A machine with one GPU of a compute capability."""
    from capacitor_rt.runtime import platform

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20 << 30, 24 << 30))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(platform, "interpreted", lambda: False)
    platform.why_not_triton.cache_clear()

    def gpu(name: str, major: int, minor: int) -> None:
        found = SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=40, L2_cache_size=4 << 20)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)

    yield gpu
    platform.why_not_triton.cache_clear()


def test_a_gpu_without_kernels_says_why(run, one_gpu, monkeypatch, tmp_path):
    one_gpu("Tesla T4", 7, 5)
    code, found = run("--results", str(tmp_path))
    assert code == 0 and found["kernels 0"]["status"] == "missing" and "configs 0" not in found
    assert "the torch backend runs on this GPU: Tesla T4 has compute capability 7.5" in found["kernels 0"]["found"]


def test_a_missing_compiler_is_a_problem(run, one_gpu, monkeypatch, tmp_path):
    one_gpu("NVIDIA A10", 8, 6)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    code, found = run("--results", str(tmp_path))
    assert code == 1 and found["kernels 0"]["status"] == "problem"
    assert "CC is 'no-such-compiler', which is no command" in found["kernels 0"]["found"]


def test_a_gpu_with_all_it_takes_has_configs(run, one_gpu, monkeypatch, tmp_path):
    one_gpu("NVIDIA A10", 8, 6)
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "cuda_utils.cpython-311-x86_64-linux-gnu.so").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code, found = run("--results", str(tmp_path))
    assert code == 0 and "sm_89.json, the nearest to sm_86" in found["configs 0"]["found"]


@pytest.mark.parametrize(
    ("torch_version", "triton", "says"),
    [
        ("2.10.0+cu128", "3.6.0", "they ship together"),
        ("2.12.1+cu130", "3.7.1", "they ship together"),
        ("2.14.1+cu130", "3.8.0", "they ship together"),
        ("2.12.1+cu130", "3.6.0", "this torch ships with 3.7"),
        ("2.99.0", "3.6.0", "is not known here"),
    ],
)
def test_pairs_of_torch_and_triton(monkeypatch, torch_version, triton, says):
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["filelock", "sympy>=1.13"])
    (finding,) = module._pair(triton)
    assert says in finding.found and torch_version in finding.found and triton in finding.found


def test_the_triton_that_torch_itself_asks_for_comes_first(monkeypatch):
    asked = "triton==3.9.0; platform_system == 'Linux' and extra == 'x'"
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["filelock", asked])
    monkeypatch.setattr(torch, "__version__", "2.12.1+cu130")
    (finding,) = module._pair("3.7.1")
    assert "this torch ships with 3.9.0" in finding.found


@pytest.mark.gpu
def test_a_gpu_is_named_with_its_configs(run):
    code, found = run()
    assert code == 0 and torch.cuda.get_device_name(0) in found["GPU 0"]["found"]
    assert "sm_" in found["configs 0"]["found"]
