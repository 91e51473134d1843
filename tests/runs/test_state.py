"""A resume point is compared with the trainer that is to continue it, before anything of it is read or loaded."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from certtrain.config import load_config
from certtrain.config.names import OPTIMIZERS
from certtrain.config.schema import OptimizerSection
from certtrain.errors import CheckpointError
from certtrain.runs.build import assemble, build, load_data
from certtrain.runs.checkpoint import DESCRIPTION, load_checkpoint, save_checkpoint
from certtrain.runs.state import check_state, continue_from, run_state
from certtrain.training.optimizers import build_optimizer
from tests.commands import TINY, one_thread

SOURCE = Path("runs/sent/last.ckpt")


class Steps:
    """Ends a run after so many steps."""

    def __init__(self, steps):
        self.steps = steps

    def after_step(self, trainer):
        return trainer.step >= self.steps

    def after_epoch(self, trainer, report):
        return trainer.step >= self.steps


def new_trainer(*overrides):
    config = load_config("digits", [*TINY, *overrides])
    dataset = load_data(config)
    torch.manual_seed(config.seed)
    model, _ = build(config, dataset)
    if config.training.channels_last is True:
        model.to(memory_format=torch.channels_last)
    return assemble(config, model, dataset)


def stepped(trainer, steps):
    with one_thread():
        trainer.run(Steps(steps))
    return trainer


class Saved(tuple):
    """What is saved in the middle of an epoch, and a trainer that it fits."""

    def __repr__(self):
        return "saved"


@pytest.fixture(scope="module")
def saved():
    return Saved((run_state(stepped(new_trainer(), 4), 1.5), new_trainer()))


def paths(value, path=()):
    """Where every mapping's and list's items stand in a nested state."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths(item, (*path, key))


def at(state, path):
    for key in path:
        state = state[key]
    return state


