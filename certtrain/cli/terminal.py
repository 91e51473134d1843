"""What a terminal cannot show is written in what it can: an error in output must not end a run, nor leave it empty."""

from __future__ import annotations

import codecs
import os
import sys
from contextlib import suppress

_PLAIN = {"×": "x", "–": "-", "—": "-", "→": "->", "…": "...", "ε": "eps", "±": "+-", "’": "'", "•": "-"}


def accept_all_characters() -> None:
    """Standard output and error take every text, whatever their encoding: LANG=C, or a file name that is no UTF-8."""
    codecs.register_error("certtrain.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with suppress(OSError):  # a stream that was a file and has become a pipe
                stream.reconfigure(errors="certtrain.plain")


def ignore_size_zero() -> None:
    """COLUMNS=0 and LINES=0, of a terminal that does not know its size, are as if not set: rich takes them for one."""
    for name in ("COLUMNS", "LINES"):
        if os.environ.get(name, "").strip().strip("0") == "":
            os.environ.pop(name, None)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("unicode_escape").decode() for c in text), error.end
