"""Turns a kernel into the straight text that is compiled: constants in place of names, loops written out.

A template writes its kernel as a readable Python function that closes over numbers, intrinsics and
procedures. The emulator runs it as it is. For the GPU its source is rewritten:

- names, attributes and subscripts whose value is known become constants; arithmetic on them is done here;
- other ``+ - * // % ^`` become 32-bit operations (Numba would widen to 64 bits and check signs);
- ``for i in unroll(n)`` is written out, and an ``if`` with a known condition is decided;
- a call of a procedure, ``procedure(..)``, is replaced by its body; so is ``name = procedure(..)``, if the procedure
  ends with ``return``.

So in kernels operators are for indices only; elements are touched by intrinsics.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from types import FunctionType
from typing import Any

from rapydli_flow.errors import TemplateError

from . import ptx
from .grid import Grid
from .pair import Pair

_UNKNOWN = object()
_FOLD: dict[str, Callable[[Any, Any], Any]] = {name: pair.twin for name, pair in ptx.ARITHMETIC.items()}


@dataclass(frozen=True)
class Flat:
    """A kernel as text, with the intrinsics that it names; ``parameters`` are all pointers."""

    source: str
    parameters: tuple[str, ...]
    names: Mapping[str, Any] = field(default_factory=dict)

    def function(self, **bound: Any) -> Any:
        """The kernel with its intrinsics as numba-cuda has them."""
        made = {name: value.device if isinstance(value, Pair) else value for name, value in self.names.items()}
        scope: dict[str, Any] = {**made, **bound}
        return self._made(scope)

    def twin(self) -> Any:
        """The same text with the NumPy halves of its intrinsics, for the emulator."""
        return self._made(dict(self.names))

    def _made(self, scope: dict[str, Any]) -> Any:
        exec(compile(self.source, "<kernel>", "exec"), scope)
        return scope["kernel"]


def flatten(kernel: Callable[..., None], *, ins: int, outs: int, extras: int, work: int = 0, maps: int = 0) -> Flat:
    """``kernel(ins, outs, work, extras, at)`` or, with ``maps`` as sixth argument, as a function of single pointers."""
    groups = {"ins": ins, "outs": outs, "work": work, "extras": extras}
    single = {name: [f"{name[0]}{i}" for i in range(size)] for name, size in groups.items()}
    descriptors = [f"m{i}" for i in range(maps)]
    parameters = (*(one for ones in single.values() for one in ones), "at", *descriptors)
    single["maps"] = descriptors
    lines = [f"{name} = ({''.join(f'{one}, ' for one in ones)})" for name, ones in single.items() if ones]
    names: dict[str, Any] = {}
    body = _Rewriter(kernel, names, count()).body()
    head = [f"def kernel({', '.join(parameters)}):", *textwrap.indent("\n".join(lines), "    ").splitlines()]
    text = ast.unparse(ast.fix_missing_locations(ast.Module(body, [])))
    return Flat("\n".join([*head, textwrap.indent(text, "    "), ""]), parameters, names)


def as_compiled(grid: Grid) -> Grid:
    """The grid with the text that the compiler gets in place of its kernel, for the emulator."""

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any, maps: Any = ()) -> None:
        counts = {"ins": len(ins), "outs": len(outs), "work": len(work), "extras": len(extras), "maps": len(maps)}
        if "twin" not in made:
            made["twin"] = flatten(grid.kernel, **counts).twin()
        made["twin"](*ins, *outs, *work, *extras, at, *maps)

    made: dict[str, Any] = {}
    return replace(grid, kernel=kernel)


@cache
def _definition(code: Any, function: Any) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise TemplateError(f"{function.__qualname__} is not a plain function. Write kernels with def.")
    return definition


class _Rewriter(ast.NodeTransformer):
    """Rewrites the body of one function; `arguments` are the expressions that stand for its parameters."""

    def __init__(
        self,
        function: Any,
        names: dict[str, Any],
        serial: Any,
        arguments: Mapping[str, ast.expr] | None = None,
    ) -> None:
        self.definition = copy.deepcopy(_definition(function.__code__, function))
        closure = inspect.getclosurevars(function)
        self.scope = {**closure.builtins, **closure.globals, **closure.nonlocals}
        self.names, self.serial = names, serial
        self.bound: dict[str, ast.expr] = dict(arguments or {})
        self.suffix = "" if arguments is None else f"__{next(serial)}"  # kernels have names like row_0
        stored = {n.id for n in ast.walk(self.definition) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.own = stored | {a.arg for a in self.definition.args.args}
        if again := sorted(stored & set(self.bound)):
            raise TemplateError(f"{function.__qualname__} assigns to its parameters {again}. Use another name.")

    def body(self) -> list[ast.stmt]:
        *_, last = self.definition.body
        if any(isinstance(node, ast.Return) and node is not last for node in ast.walk(self.definition)):
            raise TemplateError(f"{self.definition.name} returns before its end. Write one return, last.")
        return self._block(self.definition.body)

    def _block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        out: list[ast.stmt] = []
        for statement in statements:
            made = self.visit(statement)
            out += made if isinstance(made, list) else [made]
        return out

    # -- what is known now

    def _value(self, node: ast.AST) -> Any:
        """The value of a rewritten expression, if it is known."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, _Known):
            return node.value
        return _UNKNOWN

    def _known(self, value: Any) -> ast.expr:
        if isinstance(value, bool | int | float | str):
            return ast.Constant(value)
        return _Known(value)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.bound:
            return copy.deepcopy(self.bound[node.id])
        if node.id in self.own:
            return ast.Name(node.id + self.suffix, node.ctx)
        if node.id not in self.scope:
            raise TemplateError(f"kernel {self.definition.name} uses {node.id}, which is defined nowhere.")
        return self._known(self.scope[node.id])

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        value = self.visit(node.value)
        known = self._value(value)
        if known is ptx.cuda or isinstance(value, ast.Attribute):  # cuda.threadIdx.x stays what it is
            self.names["cuda"] = ptx.cuda
            inner = ast.Name("cuda", ast.Load()) if known is ptx.cuda else value
            return ast.Attribute(inner, node.attr, node.ctx)
        if known is _UNKNOWN:
            raise TemplateError(f"kernel {self.definition.name}: {ast.unparse(node)} is not known when it is built.")
        return self._known(getattr(known, node.attr))

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        value, index = self.visit(node.value), self.visit(node.slice)
        known, at = self._value(value), self._value(index)
        if known is not _UNKNOWN and at is not _UNKNOWN:
            return self._known(known[at])
        return ast.Subscript(value, index, node.ctx)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        left: ast.expr = self.visit(node.left)
        right: ast.expr = self.visit(node.right)
        name = type(node.op).__name__
        if name not in _FOLD:
            return ast.BinOp(left, node.op, right)
        a, b = self._value(left), self._value(right)
        if a is not _UNKNOWN and b is not _UNKNOWN:
            return self._known(_FOLD[name](a, b))
        if (name, b) in (("Add", 0), ("Sub", 0), ("Mult", 1), ("FloorDiv", 1), ("BitXor", 0)):
            return left
        if (name, a) in (("Add", 0), ("Mult", 1)):
            return right
        if (name, b) in (("Mod", 1), ("Mult", 0)) or (name, a) == ("Mult", 0):
            return ast.Constant(0)
        return self._intrinsic(ptx.ARITHMETIC[name], [left, right])

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        operand = self.visit(node.operand)
        value = self._value(operand)
        if value is not _UNKNOWN and isinstance(node.op, ast.USub | ast.Not):
            return ast.Constant(-value if isinstance(node.op, ast.USub) else not value)
        return ast.UnaryOp(node.op, operand)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        left, right = self.visit(node.left), self.visit(node.comparators[0])
        a, b = self._value(left), self._value(right)
        if a is not _UNKNOWN and b is not _UNKNOWN:
            test = ast.Expression(ast.Compare(ast.Constant(a), node.ops, [ast.Constant(b)]))
            return ast.Constant(eval(compile(ast.fix_missing_locations(test), "<known>", "eval")))
        return ast.Compare(left, node.ops, [right])

    # -- calls and statements

    def _intrinsic(self, pair: Pair, args: list[ast.expr]) -> ast.Call:
        """A call of a pair, under a name of its own: two pairs may be called alike."""
        name = pair.name
        while self.names.setdefault(name, pair) is not pair:
            name += "_"
        return ast.Call(ast.Name(name, ast.Load()), args, [])

    def visit_Call(self, node: ast.Call) -> ast.AST:
        function = self.visit(node.func)
        args = [self.visit(arg) for arg in node.args]
        known = self._value(function)
        if isinstance(known, Pair):
            return self._intrinsic(known, args)
        if known in (range, len):
            return ast.Call(ast.Name(known.__name__, ast.Load()), args, [])
        if known is not _UNKNOWN:
            raise TemplateError(f"kernel {self.definition.name} calls {ast.unparse(node.func)} inside an expression.")
        for i, arg in enumerate(args):  # dtypes, in cuda.shared.array(size, float32)
            if isinstance(arg, _Known):
                self.names[arg.value.__name__] = arg.value
                args[i] = ast.Name(arg.value.__name__, ast.Load())
        return ast.Call(function, args, [ast.keyword(k.arg, self.visit(k.value)) for k in node.keywords])

    def visit_Expr(self, node: ast.Expr) -> Any:
        if isinstance(node.value, ast.Constant):
            return []  # a docstring
        if (inlined := self._procedure(node.value)) is None:
            return ast.Expr(self.visit(node.value))
        if inlined and isinstance(inlined[-1], ast.Return):
            raise TemplateError(f"kernel {self.definition.name}: nobody takes what {ast.unparse(node)} returns.")
        return inlined

    def visit_Assign(self, node: ast.Assign) -> Any:
        if (inlined := self._procedure(node.value)) is None:
            return self.generic_visit(node)
        *body, last = inlined
        if not isinstance(last, ast.Return) or last.value is None:
            raise TemplateError(
                f"kernel {self.definition.name}: what is called in {ast.unparse(node)} returns nothing."
            )
        return [*body, ast.Assign([self.visit(target) for target in node.targets], last.value)]

    def _procedure(self, node: ast.expr) -> list[ast.stmt] | None:
        """The body of the procedure that is called, if one is."""
        if not isinstance(node, ast.Call):
            return None
        function = self._value(self.visit(node.func))
        if not isinstance(function, FunctionType):
            return None
        return self._inline(function, [self.visit(arg) for arg in node.args])

    def _inline(self, function: FunctionType, args: list[ast.expr]) -> list[ast.stmt]:
        before: list[ast.stmt] = []
        arguments: dict[str, ast.expr] = {}
        for name, arg in zip(inspect.signature(function).parameters, args, strict=True):
            if not isinstance(arg, ast.Constant | ast.Name | _Known):
                fresh = f"{name}__{next(self.serial)}"
                before.append(ast.Assign([ast.Name(fresh, ast.Store())], arg))
                arg = ast.Name(fresh, ast.Load())
            arguments[name] = arg
        return before + _Rewriter(function, self.names, self.serial, arguments).body()

    def visit_For(self, node: ast.For) -> Any:
        assert isinstance(node.target, ast.Name)
        if isinstance(node.iter, ast.Call) and self._value(self.visit(node.iter.func)) is ptx.unroll:
            out: list[ast.stmt] = []
            for value in range(self._value(self.visit(node.iter.args[0]))):
                self.bound[node.target.id] = ast.Constant(value)
                out += self._block(copy.deepcopy(node.body))
            self.bound.pop(node.target.id, None)
            return out
        return ast.For(self.visit(node.target), self.visit(node.iter), self._block(node.body), [])

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        value = self._value(self.visit(node.test))
        if value is _UNKNOWN:
            raise TemplateError(f"kernel {self.definition.name}: {ast.unparse(node)} is not decided. Use select.")
        chosen: ast.AST = self.visit(node.body if value else node.orelse)
        return chosen

    def visit_If(self, node: ast.If) -> Any:
        test = self.visit(node.test)
        if (value := self._value(test)) is not _UNKNOWN:
            return self._block(node.body if value else node.orelse)
        return ast.If(test, self._block(node.body), self._block(node.orelse))


class _Known(ast.expr):
    """An expression whose value is an object: a tuple, a dataclass, an intrinsic."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def __deepcopy__(self, memo: Any) -> _Known:
        return _Known(self.value)