def copied(value):
    """Mappings and lists anew, tensors shared."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list | tuple) else value


def is_free(path):
    """What may be otherwise: settings of the optimizer, which are not taken from the file, names of metrics, a text."""
    in_group = path[:3] == ("trainer", "optimizer", "param_groups") and len(path) > 4 and path[4] != "params"
    return in_group or path == ("computed_by",) or (path[:2] == ("trainer", "sums") and len(path) > 2)


def other_than(value):
    """Values of another type, dtype or shape."""
    plain = [None, "text", [], {}, [[[]]], {"a": 1}, math.nan, -1, 2**70, True, torch.zeros(3, 5, 7)]
    if isinstance(value, Tensor):
        plain += [value.to(torch.complex64), value.double() if value.dtype != torch.float64 else value.float()]
        plain += [value[None], torch.zeros(2, *value.shape, dtype=value.dtype)]
    return [
        other
        for other in plain
        if not (isinstance(other, Tensor) and isinstance(value, Tensor) and _alike(other, value))
        and not (type(other) is type(value) and not isinstance(other, Tensor))
        and not (type(other) is int and type(value) is float)
    ]


def _alike(a, b):
    return a.dtype == b.dtype and a.shape == b.shape


def refused(state, trainer):
    try:
        check_state(state, trainer, SOURCE)
    except CheckpointError as error:
        message = str(error)
    else:
        return False
    assert message.startswith(str(SOURCE))
    assert "\n" not in message
    assert len(message) <= 300
    return True


def test_what_a_trainer_saves_fits(saved):
    assert not refused(*saved)


def test_every_key_is_needed(saved):
    state, trainer = saved
    for path in paths(copied(state)):
        if is_free(path) or path[:4] == ("trainer", "optimizer", "state", path[3] if len(path) == 4 else None):
            continue  # an optimizer has kept nothing yet of a parameter without a gradient
        broken = copied(state)
        del at(broken, path[:-1])[path[-1]]
        assert refused(broken, trainer), path


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_every_value_is_of_its_type_and_shape(saved, data):
    state, trainer = saved
    path = data.draw(st.sampled_from([path for path in paths(copied(state)) if not is_free(path)]))
    broken = copied(state)
    at(broken, path[:-1])[path[-1]] = data.draw(st.sampled_from(other_than(at(state, path))))
    assert refused(broken, trainer), path


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_no_key_is_added(saved, data):
    state, trainer = saved
    inner = [path for path in [(), *paths(copied(state))] if isinstance(at(state, path), dict)]
    path = data.draw(st.sampled_from([path for path in inner if not is_free((*path, "x"))]))
    broken = copied(state)
    if path[:3] == ("trainer", "optimizer", "param_groups"):
        return
    at(broken, path)[data.draw(st.sampled_from(["more", "", 17, "__class__"]))] = torch.zeros(2)
    assert refused(broken, trainer), path


@pytest.mark.parametrize("name", sorted(name for name in OPTIMIZERS if hasattr(torch.optim, name)))
def test_any_optimizers_state_is_known_and_of_the_parameters_shapes(name):
    def trainer_of():
        model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
        trainer = copy.copy(base)
        trainer.model, trainer.optimizer = model, build_optimizer(OptimizerSection(name=name), model)
        return trainer

    base = new_trainer()
    trainer = trainer_of()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    trainer.optimizer.step()
    state = run_state(trainer, 0.0)
    assert not refused(copied(state), trainer_of())
    for index, fields in state["trainer"]["optimizer"]["state"].items():
        for key, value in fields.items():
            for other in other_than(value):
                broken = copied(state)
                broken["trainer"]["optimizer"]["state"][index][key] = other
                assert refused(broken, trainer_of()), (key, other)


def test_an_average_is_there_where_weights_are_averaged(saved):
    averaging = ["training.averaging={name: ema, decay: 0.5}"]
    state, trainer = run_state(stepped(new_trainer(*averaging), 4), 1.5), new_trainer(*averaging)
    assert not refused(state, trainer)
    assert refused(saved[0], trainer), "it has none"
    assert refused(state, saved[1]), "it has one, which nobody would go on with"
    for name, value in state["trainer"]["average"].items():
        for other in (None, value[None], value.double()):
            broken = copied(state)
            broken["trainer"]["average"][name] = other
            assert refused(broken, trainer), name
    continue_from(state, trainer, SOURCE)
    for name, value in state["trainer"]["average"].items():
        assert torch.equal(trainer.average.weights[name], value)


def test_names_of_weights_may_be_anything(saved):
    state, trainer = copied(saved[0]), saved[1]
    state["trainer"]["model"] |= {17: torch.zeros(2), "x" * 1000: torch.zeros(2), -3: 4}
    assert refused(state, trainer)


@pytest.mark.parametrize("wrong", [-1, 10, 2**63, True, 4.0, "4", None])
def test_a_step_is_one_of_the_run(saved, wrong):
    state, trainer = saved
    broken = copied(state)
    broken["trainer"]["step"] = wrong
    assert refused(broken, trainer)


@pytest.mark.parametrize("threads", [0, -1, 10**9, True, None])
def test_threads_are_a_sensible_number(saved, threads):
    state, trainer = saved
    assert refused(copied(state) | {"threads": threads}, trainer)


@pytest.mark.parametrize("wrong", [None, 2.15, ["PyTorch"], "x" * 201])
def test_what_computed_is_named_in_a_few_words(saved, wrong):
    state, trainer = saved
    assert refused(copied(state) | {"computed_by": wrong}, trainer)


def test_what_an_earlier_version_has_saved_does_not_say_what_computed(saved):
    state, trainer = copied(saved[0]), saved[1]
    del state["computed_by"]
    check_state(state, trainer, SOURCE)


def test_random_numbers_that_are_none_are_one_line(saved):
    state, trainer = copied(saved[0]), new_trainer()
    state["trainer"]["random"]["cpu"] = torch.full_like(state["trainer"]["random"]["cpu"], 255)
    check_state(state, trainer, SOURCE)
    with pytest.raises(CheckpointError, match=r"last\.ckpt does not fit this run"):
        continue_from(state, trainer, SOURCE)


def test_an_optimizers_settings_are_the_trainers_own(saved):
    state, trainer = copied(saved[0]), new_trainer()
    own = trainer.optimizer.state_dict()["param_groups"]
    state["trainer"]["optimizer"]["param_groups"][0] |= {"fused": "yes", "betas": [9.0], "lr": "high", "capturable": 1}
    check_state(state, trainer, SOURCE)
    continue_from(state, trainer, SOURCE)
    assert trainer.optimizer.state_dict()["param_groups"] == own


@pytest.mark.parametrize(
    "overrides", [[], ["training.channels_last=true"], ["optimizer.name=SGD", "optimizer.arguments.momentum=0.9"]]
)
def test_a_run_goes_on_from_the_file_bit_for_bit(tmp_path, overrides):
    """In the layout of its memory too, which fused optimizers take for granted."""
    whole = stepped(new_trainer(*overrides), 9)
    save_checkpoint(tmp_path / "last.ckpt", run_state(stepped(new_trainer(*overrides), 4), 0.0))
    trainer = new_trainer(*overrides)
    state = load_checkpoint(tmp_path / "last.ckpt", lambda outline: check_state(outline, trainer, SOURCE))
    continue_from(state, trainer, SOURCE)
    for parameter, kept in trainer.optimizer.state.items():
        assert all(v.stride() == parameter.stride() for v in kept.values() if isinstance(v, Tensor) and v.dim())
    stepped(trainer, 9)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_check_comes_before_any_value_is_read(tmp_path, saved):
    save_checkpoint(tmp_path / "last.ckpt", saved[0])
    seen = []

    def look(outline):
        seen.extend(at(outline, path) for path in paths(outline) if isinstance(at(outline, path), Tensor))
        raise CheckpointError("seen enough")

    with pytest.raises(CheckpointError, match="seen enough"):
        load_checkpoint(tmp_path / "last.ckpt", look)
    assert len(seen) > 20
    assert {tensor.device.type for tensor in seen} == {"meta"}


def test_tensors_that_occur_twice_are_stored_once(tmp_path):
    tensor = torch.randn(1000)
    save_checkpoint(tmp_path / "once", {"a": tensor})
    save_checkpoint(tmp_path / "often", {"a": tensor, "b": {"c": [tensor, tensor]}, "part": tensor[:3]})
    assert (tmp_path / "often").stat().st_size < 1.2 * (tmp_path / "once").stat().st_size
    loaded = load_checkpoint(tmp_path / "often")
    for found in (loaded["a"], *loaded["b"]["c"]):
        assert torch.equal(found, tensor)
    assert torch.equal(loaded["part"], tensor[:3])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(value=st.dictionaries(st.text(max_size=5), json_values, max_size=3), tensor=st.sampled_from([0, 1, 7]))
@settings(max_examples=60, deadline=None)
def test_what_is_saved_comes_back(tmp_path_factory, value, tensor):
    file = tmp_path_factory.mktemp("state") / "last.ckpt"
    state = {"value": value, "by number": {0: torch.randn(tensor), 5: {3: [torch.tensor(True)]}}}
    save_checkpoint(file, state)
    loaded = load_checkpoint(file)
    assert repr(loaded) == repr(state)


@pytest.mark.parametrize(
    "description",
    [
        "",
        "null",
        "[]",
        "{}",
        "[" * 100_000,
        json.dumps({"format": 2}),
        json.dumps({"format": 2, "sha256": "", "state": {}}),
        json.dumps({"format": 2, "sha256": "", "state": {"$tensor": "9"}}),
        json.dumps({"format": 2, "sha256": "", "state": {"$tensor": {"$tensor": "0"}}}),
        json.dumps({"format": 2, "sha256": "", "state": {"$pairs": 5}}),
        json.dumps({"format": 2, "sha256": "", "state": {"$pairs": [[[], 1]]}}),
        json.dumps({"format": [2], "sha256": "", "state": {}}),
    ],
)
def test_a_description_that_is_none_is_one_line(tmp_path, description):
    file = tmp_path / "last.ckpt"
    safetensors.torch.save_file({"0": torch.zeros(2)}, file, {DESCRIPTION: description})
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
