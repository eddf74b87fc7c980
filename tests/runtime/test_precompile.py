"""Kernels made ready side by side, by Triton's own just-in-time path: in a process without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# a driver that knows its target and nothing else: what is launched or loaded fails
PROGRAM = """
import json, threading
from functools import partial
import torch, triton
from triton.backends.compiler import GPUTarget

built = []

class Driver:
    def launcher_cls(self, source, metadata): built.append((source.name, threading.current_thread()))
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

triton.runtime.driver.set_active(Driver())
from capacitor_kernels.ops import dwconv, expand, fuse_skip, grn, head, patchify, project, unpatchify
from capacitor_rt.config import ModelConfig
from capacitor_rt.runtime.plan import PlanKey, make_plan
from capacitor_rt.runtime.precompile import precompile
from capacitor_rt.runtime.stats import Stats
from capacitor_rt.runtime.executor import trace
from dataclasses import replace

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
here = [name for name, thread in built if thread is threading.main_thread()]

# one that cannot be compiled costs neither those beside it nor those after it
import triton.language as tl
from broken import broken_kernel
from capacitor_kernels.launch import Launch
from capacitor_rt.runtime.precompile import compile_launches
from triton.runtime._async_compile import active_mode
x = torch.empty(64, device="meta")
broken = Launch(broken_kernel, (1,), {"x_ptr": x})
whole = [launch for _, queued in trace(make_plan(config, replace(keys[0], height=64))) for launch in queued]
kernels = [k.device_caches[0][0] for k in KERNELS]
for cache in kernels: cache.clear()
compile_launches([broken, *whole, broken])
after = [len(cache) for cache in kernels]
print(json.dumps([found, sorted(name for name, _ in built), here, after, active_mode.get() is None]))
"""
# its source has to be in a file
BROKEN = """
import triton
import triton.language as tl

@triton.jit
def broken_kernel(x_ptr):
    tl.static_assert(False, "on purpose")
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What the program found, and where Triton kept what it made."""
    folder = tmp_path_factory.mktemp("precompile")
    (folder / "broken.py").write_text(BROKEN)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    env["PYTHONPATH"] = str(folder)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), folder


def test_one_compilation_serves_every_batch(done):
    ((first, more, again), *_), folder = done
    # patchify takes an image alone, and noise with latents
    assert first[1:] == [1] * 7 + [2] and first[0] > 0
    assert more[1:] == again[1:] == first[1:]
    assert list(folder.rglob("*.cubin"))


def test_launchers_are_built_side_by_side_too(done):
    (_, built, here, *_), _ = done
    assert {"expand_kernel", "project_kernel", "patchify_kernel", "unpatchify_kernel"} <= {*built} and not here


def test_what_cannot_be_compiled_costs_nothing_else(done):
    """Triton 3.6 and 3.7 leave the mode on behind an error, with a pool that is gone: no later kernel is compiled."""
    (*_, after, is_off), _ = done
    encoder = [1, 1, 1, 1, 1, 0, 0, 1]
    assert is_off and after == encoder
