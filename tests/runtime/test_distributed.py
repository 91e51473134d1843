"""Several processes against one: the same gradients, runs and proofs, whatever happens to a process on the way."""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import safetensors.torch
import torch
from torch import nn

import certtrain
from certtrain.bounds import BoundedModel, linf_box
from certtrain.cli import main
from certtrain.cli.main import build_parser
from certtrain.config.methods import METHOD_SECTIONS
from certtrain.config.smoothing import NoSmoothingSection, PGPESection, RGSSection
from certtrain.data import Augmentation, Split, epoch_batches
from certtrain.errors import UsageError
from certtrain.runs.callbacks import Follower
from certtrain.runs.checkpoint import load_checkpoint
from certtrain.runtime.distributed import ALONE, Ranks, process_group
from certtrain.training.method import Phase, scheduled
from certtrain.training.methods import CCIBP, IBP, MTLIBP, SABR, STAPS, TAPS, Adversarial, CrownIBP, ExpIBP, Natural
from certtrain.training.smoothing import smoothed
from certtrain.training.step import GradientStep
from certtrain.verification.attacks import PGD, Ensemble, TargetedAPGD
from certtrain.verification.verify import verify
from tests.commands import contents, exit_code, one_thread, start_ranks, train_arguments
from tests.networks import randomized

FOUR = pytest.param(4, marks=pytest.mark.slow)

# --- a share of a batch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [0, 1, 6, 7, 100])
def test_shares_are_the_whole_and_even(size, length):
    shares = [Ranks(rank, size).share(range(length)) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(length))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shares_of_a_batch_are_shuffled_and_augmented_as_the_batch():
    split = Split(torch.randint(0, 256, (37, 1, 8, 8), dtype=torch.uint8), torch.arange(37))
    draw = partial(epoch_batches, split, 16, seed=1, epoch=2, augmentation=Augmentation(flip=True, crop=2))
    shares = zip(*(draw(share=Ranks(rank, 3).share) for rank in range(3)), strict=True)
    for (images, labels), parts in zip(draw(), shares, strict=True):
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)


def test_dropout_is_refused_where_batches_are_shared():
    x = torch.rand(4, 3)
    net = BoundedModel(nn.Sequential(nn.Linear(3, 2), nn.Dropout()).train(), x, batch_sum=lambda part: part)
    with pytest.raises(UsageError, match="Dropout"):
        net.ibp(linf_box(x, 0.1), clean=x)


# --- gradients and proofs, in float64 --------------------------------------------------------------------------------

METHODS = {
    "ibp": {"method": IBP()},
    "fusion": {"method": CrownIBP(loss_fusion=True)},
    "checkpointing": {"method": IBP(), "activation_checkpointing": True},
    "sabr": {"method": SABR(attack={"steps": 2, "restarts": 2}, w=0.7)},
    "staps": {"method": STAPS(attack={"steps": 2}, latent={"steps": 2})},
    "exp-ibp": {"method": ExpIBP(attack={"steps": 2, "statistics": "running"})},
    "natural": {"method": Natural()},
    "adversarial": {"method": Adversarial(attack={"steps": 2}), "statistics": "adversarial"},
    "crown-ibp": {"method": CrownIBP()},
    "cc-ibp": {"method": CCIBP(attack={"steps": 2})},
    "mtl-ibp": {"method": MTLIBP(attack={"steps": 2})},
    "taps": {"method": TAPS(latent={"steps": 2}, shrink=0.8)},
    "center": {"method": SABR(attack={"steps": 2}, shrink=0.8), "statistics": "center"},
    "rgs": {"method": SABR(attack={"steps": 2}), "smoothing": RGSSection(std=0.01)},
    "pgpe": {"method": SABR(attack={"steps": 2}), "smoothing": PGPESection(std=0.01, pairs=2)},
}
CASES = [(phase, "ibp", parts) for phase in Phase for parts in (1, 2, 4)]
CASES += [
    (Phase.WARMUP, method, parts) for method in ("fusion", "checkpointing", "sabr", "exp-ibp") for parts in (1, 2)
]
CASES += [(Phase.FULL, method, parts) for method in ("staps", "taps", "mtl-ibp", "rgs") for parts in (1, 2)]
CASES += [(Phase.FULL, method, 1) for method in ("adversarial", "cc-ibp", "center", "pgpe")]
CASES += [(Phase.NATURAL, "natural", 1), (Phase.WARMUP, "crown-ibp", 1)]
BATCH = 10  # not divisible by 4: shares of 2 and 3 images
ATTACK = Ensemble((PGD(1, 3), TargetedAPGD(2)))


