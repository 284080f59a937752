"""The text of a kernel's module: closures become functions, their free variables constants.

What a body refers to is found in its code object; a function is written out after all that it refers to,
under a name that nothing else has. The epilogue becomes a function of one element. What a body calls `math` is
`cpu_kernels.functions`.
"""

from __future__ import annotations

import ast
import dis
import hashlib
import inspect
import math
import sys
import sysconfig
import textwrap
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import rapydli_flow.random
from rapydli_flow.errors import TemplateError
from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, Loop, Scalar

from . import functions

INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
PACKAGES = ("rapydli_flow", "cpu_kernels", "gpu_kernels")

HEAD = '''"""{title}

Made by cpu_kernels/text.py; edit the template instead.
"""

from __future__ import annotations

import numpy
from numba import cfunc
from cpu_kernels.buffer import flat
from cpu_kernels.inlined import OPTIONS, part
{imports}
T = numpy.{dtype}
U = numpy.uint64
{constants}
'''


class _Text:
    """Collects what functions refer to: constants, imports and further functions, each under one name."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.imports: dict[str, str] = {}
        self.constants: dict[str, str] = {}
        self.functions: list[str] = []
        used = ("numpy", "cfunc", "flat", "OPTIONS", "part", "entry")
        self._names: dict[str, Any] = dict.fromkeys(used)
        self._names |= {"T": "", "U": ""}
        self._done: dict[int, tuple[str, Any]] = {}  # the object is kept so that its id stays its own

    def claim(self, name: str, what: Any) -> str:
        """A name that means ``what``, and nothing else, in the module."""
        known, i = name, 2
        while known in self._names and self._names[known] != what:
            known, i = f"{name}_{i}", i + 1
        self._names[known] = what
        return known

    def refer(self, name: str, value: Any) -> str:
        """The name under which the module knows a value that a function calls ``name``."""
        if isinstance(value, types.ModuleType):
            return self._import(name, f"import {_in_kernels(value.__name__)} as {name}")
        if isinstance(value, Epilogue):
            return self._once(value, lambda: self._epilogue(name, value))
        if _jitted(value):
            value = value.py_func
        if isinstance(value, types.FunctionType):
            return self._once(value, lambda: self.function(value))
        if not isinstance(value, type) and callable(value) and not isinstance(value, np.dtype):
            function = getattr(value, "py_func", getattr(value, "_defn", value))
            module, actual = getattr(function, "__module__", None), getattr(function, "__name__", None)
            if module and actual and getattr(sys.modules.get(module), actual, None) is value:
                line = f"from {_in_kernels(module)} import {actual}"
                return self._import(name, line if name == actual else f"{line} as {name}")
            raise TemplateError(f"template {self.owner}: {name} ({value!r}) cannot be imported from a module.")
        try:
            text = literal(value)
        except TypeError:
            raise TemplateError(
                f"template {self.owner}: {name} is a {type(value).__name__}, which cannot become a constant. "
                "Kernels may refer to numbers, tuples, dtypes, small arrays, functions and the epilogue."
            ) from None
        if name in ("T", "U") and self._names[name] in ("", text):
            self._names[name] = text  # the template's own T replaces the usual one
            self.constants[name] = text
            return name
        known = self.claim(name, text)
        self.constants[known] = text
        return known

    def _import(self, name: str, line: str) -> str:
        known = self.claim(name, line)
        self.imports[known] = line if known == name else f"{line.partition(' as ')[0]} as {known}"
        return known

    def _once(self, value: Any, write: Callable[[], str]) -> str:
        if id(value) not in self._done:
            self._done[id(value)] = (write(), value)
        return self._done[id(value)][0]

    def function(self, function: types.FunctionType) -> str:
        """Write a function, after all that it refers to; its name in the module."""
        if function.__name__ == "<lambda>":
            raise TemplateError(f"template {self.owner}: a lambda cannot become a kernel function. Use def.")
        text = getattr(function, "source", None) or textwrap.dedent(inspect.getsource(function))
        tree = ast.parse(text)
        (node,) = (n for n in tree.body if isinstance(n, ast.FunctionDef))
        known = self.claim(function.__name__, id(function))
        self._done[id(function)] = (known, function)
        new = {name: self.refer(name, value) for name, value in references(function).items()}
        new = {name: other for name, other in new.items() if name != other}
        names = [n for part in node.body for n in ast.walk(part) if isinstance(n, ast.Name) and n.id in new]
        lines = replaced(text.splitlines(), [(n, new[n.id]) for n in names])
        lines[node.lineno - 1] = lines[node.lineno - 1].replace(f"def {node.name}(", f"def {known}(", 1)
        self.functions.append("\n".join(["@part", *lines[node.lineno - 1 :]]))
        return known

    def _epilogue(self, name: str, epilogue: Epilogue) -> str:
        known = self.claim(name, id(epilogue))
        scalar = epilogue.scalar
        at = {"element": "o", "source": "o", "channel": "k", "scalar": "0"}
        lines = [
            f"{parameter} = extras[{i}][{at[epilogue.reach(extra)]}]"
            for i, (parameter, extra) in enumerate(zip(scalar.parameters[1:], epilogue.extras, strict=True))
        ]
        if scalar.indexed:
            lines.append(f"index = {place(epilogue.out.shape)}")
        lines += [*scalar.lines, f"return {scalar.results[0]}"]
        for name, value in scalar_names(scalar).items():
            self.refer(name, value)
        head = f"@part\ndef {known}({scalar.parameters[0]}, extras, o, k, at):"
        self.functions.append("\n    ".join([head, *lines]))
        return known


def _jitted(value: Any) -> bool:
    """Is this a function that a user compiles with Numba? It is written out like a plain one: a module that is
    imported later could hold another."""
    function = getattr(value, "py_func", None)
    return isinstance(function, types.FunctionType) and function.__module__.partition(".")[0] not in PACKAGES


def _in_kernels(module: str) -> str:
    """The module that a kernel imports for another."""
    return functions.__name__ if module == "math" else module


def scalar_names(scalar: Scalar) -> dict[str, Any]:
    """What the lines of a pointwise formula may refer to, besides operands, ``T`` and ``index``."""
    return {"math": math, **{name: getattr(rapydli_flow.random, name) for name in scalar.uses}}


def replaced(lines: Sequence[str], changes: Sequence[tuple[ast.expr, str]]) -> list[str]:
    """Lines in which expressions, each on one line, are other text."""
    out = list(lines)
    for node, new in sorted(changes, key=lambda change: (change[0].lineno, -change[0].col_offset)):
        raw = out[node.lineno - 1].encode()
        out[node.lineno - 1] = (raw[: node.col_offset] + new.encode() + raw[node.end_col_offset :]).decode()
    return out


def written(text: str, **names: Any) -> Callable[..., None]:
    """A kernel function from source text, for bodies whose arguments depend on the op; ``names``: its globals."""
    space = dict(names)
    exec(compile(text, "<written>", "exec"), space)
    (function,) = (f for name, f in space.items() if name not in names and isinstance(f, types.FunctionType))
    function.source = text  # type: ignore[attr-defined]
    return function


def references(function: types.FunctionType) -> dict[str, Any]:
    """Free variables and globals that the code of a function reads, builtins left out."""
    code = function.__code__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    found = {name: cell.cell_contents for name, cell in cells}
    stack = [code]
    while stack:
        part = stack.pop()
        stack += [c for c in part.co_consts if isinstance(c, types.CodeType)]
        loads = [i.argval for i in dis.get_instructions(part) if i.opname == "LOAD_GLOBAL"]
        found |= {name: function.__globals__[name] for name in loads if name in function.__globals__}
    return found


def written_out(function: types.FunctionType, owner: str) -> str:
    """A function and all that it refers to, as text: where two are equal, so is what they compute.

    Of a module that is not installed but lies beside the user's own, the text is part of it.
    """
    text = _Text(owner)
    text.function(function)
    parts = [*text.imports.values(), *(f"{k} = {v}" for k, v in text.constants.items()), *text.functions]
    for name in sorted(line.split()[1] for line in text.imports.values()):
        file = getattr(sys.modules.get(name), "__file__", None) or ""
        if file.endswith(".py") and not file.startswith(INSTALLED):
            parts.append(inspect.getsource(sys.modules[name]))
    return "\n".join(parts)


def literal(value: Any) -> str:
    """Source text of a constant; TypeError for what is not one."""
    if isinstance(value, np.ndarray):
        return f"numpy.array({value.tolist()!r}, numpy.{value.dtype.name})"
    if isinstance(value, np.dtype):
        return f"numpy.dtype({value.name!r})"
    if isinstance(value, type) and issubclass(value, np.generic):
        return f"numpy.{np.dtype(value).name}"
    if isinstance(value, np.generic):
        return f"numpy.{value.dtype.name}({literal(value.item())})"
    if isinstance(value, tuple):
        return f"({''.join(literal(v) + ', ' for v in value).rstrip()})"
    if isinstance(value, float) and not np.isfinite(value):
        return f"float({str(value)!r})"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    raise TypeError(type(value).__name__)


def place(shape: Sequence[int], o: str = "o", at: str = "at") -> str:
    """Text of the uint64 index, in the whole array, of local offset ``o`` in a block of ``shape``."""
    text, n, below = "0", len(shape), 1
    factors = []
    for size in reversed(shape):
        factors.append((below, size))
        below *= max(1, size)
    for axis, (step, size) in enumerate(reversed(factors)):
        inside = f"{o} // {step} % {size}" if axis else f"{o} // {step}"
        text = f"({text}) * {at}[{n + axis}] + {at}[{axis}] + {inside}" if axis else f"{at}[0] + {inside}"
    return f"U({text})"


def module_text(loop: Loop, buffers: Sequence[Sequence[Spec]], owner: str, title: str) -> str:
    """The generated module: constants, functions, entry. ``buffers``: specs of ins, outs, work, extras, at."""
    text = _Text(owner)
    ins, outs, work, extras, at = buffers
    phases = []
    for body, tasks in ((loop.before, loop.before_tasks), (loop.body, loop.tasks)):
        if body is not None:
            if not isinstance(body, types.FunctionType):
                raise TemplateError(f"template {owner}: the body of a Loop is a plain function, not {body!r}.")
            phases.append((text.refer("body", body), tasks))
    names = [f"{kind}_{i}" for kind, specs in (("in", ins), ("out", outs), ("work", work)) for i in range(len(specs))]
    every = [f"extra_{i}" for i in range(len(extras))]
    lines = [
        f"{name} = flat(buffers, {i}, numpy.{spec.dtype})"
        for i, (name, spec) in enumerate(zip([*names, *every, "at"], [*ins, *outs, *work, *extras, *at], strict=True))
    ]
    lines.append(f"extras = ({''.join(f'{name}, ' for name in every).rstrip()})")
    calls = ", ".join([*names, "extras", "at"])
    first = 0
    for i, (body, tasks) in enumerate(phases):
        if i + 1 < len(phases):
            lines.append(f"if task < {first + tasks}:\n        return {body}(task - {first}, {calls})")
        else:
            lines.append(f"{body}(task{f' - {first}' if first else ''}, {calls})")
        first += tasks
    head = '@cfunc("void(int64, CPointer(int64))", cache=True, **OPTIONS)\ndef entry(task, buffers):'
    text.functions.append("\n    ".join([head, *lines]))
    tasks_text = literal(tuple(tasks for _, tasks in phases))
    dtype = outs[0].dtype
    usual = {"T": f"numpy.{dtype}", "U": "numpy.uint64"}
    constants = [f"{k} = {v}" for k, v in text.constants.items() if usual.get(k) != v]
    top = HEAD.format(
        title=title,
        imports="".join(f"{line}\n" for line in text.imports.values()),
        dtype=dtype,
        constants="\n".join([*constants, f"TASKS = {tasks_text}"]),
    )
    body = top + "\n\n" + "\n\n\n".join(text.functions) + "\n"
    return f"{body}# end {digest(body)}\n"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
