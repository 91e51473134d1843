"""Runs of made-up results beside each other: sums by hand, and what cannot be compared."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import warnings
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from certtrain.cli import main
from certtrain.errors import CheckpointError, UsageError, printable
from certtrain.runs.files import GRID
from certtrain.studies.compare import compare
from certtrain.studies.design import load_study
from certtrain.studies.grid import Grid, read_grid
from certtrain.studies.tables import Sheet, sheets, show, to_latex, to_markdown
from tests.commands import exit_code, into_a_pipe_that_nobody_reads, start
from tests.report.test_page import Page
from tests.studies.folders import pretend_finished, verify_again, write_run

# Ten images; a: 6, 5, 7 proved, b: 8, 8, 8.
A = ["ppppppuuam", "pppppuuuam", "pppppppuam"]
B = ["ppppppppum", "ppppppppum", "ppppppppum"]


@pytest.fixture
def study(tmp_path):
    """Two configurations, three seeds."""
    for name, fates, rate in (("a", A, 0.001), ("b_50%", B, 0.002)):
        for seed, images in enumerate(fates):
            curve = [0.9, 0.8 - 0.1 * seed]
            write_run(
                tmp_path / "study" / name / f"seed-{seed}", images, seed=seed, epochs=curve, **{"optimizer.lr": rate}
            )
    return tmp_path / "study"


def test_means_scatter_and_intervals(study):
    found = compare([study]).summary()
    first, second = found["groups"]
    assert (found["eps"], found["split"], found["images"]) == (0.1, "test", 10)
    assert [first["name"], second["name"]] == ["a", "b_50%"]
    assert first["seeds"] == [0, 1, 2]
    verified = first["verified_error"]
    assert verified["values"] == pytest.approx([0.4, 0.5, 0.3])
    expected = {"mean": 0.4, "deviation": 0.1, "min": 0.3, "median": 0.4, "max": 0.5}
    assert {key: verified[key] for key in expected} == pytest.approx(expected)
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # Student's t, two degrees of freedom, of printed tables
    assert verified["interval"]["low"] == pytest.approx(0.4 - half)
    assert verified["interval"]["high"] == pytest.approx(0.4 + half)
    assert second["natural_error"]["mean"] == pytest.approx(0.1)
    assert first["pgd_error"]["mean"] == pytest.approx(0.2)
    assert first["train_seconds"]["mean"] == pytest.approx(11)


def test_differences_are_paired_by_seed_and_by_image(study):
    (pair,) = compare([study]).summary()["paired"]
    assert pair["difference"] == pytest.approx(-0.2)
    half = 4.302652729911275 * 0.1 / math.sqrt(3)
    assert pair["over_seeds"]["low"] == pytest.approx(-0.2 - half)
    lost = {seed: (test["only_second"], test["only_first"]) for seed, test in pair["mcnemar"].items()}
    assert lost == {"0": (0, 2), "1": (0, 3), "2": (0, 1)}
    assert [test["p"] for test in pair["mcnemar"].values()] == pytest.approx([0.5, 0.25, 1.0])
    assert pair["over_images"]["low"] <= -0.2 <= pair["over_images"]["high"]


@pytest.mark.parametrize(
    "path", ["src/seed-{seed}", "src/eps-2/seed-{seed}", "{seed}/eps-2/net{seed}/last.ckpt", "src/seed-20", "10/{seed}"]
)
def test_runs_that_start_from_a_network_of_their_own_seed_are_one_configuration(tmp_path, path):
    """Whatever other numbers the path holds; a second study starts from networks of another name."""
    for name, changes in (("a", {}), ("b", {"optimizer.lr": 0.5})):
        for seed in (0, 2, 10):
            start = path.replace("{seed}", str(seed))
            write_run(tmp_path / name / f"seed-{seed}", "p" * 5, seed=seed, **{"start_from.path": start}, **changes)
            write_run(
                tmp_path / f"{name}x" / f"seed-{seed}",
                "p" * 5,
                seed=seed,
                **{"start_from.path": f"other/{start}"},
                **changes,
            )
    found = compare([tmp_path])
    assert [(group.name, len(group.runs)) for group in found.groups] == [("a", 3), ("ax", 3), ("b", 3), ("bx", 3)]
    assert found.settings == {
        "optimizer.lr": [found.groups[0].runs[0].config.optimizer.lr] * 2 + [0.5] * 2,
        "start_from.path": [path, f"other/{path}"] * 2,
    }
    assert set(compare([tmp_path / "a", tmp_path / "b"]).settings) == {"optimizer.lr"}
    assert set(compare([tmp_path / "a" / "seed-0", tmp_path / "b" / "seed-2"]).settings) == {"optimizer.lr"}


def test_where_data_lie_makes_no_other_configuration(tmp_path):
    for seed in (0, 1):
        data = {"name": "mnist", "root": f"/scratch/{seed}", "download": bool(seed)}
        write_run(
            tmp_path / f"seed-{seed}",
            "p",
            seed=seed,
            **{"replay": {"share": 0.5, "data": data}, "start_from.path": "a"},
        )
    assert len(compare([tmp_path / "seed-0", tmp_path / "seed-1"]).groups) == 1


def test_only_what_differs_is_shown_and_the_baseline_can_be_chosen(study):
    found = compare([study], baseline="b_50%")
    assert found.settings == {"optimizer.lr": [0.002, 0.001]}
    assert found.paired[0].name == "a"
    assert found.paired[0].difference == pytest.approx(0.2)
    with pytest.raises(UsageError, match=r"no group is called 'c': there are a, b_50%$"):
        compare([study], baseline="c")


# Names of choices that hold one another, also across axes, so that no name tells what it is made of.
AXES = {"method": ["ibp", "bn", "ibp_bn"], "model": ["w2", "w2_bn", "bn_8"], "length": ["8", "long"]}


def grid_of(folder, axes, without=()):
    """A study of every combination of choices but those named, each of another learning rate; by choices its name."""
    names = {choices: "_".join(choices) for choices in itertools.product(*axes.values())}
    for choices in [choices for choices, name in names.items() if name in without]:
        del names[choices]
    for number, name in enumerate(names.values()):
        write_run(folder / name / "seed-0", "p" * 10, **{"optimizer.lr": 0.001 * (1 + number)})
    Grid(tuple(axes), {name: choices for choices, name in names.items()}).write(folder)
    return names


@pytest.mark.parametrize("order", ["method", "method model", "model length method"])
def test_with_a_choice_as_baseline_pairs_differ_in_that_choice_alone(tmp_path, order):
    axes = {axis: AXES[axis] for axis in order.split()}
    names = grid_of(tmp_path, axes, without=["bn_w2", "w2_8_ibp"])
    for place, axis in enumerate(axes):
        for baseline in axes[axis]:
            expected = {
                (name, names.get(partner))
                for choices, name in names.items()
                if (partner := (*choices[:place], baseline, *choices[place + 1 :])) != choices
            }
            found = [(pair.name, pair.baseline) for pair in compare([tmp_path], baseline=baseline).paired]
            assert sorted(found) == sorted(pair for pair in expected if pair[1] is not None)
            assert found


def test_a_baseline_must_be_told_from_another(tmp_path):
    grid_of(tmp_path, {"first": ["a", "b"], "second": ["a", "c"]})
    with pytest.raises(UsageError, match="'a' is a choice of first and of second: name a group"):
        compare([tmp_path], baseline="a")
    with pytest.raises(UsageError, match=r"'d': there are a_a, a_c, b_a, b_c; and it is none of the choices a, c, b$"):
        compare([tmp_path], baseline="d")
    assert compare([tmp_path], baseline="a_c").groups[0].name == "a_c"


def test_a_grid_is_shown_across(tmp_path):
    grid_of(tmp_path, {"method": ["ibp", "mtl"], "model": ["w2", "w4"], "length": ["8", "9"]}, without=["mtl_w4_9"])
    (tmp_path / "mtl_w2_8" / "seed-0" / "summary.json").unlink()
    (sheet,) = [sheet for sheet in sheets(compare([tmp_path])) if sheet.title == "Verified error by method"]
    assert sheet.columns == ["model and length", "ibp", "mtl"]
    assert sheet.rows == [["w2_8", "0.00%", "–"], ["w2_9", "0.00%", "0.00%"], ["w4_8", "0.00%", "0.00%"],
                          ["w4_9", "0.00%", "–"]]  # fmt: skip
    for row in (["ibp_w2_8", "mtl_w2_9"], ["ibp_w2_8", "ibp_w4_9"]):
        titles = [sheet.title for sheet in sheets(compare([tmp_path / name for name in row]))]
        assert ("Verified error by method" in titles) == (row[1] == "mtl_w2_9")


def test_runs_that_are_on_no_grid_are_compared_without_one(tmp_path, study):
    grid_of(tmp_path / "grid", {"method": ["ibp", "mtl"], "model": ["w2", "w4"]})
    assert compare([tmp_path / "grid"]).axes == ("method", "model")
    assert compare([tmp_path / "grid" / "ibp_w2", study / "b_50%"]).axes == ()  # whose folder has no study.json
    file = tmp_path / "grid" / GRID
    broken = ["", "[]", "[" * 10_000, '{"axes": ["a"]}', '{"axes": 3, "choices": {}}', '{"axes": [], "choices": []}']
    for text in [*broken, '{"axes": ["a"], "choices": {"ibp_w2": []}}']:
        file.write_text(text)
        with pytest.raises(CheckpointError, match=r"study\.json is corrupt"):
            compare([tmp_path / "grid"])
    write_run(tmp_path / "runs" / "one", "p" * 10)
    (tmp_path / GRID).write_text("somebody else's")
    assert compare([tmp_path / "runs" / "one"]).axes == ()


def test_the_command_keeps_what_its_configurations_are_made_of(tmp_path):
    (tmp_path / "s.yaml").write_text(
        "base: digits\nconfigs: {ibp: {}, crown: {training.method: crown-ibp}}\n"
        "grid: {optimizer.lr: [0.1, 0.2], size: {small: {model.options.width: 2}}}"
    )
    study = load_study(tmp_path / "s.yaml")
    pretend_finished(study, tmp_path / "out")
    command = ["study", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--only", "ibp*"]
    assert main([*command, "--device", "cpu"]) == 0
    axes, choices = read_grid(tmp_path / "out")
    assert axes == ("configuration", "lr", "size")
    assert choices == {
        f"{method}_lr={rate}_small": (method, f"lr={rate}", "small")
        for method in ("ibp", "crown")
        for rate in (0.1, 0.2)
    }


def test_an_error_s_interval_stays_among_shares(tmp_path):
    for seed, images in enumerate(["p" * 10, "u" * 10]):
        write_run(tmp_path / f"seed-{seed}", images, seed=seed)
    found = compare([tmp_path / "seed-0", tmp_path / "seed-1"])
    interval = found.spread(found.groups[0], "verified_error").interval
    assert (interval.low, interval.high) == (0, 1)


def test_runs_without_verdicts_are_compared_but_not_image_by_image(study):
    for file in study.rglob("verdicts.json"):
        file.unlink()
    (pair,) = compare([study]).paired
    assert (pair.tests, pair.over_images) == ({}, None)
    assert pair.difference == pytest.approx(-0.2)


def test_what_the_documentation_leaves_out_is_not_needed(study, tmp_path):
    for run in study.glob("*/seed-*"):
        for name in ("last.ckpt", "model.safetensors"):
            (run / name).write_bytes(b"large")
    page = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
    (command,) = re.findall(r"rsync .*", page)
    left_out = re.findall(r"--exclude='?([^' ]+)'?", command)
    assert "*.ckpt" in left_out
    kept = shutil.copytree(study, tmp_path / "kept" / "study", ignore=shutil.ignore_patterns(*left_out))
    assert not [*kept.rglob("*.ckpt"), *kept.rglob("*.safetensors")]
    without = lambda text: text.replace(str(kept), "").replace(str(study), "")  # noqa: E731
    assert without(json.dumps(compare([kept]).summary())) == without(json.dumps(compare([study]).summary()))


def test_unfinished_runs_are_named_and_not_counted(study):
    (study / "a" / "seed-1" / "summary.json").unlink()
    found = compare([study])
    assert [len(group.runs) for group in found.groups] == [2, 3]
    assert found.unfinished == [str(study / "a" / "seed-1")]
    assert found.paired[0].seeds == [0, 2]
    assert "Not finished" in sheets(found)[-1].title


def test_a_result_of_other_bounds_can_be_asked_for(study):
    tighter = {"eps": 0.1, "method": "ibp,crown", "images": 10, "natural_error": 0.1, "pgd_error": 0.1,
               "verified_error": 0.2}  # fmt: skip
    for folder in study.glob("*/*"):
        (folder / "verify.json").write_text(json.dumps({"split": "test", "radii": [tighter]}))
    assert compare([study]).groups[0].values("verified_error") == pytest.approx([0.4, 0.5, 0.3])
    found = compare([study], method="ibp,crown")
    assert found.groups[0].values("verified_error") == [0.2] * 3
    assert found.paired[0].tests == {}  # those verdicts are of ibp
    assert "bounds by ibp,crown" in sheets(found)[0].title


def test_bounds_are_those_of_the_first_run_wherever_the_others_have_them(study):
    """In its verify.json, with an arithmetic or without."""
    ibp = {"eps": 0.1, "method": "ibp", "images": 10, "natural_error": 0.1, "pgd_error": 0.1, "verified_error": 0.3}
    last = study / "b_50%" / "seed-2"
    (last / "summary.json").write_text((last / "summary.json").read_text().replace('"ibp"', '"ibp,crown"'))
    (last / "verify.json").write_text(
        json.dumps({"split": "test", "radii": [{**ibp, "arithmetic": "float64", "verified_error": 0.4}, ibp]})
    )
    found = compare([study])
    assert found.groups[1].values("verified_error") == pytest.approx([0.2, 0.2, 0.3])
    assert sheets(found)[0].title.endswith("bounds by ibp, attacks by pgd")


def pair_of(tmp_path, a, b):
    """Two configurations, of one run each."""
    return [
        write_run(tmp_path / name / "seed-0", images, **{"optimizer.lr": rate})
        for name, images, rate in (("a", a, 0.001), ("b", b, 0.002))
    ]


@pytest.mark.parametrize(
    ("again", "proved"),
    [
        ([], (3, 4)),
        ([("b", "ppppppppuu", False)], (3, 8)),
        ([("b", "ppppppppuu", False), ("b", "ppppppuuuu", False)], (3, 6)),
        ([("b", "ppppppppuu", False), ("b", "ppppuuuuuu", False)], (3, 4)),
        ([("a", "ppppppuuuu", False), ("b", "puuuuuuuuu", False)], (6, 1)),
        ([("b", "ppppppppuu", False), ("b", "puuppuuuup", True)], (3, 4)),  # the verdicts fit the summary
    ],
)
def test_numbers_and_verdicts_are_of_one_answer(tmp_path, again, proved):
    """The later of several to one question; what is paired by image is what is shown."""
    pair_of(tmp_path, "pppuuuuuuu", "ppppuuuuuu")
    for name, images, elsewhere in again:
        verify_again(tmp_path / name / "seed-0", images, elsewhere=elsewhere)
    found = compare([tmp_path])
    assert [group.values("verified_error") for group in found.groups] == [[pytest.approx(1 - n / 10)] for n in proved]
    (pair,) = found.paired
    assert pair.difference * 10 == pytest.approx(pair.tests[0].only_second - pair.tests[0].only_first)
    assert pair.over_images.low - 1e-9 <= pair.difference <= pair.over_images.high + 1e-9


def test_verdicts_of_another_answer_are_paired_with_no_image(tmp_path):
    _, b = pair_of(tmp_path, "pppuuuuuuu", "ppppuuuuuu")
    verify_again(b, "ppppppppuu", elsewhere=True)
    (pair,) = compare([tmp_path]).paired
    assert (pair.difference, pair.tests, pair.over_images) == (pytest.approx(-0.1), {}, None)


def test_verdicts_of_an_earlier_version_say_nothing_of_attacks(tmp_path):
    """They are of the answer that they fit, unless there are some that say so."""
    for folder in pair_of(tmp_path, "pppuuuuuuu", "ppppuuuuuu"):
        (entry,) = json.loads((folder / "verdicts.json").read_text())
        del entry["conditions"]
        (folder / "verdicts.json").write_text(json.dumps([entry]))
    (pair,) = compare([tmp_path]).paired
    assert (pair.tests[0].only_first, pair.tests[0].only_second) == (1, 0)
    verify_again(tmp_path / "b" / "seed-0", "uuuuuupppp")
    (pair,) = compare([tmp_path]).paired
    assert (pair.tests[0].only_first, pair.tests[0].only_second) == (4, 3)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("numbers", "most"), [(((2, 4), (2, 4)), 4), (((2, 4), (4,)), 4), (((4, 2), (4, 6)), 4), (((4, 6), (6, 4, 2)), 6)]
)
def test_runs_are_compared_on_the_most_images_that_all_were_verified_on(tmp_path, numbers, most, turned):
    """The first number of each is the summary's."""
    rates = (0.001, 0.002)
    folders = []
    for name, (first, *others), rate in zip("ab", numbers, rates, strict=True):
        folders.append(write_run(tmp_path / name, "p" + "u" * (first - 1), **{"optimizer.lr": rate}))
        for count in others:
            verify_again(folders[-1], "p" + "u" * (count - 1))
    found = compare(folders[::-1] if turned else folders)
    assert found.images == most
    assert [group.values("verified_error") for group in found.groups] == [[pytest.approx(1 - 1 / most)]] * 2
    assert len(found.paired[0].tests) == 1
    note = sheets(found)[0].note
    for count in (2, 4, 6):
        runs = sum(count in own for own in numbers)
        assert (f"{runs} of 2 runs on {count}" in note) == (runs > 0 and count != most)


