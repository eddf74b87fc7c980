"""Config lookup: exact row, nearest row, analytical default; and the shipped rows themselves."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capacitor_kernels import OPS, config_rows, gemm, gpu_limits, tuning
from capacitor_kernels.config_rows import ConfigRow
from capacitor_kernels.gemm import GemmConfig
from capacitor_kernels.gpu_limits import COMPUTE_CAPABILITIES

SHAPE = {"tokens_per_image": 256, "dim": 896, "hidden": 3584}
BF16 = torch.bfloat16


@pytest.mark.parametrize("cc", COMPUTE_CAPABILITIES)
@pytest.mark.parametrize("family", ["expand", "project"])
def test_exact_row_wins(family, cc):
    row = next(r for r in config_rows.rows(cc, family) if r.shape == SHAPE and r.use == "throughput")
    assert tuning.lookup(family, cc, SHAPE, BF16) == row.config


@pytest.mark.parametrize("tokens", [200, 512, 1024, 4096])
def test_nearest_row_serves_other_sizes(tokens):
    exact = tuning.lookup("expand", 90, SHAPE, BF16)
    assert tuning.lookup("expand", 90, SHAPE | {"tokens_per_image": tokens}, BF16) == exact


def test_a_row_that_pads_too_much_is_passed_over():
    # 144 tokens: two tiles of 128 pad by 78 %, three of 64 by 33 %
    config = tuning.lookup("expand", 90, SHAPE | {"tokens_per_image": 144}, BF16)
    assert config.block_m == 64


@pytest.mark.parametrize(
    ("change", "dtype"),
    [({"dim": 64}, BF16), ({"hidden": 4096}, BF16), ({}, torch.float32), ({"tokens_per_image": 2**20}, BF16)],
    ids=["dim", "hidden", "dtype", "too far"],
)
def test_default_serves_what_no_row_covers(change, dtype):
    shape = SHAPE | change
    family = config_rows.get_family("expand")
    assert tuning.lookup("expand", 90, shape, dtype) == family.default(90, shape, dtype, "throughput")


def test_latency_rows_are_only_for_latency():
    fast = tuning.lookup("project", 90, SHAPE, BF16, use="latency")
    assert fast.split_k > 1
    assert tuning.lookup("project", 90, SHAPE, BF16).split_k == 1


@pytest.mark.parametrize("cc", COMPUTE_CAPABILITIES)
@pytest.mark.parametrize("family", ["expand", "project"])
def test_rows_for_latency_reach_one_octave(cc, family):
    far = next(r for r in config_rows.rows(cc, family) if r.shape["tokens_per_image"] == 1024 and r.use == "latency")
    near = tuning.lookup(family, cc, SHAPE | {"tokens_per_image": 896}, BF16, use="latency")
    assert near == far.config
    # an image of 1024 x 1024 has programs enough for large tiles: the row of a quarter of it would slow it down
    large = SHAPE | {"tokens_per_image": 4096}
    assert tuning.lookup(family, cc, large, BF16, use="latency") == tuning.lookup(family, cc, large, BF16)
    assert tuning.lookup(family, cc, large, BF16, use="latency").split_k == 1


def test_latency_default_splits_k_until_the_gpu_is_full():
    shape = {"tokens_per_image": 64, "dim": 128, "hidden": 2048}
    config = tuning.lookup("project", 90, shape, BF16, use="latency")
    assert config.split_k == 8
    many = tuning.lookup("project", 90, shape | {"tokens_per_image": 65536}, BF16, use="latency")
    assert many.split_k == 1


@pytest.mark.parametrize("cc", COMPUTE_CAPABILITIES)
@pytest.mark.parametrize("tokens", [64, 255, 4096])
def test_one_image_for_latency_has_narrow_tiles_where_throughput_stands_in(cc, tokens):
    shape = SHAPE | {"tokens_per_image": tokens}
    for family in ("expand", "project"):
        own = tuning.lookup(family, cc, shape, BF16, use="latency")
        one = tuning.lookup(family, cc, shape, BF16, use="latency", images=1)
        stands_in = own == tuning.lookup(family, cc, shape, BF16)
        assert one == (tuning.lookup(family, cc, shape, BF16, images=1) if stands_in else own)
    if tokens == 64:
        wide, narrow = (tuning.lookup("expand", cc, shape, BF16, use="latency", images=n) for n in (None, 1))
        assert narrow.block_n < wide.block_n


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_masked_tiles_of_project_on_sm_80_keep_their_columns_but_for_latency(dtype):
    shape = {"tokens_per_image": 255, "dim": 1024, "hidden": 4096}
    many, one = (tuning.lookup("project", 80, shape, dtype, use=use) for use in config_rows.USES)
    assert (many.block_n, many.block_k, many.split_k) == (128, 64, 1)
    assert one.block_n == 64 and one.split_k > 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("nonsense", 90, SHAPE, BF16), "no kernel family 'nonsense'"),
        (("expand", 90, {"dim": 1}, BF16), r"shape of expand lacks \['hidden', 'tokens_per_image'\]"),
        (("expand", 90, SHAPE, BF16, "speed"), "use is 'speed'"),
        (("expand", 75, SHAPE, BF16), "compute capability 75 is below 80"),
    ],
)
def test_lookup_refuses(args, message):
    with pytest.raises(ValueError, match=message):
        tuning.lookup(*args)


@pytest.mark.parametrize(
    ("cc", "base"), [(80, 80), (86, 89), (87, 80), (90, 90), (103, 100), (110, 100), (121, 120), (130, 120)]
)
def test_relatives_share_rows(cc, base):
    assert gpu_limits.base_cc(cc) == base
    assert tuning.lookup("expand", cc, SHAPE, BF16) == tuning.lookup("expand", base, SHAPE, BF16)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"config": {"block_q": 1}}, r"sm_90.json, expand, row 3: unknown fields \['block_q'\]"),
        ({"shape": {"dim": 1}}, r"row 3: shape has \['dim'\], expected"),
        ({"config": {"block_m": 1}}, "row 3: .*missing"),
        ({"use": "x"}, "row 3: use is 'x'"),
    ],
)
def test_bad_rows_name_file_and_row(raw, message):
    family = config_rows.get_family("expand")
    with pytest.raises(ValueError, match=message):
        config_rows.parse_row(family, 90, 3, {"shape": SHAPE, "dtype": "bf16", "config": {}} | raw)


def test_a_family_registers_once():
    family = config_rows.get_family("expand")
    assert config_rows.register(family) is family
    with pytest.raises(ValueError, match="expand is registered twice"):
        config_rows.register(dataclasses.replace(family, near=("dim",)))


@pytest.mark.parametrize("cc", COMPUTE_CAPABILITIES)
def test_every_row_of_every_file_belongs_to_a_family(cc):
    assert set(config_rows.config_families(cc)) <= set(OPS)
    rows = config_rows.rows(cc)
    assert {row.family for row in rows} >= {"expand", "grn", "project"}
    keys = [(row.family, tuple(sorted(row.shape.items())), row.dtype, row.use) for row in rows]
    assert len(keys) == len(set(keys)), "two rows for one shape"
    for row in rows:
        assert row.evidence["kind"] in ("compiled", "modelled", "measured")


def test_nearest_row_is_by_ratio(monkeypatch):
    rows = tuple(
        ConfigRow(
            "expand", 90, SHAPE | {"tokens_per_image": n}, "bf16", "throughput", GemmConfig(n, 64, 32, 8, 4, 2), {}
        )
        for n in (16, 128)
    )
    monkeypatch.setattr(tuning, "rows", lambda cc, family: rows)
    tuning._cached_lookup.cache_clear()
    family = config_rows.get_family("expand")
    monkeypatch.setitem(config_rows._FAMILIES, "expand", dataclasses.replace(family, accepts=None))
    found = [tuning.lookup("expand", 90, SHAPE | {"tokens_per_image": n}, BF16).block_m for n in (40, 50)]
    tuning._cached_lookup.cache_clear()
    # 40 is 2.5 times 16 and 3.2 times below 128
    assert found == [16, 128]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    cc=st.sampled_from(COMPUTE_CAPABILITIES),
    tokens=st.integers(1, 20000),
    n=st.integers(1, 5000),
    k=st.integers(1, 5000),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_default_fits_every_gpu(cc, tokens, n, k, dtype):
    config = gemm.gemm_default(cc, tokens, n, k, dtype)
    for size in (config.block_m, config.block_n, config.block_k):
        assert size >= 16 and size & (size - 1) == 0
    assert config.block_n < 2 * max(n, 9) and config.block_k < 2 * max(k, 9)
    itemsize = torch.finfo(dtype).bits // 8
    # what the products of mma are done with is one stage less
    smem = gemm.gemm_smem(config, itemsize, buffers=config.num_stages - (cc == 80))
    assert smem <= gpu_limits.LIMITS[cc].smem_per_cta
    assert smem + gpu_limits.SMEM_RESERVED_PER_CTA <= gpu_limits.LIMITS[cc].smem_per_sm // 2, "two CTAs on an SM"
    # the accumulator alone may take half of the registers
    assert config.block_m * config.block_n / (32 * config.num_warps) <= 128


ALONE = """
import json, sys
from capacitor_kernels import config_rows, tuning
imported = lambda: sorted(m.rpartition(".")[2] for m in sys.modules if m.startswith("capacitor_kernels.ops."))
seen = [imported()]
import torch
tuning.lookup("grn", 90, {"tiles": 2, "hidden": 3584}, torch.bfloat16)
seen.append(imported())
for name in ("launch", "ops.grn", "antigravity", ""):
    try:
        tuning.lookup(name, 90, {}, torch.bfloat16)
        seen.append(name)
    except ValueError as error:
        assert f"no kernel family {name!r}: import the module that registers it; known: ['attention', " in str(error)
