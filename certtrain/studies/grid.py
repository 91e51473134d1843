"""Which choices a study's configurations are made of: study.json in its folder, by which comparisons are laid out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from certtrain.errors import CheckpointError
from certtrain.runs.files import GRID
from certtrain.runtime.files import make_folder, parse_json, write_json


class Grid(NamedTuple):
    """axes: what there are choices of; choices: of each configuration, by name, one choice for each axis."""

    axes: tuple[str, ...]
    choices: Mapping[str, tuple[str, ...]]

    def write(self, folder: Path) -> None:
        """Into a study's folder, in place of what an earlier call wrote."""
        make_folder(folder)
        write_json(folder / GRID, self._asdict())


def read_grid(folder: Path) -> Grid | None:
    """That of a study's folder; None where there is none.

    Raises:
        CheckpointError: the file is corrupt.
    """
    file = folder / GRID
    try:
        content = parse_json(file.read_bytes())
        axes, choices = _texts(content["axes"]), {name: _texts(own) for name, own in content["choices"].items()}
        if any(len(own) != len(axes) for own in choices.values()):
            raise ValueError("a configuration has not one choice for each axis")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is corrupt ({error}): certtrain study writes it anew") from error
    return Grid(axes, choices)


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError("a list of texts is expected")
    return tuple(value)
