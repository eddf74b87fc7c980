"""What differs between an existing plan and what is asked for now: a cache is never mixed."""

from __future__ import annotations

from typing import Any

from ..errors import CacheError
from .commits import read_log
from .folder import CacheFolder
from .model_source import ModelIdentity
from .plan import MODEL_NAMES, PIPELINE, CachePlan, code_versions
from .request import DTYPES, CacheRequest, geometry, pixels


def check_plan(old: CachePlan, request: CacheRequest, model: ModelIdentity, folder: CacheFolder) -> None:
    """Refuse to continue a cache under other settings or with another model.

    Raises:
        CacheError: names every field with its old and its new value.
    """
    changes = plan_changes(old, request, model)
    if changes:
        started = any(commit.rows for commit in read_log(folder, old).commits.values())
        raise CacheError(
            f"{folder.path} was planned otherwise, and a cache is never mixed: use the old settings, or "
            + ("cache into a new OUT" if started else f"delete {folder.path}, which holds no latents yet"),
            changes,
        )


def plan_changes(old: CachePlan, request: CacheRequest, model: ModelIdentity) -> list[str]:
    """Every field that differs, with its old and its new value, one line each."""
    fields = old.fields
    store = {
        "dtype": DTYPES[request.dtype],
        "posterior": request.posterior,
        "flip": request.flip,
        "dedupe": request.dedupe,
        "batch": request.batch or old.batch,
        "task_inputs": request.task_inputs or old.task_inputs,
    }
    stored = {
        "dtype": old.dtype,
        "posterior": "logsnr" in old.tensors,
        "flip": "latents_flip" in old.tensors,
        "dedupe": fields["store"].get("dedupe", False),
        "batch": old.batch,
        "task_inputs": old.task_inputs,
    }
    placed = {k: v for k, v in fields["geometry"].items() if k not in ("buckets", "multiple")}
    changed = differences("geometry.", placed, geometry(request))
    if not changed and old.buckets != request.buckets(model.multiple):
        changed = ["geometry.buckets are not those that follow from the rest"]
    model_new, model_old = model.fields(), dict(fields["model"])
    if model_new["sha256"] == model_old["sha256"]:
        # the same weights under another name are the same model
        for key in MODEL_NAMES:
            model_old.pop(key), model_new.pop(key)
    return [
        *differences("", {"pipeline": fields["pipeline"]}, {"pipeline": PIPELINE}),
        *changed,
        *differences("pixels.", fields["pixels"], pixels(request)),
        *differences("model.", model_old, model_new),
        *differences("store.", stored, store),
    ]


def differences(prefix: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each key whose value differs, objects key by key."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(f"{prefix}{key}.", a, b)
        elif a != b:
            lines.append(f"{prefix}{key} {a} -> {b}")
    return lines


def version_notes(plan: CachePlan) -> list[str]:
    """A line on the libraries whose versions have changed since the cache was planned."""
    now, planned = code_versions(), plan.fields["code"]
    changed = [f"{k} {planned.get(k)} -> {v}" for k, v in now.items() if planned.get(k) != v]
    return [f"other versions than when the cache was planned: {', '.join(changed)}"] if changed else []
