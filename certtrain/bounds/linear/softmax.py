"""Planes below and above softmax, by log-sum-exp. (Wei et al. 2023, arXiv 2303.01713, L^LSE and U^LSE.)

below   e^{x_k} / Σ_j (chord of e^{x_j} over its interval), convex in x: its tangent plane
above   the chord of exp over the interval of log p_k, at log p_k = x_k - LSE(x), concave in x: its tangent plane

and log-softmax in the same way without exp, below x_k - log Σ_j (chord of e^{x_j}) by the tangent of the logarithm;
all in the middle of the box. The slopes of element k in x_j are a diagonal and a product of two vectors, which is how
they are applied: no Jacobian is written down.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds.box import Box
from certtrain.bounds.graph import Call
from certtrain.bounds.linear.patches import Contributions
from certtrain.bounds.linear.relaxations import LEAST_WIDTH, chord_slope
from certtrain.bounds.shapes import flattened
from certtrain.bounds.softmax import log_odds


def softmax(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
    ref, dim = call.args
    x = boxes[ref.index]
    axis = dim % x.like.dim()
    lower, upper = x.lower.movedim(axis, -1), x.upper.movedim(axis, -1)
    logarithm = call.function is torch.log_softmax
    pulled, constant = _planes(a.movedim(axis + 1, -1), lower, upper, logarithm)
    return [(ref, pulled.movedim(-1, axis + 1))], constant


def _planes(a: Tensor, lower: Tensor, upper: Tensor, logarithm: bool) -> tuple[Tensor, Tensor]:
    """Over the last axis."""
    shift = upper.detach().amax(-1, keepdim=True)  # which softmax does not see: no exponential is above 1 then
    lower, upper = lower - shift, upper - shift
    middle = (lower + upper) / 2
    low, high, width = lower.exp(), upper.exp(), upper - lower
    # Where the interval is too narrow for a chord, the steepest tangent: from `low` on it is above as well.
    chord = chord_slope(width, high - low, high, LEAST_WIDTH)
    total = (low + chord * (middle - lower)).sum(-1, keepdim=True)
    share = chord / total
    value = torch.ones_like(middle) if logarithm else middle.exp() / total
    tangent = middle - total.log() if logarithm else value
    below = tangent - value * (middle - (share * middle).sum(-1, keepdim=True))

    log_p = middle.log_softmax(-1)
    p = log_p.exp()
    if logarithm:
        slope, chord_of_exp = torch.ones_like(middle), log_p
    else:
        least, most = (F.logsigmoid(odds) for odds in log_odds(Box(lower, upper), -1))
        slope = chord_slope(most - least, most.exp() - least.exp(), most.exp(), LEAST_WIDTH)
        chord_of_exp = least.exp() + slope * (log_p - least)
    above = chord_of_exp - slope * (middle - (p * middle).sum(-1, keepdim=True))

    positive, negative = a.clamp(min=0), a.clamp(max=0)
    of_below, of_above = positive * value[:, None], negative * slope[:, None]
    pulled = of_below - of_below.sum(-1, keepdim=True) * share[:, None]
    pulled = pulled + of_above - of_above.sum(-1, keepdim=True) * p[:, None]
    offset = flattened(positive * below[:, None] + negative * above[:, None], 2).sum(2)
    # The planes are those of the shifted values; their slopes sum to what the shift of each row is multiplied by.
    return pulled, offset - flattened(pulled * shift[:, None], 2).sum(2)
