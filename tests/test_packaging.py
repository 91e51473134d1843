"""What a wheel holds is what the repository does: a folder or a file that is not listed would be missing from it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import certtrain

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {"certtrain.models": ROOT / "models", "certtrain.configs": ROOT / "configs"}


def folder_of(package: str) -> Path:
    return FOLDERS.get(package, ROOT / package.replace(".", "/"))


def test_every_folder_with_code_is_a_package_that_is_listed():
    found = {path.parent for path in (ROOT / "certtrain").rglob("*.py")} | set(FOLDERS.values())
    assert {folder_of(package) for package in SETUPTOOLS["packages"]} == found
    assert all((folder / "__init__.py").is_file() for folder in found)


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert certtrain.__version__ == project["version"] == citation["version"]


def test_every_file_that_is_no_code_is_listed():
    listed = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in folder_of(package).glob(pattern)
    }
    folders = [ROOT / "certtrain", *FOLDERS.values()]
    files = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    assert listed == {path for path in files if path.suffix not in (".py", ".pyc")}
    assert ROOT / "certtrain" / "py.typed" in listed


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no repository")
def test_git_ignores_nothing_that_belongs_to_the_repository():
    """Neither what it holds already nor what lies among it and may be new."""
    held = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = [ROOT / name for name in ("certtrain", "models", "configs", "tests", "scripts", "docs")]
    new = [str(path) for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts]
    command = ["git", "check-ignore", "--no-index", "--stdin", "-z"]
    ignored = subprocess.run(command, cwd=ROOT, input=held + "\0".join(new), capture_output=True, text=True)
    assert (ignored.stdout.split("\0"), ignored.returncode) == ([""], 1), ignored.stderr


@pytest.mark.slow
def test_the_public_names_are_there_in_a_fresh_process():
    """Each on its own: what another import has loaded must not matter."""
    program = """
import inspect, certtrain
for name in certtrain.__all__:
    value = getattr(certtrain, name)
    assert callable(value) and not inspect.ismodule(value), name
    assert value.__name__ == name, name
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