def test_runs_that_have_no_number_of_images_in_common_are_named(tmp_path):
    counts = {"a": (2, 4), "b": (2, 6), "c": (6, 8)}
    for number, (name, (first, second)) in enumerate(counts.items()):
        folder = write_run(tmp_path / name, "p" * first, **{"optimizer.lr": 0.1 + number})
        verify_again(folder, "p" * second)
    with pytest.raises(UsageError, match=r"a and .*c cannot be compared: verified on 2 and 4 images, and on 6 and 8$"):
        compare([tmp_path])
    verify_again(tmp_path / "c", "pppp")
    with pytest.raises(UsageError, match="no number of images that all runs were verified on"):
        compare([tmp_path])


SEARCHED = "ibp,branch-and-bound"
CONDITIONS = [
    ("ibp", {"verification.attack": "apgd-t"}),
    ("ibp", {"verification.attack": "pgd,apgd-ce"}),
    ("ibp", {"verification.pgd_steps": 7}),
    ("ibp", {"verification.pgd_restarts": 0}),
    ("ibp", {"backend": "lirpa"}),
    (SEARCHED, {"verification.search.timeout": 60.0}),
    (SEARCHED, {"verification.search.domains": 7}),
]


@pytest.mark.parametrize(("method", "asked"), CONDITIONS)
def test_answers_to_other_attacks_or_searches_are_not_mixed(tmp_path, method, asked):
    """The newest that both runs have count, with their verdicts, also where an older question is asked again."""
    first, second = (
        write_run(tmp_path / name, "ppuuuuuuuu", method=method, **{"optimizer.lr": rate})
        for name, rate in (("a", 0.001), ("b", 0.002))
    )

    def proved():
        found = compare([first, second])
        (pair,) = found.paired
        (test,) = pair.tests.values()
        assert pair.difference * 10 == pytest.approx(test.only_second - test.only_first)
        return [round(10 * (1 - error)) for group in found.groups for error in group.values("verified_error")]

    assert proved() == [2, 2]
    verify_again(first, "pppppuuuuu", method=method, asked=asked)
    assert proved() == [2, 2]
    verify_again(second, "ppppuuuuuu", method=method, asked=asked)
    assert proved() == [5, 4]
    verify_again(second, "pppppppuuu", method=method)
    assert proved() == [5, 4]
    verify_again(first, "ppppppuuuu", method=method)
    assert proved() == [6, 7]


