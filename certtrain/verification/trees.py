"""Trees of branch and bound, as certificates hold them: what bounds each leaf again without a search.

A leaf is a domain of one image and one wrong class j: the splits that lead to it, in order from the root, and with them
the multipliers, and the slopes below the neurons that the image's box leaves undecided, by which z_y - z_j > 0 on it.
Neurons are numbered through all that enter ReLUs, in the order of the network. Any multipliers >= 0 and any slopes in
[0, 1] give a sound bound, and leaves whose splits complement each other make up the box: nothing needs to be trusted.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from certtrain.errors import CertificateError

Array = np.ndarray
MOST_BYTES = 2**26  # of one image's trees, uncompressed: no search keeps more, and more is not read
MOST_PACKED = MOST_BYTES + 2**16  # of the same as `to_bytes` returns them: zlib may add a little


@dataclass(frozen=True)
class Trees:
    """All leaves of one image.

    undecided: (U,) int64, neurons; target: (L,) int64, class j of each leaf; splits: (L,) int64, how many each has;
    neuron, above: (S,) int64 and bool, all leaves' splits one after the other, z >= 0 or z <= 0; multiplier: (S,);
    slopes: (L, U).
    """

    undecided: Array
    target: Array
    splits: Array
    neuron: Array
    above: Array
    multiplier: Array
    slopes: Array

    @staticmethod
    def most_bytes(undecided: int, leaves: int, splits: int) -> int:
        """What trees of so many neurons, leaves and splits take uncompressed, at most."""
        return 1024 + 8 * undecided + (16 + 8 * undecided) * leaves + (8 + 1 + 8) * splits

    def to_bytes(self) -> bytes:
        from safetensors.numpy import save

        arrays = {field.name: np.ascontiguousarray(getattr(self, field.name)) for field in fields(self)}
        return zlib.compress(save(arrays))

    @classmethod
    def from_bytes(cls, content: bytes, classes: int, neurons: int) -> Trees:
        """Raises CertificateError where that holds no trees, or of another network."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        unpacker = zlib.decompressobj()
        try:
            unpacked = unpacker.decompress(content, MOST_BYTES)
            if unpacker.unconsumed_tail:
                raise CertificateError("a tree is larger than any search makes it")
            if not unpacker.eof or unpacker.unused_data:
                raise CertificateError("a tree cannot be read")
            arrays = load(unpacked)
        except (zlib.error, SafetensorError, ValueError, TypeError, KeyError) as error:
            raise CertificateError("a tree cannot be read") from error
        if arrays.keys() != {field.name for field in fields(cls)}:
            raise CertificateError("a tree does not have the parts of one")
        trees = cls(**arrays)
        trees._require_sense(classes, neurons)
        return trees

    def _require_sense(self, classes: int, neurons: int) -> None:
        kinds = {"undecided": "i", "target": "i", "splits": "i", "neuron": "i", "above": "b"}
        for field in fields(self):
            array = getattr(self, field.name)
            if array.dtype.kind != kinds.get(field.name, "f") or array.ndim != 1 + (field.name == "slopes"):
                raise CertificateError(f"a tree's {field.name} is no array of its kind")
        leaves, total = len(self.target), len(self.neuron)
        if not (
            len(self.splits) == len(self.slopes) == leaves
            and (self.splits >= 0).all()
            and int(self.splits.sum()) == len(self.above) == len(self.multiplier) == total
            and self.slopes.shape[1] == len(self.undecided)
        ):
            raise CertificateError("a tree's parts do not fit each other")
        for name, array, end in (
            ("target", self.target, classes),
            ("neuron", self.neuron, neurons),
            ("undecided", self.undecided, neurons),
        ):
            if array.size and not (array.min() >= 0 and array.max() < end):
                raise CertificateError(f"a tree's {name} is outside the network")
        if not (self.multiplier >= 0).all():
            raise CertificateError("a tree has a multiplier that is not at least 0")
        if not ((self.slopes >= 0) & (self.slopes <= 1)).all():
            raise CertificateError("a tree has a slope that is not between 0 and 1")

    def leaf_splits(self) -> Iterator[tuple[Array, Array, Array]]:
        """Of each leaf: neurons, sides and multipliers."""
        ends = np.cumsum(self.splits)
        for start, end in zip(ends - self.splits, ends, strict=True):
            yield self.neuron[start:end], self.above[start:end], self.multiplier[start:end]


def covers(paths: Sequence[Sequence[tuple[int, bool]]]) -> bool:
    """Do these leaves, each a path of (neuron, above) from the root, make up everything?

    They do where one is the root itself; or where all that are left split one neuron first, and those above, and those
    below, make up all that lies there.
    """
    waiting = [list(paths)]
    depth = [0]
    while waiting:
        group, level = waiting.pop(), depth.pop()
        if any(len(path) == level for path in group):
            continue
        if not group or len({path[level][0] for path in group}) != 1:
            return False
        for side in (True, False):
            waiting.append([path for path in group if path[level][1] is side])
            depth.append(level + 1)
    return True
