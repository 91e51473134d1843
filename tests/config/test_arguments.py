"""Arguments of optimizers: what is accepted trains, what is not is named with what would be."""

import inspect

import pytest
import torch
from torch import nn

from certtrain.config import load_config
from certtrain.config.names import OPTIMIZERS
from certtrain.errors import UsageError
from certtrain.training.optimizers import build_optimizer

VALUES = ["true", "false", "0", "1", "-1", "0.5", "5e-4", "text", "null", "[0.5, 0.9]", "[]", "[1, 2, 3]", "[a, b]",
          "[true, 0.5]", "{a: 1}", "200", "1e300", ".inf", ".nan", "1" + "0" * 35, "'5e-4'", "٣"]  # fmt: skip


def build(name, overrides):
    source = {"data": {"name": "digits"}, "model": {"name": "mlp"}, "epsilon": {"max": 0.1}, "training": {"epochs": 1}}
    config = load_config(source, [f"optimizer.name={name}", *overrides])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    return model, build_optimizer(config.optimizer, model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whatever_an_argument_is_set_to_it_steps_or_one_line_names_it(name):
    arguments = [*inspect.signature(getattr(torch.optim, name)).parameters, "momentun", "", "a b"]
    for argument in filter(str.strip, arguments):
        for value in VALUES:
            try:
                model, optimizer = build(name, [f"optimizer.arguments.{argument}={value}"])
            except UsageError as error:
                message = str(error)
            else:
                message = None
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
            assert message is None or message.startswith("optimizer.arguments"), (argument, value)
            assert message is None or (len(message) <= 300 and "\n" not in message), (argument, value)


@pytest.mark.parametrize("value", ["5e-4", "0.0005", "5.0e-4", "+5E-04"])
def test_a_number_is_a_number_however_it_is_spelled(value):
    _, optimizer = build("AdamW", [f"optimizer.arguments.weight_decay={value}"])
    assert optimizer.defaults["weight_decay"] == 0.0005


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["foreach=true", "fused=true"], "foreach and fused cannot both be true"),
        (
            ["maximize=true"],
            "maximize: unknown argument of Adam 'maximize': choose from amsgrad, betas, .*weight_decay",
        ),
        (["differentiable=true"], "differentiable: unknown argument"),
        (["capturable=true"], "capturable: unknown argument"),
        (["lr=0.1"], "lr: unknown argument"),
        (["betas=0.5"], "betas: a list of a number and a number is expected .got 0.5"),
        (["betas=[0.9, 2]"], "Adam: Invalid beta parameter at index 1: 2"),
        (["amsgrad=1"], "amsgrad: true or false is expected .got 1"),
        (["foreach=yes please"], "foreach: true or false or null is expected"),
    ],
)
def test_what_is_wrong_with_an_argument(arguments, message):
    with pytest.raises(UsageError, match=f"^optimizer.arguments[.:] ?{message}"):
        build("Adam", [f"optimizer.arguments.{argument}" for argument in arguments])


def test_the_kernel_is_fused_unless_another_is_asked_for():
    assert build("Adam", [])[1].defaults["fused"] is True
    for other in ("foreach=true", "fused=false", "fused=null"):
        assert not build("Adam", [f"optimizer.arguments.{other}"])[1].defaults["fused"]