@pytest.mark.parametrize(
    ("method", "settings", "unused"),
    [
        ("ibp", {}, {"verification.search.timeout": 60.0}),
        ("ibp", {}, {"verification.apgd_steps": 7}),
        ("ibp", {}, {"verification.batch_size": 7}),
        ("ibp", {"verification.attack": "apgd-t"}, {"verification.pgd_steps": 7}),
        (SEARCHED, {"verification.pgd_restarts": 0}, {"verification.pgd_steps": 7}),
    ],
)
def test_settings_that_are_not_used_make_no_other_question(tmp_path, method, settings, unused):
    for name, rate in (("a", 0.001), ("b", 0.002)):
        write_run(tmp_path / name, "puuu", method=method, **settings, **{"optimizer.lr": rate})
    verify_again(tmp_path / "b", "pppu", method=method, asked=unused)
    assert [group.values("verified_error") for group in compare([tmp_path]).groups] == [[0.75], [0.25]]


def test_the_most_images_count_before_the_newest_attack(tmp_path):
    for name, rate in (("a", 0.001), ("b", 0.002)):
        verify_again(write_run(tmp_path / name, "puuu", **{"optimizer.lr": rate}), "p", asked=CONDITIONS[0][1])
    assert compare([tmp_path]).images == 4


def test_runs_without_an_attack_in_common_are_named(tmp_path):
    """By pairs, and where only all together have none."""
    apgd, longer = {"verification.attack": "apgd-t"}, {"verification.pgd_steps": 77}
    for name, own, more in (("a", {}, apgd), ("b", {}, longer), ("c", apgd, longer)):
        folder = write_run(tmp_path / name, "pu", **own, **{"optimizer.lr": 0.1 + ord(name)})
        verify_again(folder, "pu", asked={"verification.attack": "pgd", **more})
    with pytest.raises(UsageError, match="share no attacks, search limits and backend that all were verified with"):
        compare([tmp_path])
    (tmp_path / "b" / "verify.json").unlink()
    message = (
        r"b and .*c cannot be compared: verified with verification.pgd_steps=40 and with verification.pgd_steps=77:"
    )
    with pytest.raises(UsageError, match=message):
        compare([tmp_path])


