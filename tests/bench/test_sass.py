"""The static cost model: parsing of SASS, cycles by pipe, waves; and that its page is of these kernels."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_launches import gemm_launch

from bench import _predict, sass
from bench._gpu_model import CTA_START, GPUS, Cta, schedule
from bench._machine_code import loops, parse, regions

ROOT = Path(__file__).parents[2]
# a prologue, a loop of two products with a spin on a barrier inside, an epilogue, and the trap behind the end
CODE = """
        code for sm_90
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;          /* 0x0 */
                                                                             /* 0x1 */
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;
        /*0020*/              @!P0 BRA 0x10 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, R164, gdesc[UR20], R24, gsb0 ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0060*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0070*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0080*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0090*/                   IADD3 R3, R3, 0x1, RZ ;
        /*00a0*/               @P1 BRA 0x10 ;
        /*00b0*/                   MUFU.EX2 R5, R6 ;
        /*00c0*/                   STG.E.64 desc[UR4][R2.64], R8 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   BRA 0xe0 ;
"""


def test_instructions_are_read_from_a_disassembly():
    code = parse(CODE)
    assert [i.base for i in code][:5] == ["LDG", "SYNCS", "BRA", "HGMMA", "HGMMA"]
    assert code[2].predicate == "@!P0" and code[10].operands == "0x10" and code[0].address == 0
    # a warp's share of 64 x 128 x 16
    assert [i.multiply_adds for i in code if i.is_mma] == [64 * 128 * 16 // 4] * 2


def test_a_spin_on_a_barrier_is_no_loop_and_neither_is_the_trap():
    assert loops(parse(CODE)) == [(1, 10)]


def test_cycles_by_region_and_pipe():
    found = regions(parse(CODE), 90, [10])
    assert {name: sum(region.ops.values()) for name, region in found.items()} == {
        "prologue": 1, "main": 100, "epilogue": 3,
    }  # fmt: skip
    assert found["main"].pipes["tensor"] == 10 * 2 * 64
    # B by both, A of 64 x 16 by the one that has it in shared memory
    assert found["main"].pipes["l1smem"] == 10 * (2 * 32 + 16) / 4
    assert found["prologue"].pipes["l1smem"] == 4 and found["epilogue"].pipes["l1smem"] == 2
    assert found["epilogue"].pipes["xu"] == 8


@pytest.mark.parametrize(
    ("cc", "line", "pipe", "cycles"),
    [
        (80, "HMMA.16816.F32.BF16 R4, R8, R12, R4", "tensor", 8),
        (120, "HMMA.16816.F32.BF16 R4, R8, R12, R4", "tensor", 32),
        (120, "QMMA.SF.16832.F32.E4M3.E4M3.E8 R4, R8, R12, R4", "tensor", 16),
        (80, "FFMA R0, R1, R2, R3", "fma", 2),
        (90, "FFMA R0, R1, R2, R3", "fma", 1),
        (120, "HFMA2.BF16_V2 R0, R1, R2, R1", "fma", 2),
        (90, "IMAD.MOV.U32 R0, RZ, RZ, R1", "fma", 2),
        (90, "ISETP.GE.AND P0, PT, R0, 0x1, PT", "alu", 2),
        (90, "LDSM.16.MT88.4 R4, [R10]", "l1smem", 1),
        (90, "LDSM.16.M88.4 R4, [R10]", "l1smem", 4),
        (90, "STS.128 [R4], R8", "l1smem", 4),
        (90, "SHFL.BFLY PT, R4, R5, 0x4, 0x1f", "shfl", 1),
        (90, "UIADD3 UR4, UR4, 0x1, URZ", "uniform", 2),
    ],
)
def test_cycles_of_an_instruction(cc, line, pipe, cycles):
    (instruction,) = parse(f"        /*0000*/    {line} ;")
    assert instruction.cycles(cc)[pipe] == cycles


def test_trips_follow_from_the_products_that_the_shape_wants():
    launch = gemm_launch("expand_kernel", BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, DIM=320, num_warps=4)
    # one trip has 2 x 64 x 128 x 16 for the warpgroup: half of a k step of 32
    assert _predict.trip_counts(launch, parse(CODE)) == [20.0]
    outside = CODE.replace("0x10 ;", "0x30 ;")
    with pytest.raises(ValueError, match=r"expand_kernel: 1310720 multiply-adds a warp are wanted, .* not in the code"):
        _predict.trip_counts(launch, parse(re.sub(r"@P1 BRA .*;", "NOP ;", outside)))


def test_a_grid_is_whole_waves_and_a_tail():
    cta = Cta({"main": {"tensor": 1000.0}, "epilogue": {"xu": 400.0}}, {"main": 0.0, "epilogue": 100.0})
    alone = CTA_START + 1000 + 500
    assert cta.cycles(1) == alone
    # two of them: in phase, and with one's epilogue under the other's products
    assert cta.cycles(2, hiding=0) == CTA_START + 2000 + 800
    assert cta.cycles(2, hiding=1) == 2000
    assert schedule(cta, 24, 1, 8) == (3 * alone, 3.0)
    assert schedule(cta, 20, 2, 8, hiding=1) == (2000 + alone, 1.25)
    cta.floor = 3000
    assert cta.cycles(1) == CTA_START + 3000 + 500


@pytest.mark.parametrize("text", ["encode", "encode:1", "predict:1:256", "encode:1:250", "encode:0:256", "encode:x:9"])
def test_what_is_no_call_is_refused_in_words(text):
    with pytest.raises(argparse.ArgumentTypeError, match="write direction:batch:size"):
        sass.CallName.parse(text)


def test_latency_rows_are_for_one_image():
    assert str(sass.CallName.parse("encode:1:512:latency")) == "encode 1x512² latency"
    with pytest.raises(argparse.ArgumentTypeError, match="one image at a time"):
        sass.CallName.parse("encode:2:512:latency")


def test_only_encoders_are_in_fp8_and_only_where_gpus_have_it():
    call = sass.CallName.parse("encode:1:256:latency:fp8")
    assert str(call) == "encode 1x256² latency fp8" and call.use == "latency" and not call.expand
    assert [cc for cc in (80, 89, 90, 100, 120) if call.runs_on(cc)] == [89, 90, 100, 120]
    with pytest.raises(argparse.ArgumentTypeError, match="only encoders have launches in fp8"):
        sass.CallName.parse("decode:1:256:fp8")


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "bench", "sass", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def test_refuses_the_interpreter():
    done = _run(TRITON_INTERPRET="1")
    assert done.returncode == 2 and "unset it" in done.stderr


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """What the command says of the largest call, as one branch and as two, on sm_90 and sm_120."""
    file = tmp_path_factory.mktemp("sass") / "model.json"
    cache = ROOT / ".triton_cache"
    cache.mkdir(exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        gpus, cases = (
            ("--gpu", "h200", "--gpu", "5090"),
            ("--case", "encode:128:256", "--case", "encode:128:256:overlap"),
        )
        done = _run(*gpus, *cases, "--detail", "--json", str(file))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())


@pytest.mark.aot
def test_the_tensor_pipe_is_busy_for_as_long_as_the_shape_says(predicted):
    checked = 0
    whole = [call for call in predicted["calls"] if call["branches"] is None]
    for call, gpu, rate in zip(whole, (GPUS["h200"], GPUS["5090"]), (4096, 512), strict=True):
        for launch in call["launches"]:
            programs = launch["grid"][0]
            busy = launch["pipes"]["main"].get("tensor", 0) * gpu.efficiency * rate * programs
            if launch["kernel"] in ("expand_kernel", "project_kernel", "patchify_kernel", "head_kernel"):
                # cycles are rounded to whole ones in the file
                assert busy == pytest.approx(launch["flops"], rel=1e-3), launch["kernel"]
                checked += 1
    assert checked == 8


@pytest.mark.aot
def test_two_branches_take_no_less_than_their_resources_and_no_more_than_one_after_the_other(predicted):
    found = [call["branches"] for call in predicted["calls"] if call["branches"] is not None]
    assert len(found) == 2
    for gpu, of in zip(("H200", "RTX 5090"), found, strict=True):
        assert of["floor"] < min(of["expected"], of["turns"]) and max(of["expected"], of["turns"]) < of["sequence"], gpu
        # one branch by the simulation is the sum of the launches and gaps, whose tails it counts by the wave
        assert of["whole"] == pytest.approx(predicted["ms"][f"{gpu}: encode 128x256²"], rel=0.01)
        assert predicted["ms"][f"{gpu}: encode 128x256² overlap"] == pytest.approx(of["expected"], abs=1e-3)


@pytest.mark.aot
def test_committed_page_is_of_these_kernels(predicted):
    text = sass.DEFAULT_TABLE.read_text()
    for name, ms in predicted["ms"].items():
        gpu, call = name.split(": ")
        found = re.search(rf"^\| {gpu} \| {re.escape(call)} \| ([\d.]+) \|", text, re.M)
        assert found is not None, name
        assert float(found[1]) == pytest.approx(ms, rel=0.01), f"{name}: run python -m bench sass and commit its page"
