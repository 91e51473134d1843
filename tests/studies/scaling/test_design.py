"""The runs of a plan: what they cost, how long they are, and what a plan may not say."""

from __future__ import annotations

import re
from functools import reduce

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from certtrain.config import load_config
from certtrain.data import to_float
from certtrain.errors import UsageError
from certtrain.runs.build import assemble, build, load_data
from certtrain.studies.scaling.cost import OperationCounter
from certtrain.studies.scaling.design import Settings, load_plan, require_comparable, stretched
from certtrain.training.method import scheduled

PLAN = """
base: digits
overrides: {optimizer.milestones: [45, 55], optimizer.warmup_epochs: 6}
widths: [2, 4, 8, 16]
per_width: {model.options.linear_width: 4}
first_budget: 1e7
budgets: 4
validation: 0.25
protocols:
  kaplan: {warmup_epochs: 3, last_layer: false, tuned: false}
  corrected: {}
tuning: {widths: [4, 8], budget: 1e7, lr: [1e-3, 4e-3], batch_size: [32, 64], beta2: [0.99]}
"""
IMAGES = 1000


def count(config, last_layer=True):
    """18 for each weight of a square layer, epoch and image; a tenth less without the last layer."""
    return 18 * IMAGES * config.training.epochs * config.model.options["width"] ** 2 * (1 if last_layer else 0.9)


TUNED = Settings(0.003, 32, 0.99)


def written(tmp_path, text=PLAN, **changes):
    for old, new in changes.items():
        assert f"{old}:" in text
        text = "\n".join(f"{old}: {new}" if line.startswith(f"{old}:") else line for line in text.splitlines())
    (tmp_path / "plan.yaml").write_text(text)
    return tmp_path / "plan.yaml"


@pytest.fixture
def plan(tmp_path):
    return load_plan(written(tmp_path))


def forward_macs(width, linear):
    """CNN-small on 8×8 digits: 3×3 to `width`, 4×4 with stride 2 to twice that, two linear layers."""
    model, _ = build(*configured(width, linear))
    macs, size = 0, 8
    for module in model.modules():
        kind = type(module).__name__
        if kind == "Conv2d":
            size = (size + 2 * module.padding[0] - module.kernel_size[0]) // module.stride[0] + 1
            macs += module.weight.numel() * size**2
        elif kind == "Linear":
            macs += module.weight.numel()
    return macs


def configured(width, linear):
    config = load_config("digits", {"model.options.width": width, "model.options.linear_width": linear})
    return config, load_data(config)


@pytest.mark.slow
def test_cost_is_nine_forward_passes_for_each_image_and_epoch(plan):
    """A joint pass is three clean ones (test_cost), backward twice as much; the images' gradient is nobody's."""
    width, counted = 8, OperationCounter(IMAGES, (1, 8, 8), 10)
    config = plan.config(width, 12)
    images = 2 * 12 * IMAGES
    forward, first = forward_macs(width, 4 * width), config_first(width)
    assert counted(config) == pytest.approx(9 * images * (forward - first / 3), rel=0.02)
    classifier = 4 * width * 10
    assert counted(config, last_layer=False) == pytest.approx(counted(config) * (1 - classifier / forward), rel=1e-9)
    assert counted(plan.config(width, 24)) == pytest.approx(2 * counted(config), rel=1e-6)


def config_first(width):
    model, _ = build(*configured(width, 4 * width))
    return next(m for m in model.modules() if type(m).__name__ == "Conv2d").weight.numel() * 8**2


STEPS = {
    "plain": [],
    "center": ["training.batch_norm.statistics=center"],
    "adversarial": ["training.batch_norm.statistics=adversarial", "training.method=sabr"],
    "rgs": ["training.smoothing={name: rgs, samples: 3}"],
    "pgpe": ["training.smoothing={name: pgpe, pairs: 2}"],
    "checkpointing": ["training.activation_checkpointing=true"],
    "accumulation": ["training.accumulation=4"],
    "no regularizer": ["regularizers.tightness=false", "regularizers.relu_balance=false"],
    "one regularizer": ["regularizers.tightness=false", "regularizers.l1=1e-3"],
    "natural": ["training.method=natural"],
}