# --- what cannot be compared ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ibp, crown", " ibp,crown", "ibp,crown "])
def test_bounds_are_named_as_for_verify(tmp_path, method):
    write_run(tmp_path / "a", "pu", method="ibp,crown")
    assert compare([tmp_path], method=method).bounds == "ibp,crown"


@pytest.mark.parametrize(
    ("method", "message"),
    [("", "unknown bound method ''"), ("iqp", "did you mean ibp"), ("branch-and-bound,ibp", "name it once, as the")],
)
def test_bounds_that_verify_does_not_know(cli, study, method, message):
    outcome = cli("compare", study, "--method", method)
    assert (outcome.code, message in outcome.error) == (2, True)


def test_a_run_without_a_result_on_its_split(study):
    file = study / "b_50%" / "seed-0" / "summary.json"
    file.write_text(file.read_text().replace('"split": "test"', '"split": "validation"'))
    with pytest.raises(UsageError, match=r"seed-0 has no result on its test split: certtrain verify .* adds it$"):
        compare([study])


@pytest.mark.parametrize("key", ["train_seconds", "another"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_a_number_that_is_not_finite_is_named(study, key, value):
    file = study / "a" / "seed-1" / "summary.json"
    file.write_text(file.read_text()[:-1] + f', "{key}": {value}}}')
    with pytest.raises(CheckpointError, match=rf"summary\.json .*: {key} is not finite$"):
        compare([study])


@pytest.mark.parametrize("eps", ["1" + "0" * 400, "NaN", "true", '"0.1"', "null", "[]", "-0.1"])
def test_a_radius_that_is_none_is_named(study, eps):
    file = study / "a" / "seed-0" / "summary.json"
    file.write_text(file.read_text()[:-1] + f', "eps": {eps}}}')
    with pytest.raises(UsageError, match=r"seed-0 was not verified at epsilon .*, but at 0\.1 \(ibp\)"):
        compare([study])


@pytest.mark.parametrize("value", ["null", '"x"', "[]", "NaN", "1e308", "-5"])
@pytest.mark.parametrize("key", ["verified_error", "epoch"])
def test_a_curve_that_cannot_be_drawn_is_named(study, key, value):
    values = {
        "epoch": "1",
        "verified_error": "0.5",
        key: "1" + "0" * 26 if (key, value) == ("epoch", "1e308") else value,
    }
    line = ", ".join(f'"{name}": {text}' for name, text in values.items())
    (study / "a" / "seed-0" / "metrics.jsonl").write_text(f"{{{line}}}\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl ") as error:
        compare([study])
    assert "\n" not in str(error.value)


def test_epochs_without_a_verified_error_are_not_drawn(study):
    (study / "a" / "seed-0" / "metrics.jsonl").write_text(
        '{"epoch": 1, "loss": NaN}\n{"epoch": 2, "verified_error": 1}'
    )
    assert compare([study]).groups[0].runs[0].epochs == [{"epoch": 2, "verified_error": 1}]


def test_a_metric_that_no_run_reports(study):
    with pytest.raises(UsageError, match=r"no run reports 'accuracy': they report .*verified_error"):
        compare([study], metrics=["accuracy"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"images": "pp"}, "verified on 10 images, and on 2"),
        ({"test_set": "others"}, "the images, or their labels, are others"),
        ({"data.classes": [0, 1]}, "other classes of the data set"),
        ({"data.name": "mnist"}, "data set digits, and mnist"),
        ({"eps": 0.2}, "was not verified at epsilon 0.1 by ibp, as {first} was, but at 0.2 (ibp)"),
        ({"method": "ibp,crown"}, "was not verified at epsilon 0.1 by ibp, as {first} was, but at 0.1 (ibp,crown)"),
        (
            {"verification.attack": "apgd-t"},
            "verification.attack=pgd and with verification.attack=apgd-t: certtrain ver",
        ),
        ({"verification.pgd_restarts": 0}, "verified with verification.attack=pgd and with verification.attack=None"),
        ({"backend": "lirpa"}, "verified with backend=native and with backend=lirpa"),
        ({"arithmetic": "float32"}, "by ibp, as {first} was, but at 0.1 (ibp, sound in float32)"),
        (
            {"verification.split": "validation", "data.validation": 0.1},
            "verified on the test split, and on the validation",
        ),
        ({"optimizer.lr": 0.001}, "are the same configuration and seed"),
    ],
)
def test_runs_on_other_images_or_at_another_radius(study, tmp_path, change, problem):
    other = write_run(tmp_path / "other", **{"images": A[0], "seed": 0, **change})
    with pytest.raises(UsageError) as error:
        compare([study, other])
    assert problem.format(first=study / "a" / "seed-0") in str(error.value)
    assert len(str(error.value)) <= 300 + 3 * len(str(tmp_path))


