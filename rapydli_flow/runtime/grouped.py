"""Pointwise calls of a program that a card does as one kernel: the updates of parameters, casts of weights, sums.

    program      w1 <- g1   conv   w2 <- g2   conv   w3 <- g3   norm
    in groups    conv   conv   norm   (w1 <- g1, w2 <- g2, w3 <- g3)

A call may wait for others like it as long as nobody touches what it reads and writes. Whether that is so is decided on
bytes of the arena: buffers of different values lie at the same place at different times. Nothing else changes its
order: collectives, ops of the host, and kernels that are in no group.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpu_kernels.launch import ALIGNMENT
from gpu_kernels.many import Alike

from ..ops import Add
from ..scheduler import Buffer, Call, Collective, Exchange, Program
from ..scheduler.collective import Wait
from ..scheduler.together import MOST, Range, Step, together
from ..spec import Spec
from ..template import Device, Epilogue
from ..tuner import Choice, Request
from .building import MANY, alike_of

TEMPLATE = "elementwise"  # what groups do as it does; another template may be somebody's own, with bits of its own


def on_host(call: Call) -> bool:
    """Does a rank on a card run this call on the host?"""
    buffers = (*call.ins, *call.outs, *call.work, *call.extras)
    return call.choice.reference or any(b.offset % ALIGNMENT for b in buffers if b.offset >= 0)


def in_groups(program: Program) -> list[tuple[int, ...]]:
    """Numbers of the program's steps in an order that computes the same; those in one tuple are one kernel."""
    return together(_steps(program), most=MOST)


def kernels_of(program: Program) -> tuple[tuple[Request, Choice], ...]:
    """What has to be compiled for a program, or a half of one: on a card one kernel for all groups of a kind."""
    if program.device.kind == "cpu":
        return program.requests
    found: dict[tuple[Request, Choice], None] = {}
    groups: dict[Alike | None, Request] = {}
    for numbers in in_groups(program):
        step = program.steps[numbers[0]]
        if isinstance(step, Collective):
            continue
        if len(numbers) == 1:
            found[step.request, step.choice] = None
        else:
            found[groups.setdefault(alike_of(step.request), step.request), MANY] = None
    for request in _adding(program):
        found[request, MANY] = None
    return tuple(found)


def _adding(program: Program) -> list[Request]:
    """What adds the parts of sums that come from other cards: one kernel for a dtype, whatever their sizes."""
    meetings = [step.op for step in program.steps if isinstance(step, Collective)] if program.nccl else []
    dtypes = dict.fromkeys(op.dtype for op in meetings if isinstance(op, Exchange) and op.sums)
    specs = [Spec((1,), dtype) for dtype in dtypes]
    return [Request(Add(), (spec, spec), Epilogue.none(spec), title=Add.name) for spec in specs]


def kernels_by_device(programs: Sequence[Program]) -> dict[Device, list[tuple[Request, Choice]]]:
    """What has to be compiled for programs, each kernel once, by device."""
    found: dict[Device, dict[tuple[Request, Choice], None]] = {}
    for half in (half for program in programs for half in program.halves):
        found.setdefault(half.device, {}).update(dict.fromkeys(kernels_of(half)))
    return {device: list(kernels) for device, kernels in found.items()}


def grouped_steps(program: Program) -> frozenset[int]:
    """Numbers of the steps that are done together with others: not by what was chosen for them, but by `MANY`."""
    groups = in_groups(program) if program.device.kind != "cpu" else []
    return frozenset(i for numbers in groups if len(numbers) > 1 for i in numbers)


def _steps(program: Program) -> list[Step]:
    """What each step touches of the arena. Lent leaves are elsewhere, and nobody writes them."""
    steps, behind = [], {}
    keys: dict[Request, Alike | None] = {}
    for step in program.steps:
        if isinstance(step, Collective):
            reads, writes = _bytes(step.ins), _bytes(step.outs)
            if step.op.behind:  # what it makes comes to the card where it is waited for
                behind[step.name] = step
            elif isinstance(step.op, Wait):
                begun = behind[step.name]
                reads, writes = _bytes(begun.ins), _bytes(begun.outs)
            steps.append(Step(None, reads, writes))
            continue
        key = None
        if (
            step.choice.template == TEMPLATE
            and not on_host(step)
            and step.request.outs[0].size < MOST
            and _each_by_itself(step)
        ):
            if step.request not in keys:
                keys[step.request] = alike_of(step.request)
            key = keys[step.request]
        work = _bytes(step.work)
        reads, writes = _bytes((*step.ins, *step.extras)), _bytes(step.outs)
        steps.append(Step(key, (*reads, *work), (*writes, *work), step.request.outs[0].size))
    return steps


def _bytes(buffers: Sequence[Buffer]) -> tuple[Range, ...]:
    return tuple((b.offset, b.offset + b.spec.size_bytes) for b in buffers if b.offset >= 0)


def _each_by_itself(call: Call) -> bool:
    """Is each output apart from the other ones, and from operands, unless it lies exactly on one of its kind?"""

    def meet(a: Buffer, b: Buffer) -> bool:
        return a.offset < b.offset + b.spec.size_bytes and b.offset < a.offset + a.spec.size_bytes

    for k, out in enumerate(call.outs):
        if any(meet(out, other) for other in call.outs[:k]):
            return False
        operands = [b for b in (*call.ins, *call.extras) if b.offset >= 0]
        if any(meet(out, b) and (b.offset, b.spec) != (out.offset, out.spec) for b in operands):
            return False
    return True
