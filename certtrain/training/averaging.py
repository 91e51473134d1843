"""What a network may be handed out with instead of its last weights and statistics: averages of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from certtrain.config.averaging import AveragingSection, EMASection, SWASection
from certtrain.errors import UsageError
from certtrain.runtime.precision import full_precision
from certtrain.schedules import AverageShare


class AveragedWeights:
    """An average of a network's parameters over the steps that train it.

    torch's AveragedModel counts on the device, and waits for the count at every update; here it follows from the step.

    Args:
        model: the network; its buffers are not averaged.
        share: of the present weights in the average, after so many steps.
    """

    def __init__(self, model: nn.Module, share: Callable[[int], float]) -> None:
        self._parameters, self._share = dict(model.named_parameters()), share
        self.weights = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """So many steps have been taken."""
        share = self._share(steps)
        if share:
            for name, average in self.weights.items():
                average.lerp_(self._parameters[name], share)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from an average that was saved."""
        for name, average in self.weights.items():
            average.copy_(weights[name])

    @torch.no_grad()
    def apply(self) -> None:
        """Give the network the averaged weights."""
        for name, average in self.weights.items():
            self._parameters[name].copy_(average)


def build_average(
    section: AveragingSection, model: nn.Module, steps_per_epoch: int, epochs: int
) -> AveragedWeights | None:
    """The average that `section` describes, None where it says none.

    Raises:
        UsageError: the run ends before any weights are taken.
    """
    decay = section.decay if isinstance(section, EMASection) else None
    match section:
        case EMASection(every_steps=every) | SWASection(every_steps=int(every)):
            until_first = every
        case SWASection(every_epochs=apart):  # at the ends of epochs, that of the first one first
            every, until_first = apart * steps_per_epoch, steps_per_epoch
        case _:
            return None
    share = AverageShare((section.start_epoch - 1) * steps_per_epoch + until_first, every, decay)
    if share.first > epochs * steps_per_epoch:
        raise UsageError(
            f"training.averaging would take its first weights after step {share.first}, and the run has "
            f"{epochs * steps_per_epoch}: begin earlier, or average more often"
        )
    return AveragedWeights(model, share)


@torch.no_grad()
def reestimate_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set BatchNorm's running statistics to their mean over `batches`, each weighted by its number of images.

    Mean and variance within each batch, as PyTorch's running statistics take them, in float32 whatever the network was
    trained in, as it is proved; nothing else of `model` changes.
    Without BatchNorm no batch is looked at.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not layers:
        return
    before, mode, seen = [layer.momentum for layer in layers], model.training, 0
    counts = [_count(layer).clone() for layer in layers]
    model.train()
    with full_precision():
        for images in batches:
            seen += len(images)
            for layer in layers:
                layer.momentum = len(images) / seen
            model(images)
    for layer, momentum, count in zip(layers, before, counts, strict=True):
        layer.momentum = momentum
        _count(layer).copy_(count)
    model.train(mode)


def _count(layer: _BatchNorm) -> Tensor:
    assert layer.num_batches_tracked is not None  # as it tracks statistics
    return layer.num_batches_tracked
