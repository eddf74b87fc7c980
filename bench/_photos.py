"""Sets of photographs for the caching benchmark: the bundled ones, cropped, shaded and with noise, no two alike."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

JPEG_QUALITY = 90
# of the noise of a sensor, in levels: it makes files as large as photographs'
NOISE = 3.0


@dataclass(frozen=True)
class PhotoSet:
    """JPEG files (quality 90, 4:2:0) of one size; `count` is how many a run takes by default."""

    name: str
    height: int
    width: int
    count: int

    def write(self, folder: Path, count: int, threads: int = 1) -> int:
        """Write `count` different files; bytes in all."""
        folder.mkdir(parents=True)
        originals = _originals()

        def write(i: int) -> int:
            data = _photo(originals[i % len(originals)], self.height, self.width, i)
            (folder / f"{i:06d}.jpg").write_bytes(data)
            return len(data)

        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(write, range(count)))


SETS = (
    PhotoSet("256", 256, 256, 6000),
    PhotoSet("500", 375, 500, 1500),
    PhotoSet("1024", 768, 1024, 500),
    PhotoSet("3000", 2000, 3000, 60),
)


def _originals() -> list[np.ndarray]:
    from PIL import Image

    import capacitor_rt.sample

    photos = Path(capacitor_rt.sample.__file__).parent / "photos"
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(photos.glob("*.jp*g"))]


def _photo(original: np.ndarray, height: int, width: int, seed: int) -> bytes:
    from PIL import Image

    rng = np.random.default_rng(seed)
    # a crop of this aspect, of 60 to 100 % of what there is
    share = rng.uniform(0.6, 1.0)
    h = int(share * min(original.shape[0], original.shape[1] * height / width))
    w = int(h * width / height)
    top, left = rng.integers(0, original.shape[0] - h + 1), rng.integers(0, original.shape[1] - w + 1)
    crop = Image.fromarray(original[top : top + h, left : left + w]).resize((width, height), Image.Resampling.LANCZOS)
    light = np.linspace(*rng.uniform(0.8, 1.2, 2), width)[None, :, None]
    noise = rng.standard_normal((height, width, 1), np.float32) * NOISE
    pixels = np.clip(np.asarray(crop) * light + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
