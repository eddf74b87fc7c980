"""Latents in int8: against float64, the same bits again, in every reader; and scales that cannot be are refused."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from cache_cases import commits_of, index_rows, open_cache, snapshot, task_files, task_layout, write_images
from export_cases import export
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from models import random_model
from safetensors.torch import load_file
from torch.utils.data import default_collate

from capacitor_rt.cache import CacheRequest, LatentDataset, RunOptions, cache_images, dry_run
from capacitor_rt.cache.dtype_costs import measure_dtypes
from capacitor_rt.cache.folder import CacheFolder
from capacitor_rt.cache.quantization import bad_numbers, dequantize, quantize, stored_as, values_of
from capacitor_rt.cache.sources.open import open_source
from capacitor_rt.cache.verify import verify
from capacitor_rt.config import FullCapacitorInferenceConfig
from capacitor_rt.errors import CacheError, InputError
from capacitor_rt.evaluation.metrics import psnr
from capacitor_rt.images.frames import to_uint8
from capacitor_rt.images.load import load_image

REQUEST = CacheRequest(64, area=True, dtype="int8", posterior=True, flip=True, task_inputs=4, batch=2)
KINDS = ("latents", "logsnr", "latents_flip", "logsnr_flip")


def run(src, out, model, request=REQUEST):
    return cache_images(src, out, model, request, options=RunOptions(workers=0, progress=False, measure=0))


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    where = tmp_path_factory.mktemp("int8")
    model = random_model()
    write_images(where / "src", 7)
    run(where / "src", where / "out", model)
    return where / "src", where / "out", model


def in_float64(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The definition in float64: the nearest of 256 evenly spread values, their distance, the largest value."""
    low, high = (f(values.astype(np.float64), (2, 3))[..., None, None] for f in (np.min, np.max))
    scale = (high - low) / 255
    steps = np.rint((values - low) / np.where(scale > 0, scale, 1))
    return low + scale * steps, scale, np.maximum(abs(low), abs(high))


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(
        np.float32,
        (2, 3, 3, 4),
        elements=st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, -0.0, 1e-30, 1e-42, 7.5]),
    )
)
def test_the_error_is_half_a_scale_by_float64(values):
    nearest, scale, largest = in_float64(values)
    q, s, o = quantize(torch.from_numpy(values))
    assert (q.dtype, s.dtype, o.dtype) == (torch.int8, torch.float32, torch.float32)
    assert bad_numbers({"x_scale": s, "x_offset": o}) is None
    found = dequantize(q, s, o).numpy().astype(np.float64)
    # float32 rounds offset, product and sum
    rounding = 4 * 2.0**-24 * largest + 2e-28
    assert (abs(found - values) <= scale / 2 + rounding).all()
    # and the choice among the 256 is the nearest but for a tie
    assert (abs(found - values) <= abs(nearest - values) + rounding + scale * 1e-4).all()


def test_a_channel_of_one_value_is_exact():
    values = torch.tensor([0.0, -3.25, 1e-42, 3e38])[None, :, None, None].expand(2, 4, 3, 3)
    q, scale, offset = quantize(values)
    assert torch.equal(dequantize(q, scale, offset), values) and (q == 0).all() and (scale == 1).all()


def test_what_is_not_finite_shows():
    values = torch.randn(1, 4, 2, 2)
    for channel, value in ((0, math.nan), (1, math.inf), (2, -math.inf)):
        values[0, channel, 0, 1] = value
    values[0, 3, 0] = torch.tensor([3e38, -3e38])
    _, scale, offset = quantize(values)
    assert not (scale.isfinite() & offset.isfinite()).any()


def test_the_bits_depend_neither_on_the_batch_nor_on_layout_or_threads():
    values = torch.randn(5, 7, 9, 6) * 3
    whole = quantize(values)
    for i in range(5):
        for a, b in zip(whole, quantize(values[i : i + 1]), strict=True):
            assert torch.equal(a[i : i + 1], b)
    for a, b in zip(whole, quantize(values.to(memory_format=torch.channels_last)), strict=True):
        assert torch.equal(a, b)


