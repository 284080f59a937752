"""Space: parameters, derived values and constraints, as a value.

    space = Space(
        {"rows": (4, 8, 16), "vectors": (1, 2, 4), "split": lambda rows: range(1, rows + 1)},   # deferred
        derived={"tile": "rows * vectors"},
        hard={"registers": "tile + vectors + 2 <= vector_registers"},
        soft={"no tiny tiles": lambda tile: tile >= 8},
        given=device.limits,
    )
    space.count(); space.point(17); space.sample(5, rng); list(space); space.columns()

Hard constraints say what the hardware allows, soft ones what the user wants. Both are expressions or functions
whose parameters are names of the space. The form follows BEAST (Luszczek et al. 2016): iterators, deferred
iterators, derived variables, hard and soft constraints.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import SpaceError
from .diagram import Domain
from .expression import Called, Node, const, node, of_function, parse, replaced, scalar
from .table import Part, connected

Point = dict[str, Any]
Expression = str | Callable[..., Any] | Node
Rules = Mapping[str, Expression] | Sequence[str]


@dataclass(frozen=True)
class Rule:
    """A named constraint. ``kind`` is 'hard' or 'soft'; ``tree`` is in terms of parameters alone."""

    name: str
    kind: str
    tree: Node = field(compare=False)


class Space:
    """All combinations of values that keep the constraints.

    ``parameters``: values of each, or a function of other names that gives them (a deferred parameter).
    ``derived``: names for expressions. ``hard``, ``soft``: constraints by name, or a list of expressions that
    are their own names. ``given``: names with one value each, such as the limits of a device.
    Raises SpaceError for names that are not there, and for expressions that are not allowed.
    """

    def __init__(
        self,
        parameters: Mapping[str, Sequence[Any] | Callable[..., Sequence[Any]]],
        *,
        derived: Mapping[str, Expression] | None = None,
        hard: Rules = (),
        soft: Rules = (),
        given: Mapping[str, Any] | None = None,
    ) -> None:
        self._declared = dict(parameters)
        self._derived, self._given = dict(derived or {}), dict(given or {})
        self._hard, self._soft = _named(hard), _named(soft)
        self._check_names()
        known = {name: const(value) for name, value in self._given.items()}
        known |= {n: const(v[0]) for n, v in self._values.items() if len(v) == 1}
        for name in self._derived:
            self._derive(name, known, ())
        self._known = known
        self.rules = tuple(
            Rule(name, kind, self._tree(f"the {kind} constraint {name!r}", expression))
            for kind, rules in (("hard", self._hard), ("soft", self._soft))
            for name, expression in rules.items()
        )

    # declaration ------------------------------------------------------------------------------------

    def _check_names(self) -> None:
        groups: dict[str, Mapping[str, Any]] = {
            "a parameter": self._declared,
            "a derived value": self._derived,
            "given": self._given,
        }
        seen: dict[str, str] = {}
        for what, names in groups.items():
            for name in names:
                if not isinstance(name, str) or not name.isidentifier():
                    raise SpaceError(f"{name!r} is not a name for {what}; use letters, digits and _.")
                if name in seen:
                    raise SpaceError(f"{name!r} is {seen[name]} and {what} of the space; take another name for one.")
                seen[name] = what
        self._values: dict[str, tuple[Any, ...]] = {}
        for name, values in self._declared.items():
            if not callable(values):
                if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
                    raise SpaceError(
                        f"parameter {name!r} has {values!r}, not a list of values or a function that gives one."
                    )
                self._values[name] = _distinct(values)

    def _derive(self, name: str, known: dict[str, Node], above: tuple[str, ...]) -> None:
        """Put a derived value in terms of parameters, what it stands on first."""
        if name in known:
            return
        if name in above:
            raise SpaceError(f"derived value {name!r} is made of itself: {' -> '.join((*above, name))}.")
        owner = f"the derived value {name!r}"
        tree = self._read(owner, self._derived[name])
        for other in sorted(tree.names & self._derived.keys()):
            self._derive(other, known, (*above, name))
        known[name] = replaced(tree, known)

    def _read(self, owner: str, expression: Expression) -> Node:
        tree = _as_node(owner, expression)
        unknown = sorted(tree.names - self._declared.keys() - self._derived.keys() - self._given.keys())
        if unknown:
            names = ", ".join((*self._declared, *self._derived, *self._given))
            raise SpaceError(f"{owner} names {', '.join(map(repr, unknown))}, but the space has {names}.")
        return tree

    def _tree(self, owner: str, expression: Expression) -> Node:
        return replaced(self._read(owner, expression), self._known)

    def restricted(self, soft: Rules) -> Space:
        """The same space with more soft constraints."""
        more = _named(soft)
        clash = sorted(more.keys() & self._soft.keys() & {n for n in more if self._soft.get(n) != more[n]})
        if clash:
            raise SpaceError(f"the space has a soft constraint {clash[0]!r} already; take another name.")
        return Space(
            self._declared, derived=self._derived, hard=self._hard, soft={**self._soft, **more}, given=self._given
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._declared)

    def copy(self) -> Space:
        """The same space, of which nothing is worked out yet."""
        return self.restricted({})

    @property
    def vocabulary(self) -> frozenset[str]:
        """All that constraints may name."""
        return frozenset((*self._declared, *self._derived, *self._given))

    # its parts --------------------------------------------------------------------------------------

    @cached_property
    def domains(self) -> dict[str, Domain]:
        """What each parameter may be. For a deferred one, all that any of its ranges has."""
        out: dict[str, Domain] = {n: Domain(v) for n, v in self._values.items()}
        waiting = [n for n in self._declared if n not in out]
        while waiting:
            ready = []
            for name in waiting:
                tree = self._tree(f"the deferred parameter {name!r}", self._declared[name])  # type: ignore[arg-type]
                if tree.names <= out.keys():
                    ready.append(name)
                    out[name] = self._deferred(name, tree, out)
            if not ready:
                raise SpaceError(f"deferred parameters {', '.join(map(repr, waiting))} wait for one another.")
            waiting = [n for n in waiting if n not in ready]
        return {n: out[n] for n in self._declared}

    def _deferred(self, name: str, tree: Node, known: Mapping[str, Domain]) -> Domain:
        listed = node("call", Called(partial(_listed, name), ("",)), tree)
        if not tree.names:
            return Domain(scalar(listed, {}))
        needed = _closed(tree.names, known)
        columns = connected({n: known[n] for n in known if n in needed}, []).all()
        points = zip(*(map(known[n].values.__getitem__, columns[n]) for n in tree.names), strict=True)
        found: dict[Any, None] = {}
        for values in dict.fromkeys(points):
            found.update(dict.fromkeys(scalar(listed, dict(zip(tree.names, values, strict=True)))))
        return Domain(tuple(found), listed)

    @cached_property
    def _parts(self) -> list[Part]:
        return self._made(self.rules)

    def _made(self, rules: Sequence[Rule]) -> list[Part]:
        """Parts that nothing connects with the rest, in the order of their first parameters."""
        trees = [r.tree for r in rules if r.tree.names]
        domains = self.domains
        if any(not r.tree.names and not scalar(r.tree, {}) for r in rules):  # false wherever one looks
            domains = {n: Domain(()) for n in domains}
        links = [t.names for t in trees] + [d.chosen.names | {n} for n, d in domains.items() if d.chosen is not None]
        group = {n: {n} for n in domains}
        for link in links:
            merged = set().union(*(group[n] for n in link))
            for n in merged:
                group[n] = merged
        out, seen = [], set()
        for n in domains:
            if n not in seen:
                seen |= group[n]
                inside = {m: d for m, d in domains.items() if m in group[n]}
                out.append(connected(inside, [t for t in trees if t.names <= group[n]]))
        return out

    # asking -----------------------------------------------------------------------------------------

    def count(self, rules: Sequence[Rule] | None = None) -> int:
        """How many points are valid (under all constraints, or under these), without listing them."""
        parts = self._parts if rules is None else self._made(rules)
        if not parts:  # no parameters: the empty point, unless a constraint is plainly false
            return int(all(scalar(r.tree, {}) for r in (self.rules if rules is None else rules)))
        return prod(part.count for part in parts)

    @cached_property
    def cartesian(self) -> int:
        """How many points there are without any constraint."""
        return self.count(())

    def __len__(self) -> int:
        return self.count()

    def __bool__(self) -> bool:
        return self.count() > 0

    def point(self, number: int) -> Point:
        """The point with a number, 0 to count - 1. Its inverse is `number`."""
        if not 0 <= number < self.count():
            raise IndexError(f"point {number:,} of a space of {self.count():,}")
        return self.points([number])[0]

    __getitem__ = point

    def points(self, numbers: Sequence[int] | NDArray[Any]) -> list[Point]:
        """The points with these numbers."""
        big = self.count() >= 2**62
        rest: Any = np.array([int(n) for n in numbers], object) if big else np.asarray(numbers, np.int64)
        codes: dict[str, Any] = {}
        for part in reversed(self._parts):
            codes |= part.points((rest % part.count).astype(part.dtype))
            rest = rest // part.count
        return self._decoded(codes)

    def _decoded(self, codes: Mapping[str, Any]) -> list[Point]:
        if not self.names:
            return [{}] * self.count()
        columns = [[*map(self.domains[n].values.__getitem__, codes[n].tolist())] for n in self.names]
        return [dict(zip(self.names, row, strict=True)) for row in zip(*columns, strict=True)]

    def numbers(self, points: Sequence[Mapping[str, Any]]) -> list[int]:
        """The number of each point, or -1 for one that is not valid."""
        if not points:
            return []
        if not self._parts:
            return [0 if self.count() and not p else -1 for p in points]
        codes = {
            n: np.array([places.get(_frozen(p.get(n, _MISSING)), -1) for p in points])
            for n, places in self._places.items()
        }
        total: Any = np.zeros(len(points), object if self.count() >= 2**62 else np.int64)
        valid = np.array([set(p) == set(self.names) for p in points])
        for part in self._parts:
            found = part.numbers({n: codes[n] for n in part.order})
            valid &= found >= 0
            total = total * max(1, part.count) + found
        return [int(n) if ok else -1 for n, ok in zip(total, valid, strict=True)]

    @cached_property
    def _places(self) -> dict[str, dict[Any, int]]:
        return {n: {v: i for i, v in enumerate(d.values)} for n, d in self.domains.items()}

    def number(self, point: Mapping[str, Any]) -> int:
        """The number of a point; -1 if it is not valid."""
        return self.numbers([point])[0]

    def __contains__(self, point: object) -> bool:
        return isinstance(point, Mapping) and self.number(point) >= 0

    def __iter__(self) -> Iterator[Point]:
        count, step = self.count(), 4096
        for first in range(0, count, step):
            yield from self.points(range(first, min(first + step, count)))

    def sample(self, n: int, rng: np.random.Generator) -> list[Point]:
        """``n`` different points, each as likely as any other; all of them, shuffled, where there are no more."""
        count = self.count()
        if n >= count or (count < 2**62 and n > count // 4):
            return self.points(rng.permutation(count)[:n])
        chosen: dict[int, None] = {}
        while len(chosen) < n:
            wanted = n - len(chosen)
            if count < 2**62:
                chosen.update(dict.fromkeys(rng.integers(count, size=wanted).tolist()))
            else:  # digit by digit: each part is small enough
                digits = [[int(d) for d in _integers(rng, part.count, wanted)] for part in self._parts]
                for row in zip(*digits, strict=True):
                    number = 0
                    for part, digit in zip(self._parts, row, strict=True):
                        number = number * part.count + digit
                    chosen[number] = None
        return self.points(list(chosen))

    def columns(self) -> dict[str, NDArray[Any]]:
        """Every point: for each parameter its values, in the order of the points' numbers."""
        count, after = self.count(), 1
        columns: dict[str, NDArray[Any]] = {}
        for part in reversed(self._parts):
            for n, codes in part.all().items():
                values = _array(self.domains[n].values)[codes if count else codes[:0]]
                if len(values) < count:
                    before = count // (len(values) * after)
                    values = np.broadcast_to(values[:, None], (before, len(values), after)).reshape(-1)
                columns[n] = values
            after *= part.count
        return {n: columns[n] for n in self.names}

    def rows(self) -> list[tuple[Any, ...]]:
        """Every point as a tuple of values, parameters in the order of their declaration."""
        if not self.names:
            return [()] * self.count()
        with _uncollected():
            return list(zip(*(c.tolist() for c in self.columns().values()), strict=True))

    def neighbours(self, point: Mapping[str, Any], *, reach: int | None = None) -> list[Point]:
        """Valid points that differ in one parameter; by at most ``reach`` places in its values, nearest first."""
        found = []
        for n, places in self._places.items():
            at, values = places[_frozen(point[n])], self.domains[n].values
            for i in sorted(range(len(values)), key=lambda i: (abs(i - at), i)):
                if i != at and (reach is None or abs(i - at) <= reach):
                    found.append((abs(i - at), {**point, n: values[i]}))
        found.sort(key=lambda pair: pair[0])
        candidates = [p for _, p in found]
        return [p for p, number in zip(candidates, self.numbers(candidates), strict=True) if number >= 0]

    def broken(self, point: Mapping[str, Any]) -> list[Rule]:
        """The constraints that a point breaks."""
        return [r for r in self.rules if not scalar(r.tree, point)]

    # emptiness --------------------------------------------------------------------------------------

    def contradiction(self) -> tuple[Rule, ...]:
        """The smallest set of constraints, by taking away one at a time, that leaves no point; () if some are left."""
        if self.count():
            return ()
        needed = list(self.rules)
        for rule in self.rules:
            fewer = [r for r in needed if r is not rule]
            if self.count(fewer) == 0:
                needed = fewer
        return tuple(needed)

    def check(self) -> Space:
        """This space; raises SpaceError, with the constraints that contradict each other, if it is empty."""
        if self.count():
            return self
        empty = [n for n, d in self.domains.items() if not d.values]
        if empty:
            raise SpaceError(f"the space is empty: parameter {empty[0]!r} has no values.")
        culprits = "; ".join(f"{r.kind} {r.name!r}" for r in self.contradiction())
        raise SpaceError(f"the space is empty: no point keeps {culprits}. Relax one of them or add values.")

    def __repr__(self) -> str:
        return f"<Space: {', '.join(self.names)}; {len(self.rules)} constraints>"


