"""The box around an image whose pixels are stored as whole numbers.

A stored pixel p stands for the exact p/255, which no floating-point number is. What a deployment computes instead, the
float32 or float64 quotient or a product with the rounded 1/255, lies next to it, and so do the stored neighbours p ± k
that a radius of k/255 is meant to allow. The box holds all of them.
"""

from __future__ import annotations

from torch import Tensor

from certtrain.bounds.box import Box, linf_box
from certtrain.bounds.rounding.boxes import OutwardBox
from certtrain.data import to_float

WIDENING = 2.0**-22  # four roundings to float32


def pixel_box(images: Tensor, eps: float | Tensor) -> OutwardBox:
    """Every image that is within `eps` of the stored one, however its pixels are represented.

    The ends are p/255 ± ε, moved outward by 2⁻²²·(p/255 + ε), cut to [0, 1]. With u = 2⁻²⁴ that is 4u, room for the
    three roundings to float32 that can lie between a real number x of [p/255 - ε, p/255 + ε] and its representation:

    - one in float32(x); two in x computed as q·float32(1/255) for a stored q; fewer in float64;
    - three in fl(v ± fl(ε)), where v represents p itself in either way: (1 + u)³ - 1 < 3.1u;

    and for float64's own: of the few operations here, and of an ε that is written as the float64 nearest to k/255.
    0 and 1, the ends of the range, are represented exactly by all of these, so that the cut loses none.

    Args:
        images: uint8, any shape.
        eps: radius in units of [0, 1]; a tensor that broadcasts against `images` for a radius per image.

    Returns:
        A float64 box of the images' shape.
    """
    exact = images.double() / 255
    reach = eps + WIDENING * (exact + eps)
    return OutwardBox((exact - reach).clamp(min=0.0), (exact + reach).clamp(max=1.0))


def perturbation_box(images: Tensor, eps: float | Tensor, arithmetic: str | None) -> Box:
    """What is asked about: the float32 box for bounds of real mathematics, `pixel_box` for those that cover rounding.

    Args:
        images, eps: as of `pixel_box`.
        arithmetic: that of the bounds, None for real mathematics.
    """
    if arithmetic is not None:
        return pixel_box(images, eps)
    pixels = to_float(images)
    return linf_box(pixels, eps.to(pixels.dtype) if isinstance(eps, Tensor) else eps)
