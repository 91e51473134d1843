from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

from certtrain.errors import CheckpointError
from certtrain.importing.weights import load_weights
from certtrain.models import build_model
from tests.networks import randomized

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]


def published(size: int = 16, width: int = 3, linear: int = 16, classes: int = 5, *, batch_norm: bool = True) -> list:
    """CNN-7 as the three programs write it down, with biases everywhere; 64 pixels as expressive-losses does."""
    last = 2 if size >= 64 else 1
    side = size // 2 // last
    layers: list[nn.Module] = []
    for channels, out, stride in [(3, width, 1), (width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1),
                                  (2 * width, 2 * width, last)]:  # fmt: skip
        layers.append(nn.Conv2d(channels, out, 3, stride=stride, padding=1))
        layers += [nn.BatchNorm2d(out)] * batch_norm + [nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(side * side * 2 * width, linear)]
    layers += [nn.BatchNorm1d(linear)] * batch_norm + [nn.ReLU(), nn.Linear(linear, classes)]
    return layers


class Normalization(nn.Module):
    """CTBench's first layer: parameters that are not trained."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(MEAN).view(1, -1, 1, 1), requires_grad=False)
        self.std = nn.Parameter(torch.tensor(STD).view(1, -1, 1, 1), requires_grad=False)

    def forward(self, x):
        return (x - self.mean) / self.std


class Layers(nn.Module):
    """The layers under a name, as CTRAIN's CNN7_Shi and CTBench's abstract networks have them."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


PROGRAMS = {
    "CTBench": lambda layers: Layers(Normalization(), *layers),
    "CTBench, concrete": lambda layers: nn.Sequential(Normalization(), *layers),
    "CTRAIN": lambda layers: Layers(*layers),
    "expressive-losses": lambda layers: nn.Sequential(*layers),
}


class Named(nn.Module):
    """Layers under several names, one after the other."""

    def __init__(self, layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


def numbered(layers):
    """conv1, bn1, relu1, conv2, ..., fc2: each kind counted on its own."""
    kinds = {nn.Conv2d: "conv", nn.BatchNorm2d: "bn", nn.BatchNorm1d: "norm", nn.Linear: "fc"}
    names = [kinds.get(type(layer), type(layer).__name__.lower()) for layer in layers]
    return Named({f"{name}{1 + names[:i].count(name)}": layers[i] for i, name in enumerate(names)})


SEVERAL_NAMES = {
    "features and classifier": lambda layers: Named(
        {"features": nn.Sequential(*layers[:-4]), "classifier": nn.Sequential(*layers[-4:])}
    ),
    "body and a head before it by name": lambda layers: Named({"body": nn.Sequential(*layers[:-1]), "a": layers[-1]}),
    "blocks, and layers behind them": lambda layers: nn.Sequential(nn.Sequential(*layers[:5]), *layers[5:]),
    "numbered by kind": numbered,
}


def own(size: int = 16, **options) -> nn.Module:
    """The same network of certtrain."""
    options = {"width": 3, "linear_width": 16} | options
    return build_model("cnn7", (3, size, size), 5, mean=MEAN, std=STD, options=options).eval()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("size", "batch_norm"), [(16, True), (64, True), (16, False)])
