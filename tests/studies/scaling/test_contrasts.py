"""The difference of two protocols' laws is that of the laws they were made of, from the cells that both have."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from certtrain.studies.scaling.contrasts import common, contrasts
from certtrain.studies.scaling.results import Measured
from tests.studies.scaling.test_fits import grid

WIDTHS = [4 * 2 ** (k / 2) for k in range(9)]
LAWS = {"corrected": (0.6, 0.4), "kaplan": (0.9, 0.3)}  # by width, by epochs


def results(protocol, by_width, by_epochs, noise=0.0, seeds=(0, 1), start=0, widths=WIDTHS):
    random, found = np.random.default_rng(start), []
    for point in grid(budgets=5, first=1e11, widths=widths, by_width=by_width, by_epochs=by_epochs):
        config = SimpleNamespace(training=SimpleNamespace(epochs=point.epochs))
        cell = SimpleNamespace(
            protocol=protocol, budget=point.budget, compute=point.compute, width=point.width, config=config
        )
        found.append(Measured(cell, {seed: point.error + random.normal(0, noise) for seed in seeds}, 5000))
    return found


def both(noise, **settings):
    return [
        result
        for start, (name, laws) in enumerate(LAWS.items())
        for result in results(name, *laws, noise=noise, start=start, **settings)
    ]


def of_width(by_width, by_epochs):
    return by_epochs / (by_width + 2 * by_epochs)


TRUTH = of_width(*LAWS["kaplan"]) - of_width(*LAWS["corrected"])


def test_the_difference_of_exponents_comes_back():
    isoflop, joint = contrasts(both(1e-5), 10)
    for found, tolerance in ((isoflop, 0.02), (joint, 0.005)):
        assert found.protocols == ("corrected", "kaplan")
        assert found.cells == 5 * len(WIDTHS)
        exponent = found.exponents["width"]
        for value, laws in zip(exponent.values, LAWS.values(), strict=True):
            assert value == pytest.approx(of_width(*laws), abs=tolerance)
        assert exponent.difference == pytest.approx(TRUTH, abs=tolerance)
        assert found.exponents["epochs"].difference == pytest.approx(-2 * TRUTH, abs=2 * tolerance)


@pytest.mark.slow
def test_the_interval_holds_the_difference_and_none_where_there_is_none():
    _, joint = contrasts(both(0.003), 40)
    low, high = joint.exponents["width"].interval
    assert low < TRUTH < high < 0
    alike = [*results("corrected", *LAWS["corrected"], 0.003), *results("kaplan", *LAWS["corrected"], 0.003, start=1)]
    _, joint = contrasts(alike, 40)
    low, high = joint.exponents["width"].interval
    assert low < 0 < high


def test_cells_and_seeds_of_one_alone_do_not_count():
    """Whatever their errors are."""
    all_of_both = both(0.001)
    expected = contrasts(all_of_both, 5)
    more = [replace(result, by_seed={**result.by_seed, 2: 0.99}) for result in all_of_both[:45]] + all_of_both[45:]
    wider = results("corrected", 0.1, 0.9, widths=[128.0, 256.0])
    assert contrasts([*more, *wider], 5) == expected
    one, other = common([*more, *wider], "corrected", "kaplan")
    assert [result.cell.budget for result in one] == [result.cell.budget for result in other]
    assert {seed for result in (*one, *other) for seed in result.by_seed} == {0, 1}
    without = common([replace(all_of_both[0], by_seed={5: 0.5}), *all_of_both[1:]], "corrected", "kaplan")
    assert list(map(len, without)) == [44, 44]


@pytest.mark.parametrize("found", [[], results("corrected", *LAWS["corrected"])])
def test_one_protocol_has_no_contrast(found):
    assert contrasts(found, 5) == []


def test_too_few_cells_of_both_are_said():
    few = [result for result in both(0.001) if result.cell.protocol == "corrected" or result.cell.width < 7]
    isoflop, joint = contrasts(few, 5)
    assert isoflop.cells == joint.cells == 10
    assert "budgets have an optimum inside the grid" in isoflop.why_not
    assert "are needed" in joint.why_not
    assert isoflop.exponents == joint.exponents == {}
    apart = [result for result in few if result.cell.protocol == "corrected" or result.cell.width < 0]
    assert contrasts([*apart, *results("kaplan", *LAWS["kaplan"], widths=[1000.0])], 5)[0].cells == 0
