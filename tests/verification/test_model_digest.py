"""Networks that compute something else have another digest; the same network has the same one everywhere."""

from __future__ import annotations

import copy
import io
import os
import re
import subprocess
import sys
from array import array
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from certtrain.data import Split
from certtrain.errors import UsageError
from certtrain.models import build_model
from certtrain.verification.model_digest import model_digest
from certtrain.verification.verify import verify

X = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    """A linear layer of the image times `factor_of(self.setting)`."""

    def __init__(self, setting, factor_of):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.setting, self.factor_of = nn.Linear(64, 3), setting, factor_of

    def forward(self, x):
        return self.layer(x.flatten(1) * self.factor_of(self.setting))


@dataclass
class Options:
    factor: float
    other: object = None


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor):
        self.factor = factor


def itself(value):
    return value


def only(value):
    return next(iter(value))


def of_options(value):
    return value.factor


def called(value):
    return value(torch.tensor(1.0))


def first_layer(size):
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, size)
    nn.init.zeros_(layer.bias)
    return layer


def circular(factor):
    options = Options(factor)
    options.other = [options]
    return options


SETTINGS = {
    "a number": (float, itself),
    "a word": (str, float),
    "a list": (lambda factor: [[factor]], lambda value: value[0][0]),
    "a dict": (lambda factor: {"factor": factor}, lambda value: value["factor"]),
    "a set": (lambda factor: {factor}, only),
    "a tensor": (torch.tensor, itself),
    "an array": (np.array, float),
    "an array of objects": (lambda factor: np.array([factor, None]), only),
    "an array of numbers": (lambda factor: array("d", [factor]), only),
    "bytes": (lambda factor: bytearray([int(factor)]), only),
    "a pattern": (lambda factor: re.compile(f"{factor}"), lambda value: float(value.pattern)),
    "a namespace": (lambda factor: SimpleNamespace(factor=factor), of_options),
    "a dataclass": (Options, of_options),
    "slots": (Slotted, of_options),
    "an object that holds itself": (circular, of_options),
    "a module that is not registered": (lambda factor: [first_layer(factor)], lambda value: value[0](torch.ones(1))),
    "a partial function": (lambda factor: partial(torch.mul, factor), called),
    "a closure": (lambda factor: lambda x: x * factor, called),
    "a function's default": (lambda factor: eval(f"lambda x, factor={factor}: x * factor"), called),
    "code": (lambda factor: eval(f"lambda x: x * {factor}"), called),
    "a torch function": (lambda factor: torch.exp if factor == 1.0 else torch.log1p, called),
}


def of_setting(name, factor):
    make, factor_of = SETTINGS[name]
    return Scaled(make(factor), factor_of)


def of_class(factor, attribute):
    class Own(nn.Module):
        if attribute:
            factor_ = factor

            def forward(self, x):
                return x.flatten(1) * self.factor_
        elif factor == 1.0:

            def forward(self, x):
                return x.flatten(1)
        else:

            def forward(self, x):
                return -x.flatten(1)

    return Own()


def of_hook(factor):
    model = nn.Sequential(nn.Flatten())
    model.register_forward_hook(lambda module, args, output: output * factor)
    return model


def of_vit(factor):
    torch.manual_seed(0)
    options = {"depth": 1, "width": 16, "patch": 4, "heads": 2 if factor == 1.0 else 4}
    return build_model("vit", (1, 8, 8), 10, options=options).eval()


