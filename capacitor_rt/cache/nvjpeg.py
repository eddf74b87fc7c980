"""nvJPEG as torchvision has it: whether it is here, what its pixels depend on, and its errors by whose fault they are.

Facts, from torchvision's sources (0.25 to 0.29) and threads:
- One call decodes a list; one bad stream fails all of it, as a RuntimeError that ends in nvJPEG's status. An allocation
  that fails comes as a RuntimeError, too, with torch's words.
- GPUs that have a JPEG engine decode baseline pictures there (A100, H100 and later ones for data centers; a MIG slice
  may have none), the others by CUDA. The two need not agree in the last bit.
- The engine writes without regard to the stream it is given (meta-pytorch/torchcodec 1634, pytorch/vision 9606): who
  allocates on a stream waits for that stream first.
- Before CUDA 11.6 nvJPEG leaks (pytorch/vision 4378); before torchvision 0.20 there are no lists.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheError
from ..extras import MissingExtraError, install_hint
from ..images.encoded import exact_pixels

OLDEST, TOO_NEW = (0, 25), (0, 30)
"""Of torchvision: the release for the oldest torch, and the one that may come without the decoder, which 0.29 calls
deprecated."""
ENGINE, CUDA = "engine", "cuda"
_WAY_OUT = "use decode exact, which is another cache, as pixels differ"
# nvjpegStatus_t
_MEMORY, _EXECUTION, _NO_ENGINE = 5, 6, 7
_REFUSED = {3: "bad JPEG", 4: "not supported", 9: "not implemented", 10: "incomplete"}
_BACKEND_HARDWARE = 3
# of a smooth picture, between decoders that are both right
_MOST_ERROR = 12


class Refused(Exception):
    """nvJPEG refuses a stream, as it would in every run."""


class JpegDecoder:
    """Streams to pictures on a GPU.

    Raises:
        MissingExtraError: torchvision is not installed.
        CacheError: it cannot be used: a version, a build without nvJPEG, or pixels that are wrong.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._decode = _decode_jpeg()
        self._probe = _probe()
        why = self._why_not()
        if why is not None:
            raise CacheError(f"torchvision {_installed()} does not decode on {device} ({why}): {_WAY_OUT}")

    def __call__(self, streams: Sequence[np.ndarray]) -> list[Tensor]:
        """uint8 `[3,H,W]` on the device of each stream, uint8 `[N]`. The host waits for it.

        Raises:
            Refused: one of the streams at least is not decoded.
            torch.OutOfMemoryError: no memory for all of them.
            RuntimeError: anything else.
        """
        given = [torch.from_numpy(stream) for stream in streams]
        if self.device.type == "cuda":
            # a JPEG engine does not wait for what else uses the memory that it is given
            torch.cuda.current_stream(self.device).synchronize()
        try:
            pictures = self._decode(given, mode="RGB", device=self.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            raise _judged(e) from e
        if len(pictures) != len(given) or any(p.dtype != torch.uint8 or p.dim() != 3 for p in pictures):
            raise RuntimeError(f"torchvision {_installed()} returned {[(p.dtype, list(p.shape)) for p in pictures]}")
        return list(pictures)

    def works(self) -> bool:
        """Whether a sound picture can be decoded just now."""
        return self._why_not() is None

    def _why_not(self) -> str | None:
        stream, expected = self._probe
        try:
            (picture,) = self([stream])
            found = picture.permute(1, 2, 0).cpu().numpy()
        except (Refused, RuntimeError) as e:
            return str(e).splitlines()[0] if str(e) else type(e).__name__
        if found.shape != expected.shape:
            return f"a picture of {expected.shape} comes as {found.shape}"
        error = int(abs(found.astype(int) - expected).max())
        return None if error <= _MOST_ERROR else f"a smooth picture is off by {error} of 255"


def environment(device: torch.device) -> dict[str, Any]:
    """What nvJPEG's pixels depend on beside the file: the entry `gpu_decode` of a plan.

    Raises:
        As `JpegDecoder`.
    """
    JpegDecoder(device)
    return {"torchvision": _installed(), **_facts(device)}


def check_environment(recorded: Mapping[str, Any], device: torch.device) -> None:
    """Refuse to go on with a cache whose pictures this machine may decode otherwise.

    Raises:
        CacheError: names what differs.
    """
    now = environment(device)
    changes = [f"{name} {value} -> {now.get(name)}" for name, value in recorded.items() if now.get(name) != value]
    if changes:
        raise CacheError(
            "the cache was begun with pictures from another JPEG decoder, and a cache is never mixed: go on where it "
            f"was begun (pip install torchvision=={recorded['torchvision']} on such a GPU), or cache into a new OUT",
            changes,
        )


def _installed() -> str:
    try:
        return version("torchvision").partition("+")[0]
    except PackageNotFoundError:
        raise MissingExtraError(
            f"decode gpu needs torchvision, which is not installed: {install_hint('gpu-decode')}"
        ) from None


def _decode_jpeg() -> Callable[..., list[Tensor]]:
    """torchvision's function, in a version that is known to be sound."""
    found = _installed()
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
    if not OLDEST <= numbers < TOO_NEW:
        oldest, newest = ".".join(map(str, OLDEST)), ".".join(map(str, TOO_NEW))
        raise CacheError(
            f"decode gpu is known to work with torchvision {oldest} up to {newest}, and {found} is installed: "
            f"pip install 'torchvision>={oldest},<{newest}' (the one that goes with torch {torch.__version__}), "
            f"or {_WAY_OUT}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decode: Callable[..., list[Tensor]] = importlib.import_module("torchvision.io").decode_jpeg
    except Exception as e:
        raise CacheError(
            f"torchvision {found} cannot be imported beside torch {torch.__version__} ({type(e).__name__}: {e}): "
            f"install the one that goes with this torch, or {_WAY_OUT}"
        ) from e

    def quietly(*args: Any, **kwargs: Any) -> list[Tensor]:
        with warnings.catch_warnings():
            # 0.29 says at each call that it is deprecated
            warnings.simplefilter("ignore")
            return decode(*args, **kwargs)

    return quietly if numbers >= (0, 29) else decode


def _judged(error: RuntimeError) -> Exception:
    """An error of torchvision's by whose fault it is."""
    whole = str(error)
    text = whole.splitlines()[0] if whole else ""
    status = re.search(r"(?:Failed to [a-z ]+|nvjpegDecode failed): (\d+)", whole)
    number = int(status[1]) if status else 0
    if "out of memory" in whole.lower() or number == _MEMORY:
        return torch.OutOfMemoryError(text)
    if number in _REFUSED or "Unknown chroma subsampling" in whole:
        return Refused(f"nvJPEG: {_REFUSED.get(number, 'unknown chroma subsampling')}")
    return RuntimeError(text)


def _facts(device: torch.device) -> dict[str, Any]:
    """What a driver and a library know: nvJPEG's version, what decodes, and the GPU's compute capability."""
    library = _library()
    numbers = [ctypes.c_int(-1) for _ in range(3)]
    for i, number in enumerate(numbers):
        library.nvjpegGetProperty(i, ctypes.byref(number))
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()
        status = library.nvjpegCreateEx(_BACKEND_HARDWARE, None, None, 0, ctypes.byref(handle))
        if status == 0:
            library.nvjpegDestroy(handle)
    if status not in (0, _NO_ENGINE):
        raise CacheError(f"nvJPEG cannot be set up on {device} (status {status}): {_WAY_OUT}")
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "nvjpeg": ".".join(str(number.value) for number in numbers),
        # an engine's pixels and those of the kernels need not agree
        "decoded_by": CUDA if status == _NO_ENGINE else ENGINE,
        "compute_capability": 10 * major + minor,
    }


def _library() -> Any:
    """nvJPEG as this process has loaded it, by torchvision's wheel or from the system."""
    path = loaded_library("libnvjpeg")
    if path is None:
        raise CacheError(f"torchvision {_installed()} has no nvJPEG: install a build for CUDA, or {_WAY_OUT}")
    return ctypes.CDLL(path)


def loaded_library(name: str) -> str | None:
    """Path of a shared library of this process whose file's name begins so."""
    with open("/proc/self/maps") as file:
        paths = (line.split(maxsplit=5)[-1].strip() for line in file if "/" in line)
        return next((path for path in paths if path.rpartition("/")[2].startswith(name)), None)


def _probe() -> tuple[np.ndarray, np.ndarray]:
    """A JPEG of a smooth picture, and its pixels by the CPU."""
    from PIL import Image

    rows, columns = np.mgrid[:48, :64]
    picture = np.stack((4 * columns, 5 * rows, 2 * (rows + columns)), -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95)
    stream = np.frombuffer(bytearray(file.getvalue()), np.uint8)
    return stream, exact_pixels(stream, name="probe")
