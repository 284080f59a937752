"""Strategies: plans of a kind, made from a graph. Every one is a `Plan` that could be written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from math import inf, prod
from numbers import Integral, Real
from typing import Any

import numpy as np

from ..arguments import check_whole
from ..config import checked_device
from ..errors import SettingError, ShapeError
from ..graph import Graph, hoist
from ..ops import Conv, Matmul, Pointwise
from ..spec import Block, bounds_by, even_bounds
from .cost import Machine, node_s
from .devices import several
from .layout import Layout, Split, along_longest, bounds_of
from .naming import batched, divided_nodes, forward
from .plan import Plan

STRATEGIES = ("data", "spatial", "filters", "channels", "hybrid", "pipeline")
SHARDS = ("state", "parameters")
WIRES = ("bfloat16",)


def make_plan(
    graph: Graph,
    ranks: int,
    *,
    threads: int = 1,
    strategy: str | None = None,
    splits: Mapping[str, Split] | None = None,
    grid: Sequence[int] | None = None,
    stages: int | None = None,
    micro_batches: int | None = None,
    shard: str | None = None,
    average_every: int | None = None,
    staleness: int | None = None,
    overlap: bool = False,
    wire: str | None = None,
    nccl: bool = False,
    device: str | Sequence[str] | None = None,
    shares: Sequence[float] | None = None,
) -> Plan:
    """A plan of a strategy, or of splits alone; see `rapydli_flow.plan`."""
    check_whole("plan", ranks=ranks, threads=threads, stages=stages, micro_batches=micro_batches)
    check_whole("plan", 0, average_every=average_every, staleness=staleness)
    _check_kinds(grid, overlap=overlap, nccl=nccl)
    ranks, threads, grid = int(ranks), int(threads), grid and tuple(map(int, grid))
    kind = strategy or ("data" if not splits else "splits")
    if strategy is not None and strategy not in STRATEGIES:
        raise SettingError(f"plan: strategy={strategy!r} is not one of {', '.join(STRATEGIES)}.")
    if shard is not None and shard not in SHARDS:
        raise SettingError(f"plan: shard={shard!r} is not one of {', '.join(SHARDS)}.")
    for name, value, of in (("grid", grid, ("spatial",)), ("stages", stages, ("pipeline",))):
        if value is not None and kind not in of:
            raise SettingError(f"plan: {name} is for strategy {of[0]!r}, not {kind!r}.")
    devices = _devices(device, ranks)
    if shares is not None and (kind != "data" or not _are_shares(shares, ranks)):
        raise SettingError(
            f"plan: shares={shares!r} is not a number above 0 for each of {ranks} rank(s), for strategy 'data'."
        )
    if micro_batches is not None and kind not in ("pipeline", "splits"):
        raise SettingError(f"plan: micro_batches is for pipelines and splits, not for strategy {kind!r}.")
    if grid is not None and prod(grid) != ranks:
        raise SettingError(f"plan: a grid of {'x'.join(map(str, grid))} needs {prod(grid)} ranks, not {ranks}.")
    sizes: dict[str, Any] = {"grid": grid, "stages": stages, "micro_batches": micro_batches, "shares": shares}
    made = _divided(graph, ranks, kind, threads=threads, **sizes)
    apart = {"average_every": (average_every, 1), "staleness": (staleness, 0)}
    for name, (value, least) in apart.items():
        if value is not None and (kind != "data" or splits or shard or value < least):
            raise SettingError(
                f"plan: {name}={value} is not {least} or more steps, for strategy 'data' without splits and shards."
            )
    if average_every is not None and staleness is not None:
        raise SettingError("plan: average_every is for ranks that train by themselves, staleness for ones that do not.")
    if wire is not None:
        _check_wire(wire, shard=shard, staleness=staleness, average_every=average_every)
    if nccl:
        _check_nccl(devices, wire=wire, staleness=staleness, average_every=average_every)
    if splits:
        made = replace(made, splits={**made.splits, **splits})
        divided_nodes(graph, splits)
    made = replace(made, devices=devices)
    made = sharded(made, graph, parameters=shard == "parameters") if shard else made
    recipe: dict[str, Any] = {"strategy": strategy, "splits": splits, "micro_batches": micro_batches, "shard": shard}
    recipe |= {"average_every": average_every, "staleness": staleness, "overlap": overlap, "wire": wire}
    recipe |= {"nccl": nccl, "device": device, "shares": shares}
    made = replace(made, average_every=average_every or 0, staleness=staleness, overlap=overlap, wire=wire or "")
    return replace(made, nccl=nccl, recipe=recipe)


def _divided(
    graph: Graph,
    ranks: int,
    kind: str,
    *,
    threads: int,
    grid: Sequence[int] | None,
    stages: int | None,
    micro_batches: int | None,
    shares: Sequence[float] | None,
) -> Plan:
    """The plan of a strategy."""
    if kind == "pipeline":
        stages = ranks if stages is None else stages
        micro_batches = 2 * stages if micro_batches is None else micro_batches
        if ranks % stages:
            raise SettingError(f"plan: {ranks} ranks do not go evenly on {stages} stages.")
        return pipeline(graph, stages, micro_batches, data=ranks // stages, threads=threads)
    if kind == "spatial":
        return spatial(graph, grid or (ranks,), threads=threads)
    if kind in ("filters", "channels"):
        return model_parallel(graph, ranks, kind, threads=threads)
    if kind == "splits":
        return Plan(ranks, threads, micro_batches=1 if micro_batches is None else micro_batches, graph=graph)
    if kind == "hybrid":
        return hybrid(graph, ranks, threads=threads)
    return data_parallel(graph, ranks, threads=threads, shares=shares)


def _check_kinds(grid: object, **flags: object) -> None:
    """SettingError for a grid that is not of numbers, and flags that are none."""
    for name, given in flags.items():
        if not isinstance(given, bool):
            raise SettingError(f"plan: {name}={given!r} is not True or False.")
    if grid is not None and (not isinstance(grid, Sequence) or not all(_is(Integral, n) and n > 0 for n in grid)):
        raise SettingError(f"plan: grid={grid!r} is not a number of ranks, 1 or more, for each axis that is divided.")


def _check_wire(wire: str, **others: Any) -> None:
    """SettingError for what gradients cannot be rounded to, or for plans in which none go to all ranks."""
    if wire not in WIRES:
        raise SettingError(f"plan: wire={wire!r} is not {' or '.join(map(repr, WIRES))}, or None (as they are).")
    if any(value is not None for value in others.values()):
        raise SettingError(
            f"plan: wire={wire!r} is for gradients that all ranks get the sum of; with shard, staleness or "
            "average_every there are none."
        )


def _are_shares(shares: object, ranks: int) -> bool:
    """A number for each rank?"""
    if not isinstance(shares, Sequence | np.ndarray) or len(shares) != ranks:
        return False
    return all(_is(Real, share) and 0 < share < inf for share in shares)


def _is(kind: type, value: Any) -> bool:
    """A number of a kind, NumPy's too; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_nccl(devices: Sequence[str], **others: Any) -> None:
    """SettingError for what does not go with NCCL."""
    if "cpu" in devices or several(devices):
        raise SettingError(f"plan: nccl=True is for ranks on GPUs, not for {', '.join(dict.fromkeys(devices))}.")
    for name, value in others.items():
        if value is not None:
            raise SettingError(
                f"plan: nccl=True is for what ranks on GPUs tell each other in each step, as it is; {name}={value!r} "
                "goes through the host."
            )