class WithUnusedLayer(nn.Module):
    """A layer that forward does not use must get no gradient, as in one process."""

    def __init__(self):
        super().__init__()
        convolution = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        hidden = nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.network, self.unused = nn.Sequential(convolution, hidden, nn.Linear(6, 5)), nn.Linear(2, 2)

    def forward(self, x):
        return self.network(x)


def examples():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (BATCH, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 5, (BATCH,), generator=generator)


def network():
    torch.manual_seed(0)
    return randomized(WithUnusedLayer()).double().train()


def steps(ranks):
    """For each case two steps, of 10 and of 9 images: their metrics, gradients, and the buffers after them."""
    images, labels = examples()
    images, at = images.double() / 255, scheduled(0.01, 0.25, like=images.new_empty(0, dtype=torch.float64))
    found = {}
    for phase, method, parts in CASES:
        model = network()
        net = BoundedModel(model, images[:1], batch_sum=ranks.all_reduce if ranks.world_size > 1 else None)
        options = {"smoothing": NoSmoothingSection(), **METHODS[method]}
        section = options.pop("smoothing")
        step = smoothed(section, GradientStep(net, **options, l1=1e-4, accumulation=parts, ranks=ranks))
        outcomes = []
        for size in (BATCH, BATCH - 1):
            share = [ranks.share(tensor[:size]) for tensor in (images, labels)]
            metrics = step.backward(*share, at, phase, size)
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            outcomes.append({"metrics": metrics, "gradients": gradients, "buffers": dict(model.named_buffers())})
            outcomes[-1] = copy.deepcopy(outcomes[-1])
            model.zero_grad()
        found[phase.value, method, parts] = outcomes
    return found


def proofs(ranks):
    images, labels = examples()
    model = network().float().eval()
    labels = torch.where(torch.arange(BATCH) < 8, model(images / 255).argmax(1), labels)
    return verify(
        model, Split(images, labels), [0.001, 0.3], ["ibp", "crown"], attack=ATTACK, batch_size=3, ranks=ranks
    )


def answer(folder):
    with process_group() as ranks:
        torch.save({"steps": steps(ranks), "proofs": list(map(vars, proofs(ranks)))}, folder / f"{ranks.rank}.pt")


