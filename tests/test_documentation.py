"""The pages do what they say: their Python runs, their commands and configurations are ones that certtrain takes."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import shutil
from inspect import isfunction
from pathlib import Path
from pkgutil import resolve_name, walk_packages
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch

import certtrain
from certtrain.cli.main import build_parser
from certtrain.config import load_config
from certtrain.config.keys import dotted_fields
from certtrain.config.loading import override_keys
from certtrain.config.reading import parse_yaml
from certtrain.studies.compare import compare
from certtrain.studies.design import load_study
from certtrain.studies.search import load_tuning
from tests.commands import one_thread
from tests.test_scripts import script

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
blocks = script("run_page").blocks

# What README's example of one's own training loop takes as given.
GIVEN = """
import torch
from certtrain.models import build_model
model = build_model("cnn-small", (1, 8, 8), 10, options={"width": 2, "linear_width": 8})
images, labels, eps, max_eps = torch.rand(8, 1, 8, 8), torch.arange(8), 0.05, 0.1
"""


def name(page):
    return str(page.relative_to(ROOT))


def with_language(*languages):
    pages = [page for page in PAGES if any(block.language in languages for block in blocks(page))]
    return pytest.mark.parametrize("page", pages, ids=name)


@with_language("python")
def test_python_runs(page, run, tmp_path, monkeypatch, cli):
    """A page's blocks, one after the other, beside the run directories and certificates that the page speaks of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # as most desktops: `safe_convolutions` looks at the network
    monkeypatch.setattr("certtrain.data.DATASETS", {**__import__("certtrain.data").data.DATASETS})
    for known in ("digits", "first"):
        shutil.copytree(run, tmp_path / "runs" / known)
    if "first.parquet" in page.read_text():
        cli("verify", "runs/first", "--certificates", "first.parquet", "verification.limit=null")
    values = {"__name__": "page"}
    with one_thread():
        exec(GIVEN, values)
        for block in blocks(page):
            if block.title is not None:
                Path(block.title).write_text(block.text)
            elif block.language == "python":
                exec(compile("\n" * block.line + block.text, name(page), "exec"), values)


@with_language("yaml")
def test_configurations_are_ones_that_can_be_trained(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.language == "yaml":
            content = parse_yaml(block.text)
            file = tmp_path / "page.yaml"
            file.write_text(block.text if "base" in content else f"base: digits\n{block.text}")
            if "search" in content:
                assert load_tuning(file).file.trials > 0
            elif content.keys() & {"configs", "grid", "slurm"}:
                assert load_study(file).runs
            else:
                assert load_config(content).training.epochs > 0


def commands(page):
    """The arguments of every certtrain command in the page's blocks of shell, `...` left out."""
    for block in blocks(page):
        if block.language in ("sh", "console", "bash"):
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                starts = [i for i, word in enumerate(words) if word in ("certtrain", "certtrain.cli")]
                if starts and words[0] != "error:":
                    yield line, words[starts[-1] + 1 :]


@with_language("sh", "console")
def test_commands_are_ones_that_are_taken(page):
    known = {key for key, _ in dotted_fields()}
    for line, words in commands(page):
        options, rest = build_parser().parse_known_args([word.replace("[section.key=value...]", "") for word in words])
        overrides = [*getattr(options, "overrides", []), *rest]
        assert not [word for word in overrides if word.startswith("-")], line
        for key in override_keys([word for word in overrides if "=" in word]):
            assert key in known or key == "training.epoch", line  # which the tutorial misspells
        if options.command.__name__ in ("train_command", "config_command", "init_command"):
            wanted = str(options.config)
            assert wanted in ("CONFIG", "None") or "/" in wanted or wanted.endswith(".yaml") or load_config(wanted), (
                line
            )


def test_the_commands_are_found():
    assert sum(len(list(commands(page))) for page in PAGES) > 20


PICTURES = sorted((page, link) for page in PAGES for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()))


@pytest.mark.parametrize(("page", "link"), PICTURES, ids=[f"{name(page)}-{link}" for page, link in PICTURES])
def test_pictures_are_there_and_browsers_draw_them(page, link):
    picture = (page.parent / link).read_bytes()
    if link.endswith(".svg"):  # in a file of its own it is one by its namespace alone
        assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
    else:
        assert picture.startswith(b"\x89PNG")


