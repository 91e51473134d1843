"""torch.compile with a way out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch


class Compiled:
    """`method`, compiled as one graph for each shape of its arguments; without a compiler, itself.

    The first call compiles, forward and backward, which can take a minute; later runs find the result on disk
    (TORCHINDUCTOR_CACHE_DIR). Where that fails (no C++ compiler, no Triton), one warning says so and `method` runs as
    it is from then on; nothing of it has been executed by then. An error of `method` itself comes from that second,
    plain call.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self._eager = method
        own = _with_code_of_its_own(method)
        self._function = torch.compile(own, fullgraph=True, dynamic=False, options=compiler_options())

    def __call__(self, *args: Any) -> Any:
        try:
            return self._compiled(*args)
        except Exception as error:
            if not _is_of_the_compiler(error):
                raise
            reason = next(filter(None, str(error).splitlines()), type(error).__name__)
            warnings.warn(f"the training step is not compiled ({reason}); it runs slower, the same", stacklevel=2)
            self._function = self._eager
            return self._eager(*args)

    def _compiled(self, *args: Any) -> Any:
        try:
            with _backward_at_once():
                return self._function(*args)
        except Exception as error:
            if not _is_of_the_compiler(error) or not _remove_broken_library(error):
                raise
        with _backward_at_once():
            return self._function(*args)


@contextmanager
def announced(starts: Callable[[], None], ends: Callable[[], None]) -> Iterator[None]:
    """Call `starts` before PyTorch compiles anything inside, and `ends` after."""
    from torch._dynamo.callback import callback_handler  # slow to load, and only for who compiles

    def start(*_: Any) -> None:  # of torch before 2.8 without an argument
        starts()

    def end(*_: Any) -> None:
        ends()

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(end)


_COMPILE_SECONDS = 225  # of a small network's three or four graphs, on two busy cores
_SAVED_SECONDS = 1e-8  # for each number that a clean pass writes, on a CPU: docs/results/benchmark-cpu.json, width 64
_FEWEST_STEPS = 2000  # on a GPU: to pay, a step of a shorter run would have to save a tenth of a second


def compiling_pays(device: torch.device, steps: int, elements: float) -> bool:
    """Whether a run of `steps` steps likely saves more time by compiling its step than that takes.

    An estimate from the configuration alone, never a measurement: a run that is resumed goes on as it began. What
    compiling saves is reading and writing between operations; products take as long as before.

    Args:
        steps: of the whole run.
        elements: numbers that the operations of the network's clean pass write, over all images of all steps.
    """
    return steps >= _FEWEST_STEPS if device.type == "cuda" else elements * _SAVED_SECONDS > _COMPILE_SECONDS


def _backward_at_once() -> Any:
    """Compile the backward pass before the forward pass runs, so that all that can fail does while nothing has run."""
    from torch._functorch import config

    early = "force_non_lazy_backward_lowering"
    return config.patch({early: True} if hasattr(config, early) else {})


def compiler_options() -> dict[str, Any]:
    """Of PyTorch's own compiler."""
    from torch._inductor import config

    if not hasattr(config, "custom_partitioner_fn"):  # before torch 2.9
        return {}
    from certtrain.runtime.partitioning import CPUPartitioner

    return {"custom_partitioner_fn": CPUPartitioner()}


def _is_of_the_compiler(error: BaseException) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def _remove_broken_library(error: BaseException | None) -> bool:
    """Whether `error` comes from a library of PyTorch's cache that was cut off as it was written, and is gone now."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    cache = Path(cache_dir())
    while error is not None:
        inner = getattr(error, "inner_exception", None)
        for one in (error, inner):
            path = getattr(one, "path", None) if isinstance(one, ImportError) else None
            if path and Path(path).is_relative_to(cache) and Path(path).is_file():
                os.unlink(path)
                return True
        error = error.__cause__ or error.__context__
    return False


def _with_code_of_its_own(method: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch keeps compiled graphs by code object, and no more than eight: the ninth network would go without."""
    if not isinstance(method, MethodType):
        return method
    function: Any = method.__func__
    code = function.__code__.replace()
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    return MethodType(copy, method.__self__)
