"""Definition: what a user says about a stencil, checked, and asked by name of operand and parameter."""

from __future__ import annotations

import inspect
import operator
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np

from cpu_kernels.text import literal

from ..arguments import nearest
from ..errors import RapydliError, ShapeError, TemplateError
from ..spec import Array, Spec
from ..template import Config, Device

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
RESERVED = ("out", "threads", "device")  # what a call, or a rule, means by these


@dataclass(frozen=True)
class Definition:
    """A stencil: ``body(task, *operands, *outputs, *workspaces, *, parameters)`` and what belongs to it.

    ``arrays`` are the names of all that the body takes between task and parameters; the first are ``operands``.
    """

    name: str
    body: FunctionType
    source: str
    operands: tuple[str, ...]
    arrays: tuple[str, ...]
    reference: Callable[..., Any]
    out: Callable[..., Any]
    space: Mapping[str, tuple[Any, ...]]
    rules: Mapping[str, Callable[..., Any]]
    tasks: Callable[..., Any]
    workspace: Callable[..., Any] | None = None
    vjp: Callable[..., Any] | None = None

    def called(self, ins: Sequence[Spec], config: Config | None = None) -> str:
        """``jacobi(u f32[64,64], rows=16)``"""
        names = (*self.operands, *(f"operand {i + 1}" for i in range(len(self.operands), len(ins))))
        given = [f"{name} {spec}" for name, spec in zip(names, ins, strict=False)]
        return f"{self.name}({', '.join([*given, *(f'{k}={v}' for k, v in (config or {}).items())])})"

    def outs(self, ins: Sequence[Spec]) -> tuple[Spec, ...]:
        """Specs of the results; ShapeError for operands that `out` does not take."""
        if len(ins) != len(self.operands):
            raise ShapeError(
                f"stencil {self.called(ins)}: {len(ins)} operands are given but it takes {len(self.operands)}: "
                f"{', '.join(self.operands)}."
            )
        try:
            found = self.out(*ins)
        except RapydliError:
            raise
        except Exception as error:
            raise ShapeError(
                f"stencil {self.called(ins)}: out raises {type(error).__name__}: {error}. It is given the Spec of each "
                "operand; operands of another rank than it expects end here."
            ) from error
        return self._specs("out", found, self.called(ins))

    def scratch(self, ins: Sequence[Spec], config: Config) -> tuple[Spec, ...]:
        """Specs of the workspaces of a call."""
        if self.workspace is None:
            return ()
        return self._specs("workspace", self.ask("workspace", self.workspace, ins, config), self.called(ins, config))

    def count(self, ins: Sequence[Spec], config: Config) -> int:
        """How many tasks there are."""
        found = self.ask("tasks", self.tasks, ins, config)
        try:
            count = operator.index(found)
        except TypeError:
            raise TemplateError(
                f"stencil {self.called(ins, config)}: tasks gives {found!r}, a {type(found).__name__}, not a whole "
                "number. Divide with //."
            ) from None
        if count < 1:
            raise TemplateError(f"stencil {self.called(ins, config)}: tasks gives {count}. There is 1 task or more.")
        return count

    def refusals(self, ins: Sequence[Spec], device: Device, config: Config) -> list[str]:
        """The rules that a config breaks."""
        return [name for name, rule in self.rules.items() if not self.ask(f"rule {name!r}", rule, ins, config, device)]

    def fits(self, ins: Sequence[Spec], device: Device, config: Config) -> bool:
        """May the body be compiled with this config for these operands?"""
        return not self.refusals(ins, device, config)

    def computed(self, inputs: Sequence[Any]) -> Any:
        """What the reference gives, if it is what `out` says."""
        specs = [Spec(np.shape(x), np.asarray(x).dtype.name) for x in inputs]
        wanted, found = self.outs(specs), self.reference(*inputs)
        arrays = tuple(map(np.asarray, found if isinstance(found, tuple) else (found,)))
        given = [f"{x.dtype} {list(x.shape)}" for x in arrays]
        if given != [f"{s.dtype} {list(s.shape)}" for s in wanted]:
            raise TemplateError(
                f"stencil {self.called(specs)}: the reference gives {', '.join(given)} but out says "
                f"{', '.join(map(str, wanted))}. Correct one of the two."
            )
        return arrays if len(arrays) > 1 else arrays[0]

    def ask(
        self, what: str, function: Callable[..., Any], ins: Sequence[Spec], config: Config, device: Device | None = None
    ) -> Any:
        """Call a function of the user's with the operands, parameters and device that it names."""
        known = {**dict(zip(self.operands, ins, strict=True)), **config, "device": device}
        try:
            return function(**{name: known[name] for name in inspect.signature(function).parameters})
        except Exception as error:
            raise TemplateError(
                f"stencil {self.called(ins, config)}: {what} raises {type(error).__name__}: {error}."
            ) from error

    def check_arrays(self, ins: Sequence[Spec], outs: Sequence[Spec], work: Sequence[Spec]) -> None:
        """Does the body take as many arrays as it will be given?"""
        if len(self.arrays) != len(ins) + len(outs) + len(work):
            raise TemplateError(
                f"stencil {self.name}: the body takes {len(self.arrays)} arrays ({', '.join(self.arrays)}) but there "
                f"are {len(ins)} operands, {len(outs)} outputs and {len(work)} workspaces. It takes them in this order."
            )

    def _specs(self, what: str, found: Any, called: str) -> tuple[Spec, ...]:
        specs = found if isinstance(found, tuple) else (found,)
        if not specs or not all(isinstance(spec, Spec) for spec in specs):
            raise TemplateError(
                f"stencil {called}: {what} gives {found!r}, not a Spec or a tuple of them. "
                "Write rf.Spec(shape, dtype), or give the Spec of an operand."
            )
        return specs


