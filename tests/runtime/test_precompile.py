"""Kernels made ready side by side, by Triton's own just-in-time path: in a process without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# a driver that knows its target and nothing else: what is launched or loaded fails
PROGRAM = """
import json
from functools import partial
import torch, triton
from triton.backends.compiler import GPUTarget

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

triton.runtime.driver.set_active(Driver())
from capacitor_kernels.ops import dwconv, expand, fuse_skip, grn, head, patchify, project, unpatchify
from capacitor_rt.config import ModelConfig
from capacitor_rt.runtime.plan import PlanKey, make_plan
from capacitor_rt.runtime.precompile import precompile
from capacitor_rt.runtime.stats import Stats

KERNELS = (dwconv.dwconv_kernel, expand.expand_kernel, grn.grn_fused_kernel, project.project_kernel,
           head.head_kernel, fuse_skip.fuse_skip_kernel, unpatchify.unpatchify_kernel, patchify.patchify_kernel)
config = ModelConfig(model_dim=64, encoder_depth=1, decoder_depth=1, decoder_start_blocks=1, decoder_end_blocks=0,
                     bottleneck_dim=16)
bf16 = torch.bfloat16
found = []
for batches in ((128,), (128, 100, 7), (128, 100, 7)):
    stats = Stats()
    # narrower tiles are kernels of their own
    many = partial(PlanKey, height=128, width=128, dtype=bf16, image_dtype=bf16, layout="nchw", cc=90, narrow=False)
    keys = [many(d, n) for d in ("encode", "decode") for n in batches]
    precompile([make_plan(config, key) for key in keys], stats)
    found.append([stats.compile_seconds, *(len(k.device_caches[0][0]) for k in KERNELS)])
print(json.dumps(found))
"""


def test_one_compilation_serves_every_batch(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, more, again = json.loads(done.stdout.splitlines()[-1])
    # patchify takes an image alone, and noise with latents
    assert first[1:] == [1] * 7 + [2] and first[0] > 0
    assert more[1:] == again[1:] == first[1:]
    assert list(Path(tmp_path).rglob("*.cubin"))
