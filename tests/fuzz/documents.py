"""Small files beside models, caches and exports: calibrations, config rows, an adapter's arguments, latents, logs.

Mutants are edits of the JSON, which is sealed again where it has a hash of its own, bytes, and the files themselves.
What is taken must work: numbers that come of it are finite, and an export is what it would have been.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .checkpoints import GOLDEN, NUMBERS, VALUES, Raw, damage, dump, special
from .forked import Surface, scratch
from .sources import pictures

CORPUS = Path(__file__).parent / "corpus" / "documents"
MODEL = GOLDEN / "p16"
NAMES = ("", "x", "format", "\x00", "\x1b[2J", "\n", "a" * 5000, "\ud800", "sha256")
SHARED = {"inference_config": {"num_steps": 1, "seed": 0}, "output_dtype": None}


def edit(text: str, rng: random.Random) -> tuple[str, str]:
    """Another value, key or length anywhere in a JSON text."""
    document = json.loads(text, object_pairs_hook=list)
    if not isinstance(document, list):
        document = [document]
    places: list[tuple[list[Any], int]] = []

    def walk(node: Any) -> None:
        if isinstance(node, list):
            places.extend((node, i) for i in range(len(node)))
            for child in node:
                walk(child[1] if isinstance(child, tuple) else child)

    walk(document)
    if not places:
        return text, "nothing"
    # the outer ones as often as all the numbers in lists
    within, at = rng.choice(places[:40] if rng.random() < 0.5 else places)
    key, value = within[at] if isinstance(within[at], tuple) else (None, within[at])
    what = rng.randrange(9)
    if what == 0:
        del within[at]
    elif what == 1:
        within.insert(rng.randint(0, len(within)), within[at])
    elif what == 2 and key is not None:
        within[at] = (rng.choice(NAMES), value)
    else:
        numbers = (*NUMBERS, 0.0, -0.0, 1e-300, 1e38, 1e39, 1e300, -1e300, 0.5)
        other: Any = Raw(rng.choice((*VALUES, *(json.dumps(n) for n in numbers))))
        if what == 3:
            container, i = rng.choice(places)
            other = container[i][1] if isinstance(container[i], tuple) else container[i]
        within[at] = other if key is None else (key, other)
    return dump(document), f"{key!r}" if key is not None else f"item {at}"


class Documents(Surface):
    """Files that a user may get from others, read as their readers do."""

    name = "documents"
    corpus = CORPUS

    def __init__(self) -> None:
        self.home: Path | None = None

    def warm(self) -> None:
        if self.home is not None:
            return
        self.home = Path(tempfile.mkdtemp(prefix="capacitor-documents-", dir=scratch()))
        atexit.register(shutil.rmtree, self.home, ignore_errors=True)
        os.environ["XDG_CACHE_HOME"] = str(self.home / "xdg")
        warnings.filterwarnings("ignore", message="encoding in fp8 is emulated")
        self.bases = {name: make(self.home / name) for name, make in MAKERS.items()}
        for name in READERS:
            with tempfile.TemporaryDirectory(dir=self.home) as folder:
                shutil.copytree(self.home / name, Path(folder) / name)
                READERS[name](self, Path(folder) / name)

    def write(self, seed: int, number: int, folder: Path) -> str:
        assert self.home is not None
        rng = random.Random(f"{seed}:{number}")
        name = rng.choice(list(READERS))
        shutil.copytree(self.home / name, folder / name)
        path = folder / name / rng.choice(self.bases[name])
        kind = rng.random()
        if kind < 0.75 and path.suffix in (".json", ".jsonl"):
            text, done = path.read_text(), []
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                if len(text) > 300_000 or not _is_json(text, path.suffix):
                    break
                with suppress(RecursionError):
                    text, what = edit_lines(text, rng) if path.suffix == ".jsonl" else edit(text, rng)
                    done.append(what)
            if rng.random() < 0.7:
                text = seal(name, text)
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            return f"{name}: {path.name}: {', '.join(done)}"
        if kind < 0.93:
            data, what = damage(path.read_bytes(), rng)
            path.write_bytes(data)
            return f"{name}: {path.name}: {what}"
        if name == "export" and rng.random() < 0.5:
            path = path.with_name(rng.choice(("capacitor.jsonl", ".lock", "capacitor.json")))
            path.unlink(missing_ok=True)
            path.symlink_to("../log.jsonl")
            return f"export: {path.name} is a link"
        return f"{name}: {special(path, rng)}"

    def again(self, case: Path, folder: Path) -> None:
        """A case holds the files alone that are not as they were."""
        assert self.home is not None
        for sub in case.iterdir():
            shutil.copytree(self.home / sub.name, folder / sub.name)
            shutil.copytree(sub, folder / sub.name, dirs_exist_ok=True)

    def read(self, folder: Path) -> None:
        (case,) = folder.iterdir()
        READERS[case.name](self, case)


def _is_json(text: str, suffix: str) -> bool:
    try:
        for part in text.splitlines() if suffix == ".jsonl" else [text]:
            json.loads(part)
    except (ValueError, RecursionError):
        return False
    return True


def edit_lines(text: str, rng: random.Random) -> tuple[str, str]:
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    what = rng.randrange(4)
    if what == 0:
        del lines[at]
    elif what == 1:
        lines.insert(rng.randint(0, len(lines)), lines[at])
    else:
        lines[at], _ = edit(lines[at], rng)
    return "\n".join(lines) + "\n", f"line {at}"


def seal(name: str, text: str) -> str:
    """With the hash that the contents have now, where they have one."""
    if name != "fp8":
        return text
    try:
        fields = json.loads(text)
        ranges = json.dumps(fields["ranges"], sort_keys=True, separators=(",", ":"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return text
    return json.dumps({**fields, "sha256": hashlib.sha256(ranges.encode()).hexdigest()})


def finite(tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise AssertionError("what was taken makes numbers that are none")


def copy_model(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MODEL / name, folder / name)


def make_fp8(folder: Path) -> list[str]:
    from capacitor_rt import FullCapacitor
    from capacitor_rt.fp8_calibration import Fp8Calibration, save

    copy_model(folder)
    model = FullCapacitor.from_pretrained(folder, strict_size=False)
    assert model.source is not None
    block = {"y": 2.5, "hidden": [1.5] * model.config.hidden_dim, "gain": [2.0] * model.config.hidden_dim}
    calibration = Fp8Calibration(
        {"id": "p16", "revision": None, "sha256": model.source.sha256}, {"count": 4, "failed": 0},
        tuple(block for _ in range(model.config.encoder_depth)), {}, {"torch": "2"},
    )  # fmt: skip
    save(calibration, folder / "fp8.json")
    return ["fp8.json"]


def read_fp8(surface: Documents, folder: Path) -> None:
    from capacitor_rt import FullCapacitor

    path = folder / "fp8.json"
    model = FullCapacitor.from_pretrained(folder, strict_size=False, encode_precision="fp8", fp8_calibration=path)
    finite(model.encode(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)))


def flux2(channels: int) -> dict[str, Any]:
    lines = {"a": [1.5] * channels, "b": [0.1] * channels, "r2": [0.9] * channels, "cosine": [0.95] * channels}
    lines |= {"mean_cosine": 0.95, "overall_cosine": 0.95}  # type: ignore[dict-item]
    return {
        "format": "capacitor-flux2-calibration/1", "approximate": True, "latent_space": "p16/whitened@x",
        "model": {"id": "p16", "revision": None, "sha256": None},
        "flux2": {"id": "vae", "revision": None, "sha256": None},
        "images": {"fit": 900, "held_out": 100, "failed": 0}, "code": {},
        "whitening": {"mean": [0.1] * channels, "std": [1.2] * channels},
        "batch_norm": {"running_mean": [0.1] * channels, "running_var": [1.1] * channels, "eps": 1e-4},
        "channels": list(range(channels)), "side": "after", "side_error": {"before": 1.5, "after": 0.3},
        "mean": lines, "mode": lines,
    }  # fmt: skip


def make_flux2(folder: Path) -> list[str]:
    folder.mkdir()
    (folder / "flux2.json").write_text(json.dumps(flux2(8)))
    return ["flux2.json"]


def read_flux2(surface: Documents, folder: Path) -> None:
    from capacitor_rt.errors import InputError
    from capacitor_rt.flux2_space import Flux2Calibration, from_flux2, to_flux2

    calibration = Flux2Calibration.read(folder / "flux2.json")
    str(calibration.latent_space).encode()
    if len(calibration.channels) > 1 << 16:
        raise AssertionError(f"{len(calibration.channels)} channels")
    latents = torch.linspace(-3, 3, len(calibration.channels) * 4).view(-1, 2, 2)
    for normalised in (True, False):
        for logsnr in (None, torch.ones_like(latents)):
            finite(to_flux2(latents, calibration, logsnr=logsnr, normalised=normalised))
        finite(from_flux2(latents, calibration, normalised=normalised))
    try:
        calibration.check_space("another")
    except InputError as error:
        str(error).encode()


def make_rows(folder: Path) -> list[str]:
    """Two rows of every family, as they are shipped, for sm_90."""
    from importlib import resources

    from capacitor_kernels.user_rows import DTYPES

    folder.mkdir()
    shipped = json.loads((resources.files("capacitor_kernels") / "configs" / "sm_90.json").read_text())
    # what is not tuned has rows that no user's file may have
    families = {name: rows[:2] for name, rows in shipped["families"].items() if all(r["dtype"] in DTYPES for r in rows)}
    (folder / "sm_90.json").write_text(json.dumps({"compute_capability": 90, "families": families}))
    return ["sm_90.json"]


def read_rows(surface: Documents, folder: Path) -> None:
    from capacitor_kernels import tuning, user_rows
    from capacitor_rt.config import ModelConfig
    from capacitor_rt.runtime.configs import configs_digest, configs_in_force, keep_configs

    kept = os.environ.get(user_rows.VARIABLE)
    os.environ[user_rows.VARIABLE] = str(folder)
    tuning.reload()
    try:
        found = configs_in_force(ModelConfig(), [(256, 256)], torch.bfloat16, 90)
        configs_digest(found)
        with keep_configs(found, 90):
            if configs_in_force(ModelConfig(), [(256, 256)], torch.bfloat16, 90) != found:
                raise AssertionError("kept rows are not those that were in force")
    finally:
        del os.environ[user_rows.VARIABLE]
        if kept is not None:
            os.environ[user_rows.VARIABLE] = kept
        tuning.reload()


def make_adapter(folder: Path) -> list[str]:
    copy_model(folder)
    arguments = {**SHARED, "latent_scale": 0.5}
    (folder / "adapter.json").write_text(json.dumps({"adapter": "CapacitorVAE", "arguments": arguments}))
    return ["adapter.json"]


def make_flux2_adapter(folder: Path) -> list[str]:
    from capacitor_rt import FullCapacitor

    copy_model(folder)
    channels = FullCapacitor.from_pretrained(folder, strict_size=False).latent_channels
    bn = {"running_mean": [0.1] * channels, "running_var": [1.1] * channels, "eps": 1e-4}
    arguments = {**SHARED, "bn": bn, "calibration": flux2(channels)}
    (folder / "adapter.json").write_text(json.dumps({"adapter": "CapacitorFlux2VAE", "arguments": arguments}))
    return ["adapter.json"]


def read_adapter(surface: Documents, folder: Path) -> None:
    from capacitor_rt.adapters import CapacitorFlux2VAE, CapacitorVAE

    kind = CapacitorFlux2VAE if folder.name == "flux2_adapter" else CapacitorVAE
    adapter = kind.from_pretrained(folder)
    mean = adapter.encode(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).latent_dist.mode()
    finite(mean)
    if adapter.inference_config.num_steps < 20:
        finite(adapter.decode(mean).sample)


def make_latents(folder: Path) -> list[str]:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({"latents": torch.ones(1, 16, 2, 2)}, folder / "a.safetensors", metadata={"latent_space": "x"})
    return ["a.safetensors"]


def read_latents(surface: Documents, folder: Path) -> None:
    from capacitor_rt import FullCapacitor
    from capacitor_rt.cli.latent_sources import find_latents
    from capacitor_rt.errors import InputError

    model = FullCapacitor.from_pretrained(MODEL, strict_size=False)
    for source in find_latents([folder], folder / "out", [], None):
        _, pictures = source.read()
        for n, (target, read) in enumerate(pictures):
            if target.parent != folder / "out" or n > 1000:
                raise AssertionError(f"{target}")
            model.decode(read())
            return
        raise InputError("no rows")


def make_export(folder: Path) -> list[str]:
    """A cache and an export of it, whose log and manifest another run reads."""
    from capacitor_rt import FullCapacitor
    from capacitor_rt.cache import CacheRequest, RunOptions, cache_images

    (folder / "src").mkdir(parents=True)
    for i, data in enumerate(pictures()):
        (folder / "src" / f"{i}.png").write_bytes(data)
    model = FullCapacitor.from_pretrained(MODEL, strict_size=False)
    options = RunOptions(workers=0, progress=False)
    cache_images(folder / "src", folder / "cache", model, CacheRequest(32), options=options)
    shutil.rmtree(folder / "src")
    again(folder)
    (folder / "log.jsonl").write_text("mine")
    return ["out/capacitor.json", "out/capacitor.jsonl", "out/capacitor.jsonl"]


def again(folder: Path) -> None:
    from capacitor_rt.cache.export import ExportRequest, export_cache

    export_cache(folder / "cache", folder / "out", ExportRequest("comfy", space="whitened"), progress=False)


def read_export(surface: Documents, folder: Path) -> None:
    assert surface.home is not None
    whole = surface.home / "export"
    again(folder)
    for path in (whole / "out").iterdir():
        if path.suffix == ".latent" and path.read_bytes() != (folder / "out" / path.name).read_bytes():
            raise AssertionError(f"an export ended well without {path.name}")
    if (folder / "log.jsonl").read_text() != "mine":
        raise AssertionError("a file outside was written")


MAKERS: dict[str, Callable[[Path], list[str]]] = {
    "fp8": make_fp8, "flux2": make_flux2, "rows": make_rows, "adapter": make_adapter,
    "flux2_adapter": make_flux2_adapter,
    "latents": make_latents, "export": make_export,
}  # fmt: skip
READERS: dict[str, Callable[[Documents, Path], None]] = {
    "fp8": read_fp8, "flux2": read_flux2, "rows": read_rows, "adapter": read_adapter, "flux2_adapter": read_adapter,
    "latents": read_latents, "export": read_export,
}  # fmt: skip
