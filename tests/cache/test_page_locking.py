"""Memory of the ring that a GPU copies from: locked for every GPU, or used as it is."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch

from capacitor_rt.cache.decoding import ring


class Cudart:
    """CUDA's runtime as torch gives it: memory is registered for the current device, unless it is to be for all."""

    def __init__(self, monkeypatch, code: int = 0):
        self.code, self.calls, self.current, self.cleared = code, [], [], []
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "device", self._device)
        monkeypatch.setattr(torch, "empty", self._empty)

    @contextmanager
    def _device(self, device):
        self.current.append(str(device))
        yield
        self.current.append("cuda:0")

    def _empty(self, *_, device=None):
        # the next kernel's launch is told of the error, once
        self.cleared.append(str(device))
        raise RuntimeError("CUDA error: operation not supported")

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert all(isinstance(n, int) for n in (address, nbytes, flags))
        self.calls.append((address, nbytes, flags, self.current[-1]))
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address))
        return 0


def test_a_ring_is_page_locked_for_every_gpu_and_no_other_gets_a_context(monkeypatch):
    cudart, memory = Cudart(monkeypatch), np.zeros(8192, np.uint8)
    assert ring.pin(memory, torch.device("cuda:1"))
    ring.unpin(memory)
    assert cudart.calls == [(memory.ctypes.data, 8192, 1, "cuda:1"), ("unregister", memory.ctypes.data)]
    assert cudart.cleared == []


def test_memory_that_the_driver_does_not_lock_is_used_as_it_is(monkeypatch, caplog):
    """As in some containers: a run goes on, and the error is not left for the next kernel."""
    cudart = Cudart(monkeypatch, code=801)
    assert not ring.pin(np.zeros(1 << 20, np.uint8), torch.device("cuda:0"))
    assert cudart.cleared == ["cuda:0"]
    assert caplog.messages == ["1 MiB cannot be page-locked (CUDA error 801): copies to the GPU go through the host"]