@pytest.fixture(scope="module")
def alone():
    with one_thread():
        return {"steps": steps(ALONE), "proofs": list(map(vars, proofs(ALONE)))}


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), FOUR])
def together(request, tmp_path_factory):
    """What each of several processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    children = start_ranks(request.param, partial(answer, folder), folder / "log")
    assert [exit_code(child) for child in children] == [0] * request.param, (folder / "log").read_text()
    assert (folder / "log").read_text() == ""
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


def test_gradients_statistics_and_metrics_are_those_of_the_whole_batch(alone, together):
    for found in together:
        for case, expected in alone["steps"].items():
            for shared, other in zip(found["steps"][case], expected, strict=True):
                for kind, values in other.items():
                    assert shared[kind].keys() == values.keys()
                    for name, value in values.items():
                        torch.testing.assert_close(
                            shared[kind][name], value, rtol=1e-8, atol=1e-11, msg=lambda m, w=(case, name): f"{w}: {m}"
                        )


def test_every_method_is_shared_here():
    used = {METHODS[name]["method"].options.name for _, name, _ in CASES}
    assert used == METHOD_SECTIONS.keys()


def test_all_ranks_have_the_same_bits(together):
    first, *others = ([o for os in found["steps"].values() for o in os] for found in together)
    for other in others:
        for one, another in zip(first, other, strict=True):
            assert all(torch.equal(one[kind][name], another[kind][name]) for kind in one for name in one[kind])


def test_proofs_are_those_of_one_process_in_order(alone, together):
    for found in together:
        for shared, other in zip(found["proofs"], alone["proofs"], strict=True):
            for name in ("correct", "attacked", "proved"):
                assert torch.equal(shared[name], other[name])
            torch.testing.assert_close(shared["margin"], other["margin"])
            assert [(s.method, s.images, s.proved) for s in shared["stages"]] == [
                (s.method, s.images, s.proved) for s in other["stages"]
            ]
    assert not alone["proofs"][0]["correct"].all()
    assert alone["proofs"][0]["proved"].any()


# --- whole runs ------------------------------------------------------------------------------------------------------

# Twenty steps, of 24 and of 13 images.
TWENTY_STEPS = ["data.limit=37", "training.batch_size=24", "training.epochs=10", "epsilon.warmup_epochs=5"]


def train_here(*arguments):
    return main(train_arguments(*arguments))


def train_by(size, folder, *more, work=train_here):
    """Exit codes of `size` processes that train into `folder`, and what they printed."""
    log = folder.with_suffix(".log")
    children = start_ranks(size, partial(work, folder, *TWENTY_STEPS, *more), log)
    return [exit_code(child) for child in children], log.read_text()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    with one_thread():
        assert train_here(folder, *TWENTY_STEPS) == 0
    return folder


def check_same_run_within_rounding(folder, reference):
    records, expected = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (folder, reference)
    )
    assert [record["step"] for record in records] == [record["step"] for record in expected]
    for record, other in zip(records, expected, strict=True):
        for name in ("loss", "natural_error", "verified_error"):
            assert record.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-5), (record["epoch"], name)
        assert [layer["radius"] for layer in record["layers"]] == pytest.approx(
            [layer["radius"] for layer in other["layers"]], rel=1e-3
        )
    weights, expected = (safetensors.torch.load_file(run / "model.safetensors") for run in (folder, reference))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)
    summary, expected = (json.loads((run / "summary.json").read_text()) for run in (folder, reference))
    for name in ("images", "natural_error", "pgd_error", "verified_error", "steps"):
        assert summary[name] == expected[name], name
    assert {path.name for path in folder.iterdir()} == {path.name for path in reference.iterdir()}


@pytest.mark.parametrize("size", [2, FOUR])
def test_a_run_by_several_processes_is_the_run_of_one(tmp_path, one, size):
    codes, log = train_by(size, tmp_path / "run")
    assert codes == [0] * size, log
    assert log.count("epoch 10/10") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["processes"] == size
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    check_same_run_within_rounding(tmp_path / "run", one)


@pytest.mark.slow
def test_averaged_and_smoothed_a_run_by_two_processes_is_the_run_of_one(tmp_path):
    options = ["training.averaging={name: ema, decay: 0.8}", "training.smoothing=rgs", "training.epochs=4"]
    options += ["epsilon.warmup_epochs=2"]
    with one_thread():
        assert train_here(tmp_path / "one", *TWENTY_STEPS, *options) == 0
    codes, log = train_by(2, tmp_path / "two", *options)
    assert codes == [0, 0], log
    check_same_run_within_rounding(tmp_path / "two", tmp_path / "one")
    raw, expected = (safetensors.torch.load_file(tmp_path / run / "model-raw.safetensors") for run in ("two", "one"))
    for name, value in expected.items():
        torch.testing.assert_close(raw[name], value, rtol=1e-3, atol=1e-4)


def train_and_signal(number, rank, step, *arguments):
    """Train; this rank gets the signal as this step ends."""
    after_step = Follower.after_step

    def replacement(self, trainer):
        if (os.environ["RANK"], trainer.step) == (str(rank), step):
            os.kill(os.getpid(), number)
        return after_step(self, trainer)

    Follower.after_step = replacement
    code = train_here(*arguments)
    assert (arguments[0] / "last.ckpt").is_file(), "torchrun ends all processes when one has ended"
    return code


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_in_one_process_a_run_ends_and_one_process_resumes_it(tmp_path, one, cli, rank):
    run = tmp_path / "run"
    codes, log = train_by(2, run, work=partial(train_and_signal, signal.SIGKILL, rank, 7))
    assert codes == [-signal.SIGKILL if this == rank else 1 for this in range(2)]
    assert log.splitlines()[-1] == (
        "error: another of the 2 processes has ended or hangs, and so all end; "
        "a run continues from its last checkpoint with --resume"
    )
    assert load_checkpoint(run / "last.ckpt")["trainer"]["step"] == 6
    assert cli(*train_arguments(run, *TWENTY_STEPS, "--resume")).code == 0
    check_same_run_within_rounding(run, one)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "step"), [(signal.SIGINT, 5), (signal.SIGTERM, 8)])
def test_a_signal_to_one_process_ends_all_at_its_step_and_others_resume(tmp_path, one, sent, step):
    """Inside an epoch, and at the end of one."""
    run = tmp_path / "run"
    work = partial(train_and_signal, sent, 1, step)
    codes, log = train_by(3, run, "training.checkpoint_seconds=1000", work=work)
    assert codes == [128 + sent] * 3, log
    assert log.splitlines()[-1] == f"saved {run} at step {step}; continue with --resume"
    assert load_checkpoint(run / "last.ckpt")["trainer"]["step"] == step
    codes, log = train_by(2, run, "training.checkpoint_seconds=1000", "--resume")
    assert codes == [0, 0], log
    assert f"resuming {run} after step {step} of 20" in log
    check_same_run_within_rounding(run, one)


class EndsAt(certtrain.Observer):
    def __init__(self, step):
        self.step = step

    def after_step(self, trainer):
        return trainer.step == self.step


def train_until(rank, step, config, folder):
    """This rank's callback ends the run after this step."""
    callbacks = [EndsAt(step)] if os.environ["RANK"] == str(rank) else []
    run = certtrain.train(config, folder, device="cpu", callbacks=callbacks)
    return 0 if run.summary is None and run.interrupted_by is None else 1


