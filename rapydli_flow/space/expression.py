"""Expressions over parameters: read from text by an allow-list, or made of a Python function, never evaluated as code.

    "32 <= block_x * block_y <= 1024"  --ast.parse, allow-list-->  Node
    lambda rows, lanes: rows % lanes == 0  --its parameters-->     Node("call", function, rows, lanes)

A `Node` is a value: equal expressions are equal nodes, so what several constraints share is found by comparing.
Meaning is Python's, short circuits and division by zero included; `scalar` is the plain interpreter, and
`vector.py` does the same for whole columns.
"""

from __future__ import annotations

import ast
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import SpaceError

BINARY: dict[type[ast.operator], tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
    ast.FloorDiv: ("//", operator.floordiv),
    ast.Mod: ("%", operator.mod),
    ast.Pow: ("**", operator.pow),
    ast.BitAnd: ("&", operator.and_),
    ast.BitOr: ("|", operator.or_),
    ast.BitXor: ("^", operator.xor),
    ast.LShift: ("<<", operator.lshift),
    ast.RShift: (">>", operator.rshift),
}
COMPARE: dict[type[ast.cmpop], tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
    ast.In: ("in", lambda a, b: a in b),
    ast.NotIn: ("not in", lambda a, b: a not in b),
}
UNARY: dict[type[ast.unaryop], tuple[str, Callable[[Any], Any]]] = {
    ast.USub: ("neg", operator.neg),
    ast.UAdd: ("pos", operator.pos),
    ast.Not: ("not", operator.not_),
    ast.Invert: ("~", operator.invert),
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "bool": bool,
    "ceil": math.ceil,
    "float": float,
    "floor": math.floor,
    "gcd": math.gcd,
    "int": int,
    "log2": math.log2,
    "max": max,
    "min": min,
    "sqrt": math.sqrt,
}
ARITHMETIC = dict(BINARY.values())
COMPARISONS = dict(COMPARE.values())
SIGNS = dict(UNARY.values())
DIVISIONS = ("/", "//", "%")


@dataclass(frozen=True)
class Node:
    """An operation on nodes. ``op``: 'name', 'const', an operator, 'and', 'or', 'if', a function's name, or 'call'."""

    op: str
    args: tuple[Any, ...]
    names: frozenset[str] = field(compare=False)
    _hash: int = field(default=0, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.op, self.args)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The arguments that are nodes."""
        return tuple(a for a in self.args if isinstance(a, Node))

    def __str__(self) -> str:
        return _text(self)


def name(text: str) -> Node:
    return Node("name", (text,), frozenset((text,)))


def const(value: Any) -> Node:
    return Node("const", (value,), frozenset())


def node(op: str, *args: Any) -> Node:
    """A node; one that has no names is its value already, where it has one."""
    parts = [a for a in args if isinstance(a, Node)]
    names: frozenset[str] = frozenset().union(*(a.names for a in parts))
    made = Node(op, args, names)
    if not names and all(p.op == "const" for p in parts) and (op != "call" or len(parts) == len(args) - 1):
        try:
            return const(scalar(made, {}))
        except Exception:  # whatever it is, it is raised where the value is needed, if it ever is
            return made
    return made


def parse(text: str) -> Node:
    """The node of an expression. Raises SpaceError for what is not on the allow-list."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return _read(tree.body, text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, SpaceError):
            raise
        reason = error.msg if isinstance(error, SyntaxError) else str(error) or type(error).__name__
        raise SpaceError(f"expression {text!r} cannot be read: {reason}.") from None


