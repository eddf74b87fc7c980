"""Text of any origin, made safe to show: on a terminal, and as text on a page."""

from __future__ import annotations

import re

# C0, DEL, C1, lone surrogates, line and paragraph separators, and what changes the direction of text
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str) -> str:
    """Text of any origin as one line that is only shown: what would act on the reader becomes a visible escape."""
    return _UNSAFE.sub(lambda match: _escape(match[0]), text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        # how Python keeps a byte of a file name that is not UTF-8
        code -= 0xDC00
    return _SHORT.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def counted(n: int, what: str) -> str:
    """A number with what is counted, "1 task" or "2 tasks": of a noun that takes an s."""
    return f"{n} {what}{'' if n == 1 else 's'}"