LONG_STEPS = {"rgs", "pgpe", "checkpointing", "accumulation"}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[pytest.mark.slow] if name in LONG_STEPS else [])
        for name, settings in STEPS.items()
    ],
)
def test_cost_is_that_of_the_steps_which_a_run_takes(settings):
    """On real images, by the trainer that the configuration makes."""
    tiny = ["data.limit=96", "model.options={width: 2, linear_width: 8}", "training.epochs=60"]
    config = load_config("digits", [*tiny, "epsilon.start_epoch=11", "training.compile=false", *settings])
    dataset = load_data(config)
    model, _ = build(config, dataset)
    step = assemble(config, model.train(), dataset).gradient_step
    images, labels = to_float(dataset.train.images[:8]), dataset.train.labels[:8]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    _ = step.net.graph  # recorded before anything is counted
    macs = []
    for eps, ramp in ((0.0, 0.0), (0.05, 0.5), (0.1, 1.0)):
        with FlopCounterMode(display=False) as counter:
            step.backward(images, labels, scheduled(eps, 1 - eps / 0.1), step.phase(eps, ramp))
        macs.append(counter.get_total_flops() / 2 / len(images))
    phases = OperationCounter(90, (1, 8, 8), 10).by_phase(config)
    assert [phase.images for phase in phases.values()] == [90] * 3
    for phase, measured in zip(phases.values(), macs, strict=True):
        assert phase.macs_per_image == (pytest.approx(measured, rel=1e-9) if phase.epochs else 0)
    again = OperationCounter(90, (1, 8, 8), 10).by_phase(config)
    assert again == phases
    assert all(map(torch.equal, weights, model.parameters()))


def test_cost_counts_replayed_images_and_refuses_what_it_cannot_count():
    counted = OperationCounter(1000, (1, 8, 8), 10)
    config = load_config("digits", ["training.batch_size=32"])
    replaying = load_config(config, ["replay={share: 0.25, data: {name: digits}}"])
    images = 41 * 32 + 16 + 5  # 24 new images in a batch, and 16 in the last one
    assert counted(replaying) == pytest.approx(counted(config) * images / 1000, rel=1e-12)
    with pytest.raises(UsageError, match="backend lirpa: its operations cannot be counted"):
        counted(load_config(config, ["backend=lirpa"]))


def test_every_budget_is_twice_the_one_before_and_spent(plan):
    grid = plan.grid(count, lambda width: TUNED)
    assert sorted({cell.budget for cell in grid.cells}) == [1e7, 2e7, 4e7, 8e7]
    for cell in grid.cells:
        epoch = cell.compute / cell.config.training.epochs
        assert abs(cell.compute - cell.budget) <= 0.51 * epoch
        assert count(cell.config, cell.protocol != "kaplan") == pytest.approx(cell.compute, rel=1e-6)
        assert cell.config.model.options == {"width": cell.width, "linear_width": 4 * cell.width}
        assert (cell.config.data.validation, cell.config.verification.split) == (0.25, "validation")
        assert cell.config.training.epochs >= 4
    least = {cell.budget: cell for cell in grid.cells if cell.width == 2 and cell.protocol == "corrected"}
    assert least[8e7].config.training.epochs == pytest.approx(8 * least[1e7].config.training.epochs, abs=5)
    named = [cell.name for cell in grid.cells]
    assert len(set(named)) == len(named)
    for line in grid.left_out:
        assert "epochs, less than" in line
    assert len(grid.cells) + len(grid.left_out) == 2 * 4 * 4


def test_longer_runs_than_the_most_are_left_out_and_said(tmp_path):
    plan = load_plan(written(tmp_path, "most_epochs: 300\n" + PLAN))
    whole, bounded = load_plan(written(tmp_path)).grid(count, None), plan.grid(count, None)
    kept = [cell.name for cell in whole.cells if cell.config.training.epochs <= 300]
    assert [cell.name for cell in bounded.cells] == kept
    assert 0 < len(kept) < len(whole.cells)
    added = set(bounded.left_out) - set(whole.left_out)
    assert len(added) == len(whole.cells) - len(kept)
    assert all("epochs, more than 300" in line for line in added)


def test_protocols_differ_in_warmup_last_layer_and_tuning(plan):
    base = plan.base
    for cell in plan.grid(count, lambda width: TUNED).cells:
        config, share = cell.config, cell.config.training.epochs / base.training.epochs
        if cell.protocol == "kaplan":
            assert (config.epsilon.start_epoch, config.epsilon.warmup_epochs) == (2, 3)
            assert config.optimizer.warmup_epochs == pytest.approx(6 * 3 / 30)
            assert (config.optimizer.lr, config.training.batch_size) == (base.optimizer.lr, base.training.batch_size)
        else:
            assert config.epsilon.warmup_epochs == round(30 * share)
            assert config.optimizer.warmup_epochs == pytest.approx(6 * share)
            assert (config.optimizer.lr, config.training.batch_size) == (0.003, 32)
            assert config.optimizer.arguments["betas"] == [0.9, 0.99]
    untuned = plan.grid(count, None)
    assert {cell.protocol for cell in untuned.cells} == {"kaplan"}


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 17, 60, 61, 240])
def test_a_stretched_schedule_is_one_that_can_be_trained(epochs):
    base = load_config("digits", {"optimizer.warmup_epochs": 2.0, "optimizer.schedule": "infinite"})
    config = load_config(base, stretched(base, epochs))
    assert config.ramp_epochs[1] <= epochs
    assert config.epsilon.warmup_epochs == pytest.approx(30 * epochs / 60, abs=0.51)
    assert config.optimizer.schedule.decay_epochs == pytest.approx(epochs / 60)
    if epochs == 60:
        assert config == base
    trainer = assemble(config, *build_for(config))
    assert trainer.lr(trainer.total_steps - 1) > 0