def test_a_callback_of_one_process_ends_all_at_its_step(tmp_path, one):
    run = tmp_path / "run"
    children = start_ranks(2, partial(train_until, 1, 5, one / "config.yaml", run), tmp_path / "log")
    assert [exit_code(child) for child in children] == [0, 0], (tmp_path / "log").read_text()
    assert load_checkpoint(run / "last.ckpt")["trainer"]["step"] == 5


# --- written wrong ---------------------------------------------------------------------------------------------------

WRONG = {
    "fewer images than processes": (["data.limit=2"], "3 processes: 2 training images in batches of 24 leave one of 2"),
    "a last batch too small": (["data.limit=50"], "50 training images in batches of 24 leave one of 2"),
    "a batch that does not divide": (["training.batch_size=32"], "cannot be shared .* choose 30 or 33"),
    "nor by the parts": (["training.accumulation=3"], "3 processes x 3 parts: choose 18 or 27"),
    "fewer tests": (["verification.limit=2"], "2 test images for 3 processes"),
    "one GPU for all": (["--device", "cuda:0"], "device .?cuda:0"),
    "a typo": (["optimizer.nme=SGD"], "did you mean name"),
    "a model that cannot be": (["model.options.width=wide"], "model cnn-small: width is a whole number"),
    "data that is not there": (["data.name=mnist", "data.root=nowhere"], "nowhere"),
    "auto_LiRPA": (["backend=lirpa"], "backend lirpa takes whole batches: train in one process"),
    "only in the last process": (["data.name=npz", "data.path=not-on-this-machine"], "not-on-this-machine"),
}


def train_wrongly(folder):
    codes = []
    for name, (arguments, _) in WRONG.items():
        here = name != "only in the last process" or os.environ["RANK"] == "2"
        codes.append(train_here(folder, *TWENTY_STEPS, *(arguments if here else [])))
    (folder.parent / f"{os.environ['RANK']}.json").write_text(json.dumps(codes))


