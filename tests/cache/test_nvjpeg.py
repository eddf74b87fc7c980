"""Which torchvision decodes on a GPU, and whose fault its errors are."""

from __future__ import annotations

import ctypes
import warnings
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch
from fake_torchvision import FakeTorchvision

from capacitor_rt import CacheError
from capacitor_rt.cache import nvjpeg
from capacitor_rt.cache.nvjpeg import JpegDecoder, Refused, _judged, environment, loaded_library
from capacitor_rt.extras import MissingExtraError

CPU = torch.device("cpu")
PLACE = "decode_jpegs_cuda, /__w/vision/vision/pytorch/vision/decode_jpegs_cuda.cpp:137, "


@pytest.fixture
def fake(monkeypatch) -> FakeTorchvision:
    return FakeTorchvision().install(monkeypatch)


@pytest.mark.parametrize("version", ["0.25.0", "0.28.0+cu130", "0.29.2"])
def test_versions_that_are_sound(fake, version):
    fake.version = version
    assert environment(CPU) == {"torchvision": version.partition("+")[0], **fake.facts}


@pytest.mark.parametrize("version", ["0.9.1", "0.19.1", "0.24.1+cu128", "0.30.0", "1.0"])
def test_others_are_refused_with_the_way_out(fake, version):
    fake.version = version
    with pytest.raises(CacheError, match=r"torchvision 0.25 up to 0.30, and .* is installed: pip install") as error:
        environment(CPU)
    assert version.partition("+")[0] in str(error.value) and "use decode exact" in str(error.value)


def test_without_it_the_extra_is_named(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(nvjpeg, "version", missing)
    with pytest.raises(MissingExtraError, match=r"decode gpu needs torchvision.*pip install '.\[gpu-decode\]'"):
        environment(CPU)


def test_one_that_does_not_fit_this_torch(fake, monkeypatch):
    def fails(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(nvjpeg.importlib, "import_module", fails)
    with pytest.raises(CacheError, match=r"cannot be imported beside torch .*nms does not exist"):
        environment(CPU)


def test_one_without_nvjpeg_or_with_wrong_pixels(fake, monkeypatch):
    def without(*args, **kwargs):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    decode = fake.decode_jpeg
    for other, why in (
        (without, "not compiled with nvJPEG support"),
        (lambda *a, **k: [255 - p for p in decode(*a, **k)], "off by"),
        (lambda *a, **k: [p[:, 1:] for p in decode(*a, **k)], r"\(48, 64, 3\) comes as \(47, 64, 3\)"),
        (lambda *a, **k: [p.float() for p in decode(*a, **k)], "returned"),
    ):
        monkeypatch.setattr("torchvision.io.decode_jpeg", other)
        with pytest.raises(CacheError, match=f"does not decode on cpu .*{why}.*use decode exact"):
            JpegDecoder(CPU)


def test_it_is_called_as_it_wants_to_be_and_warns_of_nothing(fake, monkeypatch):
    fake.version = "0.29.1"
    decode = fake.decode_jpeg

    def deprecated(*args, **kwargs):
        warnings.warn("deprecated", FutureWarning, stacklevel=2)
        return decode(*args, **kwargs)

    monkeypatch.setattr("torchvision.io.decode_jpeg", deprecated)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder = JpegDecoder(CPU)
        (picture,) = decoder([decoder._probe[0]])
    assert picture.shape == (3, 48, 64) and decoder.works()
    fake.broken = True
    assert not decoder.works()
    fake.kind = "cuda"
    with pytest.raises(RuntimeError, match="cuda device"):
        decoder([decoder._probe[0]])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Error while decoding JPEG images: Failed to decode jpeg stream: 3", Refused),
        ("Error while decoding JPEG images: Failed to decode batch: 4", Refused),
        ("Error while decoding JPEG images: Failed to parse jpeg stream: 10", Refused),
        ("Error while decoding JPEG images: Failed to get image info: 3\nmore", Refused),
        ("Error while decoding JPEG images: Unknown chroma subsampling", Refused),
        ("nvjpegDecode failed: 4", Refused),
        (f"{PLACE}Error while decoding JPEG images: {PLACE}Failed to decode jpeg stream: 10", Refused),
        (f"{PLACE}Error while decoding JPEG images:\n{PLACE}CUDA out of memory.", torch.OutOfMemoryError),
        (f"{PLACE}Error while decoding JPEG images: {PLACE}Failed to decode batch: 8", RuntimeError),
        ("Error while decoding JPEG images: Failed to decode batch: 5", torch.OutOfMemoryError),
        ("Error while decoding JPEG images: CUDA out of memory. Tried to allocate 3 GiB", torch.OutOfMemoryError),
        ("Error while decoding JPEG images: Failed to decode batch: 6", RuntimeError),
        ("Error while decoding JPEG images: Failed to initialize batch decoding: 1", RuntimeError),
        ("Error while decoding JPEG images: Failed to synchronize CUDA stream: 700", RuntimeError),
        ("Error while decoding JPEG images: Failed to synchronize CUDA stream: 3", RuntimeError),
        ("CUDA error: an illegal memory access was encountered", RuntimeError),
        ("", RuntimeError),
    ],
)
def test_whose_fault_an_error_is(text, kind):
    assert type(_judged(RuntimeError(text))) is kind


def test_what_a_library_says(monkeypatch):
    """The questions that are asked of nvJPEG, answered by one that has an engine, has none, or is out of order."""

    class Library:
        status, destroyed = 0, 0

        def nvjpegGetProperty(self, number, value):
            ctypes.cast(value, ctypes.POINTER(ctypes.c_int))[0] = (13, 0, 2)[number]
            return 0

        def nvjpegCreateEx(self, backend, device, pinned, flags, handle):
            assert (backend, flags) == (3, 0)
            return self.status

        def nvjpegDestroy(self, handle):
            self.destroyed += 1

    class Stream:
        def synchronize(self):
            pass

    library = Library()
    monkeypatch.setattr(nvjpeg, "_library", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    facts = {"nvjpeg": "13.0.2", "decoded_by": "engine", "compute_capability": 120}
    assert nvjpeg._facts(CPU) == facts and library.destroyed == 1
    library.status = 7
    assert nvjpeg._facts(CPU) == facts | {"decoded_by": "cuda"} and library.destroyed == 1
    library.status = 6
    with pytest.raises(CacheError, match=r"cannot be set up on cpu \(status 6\)"):
        nvjpeg._facts(CPU)


def test_libraries_of_this_process(fake):
    path = loaded_library("libc.so") or loaded_library("libc-") or loaded_library("ld-musl")
    assert path is not None and ctypes.CDLL(path).abs(-3) == 3
    assert loaded_library("libnvjpeg") is None
    with pytest.raises(CacheError, match="has no nvJPEG: install a build for CUDA"):
        nvjpeg._library()


def test_the_picture_that_is_tried_is_smooth():
    stream, pixels = nvjpeg._probe()
    assert stream.dtype == np.uint8 and pixels.shape == (48, 64, 3)
    assert abs(np.diff(pixels.astype(int), axis=0)).max() < 24
