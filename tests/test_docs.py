"""What the pages claim: figures recomputed from the code, every field named, links and commands that exist."""

from __future__ import annotations

import importlib
import json
import math
import re
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from cache_cases import pixels
from PIL import Image

from capacitor_kernels.gpu_limits import LIMITS
from capacitor_rt import FullCapacitorInferenceConfig, LatentDataset, ModelConfig
from capacitor_rt.cache import CacheRequest, cache_images
from capacitor_rt.cache.failures import NAN_LATENT, RETRYABLE
from capacitor_rt.cache.hashing import canonical_json
from capacitor_rt.cache.index import index_schema
from capacitor_rt.cache.plan_schema import PLAN_SCHEMA
from capacitor_rt.checkpoint_schema import DERIVED, STATISTICS, expected_shapes
from capacitor_rt.config import KNOWN_MODELS
from capacitor_rt.diffusion import noise_levels
from capacitor_rt.images.reasons import REASONS
from capacitor_rt.runtime.forecast import CEILINGS
from capacitor_rt.runtime.plan import PlanKey, make_plan

ROOT = Path(__file__).parents[1]
NUMBERS = (ROOT / "docs" / "numbers.md").read_text()
FORMAT = (ROOT / "docs" / "cache-format.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
FULL = ModelConfig()
TOKENS = 32768
GIGA, MEGA = 1e9, 1e6


def section(page: str, title: str) -> str:
    """The text below a heading of the second level."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.M | re.S)[1]


def rows(text: str) -> list[list[str]]:
    """Cells of the first table of a text, without its head."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.M)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines[2:]]


def number(cell: str) -> float:
    return float(cell.replace(",", "").strip("* "))


def flops(direction: str, size: int) -> int:
    key = PlanKey(direction, 1, size, size, torch.bfloat16, torch.float32, "nchw", 90)
    return make_plan(FULL, key).flops


def test_parameters():
    table = {row[0].split("`")[1]: row[1:] for row in rows(section(NUMBERS, "Architecture"))}
    assert table.keys() == KNOWN_MODELS.keys()
    for name, config in KNOWN_MODELS.items():
        shapes = expected_shapes(config, config.has_statistics)
        counts = {n: math.prod(shape) for n, shape in shapes.items() if n not in (*STATISTICS, *DERIVED)}
        parts = [sum(n for key, n in counts.items() if key.startswith(part)) for part in ("encoder.", "decoder.")]
        assert [number(cell) for cell in table[name]] == [sum(parts), *parts, len(shapes)], name
    elements = sum(map(math.prod, expected_shapes(FULL, has_statistics=True).values()))
    assert f"{4 * elements / 2**20:.1f} MiB" in NUMBERS


def test_checkpoint_tensors():
    """The table names every tensor of the model, and the encoder's with their shapes."""
    letters = {"D": 896, "2D": 1792, "F": 3584, "Z": 128, "2Z": 256, "r": 128, "p": 16, "3pp": 768}
    shapes = {
        re.sub(r"(blocks|deltas)\.\d+", r"\1.{i}", name): shape
        for name, shape in expected_shapes(FULL, has_statistics=True).items()
    }
    text = section(NUMBERS, "Checkpoint")
    words = {word for name in shapes for word in re.findall(r"[a-z]\w+", name)}
    assert [word for word in sorted(words) if word not in text and word.removesuffix("_blocks") not in text] == []
    shown = {}
    for names, cells in (row for row in rows(text) if row[0].startswith("`encoder.")):
        full = expand_braces(names.strip("`"))
        given = [tuple(letters.get(n) or int(n) for n in s.split(",")) for s in re.findall(r"\[([^]]+)\]", cells)]
        shown |= zip(full, given if len(given) == len(full) else given * len(full), strict=True)
    assert shown == {name: shape for name, shape in shapes.items() if name.startswith("encoder.")}


def expand_braces(name: str) -> list[str]:
    """`a.{b,c}` -> a.b, a.c; `{i}` stays."""
    choice = re.search(r"\{(\w+),(\w+)\}", name)
    return [name.replace(choice[0], word) for word in choice.groups()] if choice else [name]


def test_flops():
    text = section(NUMBERS, "FLOPs per image")
    for size, encode, decode in rows(text):
        side = int(size.split("x")[0])
        assert number(encode) == pytest.approx(flops("encode", side) / GIGA, rel=2e-5)
        assert number(decode) == pytest.approx(flops("decode", side) / GIGA, rel=2e-5)
    total = float(re.search(r"([\d.]+) TFLOP to encode", text)[1])
    assert total == pytest.approx(128 * flops("encode", 256) / 1e12, rel=2e-4)
    plan = make_plan(FULL, PlanKey("encode", 1, 256, 256, torch.bfloat16, torch.uint8, "nchw", 90))
    by_op = {op: sum(s.flops for s in plan.steps if s.op == op) / GIGA for op in {s.op for s in plan.steps}}
    quoted = re.search(r"at 256x256: ([^.]+\.[^:]+?)\. FLOPs", text, re.S)[1].replace("\n", " ")
    for item in quoted.split(", "):
        name, value = item.split()
        assert by_op[{"depthwise": "dwconv"}.get(name, name)] == pytest.approx(float(value), abs=6e-4), name
    share = (by_op["expand"] + by_op["project"]) / sum(by_op.values())
    assert f"{share:.1%}".replace("%", " %") in text


def test_ceilings_are_those_of_the_forecast():
    table = {int(row[1]): (number(row[2]), number(row[3])) for row in rows(section(NUMBERS, "Ceilings")) if row[1]}
    assert table == {cc: astuple(ceilings)[:2] for cc, ceilings in CEILINGS.items()}


def test_floors():
    work = {direction: 128 * flops(direction, 256) for direction in ("encode", "decode")}
    dim, size = FULL.model_dim, 2
    traffic = FULL.encoder_depth * (13 * TOKENS * dim * size + 8 * dim**2 * size)
    for gpu, *cells in rows(section(NUMBERS, "Floors")):
        tflops, bandwidth = map(float, re.search(r"at ([\d.]+), ([\d.]+)", gpu).groups())
        floors = [work["encode"] / tflops / 1e9, work["decode"] / tflops / 1e9, traffic / bandwidth / 1e6]
        assert [number(cell) for cell in cells] == pytest.approx(floors, abs=6e-3), gpu
    latency = flops("decode", 1024) / 790 / 1e9
    assert f"decodes in no less than {latency:.2f} ms" in section(NUMBERS, "Floors")


def test_traffic_formulas():
    text = section(NUMBERS, "Traffic of a block")
    dim, hidden, size = FULL.model_dim, FULL.hidden_dim, 2
    td, matrix = TOKENS * dim * size, dim * hidden * size
    assert (hidden, matrix) == (4 * dim, 4 * dim**2 * size)
    assert f"{td / MEGA:.1f} MB at 32 768 tokens" in text
    # dwconv, expand, project, each what it reads and writes
    assert f"= {(2 * td + (td + matrix + 4 * td) + (4 * td + td + matrix + td)) / MEGA:.0f} MB" in text
    assert f"77 TD = {77 * td / GIGA:.2f} GB" in text and 2 + 12 + 5 + 8 + 40 + 5 + 5 == 77
    product = 2 * TOKENS * dim * hidden
    assert product == 8 * TOKENS * dim**2
    intensities = [round(product / n) for n in (td + matrix + 4 * td, 4 * td + 2 * td + matrix)]
    assert "{} and {} FLOP per byte".format(*intensities) in text


def test_one_step_of_sampling():
    start, end = noise_levels(FULL, FullCapacitorInferenceConfig())
    ratio = end.sigma / start.sigma
    image, noise = end.alpha - ratio * start.alpha, ratio * start.sigma * FULL.pixel_noise_std
    assert f"out = {image:.10f} * x0 + {noise:.10f} * n" in NUMBERS


def test_launches_and_limits():
    text = section(NUMBERS, "Floors")
    for direction, word in (("encode", "per encode"), ("decode", "per one-step decode")):
        steps = make_plan(FULL, PlanKey(direction, 1, 256, 256, torch.bfloat16, torch.float32, "nchw", 90)).steps
        assert f"{len(steps)} {word}" in text
    limits = ", ".join(str(LIMITS[cc].smem_per_cta) for cc in (80, 89, 90, 100, 120))
    assert limits in section(NUMBERS, "Gates without a GPU")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder with `photos` and their cache `latents`: two sizes, one file that is no image, one cut short."""
    folder = tmp_path_factory.mktemp("docs")
    photos = folder / "photos"
    photos.mkdir()
    for i, size in enumerate([(64, 64), (80, 60), (64, 128)]):
        Image.fromarray(pixels(*size, seed=i)).save(photos / f"{i}.png")
    (photos / "cut.png").write_bytes((photos / "0.png").read_bytes()[:-200])
    (photos / "text.jpg").write_text("no image")
    request = CacheRequest(64, area=True, posterior=True, flip=True)
    cache_images(photos, folder / "latents", "sample", request, workers=0, progress=False)
    return folder


def fields(page: str) -> set[str]:
    """Words in backquotes of the first column of the tables of a text, and `.name` after `group.name` in full."""
    found = set()
    for line in page.splitlines():
        group = ""
        for word in re.findall(r"`([\w.]+)`", line.partition(" |")[0]) if line.startswith("|") else ():
            group = word.rpartition(".")[0] or group
            found.add(group + word if word.startswith(".") else word)
    return found


def test_cache_is_read_without_this_package(cache, monkeypatch):
    (snippet,) = re.findall(r"```python\n(.*?)```", FORMAT, re.S)
    assert "capacitor_rt" not in snippet
    monkeypatch.chdir(cache)
    names: dict = {}
    exec(snippet, names)
    dataset = LatentDataset("latents", verify=True)
    assert set(names["latents"]) == {"0.png", "1.png", "2.png"} == {dataset[i]["id"] for i in range(len(dataset))}
    for i in range(len(dataset)):
        assert torch.equal(names["latents"][dataset[i]["id"]], dataset[i]["latents"])
    assert len(names["mean"]) == len(names["std"]) == names["plan"]["model"]["channels"]


def test_cache_page_names_every_file(cache):
    patterns = section(
        FORMAT.replace("# The cache format", "## The cache format"), "The cache format: `capacitor-latents/2`"
    )
    tree = [line.split()[0].removeprefix("OUT/") for line in patterns.splitlines() if line.startswith("OUT/")]
    known = [re.sub(r"\\\{\w+(:06d)?\\\}", r"\\w+", re.escape(name)) for name in tree]
    files = [p.relative_to(cache / "latents").as_posix() for p in (cache / "latents").rglob("*") if p.is_file()]
    assert all(any(re.fullmatch(pattern, name) for pattern in known) for name in files), files
    # and of everything that it names but the lock there is one here
    passing = ("lock", "leases", "damaged", "generations", r"source\-", r"commits\-", r"carried\-", r"\.rows")
    assert all(any(re.fullmatch(p, name) for name in files) for p in known if not any(w in p for w in passing)), known


def test_cache_page_names_every_field(cache):
    out = cache / "latents"
    plan = json.loads((out / "plan.json").read_bytes())
    nested = ("source", "geometry", "pixels", "model", "store")
    present = {k for k in plan if k not in nested} | {f"{k}.{name}" for k in nested for name in plan[k]}
    # of a machine on which nobody tuned
    absent = {*PLAN_SCHEMA.optional}
    absent |= {f"{k}.{name}" for k in ("source", "model", "store") for name in PLAN_SCHEMA.fields[k].optional}
    assert fields(section(FORMAT, "`plan.json`")) == present | absent
    assert fields(section(FORMAT, "Index")) == set(index_schema(is_update=True).names)
    types = {name: row[1] for row in rows(section(FORMAT, "Index")) for name in re.findall(r"`(\w+)`", row[0])}
    arrow = {field.name: str(field.type) for field in index_schema(is_update=True)}
    shown = {"float": "float32", "fixed_size_binary[16]": "binary(16)"}
    assert types == {name: shown.get(kind, kind) for name, kind in arrow.items()}
    assert fields(section(FORMAT, "Tasks")) == set(plan["store"]["tensors"])
    commit = json.loads((out / "commits.jsonl").read_text().splitlines()[0])
    assert set(commit) <= set(re.findall(r"`(\w+)`", section(FORMAT, "`commits.jsonl`")))
    entry = json.loads((out / "quarantine.jsonl").read_text().splitlines()[0])
    assert set(entry) <= set(re.findall(r"`(\w+)`", section(FORMAT, "`quarantine.jsonl`")))
    assert fields(section(FORMAT, "`quarantine.jsonl`")) == {*REASONS, NAN_LATENT} - set(RETRYABLE)
    assert all(f"`{reason}`" in section(FORMAT, "`quarantine.jsonl`") for reason in RETRYABLE)


def test_source_table_is_as_described(cache):
    import hashlib

    import pyarrow.parquet as pq

    table = pq.read_table(cache / "latents" / "source.parquet")
    text = section(FORMAT, "`source.parquet`")
    assert all(f"`{name}`" in text for name in table.column_names)
    locators = table["locator"].to_pylist()
    digest = hashlib.sha256(np.array([len(name) for name in locators], "<i8").tobytes() + b"".join(locators))
    for column in (table["size"].to_numpy(), table["offset"].to_numpy(), np.full(len(locators), -1)):
        digest.update(column.astype("<i8").tobytes())
    plan = json.loads((cache / "latents" / "plan.json").read_bytes())
    assert digest.hexdigest() == plan["source"]["sha256"]


def test_identity_and_hashes_are_as_described(cache):
    import hashlib

    import pyarrow.parquet as pq
    from safetensors import safe_open

    out = cache / "latents"
    text = (out / "plan.json").read_bytes()
    plan = json.loads(text)
    checksum = plan.pop("sha256")
    assert hashlib.sha256(canonical_json(plan)).hexdigest() == checksum
    names = ("format", "pipeline", "source", "columns", "geometry", "pixels", "store", "model")
    same = {k: plan[k] for k in names}
    same["model"] = {k: v for k, v in plan["model"].items() if k not in ("id", "revision", "latent_space")}
    identity = hashlib.sha256(canonical_json(same)).hexdigest()
    for commit in map(json.loads, (out / "commits.jsonl").read_text().splitlines()):
        bare = {k: v for k, v in commit.items() if k != "sum"}
        assert xxhash.xxh3_64_hexdigest(canonical_json(bare)) == commit["sum"]
        index, data = (
            out / f"{folder}/{identity[:8]}-{commit['task']:06d}.{kind}"
            for folder, kind in (("index", "parquet"), ("tasks", "safetensors"))
        )
        for name, path in (("index", index), ("data", data)):
            assert xxhash.xxh3_128_hexdigest(path.read_bytes()) == commit[f"{name}_xxh3"]
            assert path.stat().st_size == commit[f"{name}_bytes"]
        table = pq.read_table(index)
        assert table.schema.metadata[b"plan"] == text
        with safe_open(data, framework="pt") as file:
            metadata = file.metadata()
            assert (metadata["plan"], metadata["index_xxh3"]) == (identity, commit["index_xxh3"])
            for row in table.to_pylist():
                if row["status"] != "ok":
                    continue
                bucket = "{}x{}".format(*plan["geometry"]["buckets"][row["bucket"]])
                tensors = [file.get_slice(f"{kind}/{bucket}")[row["row"]] for kind in plan["store"]["tensors"]]
                row_bytes = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
                assert xxhash.xxh3_128_digest(row_bytes) == row["row_hash"]
                assert row["std"] == pytest.approx(np.std(tensors[0].float().numpy()), rel=1e-4)


def test_changelog_names_what_there_is():
    """The newest version is this one, and each new place in the table of renamed internals exists."""
    version = re.search(r"^## (\d+\.\d+\.\d+)", CHANGELOG, re.M)[1]
    assert version == importlib.import_module("capacitor_rt").__version__
    places = [name for row in rows(CHANGELOG) for name in re.findall(r"`((?:capacitor_\w+|bench)[\w.]*)`", row[1])]
    assert len(places) > 10
    for place in places:
        try:
            importlib.import_module(place)
        except ModuleNotFoundError:
            module, _, name = place.rpartition(".")
            assert hasattr(importlib.import_module(module), name), place


PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_files_exist(page):
    from capacitor_rt.cli.app import app

    text = page.read_text()
    registered = {c.name or c.callback.__name__ for c in app.registered_commands}
    assert set(re.findall(r"(?:^|`)capacitor-rt (\w+)", text, re.M)) <= registered
    for name in re.findall(r"python -m bench[ .]([a-z]\w*)", text):
        assert (ROOT / "bench" / f"{name}.py").exists(), name
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([\w-]+)|^make ([\w-]+)", text, re.M)) <= {(t, "") for t in targets} | {
        ("", t) for t in targets
    }
    for name in re.findall(r"`((?:tests|bench|kernels|docs|capacitor_rt)/[\w./]*)`", text):
        # the changelog also names what is gone, by module, never by file
        assert (ROOT / name).exists(), name


def test_code_cites_files_that_are_here():
    """Every page that a docstring, comment or page of the repository names stands in it."""
    tops = ("capacitor_rt", "kernels", "bench", "tests", "docs")
    pages = [*ROOT.glob("*.md"), *(page for top in tops for page in (ROOT / top).rglob("*.md"))]
    here = [f"/{page.relative_to(ROOT).as_posix()}" for page in pages]
    citing = [path for top in tops for path in (ROOT / top).rglob("*.py")] + pages
    cited = {
        (path, name) for path in citing for name in re.findall(r"\b(?:docs/[\w-]+|[A-Z_]+)\.md\b", path.read_text())
    }
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, name in sorted(cited)
        if not any(page.endswith(f"/{name}") for page in here)
    ]
    assert not missing
