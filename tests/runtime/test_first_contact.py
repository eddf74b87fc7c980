"""The check that a new combination of GPU and versions gets: made once, remembered, retried, never in the way."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from runtime_cases import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.errors import PTXASError

from capacitor_kernels.launch import INTERPRETED
from capacitor_rt.runtime import first_contact as module
from capacitor_rt.runtime.first_contact import first_contact

PLACE = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16


class Contact:
    """A user with a cache folder: how often a model was run, and what a new process would find."""

    def __init__(self, monkeypatch, folder):
        self.monkeypatch, self.folder, self.checks = monkeypatch, folder, 0
        self.file = folder / "capacitor_rt" / "self-check.json"
        real = module.check_model

        def counted(*args):
            self.checks += 1
            return real(*args)

        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        monkeypatch.delenv(module.SWITCH, raising=False)
        monkeypatch.setattr(module, "check_model", counted)
        self.restart()

    def restart(self) -> None:
        """Forget what is kept in the process."""
        self.monkeypatch.setattr(module, "_met", {})

    def remembered(self) -> dict[str, str | None]:
        return json.loads(self.file.read_text())


@pytest.fixture
def contact(monkeypatch, tmp_path):
    return Contact(monkeypatch, tmp_path / "cache")


@pytest.fixture
def broken(monkeypatch):
    """Decoding gives images that are 5 % too bright."""
    op = importlib.import_module("capacitor_kernels.ops.unpatchify")
    real = op.unpatchify
    with monkeypatch.context() as patch:
        patch.setattr(op, "unpatchify", lambda *args, **o: real(*args, **o | {"scale_x0": 1.05 * o["scale_x0"]}))
        yield patch


def raising(monkeypatch, error: Exception) -> None:
    def fail(launches, device):
        raise error

    monkeypatch.setattr(importlib.import_module("capacitor_kernels.ops.expand"), "run_launches", fail)


def test_once_for_a_process_and_for_a_machine(contact):
    assert [first_contact(PLACE, DTYPE) for _ in range(2)] == [None, None]
    assert contact.checks == 1
    ((key, reason),) = contact.remembered().items()
    assert reason is None and f"torch {torch.__version__}" in key and key.endswith(str(DTYPE).removeprefix("torch."))
    contact.restart()
    assert first_contact(PLACE, DTYPE) is None and contact.checks == 1
    # another dtype is another combination, and the file keeps both
    assert first_contact(PLACE, torch.float16) is None and contact.checks == 2
    assert len(contact.remembered()) == 2


def test_a_result_holds_for_one_machine_and_its_versions(monkeypatch):
    facts = module.describe(PLACE) | {"compute capability": "9.0", "driver": "580.65.06"}
    known = set()
    for changed in (None, *module.DEPENDS_ON, "OS", "Python"):
        monkeypatch.setattr(module, "describe", lambda _, changed=changed: facts | {changed: "99.9"})
        known.add(module.combination(PLACE, DTYPE))
    # neither the system nor Python makes another combination
    assert len(known) == 1 + len(module.DEPENDS_ON) == 7


def test_a_wrong_result_is_told_and_remembered_until_a_version_changes(contact, broken, monkeypatch):
    reason = first_contact(PLACE, DTYPE)
    assert "failed its check on this GPU (decode 2x" in reason and "times its bound)" in reason
    assert f"`{module.report_command(PLACE, DTYPE)}`" in reason and "\n" not in reason
    broken.undo()
    contact.restart()
    assert first_contact(PLACE, DTYPE) == reason and contact.checks == 1
    real = module.describe
    with monkeypatch.context() as patch:
        patch.setattr(module, "describe", lambda device: real(device) | {"capacitor_rt": "0.0.1"})
        assert first_contact(PLACE, DTYPE) is None and contact.checks == 2
    # a longer check that finds nothing wrong is believed
    module.record(PLACE, DTYPE, module.check_model(PLACE, DTYPE))
    contact.restart()
    assert first_contact(PLACE, DTYPE) is None and contact.checks == 3


def test_the_switch_turns_it_off(contact, broken, monkeypatch):
    monkeypatch.setenv(module.SWITCH, "0")
    assert first_contact(PLACE, DTYPE) is None
    assert contact.checks == 0 and not contact.folder.exists()
    monkeypatch.setenv(module.SWITCH, "1")
    assert first_contact(PLACE, DTYPE) is not None


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b'{"a": 3, "b": null}'])
def test_a_file_that_is_not_ours_is_no_error(contact, content):
    contact.file.parent.mkdir(parents=True)
    contact.file.write_bytes(content)
    assert first_contact(PLACE, DTYPE) is None and contact.checks == 1
    assert None in contact.remembered().values() and 3 not in contact.remembered().values()
    assert list(contact.file.parent.iterdir()) == [contact.file]


def test_a_folder_that_cannot_be_written_is_no_error(contact, as_nobody, tmp_path):
    contact.folder.mkdir(mode=0o755)
    with as_nobody(contact.folder):
        assert [first_contact(PLACE, DTYPE) for _ in range(2)] == [None, None]
    assert contact.checks == 1 and list(contact.folder.iterdir()) == []


def test_a_file_where_the_folder_should_be_is_no_error(contact):
    contact.folder.write_text("no folder")
    assert first_contact(PLACE, DTYPE) is None and contact.checks == 1
    assert contact.folder.read_text() == "no folder"


def test_nobody_without_a_home_is_an_error(contact, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(module.Path, "home", homeless)
    assert first_contact(PLACE, DTYPE) is None and contact.checks == 1


def test_memory_that_runs_out_says_nothing(contact, monkeypatch):
    with monkeypatch.context() as patch:
        raising(patch, torch.OutOfMemoryError("CUDA out of memory"))
        assert [first_contact(PLACE, DTYPE) for _ in range(2)] == [None, None]
    assert contact.checks == 2 and not contact.file.exists()
    assert first_contact(PLACE, DTYPE) is None and contact.checks == 3 and contact.file.exists()


def test_a_failed_build_is_told_and_tried_again_by_the_next_process(contact, monkeypatch):
    with monkeypatch.context() as patch:
        raising(patch, PTXASError("`ptxas` failed with error code 255\n`ptxas` stderr:\nunknown version"))
        reason = first_contact(PLACE, DTYPE)
        assert reason.startswith("Triton could not build a kernel (PTXASError: `ptxas` failed with error code 255")
        assert first_contact(PLACE, DTYPE) == reason and contact.checks == 1
    assert not contact.file.exists()
    contact.restart()
    assert first_contact(PLACE, DTYPE) is None and contact.checks == 2


def test_any_other_error_is_told_and_remembered(contact, monkeypatch):
    with monkeypatch.context() as patch:
        raising(patch, RuntimeError("CUDA error: an illegal memory access was encountered"))
        reason = first_contact(PLACE, DTYPE)
    assert "(encode 2x" in reason and "illegal memory access" in reason
    contact.restart()
    assert first_contact(PLACE, DTYPE) == reason and contact.checks == 1


def test_nothing_runs_where_tensors_have_no_values(contact):
    with FakeTensorMode():
        assert first_contact(PLACE, DTYPE) is None
    assert contact.checks == 0 and module._met == {}
    assert first_contact(PLACE, DTYPE) is None and contact.checks == 1


def test_nothing_runs_inside_a_capture_or_a_trace(contact, monkeypatch):
    gpu = torch.device("cuda", 0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert first_contact(gpu, torch.bfloat16) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert first_contact(PLACE, DTYPE) is None
    assert contact.checks == 0 and module._met == {} and not contact.file.exists()


def test_threads_wait_for_the_one_that_checks(contact):
    found: list[str | None] = []
    threads = [threading.Thread(target=lambda: found.append(first_contact(PLACE, DTYPE))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [None] * 4 and contact.checks == 1


SCRIPT = """
import sys, torch
from capacitor_rt.runtime import first_contact as module
real, ran = module.check_model, []
module.check_model = lambda *args: ran.append(1) or real(*args)
device, dtype = torch.device(sys.argv[1]), getattr(torch, sys.argv[2])
print(module.first_contact(device, dtype), len(ran))
"""


def test_processes_share_what_they_found(contact):
    dtypes = [str(DTYPE).removeprefix("torch."), "float16"]

    def start(dtype: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, str(PLACE), dtype]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    together = [start(dtype) for dtype in dtypes]
    assert [process.communicate()[0].split() for process in together] == [["None", "1"]] * 2
    # of two that write at the same time one may win; what is there is whole
    known = contact.remembered()
    assert known and set(known.values()) == {None}
    kept = next(iter(known)).rpartition(", ")[2]
    assert start(kept).communicate()[0].split() == ["None", "0"]
    assert list(contact.file.parent.iterdir()) == [contact.file]
