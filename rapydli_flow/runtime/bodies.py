"""What the tasks of a flow do: run nodes, and collectives, on arrays that other tasks gave.

On a card a node gives arrays that stay there (`card_array`); collectives have them on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from distributed import get_worker

from cpu_kernels.driver import run_kernel

from ..errors import DeviceMismatch
from ..scheduler import AllReduce, Exchange
from ..scheduler.collective import assemble, halves
from ..spec import Array, Block
from ..template import Device
from ..tuner import Choice, Request, Tuning
from .card_array import CardArray, desk_of
from .devices import device_of
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

    @property
    def done(self) -> list[list[int]]:
        """For each node those that nobody reads any more when it has run."""
        last = {i: i for i in range(len(self.kernels))}
        last |= {at[0]: i for i, inputs in enumerate(self.inputs) for outer, at in inputs if not outer}
        kept = {i for i, _ in self.gives}
        return [[node for node, at in last.items() if at == i and node not in kept] for i in range(len(self.kernels))]


def run_node(kernel: Kernel, given: Sequence[Any], device: Device, threads: int) -> tuple[Array | CardArray, ...]:
    """One kernel on arrays of its own; the results are new arrays."""
    request, choice = kernel.request, kernel.choice
    if device.kind != "cpu" and not choice.reference:
        return desk_of(device).run(request, choice, given, kernel.at)
    arrays = [np.asarray(x) for x in given]
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


def run_group(group: Group, picks: tuple[Any, ...], *sources: Any) -> tuple[Array | CardArray, ...]:
    """The body of a task: run a group of nodes on what other tasks gave."""
    device = at_hand(group.device)
    arguments = [item_of(sources[i], item) for i, item in picks]
    made: dict[int, tuple[Array | CardArray, ...]] = {}
    done = group.done
    for i, (kernel, inputs) in enumerate(zip(group.kernels, group.inputs, strict=True)):
        arrays = [arguments[at] if outer else made[at[0]][at[1]] for outer, at in inputs]
        made[i] = run_node(kernel, arrays, device, group.threads)
        del arrays
        for node in done[i]:
            del made[node]
    return tuple(made[i][k] for i, k in group.gives)


def run_collective(op: AllReduce | Exchange, picks: tuple[Any, ...], *sources: Any) -> tuple[Array, ...]:
    """The body of a collective's task: all ranks' parts in, in the order of the ranks, the result out."""
    arguments = [pick(sources[i], item) for i, item in picks]
    if isinstance(op, AllReduce):
        return tuple(halves(arguments[i :: op.parts]) for i in range(op.parts))
    return assemble(op, dict(zip((i for r in op.ranks for i in op.held_by(r)), arguments, strict=True)))


def item_of(value: Any, item: int | str | None) -> Any:
    """An item of what a task gave, where it is."""
    return value if item is None else value[item]


def pick(value: Any, item: int | str | None) -> Array:
    """An item of what a task gave, on the host."""
    return np.asarray(item_of(value, item))


def at_hand(like: Device) -> Device:
    """The device of this process that runs the kernels of another one: of a worker the GPU that it was started with."""
    if like.kind == "cpu" or like.emulated or (own := worker_gpu()) is None:
        return like
    if own.key == like.key:
        return own
    raise DeviceMismatch(
        f"worker {get_worker().address} has {own.name} ({own.key}), kernels were chosen for {like.name} ({like.key}). "
        "Say which workers compute: compute(workers=addresses)."
    )


def worker_gpu() -> Device | None:
    """The GPU that the worker of this process was started with, DeviceMismatch where it has none; None where this
    process is no worker."""
    try:
        worker = get_worker()
    except ValueError:
        return None
    own = device_of()
    if own.kind == "cuda" and not own.emulated:
        return own
    raise DeviceMismatch(
        f"worker {worker.address} has device {own.name}, and no GPU. Say which workers compute: "
        "compute(workers=addresses)."
    )