def digest(test_set):
    return hashlib.sha256(test_set.encode()).hexdigest()


@pytest.mark.parametrize("where", ["summary.json", "verify.json"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_other_images_are_told_without_verdicts(tmp_path, where, place):
    """By what the results say; as of a `verify` that was killed before it added them."""
    folders = [write_run(tmp_path / name, "pu", **{"optimizer.lr": 0.1 + ord(name)}) for name in "abc"]
    for number, folder in enumerate(folders):
        sha256 = digest("others" if number == place else "these")
        if where == "verify.json":
            verify_again(folder, "pu")
        content = json.loads((folder / where).read_text())
        (folder / where).write_text(json.dumps({**content, "split_sha256": sha256}))
        (folder / "verdicts.json").unlink()
    with pytest.raises(UsageError, match="the images, or their labels, are others"):
        compare([tmp_path])


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_a_run_that_does_not_say_its_images_hides_no_difference(tmp_path, order):
    """Of two others; nothing at all is known of one."""
    folders = {
        name: write_run(tmp_path / name, "pu", test_set=test_set, **{"optimizer.lr": 0.1 + ord(name)})
        for name, test_set in (("a", "these"), ("b", "others"), ("c", "these"))
    }
    (folders["c"] / "verdicts.json").unlink()
    with pytest.raises(UsageError, match="the images, or their labels, are others"):
        compare([folders[name] for name in order])
    assert len(compare([folders["a"], folders["c"]]).groups) == 2


def test_validation_images_of_one_seed_are_the_same(tmp_path):
    options = {"verification.split": "validation", "data.validation": 0.1}
    for name, rate in (("a", 0.001), ("b", 0.002)):
        for seed in (0, 1):
            place = tmp_path / name / f"seed-{seed}"
            write_run(place, "ppppu", seed=seed, test_set=f"of seed {seed}", **options, **{"optimizer.lr": rate})
    assert compare([tmp_path]).split == "validation"
    shutil.rmtree(tmp_path / "b" / "seed-1")
    write_run(tmp_path / "b" / "seed-1", "ppppu", seed=1, test_set="others", **options, **{"optimizer.lr": 0.002})
    with pytest.raises(UsageError, match="other validation images"):
        compare([tmp_path])


def test_folders_without_a_finished_run(study, tmp_path):
    for file in study.rglob("summary.json"):
        file.unlink()
    with pytest.raises(UsageError, match="none of the 6 runs is finished"):
        compare([study])
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "empty", "holds no runs"), (tmp_path / "none", "is no run directory")):
        with pytest.raises(UsageError, match=message):
            compare([folder])


