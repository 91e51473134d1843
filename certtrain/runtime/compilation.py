"""torch.compile with a way out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any


class Compiled:
    """`method`, compiled as one graph for each shape of its arguments; without a compiler, itself.

    The first call compiles, which can take a minute. Where that fails (no C++ compiler, no Triton), one warning says so
    and `method` runs as it is from then on; nothing of it has been executed by then. An error of `method` itself comes
    from that second, plain call.
    """

    def __init__(self, method: MethodType) -> None:
        import torch  # here, since the compiler is slow to load and often not needed

        self._eager = method
        self._function = torch.compile(_with_code_of_its_own(method), fullgraph=True, dynamic=False)

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


def _with_code_of_its_own(method: MethodType) -> Callable[..., Any]:
    """PyTorch keeps compiled graphs by code object, and no more than eight: the ninth network would go without."""
    function = method.__func__
    code = function.__code__.replace()
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    return MethodType(copy, method.__self__)
