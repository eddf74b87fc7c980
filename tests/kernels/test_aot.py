"""Every shipped config row compiles for its GPU, without spills, within shared memory, onto the tensor cores."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from once import once

from bench import _compile, _row_launches, aot
from capacitor_kernels import config_rows, gpu_limits
from capacitor_kernels.launch import Launch
from capacitor_kernels.ops._project_configs import WIDE_ROWS

ROOT = Path(__file__).parents[2]
# (kernel, compute capability) -> bytes of stack that are accepted, at most 16, with the reason in a comment
EXCUSED: dict[tuple[str, int], int] = {}
if not triton.__version__.startswith("3.6."):
    # later ones keep two registers of the launch of many images in memory, by which the model is no slower: 1081.2 us
    # for 1081.1 on an RTX 5090
    EXCUSED["expand_kernel", 120] = 8
MATRIX_INSTRUCTION = {80: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "bench", "aot", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(facts as dicts, table) of one run over every row."""

    def compile_all(folder: Path) -> None:
        known = "--known", str(aot.DEFAULT_KNOWN)
        done = _run("--json", str(folder / "facts.json"), "--out", str(folder / "aot.md"), *known)
        # what spills is looked at by a test of its own
        assert done.returncode == 0 or "of them spill" in done.stderr, done.stderr[-4000:]

    folder = once(tmp_path_factory, "aot", compile_all)
    return json.loads((folder / "facts.json").read_text()), (folder / "aot.md").read_text()


def _name(fact: dict) -> str:
    return f"{fact['kernel']} sm_{fact['cc']} {fact['dtype']} {fact['config']}"


@pytest.mark.aot
def test_every_row_of_every_gpu_is_compiled(compiled):
    facts, _ = compiled
    for cc in gpu_limits.COMPUTE_CAPABILITIES:
        for row in config_rows.rows(cc):
            found = [f for f in facts if f["cc"] == cc and f["family"] == row.family and f["shape"] == row.shape]
            assert all(f["source"] == "row" for f in found)
            assert any(f["use"] == row.use and f["dtype"] == row.dtype for f in found), (cc, row)


@pytest.mark.aot
def test_sizes_that_spilled_before_are_compiled(compiled):
    found = {(f["kernel"], f["cc"], f["dtype"], f["shape"]["rows"]) for f in compiled[0] if f["source"] == "size"}
    assert found >= {
        ("head_kernel", 80, "bf16", 14),
        ("project_kernel", 80, "bf16", 14),
        ("project_kernel", 90, "bf16", 14),
        ("project_kernel", 90, "fp16", 14),
        ("patchify_kernel", 90, "bf16", 14),
        ("patchify_kernel", 90, "fp16", 14),
        ("expand_kernel", 90, "bf16", 128),
        ("project_kernel", 90, "bf16", 128),
        ("project_kernel", 89, "bf16", 15),
        ("unpatchify_kernel", 80, "bf16", 16),
        ("expand_kernel", 80, "fp16", 8),
        ("expand_kernel", 80, "bf16", 15),
        ("project_kernel", 80, "fp16", 15),
        ("project_kernel", 89, "bf16", 8),
        ("project_kernel", 100, "fp16", 16),
    }


@pytest.mark.aot
def test_no_spills(compiled):
    assert all(limit <= 16 for limit in EXCUSED.values())
    spilled = [
        f"{_name(f)}: {f['stack']} bytes" for f in compiled[0] if f["stack"] > EXCUSED.get((f["kernel"], f["cc"]), 0)
    ]
    assert not spilled, "\n".join(spilled)


@pytest.mark.aot
def test_shared_memory_fits(compiled):
    over = [
        f"{_name(f)}: {f['smem']} of {gpu_limits.LIMITS[f['cc']].smem_per_cta} bytes"
        for f in compiled[0]
        if f["smem"] > gpu_limits.LIMITS[f["cc"]].smem_per_cta
    ]
    assert not over, "\n".join(over)


