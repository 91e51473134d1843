"""Processes of their own: what comes back of each, and that they end with who started them."""

from __future__ import annotations

import os
import signal

from certtrain.errors import FolderInUse, UsageError
from certtrain.studies.processes import BROKEN, IN_USE, Processes


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


def test_those_that_are_at_work_are_asked_to_end(tmp_path):
    with Processes(1, "cpu", tmp_path) as processes:
        processes.start("waiting", wait_for_ever)
        assert not processes.free
        (ended,) = processes.end()
    assert (ended.name, ended.code) == ("waiting", -signal.SIGTERM)
