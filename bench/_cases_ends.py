"""Benchmark cases of the launches around the blocks: both ends, the skip, whitening."""

from __future__ import annotations

from functools import partial

import torch

from capacitor_kernels import reference
from capacitor_kernels.ops.fuse_skip import fuse_skip
from capacitor_kernels.ops.head import head
from capacitor_kernels.ops.patchify import patchify
from capacitor_kernels.ops.unpatchify import unpatchify
from capacitor_kernels.ops.whiten import whiten

from ._cases import Case, Prepared, Size, case, rand

PATCH, LATENT = 16, 128
PIXELS = 3 * PATCH * PATCH


@case
def patchify_case(size: Size, dtype: torch.dtype) -> Case:
    """Image to tokens, the encoder's form: bytes in, normalised on the way."""
    tokens, dim = size.tokens, size.dim

    def prepare(device: torch.device) -> Prepared:
        shape = (size.batch, 3, PATCH * size.height, PATCH * size.width)
        image = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        w = rand(PIXELS, dim, device=device, dtype=dtype, scale=PIXELS**-0.5)
        b = rand(dim, device=device, dtype=torch.float32)
        out = torch.empty(tokens, dim, device=device, dtype=dtype)
        return Prepared(lambda: patchify(image, w, b, out, patch=PATCH), lambda: (out,), (image, w, b))

    nbytes = tokens * PIXELS + dtype.itemsize * (PIXELS * dim + tokens * dim)
    plain = partial(reference.patchify, patch=PATCH)
    return Case("patchify", size, dtype, 2.0 * tokens * PIXELS * dim, nbytes, plain, prepare)


@case
def head_case(size: Size, dtype: torch.dtype) -> Case:
    """Tokens to whitened latents: the GEMM to mean and logsnr, and the posterior's mode."""
    tokens, dim = size.tokens, size.dim
    grid = (size.height, size.width)

    def prepare(device: torch.device) -> Prepared:
        x = rand(tokens, dim, device=device, dtype=dtype)
        w = rand(dim, 2 * LATENT, device=device, dtype=dtype, scale=dim**-0.5)
        b = rand(2 * LATENT, device=device, dtype=torch.float32)
        mean = rand(LATENT, device=device, dtype=torch.float32)
        rstd = rand(LATENT, device=device, dtype=torch.float32).exp()
        latents = torch.empty(size.batch, LATENT, *grid, device=device, dtype=dtype)

        def launch() -> None:
            head(x, w, b, latents=latents, whiten_mean=mean, whiten_rstd=rstd)

        return Prepared(launch, lambda: (latents,), (x, w, b, mean, rstd))

    def plain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor):
        options = {"grid": grid, "channels": LATENT, "whiten_mean": mean, "whiten_rstd": rstd}
        return reference.head(x, w, b, **options)[0].to(dtype)

    nbytes = dtype.itemsize * (tokens * dim + 2 * dim * LATENT + tokens * LATENT)
    return Case("head", size, dtype, 4.0 * tokens * dim * LATENT, nbytes, plain, prepare)


@case
def fuse_skip_case(size: Size, dtype: torch.dtype) -> Case:
    """GEMM 2D -> D over two sources."""
    tokens, dim = size.tokens, size.dim

    def prepare(device: torch.device) -> Prepared:
        s, m = (rand(tokens, dim, device=device, dtype=dtype) for _ in range(2))
        w = rand(2 * dim, dim, device=device, dtype=dtype, scale=(2 * dim) ** -0.5)
        b = rand(dim, device=device, dtype=torch.float32)
        out = torch.empty_like(s)

        def launch() -> None:
            fuse_skip(s, m, w, b, out, tokens_per_image=size.tokens_per_image)

        return Prepared(launch, lambda: (out,), (s, m, w, b))

    nbytes = dtype.itemsize * (3 * tokens * dim + 2 * dim * dim)
    return Case("fuse_skip", size, dtype, 4.0 * tokens * dim * dim, nbytes, reference.fuse_skip, prepare)


@case
def unpatchify_case(size: Size, dtype: torch.dtype) -> Case:
    """Tokens to image with the noise term of one DDIM step."""
    tokens, dim = size.tokens, size.dim
    scales = {"scale_x0": 0.9999319019, "scale_noise": 0.0037596891}

    def prepare(device: torch.device) -> Prepared:
        x = rand(tokens, dim, device=device, dtype=dtype)
        w = rand(dim, PIXELS, device=device, dtype=dtype, scale=dim**-0.5)
        b = rand(PIXELS, device=device, dtype=torch.float32)
        noise = rand(size.batch, 3, PATCH * size.height, PATCH * size.width, device=device, dtype=dtype)
        image = torch.empty_like(noise)

        def launch() -> None:
            unpatchify(x, w, b, image, patch=PATCH, noise=noise, **scales)

        return Prepared(launch, lambda: (image,), (x, w, b, noise))

    def plain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        options = {"patch": PATCH, "grid": (size.height, size.width), "noise": noise, **scales}
        return reference.unpatchify(x, w, b, **options).to(dtype)

    nbytes = dtype.itemsize * (tokens * dim + dim * PIXELS + 2 * tokens * PIXELS)
    return Case("unpatchify", size, dtype, 2.0 * tokens * dim * PIXELS, nbytes, plain, prepare)


@case
def whiten_case(size: Size, dtype: torch.dtype) -> Case:
    """Latents, whitened per channel."""
    count = size.tokens * LATENT

    def prepare(device: torch.device) -> Prepared:
        z = rand(size.batch, LATENT, size.height, size.width, device=device, dtype=dtype)
        mean = rand(LATENT, device=device, dtype=torch.float32)
        rstd = rand(LATENT, device=device, dtype=torch.float32).exp()
        out = torch.empty_like(z)
        return Prepared(lambda: whiten(z, mean, rstd, out), lambda: (out,), (z, mean, rstd))

    def plain(z: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
        return reference.whiten(z, mean, rstd).to(dtype)

    return Case("whiten", size, dtype, 2.0 * count, 2 * dtype.itemsize * count, plain, prepare)
