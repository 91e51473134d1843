from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import certtrain.models
from certtrain.errors import UsageError
from certtrain.models import build_model


@pytest.mark.parametrize(
    ("shape", "batch_norm", "parameters"),
    [
        # By hand: 3×3 convolutions of 64, 64, 128, 128, 128 channels, linear 512, linear K.
        ((3, 32, 32), False, (27 + 576) * 64 + 320 + (576 + 1152 + 1152) * 128 + 192 + 128 * 256 * 512 + 512 + 5130),
        ((1, 28, 28), False, (9 + 576) * 64 + 320 + (576 + 1152 + 1152) * 128 + 192 + 128 * 196 * 512 + 512 + 5130),
        ((3, 64, 64), False, (27 + 576) * 64 + 320 + (576 + 1152 + 1152) * 128 + 192 + 128 * 256 * 512 + 512 + 5130),
        ((3, 32, 32), True, (27 + 576) * 64 + (576 + 1152 + 1152) * 128 + 128 * 256 * 512 + 5130 + 2 * (512 + 512)),
    ],
)
def test_cnn7_has_the_published_shape(shape, batch_norm, parameters):
    model = build_model("cnn7", shape, 10, options={"batch_norm": batch_norm})
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.eval()(torch.rand(2, *shape)).shape == (2, 10)


def test_full_batch_norm_stands_after_every_affine_layer_but_the_last():
    kinds = [type(m) for m in build_model("cnn7", (3, 32, 32), 10).network]
    affine = [i for i, kind in enumerate(kinds) if kind in (nn.Conv2d, nn.Linear)]
    assert all(kinds[i + 1] in (nn.BatchNorm2d, nn.BatchNorm1d) and kinds[i + 2] is nn.ReLU for i in affine[:-1])
    assert affine[-1] == len(kinds) - 1


@pytest.mark.parametrize("name", ["cnn-small", "mlp"])
def test_other_models_take_digits(name):
    assert build_model(name, (1, 8, 8), 10)(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_normalisation_is_the_first_layer():
    model = build_model("mlp", (2, 3, 3), 4, mean=(0.1, 0.2), std=(0.5, 2.0))
    x = torch.rand(1, 2, 3, 3)
    expected = torch.stack([(x[:, 0] - 0.1) / 0.5, (x[:, 1] - 0.2) / 2.0], 1)
    torch.testing.assert_close(model[0](x), expected)


def test_any_callable_is_a_model(tmp_path, monkeypatch):
    (tmp_path / "somebodys.py").write_text(
        "from torch import nn\n"
        "def net(image_shape, num_classes, hidden=3):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = build_model("somebodys:net", (1, 2, 2), 5, options={"hidden": 7})
    assert model.network[1].out_features == 7
    sys.modules.pop("somebodys")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cnn8", {}, "did you mean cnn7"),
        ("cnn7", {"widht": 3}, "widht"),
        ("nowhere:net", {}, "nowhere"),
        ("math:net", {}, "net"),
        ("builtins:len", {}, "len"),
    ],
)
def test_wrong_models_are_one_clear_line(name, options, message):
    with pytest.raises(UsageError, match=message) as error:
        build_model(name, (3, 32, 32), 10, options=options)
    assert "\n" not in str(error.value)


def test_models_are_the_top_level_folder():
    assert certtrain.models.__name__ == "certtrain.models"
