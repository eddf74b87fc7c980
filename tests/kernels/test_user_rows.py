"""Rows that a user measured: where they lie, that they come first, and that a damaged file is refused in words."""

from __future__ import annotations

import json
import os

import pytest
import torch

from capacitor_kernels import tuning, user_rows
from capacitor_kernels.gemm import GemmConfig
from capacitor_kernels.user_rows import UserRowsError

SHAPE = {"tokens_per_image": 256, "dim": 896, "hidden": 3584}
CONFIG = {"block_m": 64, "block_n": 128, "block_k": 32, "group_m": 4, "num_warps": 4, "num_stages": 3}
MINE = GemmConfig(64, 128, 32, 4, 4, 3)
BF16 = torch.bfloat16


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of the user's rows."""
    monkeypatch.setenv(user_rows.VARIABLE, str(tmp_path))
    tuning.reload()
    yield tmp_path
    monkeypatch.undo()
    tuning.reload()


def row(**changes) -> dict:
    return {"shape": SHAPE, "dtype": "bf16", "use": "throughput", "config": CONFIG, "evidence": {"us": 1.5}} | changes


def put(folder, families: dict, cc: int = 90) -> None:
    user_rows.write(folder / f"sm_{cc}.json", cc, families)
    tuning.reload()


def put_text(folder, text: str | bytes, cc: int = 90) -> None:
    path = folder / f"sm_{cc}.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    tuning.reload()


