import errno
import json
import random
import shutil

import pytest
import safetensors.torch
import torch

import certtrain
from certtrain.errors import CerttrainError, CheckpointError, UsageError
from certtrain.models import build_model
from certtrain.runs.checkpoint import load_checkpoint, load_model, save_checkpoint
from certtrain.runtime.files import write_atomically, write_text
from tests.commands import contents, disk_with_room_for
from tests.networks import save_model

ARCHITECTURE = {"name": "mlp", "image_shape": [1, 4, 4], "num_classes": 3, "mean": [0.5], "std": [0.25]}
ARCHITECTURE_8 = ARCHITECTURE | {"options": {"widths": [8]}}
STATE = {"model": {"weight": torch.arange(2000.0), "count": torch.tensor(3)}, "step": 7, "rates": [1e-3, None, "x"]}


def model(widths=(8,)):
    return build_model(**ARCHITECTURE, options={"widths": widths})


def save(folder, widths=(8,)):
    network = model(widths)
    save_model(folder, network, ARCHITECTURE | {"options": {"widths": list(widths)}})
    return network


def same(a, b):
    """Equal, down to the last bit of every tensor."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def damaged(content):
    """Name and content of files that are not what was written: cut off, replaced, one byte flipped."""
    for keep in (0, 1, 100, len(content) // 2, len(content) - 100, len(content) - 1):
        yield f"first {keep} bytes", content[:keep]
    yield "garbage", random.Random(0).randbytes(len(content))
    yield "zeros", bytes(len(content))
    yield "text", b"not a checkpoint"
    for position in random.Random(1).sample(range(len(content)), 150):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        yield f"byte {position} flipped", bytes(flipped)


def test_a_resume_point_comes_back_bit_for_bit(tmp_path):
    save_checkpoint(tmp_path / "last.ckpt", STATE)
    loaded = load_checkpoint(tmp_path / "last.ckpt")
    assert same(STATE, {key: loaded[key] for key in STATE})
    assert list(contents(tmp_path)) == ["last.ckpt"]


def test_a_model_comes_back_bit_for_bit_and_in_eval_mode(tmp_path):
    network = save(tmp_path)
    loaded = certtrain.load_model(tmp_path)
    assert same(dict(network.state_dict()), dict(loaded.state_dict()))
    assert not any(module.training for module in loaded.modules())
    assert same(dict(loaded.state_dict()), dict(load_model(tmp_path / "model.safetensors").state_dict()))


def test_the_same_weights_make_the_same_file(tmp_path):
    for folder in (tmp_path / "first", tmp_path / "again"):
        folder.mkdir()
    save(tmp_path / "first")
    save_model(tmp_path / "again", load_model(tmp_path / "first"), ARCHITECTURE_8)
    assert contents(tmp_path / "first") == contents(tmp_path / "again")


def test_weights_that_another_program_wrote_need_no_checksum(tmp_path):
    network = save(tmp_path)
    safetensors.torch.save_file(dict(network.state_dict()), tmp_path / "model.safetensors")
    assert same(dict(network.state_dict()), dict(load_model(tmp_path).state_dict()))


@pytest.mark.parametrize("name", ["last.ckpt", "model.safetensors"])
def test_a_damaged_file_is_refused_in_one_line_or_reads_as_it_was(tmp_path, name):
    file = tmp_path / name
    save(tmp_path, widths=(40,))
    save_checkpoint(tmp_path / "last.ckpt", STATE)
    read = load_checkpoint if name == "last.ckpt" else lambda file: dict(load_model(file).state_dict())
    whole, refused = read(file), {}
    for damage, content in damaged(file.read_bytes()):
        file.write_bytes(content)
        try:
            found = read(file)
        except CheckpointError as error:
            refused[damage] = str(error)
        else:
            assert same(found, whole), damage
    assert all(str(file) in message and "\n" not in message for message in refused.values())
    assert {"garbage", "zeros", "text", "first 0 bytes"} <= refused.keys()
    assert sum(damage.startswith("first") for damage in refused) == 6
    assert sum(damage.startswith("byte") for damage in refused) > 100, "some bytes are padding, most are not"


def test_a_pickle_is_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("it was executed",))

    torch.save({"format": 1, "model": Trap()}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt is not a checkpoint of this version"):
        load_checkpoint(tmp_path / "last.ckpt")


def test_another_format_is_refused(tmp_path):
    torch.save({"format": 999}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint of this version"):
        load_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"options": {"widths": [9]}}, r"network\.1\.weight is \(8, 16\), not \(9, 16\)"),
        ({"options": {"widths": [8, 8]}}, r"lacks network\.5\.bias; it has network\.4\.bias besides"),
        ({"options": {"widths": []}}, r"has network\.2\.bias besides"),
        ({"num_classes": 4}, r"network\.4\.weight is \(3, 8\), not \(4, 8\)"),
    ],
)
def test_weights_of_another_architecture_say_what_does_not_fit(tmp_path, other, message):
    save(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({"model": ARCHITECTURE_8 | other}))
    with pytest.raises(CheckpointError, match=f"model.safetensors is of another architecture: .*{message}"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "description", [None, b"", b"{", b"[]", b"{}", b'{"model": 3}', b'{"model": {"name": "mlp"}}', b"\xff\xfe"]
)
def test_a_damaged_description_is_named(tmp_path, description):
    save(tmp_path)
    if description is None:
        (tmp_path / "model.json").unlink()
    else:
        (tmp_path / "model.json").write_bytes(description)
    with pytest.raises(CheckpointError, match=r"model\.json is missing or corrupt"):
        load_model(tmp_path)


def test_a_description_with_an_unknown_model_names_the_nearest(tmp_path):
    save(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({"model": ARCHITECTURE | {"name": "mpl"}}))
    with pytest.raises(UsageError, match="unknown model 'mpl': did you mean mlp"):
        load_model(tmp_path)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="there is no model at"):
        load_model(tmp_path)
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"not finished: resume it, or name .*last\.ckpt"):
        load_model(tmp_path)


@pytest.mark.parametrize("room", [0, 1, 1000, 5000])
def test_a_full_disk_leaves_the_previous_file(tmp_path, room):
    save(tmp_path, widths=(100,))
    save_checkpoint(tmp_path / "last.ckpt", STATE)
    write_text(tmp_path / "metrics.jsonl", "the first epoch\n" * 400)
    before = contents(tmp_path)
    replacements = [
        lambda: save_checkpoint(tmp_path / "last.ckpt", STATE | {"step": 8}),
        lambda: write_text(tmp_path / "metrics.jsonl", "another\n" * 1000),
        lambda: write_atomically(
            tmp_path / "model.safetensors", lambda file: file.write(safetensors.torch.save({"w": torch.ones(10_000)}))
        ),
    ]
    for replace in replacements:
        with (
            disk_with_room_for(room),
            pytest.raises(CheckpointError, match=f"could not write .*{errno.EFBIG}.*unchanged") as caught,
        ):
            replace()
        assert "\n" not in str(caught.value)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_write_that_breaks_off_leaves_the_previous_file(tmp_path, error):
    def write(file):
        file.write(b"half of")
        raise error

    write_text(tmp_path / "file", "whole")
    with pytest.raises(error):
        write_atomically(tmp_path / "file", write)
    assert contents(tmp_path) == {"file": b"whole"}


def test_a_folder_that_is_gone_is_an_error(tmp_path):
    shutil.rmtree(tmp_path)
    with pytest.raises(CerttrainError, match="could not write"):
        write_text(tmp_path / "file", "text")