def define(
    body: Any,
    *,
    reference: Callable[..., Any],
    out: Callable[..., Any],
    space: Mapping[str, Iterable[Any]],
    rules: Mapping[str, Callable[..., Any]] | None,
    tasks: Callable[..., Any],
    workspace: Callable[..., Any] | None,
    vjp: Callable[..., Any] | None,
) -> Definition:
    """What a user wrote; TemplateError where it does not belong together."""
    if not isinstance(body, FunctionType) or body.__name__ == "<lambda>":
        way_out = " Leave @njit out: it is compiled for each config." if hasattr(body, "py_func") else ""
        raise TemplateError(f"stencil: the body is {body!r}, not a plain function, written with def.{way_out}")
    name = body.__name__
    for what, given in (("reference", reference), ("out", out), ("tasks", tasks), *(rules or {}).items()):
        if not callable(given):
            raise TemplateError(f"stencil {name}: {what} is {given!r}, not a function.")
    operands = tuple(inspect.signature(out).parameters)
    parameters = inspect.signature(body).parameters
    arrays = tuple(k for k, p in parameters.items() if p.kind in POSITIONAL)[1:]
    values = _space(name, space)
    tunable = [k for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    wrong = [
        k for k, p in parameters.items() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.default is not p.empty
    ]
    if wrong:
        raise TemplateError(
            f"stencil {name}: the body takes {', '.join(wrong)} by * or with a default. Name each of its arrays; "
            "the default of a parameter is the first value of its space."
        )
    if set(tunable) != set(values):
        raise TemplateError(
            f"stencil {name}: the body has the parameters {sorted(tunable)} behind its * but the space has "
            f"{sorted(values)}. Give each the same name in both."
        )
    if not operands or len(arrays) <= len(operands):
        raise TemplateError(
            f"stencil {name}: out takes {len(operands)} operands ({', '.join(operands)}) but the body takes a task and "
            f"the arrays {', '.join(arrays) or 'none'}. It takes the task, 1 operand or more, and then the outputs."
        )
    known = (*arrays[: len(operands)], *values)
    for word in set(known) & set(RESERVED):
        raise TemplateError(f"stencil {name}: {word!r} has a meaning of its own. Give the operand another name.")
    asked = {"tasks": tasks, "workspace": workspace, **{f"rule {k!r}": rule for k, rule in (rules or {}).items()}}
    for what, function in asked.items():
        for word in inspect.signature(function).parameters if function else ():
            if word not in known and not (word == "device" and what.startswith("rule")):
                near = nearest(word, known)
                raise TemplateError(
                    f"stencil {name}: {what} asks for {word!r}, which is no operand or parameter.{near} "
                    f"There are {', '.join(known)}{' and device' if what.startswith('rule') else ''}."
                )
    try:
        source = textwrap.dedent(inspect.getsource(body))
    except (OSError, TypeError):
        raise TemplateError(
            f"stencil {name}: Python does not know the text of its body. Write it in a file or in a cell of a notebook."
        ) from None
    return Definition(
        name, body, source, known[: len(operands)], arrays, reference, out, values, dict(rules or {}), tasks,
        workspace, vjp,
    )  # fmt: skip


def _space(name: str, space: Mapping[str, Iterable[Any]]) -> dict[str, tuple[Any, ...]]:
    """The values of each parameter as constants of plain Python."""
    if not isinstance(space, Mapping):
        raise TemplateError(f"stencil {name}: space is {space!r}, not a dict from parameters to their values.")
    values = {}
    for parameter, given in space.items():
        found = tuple(v.item() if isinstance(v, np.generic) else v for v in given)
        if not found:
            raise TemplateError(f"stencil {name}: space has no value for {parameter!r}. The first one is the default.")
        for value in found:
            try:
                if isinstance(value, Array.__origin__):  # type: ignore[attr-defined]
                    raise TypeError
                literal(value)
            except TypeError:
                raise TemplateError(
                    f"stencil {name}: {parameter}={value!r} is a {type(value).__name__}, which cannot become a "
                    "constant. Values are numbers, texts, and tuples of them."
                ) from None
        values[parameter] = found
    return values
