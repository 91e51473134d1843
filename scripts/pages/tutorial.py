"""docs/tutorial.md: what its commands print."""

from __future__ import annotations

import re
from collections.abc import Sequence

from common import RESULTS

from pages.common import put, read

EPOCHS = (1, 2, 11, 20)  # that the page shows


def fill() -> None:
    printed = read("tutorial")["printed"]
    put(
        RESULTS.parent / "tutorial.md",
        training=shown(course(printed["training"])),
        verifying=shown(printed["verifying"]),
        checking=shown([line for line in printed["checking"] if not line.startswith("wrote")]),
    )


def shown(lines: Sequence[str]) -> str:
    return "\n".join(["```text", *map(str.rstrip, lines), "```"])


def course(lines: Sequence[str]) -> list[str]:
    """Some epochs, without how fast they went; dots for those that are left out."""
    found: list[str] = []
    for line in lines:
        epoch = re.match(r"epoch +(\d+)/", line)
        if epoch is None:
            found.append(line)
        elif int(epoch[1]) in EPOCHS:
            found.append(re.sub(r" +[\d,]+ images/s.*", "", line))
        elif found[-1] != "...":
            found.append("...")
    return found
