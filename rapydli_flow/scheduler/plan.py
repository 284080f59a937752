"""Plan: how a graph is divided over ranks. A value, made without side effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from .. import markup
from ..errors import SettingError
from ..graph import Graph, checked, hoist
from ..spec import Block
from ..tuner import ANY_CARD, ANY_CPU, Tuning
from .alike import fuse_alike
from .border import borders
from .bucket import bucket
from .collective import AllReduce, Exchange
from .cost import Machine
from .devices import check_replicas, several
from .early import update_early
from .independent import independent
from .layout import Layout, Split
from .micro import in_turns
from .naming import divided_nodes
from .placement import Placement
from .program import Program, compile_program
from .split import split
from .stale import halves, sends


@dataclass(frozen=True)
class Plan:
    """Number of ranks, threads of each, and how the work is divided.

    ``layouts``: which block of a leaf lies on each rank, by name; other leaves lie where they are needed. ``splits``:
    how layers are divided, by name, scope or pattern ('conv_1', 'stem', 'conv_*'); other nodes are divided so that they
    are done soonest where their operands are. ``micro_batches``: pieces of a rank's part of the batch that are computed
    one after the other. ``average_every``: ranks train by themselves for so many steps, and then average (local SGD);
    0: they are one. ``staleness``: steps that a rank may be ahead of the updates of parameters, which are divided over
    ranks (asynchronous); None: it waits for them in each step. ``overlap``: gradients are summed while the backward
    pass goes on. ``wire``: what gradients are rounded to on their way, 'bfloat16' or ''. ``nccl``: GPUs hand each other
    what ranks tell each other. ``devices``: what each rank is on, 'cpu', 'cuda' (in one process also 'cuda:1') or
    'emulated'; without them all are on one kind, which the run has. ``graph`` is what the plan was made for, if it is
    known; a notebook then shows bytes, too. ``recipe``: what `make_plan` was asked for, so that the like can be made
    for other ranks.
    """

    ranks: int = 1
    threads: int = 1
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    splits: Mapping[str, Split] = field(default_factory=dict)
    micro_batches: int = 1
    average_every: int = 0
    staleness: int | None = None
    overlap: bool = False
    wire: str = ""
    nccl: bool = False
    devices: tuple[str, ...] = ()
    graph: Graph | None = field(default=None, repr=False, compare=False)
    recipe: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def one(self) -> bool:
        """Does one rank do everything at once?"""
        return self.ranks == 1 and self.micro_batches == 1

    @property
    def mixed(self) -> bool:
        """Are ranks on devices of several kinds?"""
        return several(self.devices)

    @property
    def asynchronous(self) -> bool:
        """Do ranks go on before parameters are updated?"""
        return self.staleness is not None and self.ranks > 1

    @property
    def apart(self) -> bool:
        """Does each rank train by itself within a step?"""
        return self.ranks > 1 and (self.average_every > 0 or self.staleness is not None)

    def rank_graphs(self, graph: Graph) -> tuple[Graph, ...]:
        """Equal nodes merged, what a channel shares hoisted, split, then the passes on rank graphs: collectives
        bucketed, tails fused, updates early. Of an asynchronous plan: what comes before the updates.

        Nothing is merged after the split: two nodes may be equal on one rank only.
        """
        return self.rank_halves(graph)[0]

    def rank_halves(self, graph: Graph) -> tuple[tuple[Graph, ...], tuple[Graph, ...]]:
        """What ranks run, and, of an asynchronous plan, what updates the parameters that each owns behind it."""
        graph = checked(hoist)(graph)
        if self.asynchronous:
            first, updates = halves(graph, self.ranks, self.layouts)
            return self._passed(first), self._passed(updates)
        parts: tuple[Graph, ...] = (graph,)
        named = divided_nodes(graph, self.splits)
        if not self.one:
            parts = split(graph, self.ranks, self.layouts, named, micro_batches=self.micro_batches)
            if not self.average_every:
                check_replicas(graph, parts, self.devices)
        if self.micro_batches > 1:
            parts = in_turns(parts, self.depths(graph, named), Machine())
        if self.average_every and self.ranks > 1:
            parts = independent(parts)
        return self._passed(parts), ()

    def _passed(self, parts: Sequence[Graph]) -> tuple[Graph, ...]:
        """The passes on rank graphs."""
        parts = fuse_alike(bucket(parts, behind=self.overlap, wire=self.wire))
        return tuple(checked(update_early)(part) for part in parts)

    def programs(self, graph: Graph, *tunings: Tuning) -> tuple[Program, ...]:
        """What each rank runs for one step; ``tunings``: of each kind of device that ranks are on."""
        each = self.tunings(tunings)
        behind = [tuning if tuning.device.kind == "cpu" else Tuning(ANY_CPU) for tuning in each]
        nccl = self.nccl and self.ranks > 1
        if nccl and any(tuning.device.kind == "cpu" for tuning in each):
            raise SettingError("plan: nccl=True is for ranks on GPUs. Run it with device='cuda', or leave it out.")
        parts, behind_them = self.rank_halves(graph)
        made, updates = tuple(map(compile_program, parts, each)), tuple(map(compile_program, behind_them, behind))
        made = tuple(replace(program, nccl=nccl) for program in made)
        if not updates:
            return made
        ahead = self.staleness or 0
        return tuple(replace(u, gradients=p, ahead=ahead) for p, u in zip(made, updates, strict=True))

    def tunings(self, tunings: Sequence[Tuning]) -> list[Tuning]:
        """Of the tunings of each kind of device, that of each rank."""
        return [self._tuning(rank, tunings) for rank in range(self.ranks)]

    def _tuning(self, rank: int, tunings: Sequence[Tuning]) -> Tuning:
        """That of a rank's device."""
        if not self.devices:
            return tunings[0]
        found = next((tuning for tuning in tunings if tuning.device.is_a(self.devices[rank])), None)
        if found is None:
            given, wanted = ", ".join(tuning.device.name for tuning in tunings), self.devices[rank]
            raise SettingError(f"plan: rank {rank} is on {wanted!r}, but the tuning is of {given}.")
        return found

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

    def explain(self, graph: Graph, placement: Placement | None = None) -> str:
        """How fed inputs and layers are divided, and what each rank holds, sends and needs for a step; also where the
        ranks are, if they are placed."""
        many = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}, {self.threads} thread(s) each"
        lines = [many + (f", {self.micro_batches} micro-batches" if self.micro_batches > 1 else "")]
        for name, layout in self.layouts.items():
            lines.append(f"  {name}: " + "  ".join(f"rank {r} {block}" for r, block in enumerate(layout)))
        if self.average_every:
            lines.append(f"  averaged every {self.average_every} steps: another run than that of one worker")
        if self.asynchronous:
            lines.append(
                f"  parameters are divided; a rank may be {self.staleness} steps ahead of their updates: "
                + ("another run than that of one worker" if self.staleness else "it is as if it waited in each step")
            )
        if self.wire:
            lines.append(f"  gradients are rounded to {self.wire} on their way: another run than that of one worker")
        if self.nccl:
            lines.append("  GPUs hand each other all this by NCCL; where all get a sum, its order is NCCL's own")
        lines += [f"  {name}: {split}" for name, split in self.splits.items()]
        for rank, needs in enumerate(self._needs(graph)):
            lines.append(f"  rank {rank}{f' on {self.devices[rank]}' if self.devices else ''}: {needs}")
        return "\n".join([*lines, placement.explain()] if placement is not None else lines)

    def _repr_html_(self) -> str:
        """A row for each rank: its blocks, and what it holds and needs."""
        many = f"{self.ranks} ranks" if self.ranks > 1 else "1 rank"
        head = markup.title(f"Plan: {many}", f"{self.threads} thread{'s' * (self.threads > 1)} each")
        blocks = ["  ".join(f"{name} {layout[r]}" for name, layout in self.layouts.items()) for r in range(self.ranks)]
        names = [f"rank {rank}" + (f" on {self.devices[rank]}" if self.devices else "") for rank in range(self.ranks)]
        rows = [(name, held or "everything") for name, held in zip(names, blocks, strict=True)]
        if self.splits:
            rows = [(name, "its part of layers") for name in names]
        if self.graph is None:
            return head + markup.table(("", "holds"), rows)
        head_row = ("", "holds", "inputs", "parameters", "state", "sent a step", "memory")
        sizes = [tuple(map(markup.size, needs.sizes)) for needs in self._known]
        table = markup.table(head_row, [(*a, *b) for a, b in zip(rows, sizes, strict=True)], right=5)
        return (
            head
            + table
            + markup.small("Memory: all arrays of a step, with the workspace of kernels that are not tuned.")
        )

    @cached_property
    def _known(self) -> list[Needs]:
        assert self.graph is not None
        return self._needs(self.graph)

    def _needs(self, graph: Graph) -> list[Needs]:
        """What ranks hold, send and need."""
        graphs, updates = self.rank_halves(graph)
        handed, owned = (
            [sum(x.spec.size_bytes for x in update.leaves(*kinds)) for update in updates]
            for kinds in (("batch",), ("param", "state"))
        )
        out = []
        planned: dict[tuple[Any, ...], int] = {}  # ranks with equal arrays, alike within each other, need equal memory
        for rank, part in enumerate(graphs):
            both = [part, *updates[rank : rank + 1]]
            inputs = sum(x.spec.size_bytes for x in part.leaves("batch"))
            parameters, state = (
                sum(x.spec.size_bytes for half in both for x in half.leaves(kind)) for kind in ("param", "state")
            )
            meetings = [(n.op, [half.spec(v) for v in n.inputs]) for half in both for n in half if n.op.collective]
            sent = sum(op.sent_bytes(*ins) for op, ins in meetings if isinstance(op, AllReduce | Exchange))
            arena = 0
            card = bool(self.devices) and self.devices[rank] != "cpu"
            for half in both:
                there = card and half is part
                key = (there, *(str(node.specs) for node in half), *borders(half).items())
                if key not in planned:
                    program = compile_program(half, Tuning(ANY_CARD if there else ANY_CPU))
                    planned[key] = program.arena_bytes + program.aside_bytes
                arena += planned[key]
            sent += sum(sends(handed, owned, rank).values())
            out.append(Needs((inputs, parameters, state, sent, arena), len(meetings) + 2 * bool(updates)))
        return out

    # on disk ----------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON; the graph is not part of it."""
        layouts = {
            name: [block and [block.lo, block.hi, block.whole] for block in layout]
            for name, layout in self.layouts.items()
        }
        return {
            "ranks": self.ranks,
            "threads": self.threads,
            "layouts": layouts,
            "splits": {name: asdict(split) for name, split in self.splits.items()},
            "micro_batches": self.micro_batches,
            "average_every": self.average_every,
            "staleness": self.staleness,
            "overlap": self.overlap,
            "wire": self.wire,
            "nccl": self.nccl,
            "devices": self.devices,
        }

    @classmethod
    def from_json(cls, form: Mapping[str, Any]) -> Plan:
        """From what `to_json` gave."""
        layouts = {
            name: tuple(block and Block(*map(tuple, block)) for block in layout)
            for name, layout in form["layouts"].items()
        }
        splits = {
            name: Split(**{axis: tuple(v) if isinstance(v, list) else v for axis, v in split.items()})
            for name, split in form["splits"].items()
        }
        rest = {name: form[name] for name in ("micro_batches", "average_every", "staleness", "overlap", "wire")}
        rest |= {"nccl": form.get("nccl", False), "devices": tuple(form.get("devices", ()))}
        return cls(form["ranks"], form["threads"], layouts, splits, **rest)


@dataclass(frozen=True)
class Needs:
    """Bytes of a rank: inputs, parameters, state, what it sends in a step, its whole arena; and how often it meets."""

    sizes: tuple[int, int, int, int, int]
    meetings: int

    def __str__(self) -> str:
        inputs, parameters, state, sent, arena = (f"{size:,}" for size in self.sizes)
        return (
            f"{inputs} bytes of inputs, {parameters} of parameters, {state} of state; sends {sent} in "
            f"{self.meetings} collectives a step; needs {arena}"
        )