NETWORKS = {
    **{name: partial(of_setting, name) for name in SETTINGS},
    "an attribute of the class": partial(of_class, attribute=True),
    "another forward": partial(of_class, attribute=False),
    "a hook": of_hook,
    "a transformer's heads": of_vit,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_computes_something_else_has_another_digest(name):
    one, other = (NETWORKS[name](factor) for factor in (1.0, 2.0))
    assert not torch.equal(one(X), other(X))
    assert model_digest(one) != model_digest(other)


READ = {  # what a forward reads, and how it makes a factor of 1.0 or 2.0 of it
    "a number": (float, itself),
    "a dict": (lambda factor: {"factor": factor}, lambda value: value["factor"]),
    "a list": (lambda factor: [factor], only),
    "an array": (lambda factor: np.array([factor]), only),
    "a partial function": (lambda factor: partial(F.leaky_relu, negative_slope=factor), lambda value: -value(-ONE)),
    "a module": (lambda factor: nn.LeakyReLU(factor), lambda value: -value(-ONE)),
    "an object": (Options, of_options),
    "a function": (lambda factor: eval(f"lambda: {factor}"), lambda value: value()),
}
ONE = torch.tensor(1.0)
SOURCE = """
import numpy, torch
from torch import nn
import helpers, package.deep
from package import deep
VALUE = None
class Here(nn.Module):
    def forward(self, x):
        return x.flatten(1) * FACTOR_OF(VALUE)
class InAModule(nn.Module):
    def forward(self, x):
        return x.flatten(1) * FACTOR_OF(helpers.VALUE)
class Deeper(nn.Module):
    def forward(self, x):
        return x.flatten(1) * FACTOR_OF(package.deep.VALUE)
class ByItsName(nn.Module):
    def forward(self, x):
        return x.flatten(1) * FACTOR_OF(deep.VALUE)
class ThroughAFunction(nn.Module):
    def forward(self, x):
        return x.flatten(1) * FACTOR_OF(helpers.value())
"""
READERS = {
    "Here": "own",
    "InAModule": "helpers",
    "Deeper": "package.deep",
    "ByItsName": "package.deep",
    "ThroughAFunction": "helpers",
}


@pytest.fixture
def modules(monkeypatch):
    """`own`, whose networks read `VALUE` in it and in other modules that it imports."""
    sources = {"helpers": "def value(): return VALUE", "package": "", "package.deep": "", "own": SOURCE}
    made = {name: ModuleType(name) for name in sources}
    made["package"].deep, made["package"].__path__ = made["package.deep"], []
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
        exec(sources[name], vars(module))
    return made


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", READ)
def test_what_a_forward_reads_elsewhere_is_in_the_digest(kind, reader, modules):
    make, modules["own"].FACTOR_OF = READ[kind]
    outputs, digests = [], []
    for factor in (1.0, 2.0, 1.0):
        modules[READERS[reader]].VALUE = make(factor)
        model = getattr(modules["own"], reader)()
        digests.append(model_digest(model))
        outputs.append(model(X))
    assert not torch.equal(outputs[0], outputs[1])
    assert digests[0] != digests[1]
    assert digests[0] == digests[2]


def test_tables_that_an_installed_package_fills_are_not_in_the_digest(modules):
    modules["helpers"].__file__ = "/usr/lib/python3/site-packages/helpers.py"
    modules["own"].FACTOR_OF = lambda value: 1.0
    digests = set()
    for table in ({}, {"seen": 1}):
        modules["helpers"].VALUE = table
        digests.add(model_digest(modules["own"].InAModule()))
    assert len(digests) == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_is_built_again_copied_or_in_another_mode_is_the_same(name):
    network, again = NETWORKS[name](1.0), NETWORKS[name](1.0)
    expected = model_digest(network)
    again(X)
    assert model_digest(again) == model_digest(copy.deepcopy(network)) == expected
    assert model_digest(network.train()) == model_digest(network.eval()) == expected


def test_a_network_that_is_saved_and_loaded_is_the_same():
    network, file = of_vit(1.0), io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    assert model_digest(torch.load(file, weights_only=False)) == model_digest(network)


DIGESTS = """
from tests.verification.test_model_digest import NETWORKS, model_digest
print(*(model_digest(make(1.0)) for make in NETWORKS.values()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "7"])
def test_digests_are_those_of_another_process(seed):
    """Whatever order its sets have, and wherever its objects lie."""
    found = subprocess.run(
        [sys.executable, "-c", DIGESTS], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
    )
    assert found.stdout.split() == [model_digest(make(1.0)) for make in NETWORKS.values()], found.stderr


def test_results_of_a_transformer_of_other_heads_are_refused(tmp_path):
    data = Split((X * 255).byte(), torch.tensor([0, 1]))
    file = tmp_path / "results.jsonl"
    for _ in range(2):
        verify(of_vit(1.0), data, 0.01, results=file)
    with pytest.raises(UsageError, match=r"another question: model_sha256 is .* there"):
        verify(of_vit(2.0), data, 0.01, results=file)
