"""Index formulas: one string that says which input elements an output element reads.

    conv, stride 2, padding 1:  "n h*2+r-1 w*2+s-1 c, r s c k -> n h w k"
    its input gradient:         "n (h-r+1)/2 (w-s+1)/2 k, r s c k -> n h w c"
    max pooling:                "n h*2+r w*2+s c -> n h w c | r=3 s=3"
    cross entropy:              "n ., n -> n"

An operand is a list of axes, or ``()`` for a scalar; an axis is an affine expression of letters, maybe divided by a
constant (only exact quotients count), or ``.``: an axis that is read whole and never split. Letters
take their sizes from operands where they stand alone, or from the list after ``|``. Positions
outside an operand (padding) are not read.

From a formula follow, by interval arithmetic: the block of each operand that a part of a letter
needs (halo included), partial sums (the letter is missing in an output), what may run in place, and
the number of multiply-adds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod

from .errors import FormulaError
from .spec import Block, Spec

_TERM = re.compile(r"([+-]?)(?:([a-z])(?:\*(\d+))?|(\d+))")


@dataclass(frozen=True)
class Axis:
    """``(sum of letter * coefficient + constant) / divisor``."""

    terms: tuple[tuple[str, int], ...]
    constant: int = 0
    divisor: int = 1

    @property
    def letter(self) -> str | None:
        """The letter, if the axis is nothing but that letter."""
        plain = len(self.terms) == 1 and self.terms[0][1] == 1 and (self.constant, self.divisor) == (0, 1)
        return self.terms[0][0] if plain else None

    @property
    def letters(self) -> tuple[str, ...]:
        return tuple(letter for letter, _ in self.terms)

    def span(self, ranges: Mapping[str, tuple[int, int]], extent: int) -> tuple[int, int]:
        """The interval of this axis that is touched when each letter runs over its range."""
        ends = [
            (c * lo, c * (hi - 1)) if c > 0 else (c * (hi - 1), c * lo)
            for (lo, hi), c in ((ranges[letter], c) for letter, c in self.terms)
        ]
        low = self.constant + sum(lo for lo, _ in ends)
        high = self.constant + sum(hi for _, hi in ends)
        lo, hi = max(0, -(-low // self.divisor)), min(extent, high // self.divisor + 1)
        return lo, max(lo, hi)


Operand = tuple[Axis | None, ...]


@dataclass(frozen=True)
class Index:
    """A parsed index formula."""

    formula: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    given: tuple[tuple[str, int], ...] = ()

    def sizes(self, ins: Sequence[Spec], outs: Sequence[Spec]) -> dict[str, int]:
        """The size of every letter; operands that contradict each other are an error."""
        sizes = dict(self.given)
        for operand, spec in zip((*self.inputs, *self.outputs), (*ins, *outs), strict=True):
            if len(operand) != len(spec.shape):
                raise FormulaError(
                    f"index formula {self.formula!r} gives an operand {len(operand)} axes "
                    f"but its spec is {spec}. Write one axis for each dimension."
                )
            for axis, size in zip(operand, spec.shape, strict=True):
                letter = axis.letter if axis else None
                if letter and sizes.setdefault(letter, size) != size:
                    raise FormulaError(
                        f"index formula {self.formula!r}: letter {letter} is {sizes[letter]} in one operand "
                        f"and {size} in another ({', '.join(map(str, (*ins, *outs)))})."
                    )
        for axis in (axis for operand in (*self.inputs, *self.outputs) for axis in operand if axis):
            for letter in axis.letters:
                if letter not in sizes:
                    raise FormulaError(
                        f"index formula {self.formula!r}: no operand tells the size of {letter}. "
                        f"Give it behind a bar: '{self.formula} | {letter}=3'."
                    )
        return sizes

    def splittable(self) -> tuple[str, ...]:
        """Letters along which work can be divided: those that stand alone on an axis of some operand.

        A letter that only appears inside compound axes (the channels of one group) does not divide an
        operand into blocks.
        """
        found = [axis.letter for operand in (*self.outputs, *self.inputs) for axis in operand if axis]
        return tuple(dict.fromkeys(letter for letter in found if letter))

    def blocks(
        self, ins: Sequence[Spec], outs: Sequence[Spec], cell: Mapping[str, tuple[int, int]]
    ) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
        """Blocks of inputs and outputs when the letters of ``cell`` run over their ranges only."""
        ranges = {name: (0, size) for name, size in self.sizes(ins, outs).items()} | dict(cell)

        def block(operand: Operand, spec: Spec) -> Block:
            spans = [
                axis.span(ranges, size) if axis and not cell.keys().isdisjoint(axis.letters) else (0, size)
                for axis, size in zip(operand, spec.shape, strict=True)
            ]
            return Block(tuple(a for a, _ in spans), tuple(b for _, b in spans), spec.shape)

        return (
            tuple(block(o, s) for o, s in zip(self.inputs, ins, strict=True)),
            tuple(block(o, s) for o, s in zip(self.outputs, outs, strict=True)),
        )

    def partial(self, letter: str) -> tuple[bool, ...]:
        """For each output: is it only a part of a sum when ``letter`` is split?"""
        return tuple(all(axis is None or letter not in axis.letters for axis in o) for o in self.outputs)

    def in_place(self, i: int, k: int = 0) -> bool:
        """Does each element of output ``k`` read input ``i`` only where it lies itself?"""
        out = [axis.letter if axis else None for axis in self.outputs[k]]
        same = [axis.letter if axis else None for axis in self.inputs[i]] == out
        return same and None not in out and len(set(out)) == len(out)

    def multiply_adds(self, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
        """Number of points of the iteration space; axes written ``.`` count once for each input."""
        whole = prod(
            size
            for operand, spec in zip(self.inputs, ins, strict=True)
            for axis, size in zip(operand, spec.shape, strict=True)
            if axis is None
        )
        return prod(self.sizes(ins, outs).values()) * whole

    def reads(
        self, ins: Sequence[Spec], outs: Sequence[Spec]
    ) -> Iterator[tuple[int, tuple[int | None, ...], int, tuple[int | None, ...]]]:
        """Every (input, element, output, element) pair of the formula; None on an axis written ``.``.

        A point at which one operand lies in the padding reads none of the others. Enumerates the
        iteration space: only for small specs, in tests.
        """
        sizes = self.sizes(ins, outs)
        letters = list(sizes)
        for point in product(*(range(sizes[letter]) for letter in letters)):
            values = dict(zip(letters, point, strict=True))
            at_in = [_element(o, s, values) for o, s in zip(self.inputs, ins, strict=True)]
            if any(a is None for a in at_in):
                continue
            at_out = [_element(o, s, values) for o, s in zip(self.outputs, outs, strict=True)]
            for i, a in enumerate(at_in):
                for k, b in enumerate(at_out):
                    if a is not None and b is not None:
                        yield i, a, k, b


def _element(operand: Operand, spec: Spec, values: Mapping[str, int]) -> tuple[int | None, ...] | None:
    out: list[int | None] = []
    for axis, size in zip(operand, spec.shape, strict=True):
        if axis is None:
            out.append(None)
            continue
        total = axis.constant + sum(c * values[letter] for letter, c in axis.terms)
        if total % axis.divisor or not 0 <= total // axis.divisor < size:
            return None
        out.append(total // axis.divisor)
    return tuple(out)


@cache
def parse(formula: str) -> Index:
    """Read an index formula."""
    body, _, tail = formula.partition("|")
    left, arrow, right = body.partition("->")
    if not arrow:
        raise FormulaError(f"index formula {formula!r} has no '->'. Write 'inputs -> outputs'.")
    given = []
    for item in tail.split():
        letter, _, size = item.partition("=")
        if not (len(letter) == 1 and size.isdigit()):
            raise FormulaError(f"index formula {formula!r}: cannot read {item!r}. Write 'r=3' behind the bar.")
        given.append((letter, int(size)))
    inputs = tuple(_operand(text, formula) for text in left.split(",")) if left.strip() else ()
    outputs = tuple(_operand(text, formula) for text in right.split(","))
    return Index(formula, inputs, outputs, tuple(given))


def _operand(text: str, formula: str) -> Operand:
    return () if text.strip() == "()" else tuple(_axis(token, formula) for token in text.split())


def _axis(token: str, formula: str) -> Axis | None:
    if token == ".":
        return None
    divided = re.fullmatch(r"\((.*)\)/(\d+)", token)
    body, divisor = (divided[1], int(divided[2])) if divided else (token, 1)
    terms: dict[str, int] = {}
    constant = position = 0
    for match in _TERM.finditer(body):
        if match.start() != position:
            break
        position = match.end()
        sign = -1 if match[1] == "-" else 1
        if match[4] is not None:
            constant += sign * int(match[4])
        else:
            terms[match[2]] = terms.get(match[2], 0) + sign * int(match[3] or 1)
    if position != len(body) or not body or divisor < 1:
        raise FormulaError(
            f"index formula {formula!r}: cannot read axis {token!r}. Write '.', a letter, 'h*2+r-1' or '(h-r+1)/2'."
        )
    return Axis(tuple(terms.items()), constant, divisor)
