"""The names that a configuration may use, declared so that checking one imports neither torch nor what is named.

A test compares them with what the modules offer.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Names(Collection[str]):
    """The keys of the table `table` in the module `home`, and those that a program has added to it at run time."""

    home: str
    table: str
    declared: tuple[str, ...]

    def __iter__(self) -> Iterator[str]:
        added = getattr(sys.modules.get(self.home), self.table, ())  # only who has imported it can have added to it
        return iter(dict.fromkeys([*self.declared, *added]))

    def __len__(self) -> int:
        return len(tuple(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in tuple(iter(self))


DATASETS = Names(
    "certtrain.data",
    "DATASETS",
    ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn", "tinyimagenet", "npz", "folder"),
)
MODELS = Names(
    "certtrain.models",
    "MODELS",
    (
        "cnn7",
        "cnn7-wide",
        "wide-resnet",
        "resnext",
        "cnn-large",
        "cnn-small",
        "cnn-2layer",
        "cnn-3layer",
        "cnn-4layer",
        "mlp",
        "vit",
    ),
)
INITIALIZATIONS = Names(
    "certtrain.initialization", "INITIALIZATIONS", ("ibp", "kaiming", "xavier", "orthogonal", "default")
)
ARITHMETICS = Names("certtrain.bounds.rounding.arithmetic", "ARITHMETICS", ("float32", "tf32", "bf16", "float64"))
ATTACKS = ("pgd", "apgd-ce", "apgd-dlr", "apgd-t")

# Of torch.optim; neither LBFGS, whose step needs the loss again, nor SparseAdam, which takes sparse gradients only.
OPTIMIZERS = (
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "Muon",  # for hidden linear layers; AdamW for the other parameters
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)