def test_rows_are_the_models_latents_to_half_a_scale(cached):
    src, out, model = cached
    rows, raw = LatentDataset(out, verify=True), LatentDataset(out, verify=True, raw=True)
    _, plan = open_cache(out)
    run(src, out.parent / "exact", model, CacheRequest(**{**REQUEST.__dict__, "dtype": "fp32"}))
    exact = LatentDataset(out.parent / "exact")
    for i in range(len(rows)):
        assert rows[i]["id"] == raw[i]["id"] == exact[i]["id"]
        for kind in KINDS:
            q, scale, offset = (raw[i][name] for name in (kind, f"{kind}_scale", f"{kind}_offset"))
            assert (q.dtype, scale.shape, offset.shape) == (torch.int8, q.shape[:1], q.shape[:1])
            value = rows[i][kind]
            assert value.dtype == torch.float32 and torch.equal(value, dequantize(q, scale, offset))
            error = (value.double() - exact[i][kind].double()).abs()
            assert (error <= scale.double()[:, None, None] / 2 + 1e-5).all()
    batch = default_collate([raw[i] for i in range(0, len(raw), 3)])
    together = dequantize(batch["latents"], batch["latents_scale"], batch["latents_offset"])
    assert torch.equal(together, default_collate([rows[i] for i in range(0, len(rows), 3)])["latents"])
    for bucket in rows.buckets:
        elements = 8 * bucket.height * bucket.width // 256
        assert plan.row_bytes(bucket) == 4 * (elements + 2 * 4 * 8)


