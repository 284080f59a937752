"""What a result depends on beside its request and device: the template's code, and the compilers.

    build --names--> functions, classes, constants of this project --names--> ... ==> source_key

The walk begins at the template's build function and follows what its code names. ``space``, ``fits`` and ``prefer``
are not named there: with other values to try, or another template in the same module, results stay. So they do with
other comments, docstrings and line breaks.
"""

from __future__ import annotations

import ast
import hashlib
import linecache
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

from ..template import PACKAGES, Template

OURS = {"rapydli_flow", *PACKAGES.values()}
LIBRARIES = {"cpu": ("numba", "llvmlite"), "cuda": ("numba-cuda",)}


@cache
def compilers(kind: str) -> str:
    """The versions that make kernels for a kind of device: 'numba 0.68.1, llvmlite 0.50.0, python 3.11'."""
    python = f"python {sys.version_info.major}.{sys.version_info.minor}"
    return ", ".join([*map(_version, LIBRARIES[kind]), python])


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def source_key(template: Template) -> str:
    """Hash of all code of this project that the template's build function reaches. Functions of one name but
    other code, such as a cell that was run again, have other keys. A build that is made, not written, says itself
    what it means."""
    meaning: Callable[[], str] | None = getattr(template.build, "meaning", None)
    return _key(template.build) if meaning is None else hashlib.sha256(meaning().encode()).hexdigest()[:16]


@cache
def _key(build: Callable[..., Any]) -> str:
    walk = _Walk(build)
    return hashlib.sha256("\0".join(walk.texts).encode()).hexdigest()[:16]


