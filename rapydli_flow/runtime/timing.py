"""Where the time of a step goes: every kernel of it, timed in place, beside what this machine could do at most.

The program of the whole step runs on one rank with random records. After a warm-up, steps with a clock after each
call (median of each call) take turns with steps without (median of the whole).

* Operations are those of the formula: a convolution counts as a direct one, whatever its template does.
* Bytes are those of inputs read and outputs written once each, without workspaces.
* Attainable is the roofline: at best ``max(operations / peak, bytes / bandwidth)`` seconds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from ..arguments import check_whole
from ..graph import Graph, hoist, predicting
from ..ops import Slice
from ..scheduler import Call, Plan, Program, compile_program
from ..spec import Spec
from ..tuner import Choice, Request, Tuning
from .attribution import PHASES, Place, copied, places
from .building import MANY
from .feeding import label_classes
from .grouped import grouped_steps, kernels_of
from .participant import Participant
from .peak import Peak, peak_here
from .predict import only_needed
from .stale import rank_on
from .warm import warm

WARM_UP = 2


@dataclass(frozen=True)
class Timed:
    """One kernel call of a step. ``state``: 'tuned', 'pinned', 'default', or 'reference' where NumPy runs."""

    name: str
    place: Place
    title: str
    choice: str
    state: str
    time_s: float
    flops: int
    size_bytes: int
    itemsize: int = 4

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.size_bytes if self.size_bytes else 0.0

    def least_s(self, peak: Peak) -> float:
        """Seconds that it takes at best."""
        return max(self.flops * self.itemsize / 4 / peak.flops_s, self.size_bytes / peak.bytes_s)

    def computes(self, peak: Peak) -> bool:
        """Is it bound by operations, not by bytes?"""
        return self.flops * self.itemsize / 4 / peak.flops_s >= self.size_bytes / peak.bytes_s


@dataclass(frozen=True)
class Layer:
    """The kernels of one layer, and what they come to."""

    name: str
    kernels: tuple[Timed, ...]

    def phase_s(self, phase: str) -> float:
        return sum(kernel.time_s for kernel in self.kernels if kernel.place.phase == phase)

    @property
    def time_s(self) -> float:
        return sum(kernel.time_s for kernel in self.kernels)


@dataclass(frozen=True)
class Measured:
    """What was measured of a step; `rapydli_flow.runtime.timing_report.Timing` shows it."""

    network: str
    batch: int
    threads: int
    device: str
    training: bool
    iterations: int
    peak: Peak
    kernels: tuple[Timed, ...]
    step_s: float
    arena_bytes: int

    @property
    def layers(self) -> tuple[Layer, ...]:
        """In the order of the network; what belongs to none comes last."""
        found: dict[str, list[Timed]] = {}
        for kernel in sorted(self.kernels, key=lambda k: PHASES.index(k.place.phase)):
            found.setdefault(kernel.place.layer, []).append(kernel)
        return tuple(Layer(name, tuple(kernels)) for name, kernels in found.items())

    def phase_s(self, phase: str) -> float:
        return sum(kernel.time_s for kernel in self.kernels if kernel.place.phase == phase)

    @property
    def kernels_s(self) -> float:
        """The sum over all calls."""
        return sum(kernel.time_s for kernel in self.kernels)

    @property
    def records_s(self) -> float:
        return self.batch / self.step_s

    @property
    def overhead_s(self) -> float:
        """Seconds a call that are in no kernel: of the whole step what the sum over calls leaves."""
        return (self.step_s - self.kernels_s) / max(1, len(self.kernels))


def measure_step(
    graph: Graph,
    tuning: Tuning,
    *,
    name: str,
    threads: int,
    iterations: int,
    seed: int = 0,
) -> Measured:
    """Time a training step, or a network that predicts."""
    check_whole("time", iterations=iterations)
    graph = hoist(graph)
    (rank_graph,) = Plan(1, threads).rank_graphs(graph)
    program = compile_program(rank_graph, replace(tuning, strict=False))
    warm(kernels_of(program), tuning.device)
    peak_here(tuning.device, threads)
    rank = rank_on(program, tuning.device, threads=threads)
    rank.start(seed)
    _feed(rank, graph, seed)
    for i in range(WARM_UP):
        rank.step(seed, i)
    whole: list[float] = []
    calls: list[dict[str, float]] = []
    for i in range(WARM_UP, WARM_UP + 2 * iterations, 2):
        begin = time.perf_counter()
        rank.step(seed, i)
        whole.append(time.perf_counter() - begin)
        calls.append({took.name: took.time_s for took in rank.step_timed(seed, i + 1)[1]})  # in any order
    rank.close()
    where = places(graph, rank_graph)
    kernels = []
    together = grouped_steps(program)
    for i, step in enumerate(program.steps):
        assert isinstance(step, Call)  # one rank meets nobody
        place = where[step.name] if step.name in where else copied(step.name, graph)
        kernels.append(
            _timed(
                step, MANY if i in together else step.choice, place, tuning, median(times[step.name] for times in calls)
            )
        )
    return Measured(
        network=name,
        batch=_records(graph),
        threads=threads,
        device=tuning.device.name,
        training=graph.network is not None,
        iterations=iterations,
        peak=peak_here(tuning.device, threads, again=True),  # the first time may have been a busy moment
        kernels=tuple(kernels),
        step_s=median(whole),
        arena_bytes=program.arena_bytes,
    )


def network_of(graph: Graph) -> Graph:
    """What predicts of a training step: without loss, metrics and labels."""
    network = predicting(graph.network or graph)
    wanted = {name: v for name, v in network.outputs.items() if network.spec(v).shape} or network.outputs
    network.outputs = wanted
    return predicting(only_needed(network))


def programs_of(graph: Graph, tuning: Tuning, threads: int) -> list[Program]:
    """The programs of a run of this graph: of a training step also those that validate and predict."""
    graphs = [graph]
    if graph.network is not None:
        scalars = {name: v for name, v in graph.network.outputs.items() if not graph.network.spec(v).shape}
        scored = Graph(graph.network.nodes, scalars)
        graphs += [predicting(scored), network_of(graph)]
    tuning = replace(tuning, strict=False)
    return [compile_program(Plan(1, threads).rank_graphs(each)[0], tuning) for each in graphs]


def _timed(call: Call, choice: Choice, place: Place, tuning: Tuning, time_s: float) -> Timed:
    request, device = call.request, tuning.device
    key = request.key(device)
    state = "default"
    if choice.reference:
        state = "reference"
    elif tuning.choices.get(key) == choice:
        state = "pinned" if key in tuning.pinned else "tuned"
    ins, outs, whole = [*request.ins, *request.epilogue.extras], request.outs, request.whole or request.op
    return Timed(
        name=call.name,
        place=place,
        title=call.title,
        choice=str(choice),
        state=state,
        time_s=time_s,
        flops=whole.flops(*ins),
        size_bytes=sum(_read_bytes(request, spec) for spec in ins) + sum(spec.size_bytes for spec in outs),
        itemsize=max((np.dtype(spec.dtype).itemsize for spec in outs if spec.floating), default=4),
    )


def _read_bytes(request: Request, spec: Spec) -> int:
    """Bytes that are read of an operand: all, but of what a slice takes a part of, that part."""
    part = isinstance(request.op, Slice) and spec.shape == request.ins[0].shape
    return min(spec.size_bytes, request.outs[0].size_bytes) if part else spec.size_bytes


def _feed(rank: Participant, graph: Graph, seed: int) -> None:
    """Random records; labels among the classes that there are."""
    rng, classes = np.random.default_rng(seed), label_classes(graph)
    for name in rank.program.kind("batch"):
        spec = rank.program.leaves[name].spec
        if spec.floating:
            rank.put({name: rng.standard_normal(spec.shape, np.float32)})
        else:
            rank.put({name: rng.integers(0, classes.get(name, 1), spec.shape)})


def _records(graph: Graph) -> int:
    shapes = [leaf.shape for leaf in graph.leaves("batch") if leaf.shape]
    return shapes[0][0] if shapes else 1
