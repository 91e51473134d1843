"""torch.compile with a way out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any


class Compiled:
    """`function`, compiled as one graph for each shape of its arguments; without a compiler, itself.

    The first call compiles, which can take a minute. Where that fails (no C++ compiler, no Triton), one warning says so
    and `function` runs as it is from then on; nothing of it has been executed by then.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        import torch  # here, since the compiler is slow to load and often not needed

        self._eager = function
        self._function = torch.compile(function, fullgraph=True, dynamic=False)

    def __call__(self, *args: Any) -> Any:
        try:
            return self._function(*args)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = next(filter(None, str(error).splitlines()), type(error).__name__)
            warnings.warn(f"the training step is not compiled ({reason}); it runs slower, the same", stacklevel=2)
            self._function = self._eager
            return self._eager(*args)
