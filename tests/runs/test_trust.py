"""Whatever others send, opening it runs no code of theirs."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from certtrain.errors import CerttrainError, UsageError
from certtrain.runs.checkpoint import load_model
from certtrain.runs.files import RUN_FILES
from tests.commands import TINY

MODULE = "sent_by_others"
NETWORK = """
import os
from pathlib import Path
from torch import nn

Path(os.environ["CANARY"]).touch()

def net(image_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))
"""


class Trap:
    """Unpickled, it leaves a file."""

    def __reduce__(self):
        return (Path.touch, (Path(os.environ["CANARY"]),))


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that is there once code of others has run: the module `MODULE`, or a `Trap` that is unpickled."""
    (tmp_path / f"{MODULE}.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    yield tmp_path / "canary"
    sys.modules.pop(MODULE, None)


@pytest.fixture
def sent(cli, tmp_path, canary):
    """A run of a network that the module defines, finished, as others may send it."""
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"base": "digits", "model": {"name": f"{MODULE}:net"}}))
    tiny = [value for value in TINY if not value.startswith("model.")]
    outcome = cli("train", tmp_path / "own.yaml", *tiny, "--out", tmp_path / "run", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert canary.exists(), "one's own configuration is one's own code"
    canary.unlink()
    del sys.modules[MODULE]
    return tmp_path / "run"


def opened_by(run, tmp_path):
    """The commands that open a run of somebody else's."""
    return {
        "verify": ("verify", run, "--limit", 1),
        "verify a checkpoint": ("verify", run / "last.ckpt", "--limit", 1),
        "verify --radius": ("verify", run, "--radius", "--limit", 1),
        "report": ("report", run, "--limit", 1, "--out", tmp_path / "page.html"),
        "export": ("export", run, "--onnx", tmp_path / "model.onnx"),
        "resume": ("train", run, "--resume", "--device", "cpu"),
        "train": ("train", run / "config.yaml", "--out", tmp_path / "again", "--device", "cpu"),
    }


def test_a_module_that_a_run_names_is_imported_where_it_is_trusted_alone(cli, sent, tmp_path, canary):
    for name, command in opened_by(sent, tmp_path).items():
        outcome = cli(*command)
        assert (outcome.code, "--trust-model" in outcome.error, MODULE in outcome.error) == (2, True, True), name
        assert not canary.exists(), name
    with pytest.raises(UsageError, match=r"trust=True"):
        load_model(sent)
    assert not canary.exists()
    for name, command in opened_by(sent, tmp_path).items():
        assert cli(*command, "--trust-model").code == 0, name
    assert canary.exists()
    assert load_model(sent, trust=True)(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_certificates_that_could_not_be_checked_are_refused_before_anything_is_proved(cli, sent, tmp_path):
    outcome = cli("verify", sent, "--trust-model", "--certificates", tmp_path / "certificates.parquet")
    assert (outcome.code, list(tmp_path.glob("*.parquet"))) == (1, [])
    assert "the checker does not know the network" in outcome.error


def test_ones_own_configuration_trusts_the_run_it_is_of(cli, sent, tmp_path, canary):
    assert cli("train", tmp_path / "own.yaml", "--out", sent, "--resume").code == 0
    assert canary.exists()


@pytest.mark.parametrize("name", ["subprocess:run", "os:system", "builtins:eval", "torch.hub:load", ":", "os:", ":os"])
def test_names_of_the_library_are_not_called(run, name, monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda module: pytest.fail(f"{module} was imported"))
    description = json.loads((run / "model.json").read_text())
    description["model"]["name"] = name
    (run / "model.json").write_text(json.dumps(description))
    with pytest.raises(UsageError, match="code outside certtrain"):
        load_model(run)


# --- every file, with everything that runs code in some program -------------------------------------------------------


def as_pickle():
    return pickle.dumps({"model": Trap(), "epoch": 1})


def as_torch_archive():
    file = io.BytesIO()
    torch.save({"format": 1, "model": Trap(), "trainer": Trap()}, file)
    return file.getvalue()


def as_numpy_archive():
    file = io.BytesIO()
    np.savez(file, images=np.array([Trap()]), labels=np.array([Trap()]))
    return file.getvalue()


def as_yaml():
    place = os.environ["CANARY"]
    return "\n".join(
        [
            f"model: !!python/object/apply:os.mkdir [{place}]",
            f"data: !!python/object/new:os.mkdir [{place}]",
            f"training: !!python/module:{MODULE}",
            f"epsilon: !!python/name:{MODULE}.net",
        ]
    ).encode()


def as_json():
    named = {key: f"{MODULE}:net" for key in ("name", "model", "class", "backend", "method", "__class__", "py/object")}
    return json.dumps({**named, "model": named, "data": named, "optimizer": named, "epoch": f"{MODULE}:net"}).encode()


def as_parquet():
    """With an extension type that old versions of Arrow unpickle."""
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Trap())}
    field = pa.field("index", pa.int64(), metadata=metadata)
    file = io.BytesIO()
    pq.write_table(pa.table({"index": [0]}, pa.schema([field], {b"certtrain": pickle.dumps(Trap())})), file)
    return file.getvalue()


