"""Spec: shape and dtype of an array. Block: the part [lo, hi) of a global array."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import fsum, prod
from typing import Any

import ml_dtypes
import numpy as np

from .errors import DTypeError, ShapeError

Array = np.ndarray[Any, Any]

HALVES = ("bfloat16", "float16")  # stored so; kernels and references compute with float32
DTYPES = ("float32", "float64", *HALVES, "int64", "int32", "uint8")
PLAIN_DTYPES = tuple(name for name in DTYPES if name not in HALVES)  # of records, and of a user's own kernels
_FLOATING = ("float32", "float64", *HALVES)
_SHORT = {"float32": "f32", "float64": "f64", "int64": "i64", "int32": "i32", "uint8": "u8"}
_SHORT |= {"bfloat16": "bf16", "float16": "f16"}
assert np.dtype("bfloat16") == ml_dtypes.bfloat16  # NumPy knows the name since that import


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of an array: ``Spec((32, 28, 28, 1))`` is float32, channels last."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        shape = tuple(int(size) for size in self.shape)
        if any(size < 0 for size in shape):
            raise ShapeError(f"Spec: shape {shape} has a negative size. Sizes are 0 or more.")
        dtype = np.dtype(self.dtype).name
        if dtype not in DTYPES:
            raise DTypeError(f"Spec: dtype {dtype} is not one of {', '.join(DTYPES)}.")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "dtype", dtype)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize

    @property
    def floating(self) -> bool:
        return self.dtype in _FLOATING

    def __str__(self) -> str:
        return f"{_SHORT[self.dtype]}[{','.join(map(str, self.shape))}]"


def floating(array: Array) -> bool:
    """Does an array hold floating numbers? NumPy's own ``kind`` does not count bfloat16 among them."""
    return array.dtype.name in _FLOATING


@dataclass(frozen=True)
class Block:
    """The part ``[lo, hi)`` of a global array of shape ``whole``."""

    lo: tuple[int, ...]
    hi: tuple[int, ...]
    whole: tuple[int, ...]

    @classmethod
    def all(cls, shape: Iterable[int]) -> Block:
        """The block that is the whole array."""
        shape = tuple(shape)
        return cls((0,) * len(shape), shape, shape)

    @classmethod
    def along(cls, shape: Sequence[int], axis: int, bounds: Sequence[int]) -> tuple[Block, ...]:
        """One block for each interval between neighbouring ``bounds`` of ``axis``, the other axes whole."""
        whole = tuple(shape)

        def at(values: tuple[int, ...], value: int) -> tuple[int, ...]:
            return (*values[:axis], value, *values[axis + 1 :])

        zero = (0,) * len(whole)
        return tuple(cls(at(zero, lo), at(whole, hi), whole) for lo, hi in pairwise(bounds))

    @classmethod
    def grid(cls, shape: Sequence[int], bounds: Mapping[int, Sequence[int]]) -> tuple[Block, ...]:
        """A block for each combination of intervals of the axes that have ``bounds``, the last axis fastest."""
        cuts = [tuple(pairwise(bounds.get(axis, (0, size)))) for axis, size in enumerate(shape)]
        return tuple(cls(tuple(a for a, _ in s), tuple(b for _, b in s), tuple(shape)) for s in product(*cuts))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(hi - lo for lo, hi in zip(self.lo, self.hi, strict=True))

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The block as slices of the global array."""
        return tuple(slice(lo, hi) for lo, hi in zip(self.lo, self.hi, strict=True))

    @property
    def empty(self) -> bool:
        return any(size == 0 for size in self.shape)

    def meet(self, other: Block) -> Block | None:
        """What lies in both blocks; None where that is nothing."""
        lo, hi = tuple(map(max, self.lo, other.lo)), tuple(map(min, self.hi, other.hi))
        return Block(lo, hi, self.whole) if all(a < b for a, b in zip(lo, hi, strict=True)) else None

    def within(self, other: Block) -> bool:
        """Does the other block hold all of this one?"""
        return self.meet(other) == self

    def without(self, other: Block) -> list[Block]:
        """Blocks that together are this one without what the other holds."""
        both = self.meet(other)
        if both is None:
            return [self]
        rest: list[Block] = []
        lo, hi = list(self.lo), list(self.hi)
        for axis in range(len(lo)):
            for a, b in ((lo[axis], both.lo[axis]), (both.hi[axis], hi[axis])):
                if a < b:
                    rest.append(Block((*lo[:axis], a, *lo[axis + 1 :]), (*hi[:axis], b, *hi[axis + 1 :]), self.whole))
            lo[axis], hi[axis] = both.lo[axis], both.hi[axis]
        return rest

    def cut(self, most: int) -> Iterator[Block]:
        """Blocks of no more than ``most`` elements that together are this one, in the order of its elements."""
        if self.size <= most:
            yield self
            return
        axis = next(i for i, size in enumerate(self.shape) if size > 1)
        lo, hi = self.lo, self.hi
        step = max(1, most * self.shape[axis] // self.size)
        for a in range(lo[axis], hi[axis], step):
            b = min(a + step, hi[axis])
            part = Block((*lo[:axis], a, *lo[axis + 1 :]), (*hi[:axis], b, *hi[axis + 1 :]), self.whole)
            yield from part.cut(most)

    def inside(self, outer: Block) -> tuple[slice, ...]:
        """This block as slices of an array that holds ``outer``."""
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.lo, self.hi, outer.lo, strict=True))

    def __str__(self) -> str:
        return "[" + ",".join(f"{lo}:{hi}" for lo, hi in zip(self.lo, self.hi, strict=True)) + "]"


def bounds_by(shares: Sequence[float], size: int) -> tuple[int, ...]:
    """Boundaries that cut ``size`` into intervals that are to each other as ``shares``, as near as can be."""
    total = fsum(shares)
    return (*(round(size * fsum(shares[:i]) / total) for i in range(len(shares))), size)


def even_bounds(size: int, parts: int) -> tuple[int, ...]:
    """Boundaries that cut ``size`` into ``parts`` intervals; the first ones are the larger."""
    return tuple(-(-size * part // parts) for part in range(parts + 1))
