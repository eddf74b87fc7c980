"""The GPU tests as `python -m bench gpu` runs them: which files, how each ends, and what a missing package costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_marks
import pytest
from waiting import HANG_SECONDS

from bench import _gpu_tests as gpu_tests
from bench._gpu_tests import TestFile
from bench._records import read_lines

ROOT = Path(gpu_tests.__file__).parents[1]
# what a machine that only runs models does not have
ABSENT = ("hypothesis", "lightning", "accelerate", "PIL", "pyarrow", "xxhash", "matplotlib", "diffusers", "xdist")
# and what even a model does not, but for its checkpoint
ABSENT += ("safetensors", "huggingface_hub", "typer", "tqdm")
BARE = f"""
from importlib.machinery import PathFinder

class Without:
    find = staticmethod(PathFinder.find_spec)

    # no function: others make it an attribute of their classes
    def __call__(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT!r} else self.find(name, path, target)

PathFinder.find_spec = Without()
"""


@pytest.fixture
def bare(tmp_path):
    """Environment of an interpreter that finds none of the packages."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(BARE)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "bare"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def names(which: str) -> list[str]:
    return [file.name for file in gpu_tests.test_files() if file.which == which]


def test_files_are_in_order():
    need, either = names("gpu"), names("either")
    assert [file.which for file in gpu_tests.test_files()] == ["gpu"] * len(need) + ["either"] * len(either)
    assert need[0] == "tests/runtime/test_runtime_gpu.py"
    kernels = [name for name in need if name.startswith("tests/kernels/")]
    assert len(kernels) >= 9 and need[1 : 1 + len(kernels)] == kernels
    assert {"tests/cache/test_cache_gpu.py", "tests/cli/test_doctor.py", "tests/bench/test_model_bench.py"} <= {*need}
    runtime = {f"tests/runtime/test_{name}.py" for name in ("runtime", "moves", "operators", "citizen")}
    assert runtime | {"tests/test_gradients.py", "tests/kernels/test_launch.py", *kernels} <= {*either}
    assert need[0] not in either and not any("fake" in name for name in either)


def test_no_gpu_test_is_forgotten(pytestconfig):
    if [Path(arg) for arg in pytestconfig.args] == [Path("tests")]:
        # all are collected here and now
        found = pytestconfig.stash[gpu_marks.FILES]
    else:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        done = subprocess.run([*command, "tests"], cwd=ROOT, capture_output=True, text=True, timeout=2 * HANG_SECONDS)
        found = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert len(found) > 10 and found <= {*names("gpu")}, found


def test_a_bare_machine_runs_what_needs_no_more(bare, tmp_path):
    files = ["tests/kernels/test_package.py", "tests/kernels/test_whiten.py", "tests/cache/test_cache_gpu.py"]
    command = [sys.executable, "-m", "bench._gpu_tests", "--out", str(tmp_path), "--device", "cpu"]
    for name in files:
        command += ["--file", name]
    done = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, timeout=2 * HANG_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(line["file"], line["which"]): line for line in read_lines(tmp_path / "tests.jsonl")}
    cache = found["tests/cache/test_cache_gpu.py", "gpu"]
    assert (cache["status"], cache["detail"]) == ("skipped", "PIL is not installed")
    # its examples run, its properties are skipped by name
    whiten = found["tests/kernels/test_whiten.py", "either"]
    assert whiten["status"] == "ok" and "passed" in whiten["detail"] and "skipped" in whiten["detail"]
    log = (tmp_path / "tests" / "kernels-test_whiten.either.log").read_text()
    assert "hypothesis is not installed" in log and "::test_" in log and "PASSED" in log
    gpu = found["tests/kernels/test_whiten.py", "gpu"]
    assert gpu["status"] == "skipped" and "needs an NVIDIA GPU" in gpu["detail"]