def test_the_folder_is_the_users_cache_or_the_one_named(monkeypatch, tmp_path):
    monkeypatch.delenv(user_rows.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_rows.path_of(90) == tmp_path / "capacitor_rt" / "configs" / "sm_90.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_rows.folder() == tmp_path / ".cache" / "capacitor_rt" / "configs"
    monkeypatch.setenv(user_rows.VARIABLE, "~/rows")
    assert user_rows.folder() == tmp_path / "rows"
    monkeypatch.setenv(user_rows.VARIABLE, "shipped")
    assert user_rows.folder() is None and user_rows.path_of(90) is None


def test_a_row_of_the_user_comes_before_a_shipped_one(folder, monkeypatch):
    shipped = tuning.lookup("expand", 90, SHAPE, BF16)
    put(folder, {"expand": [row()]})
    assert tuning.lookup("expand", 90, SHAPE, BF16) == MINE != shipped
    # for another GPU, dtype or use it says nothing
    assert tuning.lookup("expand", 100, SHAPE, BF16) != MINE
    assert tuning.lookup("expand", 90, SHAPE, torch.float16) != MINE
    assert tuning.lookup("expand", 90, SHAPE, BF16, "latency") != MINE
    assert tuning.in_force(90)[0].evidence == {"us": 1.5} and tuning.in_force(100) == ()
    monkeypatch.setenv(user_rows.VARIABLE, "shipped")
    tuning.reload()
    assert tuning.lookup("expand", 90, SHAPE, BF16) == shipped


def test_of_rows_equally_near_the_users_counts_and_a_nearer_shipped_one_before_it(folder):
    put(folder, {"expand": [row(shape=SHAPE | {"tokens_per_image": 1024})]})
    assert tuning.lookup("expand", 90, SHAPE | {"tokens_per_image": 512}, BF16) == MINE
    assert tuning.lookup("expand", 90, SHAPE, BF16) != MINE


def test_rows_of_a_relative_are_not_taken(folder):
    # an RTX 3080 and an RTX 4090 share shipped rows, and little else
    put(folder, {"expand": [row()]}, cc=89)
    assert tuning.lookup("expand", 89, SHAPE, BF16) == MINE
    assert tuning.lookup("expand", 86, SHAPE, BF16) != MINE


def test_a_file_is_read_once_until_it_is_reloaded(folder):
    put(folder, {"expand": [row()]})
    before = tuning.generation()
    assert tuning.lookup("expand", 90, SHAPE, BF16) == MINE
    (folder / "sm_90.json").unlink()
    assert tuning.lookup("expand", 90, SHAPE, BF16) == MINE and tuning.generation() == before
    tuning.reload()
    assert tuning.lookup("expand", 90, SHAPE, BF16) != MINE and tuning.generation() > before


def test_watching_tells_which_rows_of_the_user_answered(folder):
    put(folder, {"expand": [row()], "project": [row(dtype="fp16")]})
    with tuning.watching() as found:
        tuning.lookup("expand", 90, SHAPE, BF16)
        tuning.lookup("project", 90, SHAPE, BF16)
        with tuning.using("expand", MINE):
            tuning.lookup("expand", 90, SHAPE, BF16)
    assert [(r.family, r.config, r.path) for r in found] == [("expand", MINE, str(folder / "sm_90.json"))]


def test_kept_rows_stand_in_for_the_file(folder):
    put(folder, {"expand": [row()]})
    shipped = tuning.lookup("expand", 100, SHAPE, BF16)
    other = row(config=CONFIG | {"block_m": 128})
    with tuning.keeping(90, {"expand": [other]}):
        assert tuning.lookup("expand", 90, SHAPE, BF16).block_m == 128
        with tuning.keeping(90, {}):
            assert tuning.lookup("expand", 90, SHAPE, BF16) not in (MINE, GemmConfig(**other["config"]))
        assert tuning.lookup("expand", 90, SHAPE, BF16).block_m == 128
        assert tuning.lookup("expand", 100, SHAPE, BF16) == shipped
    assert tuning.lookup("expand", 90, SHAPE, BF16) == MINE
    with (
        pytest.raises(UserRowsError, match=r"configs of yours, a plan: .*num_warps of the config is 3"),
        tuning.keeping(90, {"expand": [row(config=CONFIG | {"num_warps": 3})]}),
    ):
        pass


def test_rows_are_merged_and_written_whole_or_not_at_all(folder, monkeypatch):
    path = folder / "sm_90.json"
    families = user_rows.merge({}, "expand", row())
    families = user_rows.merge(families, "expand", row(use="latency"))
    families = user_rows.merge(families, "expand", row(config=CONFIG | {"block_m": 128}))
    user_rows.write(path, 90, families)
    assert user_rows.read(path, 90) == {"expand": [row(config=CONFIG | {"block_m": 128}), row(use="latency")]}
    assert json.loads(path.read_text())["compute_capability"] == 90
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        user_rows.write(path, 90, {"expand": [row()]})
    assert path.read_bytes() == before and [p.name for p in folder.iterdir()] == ["sm_90.json"]
    # nothing that could not be read again is written
    with pytest.raises(ValueError, match="block_m of the config is 3"):
        user_rows.write(path, 90, {"expand": [row(config=CONFIG | {"block_m": 3})]})


def document(*rows, cc: object = 90, family: str = "expand") -> str:
    return json.dumps({"compute_capability": cc, "families": {family: list(rows)}})


WRONG = {
    "no JSON": ("{", "it is not valid JSON"),
    "no text": (b"\xff\xfe{}", "it is not valid JSON"),
    "a bomb": ("[" * 200_000, "it is (not valid JSON|nested too deep)|it is not valid JSON"),
    "too large": (" " * (user_rows.FILE_BYTES + 1), "it is larger than 1048576 bytes"),
    "a list": ("[]", "compute_capability is 'list', expected 90"),
    "another GPU's": (document(cc=100), "compute_capability is 100, expected 90"),
    "no families": ('{"compute_capability": 90}', "families is no object of lists"),
    "too many rows": (document(*[0] * 5000), "it has more than 4096 rows"),
    "an unknown family": (document(row(), family="sort"), "no kernel family 'sort'"),
    "a row that is none": (document(7), "expand, row 0: it is no object of shape, dtype"),
    "another key": (document(row(run="rm -rf /")), "row 0: it is no object of shape"),
    "an unknown field": (document(row(config=CONFIG | {"block_q": 16})), r"unknown fields \['block_q'\]"),
    "a field too few": (document(row(config={"block_m": 64})), "missing"),
    "a huge tile": (document(row(config=CONFIG | {"block_m": 1 << 20})), "block_m of the config is 1048576"),
    "tiles that fit nowhere": (document(row(config=CONFIG | {"block_m": 1024, "block_n": 1024})), "no CTA can hold"),
    "tiles too small": (document(row(config=CONFIG | {"block_k": 8})), "no CTA can hold"),
    "no power of two": (document(row(config=CONFIG | {"block_n": 96})), "block_n of the config is 96"),
    "a hundred warps": (document(row(config=CONFIG | {"num_warps": 100})), "num_warps of the config is 100"),
    "a float": (document(row(config=CONFIG | {"group_m": 1.5})), "group_m of the config is 1.5"),
    "text": (document(row(config=CONFIG | {"num_stages": "eval(1)"})), "num_stages of the config is 'eval"),
    "a word for a number": (
        document(row(config=CONFIG | {"num_stages": "three"})),
        "num_stages is 'three', expected int",
    ),
    "truth for a number": (document(row(config=CONFIG | {"group_m": True})), "group_m is True, expected int"),
    "a number for truth": (document(row(config=CONFIG | {"tma": 1})), "tma is 1, expected bool"),
    "a shape of none": (document(row(shape={"dim": 0})), "dim of the shape is 0"),
    "another shape": (document(row(shape={"dim": 896})), r"shape has \['dim'\], expected"),
    "another dtype": (document(row(dtype="int8")), "dtype is one of bf16, fp16, fp32"),
    "another use": (document(row(use="speed")), "use one of throughput, latency"),
    "a novel": (document(row(evidence={"gpu": "x" * 10_000})), "gpu of the evidence is 'xxx"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_or_hostile_file_is_refused_and_says_the_way_out(name, folder):
    text, message = WRONG[name]
    put_text(folder, text)
    with pytest.raises(UserRowsError, match=message) as caught:
        tuning.lookup("expand", 90, SHAPE, BF16)
    said = str(caught.value)
    assert str(folder / "sm_90.json") in said and "CAPACITOR_CONFIGS=shipped to do without" in said and len(said) < 700
    # other GPUs have files of their own
    assert tuning.lookup("expand", 100, SHAPE, BF16)


def test_what_is_no_file_is_refused_without_waiting(folder):
    os.mkfifo(folder / "sm_90.json")
    tuning.reload()
    with pytest.raises(UserRowsError, match="it is no regular file"):
        tuning.lookup("expand", 90, SHAPE, BF16)
