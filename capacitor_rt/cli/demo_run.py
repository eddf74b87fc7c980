"""What the demo does: photographs to latents on disk and back, pictures and a page of them, the PSNRs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..cache.dataset import LatentDataset
from ..cache.report import Report
from ..cache.request import CacheRequest
from ..cache.run import cache_images
from ..config import FullCapacitorInferenceConfig
from ..errors import InputError
from ..evaluation.metrics import PsnrTable, psnr
from ..images.frames import to_uint8
from ..images.geometry import Size
from ..images.load import PixelPolicy, load_image
from ..images.reading import read_bytes
from ..model import FullCapacitor
from ..printable import counted
from .terminal import printable
from .view_cache import view_cache
from .view_run import Settings

PHOTOS = Path(__file__).parents[1] / "sample" / "photos"
AREA_SIDE = 320
"""The smallest bundled photograph is 451x300: nothing is enlarged."""
DIFFERENCE_GAIN = 8
CONTACT_SHEET = "contact-sheet.png"
LATENTS_PICTURE = "latents-pca.png"
HELD_OUT = "held out"
OTHER_CROPS = """\
The README's figure for the held-out photographs is measured on them whole. These are
resized crops of the sizes above in sRGB, and their latents are stored in bfloat16."""


@dataclass(frozen=True)
class Item:
    """One photograph: `original` and `decoded` uint8 `[H,W,3]`, `latents` float32 `[C,h,w]`, PSNR in dB.

    `role` says whether the sample model was trained on it ("trained on", "held out"), and nothing for other models.
    """

    name: str
    original: np.ndarray
    decoded: np.ndarray
    latents: Tensor
    psnr: float
    role: str = ""

    @property
    def note(self) -> str:
        """Size as width x height, and role."""
        size = f"{self.original.shape[1]}x{self.original.shape[0]}"
        return f"{size}, {self.role}" if self.role else size


@dataclass(frozen=True)
class DemoReport:
    """What a demo run made and measured; `page` is the first file of the page."""

    out: Path
    model: str
    items: tuple[Item, ...]
    cache: Report
    page: Path
    seconds: float

    @property
    def table(self) -> PsnrTable:
        """PSNR of the photographs."""
        return PsnrTable.of(
            {printable(self.model): [item.psnr for item in self.items]}, [printable(item.name) for item in self.items]
        )

    def render(self) -> str:
        """The PSNR of every photograph, the table, and where everything lies."""
        names = [printable(item.name) for item in self.items]
        width = max(map(len, names))
        lines = [
            f"{name:{width}}  {item.psnr:6.2f} dB  {item.note}" for name, item in zip(names, self.items, strict=True)
        ]
        for role in sorted({item.role for item in self.items if item.role}):
            values = [item.psnr for item in self.items if item.role == role]
            lines.append(f"{role:{width}}  {np.mean(values):6.2f} dB  mean of {len(values)}")
        if any(item.role == HELD_OUT for item in self.items):
            lines.append(OTHER_CROPS)
        lines += [f"left out: {counted(n, 'file')}, {reason}" for reason, n in self.cache.quarantined.items()]
        pixels = sum(item.original.nbytes for item in self.items)
        files = {
            "cache": f"{self.cache.cached} photographs as latents, {self.cache.nbytes / 1e6:.2f} MB for "
            f"{pixels / 1e6:.2f} MB of pixels",
            CONTACT_SHEET: f"original | reconstruction | difference x {DIFFERENCE_GAIN}",
            LATENTS_PICTURE: "picture | first three principal components of its latents",
        }
        paths = [printable(str(self.out / name)) for name in files]
        longest = max(map(len, paths))
        places = [f"  {path:{longest}}  {what}" for path, what in zip(paths, files.values(), strict=True)]
        last = f"open {printable(str(self.page))} in a browser: sliders, differences, latents"
        ending = [f"  {self.seconds:.1f} s", "", last]
        return "\n".join([*lines, "", self.table.render(), "", *places, *ending])


def run_demo(
    out: str | Path,
    model: str | FullCapacitor = "sample",
    *,
    device: str = "cpu",
    photos: str | Path = PHOTOS,
    area: int = AREA_SIDE,
    progress: bool = True,
) -> DemoReport:
    """Cache `photos` under `out`, decode what the cache holds, write the pictures and the page.

    Args:
        out: folder for the cache and the pictures; made if missing. A finished cache in it is used as it is.
        model: a loaded model, or what `FullCapacitor.from_pretrained` takes.
        photos: folder of images.
        area: the photographs become about `area`^2 pixels each, in their own aspect ratio.
        progress: show the cache's progress bar.

    Raises:
        CapacitorError: the model or photographs cannot be read, or `out` holds the cache of another model or size.
    """
    begin = time.perf_counter()
    out = Path(out)
    name = model if isinstance(model, str) else "model"
    if isinstance(model, str):
        model = FullCapacitor.from_pretrained(model, device=device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {out}: {error.strerror}: give another --out") from error
    report = cache_images(photos, out / "cache", model, CacheRequest(area, area=True), progress=progress)
    roles = _sample_roles() if name == "sample" else {}
    items = tuple(read_back(out / "cache", Path(photos), model, roles))
    title = f"model {name}: {model.config.latent_channels} channels, stride {model.config.latent_stride}"
    contact_sheet(items, title).save(out / CONTACT_SHEET)
    latents_picture(items, title).save(out / LATENTS_PICTURE)
    settings = Settings(out / "page", len(items), progress=False)
    page, _ = view_cache(out / "cache", {printable(Path(name).name): model}, settings, Path(photos), roles)
    return DemoReport(out, name, items, report, page.index, time.perf_counter() - begin)


def read_back(cache: Path, photos: Path, model: FullCapacitor, roles: Mapping[str, str]) -> list[Item]:
    """Decode every row of `cache` (hashes checked, one step, seed 0) and compare it with the image it was made from.

    `roles` maps names of photographs to what they were to the model.
    """
    dataset = LatentDataset(cache, verify=True)
    inference = FullCapacitorInferenceConfig(seed=0)
    items = []
    for i in range(len(dataset)):
        latents, bucket = dataset.tensors(i)["latents"].float(), dataset.bucket(i)
        image = model.decode(latents[None].to(model.device), bucket.height, bucket.width, inference)
        path = photos / dataset.path(i)
        original, decoded = _framed(path, bucket), to_uint8(image[0])
        role = roles.get(path.name, "")
        items.append(Item(path.name, original, decoded, latents, psnr(original, decoded), role))
    return items


def contact_sheet(items: Sequence[Item], title: str) -> Image.Image:
    """One row per photograph: original, reconstruction, and their absolute difference times `DIFFERENCE_GAIN`."""
    entries = []
    for item in items:
        difference = np.abs(item.original.astype(np.int16) - item.decoded) * DIFFERENCE_GAIN
        tiles = (item.original, item.decoded, difference.clip(0, 255).astype(np.uint8))
        entries.append((f"{item.name}   {item.psnr:.2f} dB", item.note, tiles))
    mean = np.mean([item.psnr for item in items])
    heads = ("original", "reconstruction", f"absolute difference x {DIFFERENCE_GAIN}")
    return sheet(title, f"{len(items)} photographs, PSNR {mean:.2f} dB in the mean", heads, entries, across=1)


def latents_picture(items: Sequence[Item], title: str) -> Image.Image:
    """Every photograph beside its latents: their first three principal components as red, green and blue."""
    colours, share = principal_colours([item.latents for item in items])
    entries = []
    for item, colour in zip(items, colours, strict=True):
        height, width = item.original.shape[:2]
        enlarged = Image.fromarray(colour).resize((width, height), Image.Resampling.NEAREST)
        shape = "x".join(map(str, item.latents.shape))
        entries.append((item.name, f"latents {shape}", (item.original, np.asarray(enlarged))))
    note = f"three principal components of the latents of all photographs, {share:.0%} of their variance"
    return sheet(title, note, ("picture", "latents"), entries, across=2)


def principal_colours(latents: Sequence[Tensor]) -> tuple[list[np.ndarray], float]:
    """First three principal components of all positions' vectors as colours.

    Args:
        latents: float `[C,h,w]` each, C at least 3.

    Returns:
        uint8 `[h,w,3]` each, scaled from the 1st to the 99th percentile over all of them, and the components' share of
        the variance. A component's sign makes its largest weight positive.
    """
    vectors = torch.cat([z.flatten(1).T for z in latents]).double()
    vectors = vectors - vectors.mean(0)
    variances, axes = torch.linalg.eigh(vectors.T @ vectors)
    axes = axes[:, -3:].flip(1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    components = (vectors @ (axes * largest.sign())).numpy()
    low, high = np.percentile(components, (1, 99), axis=0)
    levels = ((components - low) / np.maximum(high - low, 1e-12) * 255).round().clip(0, 255).astype(np.uint8)
    counts = np.cumsum([z.shape[1] * z.shape[2] for z in latents])[:-1]
    pictures = [p.reshape(*z.shape[1:], 3) for p, z in zip(np.split(levels, counts), latents, strict=True)]
    return pictures, float(variances[-3:].sum() / variances.sum().clamp_min(1e-300))


def _framed(path: Path, bucket: Size) -> np.ndarray:
    return load_image(read_bytes(path), PixelPolicy(), [bucket], name=str(path)).pixels


def _sample_roles() -> dict[str, str]:
    from ..sample import photos

    trained = {photo.file: "trained on" for photo in photos.TRAINING}
    return trained | {photo.file: HELD_OUT for photo in (*photos.VALIDATION, *photos.HELD_OUT)}


INK, GREY, PAPER = (24, 24, 27), (113, 113, 122), (255, 255, 255)
MARGIN, GAP, TOP, LABEL = 28, 12, 122, 34

SheetEntry = tuple[str, str, tuple[np.ndarray, ...]]
"""Label, note, and tiles `[H,W,3]`."""


def sheet(title: str, subtitle: str, heads: Sequence[str], entries: Sequence[SheetEntry], across: int) -> Image.Image:
    """Entries of tiles under a label and a note, `across` of them in a line, tiles in columns headed by `heads`."""
    across = min(across, len(entries))
    cell = max(tile.shape[1] for _, _, tiles in entries for tile in tiles)
    entry_width = len(heads) * cell + (len(heads) - 1) * GAP
    lines = [entries[i : i + across] for i in range(0, len(entries), across)]
    heights = [max(tile.shape[0] for _, _, tiles in line for tile in tiles) for line in lines]
    width = 2 * MARGIN + across * entry_width + (across - 1) * 2 * MARGIN
    picture = Image.new("RGB", (width, TOP + sum(heights) + len(lines) * (LABEL + GAP) + MARGIN - GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, 22), title, INK, _font(26))
    draw.text((MARGIN, 56), subtitle, GREY, _font(18))
    for column in range(across * len(heads)):
        x = MARGIN + column * (cell + GAP) + column // len(heads) * (2 * MARGIN - GAP)
        draw.text((x, 92), heads[column % len(heads)], GREY, _font(18))
    y = TOP
    for line, height in zip(lines, heights, strict=True):
        for i, (text, note, tiles) in enumerate(line):
            x = MARGIN + i * (entry_width + 2 * MARGIN)
            draw.text((x, y + 4), text, INK, _font(20))
            draw.text((x + draw.textlength(text + "   ", _font(20)), y + 6), note, GREY, _font(18))
            for tile in tiles:
                picture.paste(Image.fromarray(tile), (x, y + LABEL))
                x += cell + GAP
        y += LABEL + height + GAP
    return picture


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
