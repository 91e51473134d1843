"""The vision transformer of `certtrain.models`, as the checker sees it: intervals of one image's tokens, (T, E).

Softmax, products of two intervals and normalization are derived again here; docs/soundness.md, (13) to (16).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from certtrain.errors import CertificateError
from certtrain.verification.checker.intervals import STORED, TINY, UNIT, Array, Interval, Propagation, growth

EPSILON = 1e-5  # of LayerNorm
SPARE = 1 + 2.0**-40


def encode(p: Propagation, image: Interval, options: Mapping[str, Any], name: str, last: int) -> Interval:
    """What enters the last layer, number `last` of the network `name`."""
    divides = options.get("norm_kind", "layer") != "layer-no-variance"
    norm, heads = options.get("norm", "pre"), int(options.get("heads", 4))
    if options.get("activation", "relu") != "relu":
        raise CertificateError("the checker does not know the accuracy of GELU: certificates are for relu")
    x = _embed(p, image, f"{name}.0", bool(options.get("shifted_patches", False)))
    for block in range(1, last - 2):
        layer = f"{name}.{block}"
        for branch in ("attention", "mlp"):
            entering = _normalize(p, x, f"{layer}.{branch}_norm", divides) if norm == "pre" else x
            function = _attention(p, entering, f"{layer}.attention", heads) if branch == "attention" else None
            through = _mlp(p, entering, f"{layer}.mlp") if function is None else function
            x = p.add(x, through)
            x = _normalize(p, x, f"{layer}.{branch}_norm", divides) if norm == "post" else x
    x = _normalize(p, x, f"{name}.{last - 2}", divides) if norm == "pre" else x
    pool = options.get("pool", "mean")
    if pool == "token":
        return moved(lambda part: part[0], x)
    return p.flatten(x) if pool == "flatten" else _mean(p, x, 0)


def _embed(p: Propagation, image: Interval, name: str, shifted: bool) -> Interval:
    kernel = p.weights[f"{name}.projection.weight"]
    patch = kernel.shape[2]
    if shifted:
        image = moved(lambda part: _with_shifts(part, patch // 2), image)
    maps = p.convolution(image, f"{name}.projection", patch, 0)
    x = moved(lambda part: part.reshape(len(part), -1).T, maps)
    token = p.weights.get(f"{name}.class_token")
    if token is not None:
        first = stored(p, token[0])
        x = Interval(np.concatenate([first.center, x.center]), np.concatenate([first.radius, x.radius]))
    return _add_constant(p, x, p.weights[f"{name}.position"][0])


def _with_shifts(image: Array, offset: int) -> Array:
    height, width = image.shape[1:]
    wide = np.pad(image, ((0, 0), (offset, offset), (offset, offset)))
    ends = [(top, left) for top in (0, 2 * offset) for left in (0, 2 * offset)]
    return np.concatenate([image, *(wide[:, top : top + height, left : left + width] for top, left in ends)])


def _mlp(p: Propagation, x: Interval, name: str) -> Interval:
    return p.linear(p.relu(p.linear(x, f"{name}.0")), f"{name}.2")


def _attention(p: Propagation, x: Interval, name: str, heads: int) -> Interval:
    query, key, value = (_heads(p.linear(x, f"{name}.{part}"), heads) for part in ("query", "key", "value"))
    query = _scaled(p, query, np.array([query.center.shape[-1] ** -0.5]))
    scores = _product(p, query, moved(lambda part: part.swapaxes(-1, -2), key))
    mixed = _average(p, *_softmax(p, scores), value)
    return p.linear(moved(lambda part: part.transpose(1, 0, 2).reshape(part.shape[1], -1), mixed), f"{name}.out")


def _heads(x: Interval, heads: int) -> Interval:
    """(T, E) -> (heads, T, E / heads)."""
    return moved(lambda part: part.reshape(len(part), heads, -1).transpose(1, 0, 2), x)


# --- the operations ---------------------------------------------------------------------------------------------------


def stored(p: Propagation, constant: Array) -> Interval:
    return p.widened(Interval(constant, np.zeros_like(constant)), p.elementwise(1), np.abs(constant))


def _add_constant(p: Propagation, x: Interval, constant: Array) -> Interval:
    return p.widened(Interval(x.center + constant, x.radius), p.elementwise(2), x.magnitude + np.abs(constant))


def _scaled(p: Propagation, x: Interval, factor: Array) -> Interval:
    known = p.is_small(factor)
    factor = np.where(known, factor, 0.0)
    size = np.abs(factor)
    radius = np.where(known, x.radius * size + p.flushed(x.magnitude), np.inf)
    return p.widened(Interval(x.center * factor, radius), p.elementwise(4), x.magnitude * size)


def _mean(p: Propagation, x: Interval, axis: int) -> Interval:
    terms = x.center.shape[axis]
    center, radius, magnitude = (part.mean(axis, keepdims=axis != 0) for part in (x.center, x.radius, x.magnitude))
    return p.widened(Interval(center, radius * SPARE), p.sum_error(terms + 2), magnitude * SPARE, terms)


def _normalize(p: Propagation, x: Interval, name: str, divides: bool) -> Interval:
    if f"{name}.norm.running_mean" in p.weights:
        return moved(np.transpose, p.batch_norm(moved(np.transpose, x), f"{name}.norm"))
    weight, bias = p.weights[f"{name}.weight"], p.weights[f"{name}.bias"]
    normalized = _standardized(p, x) if divides else _centered(p, x)
    return _add_constant(p, _scaled(p, normalized, weight), bias)


def _centered(p: Propagation, x: Interval) -> Interval:
    mean = _mean(p, x, -1)
    return p.add(x, Interval(-mean.center, mean.radius))


def _standardized(p: Propagation, x: Interval) -> Interval:
    """(x - mean) / √(variance + ε), by Eq. 16; d is the deviation."""
    terms = x.center.shape[-1]
    mean_size = x.magnitude.mean(-1, keepdims=True) * SPARE
    combined = (x.magnitude + mean_size) * SPARE
    center = x.center - x.center.mean(-1, keepdims=True)
    radius = (1 - 2 / terms) * x.radius + x.radius.mean(-1, keepdims=True)
    d = p.widened(Interval(center, radius * SPARE), p.sum_error(terms + 2), combined, terms)
    low, high = d.center - d.radius, d.center + d.radius
    nearest = np.clip(0.0, low, high)
    small, large = nearest**2, np.maximum(low**2, high**2)

    def end(of: Array, if_positive: Array, if_negative: Array) -> Array:
        others = np.where(of >= 0, if_positive, if_negative)
        return of / np.sqrt((of**2 + others) / terms + EPSILON)

    least_others, most_others = _sum_of_others(small), _sum_of_others(large)
    z = between(end(low, most_others, least_others), end(high, least_others, most_others))
    least = (small.mean(-1, keepdims=True) + EPSILON) * (1 - 2.0**-30)
    error = p.sum_error(4 * terms + 32)
    relative = error * (1 + mean_size / np.sqrt(least)) + (error * mean_size) ** 2 / least
    of_deviation = p.sum_error(terms + 2) * combined / np.sqrt(least) * (1 + relative)
    few = p.elementwise(16) + float64_error(terms + 64)
    lost = (z.magnitude * relative + of_deviation) * (1 + 2.0**-30)
    result = p.widened(Interval(z.center, z.radius + lost), few, z.magnitude)
    fits = combined.max(-1, keepdims=True) <= 2.0**40  # squares are summed, and meet what was flushed
    return Interval(result.center, np.where((relative < 0.5) & fits, result.radius, np.inf))


def _sum_of_others(squares: Array) -> Array:
    """Along the last axis, each on its own: no difference that could cancel."""
    others = np.repeat(squares[..., None, :], squares.shape[-1], axis=-2)
    others[..., np.arange(squares.shape[-1]), np.arange(squares.shape[-1])] = 0.0
    return others.sum(-1)


def _product(p: Propagation, x: Interval, y: Interval) -> Interval:
    """x @ y, by Eq. 13."""
    terms = x.center.shape[-1]
    inner, other = np.clip(x.center, -x.radius, x.radius), np.clip(y.center, -y.radius, y.radius)
    center = x.center @ y.center + inner @ other
    radius = np.abs(x.center) @ y.radius + x.radius @ (np.abs(y.center) + y.radius) - np.abs(inner) @ np.abs(other)
    magnitude = (x.magnitude @ y.magnitude) * SPARE
    lost = _products_lost(p, terms, x, y)
    return p.widened(
        Interval(center, np.maximum(radius, 0) + lost), p.sum_error(terms) + 8 * float64_error(terms), magnitude
    )


def _products_lost(p: Propagation, terms: int, x: Interval, y: Interval) -> float:
    return 8 * TINY[p.arithmetic] * (terms + 1) * (1 + x.magnitude.max() + y.magnitude.max())


def _softmax(p: Propagation, x: Interval) -> tuple[Interval, Array]:
    """Over the last axis, by Eq. 14: the weights, and how far their sums can be from 1."""
    unit, terms = UNIT[p.arithmetic], x.center.shape[-1]
    low, high = x.center - x.radius, x.center + x.radius
    width = (high.max(-1, keepdims=True) - low.min(-1, keepdims=True)) * SPARE
    roundings = terms + 18 + 2 * width
    size = np.maximum(np.abs(low), np.abs(high)).max(-1, keepdims=True)
    own = 2 * (terms + 64) * 2.0**-53 * (2 + size)
    known = (roundings * unit < 0.5) & (own < 2.0**-10)
    error = (1 + STORED[p.arithmetic]) * SPARE / (1 - np.where(known, roundings, 0.0) * unit) - 1 + 2.0**-50
    lost = 8 * (terms + 4) * TINY[p.arithmetic]
    total = (error + own) * (1 + 2.0**-8)
    lower, upper = _share(low, high), _share(high, low)
    lower = np.where(known, np.maximum(lower * (1 - total) - lost, 0.0), 0.0)
    upper = np.where(known, (upper * (1 + total) + lost) * SPARE, np.inf)
    return between(lower, upper), np.where(known, error + lost, np.inf)


def _share(own: Array, others: Array) -> Array:
    """1 / (1 + Σ_{j≠k} exp(others_j - own_k)) for each k."""
    differences = others[..., None, :] - own[..., :, None]
    places = np.arange(own.shape[-1])
    differences[..., places, places] = -np.inf
    return 1 / (1 + np.exp(differences).sum(-1))


def _average(p: Propagation, weights: Interval, excess: Array, value: Interval) -> Interval:
    """weights @ value, by Eq. 15; `excess`: how far the sums of the weights can be from 1."""
    terms = weights.center.shape[-1]
    least, most = np.maximum(weights.center - weights.radius, 0.0), weights.center + weights.radius
    low, high = value.center - value.radius, value.center + value.radius
    m = value.center.mean(-2, keepdims=True)

    def greatest(v: Array) -> Array:
        return most @ np.maximum(v, 0) + least @ np.minimum(v, 0)

    upper = np.minimum(m + greatest(high - m), high.max(-2, keepdims=True))
    lower = np.maximum(m - greatest(m - low), low.min(-2, keepdims=True))
    largest = value.magnitude.max(-2, keepdims=True)
    magnitude = (most @ (value.magnitude + largest)) * SPARE
    lost = excess * largest * SPARE + _products_lost(p, terms, weights, value)
    found = between(lower, upper)
    error = p.sum_error(terms) + 8 * float64_error(2 * terms)
    return p.widened(Interval(found.center, found.radius + lost), error, magnitude)


def moved(function: Callable[[Array], Array], x: Interval) -> Interval:
    """With `function`, which only moves elements."""
    return Interval(function(x.center), function(x.radius))


def between(lower: Array, upper: Array) -> Interval:
    center = (lower + upper) / 2
    return Interval(center, np.nextafter(np.maximum(upper - center, center - lower), np.inf))


def float64_error(terms: int) -> float:
    """Of a sum of so many products in numpy's own arithmetic, and in the proving program's, together."""
    return growth(UNIT["float64"], terms + 1 + 16) - 1 + growth(UNIT["float64"], terms + 1 + 24) - 1
