"""From a template's Loop to machine code that is compiled once for each machine, not once for each process.

    Loop (closures) --inspect.getsource--> text of a module --import by name--> Numba --> address

The module is written into ``RAPYDLI_CACHE_DIR/kernels`` under the hash of all that its code depends on;
Numba keeps the machine code beside it and reloads it in milliseconds. Closures become functions,
their free variables become constants, the epilogue becomes a function of one element. The text is
never rewritten (Numba's index knows it by its time stamp) unless its last line, a hash of the rest,
says that it is damaged.
"""

from __future__ import annotations

import ast
import dis
import hashlib
import importlib.util
import inspect
import math
import os
import platform
import sys
import tempfile
import textwrap
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.registry import cpu_target

import rapydli_flow.random
from rapydli_flow.config import settings
from rapydli_flow.errors import SettingError, TemplateError
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, Scalar, Template

from .driver import Kernel, run_kernel

__all__ = ["Kernel", "compile_kernel", "host", "module_text", "run_kernel"]

# What the compiler may assume. Not that numbers are finite: what is not must stay so, to be detected. No estimates of
# quotients and roots, which vectors have but single elements do not, and no other order of sums: then an element has
# the same bits in a vector, in a loop's remainder, in place, and wherever its buffers lie.
FASTMATH = "{'nsz', 'contract'}"
HEAD = '''"""{title}

Made by cpu_kernels/compile.py; edit the template instead.
"""

from __future__ import annotations

import numpy
from numba import cfunc, njit
from cpu_kernels.driver import flat
{imports}
OPTIONS = {{"fastmath": {fastmath}, "error_model": "numpy", "boundscheck": False}}
INLINE = {{**OPTIONS, "forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}}
T = numpy.{dtype}
U = numpy.uint64
{constants}
'''


