"""From a template's Loop to machine code that is compiled once for each machine, not once for each process.

    Loop (closures) --inspect.getsource--> text of a module --import by name--> Numba --> address

The module is written into ``RAPYDLI_CACHE_DIR/kernels`` under the hash of all that its code depends on;
Numba keeps the machine code beside it and reloads it in milliseconds. Closures become functions,
their free variables become constants, the epilogue becomes a function of one element. The text is
never rewritten (Numba's index knows it by its time or its text) unless its last line, a hash of the rest,
says that it is damaged.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import linecache
import os
import platform
import re
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.errors import NumbaError
from numba.core.registry import cpu_target

import rapydli_flow.random
from rapydli_flow.config import settings
from rapydli_flow.errors import SettingError, TemplateError
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Template

from .driver import Kernel, run_kernel
from .text import digest, module_text
from .tile import registers

__all__ = ["Asked", "Kernel", "ask", "compile_kernel", "host", "kept", "module_text", "run_kernel"]


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
        vector_registers=registers(lanes * 4 if lanes else vector),
        **_caches(),
    )


def _caches() -> dict[str, int]:
    """Bytes of a core's first and second level of data cache, as Linux tells them; nothing where it does not."""
    found = {}
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if level in ("1", "2") and kind != "Instruction" and size.endswith("K"):
            found[f"l{level}_bytes"] = int(size[:-1]) << 10
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _whole(path: Path) -> bool:
    """Is this a generated module, to its last line?"""
    try:
        body, mark, end = path.read_text().rpartition("# end ")
    except (OSError, UnicodeDecodeError):
        return False
    return bool(mark) and end.strip() == digest(body)


@cache
def _generator_key() -> str:
    """Hash of the code that every kernel contains or is made by, and of the compilers."""
    folder = Path(__file__).parent
    parts = ("compile.py", "buffer.py", "functions.py", "inlined.py", "text.py", "driver.py", "tile.py", "stencil.py")
    texts = [(folder / name).read_text() for name in parts]
    texts.append(Path(rapydli_flow.random.__file__).read_text())
    versions = (platform.python_version(), numba.__version__, llvmlite.__version__)
    return digest("\0".join([*texts, *versions]))


@cache
def _template_key(module: str, source: str) -> str:
    """Hash of the template's module and of those of this package that it takes names from."""
    found, stack = {module: source}, [module]
    while stack:
        # a module that is not here: its template came from another process, by value
        for value in vars(sys.modules.get(stack.pop(), types)).values():
            name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            if isinstance(name, str) and name.startswith(f"{__package__}.") and name not in found:
                found[name] = inspect.getsource(sys.modules[name])
                stack.append(name)
    return digest("\0".join(text for _, text in sorted(found.items())))


@dataclass(frozen=True)
class Asked:
    """A kernel that is asked for: a template and all that it is given."""

    template: Template
    op: Any
    ins: tuple[Spec, ...]
    outs: tuple[Spec, ...]
    config: Mapping[str, Any]
    epilogue: Epilogue

    @property
    def owner(self) -> str:
        return f"{self.template.family}/{self.template.name}"

    @property
    def title(self) -> str:
        """What it is, in words: the head of its module."""
        called = ", ".join(f"{name}={value}" for name, value in self.config.items())
        specs = f"{', '.join(map(str, self.ins))} -> {', '.join(map(str, self.outs))}"
        tail = f"epilogue {self.epilogue.scalar.lines} {list(map(str, self.epilogue.extras))}"
        return f"{self.owner}({called})\n\n{self.op}\n{specs}; {tail}"

    @property
    def buffers(self) -> tuple[tuple[Spec, ...], ...]:
        """Specs of inputs, outputs, workspaces, extras, and the place of the output."""
        work = tuple(self.template.workspace(self.op, self.ins, self.outs, **self.config))
        outs = (self.epilogue.memory, *self.outs[1:])
        return (self.ins, outs, work, self.epilogue.extras, (Spec((2 * len(self.outs[0].shape),), "int64"),))

    def key(self, device: Device) -> str:
        """A hash of all that its machine code depends on."""
        template, config = self.template, self.config
        fingerprint = getattr(template.build, "fingerprint", None)  # what a template is told by functions of a user
        scalar = getattr(self.op, "scalar", None)
        parts = [
            _generator_key(),
            _template_key(template.build.__module__, template.source()),
            device.key,
            self.title,
            fingerprint(self.op, self.ins, self.outs, **config) if fingerprint else "",
            repr(scalar(tuple(f"x{i}" for i in range(len(self.ins))))) if scalar is not None else "",
            repr(self.epilogue),
        ]
        return digest("\0".join(parts))

    def module(self, device: Device) -> str:
        """The name of its module."""
        return f"rapydli_{self.template.family}_{self.template.name}_{self.key(device)}"

    def text(self) -> str:
        """The source of its module."""
        loop = self.template.build(self.op, self.ins, self.outs, self.epilogue, **self.config)
        return module_text(loop, self.buffers, self.owner, self.title)


