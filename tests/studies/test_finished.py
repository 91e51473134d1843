"""Of what lies in a run directory, comparisons and reports take what is about the run's network and images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from certtrain.data import load_dataset
from certtrain.errors import UsageError
from certtrain.report.page import error_curves, newest_results
from certtrain.runs.checkpoint import load_model, save_weights
from certtrain.studies.finished import read_finished
from certtrain.verification.verify import verify

EPS = 0.05  # the run's own is 0.1


def other_weights(run, tmp_path):
    """Of an epoch before, say."""
    model = load_model(run)
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    save_weights(run / "model-raw.safetensors", model)
    return [run / "model-raw.safetensors"]


def other_images(run, tmp_path):
    """Of the same shape and number, and with the same labels."""
    for part in ("train", "test"):
        split = getattr(load_dataset("digits"), part)
        images = split.images.permute(0, 2, 3, 1).flip(1).numpy()
        np.savez(tmp_path / f"{part}.npz", images=images, labels=split.labels.numpy())
    return [run, "data.name=npz", f"data.path={tmp_path}"]


def the_checkpoint(run, tmp_path):
    """Of a run that is finished, it holds the same weights."""
    return [run / "last.ckpt"]


@pytest.mark.parametrize(("verified", "own"), [(other_weights, False), (other_images, False), (the_checkpoint, True)])
def test_results_of_another_network_or_of_other_images_are_not_the_run_s(cli, run, tmp_path, verified, own):
    summary = json.loads((run / "summary.json").read_text())
    assert cli("verify", *verified(run, tmp_path), "--eps", EPS).code == 0
    assert json.loads((run / "verify.json").read_text())["eps"] == EPS
    _, curves = error_curves(newest_results(run, summary))
    assert (EPS in curves["verified"][0]) == own
    if not own:
        with pytest.raises(UsageError, match=r"was not verified at epsilon 0\.05"):
            read_finished([run], EPS, None)
        assert cli("verify", run, "--eps", EPS).code == 0
    (expected,) = verify(load_model(run), load_dataset("digits").test, EPS, limit=50)
    (finished,) = read_finished([run], EPS, None)
    assert finished.result["verified_error"] == expected.verified_error
    if own:  # verdicts are kept of weights that were handed out, not of checkpoints
        assert finished.verdicts is None
    else:
        assert finished.proved.tolist() == expected.proved.tolist()


@pytest.mark.parametrize("options", [["--radius", "0.2"], []])
def test_a_file_says_what_it_was_made_with(cli, run, options):
    """And what it says is the same wherever it stands."""
    assert cli("verify", run, *options, "--limit", 2).code == 0
    file = run / ("radius.json" if options else "verify.json")
    written, summary = (json.loads(path.read_text()) for path in (file, run / "summary.json"))
    for key in ("seed", "weights_sha256", "split_sha256", "versions"):
        assert written[key] == summary[key]
    assert written["config"]["model"] == summary["config"]["model"]


def test_one_question_does_not_hide_another(cli, run):
    """The advice is "verify --eps adds it": all that was added is found, of two answers the newer."""
    for words in (["--eps", "0.05"], ["--eps", "0.02"], ["--eps", "0.05", "--method", "ibp,crown"]):
        assert cli("verify", run, *words).code == 0
    for eps, method in ((0.1, "ibp"), (0.05, "ibp"), (0.02, "ibp"), (0.05, "ibp,crown")):
        (finished,) = read_finished([run], eps, method)
        assert (finished.result["eps"], finished.result["method"]) == (eps, method)
        assert finished.verdicts is not None
    assert read_finished([run], 0.05, None)[0].result["method"] == "ibp,crown"
