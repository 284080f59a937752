"""Ops without inputs: leaves of a graph, constants, and the random numbers that parameters start from."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from typing import Any, ClassVar

import numpy as np

from .. import random
from ..config import settings
from ..errors import SettingError
from ..spec import Array, Block, Spec
from .base import LETTERS, Op, Reject, Sample, refuse

KINDS = ("param", "state", "batch", "clock")
PIECE = 1 << 17  # elements that are drawn at once: what they are computed from stays in a core's cache


def _source_index(shape: tuple[int, ...]) -> str:
    return "-> " + (" ".join(LETTERS[: len(shape)]) or "()")


class Leaf(Op):
    """An input of the graph. ``kind``: param (trained), state (carried), batch (fed), clock (seed, step).

    ``init`` is the source op that a param or a state starts from; it is evaluated for each block. A clock's
    is the value that it has unless it is set.
    """

    kind: str
    label: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    init: Op | None = None

    def infer(self) -> Spec:
        if self.kind not in KINDS:
            raise SettingError(f"leaf: kind {self.kind!r} is not one of {', '.join(KINDS)}.")
        return Spec(self.shape, self.dtype)

    def index(self) -> str:
        return _source_index(self.shape)

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        return replace(self, shape=outs[0].shape)

    def reference(self) -> Array:
        raise SettingError(f"leaf: {self.label} has no value of its own; feed it. Its init is {self.init}.")

    def start(self, seed: int, at: Block) -> Array:
        """The first value of a block of this leaf."""
        spec = Spec(at.shape, self.dtype)
        if self.init is None:
            return np.zeros(spec.shape, spec.dtype)
        if isinstance(self.init, Random) and self.init.by_element and at.shape:
            return _drawn(self.init, np.asarray(seed, np.int64), at, spec)
        if self.init.indexed:
            return np.asarray(self.init.run(np.asarray(seed, np.int64), at=at)[0], spec.dtype)
        return np.asarray(self.init.local((), (at,)).run()[0], spec.dtype)


class Fill(Op):
    """An array of one constant."""

    value: float
    shape: tuple[int, ...] = ()
    dtype: str = "float32"

    def infer(self) -> Spec:
        return Spec(self.shape, self.dtype)

    def index(self) -> str:
        return _source_index(self.shape)

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        return replace(self, shape=outs[0].shape)

    def reference(self) -> Array:
        return np.full(self.shape, self.value, self.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(value=1.5, shape=(3, 4)), ()), Sample(cls(value=-2.0, dtype="float64"), ()))


class Gaussian(Op):
    """exp(-distance^2 / (2 sigma^2)) from ``center`` along the first axes; the same along the others."""

    sigma: float
    center: tuple[float, ...]
    shape: tuple[int, ...]
    dtype: str = "float32"

    def infer(self) -> Spec:
        if not self.sigma > 0 or not 1 <= len(self.center) <= len(self.shape):
            raise SettingError(
                f"gaussian: sigma={self.sigma}, center={self.center} on {self.shape}: sigma is positive, and center "
                "has a number for each of the first axes, at least one."
            )
        return Spec(self.shape, self.dtype)

    def index(self) -> str:
        return _source_index(self.shape)

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        center = tuple(c - lo for c, lo in zip(self.center, outs[0].lo, strict=False))
        return replace(self, center=center, shape=outs[0].shape)

    def reference(self) -> Array:
        n = len(self.center)
        places = np.ogrid[tuple(slice(size) for size in self.shape[:n])]
        distance = sum((np.subtract(i, c) ** 2 for i, c in zip(places, self.center, strict=True)), np.zeros(()))
        y = np.exp(distance / (-2.0 * self.sigma**2))
        return np.array(np.broadcast_to(y.reshape(y.shape + (1,) * (len(self.shape) - n)), self.shape), self.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(sigma=1.3, center=(1.0, 2.5), shape=(3, 5, 4)), ()),)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (
            Reject(cls(sigma=0.0, center=(1.0,), shape=(3,)), (), "gaussian: sigma=0.0, .* sigma is positive"),
            Reject(cls(sigma=1.0, center=(), shape=(3,)), (), r"gaussian: sigma=1.0, center=\(\) on \(3,\)"),
        )


class Random(Op, abstract=True):
    """Random numbers that a parameter starts from, keyed by (seed, stream, element): any block can be made alone.

    Evaluated once, on the host, for the block that a rank holds.
    """

    stream: int
    shape: tuple[int, ...]
    dtype: str = "float32"
    indexed = True
    by_element: ClassVar[bool] = True  # each element is drawn alone, so a block may be made in pieces

    def infer(self, seed: Spec) -> Spec:
        return Spec(self.shape, self.dtype)

    def index(self, seed: Spec) -> str:
        return "() " + _source_index(self.shape)

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        return replace(self, shape=outs[0].shape)


def _drawn(init: Random, seed: Array, at: Block, spec: Spec) -> Array:
    """A block of random numbers, made in pieces along its first axis, by as many threads as kernels have."""
    out = np.empty(spec.shape, spec.dtype)
    size, first = at.shape[0], at.lo[0]
    step = max(1, PIECE // max(1, prod(at.shape[1:])))

    def draw(lo: int) -> None:
        hi = min(size, lo + step)
        piece = replace(at, lo=(first + lo, *at.lo[1:]), hi=(first + hi, *at.hi[1:]))
        out[lo:hi] = init.run(seed, at=piece)[0]

    with ThreadPoolExecutor(settings().threads) as pool:  # NumPy computes without the interpreter's lock
        list(pool.map(draw, range(0, size, step)))
    return out


class Normal(Random):
    """Normal random numbers of mean 0."""

    std: float

    def reference(self, seed: Array, *, at: Block) -> Array:
        return (self.std * random.normal(int(seed), self.stream, at)).astype(self.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(std=0.1, stream=7, shape=(3, 4)), (Spec((), "int64"),)),)


class TruncatedNormal(Random):
    """Normal random numbers of mean 0; those beyond ``bound`` times ``std`` are drawn again."""

    std: float
    bound: float = 2.0

    def reference(self, seed: Array, *, at: Block) -> Array:
        return (self.std * random.truncated_normal(int(seed), self.stream, at, self.bound)).astype(self.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(std=0.1, bound=1.0, stream=7, shape=(6, 4)), (Spec((), "int64"),)),)


class Uniform(Random):
    """Uniform random numbers in [-limit, limit)."""

    limit: float

    def reference(self, seed: Array, *, at: Block) -> Array:
        return (self.limit * (2.0 * random.uniform(int(seed), 0, self.stream, at) - 1.0)).astype(self.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(limit=0.3, stream=7, shape=(3, 4)), (Spec((), "int64"),)),)


class Orthogonal(Random):
    """``gain`` times a matrix of orthonormal columns, or rows where there are fewer (Saxe et al. 2013).

    The last axis are the columns, all others the rows. Every rank factors the whole matrix and takes its
    block: the one source that is not made block by block.
    """

    gain: float = 1.0
    by_element = False

    def infer(self, seed: Spec) -> Spec:
        if len(self.shape) < 2:
            way_out = "Use another initialiser for parameters of one axis."
            raise refuse(self, "a matrix has two or more axes", {"y": Spec(self.shape, self.dtype)}, way_out)
        return super().infer(seed)

    def reference(self, seed: Array, *, at: Block) -> Array:
        rows, columns = prod(at.whole[:-1]), at.whole[-1]
        drawn = random.normal(int(seed), self.stream, Block.all(at.whole)).reshape(rows, columns)
        q, r = np.linalg.qr(drawn if rows >= columns else drawn.T)
        q = q * np.where(np.diagonal(r) < 0, -1.0, 1.0)  # the one factorisation with a positive diagonal
        whole = (q if rows >= columns else q.T).reshape(at.whole)
        return (self.gain * whole[at.slices]).astype(self.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        seed = Spec((), "int64")
        return tuple(Sample(cls(stream=7, shape=shape), (seed,)) for shape in ((5, 3), (2, 2, 6)))

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        message = r"orthogonal: a matrix has two or more axes \(y f32\[4\]\)"
        return (Reject(cls(stream=7, shape=(4,)), (Spec((), "int64"),), message),)


class Phase(Op):
    """The first input while training, the second while predicting; resolved by the passes of those names."""

    linear = True

    def infer(self, training: Spec, predicting: Spec) -> Spec:
        return training

    def index(self, training: Spec, predicting: Spec) -> str:
        letters = " ".join(LETTERS[: len(training.shape)])
        return f"{letters}, {letters} -> {letters}"

    def reference(self, training: Array, predicting: Array) -> Any:
        return training
