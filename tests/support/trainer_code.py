"""The trainers' own readers: packages of the index, and files by path from checkouts under CAPACITOR_TRAINERS.

Nothing of them is kept here.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from capacitor_rt.cache.export import mds

VARIABLE = "CAPACITOR_TRAINERS"


def checkout(*names: str) -> Path:
    """The file `names` below the folder of checkouts, or skip with what is missing."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} names no folder with checkouts of the trainers")
    path = Path(folder, *names)
    if not path.exists():
        pytest.skip(f"{path} is not there: clone {names[0]} into {folder}")
    return path


def load(path: Path) -> ModuleType:
    """A file as a module of a name of its own: some packages there are called like others that are installed."""
    name = f"trainer_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def package(name: str, folder: Path) -> None:
    """Let `name` be a package in `folder` whose `__init__` is not run, and so its parents."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        full = ".".join(parts[:depth])
        module = sys.modules.setdefault(full, ModuleType(full))
        if not hasattr(module, "__path__"):
            module.__path__ = []
            module.__spec__ = ModuleSpec(full, None, is_package=True)
    sys.modules[name].__path__ = [str(folder)]


def streaming() -> ModuleType:
    """mosaicml-streaming, of which `streaming.base` alone is run, or skip.

    Its other packages want a torchvision that fits torch, and have to do with pictures and text rather than with MDS.
    """
    if hasattr(sys.modules.get("streaming"), "StreamingDataset"):
        return sys.modules["streaming"]
    spec = importlib.util.find_spec("streaming")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("mosaicml-streaming is not installed: `make test` installs it")
    # what a failed import of the whole left behind
    for name in [name for name in sys.modules if name.partition(".")[0] == "streaming"]:
        del sys.modules[name]
    package("streaming", Path(spec.submodule_search_locations[0]))
    base = importlib.import_module("streaming.base")
    module = sys.modules["streaming"]
    for name in base.__all__:
        setattr(module, name, getattr(base, name))
    # an export that ran before may have found that streaming cannot be imported whole
    mds._reader.cache_clear()
    return module


def cook(sample):
    """As NeMo's cook, nemo/collections/diffusion/data/diffusion_taskencoder.py."""
    from megatron.energon import basic_sample_keys

    return {**basic_sample_keys(sample), **{k: sample[k] for k in ("json", "pth", "pickle")}}


def energon_samples(folder, encoder=None, **options):
    """The samples of a folder through energon, encoded by a class of task encoders."""
    from megatron import energon

    class Encoder(encoder or energon.DefaultTaskEncoder):
        cookers = [energon.Cooker(energon.stateless(cook))]  # noqa: RUF012

        @energon.stateless
        def batch(self, samples):
            return samples

    dataset = energon.get_train_dataset(
        str(folder),
        batch_size=1,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        task_encoder=Encoder(**options),
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        repeat=False,
    )
    return (sample for batch in energon.get_loader(dataset) for sample in batch)


def cut(path: Path, *names: str, **namespace: Any) -> dict[str, Any]:
    """Top-level functions and classes of a file that cannot be imported, run in `namespace`."""
    tree = ast.parse(path.read_text())
    found = [node for node in tree.body if getattr(node, "name", None) in names]
    assert len(found) == len(names), f"{path} has no more {names}"
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, *found], []), str(path), "exec"), namespace)
    return namespace