@pytest.mark.aot
def test_products_run_on_tensor_cores(compiled):
    products = [f for f in compiled[0] if f["dot"] and f["dtype"] != "fp32"]
    assert {f["family"] for f in products} >= {"expand", "project"}
    # 16 rows, one of each image, are fewer than wgmma and tcgen05 multiply
    wanted = [("mma" if f["family"] == "channel_attention" else MATRIX_INSTRUCTION[f["cc"]], f) for f in products]
    slow = [f"{_name(f)}: {f['instructions']}" for instruction, f in wanted if instruction not in f["instructions"]]
    assert not slow, "\n".join(slow)


@pytest.mark.aot
def test_large_tiles_leave_room_for_two_ctas(compiled):
    products = [
        f for f in compiled[0] if f["kernel"] in ("expand_kernel", "project_kernel") and f["use"] == "throughput"
    ]
    # 256 rows are alone on an SM: two warpgroups share the tile, and one multiplies while the other scales its weights
    large = [f for f in products if f["config"]["block_m"] < WIDE_ROWS]
    crowded = [f"{_name(f)}: {f['registers']} registers, {f['smem']} bytes" for f in large if f["ctas"] < 2]
    assert large and not crowded, "\n".join(crowded)


HOPPER = """
import json, dataclasses
from bench.aot import Size, compile_sizes
sizes = [Size(90, dtype, (16, 16), "throughput", ("expand",)) for dtype in ("bf16", "fp16")]
print(json.dumps([dataclasses.asdict(fact) for fact in compile_sizes(sizes)]))
"""


