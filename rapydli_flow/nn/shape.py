"""Functions that change the shape of a tensor, and reductions over its axes.

Axes are numbered from 0; negative ones count from the last. Axis 0 is the batch: reshaping leaves it alone, and what
moves, cuts or reduces it (transpose, slices, argmax over records) works but makes something that is no batch any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any

from ..errors import GraphError, SettingError, ShapeError
from ..graph import Tensor
from ..ops import ArgMax, ArgMin, Concatenate, Max, Min, Pad, Reshape, Slice, Sum, Transpose
from .layer import Padding, pairs

Axes = int | Sequence[int]


def axes_of(function: str, x: Tensor, axes: Axes) -> tuple[int, ...]:
    """Axes of x as numbers of 0 or more; ShapeError for what is no axis, or is named twice."""
    n = len(x.shape)
    given = (axes,) if isinstance(axes, int) else tuple(axes)
    out = tuple(a + n if -n <= a < 0 else a for a in given)
    if any(not 0 <= a < n for a in out) or len(set(out)) != len(out):
        raise ShapeError(
            f"{function}: {axes} is not an axis of x, or several different ones ({x.spec}). "
            f"Axes are 0 to {n - 1}, or -{n} to -1."
        )
    return out


# shapes ------------------------------------------------------------------------------------------------


def flatten(x: Tensor) -> Any:
    """``N, ...`` as ``N, features``."""
    return Reshape(shape=(prod(x.shape[1:]),))(x)


def reshape(x: Tensor, shape: Axes) -> Any:
    """The elements of each sample in another shape: ``N, ...`` as ``N, *shape``; one size may be -1, for the rest."""
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    known, count = prod(size for size in sizes if size != -1), prod(x.shape[1:])
    if sizes.count(-1) > 1 or any(size < -1 for size in sizes) or (-1 in sizes and (not known or count % known)):
        raise ShapeError(
            f"reshape: samples of {count} elements cannot become {sizes} ({x.spec}). "
            "One size may be -1; the batch axis is left out."
        )
    return Reshape(shape=tuple(count // known if size == -1 else size for size in sizes))(x)


def transpose(x: Tensor, order: Sequence[int]) -> Any:
    """The axes of x in another order: axis i of the result is axis ``order[i]``. Begin with 0, the batch."""
    return Transpose(order=axes_of("transpose", x, order))(x)


def concatenate(tensors: Sequence[Tensor], axis: int = -1) -> Any:
    """Tensors one behind the other along an axis; their other axes are equal."""
    parts = list(tensors) if isinstance(tensors, list | tuple) else []
    if not parts or not all(isinstance(x, Tensor) for x in parts):
        given = [type(x).__name__ for x in parts] if parts else tensors
        raise GraphError(f"concatenate: {given!r} is not a list of one or more tensors. Write [a, b].")
    return Concatenate(axis=axes_of("concatenate", parts[0], axis)[0])(*parts)


def slice_axis(x: Tensor, axis: int, start: int = 0, stop: int | None = None, *, step: int = 1) -> Any:
    """Elements ``start`` to before ``stop`` along one axis; negative ones count from the end, as in Python."""
    (at,), n = axes_of("slice_axis", x, axis), len(x.shape)
    if step < 1:
        raise SettingError(f"slice_axis: step={step} is not 1 or more. Elements are taken forwards.")
    first, last, _ = slice(start, stop, step).indices(x.shape[at])
    return Slice(
        starts=tuple(first if i == at else 0 for i in range(n)),
        stops=tuple(last if i == at and stop is not None else None for i in range(n)),
        steps=tuple(step if i == at else 1 for i in range(n)),
    )(x)


def split(x: Tensor, parts: Axes, axis: int = -1) -> list[Any]:
    """x cut along an axis: into a number of equal parts, or into parts of the sizes given."""
    (at,) = axes_of("split", x, axis)
    size = x.shape[at]
    sizes = (size // parts if parts else 0,) * parts if isinstance(parts, int) else tuple(parts)
    bounds = (0, *accumulate(sizes))
    if bounds[-1] != size or any(part < 1 for part in sizes):
        raise ShapeError(
            f"split: axis {at} of size {size} cannot be cut into {parts} ({x.spec}). "
            "Give a number that divides it, or sizes that add up to it."
        )
    return [slice_axis(x, at, lo, hi) for lo, hi in pairwise(bounds)]


def pad(x: Tensor, padding: Padding, value: float = 0.0, *, axes: Axes | None = None) -> Any:
    """x with elements of ``value`` around it.

    ``padding`` is a number, or a number or (low, high) pair for each of ``axes``, by default the spatial ones of
    ``N, *space, C``.
    """
    n = len(x.shape)
    over = tuple(range(1, n - 1)) if axes is None else axes_of("pad", x, axes)
    if not over:
        raise ShapeError(f"pad: x has no spatial axes ({x.spec}). Name the axes to pad.")
    by = dict(zip(over, pairs("pad", padding, len(over)), strict=True))
    low, high = (tuple(by.get(axis, (0, 0))[side] for axis in range(n)) for side in (0, 1))
    return Pad(low=low, high=high, value=float(value))(x)


# reductions --------------------------------------------------------------------------------------------


def sum(x: Tensor, axes: Axes, *, keep: bool = False) -> Any:
    """The sum over axes; ``keep`` leaves them in place with size 1."""
    return Sum(axes=axes_of("sum", x, axes), keep=keep)(x)


def mean(x: Tensor, axes: Axes, *, keep: bool = False) -> Any:
    """The mean over axes: a sum times a constant of the global shape."""
    over = axes_of("mean", x, axes)
    return Sum(axes=over, keep=keep)(x) * (1.0 / prod(x.shape[a] for a in over))


def variance(x: Tensor, axes: Axes, *, keep: bool = False) -> Any:
    """The mean of squared distances from the mean, over axes (the biased variance, as in NumPy)."""
    apart = x - mean(x, axes, keep=True)
    return mean(apart * apart, axes, keep=keep)


def max(x: Tensor, axes: Axes, *, keep: bool = False) -> Any:
    """The largest element over axes; its gradient is shared by all elements that are as large."""
    return Max(axes=axes_of("max", x, axes), keep=keep)(x)


def min(x: Tensor, axes: Axes, *, keep: bool = False) -> Any:
    """The smallest element over axes; its gradient is shared by all elements that are as small."""
    return Min(axes=axes_of("min", x, axes), keep=keep)(x)


def argmax(x: Tensor, axis: int = -1, *, keep: bool = False) -> Any:
    """Where along an axis the largest element is, int64; of equal ones the first. It has no gradient."""
    return ArgMax(axes=axes_of("argmax", x, axis), keep=keep)(x)


def argmin(x: Tensor, axis: int = -1, *, keep: bool = False) -> Any:
    """Where along an axis the smallest element is, int64; of equal ones the first. It has no gradient."""
    return ArgMin(axes=axes_of("argmin", x, axis), keep=keep)(x)