def _devices(device: str | Sequence[str] | None, ranks: int) -> tuple[str, ...]:
    """The name of a device for each rank."""
    if device is None:
        return ()
    names = (device,) * ranks if isinstance(device, str) else tuple(device)
    for name in names:
        checked_device(name, "plan: device=")
    if len(names) != ranks:
        raise SettingError(f"plan: device={list(names)} has {len(names)} names for {ranks} rank(s).")
    return names


def remade(plan: Plan, graph: Graph, ranks: int) -> Plan:
    """The like of a plan for other ranks; ShapeError for one that was written by hand, or that does not go with so
    many."""
    if ranks == plan.ranks:
        return plan
    if plan.recipe is None:
        raise ShapeError(f"plan: one that was written by hand is for its {plan.ranks} ranks, not for {ranks}.")
    return make_plan(graph, ranks, threads=plan.threads, **plan.recipe)


def data_parallel(graph: Graph, ranks: int, *, threads: int = 1, shares: Sequence[float] | None = None) -> Plan:
    """Every rank has its records of the batch: what is fed is divided along its first axis, evenly, where the first
    ranks get the larger parts, or by ``shares``."""
    layouts: dict[str, Layout] = {}
    for leaf in graph.leaves("batch"):
        shape = leaf.spec.shape
        if not shape or shape[0] < ranks:
            raise ShapeError(
                f"plan: {leaf.name} has {shape[0] if shape else 1} records for {ranks} ranks. "
                "Use a larger batch or fewer ranks."
            )
        bounds = even_bounds(shape[0], ranks) if shares is None else bounds_by(shares, shape[0])
        if any(lo == hi for lo, hi in pairwise(bounds)):
            raise ShapeError(
                f"plan: with shares={list(shares or ())} a rank has none of the {shape[0]} records of {leaf.name}. "
                "Use a larger batch, or other shares."
            )
        layouts[leaf.name] = Block.along(shape, 0, bounds)
    return Plan(ranks, threads, layouts if ranks > 1 else {}, graph=graph, recipe={})


