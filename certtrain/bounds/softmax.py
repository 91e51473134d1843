"""Softmax along an axis: its exact range over a box.

softmax(x)_k = 1 / (1 + Σ_{j≠k} exp(x_j - x_k)) grows with x_k and falls with every other x_j, so that each element is
least at one corner and greatest at the opposite one: e^{l_k} / (e^{l_k} + Σ_{j≠k} e^{u_j}). Everything is computed from
logarithms of sums without the term k, which neither overflow nor cancel, however large the logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds.box import Box


def softmax(x: Box, dim: int) -> Box:
    lower, upper = log_odds(x, dim)
    return Box(lower.sigmoid(), upper.sigmoid())


def log_softmax(x: Box, dim: int) -> Box:
    lower, upper = log_odds(x, dim)
    return Box(F.logsigmoid(lower), F.logsigmoid(upper))


def log_odds(x: Box, dim: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest log(p_k / (1 - p_k)) of each element's softmax p_k."""
    return x.lower - log_sum_of_others(x.upper, dim), x.upper - log_sum_of_others(x.lower, dim)


def log_sum_of_others(x: Tensor, dim: int) -> Tensor:
    """log Σ_{j≠k} exp(x_j) for each k.

    With the largest term scaled to 1, all others are taken from the whole sum without loss: at least that 1 remains.
    For the largest term itself the others are summed on their own.
    """
    if x.shape[dim] == 1:
        return torch.full_like(x, -torch.inf)
    top = x.detach().argmax(dim, keepdim=True)
    largest = x.gather(dim, top)
    terms = (x - largest).exp()
    others = largest + (terms.sum(dim, keepdim=True) - terms).clamp(min=1.0).log()
    without_top = x.scatter(dim, top, -torch.inf).logsumexp(dim, keepdim=True)
    return others.scatter(dim, top, without_top)