@pytest.mark.aot
def test_the_form_of_specialised_warps_compiles_without_stack(compiled):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"CAPACITOR_EXPAND": "gluon", "TRITON_CACHE_DIR": str(ROOT / ".triton_cache")}
    done = subprocess.run([sys.executable, "-c", HOPPER], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    # what the siblings with channel attention take is the plain kernel's alone
    facts = [fact for fact in json.loads(done.stdout) if fact["kernel"] == "expand_hopper_kernel"]
    # widths of 896 and 1024
    assert len(facts) == 4
    for fact in facts:
        assert fact["stack"] == 0 and fact["ctas"] == 1, fact
        assert fact["registers"] * 384 <= gpu_limits.REGISTERS_PER_SM and fact["instructions"]["wgmma"] == 8, fact


@pytest.mark.aot
def test_committed_table_is_current(compiled):
    committed = aot.DEFAULT_TABLE.read_text()
    if f"Triton {triton.__version__} " not in committed:
        pytest.skip(f"the table was written with another Triton than {triton.__version__}")
    assert committed == compiled[1], "run python -m bench aot and commit bench/results/aot.md"


@pytest.mark.aot
def test_what_is_known_is_believed_and_doubted(tmp_path):
    whiten = "--cc", "80", "--family", "whiten", "--jobs", "1", "--out", str(tmp_path / "aot.md")
    assert _run(*whiten, "--json", str(tmp_path / "facts.json")).returncode == 0
    facts = json.loads((tmp_path / "facts.json").read_text())
    known = {f["fingerprint"]: [f[name] for name in aot.Compiled._fields] for f in facts}
    assert known.items() <= json.loads(aot.DEFAULT_KNOWN.read_text()).items(), "run python -m bench aot"
    # whoever writes 8 bytes of spills into the file is believed, and found out by a sample
    wrong = {key: [fields[0], 8, *fields[2:]] for key, fields in known.items()}
    (tmp_path / "known.json").write_text(json.dumps(wrong))
    believed = _run(*whiten, "--known", str(tmp_path / "known.json"), "--sample", "0")
    assert believed.returncode == 1 and f"{len(facts)} of them spill" in believed.stderr
    doubted = _run(*whiten, "--known", str(tmp_path / "known.json"), "--sample", "1")
    assert doubted.returncode == 1 and "in the file of known launches: run python -m bench aot" in doubted.stderr
    # another launch is none that is known
    (tmp_path / "known.json").write_text(json.dumps({"0" * 32: next(iter(wrong.values()))}))
    assert _run(*whiten, "--known", str(tmp_path / "known.json"), "--sample", "0").returncode == 0


@pytest.mark.aot
def test_every_form_that_the_runtime_queues_is_compiled(compiled):
    forms = {
        # the siblings with channel attention have norms between the patches and the latents: two products
        ("patchify", 768): {"encode uint8 nhwc", "encode uint8 nchw, posterior", "encode bf16 nchw", "decode"},
        ("patchify", 896): {"decode bf16 latents", "decode fp32 latents"},
        ("head", None): {"encode", "posterior"},
        ("unpatchify", 768): {"decode"},
        ("expand", None): {"encode, posterior, decode"},
    }
    for (family, depth), expected in forms.items():
        for cc in gpu_limits.COMPUTE_CAPABILITIES:
            of_rows = [f for f in compiled[0] if f["source"] == "row"]
            mine = [f for f in of_rows if (f["family"], f["cc"], f["shape"].get("depth")) == (family, cc, depth)]
            assert {f["queued_by"] for f in mine} == expected, (family, cc)


@pytest.mark.parametrize(("family", "written"), [("unpatchify", ("image_ptr",)), ("head", ("latents_ptr",))])
def test_what_is_compiled_stores_float32_as_the_runtime_does(family, written):
    (row,) = config_rows.rows(90, family)
    queued = dict(_row_launches._by_plans(row))
    for call, (launch,) in queued.items():
        if call.direction != "posterior":
            assert {launch.args[name].dtype for name in written} == {torch.float32}
            assert launch.args[{"unpatchify": "tokens_ptr", "head": "x_ptr"}[family]].dtype == torch.bfloat16
    assert {call.direction for call in queued} == {"unpatchify": {"decode"}, "head": {"encode", "posterior"}}[family]


def test_a_row_of_no_known_model_is_refused():
    row = config_rows.rows(90, "expand")[0]
    stray = dataclasses.replace(row, shape={**row.shape, "dim": 640})
    with pytest.raises(ValueError, match=r"no plan of a known model looks up expand at .*640.*: remove this row"):
        _row_launches.launches_of(stray)


def test_refuses_the_interpreter():
    done = _run(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


@pytest.mark.parametrize(
    ("cc", "registers", "smem", "warps", "expected"),
    [
        (90, 128, 0, 8, 2),  # 65536 / (128 * 256)
        (90, 129, 0, 8, 1),  # rounded up to 136
        (120, 64, 49344, 4, 2),  # 102400 / (49344 + 1024)
        (89, 16, 0, 4, 12),  # 1536 threads
        (80, 16, 0, 4, 16),  # 2048 threads
    ],
)
def test_ctas_per_sm(cc, registers, smem, warps, expected):
    assert _compile.ctas_per_sm(cc, registers, smem, warps) == expected


def test_signature_follows_the_launch():
    class Parameter:
        def __init__(self, name: str, is_constexpr: bool = False, do_not_specialize: bool = False, default=None):
            self.name, self.is_constexpr, self.do_not_specialize = name, is_constexpr, do_not_specialize
            self.default = default

    class Kernel:
        varying = tuple(Parameter(name, do_not_specialize=True) for name in "pq")
        params = (*map(Parameter, "xnmkef"), Parameter("BLOCK", True), *varying, Parameter("OFF", True, default=False))

    x = torch.empty(4, dtype=torch.bfloat16, device="meta")
    args = {"x": x, "n": 32, "m": 1, "k": 7, "e": 1e-6, "f": 2**33, "BLOCK": 64, "p": 1, "q": 32}
    types, constants, hints = _compile.signature(Launch(Kernel, (1,), args))
    assert types == {
        "x": "*bf16", "n": "i32", "m": "constexpr", "k": "i32", "e": "fp32", "f": "i64", "BLOCK": "constexpr",
        "p": "i32", "q": "i32", "OFF": "constexpr",
    }  # fmt: skip
    assert constants == {(2,): 1, (6,): 64, (9,): False}
    assert set(hints) == {(0,), (1,), (5,)}
