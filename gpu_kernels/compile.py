"""Cubins without a GPU: numba-cuda as the compiler, `cuda.core`'s linker, and a cache on disk.

A kernel goes text -> LTO-IR -> cubin, the one path on which launch bounds and register limits hold. The
assembler's report (registers, shared memory, spills, warnings) is part of the result, so that hard
constraints can be checked on any machine. Cubins are kept under ``settings().cache_dir/"cubins"``, or in a folder
that is carried to a machine with a GPU and no compiler: there a cubin of any compiler version will do.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rapydli_flow import random, winograd
from rapydli_flow.config import settings
from rapydli_flow.errors import MissingDependency, TemplateError
from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Epilogue, Template

from .grid import Grid, TensorMap, grids_of
from .pair import stored_type
from .specialise import flatten

_ELSEWHERE = ("card", "emulate", "emulated", "launch")  # what they say does not change machine code
ATTEMPTS = 3  # to link a kernel
_COMPLAINTS = r"[^\n]*\(C\d+\)[^\n]*|[^\n]*[Ii]nsufficient registers[^\n]*"
Capability = tuple[int, int] | tuple[int, int, str]


@dataclass(frozen=True)
class Cubin:
    """Machine code of one kernel, how to launch it, and what it takes of a multiprocessor."""

    code: bytes
    target: str
    entry: str
    grid: int
    block: int
    dynamic_bytes: int
    pointers: int
    registers: int = 0
    shared_bytes: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0
    warnings: tuple[str, ...] = ()
    maps: tuple[TensorMap, ...] = ()  # arguments after the pointers: descriptors of arrays

    @property
    def clean(self) -> bool:
        """Nothing spilled, no complaint of the assembler. (A cosine's slow path has a stack of its own.)"""
        return not (self.spill_bytes or self.warnings)

    def report(self) -> dict[str, Any]:
        """Everything but the code."""
        described = asdict(replace(self, code=b""))
        del described["code"]
        return {**described, "size_bytes": len(self.code)}


def capability_of(target: str) -> Capability:
    """'sm_90a' -> (9, 0, 'a')"""
    found = re.fullmatch(r"sm_(\d+)(\d)([a-z]?)", target)
    if found is None:
        raise TemplateError(f"{target!r} is not the name of a GPU architecture. Write 'sm_80' or 'sm_90a'.")
    major, minor = int(found[1]), int(found[2])
    return (major, minor, found[3]) if found[3] else (major, minor)


@dataclass(frozen=True)
class Request:
    """A template's kernel for one op, config and card: what a cubin is the answer to."""

    template: Template
    op: Any
    ins: tuple[Spec, ...]
    outs: tuple[Spec, ...]
    epilogue: Epilogue
    config: Config
    target: str

    @property
    def key(self) -> str:
        """Equal keys have equal machine code, if compiled by the same compiler."""
        e = self.epilogue
        parts = [
            self.template.family,
            self.template.name,
            self.template.source(),
            *(f"{module} {text}" for module, text in sources(self.template.build.__module__)),
            *map(str, (self.op, *self.ins, "->", *self.outs)),
            repr((e.scalar, [str(x) for x in e.extras], str(e.out))),
            repr(getattr(self.op, "scalar", lambda: None)() if self.template.family == "pointwise" else None),
            json.dumps(dict(self.config), sort_keys=True),
            self.target,
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    @property
    def work(self) -> tuple[Spec, ...]:
        """The workspace of one call."""
        return tuple(self.template.workspace(self.op, self.ins, self.outs, **self.config))

    def grids(self) -> tuple[Grid, ...]:
        """The kernels of one call, in their order."""
        return grids_of(self.template.build(self.op, self.ins, self.outs, self.epilogue, **self.config))


@cache
def _texts() -> Mapping[str, str]:
    """Every module of this package that has a say in machine code."""
    found = {path.stem: path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))}
    own = {name: text for name, text in found.items() if name not in _ELSEWHERE}
    return own | {module.__name__: inspect.getsource(module) for module in (random, winograd)}  # written into kernels


@cache
def sources(module: str) -> tuple[tuple[str, str], ...]:
    """What a kernel of a module of this package depends on: the module, what it imports, and what compiles it.

    All of the package, where the module defines no template itself, but makes those of others, or is not of it.
    """
    package, _, name = module.rpartition(".")
    if package != __package__ or "\n@template(" not in _texts().get(name, ""):
        return tuple(_texts().items())
    reached, new = set(), {name, "compile", random.__name__}
    while new:
        reached |= new
        named = {each for known in new for each in _imported(_texts()[known])}
        new = (named & set(_texts())) - reached
    return tuple((each, _texts()[each]) for each in sorted(reached))