PAYLOADS = [
    *(as_pickle, as_yaml, as_json),
    *(pytest.param(payload, marks=pytest.mark.slow) for payload in (as_torch_archive, as_numpy_archive, as_parquet)),
]


def test_a_payload_does_run_where_it_is_let(canary):
    """The traps are traps."""
    for payload, opened in (
        (as_pickle, pickle.loads),
        (as_torch_archive, lambda content: torch.load(io.BytesIO(content), weights_only=False)),
        (as_numpy_archive, lambda content: np.load(io.BytesIO(content), allow_pickle=True)["images"]),
        (as_yaml, lambda content: yaml.unsafe_load(content.decode().splitlines()[0])),
    ):
        opened(payload())
        assert canary.exists()
        canary.rmdir() if canary.is_dir() else canary.unlink()


EVERY = ("verify", "verify --radius", "report", "export", "resume", "train")
READERS = {
    "config.yaml": EVERY,
    "model.json": EVERY[:-1],
    "model.safetensors": ("verify", "report"),
    "last.ckpt": ("verify a checkpoint", "resume"),
    "metrics.jsonl": ("report", "resume"),
    "steps.jsonl": ("resume",),
    "start.json": ("resume",),
    "summary.json": ("report",),
    "verify.json": ("report", "verify"),
    "radius.json": ("report",),
    "verdicts.json": ("verify",),
}


def test_every_file_that_is_read_is_tried():
    unread = {"radius.png", "model.onnx", "report.html", "model-raw.safetensors", "diverged.json"}
    assert set(RUN_FILES) == READERS.keys() | unread


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_file_runs_code(cli, reference, tmp_path, canary, payload):
    content = payload()
    for name, readers in READERS.items():
        run = shutil.copytree(reference, tmp_path / "sent" / name)
        (run / name).write_bytes(content)
        for reader in readers:
            outcome = cli(*opened_by(run, tmp_path)[reader])
            assert all(line.startswith("error: ") for line in outcome.err.splitlines()[:1]), (name, reader, outcome.err)
            assert not canary.exists(), (name, reader)
            shutil.rmtree(tmp_path / "again", ignore_errors=True)
    assert MODULE not in sys.modules


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_certificates_and_no_data_run_code(cli, run, tmp_path, canary, payload):
    (tmp_path / "data").mkdir()
    for part in ("train", "test"):
        (tmp_path / "data" / f"{part}.npz").write_bytes(payload())
    (tmp_path / "certificates.parquet").write_bytes(payload())
    for command in (
        ("check", tmp_path / "certificates.parquet", "--model", run),
        ("verify", run, "data.name=npz", f"data.path={tmp_path / 'data'}"),
    ):
        outcome = cli(*command)
        assert outcome.code == 1
        assert outcome.error
        assert not canary.exists(), command


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "claimed",
    [
        {"options": {"width": 10**9}},
        {"options": {"width": 10**30}},
        {"options": {"width": -1}},
        {"options": {"linear_width": 2**40}},
        {"name": "mlp", "options": {"widths": [2**40] * 100}},
        {"name": "resnext", "options": {"blocks": 10**12}},
        {"name": "wide-resnet", "options": {"widen_factor": 10**6}},
        {"image_shape": [1, 10**9, 10**9]},
        {"image_shape": [10**18, 8, 8]},
        {"num_classes": 10**15},
        {"num_classes": 0},
        {"mean": [0.0] * 10_000},
        {"options": {"width": "9" * 100_000}},
        {"options": {"width": [[[[[]]]]]}},
    ],
)
def test_sizes_that_the_weights_do_not_have_are_never_allocated(run, claimed, monkeypatch):
    description = json.loads((run / "model.json").read_text())
    description["model"] |= {"options": {}} | claimed
    (run / "model.json").write_text(json.dumps(description))
    on_the_cpu = []
    register = torch.nn.Module.register_parameter

    def watched(module, name, parameter):
        if parameter is not None and parameter.device.type != "meta":
            on_the_cpu.append(name)
        register(module, name, parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", watched)
    with pytest.raises(CerttrainError) as caught:
        load_model(run)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not on_the_cpu
