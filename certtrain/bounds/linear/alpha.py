"""alpha-CROWN: the slopes below unstable neurons, and the planes of products, optimised for each image and margin."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certtrain.bounds.graph import Ref, leaves
from certtrain.bounds.linear.ascent import ProjectedAdam
from certtrain.bounds.linear.backward import PARAMETRIZED, Lines
from certtrain.bounds.linear.crown import crown_margins
from certtrain.bounds.linear.free_slopes import FREE_SLOPES
from certtrain.bounds.linear.relaxations import RELAXATIONS
from certtrain.bounds.margins import better, proved
from certtrain.bounds.results import Bounds, Record


@dataclass(frozen=True)
class AlphaOptions:
    """How alpha-CROWN optimises slopes: steps of Adam at a rate that decays, images leaving as soon as proved."""

    steps: int = 20
    lr: float = 0.2
    decay: float = 0.97


def alpha_margins(bounds: Bounds, labels: Tensor, options: AlphaOptions) -> Tensor:
    """Margins (B, K), the best met while the slopes below unstable neurons are optimised, per image and margin.

    (Xu et al. 2021, arXiv 2011.13824.) With zero steps, or where no slope reaches the output, `crown_margins`. Carries
    no gradient.
    """
    with torch.no_grad():
        best = crown_margins(bounds, labels)
    if not options.steps or proved(best).all():
        return best
    record = bounds.recorded.detach()
    slopes, ends = _initial_slopes(record, best.shape[1] - 1)
    if not slopes:
        return best
    free = list(slopes.values())
    ascent = ProjectedAdam(free, [options.lr] * len(free), [ends[index] for index in slopes], options.decay)
    lines: Lines = {}
    for _ in range(options.steps):
        with torch.enable_grad():
            margins = crown_margins(replace(bounds, record=record), labels, slopes, lines)
            if not margins.requires_grad:
                break
            gradients = torch.autograd.grad(margins[~proved(best)].sum(), free, allow_unused=True)
        ascent.step(gradients)
        best = torch.where(proved(best)[:, None], best, better(best, margins.detach()))
        if proved(best).all():
            break
    return best


def _initial_slopes(record: Record, rows: int) -> tuple[dict[int, Tensor], dict[int, tuple[Tensor, Tensor]]]:
    """By call with free slopes: those below, (B, rows, ...), and the ends they may move between, (B, 1, ...).

    By product of two values: the parameter of its planes.
    """
    slopes, ends = {}, {}
    for call in record.calls:
        refs = [argument for argument in call.args[:2] if isinstance(argument, Ref)]
        if call.function in PARAMETRIZED and len(set(refs)) == 2:
            start = torch.zeros_like(record.boxes[refs[0].index].like)
            slopes[call.index] = start[:, None].repeat(1, rows, *[1] * (start.dim() - 1)).requires_grad_()
            ends[call.index] = -torch.ones_like(start)[:, None], torch.ones_like(start)[:, None]
        if call.function not in FREE_SLOPES:
            continue
        (ref,) = leaves(call.args, Ref)
        question = record.boxes[ref.index], *call.args[1:]
        free = FREE_SLOPES[call.function](*question)
        if not (free.low < free.high).any():
            continue
        start = RELAXATIONS[call.function](*question).lower_slope.clamp(free.low, free.high)
        slopes[call.index] = start[:, None].repeat(1, rows, *[1] * (start.dim() - 1)).requires_grad_()
        ends[call.index] = free.low[:, None], free.high[:, None]
    return slopes, ends
