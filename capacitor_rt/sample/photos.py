"""Photographs from the wheels of scikit-image and scikit-learn: which train, which are held out, how they are read.

Only photographs whose licence is stated by those packages and allows it are used for training
(`photos/LICENSES.md`). Copies of a few lie in `photos/`, so that the demo needs neither package.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import CapacitorError

BUNDLED = Path(__file__).parent / "photos"
SIZE_MULTIPLE = 32
PACKAGE_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


@dataclass(frozen=True)
class Photo:
    """One file of a wheel. `weight` is its share of the training crops; grey photographs are tinted at random."""

    file: str
    package: str = "skimage"
    weight: float = 1.0
    grey: bool = False

    @property
    def name(self) -> str:
        return Path(self.file).stem


TRAINING = (
    Photo("astronaut.png", weight=2.0),
    Photo("coffee.png", weight=2.0),
    Photo("china.jpg", package="sklearn", weight=2.0),
    Photo("hubble_deep_field.jpg", weight=0.4),
    Photo("ihc.png", weight=0.1),
    Photo("retina.jpg", weight=0.1),
    Photo("camera.png", weight=0.6, grey=True),
    Photo("coins.png", weight=0.5, grey=True),
    Photo("brick.png", weight=0.5, grey=True),
    Photo("grass.png", weight=0.5, grey=True),
    Photo("gravel.png", weight=0.5, grey=True),
)
# its licence is not stated, so it never trains: recipes were compared on it
VALIDATION = (Photo("motorcycle_left.png"),)
HELD_OUT = (Photo("chelsea.png"), Photo("flower.jpg", package="sklearn"), Photo("rocket.jpg"))


def find(photo: Photo) -> Path | None:
    """Path of `photo`: the copy in `photos/`, else the installed package's file, else None."""
    bundled = BUNDLED / photo.file
    if bundled.is_file():
        return bundled
    spec = importlib.util.find_spec(photo.package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / PACKAGE_FOLDERS[photo.package] / photo.file
    return path if path.is_file() else None


def load(photo: Photo) -> np.ndarray:
    """Pixels of `photo`, uint8 `[H,W,3]` (grey is repeated), whole.

    Raises:
        CapacitorError: the package that ships it is not installed.
    """
    path = find(photo)
    if path is None:
        raise CapacitorError(
            f"{photo.file} is not here: it comes with {DISTRIBUTIONS[photo.package]}; pip install '.[sample]'"
        )
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def centre_crop(pixels: np.ndarray, multiple: int = SIZE_MULTIPLE) -> np.ndarray:
    """The largest centred crop of `[H,W,3]` whose sides are multiples of `multiple`.

    An odd margin is larger below and right.
    """
    height, width = pixels.shape[:2]
    h, w = height // multiple * multiple, width // multiple * multiple
    top, left = (height - h) // 2, (width - w) // 2
    return pixels[top : top + h, left : left + w]