def spatial(graph: Graph, grid: Sequence[int], *, threads: int = 1) -> Plan:
    """Every rank has a part of each picture: rows, or a ``grid`` of rows and columns, or of volumes.

    Ranks exchange the borders that windows reach over. Source: "border neurons" of the mission; Dryden et al.,
    "Improving strong-scaling of CNN training by exploiting finer-grained parallelism" (2019).
    """
    ranks = prod(grid)
    layouts: dict[str, Layout] = {}
    for leaf in graph.leaves("batch"):
        shape = leaf.spec.shape
        space = shape[1:-1]
        if not space:
            continue
        if len(grid) > len(space):
            raise ShapeError(
                f"plan: {leaf.name} {leaf.spec} has {len(space)} spatial axes, not the {len(grid)} of {grid}."
            )
        what = f"plan: {leaf.name} {leaf.spec}, axis"
        bounds = {1 + a: bounds_of(f"{what} {1 + a}", parts, space[a]) for a, parts in enumerate(grid)}
        layouts[leaf.name] = Block.grid(shape, bounds)
    if not layouts:
        raise ShapeError("plan: nothing that is fed has spatial axes to divide.")
    return Plan(ranks, threads, layouts if ranks > 1 else {}, graph=graph)


def model_parallel(graph: Graph, ranks: int, axis: str = "filters", *, threads: int = 1) -> Plan:
    """Every rank has some filters of each convolution and dense layer, or ``axis="channels"``: some of its inputs.

    Layers with fewer of them than ranks, or with groups, are computed whole.
    """
    if axis not in ("filters", "channels"):
        raise SettingError(f"plan: axis={axis!r} is not filters or channels.")
    splits = _along(graph, axis, ranks, (Conv, Matmul))
    if not splits:
        raise ShapeError(f"plan: no layer has {ranks} {axis} for {ranks} ranks. Use fewer ranks.")
    return Plan(ranks, threads, splits=splits if ranks > 1 else {}, graph=graph)


def hybrid(graph: Graph, ranks: int, *, threads: int = 1) -> Plan:
    """Convolutions divided by records, dense layers by filters, where most parameters are.

    Source: Krizhevsky, "One weird trick for parallelizing convolutional neural networks" (2014).
    """
    splits = _along(graph, "filters", ranks, (Matmul,))
    return replace(data_parallel(graph, ranks, threads=threads), splits=splits if ranks > 1 else {})