SOURCES = [
    path
    for folder in ("certtrain", "models", "configs", "scripts")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".yaml", ".sh")
]


@pytest.fixture(scope="module")
def names():
    """What the program calls anything, its files included, and the switches of torch that it is about."""
    switches = {"allow_bf16_reduced_precision_reduction"}
    assert all(hasattr(torch.backends.cuda.matmul, switch) for switch in switches)
    return switches.union(*({path.stem, *re.findall(r"\w+", path.read_text())} for path in SOURCES))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_a_page_calls_by_name_is_in_the_code(page, names):
    """`a_name_like_this` in a sentence is an identifier, a key or a file."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`(\w*[a-z0-9]_[a-z0-9]\w*)`", text)) - names == set()


SHOWN = re.compile(r"^::: (?P<path>[\w.]+)$(?:\n +options:\n(?P<options>(?: +.*\n)+))?", re.MULTILINE)


def shown():
    """The path, the value and the options of all that the reference shows: `::: module.name`, or `::: module`."""
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for match in SHOWN.finditer(page.read_text()):
            path = re.sub(r"^models\b", "certtrain.models", match["path"])
            yield path, resolve_name(path), parse_yaml(match["options"] or "{}")


def shown_values():
    """By identity, since names are not unique; of modules the members that are named, or all."""
    for _, value, options in shown():
        if isinstance(value, ModuleType):
            named = options.get("members") or [key for key in vars(value) if key[0] != "_"]
            yield from (id(getattr(value, key)) for key in named)
        else:
            yield id(value)


def public_names():
    """What a package's `__all__` holds is part of the interface."""
    packages = [module for _, module, is_package in walk_packages(certtrain.__path__, "certtrain.") if is_package]
    for package in ["certtrain", *packages]:
        if package != "certtrain.cli":  # which is a command
            yield from (f"{package}:{key}" for key in getattr(importlib.import_module(package), "__all__", []))


def imported_names():
    """And what the pages tell readers to import."""
    for page in PAGES:
        for block in blocks(page):
            for node in ast.walk(ast.parse(block.text)) if block.language == "python" else ():
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "certtrain":
                    yield from (f"{node.module}:{alias.name}" for alias in node.names)


def returned_names():
    """And the classes of what its functions return."""
    for _, function, _ in shown():
        if isfunction(function):
            module = importlib.import_module(function.__module__)
            for word in re.findall(r"\w+", str(function.__annotations__.get("return"))):
                kind = getattr(module, word, None)
                if isinstance(kind, type) and kind.__module__.startswith("certtrain."):
                    yield f"{kind.__module__}:{word}"


@pytest.mark.parametrize("names", [public_names, imported_names, returned_names])
def test_the_reference_shows_every_name_that_a_program_meets(names):
    there, asked = set(shown_values()), sorted(set(names()))
    assert len(asked) > 10
    assert [path for path in asked if id(resolve_name(path)) not in there] == []


def test_every_public_name_says_what_it_is():
    silent = []
    for path, value, options in shown():
        if not options:
            member = path.rpartition(".")[2]
            silent += [path] if isinstance(value, type) and not value.__doc__ else []
            parts = vars(value).items() if isinstance(value, type) else [(member, value)]
            silent += [f"{path}: {key}" for key, part in parts if callable(part) and key[0] != "_" and not part.__doc__]
    assert silent == []


@pytest.mark.parametrize(
    ("name", "folder", "asked"),
    [
        ("board_8_255", "8_255", {}),
        ("board_2_255", "2_255", {"baseline": "short-warmup-70"}),
        (
            "board_2_255_searched",
            "2_255",
            {"baseline": "short-warmup-70", "method": "ibp,crown-ibp,alpha-crown,branch-and-bound"},
        ),
    ],
)
def test_the_board_follows_from_the_records_of_its_runs(name, folder, asked):
    results = ROOT / "docs" / "results"
    written = json.loads((results / f"{name}.json").read_text())
    found = compare([results / "board" / folder], **asked).summary()
    for groups in (written["groups"], found["groups"]):
        for group in groups:
            group["runs"] = [Path(run).name for run in group["runs"]]
    assert found == written
