"""GPU templates without a GPU: on the NumPy emulator against `reference`, and as machine code."""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from gpu_kernels import emulate, specialise
from gpu_kernels.compile import Cubin, Request, cubins
from gpu_kernels.grid import grids_of

from ..ops import Op, Sample, registry
from ..spec import HALVES, Array, Block, Spec
from ..template import Config, Device, Epilogue, Scalar, Template

CARD = Device("cuda", "a card that is not here", target="sm_90a", cores=132, vector_bytes=16)
OLDER = Device("cuda", "an older card that is not here", target="sm_80", cores=108, vector_bytes=16)
RANDOM_CONFIGS = 8
EPSILON = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
RELU = "({0} if not {0} <= T(0.0) else T(0.0))"


def samples_of(family: str) -> list[Sample]:
    """Every sample of the ops of a family."""
    known = [cls for cls in registry.values() if family in (cls.family, cls.name)]
    return [sample for cls in known for sample in cls.samples()]


def as_dtype(sample: Sample, dtype: str) -> Sample:
    """The sample with its floats stored as ``dtype``."""
    return Sample(sample.op, tuple(Spec(s.shape, dtype) if s.floating else s for s in sample.ins), sample.ranges)


def chosen(template: Template, sample: Sample, *, seed: int, count: int = RANDOM_CONFIGS) -> list[dict[str, Any]]:
    """The default, for each parameter both ends of its values, and a few at random: all that fit."""
    outs = sample.op.out_specs(*sample.ins)
    draw = random.Random(seed)
    drawn = [{name: draw.choice(values) for name, values in template.values(CARD).items()} for _ in range(600)]
    pool = [config for config in drawn if template.fits(sample.op, sample.ins, outs, CARD, **config)]
    default = template.default(sample.op, sample.ins, outs, CARD)
    assert default is not None, f"{template.family}/{template.name} has no config for {sample}"
    found = [default, *pool[:count]]
    for name, values in template.values(CARD).items():
        for value in (values[0], values[-1]):
            if all(config[name] != value for config in found):
                found += [config for config in pool if config[name] == value][:1]
    return found


def emulated(
    template: Template,
    op: Op,
    values: Sequence[Array],
    config: Config,
    *,
    epilogue: Epilogue | None = None,
    extras: Sequence[Array] = (),
    at: Block | None = None,
    as_compiled: bool = False,
) -> tuple[Array, ...]:
    """What a template's kernels compute, on the emulator; the config must fit. ``as_compiled``: run the text that the
    compiler gets, in place of the functions that it was made of."""
    ins = tuple(Spec(np.shape(v), np.asarray(v).dtype.name) for v in values)
    outs = op.out_specs(*ins)
    template.check(op, ins, outs, CARD, config)
    built = template.build(op, ins, outs, epilogue or Epilogue.none(outs[0]), **config)
    if as_compiled:
        built = tuple(map(specialise.as_compiled, grids_of(built)))
    work = template.workspace(op, ins, outs, **config)
    out: tuple[Array, ...] = emulate.run(built, values, outs, extras=extras, work=work, at=at)
    return out


def wanted(op: Op, values: Sequence[Array], *, at: Block | None = None) -> tuple[Array, ...]:
    """The reference in double precision."""
    return op.run(*(cast(Array, np.float64(v)) if is_floating(v) else v for v in values), at=at)


def is_floating(value: Any) -> bool:
    return np.asarray(value).dtype.kind == "f" or np.asarray(value).dtype.name in HALVES


def tolerance(sample: Sample) -> float:
    """Rounding of float32 sums of this many terms, and of results that are stored as halves."""
    outs = sample.op.out_specs(*sample.ins)
    terms = sample.op.flops(*sample.ins) / max(1, outs[0].size)
    return 1e-6 * max(4.0, float(np.sqrt(terms))) + max(EPSILON.get(out.dtype, 0.0) for out in outs)


def assert_close(got: Sequence[Array], want: Sequence[Array], tol: float) -> None:
    """Equal up to ``tol`` times the largest element; integers exactly."""
    for y, expected in zip(got, want, strict=True):
        assert y.shape == expected.shape
        if not is_floating(y):
            np.testing.assert_array_equal(y, expected)
            continue
        scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
        assert float(np.abs(y.astype(np.float64) - expected).max(initial=0.0)) <= tol * scale


def bias_residual_relu(out: Spec, *, scaled: bool = False) -> Epilogue:
    """relu(v + bias + residual), and optionally times a scalar."""
    lines = ("t0 = v + e0", "t1 = t0 + e1", f"t2 = {RELU.format('t1')}", *(("t3 = t2 * e2",) if scaled else ()))
    extras = (Spec(out.shape[-1:], out.dtype), out, *((Spec((), out.dtype),) if scaled else ()))
    names = ("v", *(f"e{i}" for i in range(len(extras))))
    return Epilogue(Scalar(names, lines, ("t3" if scaled else "t2",)), extras, out)


def request_of(
    template: Template, op: Op, ins: Sequence[Spec], card: Device = CARD, *, fused: bool = False, **changes: Any
) -> Request:
    """The default config, with changes, for a card; ``fused``: with bias, residual and ReLU."""
    outs = op.out_specs(*ins)
    config = template.default(op, ins, outs, card)
    assert config is not None, f"{template.family}/{template.name} has no config for {op} on {ins}"
    epilogue = bias_residual_relu(outs[0]) if fused else Epilogue.none(outs[0])
    return Request(template, op, tuple(ins), outs, epilogue, {**config, **changes}, card.target)


def assert_clean(request: Request, folder: Any = None) -> tuple[Cubin, ...]:
    """Compile; nothing may be spilled, or lie in local memory, and the assembler has nothing to say."""
    made: tuple[Cubin, ...] = cubins(request, folder)
    for one in made:
        assert one.warnings == ()
        assert one.spill_bytes == 0
        assert one.stack_bytes == 0
        assert one.code[:4] == b"\x7fELF"
        assert one.registers * one.block <= 65536
    return made


def instructions(code: bytes) -> Counter[int]:
    """How often a cubin has each instruction, by its low 12 bits: those of its .text sections, 16 bytes each."""
    (sections,), (count,) = struct.unpack_from("<Q", code, 0x28), struct.unpack_from("<H", code, 0x3C)
    headers = [struct.unpack_from("<IIQQQQIIQQ", code, sections + 64 * i) for i in range(count)]
    strings, found = headers[struct.unpack_from("<H", code, 0x3E)[0]][4], Counter[int]()
    for header in headers:
        first, size = header[4], header[5]
        if code[strings + header[0] :].startswith(b".text."):
            found.update(struct.unpack_from("<Q", code, at)[0] & 0xFFF for at in range(first, first + size, 16))
    return found
