"""The methods of `BoundedModel.margins`, by price: named here without torch, for configurations and command lines."""

from __future__ import annotations

METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown")
BRANCH_AND_BOUND = "branch-and-bound"
STAGES = (*METHODS, BRANCH_AND_BOUND)
"""The methods, and the search that decides what they leave unknown."""
