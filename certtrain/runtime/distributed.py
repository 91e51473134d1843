"""The process group that trains one network, as torchrun starts it; nothing else calls torch.distributed.

Each rank takes its share of every batch, and what is a sum over the batch is all-reduced: the statistics of
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
from certtrain.runtime.launch import processes

T = TypeVar("T")


class _Sliceable(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Any: ...


S = TypeVar("S", bound=_Sliceable)

TIMEOUT = timedelta(minutes=30)  # for a rank that is silent; one that dies is noticed at once
PATIENCE = timedelta(days=30)  # where one may have far more to search than another


@dataclass(frozen=True)
class Ranks:
    """This process's place in the process group. Collectives must be called by every rank.

    Args:
        rank: of this process, from 0.
        world_size: processes in the group.
        local_rank, local_world_size: the same on this machine.
        patient: a process group of the same processes for collectives that some of them may reach days after others.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    patient: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone prints, and reads and writes the run directory."""
        return self.rank == 0

    def share(self, whole: S) -> S:
        """This rank's part of a sequence: consecutive, and of a length that differs by at most one from the others'."""
        return whole[len(whole) * self.rank // self.world_size : len(whole) * (self.rank + 1) // self.world_size]

    # --- collectives of tensors -----------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on every rank, with gradient to every rank's tensor."""
        return tensor if self.world_size == 1 else _AllReduce.apply(tensor)

    def data_parallel(self, model: nn.Module, function: Callable[..., T]) -> Callable[..., T]:
        """`function`; going backward from what it returns leaves gradients in `model` that are all-reduced.

        By torch's DistributedDataParallel, which sends gradients while others are still being computed. It hooks into
        a module's forward, so `function`, which never calls the model's, becomes the forward of a module of its own.
        Every call must use the same parameters; which ones DDP finds out at the first (`static_graph`).
        """
        if self.world_size == 1:
            return function
        # A compiled step may lay out a gradient in another order than its weight, which costs a copy and no more.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        parallel = DistributedDataParallel(
            _Forward(model.parameters(), function), static_graph=True, gradient_as_bucket_view=True
        )
        parallel.register_comm_hook(None, lambda _, bucket: _all_reduced(bucket.buffer()))  # DDP's own takes the mean
        return parallel

    def all_reduce_gradients(self, model: nn.Module) -> None:
        """Replace the gradients in `model` by their sums over ranks, where a step goes backward several times."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if self.world_size > 1 and gradients:
            flat = parameters_to_vector(gradients)
            dist.all_reduce(flat)
            vector_to_parameters(flat, gradients)

    # --- collectives of small objects, on the CPU -----------------------------------------------------------------

    def all_reduce_max(self, number: int) -> int:
        """The largest of every rank's `number`, on every rank."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def barrier(self) -> None:
        """Wait until every rank is here; on the CPU, where `dist.barrier` would choose a GPU."""
        self.all_reduce_max(0)

    def all_gather(self, value: T, patient: bool = False) -> list[T]:
        """Every rank's `value`, in order of rank, on every rank; it is pickled. `patient`: however late they come."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.patient if patient else None)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, on every rank; it is pickled."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails inside on one rank is raised on all, so that none waits for it and rank 0 can say why.

        No collective may be called inside.
        """
        if self.world_size == 1:
            yield
            return
        raised = None
        try:
            yield
        except (CerttrainError, OSError) as error:
            raised = error
        errors = [error for error in self.all_gather(raised) if error is not None]
        if errors:
            raise raised or errors[0]

    def one_per_machine_first(self, work: Callable[[], T]) -> T:
        """`work()`; what local rank 0 leaves on its machine's disk (a download, a cache) the other local ranks find."""
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
        if self.world_size == 1 or device.type != "cuda" or not torch.cuda.is_available():
            return device
        gpus = torch.cuda.device_count()
        if device.index is not None:
            raise UsageError(f"device {device}: of several processes each takes a GPU of its own, say --device cuda")
        if not dist.is_nccl_available():
            raise UsageError("several processes on GPUs need NCCL, which this PyTorch lacks: say --device cpu")
        if self.local_world_size > gpus:
            raise UsageError(
                f"{self.local_world_size} processes for {gpus} GPUs on this machine: "
                f"say --nproc-per-node {gpus} to torchrun, or --device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)


ALONE = Ranks()


@contextmanager
def process_group() -> Iterator[Ranks]:
    """This process in the group that torchrun has started; a process that was not started so is alone.

    Raises:
        ProcessLost: one of the others has ended, or been silent for TIMEOUT.
    """
    if processes() == 1:
        yield ALONE
        return
    if not dist.is_available():
        raise UsageError("this PyTorch was built without torch.distributed: run one process")
    initialize = not dist.is_initialized()
    try:
        if initialize:
            on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=TIMEOUT)
        local_rank, local_world_size = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(dist.get_rank(), dist.get_world_size(), local_rank, local_world_size, patient)
    except RuntimeError as error:
        if not _is_of_a_lost_process(error):
            raise
        raise ProcessLost(
            f"another of the {processes()} processes has ended or hangs, and so all end; "
            "a run continues from its last checkpoint with --resume"
        ) from error
    if initialize:  # after an error not: it could wait for a process that is no more
        dist.destroy_process_group()


# torch.distributed.nn.functional.all_reduce is this function, but torch 2.15 warns that it is deprecated and refuses it
# under torch.compile; what it names instead (torch.distributed._functional_collectives) is private.
class _AllReduce(torch.autograd.Function):
    """Sum over ranks. Every rank's result depends on every rank's tensor, so gradients are all-reduced as well."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _AllReduce.apply(gradient)


class _Forward(nn.Module):
    """A function as the forward of a module that has the given parameters, and no buffers that DDP would send."""

    def __init__(self, parameters: Iterable[nn.Parameter], function: Callable[..., Any]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters)
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def _all_reduced(tensor: Tensor) -> torch.futures.Future[Tensor]:
    return dist.all_reduce(tensor, async_op=True).get_future().then(lambda done: done.value()[0])


def _is_of_a_lost_process(error: RuntimeError) -> bool:
    """gloo raises plain RuntimeErrors, which name the place in its source."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)
