"""Run directories as training leaves them, of made-up results."""

from __future__ import annotations

import hashlib
import json

from certtrain.config import load_config
from certtrain.runs.directory import write_results
from certtrain.runs.verdicts import Verdicts, add_verdicts, conditions_of

STUDY = """
base: digits
seeds: [0, 1]
overrides:
  data.limit: 96
  model.options: {width: 2, linear_width: 8}
  epsilon: {max: 0.01, start_epoch: 1, warmup_epochs: 1}
  training: {epochs: 2, batch_size: 32, checkpoint_seconds: 0}
  optimizer.milestones: []
  verification: {limit: 200, pgd_steps: 2}
grid:
  optimizer.lr: [0.01, 0.03]
"""


def write_run(
    folder,
    images,
    *,
    seed=0,
    eps=0.1,
    method="ibp",
    arithmetic=None,
    test_set="these",
    epochs=(),
    extra=None,
    **overrides,
):
    """A finished run whose images met the fates that the letters of `images` say, of `test_set`."""
    folder.mkdir(parents=True)
    config = load_config("digits", {"seed": seed, **overrides})
    (folder / "config.yaml").write_text(config.to_yaml())
    split, result = config.verification.split, result_of(images, eps, method, arithmetic)
    summary = {**result, "split": split, "train_seconds": 10.0 + seed, "radii": [result], **(extra or {})}
    (folder / "summary.json").write_text(json.dumps(summary))
    add_verdicts(folder, [_verdicts(config, images, eps, method, arithmetic, test_set)])
    lines = [json.dumps({"epoch": epoch + 1, "verified_error": error}) for epoch, error in enumerate(epochs)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def result_of(images, eps=0.1, method="ibp", arithmetic=None):
    count = len(images)
    proved, attacked, wrong = (images.count(letter) for letter in "pam")
    return {
        "eps": eps,
        "method": method,
        "arithmetic": arithmetic,
        "images": count,
        "natural_error": wrong / count,
        "pgd_error": (wrong + attacked) / count,
        "verified_error": 1 - proved / count,
        "stages": [],
    }


def verify_again(folder, images, *, elsewhere=False, eps=0.1, method="ibp", asked=None):
    """As `certtrain verify` leaves it, whose results were written elsewhere, or to the run; asked: other settings."""
    config = load_config(folder / "config.yaml", asked or {})
    if not elsewhere:
        content = {"split": "test", "radii": [result_of(images, eps, method)], "config": config.model_dump(mode="json")}
        write_results(folder / "verify.json", content)
    add_verdicts(folder, [_verdicts(config, images, eps, method)])


def _verdicts(config, images, eps, method, arithmetic=None, test_set="these"):
    return Verdicts(
        split=config.verification.split,
        sha256=hashlib.sha256(test_set.encode()).hexdigest(),
        eps=eps,
        method=method,
        arithmetic=arithmetic,
        conditions=dict(conditions_of(config.verification, config.backend, method)),
        images=images,
    )


def pretend_finished(study, folder):
    for run in study.runs:
        values = run.config.model_dump(mode="json")
        write_run(folder / run.name, "ppum", seed=values.pop("seed"), **values)
