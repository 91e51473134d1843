"""What is said on a console, line by line."""

from __future__ import annotations

from rich.console import Console


class Output(Console):
    """Standard output. Where its reader has left, as `head` does, BrokenPipeError; nothing more is written then."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise BrokenPipeError


def tell(console: Console, line: str) -> None:
    """A line as it is: rich takes no bracket in it for a style, colours no number, and breaks no path in two."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