@pytest.mark.parametrize("name", ["summary.json", "verdicts.json", "metrics.jsonl", "verify.json"])
@pytest.mark.parametrize("content", ["{", "3", '{"radii": [3]}', '[{"images": "x"}]', "[" * 10**5, "[3]"])
def test_a_corrupt_file_is_named(study, name, content):
    (study / "a" / "seed-0" / name).write_text(content)
    with pytest.raises((CheckpointError, UsageError)) as error:
        compare([study])
    assert name in str(error.value) or "was not verified at" in str(error.value)


# --- what is written --------------------------------------------------------------------------------------------------


def test_every_format_holds_every_cell(cli, study, tmp_path):
    files = [tmp_path / f"table.{ending}" for ending in ("json", "md", "tex", "html", "svg")]
    outcome = cli("compare", study, *(f"--out={file}" for file in files))
    assert (outcome.code, outcome.err) == (0, "")
    written = {file.suffix: file.read_text() for file in files}
    assert json.loads(written[".json"])["groups"] == compare([study]).summary()["groups"]
    page = Page(written[".html"])
    assert "://" not in written[".html"].replace("</", "")
    assert page.tags.count("svg") == 1
    for sheet in sheets(compare([study])):
        for cells in sheet.rows:
            for cell in cells:
                assert cell in page.text
                assert cell in written[".md"]
    assert "40.00% ± 10.00%" in written[".md"]
    assert r"40.00\% $\pm$ 10.00\%" in written[".tex"]
    assert written[".svg"].startswith("<svg")


def test_the_command_line_asks_what_its_options_say(cli, study, tmp_path):
    file = tmp_path / "table.json"
    options = ["--metric", "natural_error", "--metric", "train_seconds", "--baseline", "b_50%", "--confidence", "0.8"]
    assert cli("compare", study, *options, "--out", file).code == 0
    asked = {"metrics": ["natural_error", "train_seconds"], "baseline": "b_50%", "confidence": 0.8}
    written = json.loads(file.read_text())
    assert written == json.loads(json.dumps(compare([study], **asked).summary()))
    for option in asked:
        others = {name: value for name, value in asked.items() if name != option}
        assert written != json.loads(json.dumps(compare([study], **others).summary())), option


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (2, 8), (30, 8), (30, 2), (1, 30), (8, 8)])
def test_a_terminal_shows_every_word_whole_in_as_few_tables_as_fit(rows, columns, width):
    words = [[f"cell-{row:02}-{column:02}-x" for column in range(columns)] for row in range(rows + 1)]
    console = Console(width=width, file=io.StringIO())
    show(console, [Sheet("", words[0], words[1:], note="what is to be said of it")])
    text = console.file.getvalue()
    assert all(word in text for line in words for word in line)
    assert max(map(len, text.splitlines())) <= width
    beside = (width - 1) // 15 - 1  # of columns of 12 characters, besides the first
    fewest = min(math.ceil(others / beside) for others in (columns - 1, rows))
    assert text.count("┏") == fewest
    assert text.count("what") == 1