def _imported(text: str) -> Iterator[str]:
    """The modules of this package that a text imports, and those of others by their whole names."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    for package in ("numba_cuda", "cuda.core"):
        try:
            found = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return (
                f"compiling GPU kernels needs the package {package.replace('numba_', 'numba-').replace('.', '-')}, "
                "which is not installed. pip install 'rapydli-flow[cuda12]' (or cuda13, as the driver says)."
            )
    return None


@cache
def compiler() -> str:
    """The versions that a cubin depends on; MissingDependency where there is no compiler."""
    if why := missing():
        raise MissingDependency(why)
    names = ("numba", "numba-cuda", "llvmlite", "cuda-core", "numpy", "nvidia-nvjitlink-cu12", "nvidia-nvjitlink")
    versions = importlib.import_module("importlib.metadata")

    def version(name: str) -> str:
        try:
            return str(versions.version(name))
        except versions.PackageNotFoundError:
            return "none"

    return " ".join(f"{name} {version(name)}" for name in names)


def kept(request: Request, folder: Path | None = None) -> bool:
    """Are the cubins of a call in the cache, or in a folder, so that nothing need be compiled?"""
    folder = folder or settings().cache_dir / "cubins"
    return any(folder.glob(f"{request.key}-*.json")) if missing() else _path(request, folder).exists()


def _path(request: Request, folder: Path) -> Path:
    """Where this compiler's cubins of a call are kept."""
    return folder / f"{request.key}-{hashlib.sha256(compiler().encode()).hexdigest()[:8]}.json"


def cubins(request: Request, folder: Path | None = None) -> tuple[Cubin, ...]:
    """One for each kernel of a call: from the cache, else compiled and kept there.

    ``folder``: one that was carried here.
    """
    carried, folder = folder is not None, folder or settings().cache_dir / "cubins"
    why = missing()
    found = sorted(folder.glob(f"{request.key}-*.json")) if carried or why else []
    if found:
        return _read(found[0])
    if why:
        raise MissingDependency(f"{why} Or carry compiled kernels: none for {request.key} is in {folder}.")
    path = _path(request, folder)
    if path.exists():
        return _read(path)
    specs = {"ins": request.ins, "outs": request.outs, "work": request.work, "extras": request.epilogue.extras}
    grids = request.grids()
    # some come again and again
    once = {grid: compile_grid(grid, **specs, target=request.target) for grid in dict.fromkeys(grids)}
    made = tuple(once[grid] for grid in grids)
    _write(path, made)
    return made


def _read(path: Path) -> tuple[Cubin, ...]:
    described = json.loads(path.read_text())
    whole, first, out = path.with_suffix(".cubin").read_bytes(), 0, []
    for each in described:
        size = each.pop("size_bytes")
        maps = tuple(TensorMap.read(one) for one in each["maps"])
        code = whole[first : first + size]
        out.append(Cubin(**{**each, "warnings": tuple(each["warnings"]), "maps": maps, "code": code}))
        first += size
    return tuple(out)


def _write(path: Path, made: Sequence[Cubin]) -> None:
    """The code first: a description that is there has its code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    code, reports = b"".join(one.code for one in made), json.dumps([one.report() for one in made]).encode()
    for target, data in ((path.with_suffix(".cubin"), code), (path, reports)):
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, target)


def entry_of(code: bytes, log: str) -> str:
    """The name of the kernel in a cubin: as the assembler tells, else from the names of its sections."""
    found = re.search(r"entry function '([^']+)'", log) or re.search(r"\0\.text\.([^\0]+)\0", code.decode("latin-1"))
    if found is None:
        raise TemplateError(f"the assembler names no kernel: {log}")
    return found[1]


def compile_grid(
    grid: Grid,
    *,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    work: Sequence[Spec] = (),
    extras: Sequence[Spec] = (),
    target: str = "sm_90a",
) -> Cubin:
    """Compile a kernel for a card that need not be here."""
    compiler()
    if not hasattr(np, "row_stack"):  # gone from NumPy 2.5, still named by numba-cuda 0.30
        np.row_stack = np.vstack
    from cuda.core import Linker, LinkerOptions, ObjectCode
    from numba import cuda
    from numba.cuda import types

    counts = {"ins": len(ins), "outs": len(outs), "work": len(work), "extras": len(extras)}
    flat = flatten(grid.kernel, **counts, maps=len(grid.maps))
    pointers = [types.CPointer(stored_type(spec.dtype)) for spec in (*ins, *outs, *work, *extras)]
    signature = types.void(*pointers, types.CPointer(types.int64), *[types.CPointer(types.uint64)] * len(grid.maps))
    ltoir, _ = cuda.compile(
        flat.function(cuda=cuda),
        signature,
        device=False,
        abi="numba",
        cc=capability_of(target),
        output="ltoir",
        launch_bounds=(grid.block, grid.resident),
    )
    options = LinkerOptions(arch=target, link_time_optimization=True, ptxas_options=["-v"])
    for _ in range(ATTEMPTS):  # where many processes compile, some reports are empty
        linker = Linker(ObjectCode.from_ltoir(ltoir), options=options)
        try:
            code = bytes(linker.link("cubin").code)
        except Exception as problem:  # cuda.core's own classes differ by version; a kernel that fails is pruned
            raise TemplateError(f"the assembler refuses this kernel for {target}: {problem}") from problem
        log = linker.get_info_log() + linker.get_error_log()
        if log:
            break

    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, log)))

    return Cubin(
        code,
        target,
        entry_of(code, log),
        grid.grid,
        grid.block,
        grid.shared_bytes,
        len(flat.parameters) - len(grid.maps),
        registers=number(r"Used (\d+) registers"),
        shared_bytes=number(r"(\d+) bytes smem"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        spill_bytes=number(r"(\d+) bytes spill"),
        warnings=tuple(re.findall(_COMPLAINTS, log)) if log else ("the assembler told nothing of this kernel",),
        maps=grid.maps,
    )