def pipeline(graph: Graph, stages: int, micro_batches: int, *, data: int = 1, threads: int = 1) -> Plan:
    """Stages of neighbouring layers, each on ``data`` ranks of its own, which go through the batch in micro-batches.

    Stages take about equally long, by rooflines, and begin with a kernel of their own: not with what is fused into
    another one's. Ranks 0 to ``data - 1`` have the first one.
    """
    if stages < 1 or micro_batches < 1 or data < 1:
        raise SettingError(f"plan: stages={stages}, micro_batches={micro_batches}, data={data} are not 1 or more.")
    known, machine = batched(graph), Machine()
    nodes = [graph.nodes[i] for i in forward(graph) if (i, 0) in known]
    firsts = [n for n, node in enumerate(nodes) if n == 0 or not (isinstance(node.op, Pointwise) or node.op.view)]
    if len(firsts) < stages:
        raise ShapeError(f"plan: {len(firsts)} layers cannot be divided into {stages} stages.")
    costs = [node_s(node.op, [graph.spec(v) for v in node.inputs], node.specs, machine) for node in nodes]
    before = list(accumulate(costs, initial=0.0))
    begins = _balanced([before[n] for n in firsts], before[-1], stages)
    splits: dict[str, Split] = {}
    for n, node in enumerate(nodes):
        stage = sum(firsts[i] <= n for i in begins) - 1
        splits[node.name] = Split(samples=data, ranks=tuple(range(stage * data, (stage + 1) * data)))
    return Plan(stages * data, threads, splits=splits, micro_batches=micro_batches, graph=graph)


def sharded(plan: Plan, graph: Graph, *, parameters: bool = False) -> Plan:
    """The plan with optimizer state, and ``parameters`` too if wanted, divided over all ranks. State of the network
    itself, as the running statistics of batch norm, stays whole: all ranks can predict. What is too small to be divided
    stays whole, too. Where ranks are on devices of several kinds all of it is divided, or the first one's: see
    `rapydli_flow.scheduler.devices`.

    Gradients are then summed where they are needed (reduce-scatter), each rank updates its part, and parameters are
    gathered. Source: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models" (2020).
    """
    if plan.splits:
        raise SettingError("plan: state is sharded over ranks that all hold it; plans with splits place it by layers.")
    layouts = dict(plan.layouts)
    own = {leaf.name for leaf in graph.network.leaves("state")} if graph.network is not None else set()
    for leaf in graph.leaves(*(("state", "param") if parameters else ("state",))):
        if leaf.name in own and not plan.mixed:
            continue
        layout = along_longest(leaf.shape, plan.ranks)
        if layout is None and plan.mixed and leaf.shape:
            layout = (Block.all(leaf.shape), *(None,) * (plan.ranks - 1))
        if layout is not None:
            layouts[leaf.name] = layout
    return replace(plan, layouts=layouts)


def _balanced(begins: Sequence[float], end: float, parts: int) -> list[int]:
    """Numbers of the layers, by when they begin, that parts begin with: the longest part is as short as can be."""
    n, ends = len(begins), [*begins[1:], end]
    longest = [[0.0] * n for _ in range(parts)]  # of the layers from i on, in so many parts and one
    choice = [[n] * n for _ in range(parts)]
    for part in range(parts):
        for i in range(n):
            if part == 0:
                longest[0][i] = end - begins[i]
                continue
            found = [(max(ends[j - 1] - begins[i], longest[part - 1][j]), j) for j in range(i + 1, n - part + 1)]
            longest[part][i], choice[part][i] = min(found, default=(float("inf"), n))
    out = [0]
    for part in range(parts - 1, 0, -1):
        out.append(choice[part][out[-1]])
    return out


def _along(graph: Graph, axis: str, ranks: int, kinds: tuple[type, ...]) -> dict[str, Split]:
    """Layers of these kinds divided along an axis, if they have enough of it."""
    graph = hoist(graph)
    found: dict[str, Split] = {}
    for node in (graph.nodes[i] for i in forward(graph)):
        if not isinstance(node.op, kinds) or getattr(node.op, "groups", 1) > 1:
            continue
        extent = (node.specs[0] if axis == "filters" else graph.spec(node.inputs[0])).shape[-1]
        if extent >= ranks:
            found[node.name] = Split(filters=ranks) if axis == "filters" else Split(channels=ranks)
    return found
