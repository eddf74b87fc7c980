"""A class-conditional diffusion transformer on cached latents, from photographs to sampled pictures: two CPU minutes.

    python examples/train_dit.py --out dit-out

Crops of the bundled photographs, a folder per class, are cached as `capacitor-rt cache` does it; a small DiT learns
them by flow matching (Lipman et al.; Liu et al.): `x_t = (1 - t) x + t n`, velocity `n - x`. The network predicts x,
since a token has nearly as many channels as the network is wide, and noise would not get through (Li and He, "Back to
Basics"). At the end it samples with classifier-free guidance, and `samples.png` shows for each class a crop, decoded
from the cache, and what the network made up. The latents are whitened, so the loop has no scaling factor.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from capacitor_rt import FullCapacitor, FullCapacitorInferenceConfig, LatentDataset
from capacitor_rt.cache import CacheRequest, cache_images
from capacitor_rt.images.frames import to_uint8
from capacitor_rt.sample.photos import BUNDLED

LEARNING_RATE = 2e-3


def cut_crops(folder: Path, per_class: int, side: int) -> None:
    """Squares about the middle of every bundled photograph, half mirrored: `folder/{photograph}/{number}.png`."""
    generator = torch.Generator().manual_seed(0)
    for path in sorted(p for p in BUNDLED.iterdir() if p.suffix in (".png", ".jpg")):
        photo = Image.open(path).convert("RGB")
        (folder / path.stem).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            scale, left, top, flip = torch.rand(4, generator=generator).tolist()
            edge = int(min(photo.size) * (0.9 + 0.1 * scale))
            x = int((photo.width - edge) * (0.4 + 0.2 * left))
            y = int((photo.height - edge) * (0.4 + 0.2 * top))
            crop = photo.resize((side, side), Image.Resampling.LANCZOS, (x, y, x + edge, y + edge))
            if flip < 0.5:
                crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            crop.save(folder / path.stem / f"{number:04d}.png")


def load(cache: Path) -> tuple[Tensor, Tensor, list[str]]:
    """All latents, float32 `[N,C,h,w]`, their classes `[N]`, and the classes' names: the sorted top folders."""
    dataset = LatentDataset(cache, verify=True)
    rows = [dataset[i] for i in range(len(dataset))]
    folders = [row["id"].partition("/")[0] for row in rows]
    names = sorted(set(folders))
    latents = torch.stack([row["latents"] for row in rows]).float()
    return latents, torch.tensor([names.index(folder) for folder in folders]), names


class Block(nn.Module):
    """Attention and an MLP, modulated by the condition (adaLN-Zero of Peebles and Xie)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        q, k, v = (
            self.qkv(self.norm(x) * (1 + scale1) + shift1).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        x = x + gate1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Clean latents from noised ones `[B,C,h,w]` at times `[B]`, for classes `[B]`; one more class stands for none.

    A latent is a token: the patch size is 1.
    """

    def __init__(self, channels: int, grid: int, classes: int, width: int = 192, depth: int = 3, heads: int = 4):
        super().__init__()
        self.classes = classes
        self.inner = nn.Linear(channels, width)
        self.position = nn.Parameter(0.5 * torch.randn(grid * grid, width))
        self.register_buffer("freqs", torch.exp(-math.log(10000) * torch.arange(128) / 128))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.outer = nn.Linear(width, channels)
        nn.init.zeros_(self.outer.weight)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        angles = 1000 * t[:, None] * self.freqs
        condition = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.label(labels))
        tokens = self.inner(x.flatten(2).mT) + self.position
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.outer(self.norm(tokens)).mT.unflatten(2, x.shape[2:])


def velocity(net: DiT, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """`n - x = (x_t - x) / t`, with the x that the network predicts."""
    return (x_t - net(x_t, t, labels)) / t.clamp(min=0.05)[:, None, None, None]


def flow_loss(net: DiT, latents: Tensor, labels: Tensor) -> Tensor:
    """Weighted squared error at logit-normal times; a tenth of the labels is left out, for guidance."""
    t = torch.randn(len(latents), device=latents.device).sigmoid()
    noise = torch.randn_like(latents)
    at = t[:, None, None, None]
    labels = torch.where(torch.rand(len(labels), device=labels.device) < 0.1, net.classes, labels)
    x_t = (1 - at) * latents + at * noise
    # of the velocity, but for the last steps, whose errors hardly show
    weight = 1 / at.clamp(min=0.2) ** 2
    return (weight * (net(x_t, t, labels) - latents) ** 2).mean()


def train(net: DiT, latents: Tensor, labels: Tensor, steps: int, seconds: float, batch: int) -> nn.Module:
    """Train until `steps` or `seconds` are over; the running average of the weights."""
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    start, done = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        # whichever ends first; the rate falls to nothing by then
        done = max(step / steps, (time.monotonic() - start) / seconds)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / 50) * (1 - done)
        rows = torch.randint(len(latents), (batch,))
        loss = flow_loss(net, latents[rows], labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(net)
        if step == 1 or step % 50 == 0:
            print(f"step {step}, {time.monotonic() - start:.0f} s, loss {loss.item():.4f}", flush=True)
    return average.module.eval()


@torch.no_grad()
def sample(net: DiT, labels: Tensor, shape: tuple[int, ...], steps: int = 40, guidance: float = 2.0) -> Tensor:
    """Latents of classes `[N]`, by Euler steps from noise at t = 1 to t = 0.

    The velocity of the class is taken `guidance` times as far from that of none as it is.
    """
    x = torch.randn(len(labels), *shape, generator=torch.Generator().manual_seed(0))
    none = torch.full_like(labels, net.classes)
    for i in range(steps):
        t = torch.full((2 * len(labels),), 1 - i / steps)
        with_class, without = velocity(net, torch.cat([x, x]), t, torch.cat([labels, none])).chunk(2)
        x = x - (without + guidance * (with_class - without)) / steps
    return x


def sheet(model: FullCapacitor, rows: list[Tensor]) -> Image.Image:
    """Decoded latents, `[n,C,h,w]` a row."""
    settings = FullCapacitorInferenceConfig(seed=0)
    strips = [torch.cat(list(model.decode(row, inference_config=settings)), 2) for row in rows]
    return Image.fromarray(to_uint8(torch.cat(strips, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("dit-out"))
    parser.add_argument("--model", default="sample", help="hub id or folder; the bundled sample by default")
    parser.add_argument("--side", type=int, default=64, help="of the crops, in pixels")
    parser.add_argument("--per-class", type=int, default=150)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    torch.manual_seed(0)
    crops, cache = args.out / "crops", args.out / "latents"
    cut_crops(crops, args.per_class, args.side)
    # or: capacitor-rt cache dit-out/crops dit-out/latents --size 64
    cache_images(crops, cache, args.model, CacheRequest(args.side), progress=False)
    latents, labels, names = load(cache)
    channels, grid = latents.shape[1:3]
    print(f"{len(latents)} latents of {list(latents.shape[1:])}, classes {', '.join(names)}", flush=True)
    net = DiT(channels, grid, len(names))
    average = train(net, latents, labels, args.steps, args.seconds, args.batch)
    made = sample(average, torch.arange(len(names)).repeat_interleave(5), latents.shape[1:])
    model = FullCapacitor.from_pretrained(args.model)
    first = [latents[labels == c][:1] for c in range(len(names))]
    picture = args.out / "samples.png"
    sheet(model, [torch.cat([crop, fives]) for crop, fives in zip(first, made.split(5), strict=True)]).save(picture)
    print(f"{picture}: a row per class, a crop from the cache and five samples")


if __name__ == "__main__":
    main()
