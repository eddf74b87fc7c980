"""A quick part of the executed PTX: each test is a process of its own, because this one has Triton's interpreter on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from capacitor_kernels import OPS

ROOT = Path(__file__).parents[2]
# of breaks of real kernels; the rest are barriers that another one makes redundant
NOTICED = 0.9


def _run(*arguments: str) -> str:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ptx", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert done.returncode == 0 and not failed, "\n".join(failed) or done.stderr[-4000:]
    return done.stdout


def _passed(output: str, what: str) -> int:
    return sum(line.startswith("PASS") and what in line for line in output.splitlines())


def test_every_op_on_sm_90_is_right():
    output = _run("--quick", "--cc", "90")
    for op in OPS:
        assert _passed(output, f" {op} "), f"{op} did not run"
    assert _passed(output, "descriptors") == 2


@pytest.mark.parametrize("cc", [80, 120])
def test_products_are_right(cc):
    assert _passed(_run("--quick", "--cc", str(cc)), f"sm_{cc} bf16") >= 10


@pytest.mark.parametrize(
    ("cc", "ops"),
    [(90, ("grn", "fuse_skip")), *(pytest.param(cc, (), marks=pytest.mark.slow) for cc in (90, 100, 120))],
)
def test_launches_that_start_early_wait_before_they_touch_memory(cc, ops):
    output = _run("--chained", "--no-bits", "--cc", str(cc), *(word for op in ops for word in ("--op", op)))
    assert _passed(output, "the wait stands in front") >= 17 and _passed(output, f"chained sm_{cc}") >= len(ops)


def test_instructions_are_right_and_faults_are_refused():
    output = _run("--units")
    assert _passed(output, "refused: ") >= 11 and _passed(output, "instruction ") >= 35


def test_gelu_is_right_at_every_bfloat16_number():
    assert _passed(_run("--gelu", "--cc", "90"), " GELU ") == 2


def test_breaks_of_kernels_are_noticed():
    output = _run("--selftest", "--cc", "90", "--every", "5")
    found = re.search(r"(\d+) of (\d+) broken kernels were noticed", output)
    assert found is not None
    noticed, breaks = map(int, found.groups())
    assert breaks >= 25 and noticed >= NOTICED * breaks, output


def test_a_golden_model_is_right():
    output = _run("--golden", "tests/golden/p16", "--cc", "90")
    assert _passed(output, " in fp8: ") == 3
    for what in ("latents", "posterior_logsnr", "decode_ddim1_linear_seed7", "decode_dpmpp4_cosine_pdg1.5_seed1"):
        assert _passed(output, what), f"{what} was not checked"


@pytest.mark.parametrize(
    ("cc", "ops"),
    [
        (120, ("expand", "project")),
        (90, ("expand_fp8", "project_fp8")),
        pytest.param(80, (), marks=pytest.mark.slow),
        pytest.param(90, (), marks=pytest.mark.slow),
        pytest.param(100, ("expand_fp8", "project_fp8"), marks=pytest.mark.slow),
        pytest.param(120, (), marks=pytest.mark.slow),
    ],
)
def test_few_images_have_the_bits_of_many(cc, ops):
    output = _run("--bits", "--cc", str(cc), *(word for op in ops for word in ("--op", op)))
    # and two configs of different classes do not
    assert _passed(output, "of the same bits") >= (4 if ops else 16)
    assert _passed(output, "differs") == ("project" in ops or not ops)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dico_ir", "dico_m2"])
def test_a_golden_sibling_is_right(name):
    output = _run("--golden", f"tests/golden/{name}", "--cc", "90")
    for what in (
        "latents",
        "decode_ddim1_linear_seed7",
        "decode_ddim1_linear_pdg2_seed7",
        "decode_dpmpp4_linear_seed7",
    ):
        assert _passed(output, what), f"{what} was not checked"


def test_a_wrong_golden_output_fails(tmp_path):
    from safetensors.torch import load_file, save_file

    source = ROOT / "tests" / "golden" / "p8"
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(source / name)
    io = load_file(source / "io.safetensors")
    names = ("image", "latents", "bf16_latents", "posterior_mean", "posterior_logsnr")
    wrong = {name: io[name] * (1.05 if name.endswith("latents") else 1.0) for name in names}
    save_file(wrong, tmp_path / "io.safetensors")
    with pytest.raises(AssertionError, match=r"FAIL sm_90 bf16 .* latents"):
        _run("--golden", str(tmp_path), "--cc", "90")


def test_it_refuses_to_compile_under_the_interpreter():
    command = [sys.executable, "-m", "tests.ptx", "--units"]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "unset it" in done.stderr
