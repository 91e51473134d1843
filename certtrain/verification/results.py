"""What verification finds, image by image, and a file of it that an interrupted verification goes on from."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from certtrain.errors import CheckpointError, UsageError, shown
from certtrain.runtime.files import parse_json, replaceable
from certtrain.verification.cascade import around_attack
from certtrain.verification.verdicts import Verdict

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None  # type: ignore[assignment] # a module in every other case

FORMAT = 1


@dataclass(frozen=True, eq=False)
class ImageResult:
    """What was found of one image at one radius.

    image: its position in the split; prediction: as of `Verification`; verdict: the value of a `Verdict`; margin: the
    smallest lower bound of z_y - z_j; seconds: what it took of each stage that was asked about it, of which the last
    has proved it if any has; domains: how many branch and bound has bounded; point: misclassified, (C, H, W), where
    attacked; tree: what proves it by branch and bound (`Trees`), where that was kept; took: seconds of its call, the
    attack included, as a share where several processes shared the images.
    """

    eps: float
    image: int
    prediction: int
    verdict: str
    margin: float
    seconds: tuple[float, ...]
    domains: int = 0
    point: Tensor | None = None
    tree: bytes | None = None
    took: float = 0.0

    @property
    def key(self) -> tuple[float, int]:
        return self.eps, self.image

    def to_json(self) -> str:
        """A line of a `ResultFile`; a margin that is not finite is null."""
        point = None if self.point is None else base64.b64encode(self.point.cpu().numpy().tobytes()).decode()
        margin = self.margin if math.isfinite(self.margin) else None
        tree = None if self.tree is None else base64.b64encode(self.tree).decode()
        return json.dumps({**vars(self), "margin": margin, "point": point, "tree": tree})

    @classmethod
    def parse(cls, line: str, question: Mapping[str, Any]) -> ImageResult:
        """Raises ValueError, KeyError or TypeError for a line that answers no part of the question."""
        content = parse_json(line)
        point, margin, seconds = content["point"], content["margin"], content["seconds"]
        if point is not None:
            values = np.frombuffer(base64.b64decode(point, validate=True), dtype="<f4")
            point = torch.from_numpy(values.reshape(question["shape"]).copy())
        result = cls(
            float(content["eps"]),
            int(content["image"]),
            int(content["prediction"]),
            content["verdict"],
            -math.inf if margin is None else float(margin),
            tuple(float(part) for part in seconds),
            int(content["domains"]),
            point,
            None if content["tree"] is None else base64.b64decode(content["tree"], validate=True),
            float(content.get("took", 0.0)),  # which earlier versions did not write
        )
        known = (
            result.verdict in tuple(Verdict)
            and result.eps in question["eps"]
            and 0 <= result.image < question["images"]
        )
        methods = question["methods"]
        least = min(1, len(around_attack(methods)[0]))  # what is asked before the attack is asked of all images
        if not (known and least <= len(result.seconds) <= len(methods)):
            raise ValueError("it is of another question")
        if (result.verdict == Verdict.ATTACKED) != (point is not None):
            raise ValueError("an image is attacked by a point")
        return result


class ResultFile:
    """JSON lines: what was asked, then a line for each image that is finished, written when it is. A context manager.

    A line that a killed process has begun is dropped. What the file says is believed: it is no proof for others.

    Args:
        path: continued where it exists.
        question: all that the results depend on, as JSON has it; `eps`, `images`, `shape` and `methods` among it.

    Raises:
        UsageError: a file of another question, or that is none of these; another process is writing it.
        CheckpointError: a line in it is corrupt, or it cannot be written.
    """

    def __init__(self, path: Path, question: Mapping[str, Any]) -> None:
        self.path = replaceable(path)
        self._question = json.loads(json.dumps({"format": FORMAT, **question}))
        self._file: BufferedWriter | None = None

    def read(self) -> list[ImageResult]:
        """Of the images that are finished already."""
        lines = self._lines()
        results: dict[tuple[float, int], ImageResult] = {}
        for number, line in enumerate(lines[1:], start=2):
            try:
                result = ImageResult.parse(line.decode(), self._question)
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{self.path}, line {number}, is no result: {shown(str(error))}") from error
            results.setdefault(result.key, result)
        return list(results.values())

    def __enter__(self) -> ResultFile:
        with ExitStack() as undone:
            try:
                self._file = undone.enter_context(open(self.path, "ab"))
                if fcntl is not None:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                whole = sum(map(len, self._lines()))
                self._file.truncate(whole)
                if not whole:
                    self._write(self._header)
            except BlockingIOError as error:
                raise UsageError(f"{self.path} is being written by another process: name another file") from error
            except OSError as error:
                raise CheckpointError(f"could not write {self.path}: {error.strerror}") from error
            undone.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, result: ImageResult) -> None:
        try:
            self._write(result.to_json().encode() + b"\n")
        except OSError as error:
            raise CheckpointError(
                f"could not write {self.path}: {error.strerror}; what is in it already will be gone on from"
            ) from error

    def _write(self, line: bytes) -> None:
        assert self._file is not None
        self._file.write(line)
        self._file.flush()

    @property
    def _header(self) -> bytes:
        return json.dumps(self._question).encode() + b"\n"

    def _lines(self) -> list[bytes]:
        """The whole lines, the first a header that agrees; none of a file that ends within it."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"could not read {self.path}: {error.strerror}") from error
        if self._header.startswith(content):  # empty, or torn
            return [content] if content == self._header else []
        lines = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
        self._require_agreement(lines[0] if lines else content)
        return lines

    def _require_agreement(self, header: bytes) -> None:
        if header == self._header:
            return
        try:
            there = parse_json(header)
            if there["format"] != FORMAT:
                raise UsageError(f"{self.path} has format {shown(there['format'])}, not {FORMAT}: name another file")
            differing = [name for name in self._question if there.get(name) != self._question[name]]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{self.path} is no file of results: name another file") from None
        pairs = [f"{name} is {shown(there.get(name))} there, {shown(self._question[name])} here" for name in differing]
        raise UsageError(f"{self.path} has results of another question: {pairs[0] if pairs else 'it asks for more'}")