def test_the_file_holds_what_the_format_says(cached):
    _, out, _ = cached
    _, plan = open_cache(out)
    for entry in index_rows(out):
        _, data = task_files(out, entry["input"] // 4)
        tensors, bucket = load_file(data), plan.buckets[entry["bucket"]]
        names = [f"{kind}{part}" for kind in KINDS for part in ("", "_scale", "_offset")]
        stored = [tensors[f"{name}/{bucket}"][entry["row"]] for name in names]
        assert [t.dtype for t in stored] == 4 * [torch.int8, torch.float32, torch.float32]
        digest = xxhash.xxh3_128()
        for t in stored:
            digest.update(t.numpy().tobytes())
        assert digest.digest() == entry["row_hash"]
        # of the values, as a reader gets them
        values = dequantize(*stored[:3]).double()
        found = [entry[name] for name in ("min", "max", "mean", "std")]
        np.testing.assert_allclose(
            found, [values.min(), values.max(), values.mean(), values.std(correction=0)], rtol=1e-5, atol=1e-6
        )


def test_the_same_bytes_again_and_in_other_batches_of_work(cached, tmp_path):
    src, out, model = cached
    run(src, tmp_path / "again", model)
    assert snapshot(tmp_path / "again") == snapshot(out)
    assert verify(out).problems == []
    again = cache_images(src, out, model, REQUEST, options=RunOptions(workers=0, progress=False))
    assert again.new_images == 0
    with pytest.raises(CacheError, match=r"store\.dtype int8 -> bfloat16"):
        run(src, out, model, CacheRequest(**{**REQUEST.__dict__, "dtype": "bf16"}))


def test_draws_need_values(cached):
    _, out, _ = cached
    rows, raw = LatentDataset(out), LatentDataset(out, raw=True)
    drawn = rows.draw(rows[0], torch.Generator().manual_seed(0))
    assert drawn.isfinite().all() and (drawn - rows[0]["latents"]).abs().max() > 0
    with pytest.raises(InputError, match="open the cache without raw=True"):
        raw.draw(raw[0])


def test_exports_hold_the_values(cached, tmp_path):
    _, out, _ = cached
    rows = {row["id"]: row["latents"] for row in map(LatentDataset(out).__getitem__, range(7))}
    report = export(out, tmp_path / "wds", "comfy", space="whitened")
    assert report.rounding == 0.0
    found = {path.name.removesuffix(".latent"): load_file(path) for path in (tmp_path / "wds").rglob("*.latent")}
    assert len(found) == 7
    for id, latents in rows.items():
        tensors = next(t for name, t in found.items() if name.startswith(id.removesuffix(".png")))
        assert torch.equal(tensors["latent_tensor"][0], latents)
    manifest = json.loads((tmp_path / "wds" / "capacitor.json").read_text())
    assert manifest["latents"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("name", "value"),
    [("latents_scale", math.nan), ("latents_scale", 0.0), ("logsnr_scale", -1.0), ("latents_flip_offset", math.inf)],
)
def test_hostile_scales_are_refused(cached, tmp_path, name, value):
    """A file whose hashes all agree, with a number that no writer of this format writes."""
    src, _, model = cached
    out = tmp_path / "out"
    run(src, out, model)
    _, data = task_files(out, 0)
    placed = next(t for (_, part), t in task_layout(out, 0).tensors.items() if part == name)
    with open(data, "r+b") as file:
        file.seek(placed.begin)
        file.write(struct.pack("<f", value))
    rows = LatentDataset(out)
    with pytest.raises(CacheError, match=f"row 0 of .* is damaged: {name} holds {value}"):
        rows.__getitems__(range(4))
    with CacheFolder(out) as folder:
        digest = folder.hash(str(data.relative_to(out)))
    old = commits_of(out)[0].data_xxh3
    log = (out / "commits.jsonl").read_text().replace(old, digest)
    (out / "commits.jsonl").write_text(log)
    problems = verify(out).problems
    assert problems and all("damaged" in line for line in problems)


def test_a_scale_of_another_shape_is_refused(cached, tmp_path):
    src, _, model = cached
    out = tmp_path / "out"
    run(src, out, model)
    _, data = task_files(out, 0)
    raw = data.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    entry = next(v for k, v in header.items() if k.startswith("latents_scale/"))
    entry["shape"] = entry["shape"][::-1]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    data.write_bytes(raw[:8] + text + raw[8 + length :])
    with pytest.raises(CacheError, match="its header or its size is not that of its index"):
        LatentDataset(out)[0]
    assert any("is damaged" in line for line in verify(out).problems)


def test_a_latent_that_is_not_finite_is_quarantined(tmp_path):
    model = random_model()
    write_images(tmp_path / "src", 2)

    encode = model.encode

    class Overflowing:
        device, dtype = model.device, model.dtype

        def encode(self, pixels):
            latents = encode(pixels)
            latents[0, 0, 0, 0] = math.inf
            return latents

    from capacitor_rt.cache.encoder import BatchEncoder

    encoded = BatchEncoder(Overflowing(), ("latents",), "int8").submit(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))
    assert encoded.finite.tolist() == [False, True]


def test_floats_are_stored_as_they_were():
    values = {"latents": torch.randn(2, 3, 4, 4)}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        stored = stored_as(values, name)
        assert list(stored) == ["latents"] and torch.equal(stored["latents"], values["latents"].to(dtype))
        assert values_of(stored, ["latents"])["latents"] is stored["latents"]


