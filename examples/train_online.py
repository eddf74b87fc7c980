"""Training with the encoder in the loop: the adapter where a script has its `AutoencoderKL`.

    python examples/train_online.py --steps 20

For augmentations that a cache cannot hold. The lines with `vae` are those of DiT, SiT and their like; only where it
comes from has changed. With `--device cuda` the encoder runs in bfloat16 by the Triton kernels.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from train_dit import DiT, flow_loss

from capacitor_rt.adapters import CapacitorVAE
from capacitor_rt.sample.photos import BUNDLED


def load_photos() -> list[Tensor]:
    """The bundled photographs, uint8 `[3,H,W]`."""
    paths = sorted(p for p in BUNDLED.iterdir() if p.suffix in (".png", ".jpg"))
    return [torch.from_numpy(np.array(Image.open(p).convert("RGB"))).permute(2, 0, 1) for p in paths]


def augmented(photos: list[Tensor], count: int, side: int) -> tuple[Tensor, Tensor]:
    """Random crops, mirrored and relit at random: float32 `[count,3,side,side]` in [-1,1], and their classes."""
    images, labels = [], torch.randint(len(photos), (count,))
    for label in labels.tolist():
        photo = photos[label]
        y, x = (int(torch.randint(edge - side, ()).item()) for edge in photo.shape[1:])
        crop = photo[:, y : y + side, x : x + side].float() / 127.5 - 1
        crop = crop.flip(2) if torch.rand(()) < 0.5 else crop
        images.append((crop * (0.8 + 0.4 * torch.rand(()))).clamp(-1, 1))
    return torch.stack(images), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sample", help="hub id or folder; the bundled sample by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=96)
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    # before: AutoencoderKL.from_pretrained(...)
    vae = CapacitorVAE.from_pretrained(args.model, torch_dtype=dtype, device=args.device, output_dtype=torch.float32)
    photos = load_photos()
    grid = args.side // vae.spatial_compression_ratio
    net = DiT(vae.config.latent_channels, grid, len(photos)).to(args.device)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    start = time.monotonic()
    for step in range(1, args.steps + 1):
        images, labels = (t.to(args.device) for t in augmented(photos, args.batch, args.side))
        with torch.no_grad():
            latents = vae.encode(images.to(vae.dtype)).latent_dist.sample() * vae.config.scaling_factor
        loss = flow_loss(net, latents, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (1, args.steps):
            rate = step * args.batch / (time.monotonic() - start)
            print(f"step {step}, loss {loss.item():.4f}, {rate:.0f} images/s", flush=True)


if __name__ == "__main__":
    main()
