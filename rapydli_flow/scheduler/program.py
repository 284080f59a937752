"""A rank's program: a flat list of kernel calls and collectives over one arena. A value; nothing is allocated here.

An output takes the buffer of an input that dies at this node and is read only where the output is
written (the index formula says so); the update of a leaf goes straight into the leaf once nothing
reads the old value any more; a part of a concatenation goes straight into its place there, and what gets a
border from other ranks goes where that will be around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import TooLittleMemory
from ..graph import Graph, Node, Value, checked
from ..ops import Copy, Leaf, Op
from ..spec import Block, Spec
from ..template import Device
from ..tuner import Choice, Request, Tuning
from .arena import Arena
from .beside import side_by_side
from .border import borders
from .collective import Exchange, Wait
from .homes import homes, owners
from .join import Part, joins
from .messages import staged_bytes


@dataclass(frozen=True)
class Buffer:
    """Bytes ``offset`` to ``offset + spec.size_bytes`` of the arena; a negative offset stands for a lent leaf."""

    offset: int
    spec: Spec


@dataclass(frozen=True)
class Call:
    """One kernel call. ``ins`` are the anchor's operands, ``extras`` those of its epilogue."""

    name: str
    request: Request
    choice: Choice
    ins: tuple[Buffer, ...]
    outs: tuple[Buffer, ...]
    work: tuple[Buffer, ...]
    extras: tuple[Buffer, ...]
    at: Block | None

    @property
    def title(self) -> str:
        """The op and its tail."""
        return self.request.title


@dataclass(frozen=True)
class Collective:
    """One meeting of all ranks: an `AllReduce` or an `Exchange`."""

    name: str
    op: Op
    ins: tuple[Buffer, ...]
    outs: tuple[Buffer, ...]

    @property
    def title(self) -> str:
        return self.op.title


@dataclass(frozen=True)
class Program:
    """What one rank runs for one step, on a ``device``. ``lent``: leaves that lie outside of the arena, where their
    owner has them.

    Of an asynchronous plan it is the update of what the rank owns, on a processor; ``gradients`` is what comes before
    it, which may be ``ahead`` of it by so many steps, and on a card. ``nccl``: what ranks tell each other goes from
    card to card.
    """

    steps: tuple[Call | Collective, ...]
    leaves: Mapping[str, Buffer]
    layout: Mapping[str, Block]
    starts: Mapping[str, Leaf]
    outputs: Mapping[str, Buffer]
    updates: tuple[str, ...]
    arena_bytes: int
    donated: int
    copied: int
    device: Device
    largest: tuple[tuple[str, int], ...] = ()
    lent: tuple[str, ...] = ()
    gradients: Program | None = None
    ahead: int = 0
    nccl: bool = False

    @property
    def behind(self) -> bool:
        """Do collectives run behind kernels?"""
        return any(isinstance(step, Collective) and step.op.behind for step in self.steps)

    @property
    def trained(self) -> Program:
        """The program that is fed batches."""
        return self.gradients or self

    @property
    def on(self) -> Device:
        """The device that the rank has."""
        return self.trained.device

    @property
    def halves(self) -> tuple[Program, ...]:
        """All that the rank runs for a step, each with a device of its own."""
        return (self,) if self.gradients is None else (self, self.gradients)

    @property
    def memory_bytes(self) -> int:
        """What a rank allocates: its arena, and of an asynchronous plan both, and what is under way between them."""
        if self.gradients is None:
            return self.arena_bytes
        first = self.gradients
        handed = sum(first.outputs[name].spec.size_bytes for name in self.kind("batch"))
        fresh = sum(first.leaves[name].spec.size_bytes for name in first.kind("param", "state"))
        return self.arena_bytes + first.arena_bytes + (self.ahead + 1) * handed + fresh

    @property
    def aside_bytes(self) -> int:
        """What a rank takes of its device beside that: on a card the state it sets aside, batches on their way, and
        messages that go from there to another card."""
        if self.on.kind == "cpu":
            return 0
        held, fed = (
            sum(self.trained.leaves[name].spec.size_bytes for name in self.trained.kind(*kinds))
            for kinds in (("param", "state"), ("batch",))
        )
        return held + 2 * fed + (self.staged_bytes if self.nccl else 0)

    @property
    def staged_bytes(self) -> int:
        """Room for the messages of the largest exchange from card to card."""
        meetings = (step.op for step in self.steps if isinstance(step, Collective))
        return max((staged_bytes(op) for op in meetings if isinstance(op, Exchange)), default=0)

    @property
    def needed_bytes(self) -> int:
        """All that a rank takes of its device's memory; what is updated beside a card is in the host's."""
        apart = self.device.kind != self.on.kind
        return (self.trained.arena_bytes if apart else self.memory_bytes) + self.aside_bytes

    def kind(self, *kinds: str) -> tuple[str, ...]:
        """Names of the leaves of these kinds, in order."""
        return tuple(name for name, leaf in self.starts.items() if leaf.kind in kinds)

    @property
    def requests(self) -> tuple[tuple[Request, Choice], ...]:
        """The distinct kernels of this half."""
        return tuple(dict.fromkeys((s.request, s.choice) for s in self.steps if isinstance(s, Call)))

    def check_memory(self, limit_bytes: int, rank: int = 0, *, where: str = "in this process") -> None:
        """Raise TooLittleMemory, with what would help and what takes it, if a rank needs more than the limit."""
        needed = self.needed_bytes
        if needed <= limit_bytes:
            return
        held = sum(self.leaves[name].spec.size_bytes for name in self.kind("param", "state"))
        helps = "Use a smaller batch, or more workers: for fewer records each, or strategy='spatial' for parts of them"
        if held > limit_bytes:
            helps = (
                f"Parameters and optimizer state alone take {held:,}, whatever the batch: divide them over more "
                "workers with strategy='filters' or 'pipeline', or shard='parameters'"
            )
        rows = "\n".join(f"  {name:<48} {size:>16,}" for name, size in self.trained.largest)
        raise TooLittleMemory(
            f"rank {rank} needs {needed:,} bytes for its arena but {limit_bytes:,} are free {where}: "
            f"{needed - limit_bytes:,} are missing. {helps}; or give it more memory. The largest buffers, "
            f"in bytes:\n{rows}"
        )