class _Walk:
    """The texts of everything reached, in the order in which it is met."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self.packages = OURS | {_package(build)}
        self.build = build
        self.texts: list[str] = []
        self.seen: dict[int, Any] = {}  # kept alive: an id is only unique among the living
        self.visit(build)

    def visit(self, value: Any, name: str = "") -> None:
        """Add the text of a value, and of what it reaches. ``name``: what it is called where it was found."""
        if id(value) in self.seen:
            return
        if isinstance(value, (Mapping, tuple, list, partial)):
            self.seen[id(value)] = value
            for part, item in _parts(value):
                self.visit(item, f"{name}[{part!r}]")
        elif not self._is_ours(value):
            self.texts.append(_constant(value, name))
        else:
            self.seen[id(value)] = value
            if isinstance(value, FunctionType):
                self._function(value)
            elif isinstance(value, type):
                self._class(value)
            elif callable(inner := getattr(value, "__wrapped__", None)):  # functools.cache, and functions of Numba
                self.visit(inner, name)
            else:  # an object
                self.texts.append(_constant(value, name))
                self.visit(type(value))

    def _is_ours(self, value: Any) -> bool:
        named = isinstance(value, (FunctionType, type)) or hasattr(value, "__wrapped__")
        return not isinstance(value, ModuleType) and _package(value if named else type(value)) in self.packages

    def _function(self, function: FunctionType) -> None:
        self.texts.append(_text(function.__code__, bare=function is self.build))
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.visit(value, "default")
        for cell_name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                self.visit(cell.cell_contents, cell_name)
            except ValueError:  # a cell that is filled later
                self.texts.append(f"{cell_name}: empty")
        self._names(_names(function.__code__), function.__globals__)

    def _class(self, cls: type) -> None:
        for base in cls.__bases__:
            self.visit(base)
        text, names = _class_text(cls)
        self.texts.append(text)
        self._names(names, vars(sys.modules.get(cls.__module__, sys)))
        for name, value in vars(cls).items():
            method = getattr(value, "__func__", getattr(value, "fget", getattr(value, "func", value)))
            if not isinstance(method, FunctionType):
                if not text and not name.startswith("_"):
                    self.visit(value, name)
            elif method.__globals__.get("__name__", "").partition(".")[0] in self.packages:
                if not text and method.__code__.co_filename != "<string>":  # else dataclass wrote it
                    self.texts.append(_code(method.__code__))
                self._names(_names(method.__code__), method.__globals__)

    def _names(self, names: Mapping[str, None], scope: Mapping[str, Any]) -> None:
        for name in names:
            if name not in scope or _state(name, scope[name]):
                continue
            value = scope[name]
            self.visit(value, name)
            if isinstance(value, ModuleType) and value.__name__.partition(".")[0] in self.packages:
                self._names({n: None for n in names if n != name}, vars(value))  # module.function


def _package(value: Any) -> str:
    return (getattr(value, "__module__", None) or "").partition(".")[0]


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    """What a container or a partial function holds, each with what it is called there."""
    if isinstance(value, Mapping):
        return value.items()
    return enumerate((value.func, value.args, value.keywords) if isinstance(value, partial) else value)


def _state(name: str, value: Any) -> bool:
    """Is this a memory of a module, which changes while it works? Constants have upper-case names."""
    return isinstance(value, (dict, list, set, bytearray)) and not name.isupper()


def _constant(value: Any, name: str) -> str:
    """Name and value, the same in every process: without addresses, paths and the order of sets."""
    if isinstance(value, (set, frozenset)):
        text = str(sorted(map(repr, value)))
    elif isinstance(value, np.ndarray):  # its repr leaves out the middle
        text = f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    else:
        text = value.__name__ if isinstance(value, ModuleType) else repr(value)
    return f"{name} = {re.sub(r' at 0x[0-9a-f]+', '', text)}"


@cache
def _text(code: CodeType, *, bare: bool) -> str:
    """The syntax of a function, or its code where there is no text. ``bare``: without its ``@template(...)``."""
    tree = _definition(code.co_filename, code.co_name, code.co_firstlineno)
    if tree is None:  # no file, or a lambda
        return _code(code)
    if bare:
        kept = [d for d in tree.decorator_list if not ast.unparse(d).partition("(")[0].endswith("template")]
        tree = copy(tree)
        tree.decorator_list = kept
    return ast.dump(tree)


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definition(file: str, name: str, line: int) -> Definition | None:
    """The syntax, without docstrings, of a function by its name and first line, or of a class by its qualified name."""
    linecache.checkcache(file)
    return _definitions(tuple(linecache.getlines(file))).get((name, line))


@cache
def _definitions(lines: tuple[str, ...]) -> dict[tuple[str, int], Definition]:
    """All functions and classes of a file: one parse for all of them is far faster than one for each."""
    try:
        tree = ast.parse("".join(lines))
    except SyntaxError:  # changed since it was imported
        return {}
    found: dict[tuple[str, int], Definition] = {}

    def visit(node: ast.AST, above: str) -> None:
        for child in ast.iter_child_nodes(node):
            inside = above
            if isinstance(child, Definition):
                name = above + child.name
                is_class = isinstance(child, ast.ClassDef)
                inside = f"{name}." if is_class else f"{name}.<locals>."
                line = min(d.lineno for d in (child, *child.decorator_list))
                found.setdefault((name, 0) if is_class else (child.name, line), child)
                if ast.get_docstring(child, clean=False) is not None:
                    child.body = child.body[1:] or [ast.Pass()]
            visit(child, inside)

    visit(tree, "")
    return found


@cache
def _class_text(cls: type) -> tuple[str, Mapping[str, None]]:
    """The syntax of a class, and the names that it reads while it is made: bases, decorators, types and defaults of
    fields. Nothing where there is no text."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    tree = None if file is None else _definition(file, cls.__qualname__, 0)
    if tree is None:
        return "", {}
    return ast.dump(tree), dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))


def _code(code: CodeType) -> str:
    """What a function does, without where it stands."""
    consts = [_code(c) if isinstance(c, CodeType) else _constant(c, "") for c in code.co_consts]
    return f"{code.co_name} {code.co_code.hex()} {consts} {code.co_names} {code.co_varnames} {code.co_freevars}"


def _names(code: CodeType) -> dict[str, None]:
    """The names that a function uses, those of functions inside it too."""
    found = dict.fromkeys(code.co_names)
    for const in code.co_consts:
        if isinstance(const, CodeType):
            found |= _names(const)
    return found