def test_plain_pytest_runs_the_gpu_tests_of_a_bare_machine(bare):
    """One file that cannot be imported would end it before the first test."""
    lacking = {"tests/cache/test_cache_gpu.py": "PIL", "tests/kernels/test_resize.py": "Pillow"}
    files = ["tests/kernels/test_whiten.py", "tests/runtime/test_runtime_gpu.py", *lacking]
    # as the command `pytest`, which does not look into the current folder
    command = [sys.executable, "-c", "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main())"]
    command += ["-q", "-p", "no:cacheprovider"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        # the plugins that are absent are registered all the same
        environment = bare | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        return subprocess.run(
            [*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2 * HANG_SECONDS
        )

    done = run("-m", "gpu", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    for file, package in lacking.items():
        assert f"{file}:0: {package} is not installed" in done.stdout
    assert "test_runtime_gpu.py" in done.stdout and "no CUDA GPU" in done.stdout
    # elsewhere a file that cannot be imported is an error
    done = run(*lacking)
    assert done.returncode == 2 and "ERROR tests/cache/test_cache_gpu.py" in done.stdout


@pytest.fixture
def run(tmp_path):
    """Run files with this text; gives results by name."""

    def run(seconds: float = 3600.0, **texts: str) -> dict[str, gpu_tests.FileResult]:
        files = []
        for name, text in texts.items():
            path = tmp_path / f"test_{name}.py"
            path.write_text(text)
            files.append(TestFile(path, "either"))
        results = gpu_tests.run_files(files, tmp_path / "out", seconds, jobs=2)
        return {Path(result.file).stem.removeprefix("test_"): result for result in results}

    return run


def test_how_files_end(run, tmp_path):
    found = run(
        passes="def test_a(): pass\n",
        fails="def test_a(): assert 0\n\ndef test_b(): pass\n",
        lacks="import no_such_package\n\ndef test_a(): pass\n",
        broken="import bench.no_such_part\n\ndef test_a(): pass\n",
        absent="def test_a(): import no_such_package\n",
        crashes="import os\n\ndef test_a(): pass\n\ndef test_b(): os.abort()\n",
        nothing="import pytest\n\n@pytest.mark.slow\ndef test_a(): pass\n",
    )
    assert {name: result.status for name, result in found.items()} == {
        "passes": "ok",
        "fails": "failed",
        "lacks": "skipped",
        "broken": "failed",
        "absent": "failed",
        "crashes": "failed",
        "nothing": "skipped",
    }
    assert found["lacks"].detail == "no_such_package is not installed"
    assert len(found["fails"].failed) == 1 and found["fails"].failed[0].endswith("test_fails.py::test_a")
    assert found["crashes"].detail.startswith("exit code -6")
    assert len(read_lines(tmp_path / "out" / "tests.jsonl")) == len(found)


def test_a_hang_costs_its_file_and_its_log_says_where(run, tmp_path, monkeypatch):
    # what tells where it hangs comes after a third of the time; the time is up when that is written, and not before
    monkeypatch.setattr(gpu_tests, "FILE_SECONDS", 9.0)
    hangs = property(lambda command: 10.0 if re.search("in test_b$", command.log.read_text(), re.M) else 0.0)
    monkeypatch.setattr(gpu_tests.Command, "seconds", hangs)
    hang = "import time\n\ndef test_a(): pass\n\ndef test_b(): time.sleep(600)\n"
    found = run(hangs=hang, passes="def test_a(): pass\n")
    assert (found["hangs"].status, found["passes"].status) == ("timeout", "ok")
    assert found["hangs"].detail.endswith("test_hangs.py::test_b")
    (log,) = (tmp_path / "out" / "tests").glob("*hangs*.log")
    # the stacks of its threads, taken before it was ended
    assert "test_a PASSED" in log.read_text() and "time.sleep" not in log.read_text().partition("test_a")[0]
    assert "in test_b" in log.read_text()


def test_without_time_no_file_begins(run):
    found = run(0.0, passes="def test_a(): pass\n")
    assert found["passes"].status == "skipped" and "--minutes" in found["passes"].detail
