"""Normalisation layers: over the batch, within a sample, and within a neighbourhood. x is ``N, *space, C``."""

from __future__ import annotations

from math import prod
from typing import Any

from ..errors import GraphError, SettingError
from ..graph import Tensor
from ..ops import (
    Conv,
    Fill,
    Gaussian,
    GroupRecords,
    JoinRecords,
    LocalResponse,
    Maximum,
    Moments,
    Multiply,
    Normalize,
    Phase,
    Sqrt,
    Standardize,
    Statistics,
    Sum,
)
from .layer import Sizes, constant, layer, sizes


@layer("batch_norm")
def batch_norm(x: Tensor, *, momentum: float = 0.9, eps: float = 1e-5, group: int | None = None) -> Any:
    """Normalise each channel over the whole batch, then scale and shift (Ioffe, Szegedy 2015).

    Running statistics, ``momentum * old + (1 - momentum) * batch``, are used when predicting. ``group``: normalise over
    groups of so many neighbouring records instead, so that the micro-batches of a pipeline do not wait for each other
    ("ghost batch norm", Hoffer, Hubara, Soudry 2017); running statistics are those of the whole batch all the same.
    """
    graph, c, dtype = x.graph, x.shape[-1:], x.dtype
    gain, bias = (constant(graph, "param", n, c, v, dtype) for n, v in (("gain", 1.0), ("bias", 0.0)))
    mean0, var0 = (constant(graph, "state", n, c, v, dtype) for n, v in (("mean", 0.0), ("var", 1.0)))
    count = prod(x.shape[:-1])  # of the whole batch: shapes are global while a network is built
    mean, var, mean1, var1 = Statistics(count=count, momentum=momentum)(*Moments()(x, mean0), mean0, var0)
    graph.updates |= {mean0.name: mean1.id, var0.name: var1.id}
    if group is None:
        return Normalize(eps=eps)(x, Phase()(mean, mean0), Phase()(var, var0), gain, bias)
    apart = Standardize(axes=len(x.shape), groups=x.shape[-1], eps=eps)(GroupRecords(size=group)(x))
    return Phase()(JoinRecords()(apart) * gain + bias, Normalize(eps=eps)(x, mean0, var0, gain, bias))


@layer("layer_norm")
def layer_norm(x: Tensor, *, axes: int = 1, eps: float = 1e-5, affine: bool = True) -> Any:
    """Normalise each record over the last ``axes`` axes, then scale and shift (Ba, Kiros, Hinton 2016).

    y = (x - mean) / sqrt(var + eps) * gain + bias; var is divided by the number of elements. ``gain`` and ``bias``
    have the shape of the last ``axes`` axes, and are left out where not ``affine``.
    """
    y = Standardize(axes=axes, eps=eps)(x)
    return _scaled(y, x.shape[-axes:], bias=True) if affine else y


@layer("group_norm")
def group_norm(x: Tensor, groups: int, *, eps: float = 1e-5, affine: bool = True) -> Any:
    """Normalise each sample over space and the channels of a group, then scale and shift channels (Wu, He 2018).

    Channels, the last axis, are divided into ``groups`` of neighbours. ``gain`` and ``bias`` have one value a channel.
    """
    y = Standardize(axes=len(x.shape) - 1, groups=groups, eps=eps)(x)
    return _scaled(y, x.shape[-1:], bias=True) if affine else y


@layer("instance_norm")
def instance_norm(x: Tensor, *, eps: float = 1e-5, affine: bool = True) -> Any:
    """Normalise each channel of each sample over space, then scale and shift (Ulyanov, Vedaldi, Lempitsky 2016)."""
    if len(x.shape) < 3:
        raise GraphError(f"instance_norm: x has no spatial axes ({x.spec}). x is N,*space,C; see layer_norm.")
    y = Standardize(axes=len(x.shape) - 1, groups=x.shape[-1], eps=eps)(x)
    return _scaled(y, x.shape[-1:], bias=True) if affine else y


@layer("rms_norm")
def rms_norm(x: Tensor, *, axes: int = 1, eps: float = 1e-5, affine: bool = True) -> Any:
    """y = x / sqrt(mean(x^2) + eps) * gain over the last ``axes`` axes (Zhang, Sennrich 2019)."""
    y = Standardize(axes=axes, eps=eps, centered=False)(x)
    return _scaled(y, x.shape[-axes:], bias=False) if affine else y


def local_response_norm(x: Tensor, size: int = 5, *, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Any:
    """y = x / (k + alpha / size * sum of x^2 over ``size`` neighbouring channels)^beta (Krizhevsky et al. 2012).

    alpha is divided by the size, as in Caffe and PyTorch (the paper's alpha is not, and its k is 2). An even
    window reaches one channel further down than up, as in PyTorch.
    """
    return LocalResponse(size=size, alpha=alpha, beta=beta, k=k)(x)


@layer("local_contrast_norm")
def local_contrast_norm(x: Tensor, window: Sizes = 9, *, sigma: float | None = None, eps: float = 1e-4) -> Any:
    """Subtract the local mean, then divide by the local deviation (Jarrett, Kavukcuoglu, Ranzato, LeCun 2009).

    v = x - sum(w x);  d = sqrt(sum(w v^2) + eps^2);  y = v / max(d, mean of d over the sample)

    Sums run over a window of odd extents and over all channels, with Gaussian weights w that fall off with
    ``sigma`` (elements; a quarter of each extent unless given), the same for all channels. At the borders, weights
    inside the sample sum to 1. ``eps`` is the deviation below which a sample counts as flat; it keeps the gradient
    of a constant sample finite.
    """
    space = len(x.shape) - 2
    if space not in (1, 2, 3):
        raise GraphError(f"local_contrast_norm: x has {space} spatial axes ({x.spec}), not 1 to 3. x is N,*space,C.")
    extents = sizes("local_contrast_norm", "window", window, space)
    if not eps > 0 or not (sigma is None or sigma > 0) or any(extent % 2 == 0 for extent in extents):
        raise SettingError(
            f"local_contrast_norm: window={window}, sigma={sigma}, eps={eps}: extents are odd, sigma and eps positive."
        )

    windows = []
    for axis, extent in enumerate(extents):  # a Gaussian window is a product of lines
        line = tuple(extent if i == axis else 1 for i in range(space))
        center = tuple((size - 1) / 2 for size in line)
        w = Gaussian(sigma=sigma or extent / 4, center=center, shape=(*line, 1, 1), dtype=x.dtype)
        padding = tuple(((size - 1) // 2,) * 2 for size in line)
        windows.append((Conv(stride=(1,) * space, padding=padding, dilation=(1,) * space), x.graph.add(w)))

    def blurred(y: Tensor) -> Any:
        for op, w in windows:
            y = op(y, w)
        return y

    channels, over = Sum(axes=(space + 1,), keep=True), tuple(range(1, space + 1))
    weight = Fill(value=float(x.shape[-1]), shape=(1, *x.shape[1:-1], 1), dtype=x.dtype)
    inside = blurred(x.graph.add(weight))
    v = x - blurred(channels(x)) / inside
    deviation = Sqrt()(blurred(channels(Multiply()(v, v))) / inside + eps**2)
    typical = Sum(axes=over, keep=True)(deviation) * (1.0 / prod(x.shape[1:-1]))
    return v / Maximum()(deviation, typical)


def _scaled(y: Tensor, shape: tuple[int, ...], *, bias: bool) -> Any:
    y = y * constant(y.graph, "param", "gain", shape, 1.0, y.dtype)
    return y + constant(y.graph, "param", "bias", shape, 0.0, y.dtype) if bias else y
