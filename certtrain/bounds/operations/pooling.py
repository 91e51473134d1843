"""Maxima, sums and averages over windows or axes; resizing, whose new pixels are averages of old ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds.operations.preconditions import batched, only, reduces, require_that
from certtrain.bounds.operations.record import Affine, define

# --- maxima -----------------------------------------------------------------------------------------------------------


def _bind_max_pool(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Any, ...]:
    only(return_indices, False, "return_indices")
    return input, kernel_size, stride or None, padding, dilation, ceil_mode


def _max_pool_settings(m: Any) -> tuple[Any, ...]:
    only(m.return_indices, False, f"{type(m).__name__} with return_indices")
    return m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode


_function: Callable[..., Any]
_torch: Callable[..., Any]
_module: type[nn.Module]

for _function, _torch, _module, _dims in (
    (F.max_pool1d, torch.max_pool1d, nn.MaxPool1d, 3),
    (F.max_pool2d, torch.max_pool2d, nn.MaxPool2d, 4),
    (F.max_pool3d, torch.max_pool3d, nn.MaxPool3d, 5),
):
    define(
        _function,
        _bind_max_pool,
        functions=(_torch,),
        modules={_module: _max_pool_settings},
        increasing=True,
        require=batched(_dims),
    )


def _bind_adaptive_max(input: Any, output_size: Any, return_indices: bool = False) -> tuple[Any, ...]:
    only(return_indices, False, "return_indices")
    return input, output_size


def _adaptive_max_settings(m: Any) -> tuple[Any, ...]:
    only(m.return_indices, False, f"{type(m).__name__} with return_indices")
    return (m.output_size,)


for _function, _module, _dims in (
    (F.adaptive_max_pool1d, nn.AdaptiveMaxPool1d, 3),
    (F.adaptive_max_pool2d, nn.AdaptiveMaxPool2d, 4),
):
    define(
        _function,
        _bind_adaptive_max,
        modules={_module: _adaptive_max_settings},
        increasing=True,
        require=batched(_dims),
    )


def _bind_extremum(input: Any, dim: Any = (), keepdim: bool = False, *, out: None = None) -> tuple[Any, ...]:
    only(out, None, "out")
    return input, dim, keepdim


for _function in (torch.amax, torch.amin):
    define(_function, _bind_extremum, methods=(_function.__name__,), increasing=True, require=reduces)


# --- sums and averages ------------------------------------------------------------------------------------------------


def _bind_avg_pool1d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> tuple[Any, ...]:
    return input, kernel_size, stride or kernel_size, padding, ceil_mode, count_include_pad


def _bind_avg_pool2d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> tuple[Any, ...]:
    return input, kernel_size, stride or kernel_size, padding, ceil_mode, count_include_pad, divisor_override


def _average(dims: int) -> Callable[..., None]:
    has_batch = batched(dims)

    def require(
        x: Any, kernel_size: Any, stride: Any, padding: Any, ceil_mode: Any, include_pad: Any, divisor: Any = None
    ) -> None:
        has_batch(x, kernel_size, stride, padding)
        require_that(
            divisor is None or (isinstance(divisor, int) and 0 < divisor <= 2**40),
            f"divisor_override={divisor!r} has no rule: it must be from 1 to 2^40",
        )

    return require


def _bind_adaptive(input: Any, output_size: Any) -> tuple[Any, ...]:
    return input, output_size


define(
    F.avg_pool1d,
    _bind_avg_pool1d,
    affine=Affine.FIRST,
    averaging=True,
    require=_average(3),
    modules={nn.AvgPool1d: lambda m: (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad)},
)
for _function, _module, _dims in ((F.avg_pool2d, nn.AvgPool2d, 4), (F.avg_pool3d, nn.AvgPool3d, 5)):
    define(
        _function,
        _bind_avg_pool2d,
        affine=Affine.FIRST,
        averaging=True,
        require=_average(_dims),
        modules={
            _module: lambda m: (
                m.kernel_size,
                m.stride,
                m.padding,
                m.ceil_mode,
                m.count_include_pad,
                m.divisor_override,
            )
        },
    )
define(
    F.adaptive_avg_pool1d,
    _bind_adaptive,
    functions=(torch.adaptive_avg_pool1d,),
    affine=Affine.FIRST,
    averaging=True,
    require=batched(3),
    modules={nn.AdaptiveAvgPool1d: lambda m: (m.output_size,)},
)
for _function, _module, _dims in (
    (F.adaptive_avg_pool2d, nn.AdaptiveAvgPool2d, 4),
    (F.adaptive_avg_pool3d, nn.AdaptiveAvgPool3d, 5),
):
    define(
        _function,
        _bind_adaptive,
        affine=Affine.FIRST,
        averaging=True,
        require=batched(_dims),
        modules={_module: lambda m: (m.output_size,)},
    )


def _bind_reduction(
    input: Any, dim: Any = None, keepdim: bool = False, *, dtype: None = None, out: None = None
) -> tuple[Any, ...]:
    only(dtype, None, "dtype")
    only(out, None, "out")
    return input, dim, keepdim


for _function, _torch in ((Tensor.mean, torch.mean), (Tensor.sum, torch.sum)):
    define(
        _function,
        _bind_reduction,
        functions=(_torch,),
        methods=(_torch.__name__,),
        affine=Affine.FIRST,
        averaging=True,
        require=reduces,
    )


# --- resizing: every new pixel is an average of old ones --------------------------------------------------------------

RESIZING = {"nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area"}
COPYING = {"nearest", "nearest-exact"}  # the average of one
WHOLE = 2.0**-40  # relative: a number of pixels that is whole but for the rounding of a factor


def _bind_interpolate(
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> tuple[Any, ...]:
    only(antialias, False, "antialias")
    return input, size, scale_factor, mode, align_corners, recompute_scale_factor


def _interpolates(
    x: Any, size: Any, scale_factor: Any, mode: Any, align_corners: Any = None, recompute_scale_factor: Any = None
) -> None:
    batched(3, 4, 5)(x, size, scale_factor)
    require_that(mode in RESIZING, f"mode={mode!r} has no rule, {', '.join(sorted(RESIZING))} have")
    if mode in COPYING and scale_factor is not None and not recompute_scale_factor:
        factors = scale_factor if isinstance(scale_factor, tuple | list) else [scale_factor] * (x.dims - 2)
        for before, factor in zip(x[2:], factors, strict=True):
            after = before * factor
            require_that(
                abs(after - round(after)) <= WHOLE * after,
                f"mode={mode!r} with scale_factor={factor} makes {after:g} pixels of {before}, and which are copied "
                "depends on how they are stored: set recompute_scale_factor=True, or give the size",
            )


def resize(
    x: Tensor,
    size: Any,
    scale_factor: Any,
    mode: str,
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
) -> Tensor:
    """F.interpolate. Where it copies, of every value the same pixels, in whatever order that is stored.

    Which is the nearest depends on that in some of PyTorch's kernels, and on the type in all of them; and the
    derivative may take others than the function does.
    """
    settings = size, scale_factor, mode, align_corners, recompute_scale_factor
    if mode not in COPYING:
        return F.interpolate(x, *settings)
    dtype = torch.promote_types(x.dtype, torch.float32)
    numbers = torch.arange(x.shape[2:].numel(), dtype=dtype, device=x.device).view(1, 1, *x.shape[2:])
    places = F.interpolate(numbers, *settings).long()
    return x.flatten(2).index_select(2, places.flatten()).unflatten(2, places.shape[2:])


define(
    resize,
    _bind_interpolate,
    functions=(
        F.interpolate,
        (
            F.upsample,
            lambda input, size=None, scale_factor=None, mode="nearest", align_corners=None: _bind_interpolate(
                input, size, scale_factor, mode, align_corners
            ),
        ),
    ),
    affine=Affine.FIRST,
    averaging=True,
    require=_interpolates,
    modules={nn.Upsample: lambda m: (m.size, m.scale_factor, m.mode, m.align_corners, m.recompute_scale_factor)},
)
