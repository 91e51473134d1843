"""Margins z_y - z_j, bounded through the affine operations that end a network as one affine map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds.box import Box
from certtrain.bounds.graph import Call, Ref, map_leaves
from certtrain.bounds.operations.movement import differentiable
from certtrain.bounds.readable import values_readable
from certtrain.bounds.shapes import flattened
from certtrain.errors import UsageError


def merged_margins(tail: Sequence[Call], box: Box, labels: Tensor) -> Box:
    """Bounds of z_y - z_j where z = tail(h) for h in `box`.

    With z = W h + b: (w_y - w_j)·c ± |w_y - w_j|·r + (b_y - b_j), never the difference of two separately bounded
    logits, which would forget that both see the same h.

    Args:
        tail: affine calls, each taking the one before; empty for the identity.
        box: (B, ...), what enters the first of them.
        labels: (B,) int64, the classes y.

    Returns:
        A box of shape (B, K), exactly 0 in column y.

    Raises:
        UsageError: labels that are no classes of these images.
    """
    logits = apply_tail(tail, box.center)
    check_labels(labels, logits.shape[0], logits.shape[1])
    centers = logits.gather(1, labels[:, None]) - logits
    return Box.around(centers, _deviations(tail, box.radius, labels, logits))


def check_labels(labels: Tensor, images: int, classes: int, look: bool | None = None) -> None:
    """Labels of another shape would be broadcast, and those that are no classes counted from behind.

    Args:
        look: at their values, too; by default where they are `values_readable`.

    Raises:
        UsageError: labels that are not one class for each image.
    """
    if labels.dtype != torch.int64 or labels.shape != (images,):
        raise UsageError(f"labels must be int64 of shape ({images},), not {labels.dtype} {tuple(labels.shape)}")
    look = values_readable(labels) if look is None else look
    if images and look and not (labels.min() >= 0 and labels.max() < classes):
        raise UsageError(f"labels must be among the network's {classes} classes")


def wrong_classes(labels: Tensor, classes: int) -> Tensor:
    """(B, K - 1): for each label the other classes, in order."""
    others = torch.arange(classes - 1, device=labels.device)
    return others + (others >= labels[:, None])


def proved(margins: Tensor) -> Tensor:
    """(B,) bool: which images' labels are proved, every margin of (B, K) but the label's own, a 0, being positive and
    finite: of values that overflow nothing is known."""
    return ((margins > 0) & (margins < torch.inf)).sum(1) == margins.shape[1] - 1


def only_finite(margins: Tensor, labels: Tensor) -> Tensor:
    """-inf for what is not finite, 0 in column y: where values overflow nothing is known of a margin."""
    return _finite(margins).scatter(1, labels[:, None], 0.0)


def better(margins: Tensor, others: Tensor) -> Tensor:
    """The larger of two lower bounds of each margin, or the one that is finite; -inf where neither is."""
    return torch.maximum(_finite(margins), _finite(others))


def _finite(margins: Tensor) -> Tensor:
    return torch.where(margins.isfinite(), margins, -torch.inf)


def apply_tail(tail: Sequence[Call], h: Tensor) -> Tensor:
    """The logits (B, K) that the affine calls of `tail`, one after the other, make of values (B, ...) that enter it."""
    dtype = h.dtype  # of the values; what autocast rounds are products alone
    for call in tail:
        h = call.function(*map_leaves(call.args, Ref, partial(_second, h))).to(dtype)
    return h


def _second(value: Tensor, _: Ref) -> Tensor:
    return value


def _deviations(tail: Sequence[Call], radius: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
    """(B, K): how far z_y - z_j can be from its value at the box's centre."""
    if len(tail) == 1 and tail[0].function is F.linear and radius.dim() == 2:
        weight = tail[0].args[1]
        difference = weight[labels][:, None, :] - weight
        return torch.einsum("bkh,bh->bk", difference.abs(), radius).to(radius.dtype)
    # The rows (w_y - w_j) of any affine tail are vector-Jacobian products of it.
    eye = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    rows = eye[labels][:, None, :] - eye
    tail = [replace(call, function=differentiable(call.function)) for call in tail]
    _, pull_back = torch.func.vjp(lambda h: apply_tail(tail, h), torch.zeros_like(radius))  # type: ignore[misc] # two, without has_aux
    coefficients = torch.func.vmap(lambda row: pull_back(row)[0], in_dims=1, out_dims=1)(rows)
    return flattened(coefficients.abs() * radius[:, None], 2).sum(2)
