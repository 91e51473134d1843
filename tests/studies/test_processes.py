"""Processes of their own: what comes back of each, and that they end with who started them."""

from __future__ import annotations

import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from certtrain.errors import FolderInUse, UsageError
from certtrain.studies.processes import BROKEN, IN_USE, Ended, Processes


def succeed(device):
    print(f"on {device}")
    return 0


def find_fault(device):
    raise UsageError("this is wrong")


def break_down(device):
    raise ZeroDivisionError("by nought")


def find_it_taken(device):
    raise FolderInUse("somebody is in it")


def die(device):
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_ever(device):
    signal.pause()


@pytest.mark.slow
def test_each_says_how_it_ended(tmp_path):
    work = {"a/good": succeed, "wrong": find_fault, "taken": find_it_taken, "broken": break_down, "killed": die}
    ended = {}
    with Processes(2, "cpu", tmp_path / "logs") as processes:
        left = dict(work)
        while left or processes.names:
            while left and processes.free:
                name = next(iter(left))
                processes.start(name, left.pop(name))
            ended |= {one.name: (one.code, one.message) for one in processes.wait(60)}
    assert ended == {
        "a/good": (0, ""),
        "wrong": (UsageError.exit_code, "this is wrong"),
        "taken": (IN_USE, "somebody is in it"),
        "broken": (BROKEN, "ZeroDivisionError: by nought"),
        "killed": (-signal.SIGKILL, ""),
    }
    assert (tmp_path / "logs" / "a--good.log").read_text() == "on cpu\n"
    assert (tmp_path / "logs" / "wrong.log").read_text() == "error: this is wrong\n"


@contextmanager
def little_memory(more):
    """As much as there is in use, and `more` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_any_number_of_processes_may_be_allowed(tmp_path):
    with Processes(2**31 - 1, "cpu", tmp_path) as processes:
        processes.start("waiting", wait_for_ever)  # without a limit, which what all are copies of would have, too
        with little_memory(1 << 30):
            processes.start("a", succeed)
        (ended,) = processes.wait(60)
    assert (ended.name, ended.code) == ("a", 0)


def turn_a_deaf_ear(ready, device):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.touch()
    wait_for_ever(device)


def test_what_is_killed_because_it_did_not_end_when_asked_has_not_failed(tmp_path):
    with Processes(1, "cpu", tmp_path, kill_after=0.0) as processes:
        processes.start("deaf", turn_a_deaf_ear, tmp_path / "ready")
        while not (tmp_path / "ready").exists():
            assert processes.wait(0.1) == []
        (ended,) = processes.end()
    assert (ended.code, ended.resumable, ended.crashed) == (-signal.SIGKILL, True, False)


@pytest.mark.parametrize(
    ("code", "asked", "left", "crashed"),
    [
        (0, True, False, False),
        (1, True, False, False),
        (IN_USE, False, True, False),
        (-signal.SIGTERM, False, True, False),
        (128 + signal.SIGINT, False, True, False),
        (-signal.SIGSEGV, True, True, False),
        (-signal.SIGSEGV, False, False, True),
    ],
)
def test_what_ended_by_itself_is_told_from_what_was_left(code, asked, left, crashed):
    ended = Ended("a", code, "", asked)
    assert (ended.resumable, ended.crashed) == (left, crashed)


def test_those_that_are_at_work_are_asked_to_end(tmp_path):
    with Processes(1, "cpu", tmp_path) as processes:
        processes.start("waiting", wait_for_ever)
        assert not processes.free
        (ended,) = processes.end()
    assert (ended.name, ended.code) == ("waiting", -signal.SIGTERM)
