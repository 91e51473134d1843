"""Loss fusion: bounds of the cross-entropy itself, by one backward row instead of one for each class."""

from __future__ import annotations

from torch import Tensor

from certtrain.bounds.box import Box
from certtrain.bounds.linear.backward import lower_bounds
from certtrain.bounds.margins import check_labels, merged_margins
from certtrain.bounds.results import Bounds


def fused_cross_entropy(
    bounds: Bounds, labels: Tensor, share: Tensor | float = 1.0, differences: Box | None = None
) -> Tensor:
    """Upper bounds (B,) of the cross-entropy by one backward row instead of K. (Xu et al. 2020, "loss fusion".)

    The cross-entropy is log Σ_j exp(z_j - z_y). Each exponential lies below its chord over `differences`, and the
    chords' sum is one linear function of the logits.

    Args:
        bounds: of a joint pass that was recorded.
        share: β; the result is log(β·CROWN-IBP + (1 - β)·IBP).
        differences: (B, K) boxes of z_j - z_y; by default IBP's, the last affine operations merged.

    Raises:
        UsageError: labels that are no classes, a pass that was not recorded, or one that covers rounding.
    """
    bounds.require_real()
    record = bounds.recorded
    check_labels(labels, *bounds.output.shape)
    if differences is None:
        margins = merged_margins(bounds.tail, bounds.tail_input, labels)
        differences = Box(-margins.upper, -margins.lower)
    shift = differences.upper.amax(1, keepdim=True).detach()  # exp(x - shift) cannot overflow
    low, high = (differences.lower - shift).exp(), (differences.upper - shift).exp()
    chord = (high - low) / (differences.upper - differences.lower).clamp(min=1e-8)
    row = -chord.scatter_add(1, labels[:, None], -chord.sum(1, keepdim=True))
    offsets = (low - chord * differences.lower).sum(1)
    relaxed = offsets - lower_bounds(record, record.output, row[:, None])[:, 0]
    return (share * relaxed + (1 - share) * high.sum(1)).log() + shift[:, 0]
