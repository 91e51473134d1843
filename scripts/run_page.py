"""Do what a page of the documentation says, as its reader would, in an empty folder.

    python scripts/run_page.py docs/tutorial.md

One after the other: files that the page shows (a code block with a title) are written, `sh` blocks are run by bash,
`python` blocks by the Python that runs this script, whose programs come first on the path. Everything is printed; the
first block that fails ends it, with exit code 1.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of code: its language, the file it is to be written to, and where it begins."""

    language: str
    title: str | None
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """The page's blocks of code, in order."""
    content = page.read_text()
    for match in FENCE.finditer(content):
        yield Block(match[1], match[2], match[3], content.count("\n", 0, match.start()) + 1)


def commands(page: Path, folder: Path) -> Iterator[tuple[Block, dict[str, Any]]]:
    """The blocks to run, each with the arguments of `subprocess.run`; the page's files are written on the way."""
    kinds = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    programs = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for block in blocks(page):
        if block.title is not None:
            (folder / block.title).write_text(block.text)
        elif block.language in kinds:
            yield block, {"args": [*kinds[block.language], block.text], "cwd": folder, "env": programs}


def run(page: Path, folder: Path) -> int:
    """Returns the exit code of the first block that fails, or 0."""
    for block, command in commands(page, folder):
        print(f"--- {page}:{block.line}\n{block.text}", flush=True)
        code = subprocess.run(**command).returncode
        if code != 0:
            print(f"{page}:{block.line}: exit code {code}", file=sys.stderr)
            return code
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="+", metavar="PAGE")
    for page in parser.parse_args().pages:
        with tempfile.TemporaryDirectory() as folder:
            if run(page, Path(folder)) != 0:
                return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
