"""What a kernel template, a config and a device description are, and the registry of templates.

A template is a function of op, specs and config that returns the body of a kernel with every
tunable replaced by a constant. Templates live in `cpu_kernels` and `gpu_kernels`, and meet the ops by
family name only:

    @template("max_pool", "cpu", space={"rows": (4, 1, 8)})
    def direct(op, ins, outs, epilogue, *, rows): ...

The first value of every parameter is the default, unless the template names a function that prefers another.
What a config must keep to is said by named rules, each a function of op, specs, device and the parameters that
it names, or an expression over parameters and the limits of the device:

    fits={"registers": "rows * vectors + vectors < vector_registers", "columns": no_empty_column}

Values of a parameter that depend on the device are given by a function of it: ``lambda device: (device.cores, 0)``.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from typing import Any

from .errors import TemplateError
from .space import Space, calling, parse
from .space.expression import scalar
from .spec import Spec

Config = Mapping[str, Any]
PACKAGES = {"cpu": "cpu_kernels", "cuda": "gpu_kernels"}


@dataclass(frozen=True)
class Device:
    """What kernels are specialised for. ``target`` is the compiler's name of the processor."""

    kind: str
    name: str
    target: str = ""
    cores: int = 1
    vector_bytes: int = 32
    memory_bytes: int = 0
    vector_registers: int = 16
    l1_bytes: int = 32 << 10
    l2_bytes: int = 256 << 10
    threads: int = 1024  # of a block
    registers: int = 65536  # of a multiprocessor
    shared_bytes: int = 48 << 10  # of a block, without asking for more
    emulated: bool = False  # a card that NumPy plays
    number: int = field(default=0, compare=False)  # which of the cards that a process sees

    @property
    def limits(self) -> dict[str, int]:
        """What constraints may name: of the processor's cores and caches, or of the card's blocks."""
        names = {
            "cpu": ("cores", "vector_bytes", "vector_registers", "l1_bytes", "l2_bytes"),
            "cuda": ("cores", "threads", "registers", "shared_bytes"),
        }
        return {name: getattr(self, name) for name in names.get(self.kind, ())}

    @property
    def called(self) -> str:
        """What ``device=`` calls its kind: 'cpu', 'cuda' or 'emulated'."""
        return "emulated" if self.emulated else self.kind

    def is_a(self, name: str) -> bool:
        """Is it what ``device=`` calls so: 'cpu', 'cuda' (any GPU), 'cuda:1', 'emulated'?"""
        kind, _, number = name.partition(":")
        return kind == self.called and number in ("", str(self.number))

    @property
    def key(self) -> str:
        """Equal keys run the same compiled kernels, about equally fast."""
        return f"{self.kind}-{self.target or self.name}-v{self.vector_bytes}" + ("-emulated" if self.emulated else "")


@dataclass(frozen=True)
class Scalar:
    """A pointwise formula as source text for one element, in the common tongue of Numba and Numba-CUDA.

    ``lines`` are assignments; they may use ``parameters``, the constant type ``T``, the element's
    ``index`` in the whole array, and the functions in ``uses``.
    """

    parameters: tuple[str, ...]
    lines: tuple[str, ...]
    results: tuple[str, ...]
    uses: tuple[str, ...] = ()
    indexed: bool = False


Shape = tuple[int, ...]


def reach(extra: Shape, out: Shape, source: Shape | None = None) -> str:
    """How a tail reads an operand of this shape: by 'element', where the 'source' of a part is read, by 'channel', as
    a 'scalar', or 'nowhere': it cannot."""
    shapes = {"element": out, "source": source, "channel": out[-1:], "scalar": ()}
    return next((how for how, shape in shapes.items() if shape == extra), "nowhere")


