from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import certtrain.models
from certtrain.errors import UsageError
from certtrain.models import Residual, all_options, build_model
from certtrain.models.transformer import CenteredNorm


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


# By hand, from config/cifar_crown.json and model_defs.py of huanzhang12/CROWN-IBP: weights and biases, layer by layer.
SMALL = [
    ("cnn-2layer", {"width": 2, "linear_width": 256}, 8 * 49 + 16 * 129 + 1025 * 256 + 257 * 10),
    ("cnn-4layer", {"width": 1, "linear_width": 256},
     4 * 28 + 4 * 65 + 8 * 37 + 8 * 129 + 513 * 256 + 257 * 256 + 257 * 10),
    ("cnn-4layer", {"width": 2, "linear_width": 512},
     8 * 28 + 8 * 129 + 16 * 73 + 16 * 257 + 1025 * 512 + 513 * 512 + 513 * 10),
    ("cnn-3layer", {"width": 8, "kernel": 3}, 32 * 28 + 64 * 289 + 64 * 1025 + 4097 * 512 + 513 * 10),
    ("cnn-3layer", {"width": 1, "kernel": 5}, 4 * 76 + 8 * 101 + 8 * 129 + 393 * 64 + 65 * 10),
    ("cnn-3layer", {"width": 2, "kernel": 5}, 8 * 76 + 16 * 201 + 16 * 257 + 785 * 128 + 129 * 10),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "parameters"), SMALL)
def test_small_networks_have_the_published_shapes(name, options, parameters):
    model = build_model(name, (3, 32, 32), 10, options=options)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    with_batch_norm = build_model(name, (3, 32, 32), 10, options=options | {"batch_norm": True})
    affine = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)][:-1]
    normalised = [module for module in with_batch_norm.modules() if hasattr(module, "running_mean")]
    assert [len(module.running_mean) for module in normalised] == [len(module.weight) for module in affine]


def weights(*layers: tuple[int, int, int]) -> int:
    """Weights of convolutions (kernel, channels in per group, channels out)."""
    return sum(kernel**2 * channels * out for kernel, channels, out in layers)


# By hand, layer by layer: weights of the convolutions, and how many features all hidden layers have together.
WIDE_RESNET_8 = [(3, 16, 128), (3, 128, 128), (1, 16, 128), (3, 128, 256), (3, 256, 256), (1, 128, 256),
                 (3, 256, 512), (3, 512, 512), (1, 256, 512)]  # fmt: skip
WIDE_RESNET_10 = [(3, 16, 160), (3, 160, 160), (1, 16, 160), (3, 160, 320), (3, 320, 320), (1, 160, 320),
                  (3, 320, 640), (3, 640, 640), (1, 320, 640)]  # fmt: skip
RESNEXT_32 = [(1, 64, 64), (3, 32, 64), (1, 64, 128), (1, 64, 128), (1, 128, 128), (3, 64, 128), (1, 128, 256),
              (1, 128, 256), (1, 256, 256), (3, 128, 256), (1, 256, 512), (1, 256, 512)]  # fmt: skip
RESNEXT_8 = [(1, 16, 16), (3, 8, 16), (1, 16, 32), (1, 16, 32), (1, 32, 16), (3, 8, 16), (1, 16, 32),
             (1, 32, 32), (3, 16, 32), (1, 32, 64), (1, 32, 64), (1, 64, 32), (3, 16, 32), (1, 32, 64),
             (1, 64, 64), (3, 32, 64), (1, 64, 128), (1, 64, 128), (1, 128, 64), (3, 32, 64), (1, 64, 128)]  # fmt: skip


