"""`adapter.json`: an adapter's arguments beside the model that it was saved with."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import strict_json
from ..checkpoint import ADAPTER_NAME as NAME
from ..checkpoint import replacing
from ..config import FullCapacitorInferenceConfig
from ..errors import CheckpointError
from ..schema import Anything, Invalid, Kind, ListOf, MapOf, Number, Optional, Record, Text

_MOST_BYTES = 8 << 20
_SHARED: dict[str, Kind] = {
    # what else it holds the settings check themselves
    "inference_config": Record(
        {
            f.name: Number(1, 1000) if f.name == "num_steps" else Anything()
            for f in fields(FullCapacitorInferenceConfig)
        },
        optional=tuple(f.name for f in fields(FullCapacitorInferenceConfig)),
    ),
    "output_dtype": Optional(Text(longest=40)),
}
_STATISTICS: dict[str, Kind] = {
    "running_mean": ListOf(Number(-1e6, 1e6, whole=False), 1, 4096),
    "running_var": ListOf(Number(0, 1e6, whole=False), 1, 4096),
    "eps": Number(1e-12, 1, whole=False),
}
_ARGUMENTS: dict[str, dict[str, Kind]] = {
    "CapacitorVAE": {**_SHARED, "latent_scale": Number(1e-6, 1e6, whole=False)},
    "CapacitorFlux2VAE": {
        **_SHARED,
        "bn": Optional(Record(_STATISTICS)),
        # by its own schema
        "calibration": Optional(MapOf(Anything())),
    },
}


def write(folder: str | os.PathLike[str], adapter: str, arguments: dict[str, Any]) -> None:
    """Write the arguments of a class into `folder`, whole or not at all."""
    document = {"adapter": adapter, "arguments": arguments}
    with replacing(Path(folder) / NAME) as path:
        path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read(path: Path | None, adapter: str) -> dict[str, Any]:
    """Arguments that a file holds for the class `adapter`; none where they are another's, or there is no file.

    Raises:
        CheckpointError: the file is damaged.
    """
    found, arguments = (None, {}) if path is None else document(path)
    return arguments if found == adapter else {}


def document(path: Path) -> tuple[str, dict[str, Any]]:
    """The class and the arguments that a file holds.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        values = strict_json.read(path, _MOST_BYTES)
        Record({"adapter": Text(longest=100), "arguments": MapOf(Anything())}).check("", values)
        adapter, arguments = values["adapter"], values["arguments"]
        if known := _ARGUMENTS.get(adapter):
            Record(known, optional=tuple(known)).check("arguments", arguments)
    except (OSError, strict_json.StrictJSONError, Invalid) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): save the adapter again, or delete the file") from error
    return adapter, arguments
