"""Request: a kernel that is needed. Choice: the template and config that serve it. Tuning: all choices of a run."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import islice
from typing import Any

from .. import markup
from ..errors import SettingError, TemplateError
from ..graph import parts
from ..ops import Op
from ..spec import HALVES, Spec
from ..template import Device, Epilogue, Template, templates


@dataclass(frozen=True)
class Request:
    """An op on local specs, with what happens to each element before it is stored.

    ``whole`` is the op of the graph, its tail included: the reference for what the kernel gives.
    """

    op: Op
    ins: tuple[Spec, ...]
    epilogue: Epilogue
    title: str = field(default="", compare=False)
    whole: Op | None = field(default=None, compare=False)

    @cached_property
    def outs(self) -> tuple[Spec, ...]:
        return self.op.out_specs(*self.ins)

    def key(self, device: Device) -> str:
        """Equal keys are served by the same kernel."""
        tail = [self.epilogue.scalar.lines, self.epilogue.scalar.results, [str(s) for s in self.epilogue.extras]]
        text = json.dumps([str(self.op), [str(s) for s in self.ins], tail, device.key])
        return f"{self.op.family}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"

    def known(self, device: Device) -> tuple[Template, ...]:
        """The templates of the family: on a CPU none for halves, which Numba has no numbers for."""
        return () if device.kind == "cpu" and self.halves else templates(self.op.family, device.kind)

    @property
    def halves(self) -> str:
        """The dtype of an operand or result that is stored as halves; '' if there is none."""
        specs = (*self.ins, *self.outs, *self.epilogue.extras, self.epilogue.out)
        return next((spec.dtype for spec in specs if spec.dtype in HALVES), "")

    def templates(self, device: Device) -> tuple[Template, ...]:
        """The templates that have at least one config for this request."""
        found = self.known(device)
        return tuple(t for t in found if t.default(self.op, self.ins, self.outs, device) is not None)

    def default(self, device: Device) -> Choice:
        """What serves untuned: of the defaults of all templates the one that foretells the least time, the first of
        those that foretell nothing; the reference where there is none."""
        found: list[tuple[float, Choice]] = []
        for template in self.known(device):
            config = template.default(self.op, self.ins, self.outs, device)
            if config is not None:
                told = template.cost(self.op, self.ins, self.outs, device, config) if template.cost else math.inf
                found.append((told, Choice.of(template, config)))
        return min(found, key=lambda pair: pair[0], default=(0.0, REFERENCE))[1]

    def __str__(self) -> str:
        return f"{self.title or self.op.name} {', '.join(map(str, self.ins))}"


@dataclass(frozen=True)
class Choice:
    """A template by name, and its config as sorted pairs."""

    template: str
    config: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, template: Template, config: Mapping[str, Any]) -> Choice:
        return cls(template.name, tuple(sorted(config.items())))

    @property
    def reference(self) -> bool:
        return self.template == "reference"

    def find(self, request: Request, device: Device) -> Template:
        """The template itself."""
        for template in templates(request.op.family, device.kind):
            if template.name == self.template:
                return template
        raise TemplateError(
            f"{request.op.family} has no template {self.template!r} for {device.kind} devices. "
            "Import the module that defines it, on the workers too."
        )

    def __str__(self) -> str:
        return self.template + "".join(f" {k}={v}" for k, v in self.config)


REFERENCE = Choice("reference")
# nothing runs on them: a plan's memory is counted with their untuned kernels
ANY_CPU = Device("cpu", "any")
ANY_CARD = Device("cuda", "any", target="sm_90a", cores=132, vector_bytes=16)


@cache
def _warn_of_halves(dtype: str) -> None:
    """Once in a process: CPU kernels do not take halves."""
    warnings.warn(
        f"NumPy computes with {dtype} on a CPU, slowly: for trying out. Use device='cuda', or precision='float32'.",
        RuntimeWarning,
        stacklevel=2,
    )


@dataclass(frozen=True)
class Tuning:
    """Choices by request key; what is not there gets its first template's default, so starting never waits.

    ``pinned``: keys of choices that the user insists on. ``strict``: what is not there is an error instead, unless
    there is one config only.
    """

    device: Device
    choices: Mapping[str, Choice] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()
    strict: bool = False

    def choose(self, request: Request) -> Choice:
        """The tuned choice, else the cheapest default of a template that fits, else the reference.

        A choice whose template is gone, or that does not fit, counts as unknown; RuntimeWarning if it is pinned.
        """
        key = request.key(self.device)
        known = self.choices.get(key)
        if known is not None:
            fault = self._fault(request, known)
            if not fault:
                return known
            if key in self.pinned:
                message = f"{request} ({key}) is pinned to {known}, and the default runs instead: {fault}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
        if self.strict and len(list(islice(self._configs(request), 2))) > 1:
            raise SettingError(
                f"RAPYDLI_TUNING=strict, and nothing is known for {request} ({key}) on {self.device.key}. Tune it with "
                "rf.autotune or `rapydli tune` under RAPYDLI_TUNING=on, or import results with `rapydli tune import`."
            )
        return request.default(self.device)

    def _fault(self, request: Request, choice: Choice) -> str:
        """Why a choice cannot serve a request, and '' if it can."""
        if choice.reference:
            return ""
        try:
            template = choice.find(request, self.device)
            template.check(request.op, request.ins, request.outs, self.device, dict(choice.config))
        except TemplateError as error:
            return str(error)
        return ""

    def _configs(self, request: Request) -> Iterator[Mapping[str, Any]]:
        for template in request.known(self.device):
            yield from template.configs(request.op, request.ins, request.outs, self.device)

    def serve(self, op: Op, ins: Sequence[Spec]) -> tuple[Request, Choice]:
        """What to run for an op of a graph, with its tail in the epilogue where a template takes it."""
        anchor, specs, epilogue = parts(op, ins)
        request = Request(anchor, specs, epilogue, op.title, op)
        choice = self.choose(request)
        if self.device.kind == "cpu" and self.device != ANY_CPU and request.halves and not op.view:
            _warn_of_halves(request.halves)
        if choice.reference:  # the whole op runs in NumPy, its tail too
            request = Request(op, tuple(ins), Epilogue.none(op.out_specs(*ins)[0]), op.title, op)
        return request, choice

    def workspace(self, request: Request, choice: Choice) -> tuple[Spec, ...]:
        """Specs of the buffers that the chosen kernel needs for one call."""
        if choice.reference:
            return ()
        template = choice.find(request, self.device)
        return tuple(template.workspace(request.op, request.ins, request.outs, **dict(choice.config)))

    def _repr_html_(self) -> str:
        rows = [(key.rpartition("-")[0], str(choice)) for key, choice in self.choices.items()]
        head = markup.title("Tuning", f"{len(rows):,} kernels for {self.device.key}")
        return head + (markup.table(("kernel of", "template and config"), sorted(rows)) if rows else "")

    def __iter__(self) -> Iterator[str]:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)
