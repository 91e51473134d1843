"""What runs leave and tell, compared with what others do."""

from __future__ import annotations

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import certtrain

SPEED = {"images_per_second", "seconds"}  # what differs from one run to the same run again
CHECKPOINTS_ONLY_WHEN_ASKED = "training.checkpoint_seconds=1000"


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_speed(records):
    return [{key: value for key, value in record.items() if key not in SPEED} for record in records]


def scalars(folder):
    """TensorBoard's numbers: {tag: [(epoch, value), …]}."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def check_same_run(folder, reference):
    """`folder` holds what an uninterrupted run leaves, to the last bit but for times."""
    assert (folder / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert without_speed(metrics(folder)) == without_speed(metrics(reference))
    numbers, expected = (
        {tag: values for tag, values in scalars(run).items() if tag.removeprefix("train/") not in SPEED}
        for run in (folder, reference)
    )
    assert numbers == expected
    assert {path.name for path in folder.iterdir()} == {path.name for path in reference.iterdir()}


class Told(certtrain.Observer):
    """Notes every call, and ends the run at one of them."""

    def __init__(self, end=None):
        self.calls, self.end = [], end

    def after_step(self, trainer):
        self.calls.append(("step", trainer.step))
        return self.calls[-1] == self.end

    def after_epoch(self, trainer, report):
        self.calls.append(("epoch", report.epoch))
        return self.calls[-1] == self.end
