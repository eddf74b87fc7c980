"""`adapter.json`: an adapter's arguments beside the model that it was saved with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .. import strict_json
from ..checkpoint import CheckpointSource, replacing
from ..errors import CheckpointError

NAME = "adapter.json"
_MOST_BYTES = 8 << 20


def write(folder: str | os.PathLike[str], adapter: str, arguments: dict[str, Any]) -> None:
    """Write the arguments of a class into `folder`, whole or not at all."""
    document = {"adapter": adapter, "arguments": arguments}
    with replacing(Path(folder) / NAME) as path:
        path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read(source: CheckpointSource, adapter: str) -> dict[str, Any]:
    """Arguments that were saved beside a model for the class `adapter`; none where there are none for it.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = source.weights.parent / NAME
    if not path.is_file():
        return {}
    try:
        document = strict_json.read(path, _MOST_BYTES)
        found, arguments = document["adapter"], document["arguments"]
        if not isinstance(arguments, dict):
            raise TypeError("arguments are no object")
    except (OSError, strict_json.StrictJSONError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): save the adapter again, or delete the file") from error
    return arguments if found == adapter else {}
