"""What is said on a console, line by line."""

from __future__ import annotations

from rich.console import Console


def tell(console: Console, line: str) -> None:
    """A line as it is: rich takes no bracket in it for a style, colours no number, and breaks no path in two."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