@dataclass(frozen=True)
class Epilogue:
    """What happens to an output element before it is stored: the pointwise tail of a fused op.

    ``scalar`` takes the element so far as ``v`` and the elements of ``extras`` as ``e0``, ``e1``, ...
    Each extra has the shape of ``out``, or of its last axis, or none; or that of ``source``, the operand of which the
    op takes a part, and is read where that is read. ``into``: rows of ``out`` are part of longer ones in memory, from
    this column on, of this length; see `rapydli_flow.scheduler.join`.
    """

    scalar: Scalar
    extras: tuple[Spec, ...]
    out: Spec
    source: Spec | None = None
    into: tuple[int, int] | None = None

    @classmethod
    def none(cls, out: Spec) -> Epilogue:
        return cls(Scalar(("v",), (), ("v",)), (), out)

    @property
    def identity(self) -> bool:
        return not self.scalar.lines

    @property
    def rows(self) -> tuple[int, int]:
        """Where a row of ``out`` begins in its row of memory, and how far those are apart."""
        return self.into or (0, self.out.shape[-1] if self.out.shape else 1)

    @property
    def memory(self) -> Spec:
        """What ``out`` is, or is part of."""
        return Spec((*self.out.shape[:-1], self.into[1]), self.out.dtype) if self.into else self.out

    @property
    def by_source(self) -> bool:
        """Are there extras that are read where ``source`` is?"""
        return any(self.reach(extra) == "source" for extra in self.extras)

    def reach(self, extra: Spec) -> str:
        """How an extra is indexed; see `reach`."""
        return reach(extra.shape, self.out.shape, self.source.shape if self.source else None)


@dataclass(frozen=True)
class Loop:
    """The kernel of a CPU template: ``body(task, *ins, *outs, *work, extras, at)`` for each task.

    Tasks are independent and write disjoint outputs; their number is fixed by op and config, never
    by threads, so that results do not depend on them. Arrays are flat; ``at`` holds lo and whole of
    the output's block, for ops that use indices. ``before``, with the same arguments, runs first for each of
    ``before_tasks`` (it packs and pads operands into the workspace); no task of ``body`` starts until all are done.
    """

    body: Callable[..., None]
    tasks: int
    before: Callable[..., None] | None = None
    before_tasks: int = 0


def _no_workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    return ()


Rule = str | Callable[..., bool]
Values = tuple[Any, ...] | Callable[[Device], tuple[Any, ...]]  # of a parameter


_read = cache(parse)  # rules are asked again and again


def broken(
    rules: Mapping[str, Rule], op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Config
) -> str | None:
    """The name of the first rule that a config breaks, or None."""
    for name, rule in rules.items():
        if isinstance(rule, str):
            kept = scalar(_read(rule), {**device.limits, **config})
        else:
            kept = rule(op, ins, outs, device, **{n: config[n] for n in _parameters(rule, tuple(config))})
        if not kept:
            return name
    return None


def values_on(device: Device, space: Mapping[str, Values]) -> dict[str, tuple[Any, ...]]:
    """What each parameter of a template may be on a device."""
    return {name: values(device) if callable(values) else values for name, values in space.items()}


