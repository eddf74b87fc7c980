"""torchvision's `decode_jpeg` on a GPU, as it is to its caller: the pixels are libjpeg-turbo's, by its fast DCT.

It is as strict as the real one (read in the sources of torchvision 0.28), and as careless: what is missing of a
picture is whatever the memory held, which here is noise, another at each call. One bad stream fails all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import simplejpeg
import torch

FACTS = {"nvjpeg": "13.0.2", "decoded_by": "engine", "compute_capability": 90}
_BAD, _NOT_SUPPORTED, _EXECUTION = 3, 4, 6


@dataclass
class FakeTorchvision:
    """Attributes:
    kind: of the device that it is to be called with.
    calls: how many streams each call had.
    refused, choked: whether a stream is bad to nvJPEG, or makes it fail in another way.
    most_bytes: of pictures that there is memory for in a call.
    broken: whether it fails at everything.
    """

    kind: str = "cpu"
    version: str = "0.28.0+cu130"
    facts: dict[str, Any] = field(default_factory=lambda: dict(FACTS))
    calls: list[int] = field(default_factory=list)
    refused: Callable[[bytes], bool] = lambda data: False
    choked: Callable[[bytes], bool] = lambda data: False
    most_bytes: int = 1 << 40
    broken: bool = False
    before: Callable[[], None] = lambda: None
    noise: np.random.Generator = field(default_factory=np.random.default_rng)

    def decode_jpeg(
        self, input: Any, mode: Any = "UNCHANGED", device: Any = "cpu", apply_exif_orientation: Any = False
    ):
        if not isinstance(input, list) or not input or not all(isinstance(t, torch.Tensor) for t in input):
            raise ValueError("Input list must contain at least one element")
        if torch.device(device).type != self.kind:
            raise RuntimeError("Expected the device parameter to be a cuda device")
        if any(t.device.type != "cpu" for t in input):
            raise ValueError("Input list must contain tensors on CPU.")
        if any(t.dtype != torch.uint8 for t in input):
            raise RuntimeError("Expected a torch.uint8 tensor")
        if any(t.dim() != 1 or not t.numel() for t in input):
            raise RuntimeError("Expected a non empty 1-dimensional tensor")
        if mode != "RGB":
            raise RuntimeError("The provided mode is not supported for JPEG decoding on GPU")
        self.before()
        self.calls.append(len(input))
        streams = [t.numpy().tobytes() for t in input]
        headers = [self._header(data) for data in streams]
        if sum(3 * h * w for h, w in headers) > self.most_bytes:
            raise RuntimeError("Error while decoding JPEG images: CUDA out of memory. Tried to allocate 2.00 GiB.")
        return [self._picture(data, *size, device) for data, size in zip(streams, headers, strict=True)]

    def _header(self, data: bytes) -> tuple[int, int]:
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        except ValueError:
            raise self._error("Failed to get image info", _BAD) from None
        if space == "CMYK":
            raise self._error("Failed to get image info", _NOT_SUPPORTED)
        return height, width

    def _picture(self, data: bytes, height: int, width: int, device: Any) -> torch.Tensor:
        if self.broken or self.choked(data):
            raise self._error("Failed to decode jpeg stream", _EXECUTION)
        if self.refused(data):
            raise self._error("Failed to decode jpeg stream", _BAD)
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True, strict=True)
        except ValueError:
            # nothing is said of what is damaged
            pixels = self.noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).to(device)

    def _error(self, what: str, status: int) -> RuntimeError:
        where = "decode_images, /__w/vision/decode_jpegs_cuda.cpp:443, "
        return RuntimeError(
            f"decode_jpegs_cuda, /__w/vision/x.cpp:137, Error while decoding JPEG images: {where}{what}: {status}"
        )

    def install(self, monkeypatch: Any) -> FakeTorchvision:
        """Have the project find it, and a GPU's facts beside it."""
        from capacitor_rt.cache import nvjpeg

        package, io = ModuleType("torchvision"), ModuleType("torchvision.io")
        package.io, io.decode_jpeg = io, self.decode_jpeg  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torchvision", package)
        monkeypatch.setitem(sys.modules, "torchvision.io", io)
        monkeypatch.setattr(nvjpeg, "version", lambda name: self.version)
        monkeypatch.setattr(nvjpeg, "_facts", lambda device: self.facts)
        return self
