"""Which parameters an optimizer gets, in which group."""

from __future__ import annotations

import pytest
import torch

from certtrain.config.schema import OptimizerSection
from certtrain.errors import UsageError
from certtrain.training.optimizers import build_optimizer
from tests.networks import narrow_cnn7


@pytest.mark.parametrize("name", ["AdamW", "RAdam", "NAdam", "SGD"])
def test_batch_norm_and_biases_do_not_decay_where_that_is_asked_for(name):
    """A step without gradient shrinks what decays, and nothing else."""
    model = narrow_cnn7()
    section = OptimizerSection(name=name, lr=0.1, decay_vectors=False, arguments={"weight_decay": 0.5})
    optimizer = build_optimizer(section, model)
    before = {key: value.clone() for key, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, value in model.named_parameters():
        assert torch.equal(value, before[key]) == (value.dim() == 1), key


def test_by_default_everything_is_one_group():
    model = narrow_cnn7()
    (group,) = build_optimizer(OptimizerSection(), model).param_groups
    assert list(map(id, group["params"])) == list(map(id, model.parameters()))


@pytest.mark.parametrize("arguments", [{"momentun": 0.9}, {"betas": [2, 0.9]}])
def test_arguments_that_torch_refuses_are_a_usage_error(arguments):
    with pytest.raises(UsageError, match="optimizer Adam: "):
        build_optimizer(OptimizerSection(arguments=arguments), narrow_cnn7())