_kernels: dict[str, Kernel] = {}
_lock = threading.RLock()


def ask(
    template: Template,
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    device: Device,
    config: Mapping[str, Any] | None = None,
    *,
    epilogue: Epilogue | None = None,
) -> Asked:
    """A kernel as `compile_kernel` is asked for it; nothing is compiled. TemplateError where no config fits."""
    ins, outs = tuple(ins), tuple(outs)
    if config is None:
        config = template.default(op, ins, outs, device)
        if config is None:
            raise TemplateError(f"template {template.family}/{template.name} does not fit {', '.join(map(str, ins))}.")
    return Asked(template, op, ins, outs, dict(config), epilogue or Epilogue.none(outs[0]))


def kept(asked: Sequence[Asked], device: Device) -> list[bool]:
    """Which kernels need no compiling: this process has them, or their modules and machine code are on disk.

    Files are not read: one that is damaged counts, and is compiled again when it is loaded.
    """
    folder = settings().cache_dir / "kernels"
    version, parts = f".py{sys.version_info.major}{sys.version_info.minor}.", {"nbi": set[str](), "nbc": set[str]()}
    with suppress(OSError), os.scandir(folder / "__pycache__") as files:  # once: there may be thousands
        for file in files:
            name, _, rest = file.name.partition(".entry-")
            kind = rest.rpartition(".")[2]
            if kind in parts and version in rest:
                parts[kind].add(name)
    compiled = parts["nbi"] & parts["nbc"]
    names = [one.module(device) for one in asked]
    known = {kernel.module for kernel in _kernels.values()}
    return [name in known or (name in compiled and (folder / f"{name}.py").is_file()) for name in names]


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
    asked = ask(template, op, ins, outs, device, config, epilogue=epilogue)
    ins, outs, config = asked.ins, asked.outs, asked.config
    key = asked.key(device)
    with _lock:
        if key not in _kernels:
            template.check(op, ins, outs, device, config)
            name = asked.module(device)
            module = _module(name, asked.text)
            reloaded = module.entry.cache_hits > 0
            if reloaded:  # LLVM's code for linking it into other functions: a third of a megabyte that nobody reads
                module.entry._library._shared_module = None
            _kernels[key] = Kernel(
                address=module.entry.address,
                tasks=module.TASKS,
                buffers=tuple(spec for group in asked.buffers for spec in group),
                key=key,
                module=name,
                template=template.name,
                config=tuple(config.items()),
                reloaded=reloaded,
                entry=module.entry,
            )
        return _kernels[key]


def _module(name: str, write: Callable[[], str]) -> Any:
    """Import a generated module, written first if it is not there or damaged."""
    folder = settings().cache_dir / "kernels"
    path = folder / f"{name}.py"
    if not _whole(path):
        _store(path, write())
    try:
        return _load(name, path)
    except TemplateError:
        raise
    except Exception:  # whatever damaged machine code makes of itself: compile again, once
        for file in (folder / "__pycache__").glob(f"{name}.*"):  # none where another process was faster
            file.unlink(missing_ok=True)
    return _load(name, path)


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, NumbaError):
            raise TemplateError(f"kernel {name}: Numba cannot compile it: {_reason(error, path)}.") from error
        raise
    return module


def _reason(error: NumbaError, path: Path) -> str:
    """What Numba says of the innermost function that it cannot compile, and the line that it is about."""
    said = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in said.splitlines() if not line.startswith("Failed in nopython mode")]
    end = next((i for i, line in enumerate(lines) if line.startswith(("File ", "During: ", "There are "))), len(lines))
    what = " ".join(line for line in lines[:end] if line)
    where = re.search(rf'File ".*{re.escape(path.name)}", line (\d+)', said)
    if where is None:
        return f"{what} (in {path})"
    code = linecache.getline(str(path), int(where[1])).strip()
    return f"{what} in `{code}` (line {where[1]} of {path})"


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
