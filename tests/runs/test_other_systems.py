"""Systems without what only POSIX has: Windows, and in part macOS, as far as that can be had by taking it away."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest

from certtrain.runs import lock
from certtrain.runs.callbacks import Recorder
from certtrain.verification import results
from tests.commands import exit_code, into_a_pipe_that_nobody_reads, start, train_arguments
from tests.runs.comparing import check_same_run

LACKING = {
    signal: ["SIGPIPE", "SIGKILL", "SIGHUP", "SIGALRM", "setitimer"],
    os: ["EX_TEMPFAIL", "EX_SOFTWARE", "O_NOFOLLOW", "fork", "getuid", "sched_getaffinity", "setpgid", "sysconf"],
}


def nothing():
    pass


def take_away(then=nothing):
    """In a process of its own: names that Windows lacks, locks, and opening folders, which it refuses."""
    for module, names in LACKING.items():
        for name in names:
            delattr(module, name)
    lock.fcntl = results.fcntl = None
    opened = os.open

    def without_folders(path, *arguments, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *arguments, **options)

    os.open = without_folders
    then()


def end_at_step_four():
    after_step = Recorder.after_step

    def replacement(self, trainer):
        if trainer.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return after_step(self, trainer)

    Recorder.after_step = replacement


@pytest.mark.slow
def test_a_run_is_interrupted_resumed_and_verified_there(tmp_path, reference):
    run, log = tmp_path / "run", tmp_path / "log"
    for more, then, code in (
        ([], end_at_step_four, 128 + signal.SIGTERM),
        (["--resume"], into_a_pipe_that_nobody_reads, 128 + 13),
        (["--resume"], nothing, 0),
    ):
        assert exit_code(start(train_arguments(run, *more), log, partial(take_away, then))) == code, log.read_text()
    check_same_run(run, reference)
    verified = ["verify", str(run), "--device", "cpu", "--method", "ibp,crown", "--results", str(tmp_path / "results")]
    assert exit_code(start(verified, log, take_away)) == 0, log.read_text()