def test_brackets_are_shown_as_they_are():
    text = "exp[lr][bold]"
    console = Console(width=200, file=io.StringIO())
    show(console, [Sheet(text, ["", "a[lr]", "b"], [["c[lr]", "d", "wider than the title"]], note=text)])
    shown = console.file.getvalue()
    assert (shown.count(text), shown.count("a[lr]"), shown.count("c[lr]")) == (2, 1, 1)


def test_a_word_wider_than_the_terminal_is_folded():
    console = Console(width=20, file=io.StringIO())
    show(console, [Sheet("", ["a", "x" * 50], [["b", "y"], ["c", "z"]])])
    text = console.file.getvalue()
    assert text.count("x") == 50
    assert max(map(len, text.splitlines())) <= 20


def test_markdown_and_latex_tables_are_whole(study):
    tables = sheets(compare([study]))
    lines = [line for line in to_markdown(tables).splitlines() if line.startswith("|")]
    assert len(lines) == sum(len(table.rows) + 2 for table in tables)
    rows = re.findall(r"^(.*) \\\\$", to_latex(tables), flags=re.MULTILINE)
    widths = [len(table.columns) for table in tables for _ in range(len(table.rows) + 1)]
    assert [len(row.split(" & ")) for row in rows] == widths
    assert not re.search(r"(?<!\\)[%#_](?!\w*\})", "\n".join(rows))
    assert r"b\_50\%" in rows[2]


def test_the_page_of_a_study_shows_the_comparison(cli, study):
    outcome = cli("report", study)
    assert (outcome.code, outcome.err) == (0, "")
    page = Page((study / "report.html").read_text())
    assert "40.00% ± 10.00%" in page.text
    assert "optimizer.lr" in page.text
    assert cli("report", study, "seed=3").code == 2


def test_a_file_of_a_run_is_not_overwritten(cli, study, tmp_path):
    assert "is summary.json of the run" in cli("compare", study, "--out", study / "a" / "seed-0" / "summary.json").error
    assert "its ending says what is written" in cli("compare", study, "--out", tmp_path / "table.docx").error


RECORDS = ["study.json", "tuning.json", "optuna.db", "scaling.json", "a/seed-0/diverged.json", "a/seed-0/report.html"]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("record", RECORDS)
def test_the_records_of_a_study_are_not_overwritten(cli, study, tmp_path, record, there):
    """Whether they are named or linked to, and by whatever command."""
    file = study / record
    if there:
        file.write_text("kept")
    link = tmp_path / f"link{file.suffix}"
    link.symlink_to(file)
    for path in (file, link):
        for command in ("compare", "report"):
            if file.suffix == ".db" and command == "compare":
                continue
            kind = "study" if file.parent == study else "run"
            assert f"is {file.name} of the {kind} in" in cli(command, study, "--out", path).error
    assert file.exists() == there
    assert not there or file.read_text() == "kept"


def test_a_study_s_own_page_may_be_written_anew(cli, study):
    for command in (["report", study], ["compare", study, "--out", study / "report.html"], ["report", study]):
        assert cli(*command).code == 0


@pytest.mark.parametrize("option", [["--limit", "3"], ["--device", "cpu"], ["--trust-model"]])
def test_options_about_one_network_are_not_for_the_page_of_a_study(cli, study, option):
    outcome = cli("report", study, *option)
    assert outcome.code == 2
    assert f"{option[0]} cannot be combined with the report of a study" in outcome.error
    assert not (study / "report.html").exists()


@pytest.mark.slow
def test_a_reader_who_leaves_gets_the_files(study, tmp_path):
    file, log = tmp_path / "table.tex", tmp_path / "log"
    child = start(["compare", str(study), "--out", str(file)], log, into_a_pipe_that_nobody_reads)
    assert exit_code(child) == 128 + 13, log.read_text()
    assert file.read_text().startswith(r"\begin{table}")
    assert log.read_text() == ""


@pytest.mark.parametrize("width", ["0", "00", ""])
def test_a_terminal_of_no_width_is_one_of_unknown_width(cli, study, monkeypatch, width):
    monkeypatch.delenv("COLUMNS", raising=False)
    expected = cli("compare", study).out
    monkeypatch.setenv("COLUMNS", width)
    assert cli("compare", study).out == expected
    assert "verified error" in expected


# --- what is said -----------------------------------------------------------------------------------------------------


def table_of(comparison, title):
    (sheet,) = [sheet for sheet in sheets(comparison) if sheet.title.startswith(title)]
    return sheet


def test_tests_are_labelled_by_seed(study):
    (study / "a" / "seed-1" / "verdicts.json").unlink()
    sheet = table_of(compare([study]), "Against")
    assert sheet.rows[0][-1] == "seed 0 0:2 p=0.5, seed 2 0:1 p=1"
    assert "Over images: of the seeds with a test" in sheet.note


