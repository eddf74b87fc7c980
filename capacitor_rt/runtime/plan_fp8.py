"""Builds plans of encoders whose blocks are in e4m3; the ends, and the stream between blocks, are as in 16 bits."""

from __future__ import annotations

import torch

from capacitor_kernels import dwconv_sumsq_shape, expand_fp8_partials_shape, project_workspace_shape
from capacitor_kernels.launch import E4M3

from .arena import TensorSpec
from .fold import ENCODER, packed_specs
from .plan_builder import Builder


class Fp8Builder(Builder):
    """`y` and `h` are buffers of bytes; the gain is float16, as the weights that it meets."""

    def block(self, weights: str, source: str, target: str) -> None:
        batch = self.key.batch
        shape = {"tokens_per_image": self.per_image, "dim": self.dim, "hidden": self.hidden}
        conv = self.lookup("dwconv", height=self.h, width=self.w, dim=self.dim)
        expand, project = (self.config_for(op, shape, E4M3) for op in ("expand_fp8", "project_fp8"))
        partials = expand_fp8_partials_shape(batch, self.per_image, self.hidden, expand)
        grn = self.lookup("grn", tiles=partials[1], hidden=self.hidden)
        x, out = self.token_buffer(source), self.token_buffer(target)
        y = self.buffer("y", (self.tokens, self.dim), E4M3)
        sumsq = self.buffer("sumsq", dwconv_sumsq_shape(self.tokens, self.dim, conv), torch.float32)
        h = self.buffer("h", (self.tokens, self.hidden), E4M3)
        sums = self.buffer("partials", partials, torch.float32)
        norms = self.buffer("norms", (batch, self.hidden), torch.float32)
        gain = self.buffer("gain", (batch, self.hidden), torch.float16)

        def of(*names: str) -> dict[str, str]:
            return {name: self.weight(f"{weights}.{name}") for name in names}

        rows = {"tokens_per_image": self.per_image}
        grid = {"batch": batch, "height": self.h, "width": self.w}
        taps = {"w": self.weight(f"{weights}.dw_w"), "b": self.weight(f"{weights}.dw_b"), **of("y_inverse")}
        self.add("dwconv", {"x": x, **taps, "y": y, "sumsq": sumsq}, **grid, config=conv)
        args = {"y": y, **of("w1", "scale", "b1", "h_inverse"), "sumsq": sumsq, "h": h, "partials": sums}
        self.add("expand_fp8", args, **rows, config=expand)
        self.add("grn", {"partials": sums, **of("gamma"), "gain": gain, "norms": norms}, config=grn)
        args = {"h": h, "gain": gain, **of("w2", "w2_scale", "b2"), "residual": x, "out": out}
        workspace = project_workspace_shape(self.tokens, self.dim, project)
        if workspace is not None:
            args["workspace"] = self.buffer("workspace", workspace, torch.float32)
        self.add("project_fp8", args, **rows, config=project)

    def weight(self, name: str) -> str:
        specs: dict[str, TensorSpec] = packed_specs(self.config, ENCODER, self.key.dtype, "fp8")
        self.weights[name] = specs[name]
        return f"weight:{name}"