def build_for(config):
    config = load_config(config, {"data.limit": 64, "model.options.width": 2, "model.options.linear_width": 4})
    dataset = load_data(config)
    return build(config, dataset)[0], dataset


def test_what_is_tuned_is_tried_at_each_width(plan):
    cells = plan.tuning_cells(count).cells
    assert len(cells) == 2 * 2 * 2 * 1
    assert {(c.width, c.tried.lr, c.tried.batch_size, c.tried.beta2) for c in cells} == {
        (width, lr, batch, 0.99) for width in (4, 8) for lr in (1e-3, 4e-3) for batch in (32, 64)
    }
    for cell in cells:
        assert cell.config.optimizer.lr == cell.tried.lr
        assert cell.config.training.batch_size == cell.tried.batch_size


# --- what a plan may not say -----------------------------------------------------------------------------------------


def test_a_budget_below_an_epoch_says_the_least_which_is_enough(tmp_path):
    plan = load_plan(written(tmp_path, first_budget="1e4"))
    with pytest.raises(UsageError, match=r"first_budget: 1e\+04 FLOP are less than an epoch of width 2: at least") as e:
        plan.grid(count, None)
    least = float(str(e.value).split()[-1])
    enough = load_plan(written(tmp_path, first_budget=f"{least:.6g}"))
    enough.grid(count, None)
    assert least == pytest.approx(18 * IMAGES * 4, rel=1e-3)
    with pytest.raises(UsageError, match="first_budget"):
        load_plan(written(tmp_path, first_budget=f"{0.99 * least:.6g}")).grid(count, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_width": "{training.batch_size: 4}"}, "runs may differ in model.options alone"),
        ({"widths": "[2, 4]"}, "widths"),
        ({"widths": "[4, 2, 8]"}, "must ascend"),
        ({"first_budget": "0"}, "first_budget"),
        ({"protocols": "{}"}, "protocols"),
        ({"validation": "0"}, "must be held out"),
        ({"overrides": "{training.epochs: 3}"}, "training.epochs follows from budget and width"),
        ({"overrides": "{optimizer.lrr: 3}"}, "unknown key optimizer.lrr"),
        ({"base": "digit"}, "unknown config file 'digit': did you mean digits"),
        ({"budgets": "100"}, "budgets"),
        ({"seeds": "[1, 1]"}, "seed"),
        ({"most_epochs": "3"}, "most_epochs: 3 is less than least_epochs, 4"),
    ],
)
def test_what_is_wrong_with_a_plan_is_said(tmp_path, changes, message):
    text = "seeds: [0]\nmost_epochs: 1000\n" + PLAN
    if "protocols" in changes:
        text = text.replace("  kaplan: {warmup_epochs: 3, last_layer: false, tuned: false}\n  corrected: {}\n", "")
    with pytest.raises(UsageError) as error:
        load_plan(written(tmp_path, text, **changes))
    assert message in str(error.value)
    assert "plan.yaml: " in str(error.value)


NOT_TO_OVERRIDE = {
    "seed": "seeds",
    "training.epochs": "budget and width",
    "data.validation": "validation",
    "verification.split": "validation",
    "model.options.width": "widths",
    "model.options.linear_width": "per_width",
}


@pytest.mark.parametrize("spelling", ["dotted", "nested", "command line"])
@pytest.mark.parametrize("key", NOT_TO_OVERRIDE)
def test_what_the_plan_says_itself_is_not_overridden(tmp_path, key, spelling):
    """It would change nothing, and nobody would be told."""
    value = "test" if key == "verification.split" else 5
    nested = reduce(lambda inner, name: f"{{{name}: {inner}}}", reversed(key.split(".")), value)
    written_down = {"dotted": f"{{{key}: {value}}}", "nested": nested, "command line": "{}"}[spelling]
    path = written(tmp_path, per_width="{model.options.linear_width: 4}", overrides=written_down)
    with pytest.raises(UsageError, match=rf"plan\.yaml: {re.escape(key)} .*{NOT_TO_OVERRIDE[key]}"):
        load_plan(path, [f"{key}={value}"] if spelling == "command line" else [])


def test_a_tuned_protocol_needs_a_tuning(tmp_path):
    text = "\n".join(line for line in PLAN.splitlines() if not line.startswith("tuning"))
    with pytest.raises(UsageError, match=r"protocols\.corrected is tuned: say how under tuning, or tuned: false"):
        load_plan(written(tmp_path, text))


def test_runs_that_differ_in_more_are_not_compared(plan):
    first = plan.config(2, 10)
    require_comparable(plan, {"a": first, "b": plan.config(8, 40, 3, TUNED)})
    other = load_config(first, {"regularizers.weight": 0.1})
    with pytest.raises(UsageError, match=r"b and a differ in more than a law allows: regularizers\.weight is 0\.5"):
        require_comparable(plan, {"a": first, "b": other})