@pytest.mark.parametrize("batch_norm", [False, True], ids=["no-bn", "full-bn"])
@pytest.mark.parametrize(
    ("name", "shape", "classes", "convolutions", "flat"),
    [
        ("wide-resnet", (3, 32, 32), 10, [(3, 3, 16), *WIDE_RESNET_8], 512 * 8 * 8),
        ("wide-resnet", (1, 28, 28), 10, [(3, 1, 16), *WIDE_RESNET_8], 512 * 7 * 7),
        ("wide-resnet", (3, 64, 64), 200, [(3, 3, 16), *WIDE_RESNET_10], 640 * 16 * 16),
        ("resnext", (3, 32, 32), 10, [(3, 3, 64), *RESNEXT_32], 512 * 8 * 8),
        ("resnext", (1, 28, 28), 10, [(3, 1, 64), *RESNEXT_32], 512 * 7 * 7),
        ("resnext", (3, 64, 64), 200, [(3, 3, 16), *RESNEXT_8], 128 * 16 * 16),
    ],
)
def test_residual_networks_have_the_published_shapes(name, shape, classes, convolutions, flat, batch_norm):
    model = build_model(name, shape, classes, options={"batch_norm": batch_norm})
    features = sum(out for _, _, out in convolutions) + 512
    each = 2 if batch_norm else 1  # scale and shift of a BatchNorm, or a bias
    expected = weights(*convolutions) + flat * 512 + each * features + 512 * classes + classes
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model.eval()(torch.rand(1, *shape)).shape == (1, classes)


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 64, 64), (1, 28, 28)])
def test_the_large_cnn_is_cnn7_without_batch_norm_whose_fifth_convolution_keeps_the_size(shape):
    expected = shape[0] * 9 * 64 + (576 + 2 * 576 + 2 * 1152 + 2 * 1152) * 64 + 2 * 64 + 3 * 128
    flat = 128 * (shape[1] // 2) ** 2
    model = build_model("cnn-large", shape, 10)
    assert sum(p.numel() for p in model.parameters()) == expected + flat * 512 + 512 + 5130
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model.modules())


def test_the_wide_cnn7_is_cnn7_of_width_128():
    wide, same = build_model("cnn7-wide", (3, 32, 32), 10), build_model("cnn7", (3, 32, 32), 10, options={"width": 128})
    assert [p.shape for p in wide.parameters()] == [p.shape for p in same.parameters()]
    assert wide.network[0].out_channels == 128


@pytest.mark.parametrize("name", ["wide-resnet", "resnext"])
def test_full_batch_norm_of_a_residual_network_follows_every_affine_layer_but_the_last(name):
    modules = list(build_model(name, (3, 64, 64), 10).modules())
    affine = [i for i, m in enumerate(modules) if isinstance(m, (nn.Conv2d, nn.Linear))]
    for i in affine[:-1]:
        layer, norm = modules[i], modules[i + 1]
        assert type(norm) is (nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d)
        assert norm.num_features == len(layer.weight)
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules) == len(affine) - 1


@pytest.mark.parametrize("name", ["wide-resnet", "resnext", "cnn7", "cnn-large"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 11), (2, 1, 1)])
def test_images_of_any_size_fit(name, shape):
    assert build_model(name, shape, 3).eval()(torch.rand(2, *shape)).shape == (2, 3)


def test_a_residual_block_adds_branch_and_shortcut():
    block = Residual([nn.Conv2d(2, 2, 1)], 2, 2, 1, batch_norm=True)
    x = torch.randn(1, 2, 3, 3)
    torch.testing.assert_close(block(x), torch.relu(block.branch[0](x) + x))
    strided = Residual([nn.Conv2d(2, 2, 1, 2)], 2, 2, 2, batch_norm=False)
    expected = torch.relu(strided.branch[0](x) + strided.shortcut[0](x))
    torch.testing.assert_close(strided(x), expected)


