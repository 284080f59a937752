"""Layers with weights, and dropout. Data is ``N, *space, C``; sizes are a number or one for each axis."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from ..arguments import is_whole
from ..errors import GraphError, SettingError
from ..graph import Tensor
from ..ops import Conv, ConvInputGrad, Dropout, LocalConv, Matmul, Phase
from ..random import stream_of
from .initial import Initial
from .layer import Padding, Sizes, constant, layer, pairs, sizes, weights
from .shape import flatten


@layer("conv")
def conv(
    x: Tensor,
    filters: int,
    window: Sizes,
    *,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    bias: bool = True,
    init: Initial | None = None,
    exact: bool = False,
) -> Any:
    """Convolution over the 1 to 3 spatial axes of x. Padding is a number or a (low, high) pair for each axis.

    Filters start as ``init`` says, by default `he`; the bias starts at 0. ``exact``: no faster algorithm with larger
    rounding errors, such as Winograd's, here or in the gradients; `rapydli_flow.exact` says so of a whole graph.
    """
    space = _space("conv", x)
    extents = sizes("conv", "window", window, space)
    channels = x.shape[-1] // max(1, groups)
    shape = (*extents, channels, filters)
    fans = (prod(extents) * channels, prod(extents) * filters // max(1, groups))
    w = weights(x.graph, "w", shape, x.dtype, fans=fans, init=init)
    op = Conv(
        stride=sizes("conv", "stride", stride, space),
        padding=pairs("conv", padding, space),
        dilation=sizes("conv", "dilation", dilation, space),
        groups=groups,
        exact=exact,
    )
    y = op(x, w)
    return y + constant(x.graph, "param", "b", (filters,), 0.0, x.dtype) if bias else y


@layer("conv_transpose")
def conv_transpose(
    x: Tensor,
    filters: int,
    window: Sizes,
    *,
    stride: Sizes = 1,
    padding: Padding = 0,
    output_padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    bias: bool = True,
    init: Initial | None = None,
) -> Any:
    """Transposed convolution over the 1 to 3 spatial axes of x: the input gradient of a convolution.

    Each position of ``x: N,*space,C`` adds to a window of the output, and windows lie ``stride`` apart. An axis has
    ``(size - 1) * stride - low - high + dilation * (window - 1) + output_padding + 1`` positions then: ``padding``,
    a number or a (low, high) pair for each axis, is cut off, and ``output_padding``, below stride or dilation, is
    put on at the high end (a convolution gives one size for several, and this says which it came from).
    The parameter w has the layout of the convolution whose gradient this is: ``*window, filters / groups, C``.
    Source of the method: Zeiler et al., "Deconvolutional networks" (2010).
    """
    space, channels = _space("conv_transpose", x), x.shape[-1]
    extents = sizes("conv_transpose", "window", window, space)
    steps = sizes("conv_transpose", "stride", stride, space)
    spread = sizes("conv_transpose", "dilation", dilation, space)
    if groups < 1 or channels % groups or filters % groups:
        rule = f"{channels} channels and {filters} filters are not divisible by {groups} groups"
        raise SettingError(f"conv_transpose: {rule} (x {x.spec}). Change filters or groups.")
    more = _output_padding(output_padding, steps, spread)
    # the convolution from this output to x, exactly: with a high padding that is smaller by output_padding
    cut = tuple((low, high - m) for (low, high), m in zip(pairs("conv_transpose", padding, space), more, strict=True))
    reach = (st * (n - 1) + d * (k - 1) + 1 for n, k, st, d in zip(x.shape[1:], extents, steps, spread, strict=False))
    size = tuple(whole - sum(pair) for whole, pair in zip(reach, cut, strict=True))
    if min(size) < 1:
        raise SettingError(f"conv_transpose: padding={padding} leaves nothing of x {x.spec}: the output is {size}.")
    shape = (*extents, filters // groups, channels)
    fans = (max(1, prod(extents) * channels // groups // prod(steps)), prod(extents) * filters // groups)
    w = weights(x.graph, "w", shape, x.dtype, fans=fans, init=init)
    y = ConvInputGrad(size=size, stride=steps, padding=cut, dilation=spread, groups=groups)(x, w)
    return y + constant(x.graph, "param", "b", (filters,), 0.0, x.dtype) if bias else y


@layer("local_conv")
def local_conv(
    x: Tensor,
    filters: int,
    window: Sizes,
    *,
    stride: Sizes = 1,
    padding: Padding = 0,
    bias: bool = True,
    init: Initial | None = None,
) -> Any:
    """Locally connected (untied) convolution over the 1 to 3 spatial axes of x: filters differ from place to place.

    Windows, and the output ``N, *out, filters``, are those of `conv`. The parameter w is ``*out, *window, C, filters``
    and b, one number for each place and filter, ``*out, filters``; so the input's size is fixed by the parameters.
    """
    space, channels = _space("local_conv", x), x.shape[-1]
    extents = sizes("local_conv", "window", window, space)
    op = LocalConv(stride=sizes("local_conv", "stride", stride, space), padding=pairs("local_conv", padding, space))
    out = op.positions(x.spec, extents)
    fans = (prod(extents) * channels, prod(extents) * filters)
    w = weights(x.graph, "w", (*out, *extents, channels, filters), x.dtype, fans=fans, init=init)
    y = op(x, w)
    return y + constant(x.graph, "param", "b", (*out, filters), 0.0, x.dtype) if bias else y


@layer("dense")
def dense(x: Tensor, units: int, *, bias: bool = True, init: Initial | None = None) -> Any:
    """y = x w + b on records of one axis (others are flattened). w starts as ``init`` says, by default `he`; b at 0."""
    if len(x.shape) > 2:
        x = flatten(x)
    if len(x.shape) != 2:
        raise GraphError(f"dense: x is {x.spec}, not N,features.")
    w = weights(x.graph, "w", (x.shape[1], units), x.dtype, fans=(x.shape[1], units), init=init)
    y = Matmul()(x, w)
    return y + constant(x.graph, "param", "b", (units,), 0.0, x.dtype) if bias else y


@layer("dropout")
def dropout(x: Tensor, rate: float) -> Any:
    """Drop a share ``rate`` of the elements while training, and scale the others up."""
    graph = x.graph
    op = Dropout(rate=rate, stream=stream_of("/".join(graph.scope)))
    return Phase()(op(x, graph.find("seed"), graph.find("step")), x)


def _space(name: str, x: Tensor) -> int:
    """The number of spatial axes of x."""
    space = len(x.shape) - 2
    if space not in (1, 2, 3):
        raise GraphError(f"{name}: x has {space} spatial axes ({x.spec}), not 1 to 3. x is N,*space,C.")
    return space


def _output_padding(value: Sizes, stride: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    most = [max(each) for each in zip(stride, dilation, strict=True)]
    out = tuple(value) if isinstance(value, Sequence) else (value,) * len(most)
    if len(out) != len(most) or any(not is_whole(v) or not 0 <= v < m for v, m in zip(out, most, strict=True)):
        raise SettingError(
            f"conv_transpose: output_padding={value} is not 0 or more and below stride {tuple(stride)} or dilation "
            f"{tuple(dilation)}, or such a number for each axis."
        )
    return out
