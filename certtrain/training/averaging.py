"""What a trained network is made ready with: BatchNorm statistics of the whole training set."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def reestimate_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set BatchNorm's running statistics to their mean over `batches`, each weighted by its number of images.

    Mean and variance within each batch, as training normalises by them; nothing else of `model` changes.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    before, mode, seen = [layer.momentum for layer in layers], model.training, 0
    counts = [_count(layer).clone() for layer in layers]
    model.train()
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
