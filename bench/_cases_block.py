"""Benchmark cases of the four launches of a block."""

from __future__ import annotations

from functools import partial

import torch

from capacitor_kernels import reference
from capacitor_kernels.launch import cdiv, compute_capability
from capacitor_kernels.ops.dwconv import dwconv, dwconv_sumsq_shape
from capacitor_kernels.ops.expand import expand, expand_partials_shape
from capacitor_kernels.ops.grn import grn
from capacitor_kernels.ops.project import project, project_workspace_shape
from capacitor_kernels.tuning import lookup

from ._cases import Case, Prepared, Size, case, rand

CHANNEL_TILE = 128


@case
def dwconv_case(size: Size, dtype: torch.dtype) -> Case:
    """Depthwise 7x7 with sums of squares; 49 multiply-adds an element."""
    tokens, dim = size.tokens, size.dim
    grid = {"batch": size.batch, "height": size.height, "width": size.width}

    def prepare(device: torch.device) -> Prepared:
        shape = {"height": size.height, "width": size.width, "dim": dim}
        config = lookup("dwconv", compute_capability(device), shape, dtype, size.use)
        x = rand(tokens, dim, device=device, dtype=dtype)
        w = rand(49, dim, device=device, dtype=torch.float32, scale=1 / 7)
        b = rand(dim, device=device, dtype=torch.float32)
        y = torch.empty_like(x)
        sumsq = torch.empty(dwconv_sumsq_shape(tokens, dim, config), device=device)

        def launch() -> None:
            dwconv(x, w, b, y, sumsq, config=config, **grid)

        return Prepared(launch, lambda: (y, sumsq.sum(1, keepdim=True)), (x, w, b))

    nbytes = 2 * dtype.itemsize * tokens * dim + 4 * 50 * dim + 4 * tokens
    return Case("dwconv", size, dtype, 98.0 * tokens * dim, nbytes, partial(reference.dwconv, **grid), prepare)


@case
def expand_case(size: Size, dtype: torch.dtype) -> Case:
    """GEMM D -> F with RMSNorm, GELU and column sums."""
    tokens, dim, hidden, tiles = size.tokens, size.dim, size.hidden, cdiv(size.dim, CHANNEL_TILE)

    def prepare(device: torch.device) -> Prepared:
        shape = {"tokens_per_image": size.tokens_per_image, "dim": dim, "hidden": hidden}
        config = lookup("expand", compute_capability(device), shape, dtype, size.use)
        y = rand(tokens, dim, device=device, dtype=dtype)
        w1 = rand(dim, hidden, device=device, dtype=dtype, scale=dim**-0.5)
        b1 = rand(hidden, device=device, dtype=torch.float32)
        sumsq = y.float().square().sum(1, keepdim=True).div(tiles).expand(-1, tiles).contiguous()
        h = torch.empty(tokens, hidden, device=device, dtype=dtype)
        shape = expand_partials_shape(size.batch, size.tokens_per_image, hidden, config)
        partials = torch.empty(shape, device=device)

        def launch() -> None:
            expand(y, w1, b1, sumsq, h, partials, tokens_per_image=size.tokens_per_image, config=config)

        return Prepared(launch, lambda: (h, partials.sum(1)), (y, w1, b1, sumsq))

    nbytes = dtype.itemsize * (tokens * dim + dim * hidden + tokens * hidden) + 4 * tokens * tiles
    plain = partial(reference.expand, tokens_per_image=size.tokens_per_image)
    return Case("expand", size, dtype, 2.0 * tokens * dim * hidden, nbytes, plain, prepare)


@case
def grn_case(size: Size, dtype: torch.dtype) -> Case:
    """Gain per image and hidden channel from tile sums."""
    hidden = size.hidden
    tiles = cdiv(size.tokens_per_image, 128)

    def prepare(device: torch.device) -> Prepared:
        partials = rand(size.batch, tiles, hidden, device=device, dtype=torch.float32).square()
        gamma = rand(hidden, device=device, dtype=torch.float32)
        gain = torch.empty(size.batch, hidden, device=device, dtype=dtype)
        norms = torch.empty(size.batch, hidden, device=device)

        return Prepared(lambda: grn(partials, gamma, gain, norms=norms), lambda: (gain,), (partials, gamma))

    nbytes = size.batch * hidden * (4 * tiles + 4 + dtype.itemsize) + 4 * hidden

    def plain(sums: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return reference.grn(sums.sum(1), gamma).to(dtype)

    return Case("grn", size, dtype, 2.0 * size.batch * tiles * hidden, nbytes, plain, prepare)


@case
def project_case(size: Size, dtype: torch.dtype) -> Case:
    """GEMM F -> D with GRN's gain on A, bias and residual."""
    tokens, dim, hidden = size.tokens, size.dim, size.hidden

    def prepare(device: torch.device) -> Prepared:
        shape = {"tokens_per_image": size.tokens_per_image, "dim": dim, "hidden": hidden}
        config = lookup("project", compute_capability(device), shape, dtype, size.use)
        h = torch.nn.functional.gelu(rand(tokens, hidden, device=device, dtype=dtype))
        gain = rand(size.batch, hidden, device=device, dtype=dtype)
        w2 = rand(hidden, dim, device=device, dtype=dtype, scale=hidden**-0.5)
        b2 = rand(dim, device=device, dtype=torch.float32)
        residual = rand(tokens, dim, device=device, dtype=dtype)
        out = torch.empty_like(residual)
        needed = project_workspace_shape(tokens, dim, config)
        workspace = None if needed is None else torch.empty(needed, device=device)
        options = {"tokens_per_image": size.tokens_per_image, "workspace": workspace, "config": config}

        def launch() -> None:
            project(h, gain, w2, b2, residual, out, **options)

        return Prepared(launch, lambda: (out,), (h, gain, w2, b2, residual))

    nbytes = dtype.itemsize * (tokens * hidden + hidden * dim + 2 * tokens * dim + size.batch * hidden)
    plain = partial(reference.project, tokens_per_image=size.tokens_per_image)
    return Case("project", size, dtype, 2.0 * tokens * dim * hidden, nbytes, plain, prepare)
