"""ADM's crop: the pixels of the function that the papers used, written here from its description with Pillow alone."""

from __future__ import annotations

import io

import image_files as files
import numpy as np
import pytest
from PIL import Image

from capacitor_rt.errors import ImageError, InputError
from capacitor_rt.images.adm import halvings, place_adm
from capacitor_rt.images.geometry import Size
from capacitor_rt.images.load import PixelPolicy, load_image

ADM = PixelPolicy(crop="adm")


def by_description(picture: Image.Image, side: int) -> np.ndarray:
    """Halve by BOX while the shorter side is at least 2 x side, resize by BICUBIC to side, cut the centre out."""
    while min(picture.size) >= 2 * side:
        picture = picture.resize(tuple(x // 2 for x in picture.size), resample=Image.Resampling.BOX)
    scale = side / min(picture.size)
    picture = picture.resize(tuple(round(x * scale) for x in picture.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(picture)
    y, x = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[y : y + side, x : x + side]


@pytest.mark.parametrize(
    "height, width",
    [(64, 64), (63, 64), (127, 128), (128, 129), (301, 197), (333, 1000), (1031, 517), (20, 33), (64, 63), (1, 9)],
)
@pytest.mark.parametrize("side", [32, 64])
def test_pixels_are_those_of_the_function(height, width, side):
    picture = files.texture(height, width)
    loaded = load_image(files.encoded(picture, "PNG"), ADM, [Size(side, side)])
    np.testing.assert_array_equal(loaded.pixels, by_description(Image.fromarray(picture), side))
    assert loaded.placement == place_adm(Size(height, width), Size(side, side))
    assert loaded.pixels.flags.c_contiguous
    assert loaded.pixels.shape == (side, side, 3)


def test_of_a_jpeg_as_of_pillows_pixels():
    data = files.encoded(files.texture(431, 523), "JPEG", quality=88)
    wanted = by_description(Image.open(io.BytesIO(data)).convert("RGB"), 96)
    np.testing.assert_array_equal(load_image(data, ADM, [Size(96, 96)]).pixels, wanted)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright_first(orientation):
    picture = files.texture(203, 290)
    data = files.encoded(files.stored(picture, orientation), "PNG", exif=files.exif(orientation))
    loaded = load_image(data, ADM, [Size(48, 48)])
    np.testing.assert_array_equal(loaded.pixels, by_description(Image.fromarray(picture), 48))


def test_differs_from_the_other_crop():
    data = files.encoded(files.texture(300, 400), "PNG")
    by_adm, centred = (load_image(data, policy, [Size(64, 64)]).pixels for policy in (ADM, PixelPolicy()))
    assert (by_adm != centred).any()


def test_halves_while_twice_the_side_is_left():
    assert halvings(Size(1027, 700), 128) == [Size(1027, 700), Size(513, 350), Size(256, 175)]
    assert halvings(Size(255, 400), 128) == [Size(255, 400)]
    # 33 * (64 / 22) is 96 but for the last bit
    assert place_adm(Size(22, 33), Size(64, 64)).resize == Size(64, 96)


def test_refuses_what_it_is_not_defined_for():
    with pytest.raises(InputError, match="is square, and the bucket is 32x64"):
        place_adm(Size(100, 100), Size(32, 64))
    with pytest.raises(InputError, match=r"crop adm halves the whole picture.*use exact"):
        PixelPolicy(crop="adm", decode="fast")
    with pytest.raises(InputError, match="crop 'dit' is unknown: use one of center, adm"):
        PixelPolicy(crop="dit")
    with pytest.raises(ImageError, match="too elongated") as caught:
        place_adm(Size(1, 30000), Size(512, 512))
    assert caught.value.reason == "too_large"
    small = PixelPolicy(crop="adm", upscale="refuse")
    with pytest.raises(ImageError, match="smaller than its bucket"):
        load_image(files.encoded(files.texture(63, 90), "PNG"), small, [Size(64, 64)])


def test_memory_is_asked_for_before_the_picture_is_resized():
    import tracemalloc
    from contextlib import contextmanager

    asked = []

    @contextmanager
    def admit(nbytes):
        asked.append(nbytes)
        yield

    data = files.encoded(files.texture(900, 1300), "PNG")
    tracemalloc.start()
    load_image(data, ADM, [Size(64, 64)], admit=admit)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Pillow's four bytes a pixel are not traced; numpy's three are, and the picture's own
    assert asked[0] >= peak
    assert asked[0] >= 3 * 900 * 1300 + 4 * 900 * 1300