def _listed(name: str, values: Any) -> tuple[Any, ...]:
    """What the function of a deferred parameter gave."""
    try:
        return _distinct(values)
    except TypeError:
        raise SpaceError(f"the function of the deferred parameter {name!r} gave {values!r}, not a list.") from None


@contextmanager
def _uncollected() -> Iterator[None]:
    """Many tuples are made, none of them in a cycle: the collector would look at all objects again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_MISSING = object()


def _as_node(owner: str, expression: Expression) -> Node:
    if isinstance(expression, Node):
        return expression
    if isinstance(expression, str):
        return parse(expression)
    if callable(expression):
        return of_function(expression, owner)
    raise SpaceError(f"{owner} is {expression!r}, not an expression or a function.")


def as_rules(rules: Rules) -> dict[str, Node]:
    """Constraints by name, read."""
    return {name: _as_node(f"the constraint {name!r}", rule) for name, rule in _named(rules).items()}


def _named(rules: Rules) -> dict[str, Expression]:
    if isinstance(rules, Mapping):
        return dict(rules)
    return {text: text for text in rules}


def _distinct(values: Any) -> tuple[Any, ...]:
    """Values as plain hashable Python ones, each once."""
    plain = values.tolist() if isinstance(values, np.ndarray) else values
    return tuple({(type(v), v): v for v in map(_frozen, plain)}.values())


def _frozen(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _closed(names: frozenset[str], known: Mapping[str, Domain]) -> set[str]:
    """Names, and those that their ranges depend on."""
    out, stack = set(names), list(names)
    while stack:
        chosen = known[stack.pop()].chosen
        for n in chosen.names if chosen is not None else ():
            if n not in out:
                out.add(n)
                stack.append(n)
    return out


def _array(values: Sequence[Any]) -> NDArray[Any]:
    """Values of one plain kind as such, others as objects."""
    if len(set(map(type, values))) == 1 and isinstance(values[0], int | float | str):
        return np.array(values)
    out = np.empty(len(values), object)
    out[:] = values
    return out


def _integers(rng: np.random.Generator, count: int, n: int) -> list[int]:
    """Uniform whole numbers below ``count``, of any size."""
    if count < 2**62:
        return [int(v) for v in rng.integers(count, size=n)]
    bits = count.bit_length()
    out: list[int] = []
    while len(out) < n:
        value = int.from_bytes(rng.bytes(-(-bits // 8)), "little") & ((1 << bits) - 1)
        if value < count:
            out.append(value)
    return out
