"""What the rest of the package sees of a stencil: an op, and a CPU template of its family."""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Sequence
from typing import Any, ClassVar

from cpu_kernels.stencil import specialised, whole_arrays
from cpu_kernels.text import written_out

from ..errors import TemplateError
from ..ops import Op, registry
from ..spec import Spec
from ..template import Config, Device, Epilogue, Loop, Template, template, templates
from .definition import Definition


class StencilOp(Op, abstract=True):
    """The op of a stencil: no attributes; it may read all of its operands, and is never divided over ranks."""

    definition: ClassVar[Definition]
    takes_tail = False  # its body stores elements itself, and knows of no epilogue
    by_name = True

    def infer(self, *inputs: Spec) -> Any:
        outs = self.definition.outs(inputs)
        return outs if len(outs) > 1 else outs[0]

    def reference(self, *inputs: Any) -> Any:
        return self.definition.computed(inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        kind = type(self)
        if "<locals>" in kind.__qualname__:
            raise TemplateError(
                f"stencil {self.definition.name}: it is defined in a function ({kind.__qualname__}), where other "
                "processes cannot find it. Define it at the top of a module."
            )
        return _found, (kind.__module__, kind.__qualname__)

    def by_value(self) -> tuple[Any, ...]:
        """How to make it in a process of this host that cannot import it."""
        return _rebuilt, (self.definition,)


def _rebuilt(definition: Definition) -> StencilOp:
    return operator_of(definition)()


def _found(module: str, qualname: str) -> Any:
    """The op of a stencil, by where it is defined."""
    return operator.attrgetter(qualname)(importlib.import_module(module))()


class Build:
    """The ``build`` of a stencil's template."""

    def __init__(self, definition: Definition) -> None:
        self.definition = definition
        body = definition.body
        self.__name__, self.__qualname__, self.__module__ = body.__name__, body.__qualname__, body.__module__
        self.__code__ = body.__code__  # where its text is

    def __call__(self, op: Op, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Loop:
        it = self.definition
        work = it.scratch(ins, config)
        it.check_arrays(ins, outs, work)
        shapes = {name: spec.shape for name, spec in zip(it.arrays, (*ins, *outs, *work), strict=True)}
        body = specialised(it.body, it.source, config, shapes)
        made: Loop = whole_arrays(body, it.count(ins, config), (ins, outs, work))
        return made

    def source(self) -> str:
        """All that the kernels are made from: the stencil as it was written, and what its body refers to."""
        it = self.definition
        return "\n".join([it.source, str(dict(it.space)), self.meaning()])

    def meaning(self) -> str:
        """The body and what it refers to, whatever there is to choose from: with more values, results still hold."""
        it = self.definition
        open_body: Any = specialised(it.body, it.source, dict.fromkeys(it.space))
        return str(written_out(open_body, f"{it.name}/{it.name}"))

    def fingerprint(self, op: Op, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> str:
        """What the functions of the user say for a config."""
        return f"{self.definition.count(ins, config)} tasks, {self.definition.scratch(ins, config)}"


def operator_of(definition: Definition) -> type[StencilOp]:
    """The op of a stencil, registered with its template; those of a function that is defined again are replaced."""
    body = definition.body
    attributes: dict[str, Any] = {
        "__module__": body.__module__,
        "__qualname__": f"{body.__qualname__}.Op",
        "__doc__": body.__doc__,
        "definition": definition,
        "outputs": definition.arrays[len(definition.operands) :],
        "infer": _named(definition.operands),
    }
    if definition.vjp is not None:
        attributes["vjp"] = _vjp
    _check_free(definition, attributes["__module__"], attributes["__qualname__"])
    made: type[StencilOp] = type(definition.name.lower(), (StencilOp,), attributes)
    _register(definition, made.family)
    return made


def _vjp(self: StencilOp, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
    """Cotangents of the operands, as the user gives them."""
    assert self.definition.vjp is not None
    found = self.definition.vjp(dy, y, *inputs)
    return found if isinstance(found, tuple) else (found,)


def _named(operands: Sequence[str]) -> Any:
    """`StencilOp.infer` with the names of the operands, for tables and messages."""

    def infer(self: StencilOp, *inputs: Spec) -> Any:
        return StencilOp.infer(self, *inputs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    infer.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind) for name in ("self", *operands)]
    )
    return infer


def _check_free(definition: Definition, module: str, qualname: str) -> None:
    """Is the name of a stencil its own?"""
    family = definition.name.lower()
    known = registry.get(family)
    others = [t for t in templates(family, "cpu") if not isinstance(t.build, Build)]
    if known is not None and _main(known.__module__, known.__qualname__) != _main(module, qualname):
        raise TemplateError(
            f"stencil {definition.name}: there is an op of this name already, {known.__module__}.{known.__qualname__}. "
            "Rename the function."
        )
    if others:
        raise TemplateError(
            f"stencil {definition.name}: ops of family {family!r} have templates already, of module "
            f"{others[0].build.__module__}. Rename the function."
        )


def _main(module: str, qualname: str) -> tuple[str, str]:
    """A script is '__mp_main__' to the processes that it starts."""
    return module.replace("__mp_main__", "__main__"), qualname


def _register(definition: Definition, family: str) -> None:
    """Let a stencil be the template of its family."""

    def workspace(op: Op, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
        return definition.scratch(ins, config)

    rules = {name: _rule(definition, name) for name in definition.rules}
    template(family, "cpu", space=definition.space, fits=rules, workspace=workspace)(Build(definition))


def _rule(definition: Definition, name: str) -> Any:
    """A rule of the user's as templates have them: it names the parameters that it depends on."""
    function = definition.rules[name]

    def rule(op: Op, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
        return bool(definition.ask(f"rule {name!r}", function, ins, config, device))

    keyword = inspect.Parameter.KEYWORD_ONLY
    own = list(inspect.signature(rule).parameters.values())[:4]
    asked = [inspect.Parameter(n, keyword) for n in inspect.signature(function).parameters if n in definition.space]
    rule.__signature__ = inspect.Signature([*own, *asked])  # type: ignore[attr-defined]
    return rule


def template_of(made: type[StencilOp]) -> Template:
    """The template of a stencil; TemplateError if its function was defined again since."""
    for found in templates(made.family, "cpu"):
        if isinstance(found.build, Build) and found.build.definition is made.definition:
            return found
    raise TemplateError(
        f"stencil {made.definition.name}: a stencil of this name was defined after this one and took its place. "
        "Call that one, or give each a name of its own."
    )


def refusal(definition: Definition, ins: Sequence[Spec], device: Device, configs: Sequence[Config]) -> str:
    """Why none of the configs is allowed."""
    counts: dict[str, int] = {}
    for config in configs:
        for rule in definition.refusals(ins, device, config):
            counts[rule] = counts.get(rule, 0) + 1
    rules = ", ".join(f"{rule!r} refuses {count}" for rule, count in counts.items())
    return f"stencil {definition.called(ins)}: no config is allowed. Of {len(configs)}, {rules}."
