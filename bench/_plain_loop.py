"""What the cache is compared with: Pillow in a `DataLoader`, as most scripts that cache latents have it.

The script does as much as such scripts do: it saves a file of latents for each batch, in 16 bits; no hashes, no fsync,
and it does not know what it has done when it is started again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Photos(Dataset):
    """Files as uint8 `[H,W,3]` squares: resized by Lanczos until they just cover, cropped at the centre."""

    def __init__(self, folder: Path, size: int):
        self.paths, self.size = sorted(folder.iterdir()), size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        from PIL import Image, ImageOps

        with Image.open(self.paths[i]) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
        scale = self.size / min(picture.size)
        width, height = (max(self.size, round(side * scale)) for side in picture.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(picture.crop((left, top, left + self.size, top + self.size))))


def one_pass(
    folder: Path,
    size: int,
    workers: int,
    out: Path,
    encode: Callable[[Tensor], Tensor],
    first: list[float],
    batch: int = 64,
) -> int:
    """Read every file once in batches, encode and save them; the number of images.

    Args:
        first: the clock's time when the first batch was there is appended.
    """
    out.mkdir()
    count = 0
    loader = DataLoader(Photos(folder, size), batch_size=batch, num_workers=workers)
    for number, pixels in enumerate(loader):
        if not count:
            first.append(time.perf_counter())
        np.save(out / f"{number:06}.npy", encode(pixels).to(torch.float16).cpu().numpy())
        count += len(pixels)
    return count