def test_a_network_of_another_program_computes_the_same_here(program, suffix, size, batch_norm, tmp_path):
    torch.manual_seed(0)
    other = randomized(PROGRAMS[program](published(size, batch_norm=batch_norm))).eval()
    images = torch.rand(4, 3, size, size)
    inside = program.startswith("CTBench")
    expected = other(
        images if inside else (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    )
    file = tmp_path / f"net{suffix}"
    state = other.state_dict()
    if suffix == ".pth":
        torch.save({"epoch": 3, "state_dict": state} if program == "expressive-losses" else state, file)
    else:
        safetensors.torch.save_file(state, file)
    model = own(size, batch_norm=batch_norm)
    load_weights(model, file)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("names", SEVERAL_NAMES)
@pytest.mark.parametrize("batch_norm", [True, False])
def test_layers_under_several_names_are_in_the_order_of_the_file_or_refused(names, suffix, batch_norm, tmp_path):
    torch.manual_seed(0)
    options = {"width": 3, "linear_width": 18}
    other = randomized(SEVERAL_NAMES[names](published(linear=18, classes=18, batch_norm=batch_norm))).eval()
    model = build_model("cnn7", (3, 16, 16), 18, options={**options, "batch_norm": batch_norm}).eval()
    images, file = torch.rand(4, 3, 16, 16), tmp_path / f"net{suffix}"
    if suffix == ".pth":
        torch.save(other.state_dict(), file)
        load_weights(model, file)
        torch.testing.assert_close(model(images), other(images), rtol=1e-4, atol=1e-4)
        return
    safetensors.torch.save_file(other.state_dict(), file)
    with pytest.raises(CheckpointError, match=r"does not tell whether .* comes first: .* by torch\.save"):
        load_weights(model, file)


def stack(*kinds, bias):
    """Layers in a row of 4 features; a linear one right before BatchNorm has a bias where `bias` says so."""
    made = {"bn": lambda: nn.BatchNorm1d(4), "relu": nn.ReLU, "flatten": nn.Flatten}
    behind = [*kinds[1:], ""]
    return nn.Sequential(
        *(made[kind]() if kind in made else nn.Linear(4, 4, bias=bias or after != "bn")
          for kind, after in zip(kinds, behind, strict=True))
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    "kinds",
    [
        ("flatten", "linear", "bn", "relu", "linear"),
        ("flatten", "linear", "relu", "bn", "linear"),
        ("flatten", "bn", "linear", "relu", "linear", "bn"),
        ("flatten", "linear", "linear", "bn", "bn", "linear", "relu", "bn"),
    ],
)
def test_a_bias_is_taken_to_where_it_says_the_same(kinds, there, here, dtype, tmp_path):
    """Wherever BatchNorm stands, with a bias before it or without, here and there."""
    torch.manual_seed(0)
    other, model = randomized(stack(*kinds, bias=there)).eval().to(dtype), stack(*kinds, bias=here).eval()
    torch.save(Layers(*other).state_dict(), tmp_path / "n.pth")
    load_weights(model, tmp_path / "n.pth")
    images = torch.rand(8, 4)
    torch.testing.assert_close(model(images), other(images.to(dtype)).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_state_dict_of_the_same_names_is_taken_as_it_is(prefix, tmp_path):
    torch.manual_seed(0)
    saved, model = randomized(own()), own()
    torch.save(
        {"model_state_dict": {f"{prefix}{name}": t for name, t in saved.state_dict().items()}}, tmp_path / "n.pt"
    )
    load_weights(model, tmp_path / "n.pt")
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in saved.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(
    ("mean", "std", "same"),
    [(MEAN, STD, True), ([0.5] * 3, STD, False), (MEAN, [0.3] * 3, False), ([0.4924, *MEAN[1:]], STD, False)],
)
@pytest.mark.parametrize("names", ["the same", "others"])
def test_another_input_normalisation_is_refused_under_whatever_names(names, mean, std, same, dtype, tmp_path):
    saved = build_model("cnn7", (3, 16, 16), 5, mean=mean, std=std, options={"width": 3, "linear_width": 16}).to(dtype)
    torch.save((saved if names == "the same" else Layers(*saved)).state_dict(), tmp_path / "n.pt")
    if same:
        load_weights(own(), tmp_path / "n.pt")
        return
    with pytest.raises(CheckpointError, match=r"normalises its input otherwise: set data\.mean=.* data\.std="):
        load_weights(own(), tmp_path / "n.pt")


def test_half_precision_is_converted(tmp_path):
    torch.manual_seed(0)
    saved, model = randomized(own()).half().state_dict(), own()
    torch.save(saved, tmp_path / "n.pt")
    load_weights(model, tmp_path / "n.pt")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == own().state_dict()[name].dtype
        assert torch.equal(tensor, saved[name].to(tensor.dtype))


def changed(change):
    """The state of an expressive-losses network that `change` has been applied to."""
    torch.manual_seed(0)
    state = nn.Sequential(*published()).state_dict()
    change(state)
    return state


def without_last(state):
    del state["19.weight"], state["19.bias"]


def listed_by_kind(state):
    """Convolutions and linear layers first, then the BatchNorms: in an order that is not the network's."""
    normalizes = {name.partition(".")[0] for name in state if name.endswith("running_mean")}
    layers = {f"layers.{name}": t for name, t in state.items() if name.partition(".")[0] not in normalizes}
    norms = {f"norms.{name}": t for name, t in state.items() if name.partition(".")[0] in normalizes}
    state.clear()
    state.update(layers | norms)


def with_short_bias(state):
    state["0.bias"] = state["0.bias"][:1]


def renormalized(state):
    first = {"a.0.mean": torch.tensor([0.5] * 3), "a.0.std": torch.tensor([0.2] * 3)}
    layers = {f"a.{int(name.partition('.')[0]) + 1}.{name.partition('.')[2]}": t for name, t in state.items()}
    state.clear()
    state.update(first | layers)


WRONG = {
    "narrower": (lambda state: state.update(nn.Sequential(*published(width=2)).state_dict()),
                 r"0 is weight 2x3x3x3.*the model has weight 3x3x3x3"),
    "other classes": (lambda state: state.update(nn.Sequential(*published(classes=7)).state_dict()),
                      r"19 is weight 7x16, bias 7, .*the model has weight 5x16, bias 5"),
    "a bias of another size": (with_short_bias, r"0 is weight 3x3x3x3, bias 1, in its place the model has weight 3x3"),
    "layers by kind": (listed_by_kind, r"layers\.3 is weight 3x3x3x3, bias 3, in its place the model has weight 3"),
    "a layer less": (without_last, r"has 12 layers with weights, the model has 13"),
    "otherwise normalised": (renormalized, r"set data\.mean=\[0\.5, 0\.5, 0\.5\] data\.std=\[0\.2, 0\.2, 0\.2\]"),
    "something else in a layer": (lambda state: state.update({"0.scale": torch.ones(3)}), "scale 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_said_in_one_line(case, tmp_path):
    change, message = WRONG[case]
    torch.save(changed(change), tmp_path / "n.pth")
    model = own()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(model, tmp_path / "n.pth")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(tmp_path), "")) <= 300
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.items())


def test_layers_of_a_residual_network_cannot_be_told_by_their_place(tmp_path):
    torch.save(changed(lambda state: None), tmp_path / "n.pth")
    with pytest.raises(CheckpointError, match="no plain sequence of layers"):
        load_weights(build_model("wide-resnet", (3, 16, 16), 5, options={"base_width": 2}), tmp_path / "n.pth")


class Payload:
    def __reduce__(self):
        return print, ("a file of weights has run code",)


@pytest.mark.parametrize(
    "content",
    [Payload(), {"state_dict": Payload()}, {"model": nn.Linear(1, 1)}, [1, 2], {}, {"a": 1}, b"", b"\x80\x04garbage"],
    ids=["code", "code in a dict", "a module", "a list", "empty", "no tensor", "empty file", "garbage"],
)
def test_what_is_no_state_dict_is_refused_and_nothing_in_it_runs(content, tmp_path, capsys):
    file = tmp_path / "n.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"n\.pth"):
        load_weights(own(), file)
    assert capsys.readouterr().out == ""
    with pytest.raises(CheckpointError, match="there is no file"):
        load_weights(own(), tmp_path / "nothing.pth")
    (tmp_path / "n.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"n\.safetensors"):
        load_weights(own(), tmp_path / "n.safetensors")