@pytest.mark.slow
def test_what_is_wrong_is_said_once_before_anything_is_written(tmp_path):
    log = tmp_path / "log"
    children = start_ranks(3, partial(train_wrongly, tmp_path / "run"), log)
    assert [exit_code(child) for child in children] == [0] * 3, log.read_text()
    lines = log.read_text().splitlines()
    assert len(lines) == len(WRONG), log.read_text()
    for line, (_, message) in zip(lines, WRONG.values(), strict=True):
        assert line.startswith("error: ")
        assert re.search(message, line), line
    for rank in range(3):
        codes = dict(zip(WRONG, json.loads((tmp_path / f"{rank}.json").read_text()), strict=True))
        assert codes.pop("data that is not there") == codes.pop("only in the last process") == 1
        assert set(codes.values()) == {2}
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_taken_stays(tmp_path, one):
    before = contents(one)
    codes, log = train_by(2, one)
    assert codes == [2, 2]
    assert log.count("\n") == 1
    assert "holds a run" in log
    assert contents(one) == before


# --- as documented ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun(tmp_path, one):
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = train_arguments(run, *TWENTY_STEPS)
    subprocess.run([*torchrun, "-m", "certtrain.cli", *arguments], check=True, capture_output=True)
    check_same_run_within_rounding(run, one)


def test_several_processes_search_for_radii_as_one(tmp_path, one, cli):
    shared, alone = (shutil.copytree(one, tmp_path / name) for name in ("shared", "alone"))
    arguments = ["--radius", "0.1", "--limit", "40", "--device", "cpu"]
    assert cli("verify", alone, *arguments).code == 0
    log = tmp_path / "log"
    children = start_ranks(3, partial(main, ["verify", str(shared), *arguments]), log)
    assert [exit_code(child) for child in children] == [0] * 3, log.read_text()
    assert log.read_text().count("proved radius of at least") == 1
    assert not (shared / "radius-1.json").exists()
    found, expected = (json.loads((run / "radius.json").read_text()) for run in (shared, alone))
    assert found["radii"] == pytest.approx(expected["radii"], abs=0.1 / 2**13)
    for name in ("images", "correct", "pgd_error", "natural_error"):
        assert found[name] == expected[name]


def verify_two_images(run, folder):
    codes = {
        option: main(["verify", str(run), "--limit", "2", "--device", "cpu", option, "0.01"])
        for option in ("--eps", "--radius")
    }
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(codes))


def test_fewer_images_than_processes_are_refused(tmp_path, one):
    log = tmp_path / "log"
    children = start_ranks(3, partial(verify_two_images, one, tmp_path), log)
    assert [exit_code(child) for child in children] == [0] * 3, log.read_text()
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {"--eps": 2, "--radius": 2}, log.read_text()
    assert log.read_text() == 2 * "error: 2 test images for 3 processes: take more images, or fewer processes\n"


SHARED = {"train", "verify"}  # as is tested above, and below
REFUSED = (
    "study grid.yaml",
    "tune search.yaml",
    "scale plan.yaml",
    "plan --budget 1e15",
    "compare runs",
    "verify run --vnnlib property.vnnlib",
    "verify network.onnx --vnnlib property.vnnlib",
    "check proofs.parquet --model run",
    "export run --onnx",
    "export run --vnnlib out",
    "report run",
    "config",
    "init",
    "models",
    "completion bash",
)


def test_every_command_is_shared_or_refused():
    parser = build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    assert SHARED | {words.split()[0] for words in REFUSED} == commands.choices.keys()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("words", REFUSED)
def test_what_several_processes_do_not_share_is_refused_once(cli, run, tmp_path, monkeypatch, words, rank):
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    before = contents(tmp_path)
    outcome = cli(*words.split())
    assert (outcome.code, outcome.out, contents(tmp_path)) == (2, "", before)
    command = "verify --vnnlib" if words.startswith("verify") else words.split()[0]
    message = f"error: certtrain {command} is for one process, and torchrun has started 2: start it without\n"
    assert outcome.err == (message if rank == 0 else "")


def test_several_processes_verify_as_one(tmp_path, one):
    run, log = shutil.copytree(one, tmp_path / "run"), tmp_path / "log"
    verified = ["verify", str(run), "--device", "cpu", "--eps", "0.01,0.1"]
    children = start_ranks(2, partial(main, verified), log)
    assert [exit_code(child) for child in children] == [0, 0], log.read_text()
    results = json.loads((run / "verify.json").read_text())
    (expected,) = json.loads((one / "summary.json").read_text())["radii"]
    for name in ("images", "natural_error", "pgd_error", "verified_error"):
        assert results["radii"][1][name] == expected[name]
