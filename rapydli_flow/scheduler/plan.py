"""Plan: how a graph is divided over ranks. A value, made without side effects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from .. import markup
from ..graph import Graph, checked, hoist
from ..template import Device
from ..tuner import Tuning
from .alike import fuse_alike
from .bucket import bucket
from .collective import AllReduce, Exchange
from .cost import Machine
from .early import update_early
from .layout import Layout, Split
from .micro import in_turns
from .naming import divided_nodes
from .program import compile_program
from .split import split

ANY_CPU = Device("cpu", "any")  # whose untuned kernels a plan's memory is counted with


@dataclass(frozen=True)
class Plan:
    """Number of ranks, threads of each, and how the work is divided.

    ``layouts``: which block of a leaf lies on each rank, by name; other leaves lie where they are needed.
    ``splits``: how layers are divided, by name, scope or pattern ('conv_1', 'stem', 'conv_*'); other nodes are divided
    so that they are done soonest where their operands are. ``micro_batches``: pieces of a rank's part of the batch that
    are computed one after the other. ``graph`` is what the plan was made for, if it is known; a notebook then shows
    bytes, too.
    """

    ranks: int = 1
    threads: int = 1
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    splits: Mapping[str, Split] = field(default_factory=dict)
    micro_batches: int = 1
    graph: Graph | None = field(default=None, repr=False, compare=False)

    @property
    def one(self) -> bool:
        """Does one rank do everything at once?"""
        return self.ranks == 1 and self.micro_batches == 1

    def rank_graphs(self, graph: Graph) -> tuple[Graph, ...]:
        """Equal nodes merged, what a channel shares hoisted, split, then the passes on rank graphs: collectives
        bucketed, tails fused, updates early.

        Nothing is merged after the split: two nodes may be equal on one rank only.
        """
        graph = checked(hoist)(graph)
        parts: tuple[Graph, ...] = (graph,)
        named = divided_nodes(graph, self.splits)
        if not self.one:
            parts = split(graph, self.ranks, self.layouts, named, micro_batches=self.micro_batches)
        if self.micro_batches > 1:
            parts = in_turns(parts, self.depths(graph, named), Machine())
        parts = fuse_alike(bucket(parts))
        return tuple(checked(update_early)(part) for part in parts)

    def depths(self, graph: Graph, named: Mapping[str, Split]) -> list[int]:
        """For each rank, the number of stages from its own to the last: micro-batches that are in flight there.

        Stages are groups of ranks, in the order of the layers that they compute.
        """
        stages = list(dict.fromkeys(named[node.name].ranks for node in graph if node.name in named))
        found = [1] * self.ranks
        for i, ranks in enumerate(stages):
            for rank in ranks or range(self.ranks):
                found[rank] = max(found[rank], len(stages) - i)
        return found

    def explain(self, graph: Graph) -> str:
        """What each rank holds of the divided inputs, and the bytes that ranks send each other in a step."""
        lines = [f"{self.ranks} rank{'s' if self.ranks > 1 else ''}, {self.threads} thread(s) each"]
        for name, layout in self.layouts.items():
            lines.append(f"  {name}: " + "  ".join(f"rank {r} {block}" for r, block in enumerate(layout)))
        first = self.rank_graphs(graph)[0]
        meetings = [node for node in first if isinstance(node.op, AllReduce | Exchange)]
        size_bytes = sum(spec.size_bytes for node in meetings for spec in node.specs)
        lines.append(f"  {len(meetings)} collectives and {size_bytes:,} bytes a step")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """A row for each rank: its blocks, and what it holds and needs."""
        many = f"{self.ranks} ranks" if self.ranks > 1 else "1 rank"
        head = markup.title(f"Plan: {many}", f"{self.threads} thread{'s' * (self.threads > 1)} each")
        blocks = ["  ".join(f"{name} {layout[r]}" for name, layout in self.layouts.items()) for r in range(self.ranks)]
        rows = [(f"rank {rank}", held or "everything") for rank, held in enumerate(blocks)]
        if self.graph is None:
            return head + markup.table(("", "holds"), rows)
        sizes = [tuple(map(markup.size, size)) for size in self._sizes]
        names = ("", "holds", "inputs", "parameters", "state", "sent a step", "memory")
        table = markup.table(names, [(*a, *b) for a, b in zip(rows, sizes, strict=True)], right=5)
        return (
            head
            + table
            + markup.small("Memory: all arrays of a step, with the workspace of kernels that are not tuned.")
        )

    @cached_property
    def _sizes(self) -> tuple[tuple[int, ...], ...]:
        """Bytes of each rank: inputs, parameters, state, what it sends in a step, its whole arena."""
        assert self.graph is not None
        out = []
        planned: dict[tuple[str, ...], int] = {}  # ranks with equal arrays need equal memory
        for graph in self.rank_graphs(self.graph):
            held = [sum(leaf.spec.size_bytes for leaf in graph.leaves(kind)) for kind in ("batch", "param", "state")]
            sent = sum(s.size_bytes for n in graph if isinstance(n.op, AllReduce | Exchange) for s in n.specs)
            key = tuple(str(node.specs) for node in graph)
            if key not in planned:
                planned[key] = compile_program(graph, Tuning(ANY_CPU)).arena_bytes
            out.append((*held, sent, planned[key]))
        return tuple(out)
