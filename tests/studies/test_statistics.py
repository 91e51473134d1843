"""Intervals cover what they say, on samples whose distribution is known; tests agree with sums written out."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from certtrain.studies.statistics import image_interval, mcnemar, mean_interval

TRUE_MEAN = 0.3


def coverage(draw, interval, trials):
    """How often the interval of a sample holds the true mean."""
    rng = np.random.default_rng(0)
    found = (interval(draw(rng)) for _ in range(trials))
    return sum(one.low <= TRUE_MEAN <= one.high for one in found) / trials


def tolerance(level, trials):
    """Four standard deviations of the share of trials that are covered."""
    return 4 * math.sqrt(level * (1 - level) / trials)


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_few_seeds_are_covered_as_stated(seeds, level):
    share = coverage(lambda rng: rng.normal(TRUE_MEAN, 0.01, seeds), lambda s: mean_interval(s, level), 2000)
    assert share == pytest.approx(level, abs=tolerance(level, 2000))


@pytest.mark.slow
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_many_seeds_of_a_skewed_distribution_are_covered_nearly_as_stated(level):
    def draw(rng):
        return rng.gamma(4.0, TRUE_MEAN / 4.0, 60)

    share = coverage(draw, lambda sample: mean_interval(sample, level), 300)
    assert share == pytest.approx(level, abs=tolerance(level, 300) + 0.02)  # second-order accurate: not exact


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("seeds", [1, 3])
def test_differences_over_images_are_covered_as_stated(level, seeds):
    """Of 500 images 35 % are lost, 5 % won, the others the same: the mean is 0.3; seeds win and lose by themselves."""

    def draw(rng):
        return rng.choice([1.0, -1.0, 0.0], size=(500, seeds), p=[0.35, 0.05, 0.6]).mean(1)

    share = coverage(draw, lambda sample: image_interval(sample, level), 2000)
    assert share == pytest.approx(level, abs=tolerance(level, 2000) + 0.01)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("images", [100, 1000])
@pytest.mark.parametrize("lost", [0.0, 1 / 300, 0.02])
@pytest.mark.parametrize("won", [0.0, 1 / 1000, 0.02])
def test_differences_of_few_images_are_covered_nearly_as_stated(level, images, lost, won):
    """Also where often none differs at all. Counts are whole: coverage goes up and down around what is stated."""
    counts = np.random.default_rng(0).multinomial(images, [lost, won, 1 - lost - won], size=2000)
    covered = 0.0
    for (losses, wins), times in Counter(map(tuple, counts[:, :2].tolist())).items():
        differences = np.zeros(images)
        differences[:losses], differences[losses : losses + wins] = 1, -1
        interval = image_interval(differences, level)
        covered += times * (interval.low <= lost - won <= interval.high)
    assert covered / 2000 > level - 0.3 * (1 - level) - tolerance(level, 2000)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(
    "differences", [[0.0], [1.0], [-1.0], [0.0] * 10, [1.0] * 10, [-1.0] * 500, [1 / 3] * 9, [0.0] * 99 + [1]]
)
def test_an_interval_over_images_has_a_width_and_holds_the_difference(differences, level):
    interval = image_interval(np.array(differences), level)
    assert -1 <= interval.low <= np.mean(differences) <= interval.high <= 1
    assert interval.high - interval.low > 0.4 / len(differences)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.999])
def test_where_no_image_differs_it_ends_as_wilson_s_interval_of_none(level):
    interval = image_interval(np.zeros(50), level)
    wilson = stats.binomtest(0, 50).proportion_ci(level, method="wilson")
    assert (interval.low, interval.high) == pytest.approx((-wilson.high, wilson.high))


def test_values_without_scatter_have_no_interval():
    assert mean_interval([0.5]) is None
    assert mean_interval([]) is None
    for count in (2, 3, 50):
        assert mean_interval([0.1] * count) is None
        assert mean_interval([0.0] * count) is None


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (3, 0), (1, 7), (6, 6), (20, 9)])
def test_mcnemar_is_the_sum_of_the_binomial_tails(only_first, only_second):
    total = only_first + only_second
    first = np.array([True] * only_first + [False] * only_second + [True, True, False])
    second = np.array([False] * only_first + [True] * only_second + [True, True, False])
    tail = sum(math.comb(total, k) for k in range(min(only_first, only_second) + 1)) / 2**total
    test = mcnemar(first, second)
    assert (test.only_first, test.only_second) == (only_first, only_second)
    assert test.p == pytest.approx(min(1.0, 2 * tail))