def test_where_no_seed_is_in_both_the_difference_is_said_to_be_of_means(study, tmp_path):
    write_run(tmp_path / "study" / "c" / "seed-9", B[0], seed=9, **{"optimizer.lr": 0.5})
    sheet = table_of(compare([study]), "Against")
    assert [row[1] for row in sheet.rows] == ["−20.00%", "−20.00% (of means)"]
    assert "Of means: no seed is in both" in sheet.note
    assert "(of means)" not in table_of(compare([study], baseline="b_50%"), "Against").rows[0][1]


def test_a_difference_s_interval_stays_among_differences(tmp_path):
    for seed, (own, other) in enumerate([("u", "p"), ("u", "u")]):
        write_run(tmp_path / "a" / f"seed-{seed}", other * 10, seed=seed)
        write_run(tmp_path / "b" / f"seed-{seed}", own * 10, seed=seed, **{"optimizer.lr": 0.5})
    interval = compare([tmp_path]).paired[0].over_seeds
    assert (interval.low, interval.high) == (-1, 1)


def test_it_is_said_of_how_many_runs_a_metric_is(study):
    file = study / "a" / "seed-1" / "summary.json"
    file.write_text(file.read_text()[:-1] + ', "clean_error": 0.5}')
    found = compare([study], metrics=["clean_error"])
    assert table_of(found, "Results").rows == [["a", "3", "50.00% (1 of 3 runs)"], ["b_50%", "3", "–"]]
    assert table_of(found, "Clean error").rows[0][1] == "50.00% (1 of 3 runs)"
    assert "of 3 runs" not in str(sheets(compare([study])))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [((36123.4, 36130.4, 36137.4), "36130 ± 7"), ((9.5, 10, 10.5), "10 ± 0.5"), ((1e5,) * 3, "100000 ± 0")],
)
def test_seconds_have_no_exponent(tmp_path, seconds, text):
    for seed, value in enumerate(seconds):
        write_run(tmp_path / f"seed-{seed}", "pu", seed=seed, extra={"train_seconds": value})
    runs = [tmp_path / f"seed-{seed}" for seed in range(3)]
    assert table_of(compare(runs), "Results").rows[0][-1] == text


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.995, 0.999, 0.999999999])
def test_a_level_is_shown_with_all_its_decimals(study, confidence):
    found = compare([study], confidence=confidence)
    for text in (table_of(found, "Verified").columns[2], table_of(found, "Against").columns[2]):
        assert float(text.split("%")[0]) / 100 == pytest.approx(confidence, rel=1e-12)


@pytest.mark.parametrize(
    ("lost", "text"), [(10, "p=0.002"), (990, "p=1.9e-298"), (1100, "p<1e-300"), (10_000, "p<1e-300")]
)
def test_no_p_is_zero(tmp_path, lost, text):
    """Twice 2^-lost."""
    pair_of(tmp_path, "p" * lost, "u" * lost)
    assert table_of(compare([tmp_path]), "Against").rows[0][-1] == f"seed 0 {lost}:0 {text}"


# --- names that are any text ------------------------------------------------------------------------------------------

NAMES = [
    *("$_$", r"$\frac$", "a$b", "_u", "x_", "__b__", "a|b", r"a\|b", "*s*_t_", "`c`", "<script>x", "[x](y)", "~~d~~"),
    *("&lt;", "#1", "b_50%", "ü漢", "a\nb", "a\x1b[31m", "a\ufffeb", os.fsdecode(b"r\xe9")),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name_is_in_every_format(cli, tmp_path, name):
    """Markdown by another reader of it, SVG and the page by a parser of XML and one of HTML."""
    write_run(tmp_path / "runs" / name, "pu", epochs=[0.5, 0.4])
    write_run(tmp_path / "runs" / "other", "pu", epochs=[0.5, 0.4], **{"optimizer.lr": 0.5})
    (tmp_path / "runs" / name / "unfinished").mkdir()
    files = [tmp_path / f"table.{ending}" for ending in ("json", "md", "tex", "html", "svg")]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        outcome = cli("compare", tmp_path / "runs", *(f"--out={file}" for file in files))
    assert (outcome.code, outcome.err) == (0, "")
    written = {file.suffix: file.read_text(encoding="utf-8") for file in files}
    expected = printable(name)
    assert name in [group["name"] for group in json.loads(written[".json"])["groups"]]
    rendered = Page(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(written[".md"]))
    tables = sheets(compare([tmp_path / "runs"]))
    assert rendered.tables == [[list(sheet.columns), *map(list, sheet.rows)] for sheet in tables]
    assert expected in rendered.tables[0][1] + rendered.tables[0][2]
    assert expected in [
        text.text for text in ElementTree.fromstring(written[".svg"]).iter() if text.tag.endswith("text")
    ]
    assert expected in [cell for row in Page(written[".html"]).tables[0] for cell in row]
    assert expected in "".join(outcome.out.split("\n"))


@pytest.mark.parametrize("name", ["[x]", "*y", "[", "x"])
def test_a_row_of_latex_is_no_option_of_the_line_before(name):
    text = to_latex([Sheet("", [name, "b"], [[name, "c"], [name, "d"]])])
    assert not re.search(r"(\\\\|rule)\s*[\[*]", text)
    assert text.count(name) == 3