class TestCosts:
    def test_are_measured_where_a_cache_in_int8_begins(self, cached, tmp_path):
        src, _, model = cached
        (tmp_path / "src").mkdir()
        for path in src.iterdir():
            (tmp_path / "src" / path.name).write_bytes(path.read_bytes())
        (tmp_path / "src" / "000.png").write_text("no image")
        lines = []
        options = RunOptions(workers=0, progress=False, metrics=tmp_path / "run.json")
        args = (tmp_path / "src", tmp_path / "out", model, REQUEST)
        report = cache_images(*args, note=lines.append, options=options)
        at = lines.index("what storing costs, measured on 4 of these images:")
        assert [line.split(":")[0].strip() for line in lines[at + 1 : at + 5]] == ["int8", "bf16", "fp16", "fp32"]
        cost = {c.dtype: c for c in report.costs}
        assert cost["fp32"].error == cost["fp32"].loss == 0 and math.isinf(cost["fp32"].psnr)
        assert 0 < cost["fp16"].error < cost["bf16"].error < 0.003 and 0 < cost["int8"].error < 0.01
        assert 1 >= cost["fp16"].cosine > cost["bf16"].cosine > 0.9999
        assert cost["fp32"].row_nbytes == 2 * cost["bf16"].row_nbytes == 2 * cost["fp16"].row_nbytes
        metrics = json.loads((tmp_path / "run.json").read_text())
        assert metrics["dtype_error"] == {name: c.error for name, c in cost.items()}
        assert metrics["dtype_psnr"]["fp32"] is None
        _, plan = open_cache(tmp_path / "out")
        assert "costs" not in json.dumps(plan.fields)
        # the second run has no model, and nothing to measure
        lines.clear()
        cache_images(*args, note=lines.append, options=RunOptions(workers=0, progress=False, measure=2))
        assert not any("storing" in line for line in lines)

    def test_by_the_definitions(self, cached):
        src, out, model = cached
        _, plan = open_cache(out)
        source = open_source(str(src), out)
        count, costs = measure_dtypes(plan, source, model, 2)
        assert count == 2
        cost = next(c for c in costs if c.dtype == "int8")
        errors, cosines, psnrs, losses = [], [], [], []
        for ordinal in (0, 4):
            loaded = load_image(source.open().read(ordinal), plan.policy, plan.buckets)
            z = model.encode(torch.from_numpy(loaded.pixels)[None])
            rounded = dequantize(*quantize(z))
            a, b = rounded.double().numpy().ravel(), z.double().numpy().ravel()
            errors.append(np.linalg.norm(a - b) / np.linalg.norm(b))
            cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            seed = FullCapacitorInferenceConfig(seed=0)
            now, before = (to_uint8(model.decode(x, inference_config=seed)[0]) for x in (rounded, z))
            psnrs.append(psnr(now, before))
            losses.append(psnr(before, loaded.pixels) - psnr(now, loaded.pixels))
        assert cost.error == pytest.approx(np.mean(errors)) and cost.cosine == pytest.approx(min(cosines))
        assert cost.psnr == pytest.approx(np.mean(psnrs)) and cost.loss == pytest.approx(np.mean(losses), abs=1e-9)

    def test_can_be_asked_for_and_left_out(self, cached, tmp_path):
        src, _, model = cached
        for name, request, measure, told in (("a", CacheRequest(64), 1, True), ("b", CacheRequest(64), None, False)):
            lines = []
            options = RunOptions(workers=0, progress=False, measure=measure)
            report = cache_images(src, tmp_path / name, model, request, note=lines.append, options=options)
            assert bool(report.costs) == told == any("storing" in line for line in lines)

    def test_a_dry_run_has_every_types_bytes(self, cached, tmp_path):
        src, _, model = cached
        found = dry_run(src, tmp_path / "out", model, REQUEST)
        assert found.nbytes == found.by_dtype["int8"] and found.files == 2 * found.tasks
        assert found.by_dtype["fp32"] == 2 * found.by_dtype["bf16"] == 2 * found.by_dtype["fp16"]


def test_the_format_pages_reader_gives_the_values(cached, monkeypatch):
    _, out, _ = cached
    page = (Path(__file__).parents[2] / "docs" / "cache-format.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.S)[1]
    (out.parent / "latents").symlink_to(out)
    monkeypatch.chdir(out.parent)
    names: dict = {}
    exec(code, names)
    rows = LatentDataset(out)
    assert len(names["latents"]) == len(rows)
    assert all(torch.equal(names["latents"][row["id"]], row["latents"]) for row in map(rows.__getitem__, range(7)))
