"""Frames: what part of an image is encoded, files in order with their failures, decoded images back to bytes."""

from __future__ import annotations

import image_files as files
import numpy as np
import pytest
import torch

from capacitor_rt.errors import ImageError, InputError
from capacitor_rt.images.frames import Frame, Framing, load_frames, to_batch, to_uint8
from capacitor_rt.images.geometry import Size


def test_every_byte_survives_the_way_to_floats_and_back():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    floats = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    for dtype in (torch.float32, torch.float64):
        np.testing.assert_array_equal(to_uint8(floats.to(dtype)), pixels)


def test_decoded_values_are_rounded_and_clamped():
    levels = torch.tensor([-3.0, -0.4, 0.4, 0.6, 127.4, 254.6, 255.4, 300.0])
    image = (levels / 127.5 - 1).expand(3, 1, 8)
    assert to_uint8(image)[0, :, 0].tolist() == [0, 0, 0, 1, 127, 255, 255, 255]


@pytest.mark.parametrize(
    ("framing", "image", "resize", "crop"),
    [
        (Framing(), Size(100, 150), Size(100, 150), Size(96, 128)),
        (Framing(), Size(20, 70), Size(32, 112), Size(32, 64)),
        (Framing(size=64), Size(100, 150), Size(64, 96), Size(64, 64)),
        (Framing(area=64), Size(100, 300), Size(43, 128), Size(32, 128)),
    ],
)
def test_placement(framing, image, resize, crop):
    placement = framing.placement(image, 32)
    assert (placement.resize, placement.crop) == (resize, crop)
    # at the centre
    assert placement.top == (resize.height - crop.height) // 2 and placement.left == (resize.width - crop.width) // 2


def test_size_and_area_exclude_each_other():
    with pytest.raises(InputError, match="exclude each other"):
        Framing(size=64, area=64)


def test_files_come_in_order_with_their_failures(tmp_path):
    pictures = [files.texture(32, 64, seed) for seed in range(12)]
    paths = [tmp_path / f"{i}.png" for i in range(12)]
    for path, picture in zip(paths, pictures, strict=True):
        path.write_bytes(files.encoded(picture, "PNG"))
    paths[5].write_bytes(b"no picture")
    found = list(load_frames(paths, Framing(), 32, workers=2))
    assert [path for path, _ in found] == paths
    (error,) = [frame for _, frame in found if isinstance(frame, ImageError)]
    assert found[5][1] is error and error.reason == "not_an_image"
    frames = [frame for _, frame in found if isinstance(frame, Frame)]
    del pictures[5]
    np.testing.assert_array_equal(to_batch(frames, torch.device("cpu")).numpy(), np.stack(pictures))
