"""What the tasks of a flow do: run nodes, and collectives, on arrays that other tasks gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpu_kernels.driver import run_kernel

from ..scheduler import AllReduce, Exchange
from ..scheduler.collective import assemble, halves
from ..spec import Array, Block
from ..template import Device
from ..tuner import Choice, Request, Tuning
from .participant import at_array, run_reference
from .rank import kernel_of


@dataclass(frozen=True)
class Kernel:
    """What it takes to run one node on arrays."""

    request: Request
    choice: Choice
    at: Block | None


@dataclass(frozen=True)
class Group:
    """Nodes that one task runs. Inputs are (True, argument) or (False, (node of the group, output))."""

    kernels: tuple[Kernel, ...]
    inputs: tuple[tuple[tuple[bool, Any], ...], ...]
    gives: tuple[tuple[int, int], ...]
    device: Device
    threads: int


def run_node(kernel: Kernel, arrays: Sequence[Array], device: Device, threads: int) -> tuple[Array, ...]:
    """One kernel on arrays of its own; the results are new arrays."""
    request, choice = kernel.request, kernel.choice
    if choice.reference:
        return run_reference(request, arrays, kernel.at)
    n = len(request.ins)
    outs = tuple(np.empty(s.shape, s.dtype) for s in request.outs)
    specs = Tuning(device).workspace(request, choice)
    work = tuple(np.empty(s.shape, s.dtype) for s in specs)
    at = at_array(kernel.at or Block.all(outs[0].shape))
    ins = [np.ascontiguousarray(x) for x in arrays]
    run_kernel(kernel_of(request, choice, device), ins[:n], outs, work=work, extras=ins[n:], at=at, threads=threads)
    return outs


def run_group(group: Group, picks: tuple[Any, ...], *sources: Any) -> tuple[Array, ...]:
    """The body of a task: run a group of nodes on what other tasks gave."""
    arguments = [pick(sources[i], item) for i, item in picks]
    made: list[tuple[Array, ...]] = []
    for kernel, inputs in zip(group.kernels, group.inputs, strict=True):
        arrays = [arguments[at] if outer else made[at[0]][at[1]] for outer, at in inputs]
        made.append(run_node(kernel, arrays, group.device, group.threads))
    return tuple(made[i][k] for i, k in group.gives)


def run_collective(op: AllReduce | Exchange, picks: tuple[Any, ...], *sources: Any) -> tuple[Array, ...]:
    """The body of a collective's task: all ranks' parts in, in the order of the ranks, the result out."""
    arguments = [pick(sources[i], item) for i, item in picks]
    if isinstance(op, AllReduce):
        return tuple(halves(arguments[i :: op.parts]) for i in range(op.parts))
    return assemble(op, dict(zip((i for r in op.ranks for i in op.held_by(r)), arguments, strict=True)))


def pick(value: Any, item: int | str | None) -> Array:
    """An item of what a task gave."""
    return np.asarray(value if item is None else value[item])
