"""What a write may replace: regular files, and nothing else; and JSON of somebody else's."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from pydantic import BaseModel

from certtrain.errors import CheckpointError, UsageError
from certtrain.runs.directory import remove_temporaries
from certtrain.runs.files import RUN_FILES
from certtrain.runtime.files import parse_json, read_json, write_atomically, write_once, write_text
from tests.commands import contents


def device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 7))  # a /dev/full of one's own
    except PermissionError:
        pytest.skip("devices can be made by root alone")


def bound_socket(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


KINDS = {"a folder": Path.mkdir, "a pipe": os.mkfifo, "a socket": bound_socket, "a device": device}


def seen(folder):
    """Name, kind and identity of everything in a folder."""
    return {path.name: (path.lstat().st_mode, path.lstat().st_ino) for path in folder.iterdir()}


@pytest.mark.parametrize("through_a_link", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_not_replaced(tmp_path, monkeypatch, kind, through_a_link):
    monkeypatch.chdir(tmp_path)  # paths of sockets are short
    KINDS[kind](Path("there"))
    if through_a_link:
        Path("link").symlink_to("there")
    before = seen(tmp_path)
    with pytest.raises(UsageError, match=f"is {kind}, not a file"):
        write_text(Path("link" if through_a_link else "there"), "text")
    assert seen(tmp_path) == before


def test_two_who_write_one_file_at_once_both_succeed(tmp_path):
    """As two machines with processes of one id may: the second begins, and ends, while the first writes."""

    def write(file):
        file.write(b"first")
        write_text(tmp_path / "file", "second")
        assert (tmp_path / "file").read_text() == "second"

    write_atomically(tmp_path / "file", write)
    assert contents(tmp_path) == {"file": b"first"}


@pytest.mark.parametrize("links", [True, False])
def test_what_is_written_once_is_that_of_the_first(tmp_path, monkeypatch, links):
    """Also of two who find nothing there, of whom the second is the quicker; on file systems without links as well."""
    link, file = os.link, tmp_path / "file"

    def outrun(source, target):
        monkeypatch.setattr(os, "link", link)
        write_once(target, "quicker")
        os.link(source, target)

    def unknown(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", outrun if links else unknown)
    for text in ("first", "second"):
        write_once(file, text)
    assert contents(tmp_path) == {"file": b"quicker" if links else b"first"}


def test_what_a_killed_writer_has_left_is_found_by_its_name(tmp_path):
    with pytest.raises(CheckpointError):  # it is gone
        write_atomically(tmp_path / RUN_FILES[0], lambda _: remove_temporaries(tmp_path))
    assert contents(tmp_path) == {}


def test_behind_a_link_the_file_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("before")
    (tmp_path / "link").symlink_to("elsewhere/file")
    (tmp_path / "new").symlink_to("elsewhere/not yet")
    write_text(tmp_path / "link", "after")
    write_text(tmp_path / "new", "new")
    assert contents(tmp_path / "elsewhere") == {"file": b"after", "not yet": b"new"}
    assert os.readlink(tmp_path / "link") == "elsewhere/file"
    assert os.readlink(tmp_path / "new") == "elsewhere/not yet"


def test_links_in_a_circle_and_files_for_folders_are_one_line(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "file").touch()
    for path in (tmp_path / "a", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="cannot be written: ") as caught:
            write_text(path, "text")
        assert "\n" not in str(caught.value)
    assert set(contents(tmp_path)) == {"file"}


def test_a_clean_up_that_fails_does_not_hide_what_went_wrong(tmp_path, monkeypatch):
    """As on a disk that has become read-only, where not even a file that is not there can be removed."""

    def read_only(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    (tmp_path / "file").write_text("before")
    monkeypatch.setattr("builtins.open", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(CheckpointError, match=r"could not write .*Read-only.*what was there before is unchanged"):
        write_text(tmp_path / "file", "after")
    monkeypatch.undo()
    assert contents(tmp_path) == {"file": b"before"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


@given(value=JSON, ascii_only=st.booleans())
def test_json_is_read_as_it_was_written(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_json(text) == value
    if not any(0xD800 <= ord(character) < 0xE000 for character in text):
        assert parse_json(text.encode()) == value


@pytest.mark.parametrize("unit", ["[", '{"a":', '[{"[":', '["\\\\",[', "[1,["])
def test_json_that_is_nested_deeply_is_an_error_however_deep_python_may_recurse(unit):
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000_000)  # as a library may do
    try:
        with pytest.raises(ValueError, match="nested"):
            parse_json(unit * 10**5)
    finally:
        sys.setrecursionlimit(before)
    assert parse_json('["' + "[" * 1000 + '"]') == ["[" * 1000]


class Counted(BaseModel):
    counts: list[int]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"{", "line 1 column 2"),
        (b"\xff", "utf-8"),
        (b"[" * 200, "nested more than"),
        (b"[]", "indices must be integers"),
        (b"{}", "'counted'"),
        (b'{"counted": {"counts": [0, "many"]}}', "counts.1: Input should be a valid integer"),
    ],
)
def test_a_file_of_json_that_is_missing_or_says_something_else_is_one_line(tmp_path, content, reason):
    file = tmp_path / "counts.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_json(file, lambda said: Counted.model_validate(said["counted"]))
    message = str(caught.value)
    assert message.startswith(f"{file} is missing or corrupt (")
    assert reason in message
    assert "\n" not in message


def test_a_file_of_json_is_what_is_made_of_it(tmp_path):
    file = tmp_path / "counts.json"
    file.write_text('{"counts": [3]}')
    assert read_json(file) == {"counts": [3]}
    assert read_json(file, Counted.model_validate).counts == [3]