assert "antigravity" not in sys.modules
seen.append(imported())
config_rows.rows(90, "whiten")
seen.append(imported())
seen.append(sorted({row.family for row in config_rows.rows(90)}))
seen.append([f.name for f in config_rows.families()])
print(json.dumps(seen))
"""


def test_a_family_is_imported_when_it_is_first_asked_for_and_nothing_else_is():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    everything = sorted(OPS)
    assert json.loads(done.stdout) == [[], ["grn"], ["grn"], ["grn", "whiten"], everything, everything]


def test_a_config_is_not_forced_on_a_family_that_is_none():
    with pytest.raises(ValueError, match="no kernel family 'expandd'"), tuning.using("expandd", None):
        pass


def test_using_forces_a_config_and_lets_go_again():
    usual = tuning.lookup("expand", 90, SHAPE, BF16)
    forced = GemmConfig(16, 16, 16, 1, 4, 2)
    inner = GemmConfig(32, 16, 16, 1, 4, 2)
    with tuning.using("expand", forced) as seen:
        assert tuning.lookup("expand", 90, SHAPE, BF16) is forced
        with tuning.using("expand", inner):
            assert tuning.lookup("expand", 90, SHAPE, BF16) is inner
        assert tuning.lookup("expand", 90, SHAPE, BF16) is forced
        assert tuning.lookup("project", 90, SHAPE, BF16) not in (forced, inner)
    assert seen == [SHAPE, SHAPE]
    assert tuning.lookup("expand", 90, SHAPE, BF16) == usual
