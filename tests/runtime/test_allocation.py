from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import sys
import numpy as np
from certtrain.runtime.allocation import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(2**23)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(*arguments: str) -> int:
    program = [sys.executable, "-c", PROGRAM, *arguments]
    return int(subprocess.run(program, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_of_freed_arrays_is_used_again():
    """The system counts the pages it had to find."""
    assert new_pages("keep") < new_pages("return") / 5
