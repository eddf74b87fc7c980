"""`adapter.json`: an adapter's arguments beside the model that it was saved with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .. import strict_json
from ..checkpoint import ADAPTER_NAME as NAME
from ..checkpoint import replacing
from ..errors import CheckpointError

_MOST_BYTES = 8 << 20


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
        adapter, arguments = values["adapter"], values["arguments"]
        if not isinstance(adapter, str) or not isinstance(arguments, dict):
            raise TypeError("it names no class, or its arguments are no object")
    except (OSError, strict_json.StrictJSONError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): save the adapter again, or delete the file") from error
    return adapter, arguments
