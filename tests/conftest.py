import os
import random
import shutil
import sys
import tempfile

# Where no bytecode is to be written, as in many containers, each process of the suite would compile torch anew.
if sys.dont_write_bytecode:
    BYTECODE = tempfile.TemporaryDirectory(prefix="bytecode-")  # removed as this process ends, after its workers
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = BYTECODE.name
    sys.dont_write_bytecode = False
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported; certtrain/cli/main.py says why

import numpy as np
import pytest
import torch
from hypothesis import settings

from certtrain.cli import main
from tests.commands import Outcome, one_thread, train_arguments

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # of pytest -n, which share the cores
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))

# The same examples every time, so that what the suite says depends on the code alone; "default" explores.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_collectstart():
    """What a module draws as it is imported does not depend on those before it."""
    seed()


@pytest.fixture(autouse=True)
def _seeded():
    """What a test draws does not depend on the tests before it."""
    seed()


def seed():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture
def cli(capsys):
    """Run the command line in this process."""

    def run(*arguments):
        capsys.readouterr()
        try:
            with one_thread():
                code = main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(params=["alone", "by torchrun"])
def started(request, monkeypatch):
    """How the command line is started: as it is, or as the only rank of torchrun."""
    if request.param == "by torchrun":
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "0")
    return request.param


@pytest.fixture
def train(cli, tmp_path):
    """Train the tiny network into `tmp_path / "run"`."""
    return lambda *more: cli(*train_arguments(tmp_path / "run", *more))


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The directory of a finished, uninterrupted tiny run; only to be read."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    with one_thread():
        assert main(train_arguments(folder)) == 0
    return folder


@pytest.fixture
def run(reference, tmp_path):
    """A copy of `reference`, to be harmed."""
    return shutil.copytree(reference, tmp_path / "run")
