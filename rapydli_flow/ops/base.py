"""Op: what an operator means. How it runs fast lives in the kernel packages.

An op is a frozen dataclass of attributes, with a table of rules: `infer`, `reference`, `index`,
`local`, `vjp`, `samples`, `rejects`. Called on symbols it adds a node to their graph; called on arrays
it computes with NumPy. That is all that the one test suite, the gradients, the splits and the
serialiser need to know of it.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, dataclass_transform

import numpy as np

from ..errors import GraphError, NotDifferentiable, ShapeError
from ..index import Index, parse
from ..spec import HALVES, Array, Block, Spec

registry: dict[str, type[Op]] = {}
LETTERS = "abcdefgh"


class Symbol(ABC):
    """A value of a graph that is being built: it has a spec, and ops can be applied to it."""

    @property
    @abstractmethod
    def spec(self) -> Spec: ...

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def dtype(self) -> str:
        return self.spec.dtype

    @abstractmethod
    def apply(self, op: Op, inputs: Sequence[Any]) -> Any:
        """Add a node to the graph of this symbol; its output, or a tuple of outputs."""


@dataclass(frozen=True)
class Sample:
    """An op on small operands, for the suite. ``ranges`` bounds the values drawn for some operands."""

    op: Op
    ins: tuple[Spec, ...]
    ranges: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    def draw(self, rng: np.random.Generator, dtype: str | None = None) -> list[Array]:
        """Random operands; ``dtype`` replaces the floating ones."""
        out: list[Array] = []
        for i, spec in enumerate(self.ins):
            if spec.floating:
                lo, hi = self.ranges.get(i, (-2.0, 2.0))
                out.append(rng.uniform(lo, hi, spec.shape).astype(dtype or spec.dtype))
            else:
                lo, hi = self.ranges.get(i, (0, 8))
                out.append(np.asarray(rng.integers(int(lo), int(hi), spec.shape), spec.dtype))
        return out


@dataclass(frozen=True)
class Reject:
    """Operands that an op must refuse, and what its message must match."""

    op: Op
    ins: tuple[Spec, ...]
    message: str


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Op(ABC):
    """One operator. Subclasses become frozen, keyword-only dataclasses and enter the registry."""

    name: ClassVar[str]
    family: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]] = ("y",)
    no_gradient: ClassVar[tuple[str, ...]] = ()  # outputs whose cotangent vjp leaves out
    indexed: ClassVar[bool] = False  # reference(..., at=Block): reads where its output lies in the whole array
    collective: ClassVar[bool] = False  # what it gives depends on other ranks
    behind: ClassVar[bool] = False  # a collective that kernels need not stop for
    view: ClassVar[bool] = False  # the output is the input's memory, under another shape
    takes_tail: ClassVar[bool] = True  # pointwise ops behind it may be fused into its kernels
    by_name: ClassVar[bool] = False  # pickled as a name in its module, of a script too; it has `by_value` as well
    usual: ClassVar[tuple[str, ...]] = ()  # attributes that are told only where they are not False
    linear: ClassVar[bool] = False  # f(a + b) = f(a) + f(b): passes partial sums through

    def __init_subclass__(cls, abstract: bool = False) -> None:
        dataclass(frozen=True, kw_only=True)(cls)
        cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
        if abstract:
            return  # and leave family open: each op below has its own, unless the base names one
        if not hasattr(cls, "family"):
            cls.family = cls.name
        known = registry.setdefault(cls.name, cls)
        if known is not cls and _home(known) != _home(cls):  # else a cell or module that is run again
            raise GraphError(
                f"two ops are named {cls.name!r}: {known.__module__}.{known.__qualname__} and "
                f"{cls.__module__}.{cls.__qualname__}. Rename one class."
            )
        registry[cls.name] = cls

    @abstractmethod
    def infer(self, *inputs: Any) -> Any:
        """Output spec, or a tuple of them; ShapeError or DTypeError for operands that do not fit."""

    @abstractmethod
    def reference(self, *inputs: Any, **at: Any) -> Any:
        """Slow, obvious NumPy: what every kernel is tested against."""

    def index(self, *inputs: Any) -> str:
        """The index formula for operands of these specs; see `rapydli_flow.index`.

        Unless an op tells its own, it may read all of its operands for each output element: '. ., . -> . .'.
        That is always right, and such an op is never divided over ranks.
        """
        sides = (inputs, self.out_specs(*inputs))
        return " -> ".join(", ".join(" ".join("." * len(s.shape)) or "()" for s in side) for side in sides)

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        """This op on blocks of its operands (shifted padding, local sizes)."""
        return self

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        """Cotangents of the inputs (None where there is none), built of ops. Several outputs: tuples."""
        raise NotDifferentiable(f"{self.name} has no gradient: it defines no vjp.")

    def once_a_channel(self, *inputs: Any) -> tuple[Op, tuple[Any, ...]] | None:
        """The same by a cheaper op, and its inputs, some of them made of operands that have a value for each channel
        only; None where there is nothing that need not be computed for every element."""
        return None

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        """Small operands that the suite tries."""
        return ()

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        """Operands that `infer` must refuse."""
        return ()

    def flops(self, *inputs: Spec) -> int:
        """Floating-point operations, as the index formula says: a multiply-add counts 2, a plain element 1.

        Of an op without a formula only the elements that it reads and writes are known.
        """
        outs = self.out_specs(*inputs)
        if type(self).index is Op.index:
            return sum(spec.size for spec in (*inputs, *outs))
        index = self.indexing(*inputs)
        points = index.multiply_adds(inputs, outs)
        return points * (2 if points > max((s.size for s in outs), default=0) else 1)

    def out_specs(self, *inputs: Spec) -> tuple[Spec, ...]:
        """`infer` with one return type."""
        out = self.infer(*inputs)
        return out if isinstance(out, tuple) else (out,)

    def indexing(self, *inputs: Spec) -> Index:
        return parse(self.index(*inputs))

    def run(self, *inputs: Array, at: Block | None = None) -> tuple[Array, ...]:
        """`reference` with one return type; ``at`` is where the output lies, by default the whole array.

        Halves are computed with as float32, and rounded once.
        """
        if any(getattr(x, "dtype", None) in _HALVES for x in inputs):
            outs = self.out_specs(*map(spec_of, inputs))
            wide = self.run(*(np.asarray(x, np.float32) if spec_of(x).dtype in HALVES else x for x in inputs), at=at)
            with np.errstate(over="ignore"):  # what float16 cannot hold is infinite
                return tuple(np.asarray(y, spec.dtype) for y, spec in zip(wide, outs, strict=True))
        if self.indexed:
            at = at or Block.all(self.out_specs(*map(spec_of, inputs))[0].shape)
            out = self.reference(*inputs, at=at)
        else:
            out = self.reference(*inputs)
        return out if isinstance(out, tuple) else (out,)

    @property
    def title(self) -> str:
        """What the op is called in tables and pictures."""
        return self.name

    def __call__(self, *inputs: Any) -> Any:
        for x in inputs:
            if isinstance(x, Symbol):
                return x.apply(self, inputs)
        out = self.run(*inputs)
        return out if len(out) > 1 else out[0]

    def __str__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in fields(self)]  # type: ignore[arg-type]
        told = (f"{k}={v}" for k, v in given if v is not False or k not in self.usual)
        return f"{self.name}({', '.join(told)})"


_HALVES = tuple(map(np.dtype, HALVES))


def _home(op: type[Op]) -> tuple[str, str]:
    """Where a class is defined; a script is '__mp_main__' to the processes that it starts."""
    return op.__module__.replace("__mp_main__", "__main__"), op.__qualname__


def spec_of(x: Any) -> Spec:
    """Spec of a symbol or of anything that NumPy takes for an array."""
    if isinstance(x, Symbol):
        return x.spec
    return Spec(np.shape(x), np.asarray(x).dtype.name)


def summed(dtype: str, wide: bool) -> str:
    """The dtype of a sum of products or of elements of this dtype: of halves float32, if it is to be ``wide``."""
    return "float32" if wide and dtype in HALVES else dtype


def as_dtype(x: Any, dtype: str) -> Any:
    """``x``, cast where it has another dtype."""
    cast: Any = registry["cast"]
    return x if spec_of(x).dtype == dtype else cast(to=dtype)(x)


def operand_names(op: Op) -> tuple[str, ...]:
    """Names of the op's operands, as its `infer` calls them."""
    return tuple(inspect.signature(op.infer).parameters)


def refuse(op: Op, rule: str, operands: Mapping[str, Spec], way_out: str) -> ShapeError:
    """A ShapeError that names op, rule, operands and the way out."""
    given = ", ".join(f"{name} {spec}" for name, spec in operands.items())
    return ShapeError(f"{op.name}: {rule} ({given}). {way_out}")