def _read(tree: ast.expr, text: str) -> Node:
    match tree:
        case ast.Name(id=id):
            return name(id)
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return const(value)
        case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements):
            items = [_read(e, text) for e in elements]
            if all(i.op == "const" for i in items):
                return const(tuple(i.args[0] for i in items))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return node(BINARY[type(op)][0], _read(left, text), _read(right, text))
        case ast.UnaryOp(op=sign, operand=operand):
            return node(UNARY[type(sign)][0], _read(operand, text))
        case ast.BoolOp(op=joint, values=values):
            return node("and" if isinstance(joint, ast.And) else "or", *(_read(v, text) for v in values))
        case ast.Compare(left=first, ops=ops, comparators=others) if all(type(o) in COMPARE for o in ops):
            sides = [_read(e, text) for e in (first, *others)]
            pairs = [node(COMPARE[type(o)][0], sides[i], sides[i + 1]) for i, o in enumerate(ops)]
            return pairs[0] if len(pairs) == 1 else node("and", *pairs)
        case ast.IfExp(test=test, body=body, orelse=other):
            return node("if", _read(test, text), _read(body, text), _read(other, text))
        case ast.Call(func=ast.Name(id=id), args=args, keywords=[]) if id in FUNCTIONS:
            return node(id, *(_read(a, text) for a in args))
    part = ast.get_source_segment(text.strip(), tree) or text
    raise SpaceError(
        f"expression {text!r}: {part!r} is not allowed. Use parameters, numbers, strings, arithmetic, comparisons, "
        f"'and', 'or', 'not', 'in', 'a if b else c' and {', '.join(FUNCTIONS)}."
    )


def of_function(function: Callable[..., Any], owner: str) -> Node:
    """A call of a function; its parameters name what it is given."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise SpaceError(
            f"{owner}: {function!r} has no signature; wrap it in a lambda that names its arguments."
        ) from None
    for p in parameters:
        if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            raise SpaceError(f"{owner}: the function takes {p}; name every parameter that it needs.")
    keywords = tuple(p.name if p.kind is p.KEYWORD_ONLY else "" for p in parameters)
    return _call(Called(function, keywords), [p.name for p in parameters])


def calling(function: Callable[..., Any], names: Sequence[str]) -> Node:
    """A call of a function that takes these names as keywords."""
    return _call(Called(function, tuple(names)), names)


def _call(called: Called, names: Sequence[str]) -> Node:
    return Node("call", (called, *map(name, names)), frozenset(names))


@dataclass(frozen=True)
class Called:
    """A Python function, and which of its arguments go by keyword."""

    function: Callable[..., Any]
    keywords: tuple[str, ...]

    def __call__(self, *values: Any) -> Any:
        by_name = {k: v for k, v in zip(self.keywords, values, strict=True) if k}
        return self.function(*(v for k, v in zip(self.keywords, values, strict=True) if not k), **by_name)


def replaced(tree: Node, known: Mapping[str, Node]) -> Node:
    """The expression with names replaced by expressions, and folded where it became constant."""
    if not (tree.names & known.keys()):
        return tree
    if tree.op == "name":
        return known[tree.args[0]]
    return node(tree.op, *(replaced(a, known) if isinstance(a, Node) else a for a in tree.args))


def scalar(tree: Node, point: Mapping[str, Any]) -> Any:
    """The value at one point: Python's own meaning."""
    op, args = tree.op, tree.args
    if op == "const":
        return args[0]
    if op == "name":
        return point[args[0]]
    if op in ("and", "or"):
        value = None
        for a in args:
            value = scalar(a, point)
            if bool(value) == (op == "or"):
                return value
        return value
    if op == "if":
        return scalar(args[1] if scalar(args[0], point) else args[2], point)
    if op == "call":
        return args[0](*(scalar(a, point) for a in args[1:]))
    function = ARITHMETIC.get(op) or COMPARISONS.get(op) or SIGNS.get(op) or FUNCTIONS[op]
    return function(*(scalar(a, point) for a in args))


def _text(tree: Node) -> str:
    op, args = tree.op, tree.args
    if op == "const":
        return repr(args[0])
    if op == "name":
        return str(args[0])
    if op == "call":
        return f"{getattr(args[0].function, '__name__', 'function')}({', '.join(map(_text, args[1:]))})"
    if op in FUNCTIONS:
        return f"{op}({', '.join(map(_text, args))})"
    if op == "if":
        return f"({_text(args[1])} if {_text(args[0])} else {_text(args[2])})"
    if op in SIGNS:
        return f"{ {'neg': '-', 'pos': '+', 'not': 'not '}.get(op, op) }{_text(args[0])}"
    return f"({f' {op} '.join(map(_text, args))})"
