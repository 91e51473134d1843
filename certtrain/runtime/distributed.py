"""The processes that train one network together, as torchrun starts them; nothing else knows how they talk.

Each rank takes its share of every batch, and what is a sum over the batch is added up over ranks: the statistics of
BatchNorm and of the regularizers, with gradient; the gradients of the parameters; the metrics. The loss of a rank is
its share of the batch's loss, so that losses and gradients add up as well, however uneven the shares are.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from certtrain.errors import CerttrainError, ProcessLost, UsageError
from certtrain.runtime.launch import launched

T = TypeVar("T")


class _Sliceable(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Any: ...


S = TypeVar("S", bound=_Sliceable)

TIMEOUT = timedelta(minutes=30)  # for a rank that is silent; one that dies is noticed at once


@dataclass(frozen=True)
class Ranks:
    """This process, and how many there are. Every method that talks to the others must be called by all of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that prints, and that reads and writes the run directory."""
        return self.rank == 0

    def share(self, whole: S) -> S:
        """This rank's part of a sequence: consecutive, and of a length that differs by at most one from the others'."""
        return whole[len(whole) * self.rank // self.size : len(whole) * (self.rank + 1) // self.size]

    # --- tensors --------------------------------------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on all of them, with gradient to every rank's part."""
        return tensor if self.size == 1 else _Sum.apply(tensor)

    def synchronized(self, model: nn.Module, function: Callable[..., T]) -> Callable[..., T]:
        """`function`; going backward from what it returns leaves the sum of all ranks' gradients in `model`.

        By torch's DistributedDataParallel, which sends gradients while others are still being computed. It hooks into
        a module's forward, so `function`, which never calls the model's, becomes the forward of a module of its own.
        Every call must use the same parameters; which ones DDP finds out at the first (`static_graph`).
        """
        if self.size == 1:
            return function
        # A compiled step may lay out a gradient in another order than its weight, which costs a copy and no more.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        parallel = DistributedDataParallel(
            _Forward(model.parameters(), function), static_graph=True, gradient_as_bucket_view=True
        )
        parallel.register_comm_hook(None, lambda _, bucket: _summed(bucket.buffer()))  # DDP's own takes the mean
        return parallel

    def sum_gradients(self, model: nn.Module) -> None:
        """The same after the fact, where a step goes backward several times."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if self.size > 1 and gradients:
            flat = parameters_to_vector(gradients)
            dist.all_reduce(flat)
            vector_to_parameters(flat, gradients)

    # --- small things, on the CPU ---------------------------------------------------------------------------------

    def largest(self, number: int) -> int:
        if self.size == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def wait(self) -> None:
        """Until every rank is here."""
        self.largest(0)

    def gather(self, thing: T) -> list[T]:
        """Every rank's `thing`, in order."""
        things: list[Any] = [thing] * self.size
        if self.size > 1:
            dist.all_gather_object(things, thing)
        return things

    def from_first(self, thing: T) -> T:
        """The first rank's `thing`."""
        things = [thing]
        if self.size > 1:
            dist.broadcast_object_list(things, src=0)
        return things[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails inside on one rank fails on all, so that none waits for it and the first can say why.

        Inside, ranks must not talk to each other.
        """
        if self.size == 1:
            yield
            return
        mine = None
        try:
            yield
        except (CerttrainError, OSError) as error:
            mine = error
        errors = [error for error in self.gather(mine) if error is not None]
        if errors:
            raise mine or errors[0]

    def one_per_machine_first(self, work: Callable[[], T]) -> T:
        """`work()`; what the first process of a machine leaves on its disk (a download, a cache) the others find."""
        results = []
        with self.together():
            if self.local_rank == 0:
                results.append(work())
        with self.together():
            if self.local_rank != 0:
                results.append(work())
        return results[0]

    def own_device(self, device: torch.device) -> torch.device:
        """`device`, or of its kind the GPU that belongs to this process."""
        if self.size == 1 or device.type != "cuda" or not torch.cuda.is_available():
            return device
        gpus = torch.cuda.device_count()
        if device.index is not None:
            raise UsageError(f"device {device}: of several processes each takes a GPU of its own, say --device cuda")
        if not dist.is_nccl_available():
            raise UsageError("several processes on GPUs need NCCL, which this PyTorch lacks: say --device cpu")
        if self.local_size > gpus:
            raise UsageError(
                f"{self.local_size} processes for {gpus} GPUs on this machine: "
                f"say --nproc-per-node {gpus} to torchrun, or --device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun has started, in contact; one that was not started so is alone.

    Raises:
        ProcessLost: one of the others has ended, or been silent for TIMEOUT.
    """
    if not launched() or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    if not dist.is_available():
        raise UsageError("this PyTorch was built without torch.distributed: run one process")
    ours = not dist.is_initialized()
    try:
        if ours:
            on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=TIMEOUT)
        local = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        yield Ranks(dist.get_rank(), dist.get_world_size(), *local)
    except RuntimeError as error:
        if not _is_of_a_lost_process(error):
            raise
        raise ProcessLost(
            f"another of the {os.environ['WORLD_SIZE']} processes has ended or hangs, and so all end; "
            "a run continues from its last checkpoint with --resume"
        ) from error
    if ours:  # after an error not: it could wait for a process that is no more
        dist.destroy_process_group()


class _Sum(torch.autograd.Function):
    """Sum over ranks. Each rank's result depends on each rank's part, so a part's gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


class _Forward(nn.Module):
    """A function as the forward of a module that has the given parameters, and no buffers that DDP would send."""

    def __init__(self, parameters: Iterable[nn.Parameter], function: Callable[..., Any]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters)
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def _summed(tensor: Tensor) -> torch.futures.Future[Tensor]:
    return dist.all_reduce(tensor, async_op=True).get_future().then(lambda done: done.value()[0])


def _is_of_a_lost_process(error: RuntimeError) -> bool:
    """gloo raises plain RuntimeErrors, which name the place in its source."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)