@cache
def host() -> Device:
    """This machine, as templates and the tuner see it. RAPYDLI_LANES overrides its vector length."""
    _, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    bits = {feature[1:] for feature in features.split(",") if feature.startswith("+")}
    vector = 64 if "avx512f" in bits else 32 if "avx2" in bits else 16
    lanes = settings().lanes
    return Device(
        kind="cpu",
        name=_cpu_name(),
        target=f"{cpu}-{hashlib.sha256(features.encode()).hexdigest()[:8]}",
        cores=len(os.sched_getaffinity(0)),
        vector_bytes=lanes * 4 if lanes else vector,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class _Text:
    """Collects what functions refer to: constants, imports and further functions, each under one name."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.imports: dict[str, str] = {}
        self.constants: dict[str, str] = {}
        self.functions: list[str] = []
        self._names: dict[str, Any] = dict.fromkeys(("numpy", "cfunc", "njit", "flat", "OPTIONS", "INLINE", "entry"))
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
            return self._import(name, f"import {value.__name__} as {name}")
        if isinstance(value, Epilogue):
            return self._once(value, lambda: self._epilogue(name, value))
        if isinstance(value, types.FunctionType):
            return self._once(value, lambda: self.function(value))
        if not isinstance(value, type) and callable(value) and not isinstance(value, np.dtype):
            function = getattr(value, "py_func", getattr(value, "_defn", value))
            module, actual = getattr(function, "__module__", None), getattr(function, "__name__", None)
            if module and actual and getattr(sys.modules.get(module), actual, None) is value:
                return self._import(name, f"from {module} import {actual}" + (f" as {name}" if name != actual else ""))
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
        new = {name: self.refer(name, value) for name, value in _references(function).items()}
        new = {name: other for name, other in new.items() if name != other}
        lines = text.splitlines()
        names = [n for part in node.body for n in ast.walk(part) if isinstance(n, ast.Name) and n.id in new]
        for n in sorted(names, key=lambda n: (n.lineno, -n.col_offset)):
            raw = lines[n.lineno - 1].encode()
            raw = raw[: n.col_offset] + new[n.id].encode() + raw[n.end_col_offset :]
            lines[n.lineno - 1] = raw.decode()
        lines[node.lineno - 1] = lines[node.lineno - 1].replace(f"def {node.name}(", f"def {known}(", 1)
        self.functions.append("\n".join(["@njit(**INLINE)", *lines[node.lineno - 1 :]]))
        return known

    def _epilogue(self, name: str, epilogue: Epilogue) -> str:
        known = self.claim(name, id(epilogue))
        scalar = epilogue.scalar
        at = {"element": "o", "channel": "k", "scalar": "0"}
        lines = [
            f"{parameter} = extras[{i}][{at[epilogue.reach(extra)]}]"
            for i, (parameter, extra) in enumerate(zip(scalar.parameters[1:], epilogue.extras, strict=True))
        ]
        if scalar.indexed:
            lines.append(f"index = {place(epilogue.out.shape)}")
        lines += [*scalar.lines, f"return {scalar.results[0]}"]
        for name, value in scalar_names(scalar).items():
            self.refer(name, value)
        head = f"@njit(**INLINE)\ndef {known}({scalar.parameters[0]}, extras, o, k, at):"
        self.functions.append("\n    ".join([head, *lines]))
        return known


def scalar_names(scalar: Scalar) -> dict[str, Any]:
    """What the lines of a pointwise formula may refer to, besides operands, ``T`` and ``index``."""
    return {"math": math, **{name: getattr(rapydli_flow.random, name) for name in scalar.uses}}


def written(text: str, **names: Any) -> Callable[..., None]:
    """A kernel function from source text, for bodies whose arguments depend on the op; ``names``: its globals."""
    space = dict(names)
    exec(compile(text, "<written>", "exec"), space)
    (function,) = (f for name, f in space.items() if name not in names and isinstance(f, types.FunctionType))
    function.source = text  # type: ignore[attr-defined]
    return function


def _references(function: types.FunctionType) -> dict[str, Any]:
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
        f"{name} = flat(buffers, {i}, {spec.size}, numpy.{spec.dtype})"
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
        fastmath=FASTMATH,
        dtype=dtype,
        constants="\n".join([*constants, f"TASKS = {tasks_text}"]),
    )
    body = top + "\n\n" + "\n\n\n".join(text.functions) + "\n"
    return f"{body}# end {_digest(body)}\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _whole(path: Path) -> bool:
    """Is this a generated module, to its last line?"""
    try:
        body, mark, end = path.read_text().rpartition("# end ")
    except (OSError, UnicodeDecodeError):
        return False
    return bool(mark) and end.strip() == _digest(body)


@cache
def _generator_key() -> str:
    """Hash of the code that every kernel contains or is made by, and of the compilers."""
    folder = Path(__file__).parent
    texts = [(folder / name).read_text() for name in ("compile.py", "driver.py", "tile.py")]
    texts.append(Path(rapydli_flow.random.__file__).read_text())
    versions = (platform.python_version(), numba.__version__, llvmlite.__version__)
    return _digest("\0".join([*texts, *versions]))


@cache
def _template_key(module: str, source: str) -> str:
    """Hash of the template's module and of those of this package that it takes names from."""
    found, stack = {module: source}, [module]
    while stack:
        for value in vars(sys.modules[stack.pop()]).values():
            name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            if isinstance(name, str) and name.startswith(f"{__package__}.") and name not in found:
                found[name] = inspect.getsource(sys.modules[name])
                stack.append(name)
    return _digest("\0".join(text for _, text in sorted(found.items())))


_kernels: dict[str, Kernel] = {}
_lock = threading.RLock()


def compile_kernel(
    template: Template,
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    device: Device | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    epilogue: Epilogue | None = None,
) -> Kernel:
    """The kernel of a template for an op on these specs (of the anchor op): compiled now, or found.

    Raises TemplateError for a config that does not fit, SettingError where kernels cannot be kept.
    """
    device = device or host()
    ins, outs = tuple(ins), tuple(outs)
    if config is None:
        config = template.default(op, ins, outs, device)
        if config is None:
            raise TemplateError(f"template {template.family}/{template.name} does not fit {', '.join(map(str, ins))}.")
    epilogue = epilogue or Epilogue.none(outs[0])
    owner = f"{template.family}/{template.name}"
    called = ", ".join(f"{name}={value}" for name, value in config.items())
    specs = f"{', '.join(map(str, ins))} -> {', '.join(map(str, outs))}"
    title = f"{owner}({called})\n\n{op}\n{specs}; epilogue {epilogue.scalar.lines} {list(map(str, epilogue.extras))}"
    parts = [
        _generator_key(),
        _template_key(template.build.__module__, template.source()),
        device.key,
        title,
        repr(epilogue),
    ]
    key = _digest("\0".join(parts))
    with _lock:
        if key not in _kernels:
            template.check(op, ins, outs, device, config)
            work = template.workspace(op, ins, outs, **config)
            buffers = (ins, outs, tuple(work), epilogue.extras, (Spec((2 * len(outs[0].shape),), "int64"),))
            name = f"rapydli_{template.family}_{template.name}_{key}"

            def write() -> str:
                loop = template.build(op, ins, outs, epilogue, **config)
                return module_text(loop, buffers, owner, title)

            module = _module(name, write)
            _kernels[key] = Kernel(
                address=module.entry.address,
                tasks=module.TASKS,
                buffers=tuple(spec for group in buffers for spec in group),
                key=key,
                module=name,
                template=template.name,
                config=tuple(config.items()),
                reloaded=module.entry.cache_hits > 0,
                entry=module.entry,
            )
        return _kernels[key]


def _module(name: str, write: Callable[[], str]) -> Any:
    """Import a generated module, written first if it is not there or damaged."""
    folder = settings().cache_dir / "kernels"
    path = folder / f"{name}.py"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # Numba imports the module by its name when it reloads the code
    if _whole(path):
        try:
            return _load(name, path)
        except TemplateError:
            raise
        except Exception:  # whatever a damaged cache makes of itself: compile again, once
            for left in (folder / "__pycache__").glob(f"{name}.*"):
                left.unlink(missing_ok=True)
    _store(path, write())
    return _load(name, path)


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _store(path: Path, text: str) -> None:
    """Write atomically; of several processes the first wins, and a whole file is never replaced."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        try:
            os.link(temporary, path)
        except OSError:  # it is there already, or this file system has no links
            if not _whole(path):
                os.replace(temporary, path)
                temporary = None
    except OSError as error:
        raise SettingError(
            f"kernels cannot be written to {path.parent} ({error.strerror or error}). "
            "Set RAPYDLI_CACHE_DIR to a folder that this process can write to."
        ) from error
    finally:
        if temporary is not None:
            os.unlink(temporary)
