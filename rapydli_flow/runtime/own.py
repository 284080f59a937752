"""Operators and kernels of a user's own: other processes need the modules that define them, or the code itself."""

from __future__ import annotations

import importlib
import io
import linecache
import marshal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.machinery import PathFinder
from types import CodeType
from typing import Any

import cloudpickle
from distributed import Client
from numba import njit
from numba.core.dispatcher import Dispatcher

from ..errors import MissingDependency
from ..graph import Graph
from ..ops import Op
from ..scheduler import Program
from ..template import Device, Template, adopt
from ..tuner import Request

OURS = ("rapydli_flow.", "cpu_kernels.", "gpu_kernels.")


def bring(client: Client, addresses: Sequence[str], wanted: Mapping[str, Defined]) -> None:
    """Import modules on the scheduler and on workers, before anything is sent that needs them.

    Raises MissingDependency with what is defined in a module that is not there, and the way out.
    """
    if not wanted:
        return
    asked = {module: defined.name for module, defined in wanted.items()}
    templates = {module: name for module, name in asked.items() if wanted[module].template}
    found = {"the scheduler": client.run_on_scheduler(missing, {k: v for k, v in asked.items() if k not in templates})}
    found |= {f"worker {at}": e for at, e in client.run(missing, asked, workers=list(addresses)).items()}
    for place, errors in found.items():
        for module, error in errors.items():
            file = f"{module.rpartition('.')[2]}.py"
            raise MissingDependency(
                f"{wanted[module].what} is defined in module {module!r}, but {place} does not have it there ({error}). "
                f"Put it into a module that workers can import: install it, or use client.upload_file({file!r})."
            )


@dataclass(frozen=True)
class Defined:
    """Something of a user's own: what it is, and what its module calls it."""

    what: str
    name: str
    template: bool = False


def defined_outside(graph: Graph, programs: Sequence[Program]) -> dict[str, Defined]:
    """The modules of ops and templates that are not of this package, and what each defines.

    Ops of a notebook or script are not among them: their classes travel with the graph. Templates do not, nor do
    stencils, which have one.
    """
    out: dict[str, Defined] = {}
    for node in graph:
        for kind in [type(op) for op in _ops(node.op)]:
            if (kind.__module__ != "__main__" or kind.by_name) and "<locals>" not in kind.__qualname__:
                out.setdefault(kind.__module__, Defined(f"the op {kind.name!r}", kind.__qualname__))
    for half in (half for program in programs for half in program.halves):
        for request, choice in half.requests:
            if not choice.reference:
                template = choice.find(request, half.device)
                what = f"the template {template.family}/{template.name}"
                out.setdefault(template.build.__module__, Defined(what, template.build.__qualname__, True))
    return {module: defined for module, defined in out.items() if not module.startswith(OURS)}


def _ops(op: Any) -> list[Op]:
    """An op, and those that are attributes of it."""
    if not isinstance(op, Op):
        return []
    inner = [each for f in fields(op) for each in _ops(getattr(op, f.name))]  # type: ignore[arg-type]
    return [op, *inner]


def missing(names: Mapping[str, str]) -> dict[str, str]:
    """On a worker: what goes wrong when something is taken from its module, by module."""
    errors: dict[str, str] = {}
    for module, name in names.items():
        try:
            where: Any = importlib.import_module(module)
            for part in name.partition(".<locals>")[0].split("."):
                where = getattr(where, part)
        except Exception as error:  # whatever a module of the user's does here
            errors[module] = f"{type(error).__name__}: {error}"
    return errors


@dataclass(frozen=True)
class Carried:
    """A request with the templates of a user's own that may serve it, for another process of this machine.

    ``sources``: by template the text that is part of its kernels' keys; ``lines``: files that only this process has.
    """

    request: Request
    templates: tuple[Template, ...]
    sources: tuple[str, ...]
    lines: Mapping[str, tuple[str, ...]]


def carry(request: Request, device: Device) -> bytes:
    """The request as bytes. What the other process could not import is in them by value."""
    found = [t for t in request.templates(device) if not t.build.__module__.startswith(OURS)]
    files = {t.build.__code__.co_filename for t in found}
    lines = {file: tuple(linecache.getlines(file)) for file in files}
    carried = Carried(request, tuple(found), tuple(t.source() for t in found), lines)
    modules = {t.build.__module__ for t in found} | {type(op).__module__ for op in _ops(request.whole or request.op)}
    shipped = [sys.modules[m] for m in modules if not m.startswith(OURS) and m != "__main__" and not _importable(m)]
    for module in shipped:
        cloudpickle.register_pickle_by_value(module)
    try:
        _Carrier(into := io.BytesIO()).dump(carried)
        return into.getvalue()
    finally:
        for module in shipped:
            cloudpickle.unregister_pickle_by_value(module)


class _Carrier(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles ops that other processes know by name by value, where they could not find the name."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Op) and obj.by_name and not _found_elsewhere(type(obj)):
            return obj.by_value()  # type: ignore[attr-defined]
        if isinstance(obj, Dispatcher) and not _importable(obj.py_func.__module__):
            return njit, (obj.py_func,)  # Numba's own way loses where the text is
        if isinstance(obj, CodeType):  # cloudpickle's too
            return marshal.loads, (marshal.dumps(obj),)
        return super().reducer_override(obj)


def unpack(data: bytes) -> Request:
    """In the other process: the request, its templates registered."""
    carried: Carried = cloudpickle.loads(data)
    for file, lines in carried.lines.items():
        if file not in linecache.cache:
            linecache.cache[file] = (sum(map(len, lines)), None, list(lines), file)
    for template, source in zip(carried.templates, carried.sources, strict=True):
        adopt(template, source)
    return carried.request


def _found_elsewhere(kind: type) -> bool:
    """Would another process find a class under its name?"""
    here: Any = sys.modules.get(kind.__module__)
    for part in kind.__qualname__.split("."):
        here = getattr(here, part, None)
    return here is kind and _importable(kind.__module__)


def _importable(module: str) -> bool:
    """Would another process with the same path find the same file under this name?"""
    if module == "__main__":
        return False
    path: Any = None
    for i, _ in enumerate(parts := module.split("."), 1):
        spec = PathFinder.find_spec(".".join(parts[:i]), path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return spec is not None and spec.origin == getattr(sys.modules[module], "__file__", None)
