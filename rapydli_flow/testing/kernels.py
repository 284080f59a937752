"""Every CPU template against `reference`, on every sample of the ops that it is for.

Outputs and workspaces hold NaN at first, buffers lie between guards, inputs must stay as they were,
and the kernel must be of the template and config that were asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from cpu_kernels.compile import compile_kernel, host, run_kernel

from ..graph import Fused, parts
from ..ops import Add, Leaf, Op, Phase, Pointwise, Random, Sample, Scale
from ..spec import Array, Block, Spec
from ..template import Config, Template, templates
from .report import compare, fail, seeded

FLOATS = ("float32", "float64")
TOLERANCE = {"float32": 2e-5, "float64": 1e-11}
GUARD_BYTES = 64
GARBAGE = 0xFF  # four or eight of these bytes are a NaN


def needs_samples(op: type[Op]) -> bool:
    """Leaves, phases and collectives have no value of their own to try."""
    return not (issubclass(op, Leaf | Phase) or op.collective)


def needs_template(op: type[Op]) -> bool:
    """Sources of parameters run once, on the host; views move nothing; a fused op runs as its anchor."""
    return needs_samples(op) and not (issubclass(op, Random | Fused) or op.view)


def has_templates(op: type[Op]) -> bool:
    """Is there a CPU template for ops of this family?"""
    return bool(templates(op.family, host().kind))


@dataclass(frozen=True)
class Buffer:
    """An aligned array between guards: what lies outside it is NaN when read, and must not be written."""

    raw: Array
    start: int
    array: Array

    @classmethod
    def of(cls, spec: Spec, value: Array | None = None) -> Buffer:
        raw = np.full(spec.size_bytes + 3 * GUARD_BYTES, GARBAGE, np.uint8)
        start = GUARD_BYTES + -(raw.ctypes.data + GUARD_BYTES) % GUARD_BYTES
        array = raw[start : start + spec.size_bytes].view(spec.dtype).reshape(spec.shape)
        if value is not None:
            array[...] = value
        return cls(raw, start, array)

    @property
    def whole(self) -> bool:
        """Are the guards as they were?"""
        end = self.start + self.array.nbytes
        return bool((self.raw[: self.start] == GARBAGE).all() and (self.raw[end:] == GARBAGE).all())


def dtypes(sample: Sample) -> tuple[str, ...]:
    """The floating dtypes that make a difference to a sample."""
    return FLOATS if any(spec.floating for spec in sample.ins) else FLOATS[:1]


def check_has_template(op: type[Op]) -> None:
    """Every op that runs on workers has a CPU template, and every sample one that fits it."""
    if not needs_template(op):
        return
    device = host()
    known = templates(op.family, device.kind)
    if not known:
        raise AssertionError(f"{op.name}: cpu_kernels has no template of family {op.family!r}.")
    for sample in op.samples():
        for dtype in dtypes(sample):
            specs, outs = _typed(sample, dtype)
            anchor, ins, _ = parts(sample.op, specs)
            if all(t.default(anchor, ins, outs, device) is None for t in known):
                fail(sample, f"none of the templates {[t.name for t in known]} fits {dtype}")


def check_templates(
    sample: Sample, dtype: str = "float32", *, random_configs: int = 8, corner: bool = True, every: bool = False
) -> int:
    """Every CPU template that fits, against `reference` in float64: the number of kernels that ran.

    Configs are the default, the corner (the last values that fit), some random ones, or every one.
    """
    device, rng = host(), seeded(sample, "templates")
    specs, outs = _typed(sample, dtype)
    anchor, ins, _ = parts(sample.op, specs)
    count = 0
    for template in templates(anchor.family, device.kind):
        default = template.default(anchor, ins, outs, device)
        if default is None:
            continue
        if every:
            configs: list[Config] = [*template.configs(anchor, ins, outs, device)]
        else:
            fits = lambda config, t=template: t.fits(anchor, ins, outs, device, **config)  # noqa: E731
            configs = chosen_configs(template, default, fits, rng, random_configs, corner)
        for config in configs:
            check_kernel(sample, dtype, template, config)
            count += 1
        check_kernel_in_place(sample, dtype, template, default)
        if sample.op.indexed:
            check_kernel(sample, dtype, template, default, at=_inside(outs[0], rng))
        if template.joins:
            check_kernel(sample, dtype, template, default, into=(3, outs[0].shape[-1] + 5))
    return count


def check_tails(sample: Sample) -> int:
    """Every CPU template with a pointwise tail that halves the output and adds an array: the kernels that ran.

    A network's pointwise ops are fused into the kernel before them, so a template that does not store through
    its epilogue loses them.
    """
    (out, *more) = sample.op.out_specs(*sample.ins)
    if (
        more
        or not sample.op.takes_tail
        or not out.floating
        or not out.shape
        or isinstance(sample.op, Pointwise | Fused)
    ):
        return 0
    tail = ((Scale(by=0.5), (-1,)), (Add(), (-1, 0)))
    tailed = Sample(
        Fused(anchor=sample.op, arity=len(sample.ins), tail=tail),
        (*sample.ins, out),
        sample.ranges,
    )
    count = 0
    for template in templates(sample.op.family, host().kind):
        default = template.default(sample.op, sample.ins, (out,), host())
        if default is not None:
            check_kernel(tailed, "float32", template, default)
            if template.joins:
                check_kernel(tailed, "float32", template, default, into=(2, out.shape[-1] + 3))
            count += 1
    return count


def chosen_configs(
    template: Template, default: Config, fits: Any, rng: np.random.Generator, count: int = 8, corner: bool = True
) -> list[Config]:
    """The default, the last values that fit, and up to ``count`` random ones, each once."""
    seen: list[Config] = [dict(default)]
    space = template.values(host())
    if corner:
        points = product(*(reversed(values) for values in space.values()))
        last = next(filter(fits, (dict(zip(space, point, strict=True)) for point in points)), seen[0])
        seen += [last] if last not in seen else []
    wanted = len(seen) + count
    for _ in range(20 * count):
        config = {name: values[int(rng.integers(len(values)))] for name, values in space.items()}
        if len(seen) < wanted and config not in seen and fits(config):
            seen.append(config)
    return seen


def check_kernel(
    sample: Sample,
    dtype: str,
    template: Template,
    config: Config,
    *,
    at: Block | None = None,
    donate: tuple[int, int] | None = None,
    into: tuple[int, int] | None = None,
) -> None:
    """One kernel against `reference` in float64; ``donate`` (i, k): output k lies on input i; ``into``: the output's
    rows are part of longer ones, of which the rest must stay as it was.

    Outputs and workspaces hold garbage at first; guards around all buffers must survive, and inputs.
    """
    op = sample.op
    specs, outs = _typed(sample, dtype)
    anchor, anchor_specs, epilogue = parts(op, specs)
    arity, epilogue = len(anchor_specs), replace(epilogue, into=into)
    kernel = compile_kernel(template, anchor, anchor_specs, outs, host(), config, epilogue=epilogue)
    title = f"{template.family}/{template.name} {dict(config)} {dtype}"
    title += f" at {at}" if at else ""
    title += f" into columns {into}" if into else ""
    title += f" with output {donate[1]} in place of input {donate[0]}" if donate else ""
    if (kernel.template, dict(kernel.config)) != (template.name, dict(config)):
        fail(sample, f"{title}: {kernel.template} {dict(kernel.config)} ran instead")
    values = sample.draw(seeded(sample, "kernel"), dtype)
    wide = [x.astype(np.float64) if x.dtype.kind == "f" else x for x in values]
    want = op.run(*wide, at=at)
    ins = [Buffer.of(spec, value) for spec, value in zip(specs, values, strict=True)]
    results = [Buffer.of(spec) for spec in (epilogue.memory, *outs[1:])]
    if donate:
        results[donate[1]] = ins[donate[0]]
    work = [Buffer.of(spec) for spec in template.workspace(anchor, anchor_specs, outs, **config)]
    arrays = [buffer.array for buffer in ins]
    whole = at or Block.all(outs[0].shape)
    run_kernel(
        kernel,
        arrays[:arity],
        [buffer.array for buffer in results],
        work=[buffer.array for buffer in work],
        extras=arrays[arity:],
        at=np.array([*whole.lo, *whole.whole], np.int64),
    )
    found = [buffer.array for buffer in results]
    if into:
        columns = range(into[0], into[0] + outs[0].shape[-1])
        rest = np.ascontiguousarray(np.delete(found[0], columns, axis=-1))
        if not (rest.view(np.uint8) == GARBAGE).all():
            fail(sample, f"{title}: wrote outside its columns")
        found[0] = found[0][..., columns.start : columns.stop]
    for k, (array, y) in enumerate(zip(found, want, strict=True)):
        compare(sample, f"{title}: output {k}", array, y, TOLERANCE.get(outs[k].dtype, 0.0))
    for i, (buffer, value) in enumerate(zip(ins, values, strict=True)):
        if not (donate and donate[0] == i) and not np.array_equal(buffer.array, value):
            fail(sample, f"{title}: input {i} was changed")
    if not all(buffer.whole for buffer in (*ins, *results, *work)):
        fail(sample, f"{title}: wrote outside its buffers")


def check_kernel_in_place(sample: Sample, dtype: str, template: Template, config: Config) -> None:
    """The kernel with each output on each input that the formula lets it lie on."""
    specs, outs = _typed(sample, dtype)
    index = sample.op.indexing(*specs)
    for i, k in product(range(len(specs)), range(len(outs))):
        if specs[i] == outs[k] and index.in_place(i, k):
            check_kernel(sample, dtype, template, config, donate=(i, k))


def _typed(sample: Sample, dtype: str) -> tuple[tuple[Spec, ...], tuple[Spec, ...]]:
    specs = tuple(Spec(s.shape, dtype) if s.floating else s for s in sample.ins)
    return specs, sample.op.out_specs(*specs)


def _inside(spec: Spec, rng: np.random.Generator) -> Block:
    """A place for an array of this shape in a larger one."""
    lo = tuple(int(rng.integers(1, 5)) for _ in spec.shape)
    hi = tuple(a + size for a, size in zip(lo, spec.shape, strict=True))
    return Block(lo, hi, tuple(b + int(rng.integers(0, 4)) for b in hi))
