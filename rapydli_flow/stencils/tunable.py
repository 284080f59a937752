"""`rf.stencil`: a loop nest of a user's own, called like a function and tuned like a layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from cpu_kernels.compile import Asked, Kernel, compile_kernel, host
from cpu_kernels.driver import run_kernel

from ..arguments import nearest
from ..config import settings
from ..errors import ArgumentError, DTypeError, ShapeError, TemplateError
from ..ops import Symbol, spec_of
from ..runtime.remembered import known
from ..runtime.session import Progress
from ..runtime.tuning import tune_one
from ..runtime.tuning_report import TuningReport
from ..space import Rules
from ..spec import PLAIN_DTYPES, Array, Spec
from ..template import Config, Epilogue
from ..tuner import Request, Tuning
from .definition import RESERVED, Definition, define
from .operator import StencilOp, operator_of, refusal, template_of

TAKEN = {np.dtype(name) for name in PLAIN_DTYPES}


@dataclass(frozen=True)
class _Ready:
    """A compiled kernel, and what a call of it makes."""

    kernel: Kernel
    outs: tuple[Spec, ...]
    work: tuple[Spec, ...]


class Stencil:
    """A loop nest, its reference and its space; made by `stencil`. Call it on arrays, or on tensors of a network.

    Operands are copied if they are not contiguous; a Python float has the dtype of the first floating array.
    """

    def __init__(self, definition: Definition) -> None:
        body = definition.body
        self.__name__, self.__qualname__, self.__module__ = body.__name__, body.__qualname__, body.__module__
        self.__doc__ = body.__doc__
        self.definition = definition
        positional, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(name, positional) for name in definition.operands]
            + [inspect.Parameter(name, keyword, default=None) for name in RESERVED[:2]]
        )
        self.Op: type[StencilOp] = operator_of(definition)  # pickled under this name
        self._ready: dict[tuple[tuple[tuple[int, ...], Any], ...], _Ready] = {}

    def __call__(self, *operands: Any, out: Any = None, threads: int | None = None, **named: Any) -> Any:
        """The result, or a tuple of results, with the best config that is known for these shapes here.

        Operands are arrays, or tensors of a network that is being traced; they may be given by their names.
        ``out``: arrays to write into, which must not overlap with the operands. ``threads``: at most so many, by
        default those of the settings.
        """
        operands = self._in_order(operands, named) if named else operands
        if any(isinstance(x, Symbol) for x in operands):
            return self.op()(*operands)
        arrays = self._arrays(operands)
        key = tuple((x.shape, x.dtype) for x in arrays)  # quicker than Specs
        ready = self._ready.get(key) or self._ready.setdefault(key, self._prepared(tuple(map(spec_of, arrays))))
        outs = self._outs(arrays, ready.outs, out)
        work = [np.empty(spec.shape, spec.dtype) for spec in ready.work]
        run_kernel(ready.kernel, arrays, outs, work=work, threads=threads or settings().threads)
        return outs if len(outs) > 1 else outs[0]

    def op(self) -> StencilOp:
        """The operator, for networks: ``jacobi.op()(x)`` is ``jacobi(x)``."""
        return self.Op()

    def reference(self, *operands: Any) -> Any:
        """What the stencil means, computed by the reference."""
        arrays = self._arrays(operands)
        return self.op().reference(*arrays)

    def tune(
        self,
        *operands: Any,
        budget_s: float = 20.0,
        trials: int | None = None,
        strategy: str = "guided",
        soft: Rules = (),
        threads: int | None = None,
        watch: Callable[[Progress], None] | None = None,
    ) -> TuningReport:
        """Find the fastest config for these operands within ``budget_s`` seconds, and remember it.

        Operands are arrays, or Specs: then random numbers are drawn. Each config is compared with the reference
        before it is timed; the report tells which failed, and why. ``trials``, ``strategy`` and ``soft`` are those of
        `rapydli_flow.autotune`.
        """
        specs = self._specs(operands)
        self._first(specs)
        arrays = None if any(isinstance(x, Spec) for x in operands) else self._arrays(operands)
        report = tune_one(
            self._request(specs),
            threads or settings().threads,
            budget_s=budget_s,
            trials=trials,
            strategy=strategy,
            soft=soft,
            operands=arrays,
            watch=watch,
        )
        self._ready.clear()
        (found,) = report.found
        errors = {trial.error for trial in found.trials}
        if found.best.time_s is None and len(errors) == 1 and "the reference" in (said := errors.pop()):
            raise TemplateError(said.partition(": ")[2])
        return report

    def configs(self, *operands: Any) -> list[dict[str, Any]]:
        """Every config that the rules allow for these operands (arrays or Specs), the default first."""
        specs = self._specs(operands)
        self._first(specs)
        return list(template_of(self.Op).configs(self.op(), specs, self.definition.outs(specs), host()))

    def config(self, *operands: Any) -> dict[str, Any]:
        """The config that a call with these operands (arrays or Specs) uses: the best known one, or the default."""
        specs = self._specs(operands)
        self._first(specs)
        choice = dict(known(host()).choose(self._request(specs)).config)
        return {name: choice[name] for name in self.definition.space}

    def source(self, *operands: Any, config: Config | None = None) -> str:
        """The module that is compiled for these operands (arrays or Specs): parameters and extents are constants."""
        specs = self._specs(operands)
        config = self.config(*specs) if config is None else config
        outs = self.definition.outs(specs)
        template = template_of(self.Op)
        template.check(self.op(), specs, outs, host(), config)
        text: str = Asked(template, self.op(), specs, outs, config, Epilogue.none(outs[0])).text()
        return text

    def __repr__(self) -> str:
        it = self.definition
        space = ", ".join(f"{name} in {values}" for name, values in it.space.items())
        return f"<stencil {it.name}({', '.join(it.operands)}): {space or 'no parameters'}>"

    def __reduce__(self) -> str:
        return str(self.__qualname__)

    # what is behind a call --------------------------------------------------------------------------

    def _request(self, specs: Sequence[Spec]) -> Request:
        return Tuning(host()).serve(self.op(), specs)[0]

    def _first(self, specs: Sequence[Spec]) -> dict[str, Any]:
        """The default config; TemplateError where the rules allow none."""
        template = template_of(self.Op)
        default = template.default(self.op(), specs, self.definition.outs(specs), host())
        if default is None:
            space = template.values(host())
            points = [dict(zip(space, values, strict=True)) for values in product(*space.values())]
            raise TemplateError(refusal(self.definition, specs, host(), points))
        return default

    def _prepared(self, specs: tuple[Spec, ...]) -> _Ready:
        """The kernel for operands of these specs, compiled or loaded."""
        config, outs = self.config(*specs), self.definition.outs(specs)
        kernel = compile_kernel(template_of(self.Op), self.op(), specs, outs, host(), config)
        return _Ready(kernel, outs, self.definition.scratch(specs, config))

    def _in_order(self, operands: Sequence[Any], named: Mapping[str, Any]) -> tuple[Any, ...]:
        known = self.definition.operands[len(operands) :]
        for name in named:
            if name not in known:
                every = (*self.definition.operands, *RESERVED[:2])
                raise ArgumentError(
                    f"stencil {self.definition.name}: there is no argument {name!r}, or it is given twice."
                    f"{nearest(name, every)} Its arguments are {', '.join(every)}."
                )
        return (*operands, *(named[name] for name in known if name in named))

    def _specs(self, operands: Sequence[Any]) -> tuple[Spec, ...]:
        if any(isinstance(x, Spec) for x in operands):
            return tuple(x if isinstance(x, Spec) else spec_of(x) for x in operands)
        return tuple(map(spec_of, self._arrays(operands)))

    def _arrays(self, operands: Sequence[Any]) -> list[Array]:
        """Operands as kernels take them: contiguous, of a dtype that a Spec has."""
        usual = next((x.dtype for x in operands if isinstance(x, np.ndarray) and x.dtype.kind == "f"), None)
        arrays = []
        for i, x in enumerate(operands):
            array = np.asarray(x, usual if type(x) is float else None, order="C")
            if array.dtype not in TAKEN:
                native = array.dtype.newbyteorder("=")
                if native not in TAKEN:
                    name = self.definition.operands[i] if i < len(self.definition.operands) else f"operand {i + 1}"
                    raise DTypeError(
                        f"stencil {self.definition.name}: {name} has dtype {array.dtype}, which kernels do not take. "
                        f"Cast it to one of {', '.join(PLAIN_DTYPES)}."
                    )
                array = array.astype(native)
            arrays.append(array)
        return arrays

    def _outs(self, arrays: Sequence[Array], specs: Sequence[Spec], out: Any) -> tuple[Array, ...]:
        if out is None:
            return tuple(np.empty(spec.shape, spec.dtype) for spec in specs)
        given = out if isinstance(out, tuple) else (out,)
        if [(x.shape, x.dtype) for x in given] != [(s.shape, np.dtype(s.dtype)) for s in specs]:
            raise ShapeError(
                f"stencil {self.definition.name}: out is {', '.join(str(spec_of(x)) for x in given)} but the result is "
                f"{', '.join(map(str, specs))}."
            )
        for x in given:
            if not x.flags.c_contiguous or any(np.may_share_memory(x, y) for y in arrays):
                what = "overlaps with an operand" if x.flags.c_contiguous else "is not contiguous"
                raise ShapeError(f"stencil {self.definition.name}: out {what}. Give an array of its own.")
        return given


def stencil(
    *,
    reference: Callable[..., Any],
    out: Callable[..., Any],
    space: Mapping[str, Iterable[Any]],
    tasks: Callable[..., Any],
    rules: Mapping[str, Callable[..., Any]] | None = None,
    workspace: Callable[..., Any] | None = None,
    vjp: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., None]], Stencil]:
    """Make a tunable stencil of a loop nest: ``def body(task, *operands, *outputs, *workspaces, *, parameters)``.

    The body is compiled by Numba with every parameter as a constant, and called for each of ``tasks`` tasks, by
    several threads: tasks are independent, and together write every element of the outputs, once. Arrays have their
    axes; an operand without axes is a number. It may call other functions and refer to numbers and modules.

    ``reference``: the same on whole NumPy arrays. ``out``: Spec of the result, or a tuple of Specs, from the Specs of
    the operands. ``space``: the values of each parameter, the first is the default. ``tasks``, ``workspace`` (Specs of
    scratch arrays for one call) and ``rules`` (which configs are allowed, by name) are functions of operands (as
    Specs) and parameters by their names; rules may also ask for ``device``. ``vjp(dy, y, *operands)``: cotangents of
    the operands, built of ops; without it nothing before the stencil can be trained.

    Raises TemplateError where these do not belong together.
    """

    def decorate(body: Callable[..., None]) -> Stencil:
        return Stencil(
            define(
                body,
                reference=reference,
                out=out,
                space=space,
                rules=rules,
                tasks=tasks,
                workspace=workspace,
                vjp=vjp,
            )
        )

    return decorate
