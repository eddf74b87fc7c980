"""Builds plans of the siblings with channel attention.

A block is six steps: the first 1x1 behind its norm, the depthwise convolution with SiLU and sums over each image, the
attention, the second 1x1 times the attention, and the MLP's two. Norms are row scales of the products, so the step that
writes the residual leaves its sums of squares; where none did, a pass of `rmsnorm` takes them.
"""

from __future__ import annotations

from typing import Any

import torch

from capacitor_kernels import (
    channel_attention_sums_shape,
    dwconv_partials_shape,
    project_sumsq_shape,
    project_workspace_shape,
)

from ..config import DicoConfig, ModelConfig
from .arena import TensorSpec
from .launch_plan import PlanKey
from .plan_builder import Builder


class DicoBuilder(Builder):
    """As `Builder`; `sums` has the sums of squares of the token buffers whose last writer left them."""

    # sums of squares are by tiles of columns, and those of SiLU by tiles of pixels
    narrows = False

    def __init__(self, config: ModelConfig, key: PlanKey):
        super().__init__(config, key)
        if config.dico is None:
            raise ValueError("this model has no DiCo blocks")
        self.dico: DicoConfig = config.dico
        self.sums: dict[str, str] = {}

    # the model's parts

    def encoder_blocks(self) -> None:
        if self.dico.has_end_norms:
            self.norm("x", "norm_in")
        self.chain("", range(self.config.encoder_depth), "x", "x")

    def unguided(
        self, i: int, state: str, target: str, weight: float, add: tuple[str, float] | None, drop: str
    ) -> None:
        if drop == "path":
            super().unguided(i, state, target, weight, add, drop)
            return
        self.sums.pop("masked", None)
        # the tokens that are left out, float32 zeros and ones
        self.inputs["dropped"] = TensorSpec((self.key.batch, 1, self.h, self.w), torch.float32)
        if self.dico.is_flat:
            args = {"x": self.token_buffer("s"), "row": self.weight(f"t{i}.mask_feature"), "dropped": "input:dropped"}
            self.add("drop_tokens", args | {"out": self.token_buffer("masked")})
        else:
            # a token that is left out has zeros for latents, and a latent of its own that says so
            shape = (self.key.batch, self.z + 1, self.h, self.w)
            latents = self.buffer("masked_latents", shape, torch.float32)
            args = {"latents": "input:latents", "dropped": "input:dropped", "out": latents}
            self.add("drop_latents", args)
            self.patchify(state, f"t{i}.masked_in_w", f"t{i}.in_b", "masked", "nchw", latents)
            self.start_blocks(i, "masked")
        self.decoder_end(i, target, weight, add, start="masked")

    def decoder_start(self, i: int, state: str) -> None:
        t = f"t{i}"
        if self.dico.has_end_norms:
            self.patchify(state, f"{t}.patch_w", f"{t}.patch_b", "p", "nchw")
            self.patchify(None, f"{t}.up_w", f"{t}.up_b", "q", "nchw", "input:latents")
            late = self.dico.decoder_norm_in == "fuse_in"
            if not late:
                self.norm("p", f"{t}.norm_in", sums=False)
            self.norm("q", f"{t}.latent_norm", sums=False)
            self.fuse_skip("p", "q", f"{t}.in_w", f"{t}.in_b", "s")
            if late:
                self.norm("s", f"{t}.norm_in")
        else:
            self.patchify(state, f"{t}.in_w", f"{t}.in_b", "s", "nchw", "input:latents")
        self.start_blocks(i, "s")

    def start_blocks(self, i: int, name: str) -> None:
        """The start blocks on a token buffer, in place."""
        config = self.config
        self.chain(f"t{i}.", range(config.decoder_start_blocks), name, name, more=config.decoder_middle_blocks > 0)

    def decoder_end(
        self,
        i: int,
        target: str,
        weight: float,
        add: tuple[str, float] | None,
        drop: bool = False,
        start: str = "s",
    ) -> None:
        config, t = self.config, f"t{i}"
        first, last = config.decoder_start_blocks, config.decoder_start_blocks + config.decoder_middle_blocks
        if self.dico.is_flat:
            self.chain(f"{t}.", range(first, last), start, "x")
        else:
            if drop:
                self.broadcast(f"{t}.drop_feature", "m")
            else:
                self.chain(f"{t}.", range(first, last), start, "m")
            middle = "m" if drop or last > first else start
            self.fuse_skip(start, middle, f"{t}.skip_w", f"{t}.skip_b", "x")
            self.chain(f"{t}.", range(last, config.decoder_depth), "x", "x")
        if self.dico.has_end_norms:
            self.norm("x", f"{t}.norm_out", sums=False)
        self.unpatchify("x", f"{t}.out_w", f"{t}.out_b", target, weight, add)

    def chain(self, prefix: str, blocks: range, source: str, target: str, more: bool = False) -> None:
        """Blocks one after another, from `source` to `target`; `more` says that another one takes it from there."""
        for n in blocks:
            self.dico_block(f"{prefix}blocks.{n}", source, target, leave=more or n != blocks[-1])
            source = target

    def dico_block(self, weights: str, source: str, target: str, leave: bool) -> None:
        """One block from token buffer `source` to `target`, which may be the same; `leave` its sums of squares."""
        batch, dtype, rows = self.key.batch, self.key.dtype, {"tokens_per_image": self.per_image}
        grid = {"batch": batch, "height": self.h, "width": self.w}
        conv = self.lookup("dwconv", height=self.h, width=self.w, dim=self.dim)
        tiles = dwconv_partials_shape(batch, self.h, self.w, self.dim, conv)
        attention = self.lookup("channel_attention", tiles=tiles[1], dim=self.dim)
        first = self.lookup("expand", dim=self.dim, hidden=self.dim, **rows)
        expand = self.lookup("expand", dim=self.dim, hidden=self.hidden, **rows)
        names = ("w1", "b1", "dw_w", "dw_b", "cca_w", "cca_b", "w2", "b2", "w3", "b3", "w4", "b4")
        w = {name: self.weight(f"{weights}.{name}") for name in names}
        # the state between the paths takes the place of the first product, which only dwconv reads
        x, u, y = (self.token_buffer(name) for name in (source, "u", "y"))
        sums = self.buffer("partials", tiles, torch.float32)
        factor = self.buffer("factor", (batch, self.dim), dtype)
        h = self.buffer("h", (self.tokens, self.hidden), dtype)
        gelu = "erf" if dtype == torch.float32 else "fit"

        args = {"y": x, "w1": w["w1"], "b1": w["b1"], "sumsq": self.sums_of(source), "h": u}
        self.add("expand", args, **rows, gelu="none", config=first)
        self.add("dwconv", {"x": u, "w": w["dw_w"], "b": w["dw_b"], "y": y, "partials": sums}, **grid, config=conv)
        args = {"partials": sums, "w": w["cca_w"], "b": w["cca_b"], "factor": factor}
        needed = channel_attention_sums_shape(batch, self.dim, attention)
        if needed is not None:
            args["sums"] = self.buffer("sums", needed, torch.float32)
        self.add("channel_attention", args, **rows, config=attention)
        args = {"h": y, "gain": factor, "w2": w["w2"], "b2": w["b2"], "residual": x, "out": u}
        scaled = self.project(args, "u", self.scale(weights), multiply=True)
        args = {"y": u, "w1": w["w3"], "b1": w["b3"], "sumsq": self.sums["u"], "h": h}
        if self.dico.mlp_norm == "double":
            args["scaled_sumsq"] = scaled or self.sums["u"]
        self.add("expand", args, **rows, gelu=gelu, config=expand)
        args = {"h": h, "w2": w["w4"], "b2": w["b4"], "residual": u, "out": self.token_buffer(target)}
        self.project(args, target, None, leave=leave)

    # single steps

    def project(
        self, args: dict[str, str], target: str, scale: str | None, leave: bool = True, **options: Any
    ) -> str | None:
        """A projection to a token buffer, with its sums of squares; those of it times a scale are returned."""
        hidden = self.spec(args["h"]).shape[1]
        config = self.lookup("project", tokens_per_image=self.per_image, hidden=hidden, dim=self.dim)
        shape, scaled = project_sumsq_shape(self.tokens, self.dim, config), None
        self.sums.pop(target, None)
        if leave:
            args["sumsq"] = self.sums[target] = self.buffer(f"{target}_sumsq_{shape[1]}", shape, torch.float32)
        if scale is not None:
            args["scale"] = scale
            args["scaled_sumsq"] = scaled = self.buffer(f"{target}_scaled_{shape[1]}", shape, torch.float32)
        workspace = project_workspace_shape(self.tokens, self.dim, config)
        if workspace is not None:
            args["workspace"] = self.buffer(f"workspace_{workspace[0]}", workspace, torch.float32)
        absent = {} if "gain" in args else {"gain": None}
        self.add("project", args, tokens_per_image=self.per_image, config=config, **absent, **options)
        return scaled

    def scale(self, weights: str) -> str | None:
        """What lies between the two norms of a block's MLP: the decoder's scale."""
        decoding = self.key.direction in ("decode", "predict")
        return self.weight(f"{weights}.norm_scale") if decoding and self.dico.mlp_norm == "double" else None

    def sums_of(self, name: str) -> str:
        """The sums of squares of a token buffer, taken by a pass of their own where its writer left none."""
        if name not in self.sums:
            self.sums[name] = self.buffer(f"{name}_sumsq_1", (self.tokens, 1), torch.float32)
            args = {"x": self.token_buffer(name), "sumsq": self.sums[name]}
            self.add("rmsnorm", args, config=self.lookup("rmsnorm", dim=self.dim))
        return self.sums[name]

    def norm(self, name: str, weights: str, sums: bool = True) -> None:
        """An affine norm of a token buffer, in place, with the sums of squares of its result."""
        x = self.token_buffer(name)
        args = {"x": x, "weight": self.weight(f"{weights}_w"), "bias": self.weight(f"{weights}_b"), "out": x}
        self.sums.pop(name, None)
        if sums:
            args["sumsq"] = self.sums[name] = self.buffer(f"{name}_sumsq_1", (self.tokens, 1), torch.float32)
        self.add("rmsnorm", args, config=self.lookup("rmsnorm", dim=self.dim))

    def patchify(self, image: str | None, w: str, b: str, target: str, layout: str, latents: str | None = None) -> None:
        super().patchify(image, w, b, target, layout, latents)
        self.sums.pop(target, None)

    def fuse_skip(self, s: str, m: str, w: str, b: str, target: str) -> None:
        super().fuse_skip(s, m, w, b, target)
        self.sums.pop(target, None)

    def broadcast(self, w: str, target: str) -> None:
        super().broadcast(w, target)
        self.sums.pop(target, None)