@dataclass(frozen=True)
class Template:
    """How ops of one family run fast on one kind of device."""

    family: str
    kind: str
    build: Callable[..., Any]
    space: Mapping[str, Values] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)
    workspace: Callable[..., tuple[Spec, ...]] = _no_workspace
    prefer: Callable[..., Config] | None = None
    cost: Callable[..., float] | None = None
    joins: bool = False  # can it write rows that are part of longer ones (`Epilogue.into`)?

    @property
    def name(self) -> str:
        return self.build.__name__

    def values(self, device: Device) -> dict[str, tuple[Any, ...]]:
        """What each parameter may be on a device."""
        return values_on(device, self.space)

    def space_of(self, op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Space:
        """The configs that this op on these specs allows on a device; the template's rules are the hard constraints.

        A parameter hides a limit of the device that has its name.
        """
        hard: dict[str, Any] = {}
        for name, rule in self.rules.items():
            if not isinstance(rule, str):
                hard[name] = calling(partial(rule, op, ins, outs, device), _parameters(rule, tuple(self.space)))
            else:
                hard[name] = rule
        limits = {name: value for name, value in device.limits.items() if name not in self.space}
        return Space(self.values(device), hard=hard, given=limits)

    def broken(self, op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Config) -> str | None:
        """The first rule that a config breaks."""
        return broken(self.rules, op, ins, outs, device, config)

    def fits(self, op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
        """Does a config keep all rules?"""
        return self.broken(op, ins, outs, device, config) is None

    def configs(self, op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Iterator[dict[str, Any]]:
        """Every point of the space that fits, the default first."""
        first = self.default(op, ins, outs, device)
        if first is not None:
            yield first
            yield from (config for config in self.space_of(op, ins, outs, device) if config != first)

    def default(self, op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> dict[str, Any] | None:
        """The config to use untuned: the preferred one, else the first that fits, else None."""
        if self.prefer is not None:
            config = dict(self.prefer(op, ins, outs, device))
            if self.fits(op, ins, outs, device, **config):
                return config
        if not self.space_of(op, ins, outs, device):
            return None
        configs = (dict(zip(self.space, values, strict=True)) for values in product(*self.values(device).values()))
        return next(config for config in configs if self.fits(op, ins, outs, device, **config))

    def check(self, op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Config) -> None:
        """Raise TemplateError unless ``config`` is a point of this template that fits."""
        if set(config) != set(self.space):
            raise TemplateError(
                f"template {self.family}/{self.name} has parameters {sorted(self.space)} "
                f"but the config names {sorted(config)}. Give every parameter once."
            )
        broken = self.broken(op, ins, outs, device, config)
        if broken is not None:
            raise TemplateError(
                f"template {self.family}/{self.name} does not fit {', '.join(map(str, ins))} with {dict(config)}: "
                f"it breaks the rule {broken!r}. List what fits with Template.configs."
            )

    def source(self) -> str:
        """The source text of the module that defines the template: part of a kernel's key.

        A ``build`` that is not written in a module, but made, has a method ``source`` of its own.
        """
        own: Callable[[], str] | None = getattr(self.build, "source", None)
        return _sources.get(self.build) or (own() if own is not None else _source(self.build))


@cache
def _parameters(rule: Callable[..., bool], space: tuple[str, ...]) -> tuple[str, ...]:
    """The parameters of a space that a rule names after op, specs and device: all of them, if it takes any."""
    named = list(inspect.signature(rule).parameters.values())[4:]
    return tuple(space) if any(p.kind is p.VAR_KEYWORD for p in named) else tuple(p.name for p in named)


@cache  # by function: a module that is imported again, or a cell that is run again, defines another one
def _source(build: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(importlib.import_module(build.__module__))
    except (OSError, TypeError):  # a notebook is a module without a file
        return inspect.getsource(build)


_sources: dict[Callable[..., Any], str] = {}  # of templates that came from another process
_templates: dict[tuple[str, str], list[Template]] = {}


def template(
    family: str,
    kind: str,
    *,
    space: Mapping[str, Values] | None = None,
    fits: Mapping[str, Rule] | Callable[..., bool] | None = None,
    workspace: Callable[..., tuple[Spec, ...]] = _no_workspace,
    prefer: Callable[..., Config] | None = None,
    cost: Callable[..., float] | None = None,
    joins: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a template for a family of ops on a kind of device ('cpu' or 'cuda').

    ``fits``: rules by name, or one function that is a rule of its own. ``cost``, a function of op, specs, device and
    config, foretells time, in a unit that templates of one family share: untuned, the cheapest default is taken.
    ``joins``: the template heeds `Epilogue.rows`, so that its result may be part of longer rows.
    """
    rules = fits if isinstance(fits, Mapping) else {"fits": fits} if fits is not None else {}

    def register(build: Callable[..., Any]) -> Callable[..., Any]:
        made = Template(family, kind, build, dict(space or {}), dict(rules), workspace, prefer, cost, joins)
        _register(made)
        return build

    return register


def _register(made: Template) -> None:
    known = _templates.setdefault((made.family, made.kind), [])
    known[:] = [t for t in known if t.name != made.name] + [made]


def adopt(made: Template, source: str) -> None:
    """Register a template that came from another process, with the source text that it has there."""
    _sources[made.build] = source
    _register(made)


@cache
def _load(kind: str) -> None:
    package = importlib.import_module(PACKAGES[kind])
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def templates(family: str, kind: str) -> tuple[Template, ...]:
    """All templates for a family on a kind of device."""
    if kind not in PACKAGES:
        raise TemplateError(f"no kernels for devices of kind {kind!r}; kinds are {', '.join(PACKAGES)}.")
    _load(kind)
    return tuple(_templates.get((family, kind), ()))
