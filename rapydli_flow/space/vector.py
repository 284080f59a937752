"""Expressions over whole columns of parameter values, with NumPy; the fast twin of `expression.scalar`.

Columns may be of any shapes that broadcast. Where NumPy would not mean what Python means (integers that may
outgrow 64 bits, strings, functions) the plain interpreter runs, once for each combination of arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RapydliError, SpaceError
from .expression import ARITHMETIC, COMPARISONS, DIVISIONS, FUNCTIONS, Node, scalar

Column = NDArray[Any]
LIMIT = 2.0**52  # integers beyond it are left to Python: below it floats are exact too
FAST: dict[str, Callable[..., Any]] = {"abs": np.abs, "neg": np.negative, "pos": np.positive, "not": np.logical_not}


def column(values: Sequence[Any]) -> Column:
    """Values as an array: of numbers where NumPy has them exactly, else of objects."""
    kinds = set(map(type, values))
    if kinds <= {bool}:
        return np.array(values, bool)
    if kinds <= {int} and all(abs(v) < LIMIT for v in values):
        return np.array(values, np.int64)
    if kinds <= {float}:
        return np.array(values, np.float64)
    made = np.empty(len(values), object)
    made[:] = values
    return made


class Limits:
    """What is known of the values that names can have: how large, and whether 0 is among them."""

    def __init__(self, values: Mapping[str, Sequence[Any]]) -> None:
        self.most: dict[str, float] = {}
        self.zero: dict[str, bool] = {}
        for name, found in values.items():
            numbers = all(isinstance(v, int | float) for v in found)
            self.most[name] = max((abs(float(v)) for v in found), default=0.0) if numbers else float("inf")
            self.zero[name] = any(v == 0 for v in found)
        self._magnitudes: dict[Node, float] = {}
        self._safe: dict[Node, bool] = {}

    def magnitude(self, tree: Node) -> float:
        """No number that is met on the way to the value is larger; inf where that is not known."""
        known = self._magnitudes.get(tree)
        if known is None:
            known = self._magnitudes[tree] = self._magnitude(tree)
        return known

    def _magnitude(self, tree: Node) -> float:
        op, args = tree.op, tree.args
        if op == "name":
            return self.most.get(args[0], float("inf"))
        if op == "const":
            if isinstance(args[0], tuple):
                return 0.0 if all(isinstance(v, int | float) for v in args[0]) else float("inf")
            return abs(float(args[0])) if isinstance(args[0], int | float) else float("inf")
        if (
            op == "call"
            or op in ("**", "<<", ">>", "&", "|", "^", "~")
            or (op in FUNCTIONS and op not in ("abs", "min", "max"))
        ):
            return float("inf")
        sizes = [self.magnitude(a) for a in args]
        if op == "*":
            return max(sizes[0] * sizes[1], *sizes) if np.isfinite(sizes).all() else float("inf")
        if op == "/":
            return sum(sizes) if np.isfinite(sizes).all() else float("inf")
        if op in ("+", "-", *DIVISIONS):
            return sum(sizes)
        return max([*sizes, 1.0])

    def safe(self, tree: Node) -> bool:
        """Can it be computed for every point, also for those where Python would not get to it?"""
        known = self._safe.get(tree)
        if known is None:
            known = all(map(self.safe, tree.nodes)) and tree.op != "call" and self.magnitude(tree) < LIMIT
            if tree.op in DIVISIONS:
                known = known and self._nonzero(tree.args[1])
            self._safe[tree] = known
        return known

    def _nonzero(self, tree: Node) -> bool:
        if tree.op == "name":
            return not self.zero.get(tree.args[0], True)
        if tree.op == "const":
            return bool(tree.args[0] != 0)
        return tree.op == "*" and all(map(self._nonzero, tree.args))


class Columns:
    """Expressions whose values are known, and all that follows from them."""

    def __init__(self, limits: Limits, known: dict[Node, Column]) -> None:
        self.limits, self.known = limits, known

    def value(self, tree: Node) -> Any:
        """The column of an expression, or a plain value where it has no names."""
        found = self.known.get(tree)
        if found is not None:
            return found
        if tree.op == "const":
            return tree.args[0]
        made = self._compute(tree)
        if isinstance(made, np.ndarray):
            self.known[tree] = made
        return made

    def truth(self, tree: Node) -> Any:
        """Where it is true."""
        made = self.value(tree)
        if isinstance(made, np.ndarray):
            return made if made.dtype == bool else made.astype(bool)
        return bool(made)

    def _compute(self, tree: Node) -> Any:
        op, args = tree.op, tree.args
        if op in ("and", "or") or (op == "if"):
            return self._choice(tree)
        if op == "call" or self.limits.magnitude(tree) >= LIMIT:
            return self._each(tree)
        if op in ("in", "not in"):
            if args[1].op != "const" or not isinstance(args[1].args[0], tuple):
                return self._each(tree)
            inside = np.isin(self.value(args[0]), column(args[1].args[0]))
            return ~inside if op == "not in" else inside
        values = [self.value(a) for a in args]
        if any(isinstance(v, np.ndarray) and v.dtype == object for v in values):
            return self._each(tree)
        if op in DIVISIONS:
            if not np.all(values[1]):
                return self._each(tree)  # raises as Python does
            return ARITHMETIC[op](*map(_number, values))
        if op in ARITHMETIC:
            return ARITHMETIC[op](*map(_number, values))
        if op in COMPARISONS:
            return COMPARISONS[op](*values)
        if op in ("min", "max"):
            function = np.minimum if op == "min" else np.maximum
            if (
                len(values) < 2
                or len({np.result_type(v) if isinstance(v, np.ndarray) else np.dtype(type(v)) for v in values}) > 1
            ):
                return self._each(tree)
            made = values[0]
            for v in values[1:]:
                made = function(made, v)
            return made
        if op in FAST:
            return FAST[op](*(map(_number, values) if op != "not" else values))
        return self._each(tree)

    def _choice(self, tree: Node) -> Any:
        """'and', 'or', 'if': what Python would not reach is computed only where it is reached, unless it is safe."""
        op, args = tree.op, tree.args
        if op == "if":
            test, sides = self.truth(args[0]), args[1:]
            if not isinstance(test, np.ndarray):
                return self.value(sides[0] if test else sides[1])
            if all(map(self.limits.safe, sides)):
                values = [self.value(a) for a in sides]
                if _same_kind(values):
                    return np.where(test, *values)
            return self._each(tree)
        made = self.value(args[0])
        for a in args[1:]:
            if not isinstance(made, np.ndarray):
                if bool(made) == (op == "or"):
                    return made
                made = self.value(a)
                continue
            if not self.limits.safe(a):
                return self._partly(tree, made, a, args)
            other = self.value(a)
            if not _same_kind((made, other)):
                return self._each(tree)
            if made.dtype == bool:
                made = (made & other) if op == "and" else (made | other)
            else:
                made = (
                    np.where(made.astype(bool), other, made)
                    if op == "and"
                    else np.where(made.astype(bool), made, other)
                )
        return made

    def _partly(self, tree: Node, made: Column, unsafe: Node, args: Sequence[Node]) -> Any:
        """The rest of an 'and' or 'or', for the rows that get there."""
        if made.dtype != bool:
            return self._each(tree)
        rest = args[list(args).index(unsafe) :]
        leaves = [leaf for leaf in self._leaves(tree)]
        shape = np.broadcast_shapes(made.shape, *(self.known[leaf].shape for leaf in leaves))
        whole = np.broadcast_to(made, shape)
        reached = whole if tree.op == "and" else ~whole
        rows = {leaf: np.broadcast_to(self.known[leaf], shape)[reached] for leaf in leaves}
        tail = rest[0] if len(rest) == 1 else Node(tree.op, tuple(rest), frozenset().union(*(r.names for r in rest)))
        out = whole.copy()
        part = Columns(self.limits, rows)
        out[reached] = part.truth(tail)
        return out

    def _leaves(self, tree: Node) -> list[Node]:
        """The known expressions that a value is made of."""
        if tree in self.known:
            return [tree]
        return list(dict.fromkeys(leaf for a in tree.nodes for leaf in self._leaves(a)))

    def _each(self, tree: Node) -> Column:
        """By the plain interpreter, for each combination of what the expression is made of."""
        leaves = [leaf for a in tree.nodes for leaf in self._leaves(a)] if tree not in self.known else [tree]
        leaves = list(dict.fromkeys(leaves))
        if not leaves:
            return column([scalar(tree, {})])
        columns = np.broadcast_arrays(*(self.known[leaf] for leaf in leaves))
        shape = columns[0].shape
        groups, first = grouped([c.reshape(-1) for c in columns])
        rows = list(zip(*(c.reshape(-1)[first].tolist() for c in columns), strict=True))
        holes = {leaf: Node("name", (f"#{i}",), frozenset((f"#{i}",))) for i, leaf in enumerate(leaves)}
        body = _with(tree, holes)
        names = [holes[leaf].args[0] for leaf in leaves]
        values = []
        for row in rows:
            point = dict(zip(names, row, strict=True))
            try:
                values.append(scalar(body, point))
            except RapydliError:  # it says what is wrong already
                raise
            except Exception as error:  # of a user's function, or of arithmetic: which one, and where
                at = ", ".join(f"{leaf}={value!r}" for leaf, value in zip(leaves, row, strict=True))
                raise SpaceError(f"{tree} fails for {at}: {type(error).__name__}: {error}.") from error
        return column(values)[groups].reshape(shape)


def _with(tree: Node, holes: Mapping[Node, Node]) -> Node:
    """The expression with known parts as names."""
    if tree in holes:
        return holes[tree]
    if not tree.nodes:
        return tree
    return Node(tree.op, tuple(_with(a, holes) if isinstance(a, Node) else a for a in tree.args), tree.names)


def _number(value: Any) -> Any:
    """Booleans count as 0 and 1, as in Python."""
    return value.astype(np.int64) if isinstance(value, np.ndarray) and value.dtype == bool else value


def _same_kind(values: Sequence[Any]) -> bool:
    kinds = {v.dtype.kind if isinstance(v, np.ndarray) else np.dtype(type(v)).kind for v in values}
    return len(kinds) == 1 and "O" not in kinds


def grouped(columns: Sequence[Column]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Equal rows of flat columns: the group of each row, and the first row of each group."""
    n = len(columns[0]) if columns else 0
    if n == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    key, size = np.zeros(n, np.int64), 1
    for values in columns:
        codes, count = coded(values)
        if size * count >= 2**62:
            key, size = coded(key)
        key, size = key * count + codes if size > 1 else codes, size * count
    if size <= 4 * n + 1024:  # a table of all keys is cheaper than sorting
        first = np.full(size, -1, np.int64)
        first[key[::-1]] = np.arange(n - 1, -1, -1)
        present = first >= 0
        number = np.cumsum(present) - 1
        return number[key], first[present]
    _, first, groups = np.unique(key, return_index=True, return_inverse=True)
    return groups.reshape(-1), first


def coded(values: Column) -> tuple[NDArray[np.int64], int]:
    """Values as small whole numbers, equal ones alike, and how many there are at most."""
    if values.dtype == bool:
        return values.astype(np.int64), 2
    if values.dtype == np.int64:
        low, high = int(values.min()), int(values.max())
        if high - low < max(4096, 4 * len(values)):
            return values - low, high - low + 1
    if values.dtype == object:
        known: dict[Any, int] = {}
        codes = np.fromiter(
            (known.setdefault((type(v), v), len(known)) for v in values.tolist()), np.int64, len(values)
        )
        return codes, max(1, len(known))
    found, codes = np.unique(values, return_inverse=True)
    return codes.reshape(-1), len(found)