def compile_program(graph: Graph, tuning: Tuning, *, lent: Sequence[str] = ()) -> Program:
    """The program of a rank graph; the tuning gives each kernel its template and config, which fix its workspace.

    ``lent``: leaves that the program only reads, whose arrays the rank is lent instead of copying them.
    """
    if tuning.device.kind != "cpu":
        graph = checked(side_by_side)(graph)
    return _Planner(graph, tuning, tuple(lent)).run()


class _Planner:
    def __init__(self, graph: Graph, tuning: Tuning, lent: tuple[str, ...]) -> None:
        self.graph, self.tuning, self.lent = graph, tuning, lent
        self.arena = Arena()
        self.buffers: dict[Value, Buffer] = {}
        self.joined = joins(graph, tuning)
        self.bordered = borders(graph)
        parts = {v: part.whole for v, part in self.joined.items()}
        self.root = owners(graph, parts | {v: inner.whole for v, inner in self.bordered.items()})
        self.last = self._last_reads()
        self.permanent: set[int] = set()
        self.behind: dict[int, set[Value]] = {}  # what collectives read that are not waited for yet, by node
        self.sizes: dict[str, int] = {}
        self.steps: list[Call | Collective] = []
        self.donated = 0
        self.home = homes(graph)

    def _last_reads(self) -> dict[Value, int]:
        """For each value that owns memory, the last node that reads it or a view of it."""
        last = {self.own(v): i for i, node in enumerate(self.graph.nodes) for v in node.inputs}
        for v in (*self.graph.outputs.values(), *self.graph.updates.values()):
            last[self.own(v)] = len(self.graph.nodes)
        return last

    def own(self, value: Value) -> Value:
        return self.root.get(value, value)

    def take(self, name: str, spec: Spec) -> Buffer:
        self.sizes[f"{name} {spec}"] = spec.size_bytes
        return Buffer(self.arena.take(spec.size_bytes), spec)

    def leaf(self, node: Node) -> Buffer:
        """Memory of the arena, or a number for memory that is lent."""
        if node.name in self.lent:
            return Buffer(-1 - self.lent.index(node.name), node.specs[0])
        return self.take(node.name, node.specs[0])

    def run(self) -> Program:
        leaves: dict[str, Buffer] = {}
        starts: dict[str, Leaf] = {}
        layout: dict[str, Block] = {}
        for i, node in enumerate(self.graph.nodes):
            if isinstance(node.op, Leaf):
                leaves[node.name] = self.buffers[i, 0] = self.leaf(node)
                starts[node.name] = node.op
                layout[node.name] = node.at or Block.all(node.specs[0].shape)
        self.permanent = {b.offset for b in self.buffers.values()}
        for i, node in enumerate(self.graph.nodes):
            if not isinstance(node.op, Leaf):
                self.place(i, node)
        outputs, copied = self.copy_updates(leaves)
        largest = sorted(self.sizes.items(), key=lambda item: -item[1])[:12]
        return Program(
            steps=tuple(self.steps),
            leaves=leaves,
            layout=layout,
            starts=starts,
            outputs=outputs,
            updates=tuple(self.graph.updates),
            arena_bytes=self.arena.size_bytes,
            donated=self.donated,
            copied=copied,
            device=self.tuning.device,
            largest=tuple(largest),
            lent=self.lent,
        )

    def place(self, i: int, node: Node) -> None:
        if node.op.view:
            self.buffers[i, 0] = Buffer(self.buffers[node.inputs[0]].offset, node.specs[0])
            self.release(i, {self.own(v) for v in node.inputs} | self.wait(node), set())
            return
        if any(v in self.joined and self.joined[v].whole == (i, 0) for v in node.inputs):
            return  # it has all its parts already
        taken: set[int] = set()
        for k, spec in enumerate(node.specs):
            if (i, k) in self.joined:
                self.buffers[i, k] = self.whole(self.joined[i, k].whole)
                continue
            if (i, k) in self.bordered or (i, k) in self.buffers:  # in a border, or the border of what is there
                self.buffers[i, k] = self.whole((i, k))
                continue
            old = self.donor(i, node, k, taken)
            if old is not None:
                self.donated += 1
                taken.add(old.offset)
            self.buffers[i, k] = Buffer(old.offset, spec) if old else self.take(node.name, spec)
        ins = tuple(self.buffers[v] for v in node.inputs)
        outs = tuple(self.buffers[i, k] for k in range(len(node.specs)))
        if node.op.collective:
            self.steps.append(Collective(node.name, node.op, ins, outs))
        else:
            self.steps.append(self.call(node, ins, outs, self.joined.get((i, 0))))
        read = {self.own(v) for v in node.inputs}
        if node.op.behind:
            self.behind[i] = {own for own in read if self.buffers[own].offset not in taken}
        else:
            unread = [(i, k) for k in range(len(node.specs)) if self.own((i, k)) not in self.last]
            self.give(v for v in unread if self.buffers[v].offset not in self.permanent)
        self.release(i, read, taken)

    def wait(self, node: Node) -> set[Value]:
        """Wait for the collective that a node is behind of, if it is; what that has read."""
        source = node.inputs[0][0]
        if not isinstance(node.op, Wait) or source not in self.behind:
            return set()
        self.steps.append(Collective(self.graph.nodes[source].name, node.op, (), ()))
        return self.behind.pop(source)

    def whole(self, value: Value) -> Buffer:
        """The buffer of a value whose first part comes now, or that has some, or that gets a border."""
        if value not in self.buffers:
            spec, inner = self.graph.spec(value), self.bordered.get(value)
            if inner is None:
                self.buffers[value] = self.take(self.graph.nodes[value[0]].name, spec)
            else:
                self.buffers[value] = Buffer(self.whole(inner.whole).offset + inner.first, spec)
        return self.buffers[value]

    def call(self, node: Node, ins: tuple[Buffer, ...], outs: tuple[Buffer, ...], part: Part | None) -> Call:
        request, choice = self.tuning.serve(node.op, [b.spec for b in ins])
        if part is not None:
            into = part.first, outs[0].spec.shape[-1]
            request = replace(request, epilogue=replace(request.epilogue, into=into))
        work = tuple(self.take(f"{node.name} workspace", spec) for spec in self.tuning.workspace(request, choice))
        for buffer in work:
            self.arena.give(buffer.offset, buffer.spec.size_bytes)
        n = len(request.ins)
        at = (node.at or Block.all(node.specs[0].shape)) if node.op.indexed else None
        return Call(node.name, request, choice, ins[:n], outs, work, ins[n:], at)

    def donor(self, i: int, node: Node, k: int, taken: set[int]) -> Buffer | None:
        """The buffer that output k may be written into, if there is one."""
        index = node.op.indexing(*(self.graph.spec(v) for v in node.inputs))
        value, spec = (i, k), node.specs[k]
        if value in self.home:
            leaf = self.home[value]
            at_last = [j for j, v in enumerate(node.inputs) if self.own(v) == leaf]
            if self.buffers[leaf].offset in self.pinned:
                return None
            dead = self.last.get(leaf, -1) < i
            if dead or (self.last[leaf] == i and all(index.in_place(j, k) for j in at_last)):
                return self.buffers[leaf]
            return None
        for j, v in enumerate(node.inputs):
            buffer, own = self.buffers[v], self.own(v)
            once = sum(self.own(u) == own for u in node.inputs) == 1
            free = self.last[own] == i and buffer.offset not in self.permanent | self.pinned | taken
            alone = buffer.spec.size_bytes == self.buffers[own].spec.size_bytes  # no border around it
            if free and once and alone and buffer.spec == spec and index.in_place(j, k):
                return buffer
        return None

    def release(self, i: int, read: set[Value], taken: set[int]) -> None:
        """Give back what was read for the last time."""
        kept = self.permanent | taken | self.pinned
        self.give(own for own in read if self.last[own] <= i and self.buffers[own].offset not in kept)

    def give(self, values: Iterable[Value]) -> None:
        """Give memory of values back to the arena."""
        for value in values:
            self.arena.give(self.buffers[value].offset, self.buffers[value].spec.size_bytes)

    @property
    def pinned(self) -> set[int]:
        """Offsets of what collectives read that are not waited for yet."""
        return {self.buffers[own].offset for read in self.behind.values() for own in read}

    def copy_updates(self, leaves: Mapping[str, Buffer]) -> tuple[dict[str, Buffer], int]:
        """Updates that could not go home while they were made are copied at the end of the step, as if all at once.

        An old value that is still wanted, as an output or as the update of another leaf, is read before it
        is overwritten, or saved. The outputs, and the number of copies.
        """
        first = len(self.steps)
        moves = {name: self.buffers[value] for name, value in self.graph.updates.items()}
        moves = {name: source for name, source in moves.items() if source.offset != leaves[name].offset}
        changed = {leaves[name].offset for name in moves}
        outputs = {k: self.buffers[v] for k, v in self.graph.outputs.items()}
        for k, old in outputs.items():
            if old.offset in changed:
                outputs[k] = self.take(k, old.spec)
                self.copy(k, old, outputs[k])
        while moves:
            read = {source.offset for source in moves.values()}
            free = next((name for name in moves if leaves[name].offset not in read), None)
            if free is not None:
                self.copy(free, moves.pop(free), leaves[free])
                continue
            name = next(iter(moves))  # leaves that change places
            old = leaves[name]
            saved = self.take(f"{name}/old", old.spec)
            self.copy(f"{name}/old", old, saved)
            moves = {k: Buffer(saved.offset, s.spec) if s.offset == old.offset else s for k, s in moves.items()}
        return outputs, len(self.steps) - first

    def copy(self, name: str, source: Buffer, target: Buffer) -> None:
        request, choice = self.tuning.serve(Copy(), [source.spec])
        self.steps.append(Call(f"{name}/copy", request, choice, (source,), (target,), (), (), None))
