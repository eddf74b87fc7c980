"""Data and HTML of a page: no text of the outside is ever part of a script or of markup."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...extras import require_extra
from ...printable import printable

HERE = Path(__file__).parent
ASSETS, TEMPLATES = HERE / "assets", HERE / "templates"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
)
"""Content security policy of every page: its own files alone, no inline script or style, no network."""


def script_of(name: str, data: Mapping[str, Any]) -> str:
    """A classic script that sets `window.NAME`: a page from disk may not fetch.

    In ASCII and without `<`, `>`, `&`, so that it means the same wherever it is put. NaN and infinities become null.
    """
    text = json.dumps(_finite(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'"use strict";\nwindow.{name} = {text};\n'


def _finite(value: Any) -> Any:
    """The document with None for numbers that JSON lacks, and text that no reader is misled by."""
    if isinstance(value, Mapping):
        return {printable(str(key)): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return printable(value) if isinstance(value, str) else value


def check_templates() -> None:
    """Raise MissingExtraError unless pages can be rendered here."""
    require_extra("jinja2", "view")


def render(template: str, beside: Path | None = None, **values: Any) -> str:
    """HTML of a template of ours, or of the folder `beside`; every value is escaped.

    Raises:
        MissingExtraError: Jinja2 is not installed.
    """
    jinja2 = require_extra("jinja2", "view")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*filter(None, [beside]), TEMPLATES]),
        autoescape=True,
        # before it is escaped, so that no template can forget it
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(policy=POLICY, **values)


def write_site(
    folder: Path,
    template: str,
    scripts: Sequence[str],
    data: Mapping[str, Any],
    *,
    beside: Path | None = None,
    **values: Any,
) -> None:
    """Write `index.html`, `data.js` and the assets that they need.

    Args:
        scripts: names of the scripts among the assets, in the order of loading.
        beside: a folder with a template and scripts of its own.
    """
    try:
        (folder / "data.js").write_text(script_of("capacitorPage", data), encoding="ascii")
        assets = folder / "assets"
        assets.mkdir(exist_ok=True)
        for name in ("page.css", *scripts):
            own = beside is not None and (beside / name).is_file()
            shutil.copyfile((beside if own and beside else ASSETS) / name, assets / name)
        html = render(template, beside, scripts=scripts, **values)
        (folder / "index.html").write_text(html, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the page: {error.strerror}: give another --out") from error
