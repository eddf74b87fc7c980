"""README.md of what is pushed: what it is, where it came from, how to load it. Generated, in Markdown with YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import ModelConfig
from ..version import __version__

if TYPE_CHECKING:
    from ..cache.dataset import LatentDataset
    from ..cache.verify import Verification

NAMES = 20
"""Of classes, on a card."""
HOME = "https://huggingface.co/data-archetype/full_capacitor"


def cache_card(dataset: LatentDataset, found: Verification, repo_id: str, revision: str | None) -> str:
    """Card of a cache: the model, the latent space, tensors, buckets, rows, and how to load it."""
    fields = dataset.plan.fields
    model, store, geometry = fields["model"], fields["store"], fields["geometry"]
    counts = np.bincount(dataset.bucket_numbers, minlength=len(dataset.buckets))
    buckets = [
        f"| {size.height} x {size.width} | {_shape(model, size)} | {count:,} |"
        for size, count in zip(dataset.buckets, counts.tolist(), strict=True)
    ]
    facts = {
        "model": _model_name(model),
        "weights, SHA-256": f"`{model['sha256']}`",
        "latent space": f"`{dataset.latent_space}`",
        "tensors": ", ".join(f"`{name}`" for name in dataset.plan.tensors) + f", {store['dtype']}",
        "rows": f"{len(dataset):,} of {found.inputs:,} images",
        "size": f"{found.nbytes / 1e9:,.1f} GB" if found.nbytes >= 1e9 else f"{found.nbytes / 1e6:.1f} MB",
        "images": f"{_sizing(geometry)}; crop: {geometry['crop']}",
        **_columns(dataset),
        "plan": f"`{dataset.plan.id}`",
    }
    at = f', revision="{revision}"' if revision else ""
    return "\n".join(
        [
            "---",
            "tags:",
            "- latents",
            "- capacitor-rt",
            "- image-autoencoder",
            "viewer: false",
            "---",
            "",
            f"# {_text(repo_id)}",
            "",
            f"Latents of {len(dataset):,} images for [full_capacitor]({HOME}) and its family, cached by capacitor_rt",
            f"{__version__}. They are whitened: in the space that is named below, and in no other model's.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in facts.items()),
            "",
            "| image, height x width | latents | rows |",
            "|---|---|---:|",
            *buckets,
            "",
            "```python",
            "from huggingface_hub import snapshot_download",
            "from capacitor_rt import LatentDataset",
            "",
            f'dataset = LatentDataset(snapshot_download("{repo_id}", repo_type="dataset"{at}))',
            'dataset[0]["latents"]',
            "```",
            "",
        ]
    )


def model_card(
    config: ModelConfig | Any,
    tensors: Mapping[str, Any],
    repo_id: str,
    revision: str | None,
    adapter: str | None = None,
) -> str:
    """Card of a model: its architecture, its size, and how to load it; `adapter`, the class that it was saved by."""
    count = sum(int(np.prod(shape)) for shape in tensors.values())
    at = f', revision="{revision}"' if revision else ""
    settings = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    return "\n".join(
        [
            "---",
            "library_name: capacitor-rt",
            "tags:",
            "- image-autoencoder",
            "- capacitor-rt",
            "---",
            "",
            f"# {_text(repo_id)}",
            "",
            f"An image autoencoder of the family of [full_capacitor]({HOME}), {count / 1e6:,.1f} M parameters, latents",
            f"`[{config.latent_channels}, H/{config.latent_stride}, W/{config.latent_stride}]`. Saved by capacitor_rt",
            f"{__version__}.",
            "",
            "| | |",
            "|---|---|",
            *(f"| `{name}` | {_text(str(value))} |" for name, value in settings.items()),
            "",
            "```python",
            "from capacitor_rt import FullCapacitor",
            "",
            f'model = FullCapacitor.from_pretrained("{repo_id}"{at})',
            "```",
            "",
            *(_adapter_lines(adapter, repo_id, at) if adapter else ()),
        ]
    )


def _adapter_lines(adapter: str, repo_id: str, at: str) -> list[str]:
    if not adapter.isidentifier():
        return []
    return [
        "Behind the interface of a diffusers autoencoder, with the arguments that it was saved with:",
        "",
        "```python",
        f"from capacitor_rt.adapters import {adapter}",
        "",
        f'vae = {adapter}.from_pretrained("{repo_id}"{at})',
        "```",
        "",
    ]


def _columns(dataset: LatentDataset) -> dict[str, str]:
    """What a cache holds of each image beside latents: labels with their names, captions, columns of the source."""
    kinds = {column["name"]: column["type"] for column in dataset.plan.columns}
    found = {}
    if "label" in kinds:
        names = dataset.label_names
        shown = f": {_names(names)}" if names else ""
        found["labels"] = f"{len(names):,} classes{shown}" if names is not None else "numbers of the source"
    if "caption" in kinds:
        empty = dataset.column("caption").null_count
        found["captions"] = f"{len(dataset) - empty:,} of {len(dataset):,} rows"
    kept = [f"`{_text(name)}` ({kind})" for name, kind in kinds.items() if name not in ("label", "caption")]
    if kept:
        found["columns"] = ", ".join(kept)
    return found


def _names(names: list[str]) -> str:
    shown = ", ".join(_text(name[:40]) for name in names[:NAMES])
    return shown + (", ..." if len(names) > NAMES else "")


def _shape(model: dict[str, Any], size: Any) -> str:
    return f"{model['channels']} x {size.height // model['stride']} x {size.width // model['stride']}"


def _sizing(geometry: dict[str, Any]) -> str:
    side = geometry["side"]
    return f"{side} x {side}" if geometry["mode"] == "size" else f"about {side} x {side} in area, by aspect ratio"


def _model_name(model: dict[str, Any]) -> str:
    """The hub id with its commit; of a local model only the last part of its path: the rest is private."""
    name = str(model["id"])
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return f"[{name}](https://huggingface.co/{name})" + (f" at `{model['revision']}`" if model["revision"] else "")
    return _text(re.split(r"[/\\]", name)[-1])


def _text(value: str) -> str:
    """Text that stays within its cell or heading."""
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", re.sub(r"\s+", " ", value))
