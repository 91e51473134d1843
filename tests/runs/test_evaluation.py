"""What summary.json says of several radii."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from certtrain.config import load_config
from certtrain.runs.evaluation import summarize


@pytest.mark.parametrize(
    ("radii", "most", "told"),
    [
        (None, 0.1, 0.1),
        ([0.2], 0.1, 0.2),
        ([0.1, 0.2], 0.1, 0.1),
        ([0.3, 0.2, 0.1], 0.2, 0.2),
        ([0.1, 0.3, 0.2], 0.4, 0.3),
        ([0.1, 0.3, 0.2], 0.0, 0.3),
    ],
)
def test_the_errors_on_top_are_those_at_the_radius_trained_for_or_else_at_the_largest(radii, most, told):
    config = load_config("digits", {"verification.eps": radii, "epsilon.max": most})
    results = [
        SimpleNamespace(eps=eps, seconds=1.5, summary=lambda eps=eps: {"eps": eps, "verified_error": eps / 2})
        for eps in radii or [most]
    ]
    summary = summarize(config, results)
    assert (summary["eps"], summary["verified_error"]) == (told, told / 2)
    assert [result["eps"] for result in summary["radii"]] == [result.eps for result in results]
    assert summary["verify_seconds"] == 1.5 * len(results)
