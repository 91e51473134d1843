"""What can become of an image: the words that results, certificates and reports share, told without torch."""

from __future__ import annotations

from enum import StrEnum


class Verdict(StrEnum):
    """What became of one image; its value is what files of results say."""

    MISCLASSIFIED = "misclassified"  # without any perturbation
    PROVED = "proved"
    ATTACKED = "attacked"
    UNKNOWN = "unknown"  # neither, and branch and bound was not asked
    TIMEOUT = "timeout"
    MEMORY = "memory"
    ALL_SPLIT = "all split"  # nothing is left to split, and still no proof


GAVE_UP = (Verdict.TIMEOUT, Verdict.MEMORY, Verdict.ALL_SPLIT)
"""Why branch and bound has not decided an image."""