def test_full_batch_norm_stands_after_every_affine_layer_but_the_last():
    kinds = [type(m) for m in build_model("cnn7", (3, 32, 32), 10).network]
    affine = [i for i, kind in enumerate(kinds) if kind in (nn.Conv2d, nn.Linear)]
    assert all(kinds[i + 1] in (nn.BatchNorm2d, nn.BatchNorm1d) and kinds[i + 2] is nn.ReLU for i in affine[:-1])
    assert affine[-1] == len(kinds) - 1


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, 16),
        ({"norm": "post", "activation": "gelu", "pool": "token"}, 17),
        ({"norm": "none", "pool": "flatten", "patch": 4}, 4),
        ({"norm_kind": "batch", "shifted_patches": True, "depth": 1}, 16),
    ],
)
def test_a_vision_transformer_is_its_equations(options, tokens):
    """Written out again, with nn.MultiheadAttention for the attention."""
    torch.manual_seed(0)
    network = build_model("vit", (3, 8, 8), 10, options={"width": 8, "heads": 2, **options}).eval().network
    embedding, *blocks, last_norm, _, head = network
    images = torch.rand(2, 3, 8, 8)
    x, patch = images, options.get("patch", 2)
    if options.get("shifted_patches"):
        wide = F.pad(images, [1] * 4)
        corners = [(0, 0), (0, 2), (2, 0), (2, 2)]
        x = torch.cat([images, *(wide[..., i : i + 8, j : j + 8] for i, j in corners)], 1)
    x = F.unfold(x, patch, stride=patch).mT @ embedding.projection.weight.flatten(1).T + embedding.projection.bias
    if options.get("pool") == "token":
        x = torch.cat([embedding.class_token.repeat(2, 1, 1), x], 1)
    x = x + embedding.position
    assert x.shape == (2, tokens, 8)
    norm = options.get("norm", "pre")
    for block in blocks:
        own = block.attention
        attention = nn.MultiheadAttention(8, 2, batch_first=True)
        state = {
            "in_proj_weight": torch.cat([own.query.weight, own.key.weight, own.value.weight]),
            "in_proj_bias": torch.cat([own.query.bias, own.key.bias, own.value.bias]),
            "out_proj.weight": own.out.weight,
            "out_proj.bias": own.out.bias,
        }
        attention.load_state_dict(state)
        for branch, normalize in (
            (lambda h, attention=attention: attention(h, h, h)[0], block.attention_norm),
            (block.mlp, block.mlp_norm),
        ):
            x = x + branch(normalize(x)) if norm == "pre" else normalize(x + branch(x))
    x = last_norm(x) if norm == "pre" else x
    pool = options.get("pool", "mean")
    pooled = x.mean(1) if pool == "mean" else x[:, 0] if pool == "token" else x.flatten(1)
    torch.testing.assert_close(network(images), head(pooled), rtol=1e-4, atol=1e-4)


def test_no_variance_layer_norm_subtracts_the_mean_alone():
    norm, x = CenteredNorm(4), torch.rand(2, 3, 4)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (4,)) * (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "pree"}, "did you mean pre"),
        ({"norm_kind": "layers"}, "did you mean layer"),
        ({"activation": "rleu"}, "did you mean relu"),
        ({"pool": "tokens"}, "did you mean token"),
        ({"patch": 3}, "patches of 3 pixels"),
        ({"heads": 5}, "5 heads"),
    ],
)
def test_a_vision_transformer_that_cannot_be_is_one_line(options, message):
    with pytest.raises(UsageError, match=message):
        build_model("vit", (1, 8, 8), 10, options=options)


SIZES = [
    (name, option)
    for name in certtrain.models.MODELS
    for option, default in all_options(name, {}).items()
    if default is None or (isinstance(default, int | tuple) and not isinstance(default, bool))
]


@pytest.mark.parametrize("value", [0, -1, 1.5])
@pytest.mark.parametrize(("name", "option"), SIZES)
def test_a_size_is_never_another_one_than_is_written(name, option, value):
    """Nothing below 1 means the default."""
    written = (4, value) if option == "widths" else value
    with pytest.raises(UsageError, match=rf"^(model )?{name.removesuffix('-wide')}: {option}.* 1\b.*, not {value}$"):
        build_model(name, (3, 32, 32), 10, options={option: written})


def test_every_architecture_has_sizes():
    assert {name for name, _ in SIZES} == set(certtrain.models.MODELS)


@pytest.mark.parametrize("name", ["cnn-small", "mlp", "vit"])
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
    model = build_model("somebodys:net", (1, 2, 2), 5, options={"hidden": 7}, trust=True)
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
        build_model(name, (3, 32, 32), 10, options=options, trust=True)
    assert "\n" not in str(error.value)


def test_models_are_the_top_level_folder():
    assert certtrain.models.__name__ == "certtrain.models"
