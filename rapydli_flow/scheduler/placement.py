"""Which worker each rank is placed on: those that tell each other much share a host, and loads run where the bytes are.

    ranks of a halo    0 - 1 - 2 - 3 - 4 - 5
    in turn            a   b   a   b   a   b         5 borders go from host to host
    placed             a   a   a   b   b   b         1

A graph partitioned over hosts by exchanges (after Kernighan and Lin, "An efficient heuristic procedure for partitioning
graphs", 1970): from several first placements the two ranks change places that gain most, until no change gains
anything. What is minimised are seconds that messages and reads of a step take, added over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import NoWorkers
from ..spec import Array
from .links import Links
from .program import Program

GROWN, SHIFTED = 4, 8  # first placements: hosts from which one is grown, places by which the slots are shifted
EVEN = 1e-9  # of the whole: what is nearer is a tie

Traffic = Sequence[Sequence[int]]  # bytes a step, from each rank to each other; see `traffic`


@dataclass(frozen=True)
class Slot:
    """A worker, as a place for a rank.

    ``free_bytes``: None without a limit. ``reaches``: can it open the data? ``held``: the share of the records that it
    has in memory, from 0 to 1.
    """

    address: str
    host: str
    free_bytes: int | None = None
    threads: int = 1
    device: str = ""
    reaches: bool = True
    held: float = 0.0

    def runs(self, device: str) -> bool:
        """Has it such a device, as far as either is known?"""
        return not (device and self.device) or device == self.device


@dataclass(frozen=True)
class Moved:
    """What a step moves: bytes from host to host, bytes of records that are read, seconds of it over all ranks."""

    between_bytes: int
    read_bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.between_bytes:,} bytes between hosts, {self.read_bytes:,} read, {self.seconds * 1e3:.4g} ms"


@dataclass(frozen=True, repr=False)
class Placement:
    """The slot of each rank; what a step moves so, and in other placements (None: one that does not fit)."""

    slots: tuple[Slot, ...]
    traffic: Traffic
    moved: Moved
    others: tuple[tuple[str, Moved | None], ...]

    @property
    def addresses(self) -> tuple[str, ...]:
        """The worker of each rank."""
        return tuple(slot.address for slot in self.slots)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The host of each rank."""
        return tuple(slot.host for slot in self.slots)

    def explain(self) -> str:
        """The worker of each rank, what it sends to other hosts, and the bytes that each alternative would move."""
        lines = [repr(self)[1:-1]]
        for rank, (slot, row) in enumerate(zip(self.slots, self.traffic, strict=True)):
            away = sum(size for other, size in zip(self.slots, row, strict=True) if other.host != slot.host)
            lines.append(f"  rank {rank}: {slot.address} on {slot.host}, sends {away:,} bytes to other hosts a step")
        rows = [("placed so", self.moved), *self.others]
        width = max(len(name) for name, _ in rows)
        return "\n".join([*lines, *(f"  {name:<{width}}  {moved or 'does not fit'}" for name, moved in rows)])

    def __repr__(self) -> str:
        hosts = len(set(self.hosts))
        many = f"{len(self.slots)} rank{'s' * (len(self.slots) > 1)} on {hosts} host{'s' * (hosts > 1)}"
        return f"<Placement: {many}; {self.moved.between_bytes:,} bytes between hosts a step>"


def place(
    traffic: Traffic,
    slots: Sequence[Slot],
    links: Links,
    *,
    needs: Sequence[int] = (),
    reads: Sequence[int] = (),
    threads: int = 1,
    devices: Sequence[str] = (),
) -> Placement:
    """A worker for each rank.

    ``needs``: bytes of each rank's device. ``reads``: bytes of records that each reads in a step. ``devices``: the kind
    that each is for ('': any will do). Workers with fewer threads are taken only where there are not enough others.
    Placements that are as good keep ranks in the order of hosts and addresses. NoWorkers where ranks do not fit.
    """
    ranks = len(traffic)
    if len(slots) < ranks:
        raise NoWorkers(f"the plan needs {ranks} workers but the cluster has {len(slots)}.")
    ordered = sorted(slots, key=lambda slot: (slot.host, slot.address))
    costs = _Costs(traffic, ordered, links, needs or [0] * ranks, reads or [0] * ranks, devices or [""] * ranks)
    suited = costs.fits.copy()
    suited[:ranks] &= np.array([slot.threads >= threads for slot in ordered])
    allowed = costs.fits if (_matched(suited) < 0).any() else suited
    first = _matched(allowed)
    if (first < 0).any():
        raise NoWorkers(costs.nowhere(int(np.argmin(first))))
    in_order, in_turn = np.arange(len(slots)), _in_turn(costs.host)
    best = min((_swapped(costs, allowed, at) for at in _starts(costs, allowed)), key=costs.total)
    if costs.total(first) <= costs.total(best) * (1 + EVEN):
        best = first
    best = _in_order(costs, allowed, best)
    others = (("host after host", in_order), ("in turn over hosts", in_turn))
    return Placement(
        tuple(ordered[i] for i in best[:ranks]),
        tuple(map(tuple, traffic)),
        costs.moved(best),
        tuple((name, costs.moved(at) if costs.may(costs.fits, at) else None) for name, at in others),
    )


def check_room(programs: Sequence[Program], slots: Sequence[Slot]) -> None:
    """TooLittleMemory where a rank fits on no worker that is left for it, if of those for one device the ranks that
    need most get the workers with most memory free."""
    for device in dict.fromkeys(program.on.key for program in programs):
        ranks = [rank for rank, program in enumerate(programs) if program.on.key == device]
        ranks.sort(key=lambda rank: -programs[rank].needed_bytes)
        free = {s.address: math.inf if s.free_bytes is None else s.free_bytes for s in slots if s.runs(device)}
        roomy = sorted(free, key=lambda address: (-free[address], address))
        for rank, address in zip(ranks, roomy, strict=False):
            if free[address] < math.inf:
                programs[rank].check_memory(int(free[address]), rank, where=f"on worker {address}")


class _Costs:
    """Seconds of messages and reads. A placement is an array: the number of the slot of each rank, and, of ranks that
    do nothing, of each slot that is left."""

    def __init__(
        self,
        traffic: Traffic,
        slots: Sequence[Slot],
        links: Links,
        needs: Sequence[int],
        reads: Sequence[int],
        devices: Sequence[str],
    ) -> None:
        self.slots, self.needs, self.ranks = slots, needs, len(traffic)
        idle = (0, len(slots) - len(traffic))
        self.sends = np.pad(np.array(traffic, np.int64), idle)
        self.bytes = (self.sends + self.sends.T).astype(np.float64)
        messages = (self.sends > 0).astype(np.float64) + (self.sends.T > 0)
        names = list(dict.fromkeys(slot.host for slot in slots))
        self.hosts = len(names)
        self.host = np.array([names.index(slot.host) for slot in slots])
        byte_s = np.array([[1 / links.link(a, b).bytes_s for b in names] for a in names])
        latency_s = np.array([[links.link(a, b).latency_s for b in names] for a in names])
        self.kinds = ((self.bytes, byte_s), (messages, latency_s))  # amounts by pair of ranks, rates by pair of hosts
        self.reads = np.pad(np.array(reads), idle)
        self.missing = np.multiply.outer(self.reads, [1.0 - slot.held for slot in slots])
        self.reads_s = self.missing / links.between.bytes_s
        room = np.array([np.inf if slot.free_bytes is None else slot.free_bytes for slot in slots])
        reached = np.array([slot.reaches for slot in slots])
        self.fits = (np.pad(np.array(needs), idle)[:, None] <= room) & (reached | (self.reads[:, None] == 0))
        self.devices = devices
        self.fits[: len(traffic)] &= np.array([[slot.runs(device) for slot in slots] for device in devices])

    def may(self, allowed: Array, at: Array) -> bool:
        """Has a placement all ranks (none at -1), and may they be where it has them?"""
        return bool((at >= 0).all() and allowed[np.arange(len(at)), at].all())

    def told_s(self, at: Array) -> Array:
        """Seconds of what each rank and the others tell each other, by the host that it would be on."""
        return np.asarray(sum(amounts @ rates[self.host[at]] for amounts, rates in self.kinds))

    def total(self, at: Array) -> float:
        """Seconds of all ranks."""
        everyone = np.arange(len(at))
        told_s = self.told_s(at)[everyone, self.host[at]].sum() / 2  # each pair is in it twice
        return float(told_s + self.reads_s[everyone, at].sum())

    def moved(self, at: Array) -> Moved:
        """What a placement moves."""
        hosts = self.host[at]
        between = int(self.sends[hosts[:, None] != hosts].sum())
        return Moved(between, round(self.missing[np.arange(len(at)), at].sum()), self.total(at))

    def nowhere(self, rank: int) -> str:
        """That no worker is left for a rank."""
        need = self.needs[rank]
        roomy = sum(slot.free_bytes is None or slot.free_bytes >= need for slot in self.slots)
        seen = sum(slot.reaches for slot in self.slots)
        reads = f", and {seen} see the dataset that it reads" if self.reads[rank] else ""
        shared = ", or a file system that all workers share" if self.reads[rank] else ""
        device = self.devices[rank]
        if device:
            reads += f", and {sum(slot.runs(device) for slot in self.slots)} have its device ({device})"
        return (
            f"no worker is left for rank {rank}: of {len(self.slots)}, {roomy} have the {need:,} bytes free that it "
            f"needs{reads}. Use fewer ranks, workers with more memory{shared}."
        )


def _matched(allowed: Array) -> Array:
    """For each rank the first slot that it may have, others moving where they must (Kuhn, "The Hungarian method for
    the assignment problem", 1955); -1 where there is none."""
    holder: dict[int, int] = {}  # of each slot
    at = np.full(len(allowed), -1)
    for rank in range(len(allowed)):
        wants: dict[int, int] = {}  # by slot, the rank that would move there
        free = -1
        moving = [rank]
        for mover in moving:
            for slot in map(int, np.flatnonzero(allowed[mover])):
                if slot in wants:
                    continue
                wants[slot] = mover
                if slot not in holder:
                    free = slot
                    break
                moving.append(holder[slot])
            if free >= 0:
                break
        while free >= 0:
            mover = wants[free]
            holder[free], at[mover], free = mover, free, at[mover]
    return at


def _in_turn(host: Array) -> Array:
    """Slots in turn over hosts."""
    turn = np.array([(host[:i] == host[i]).sum() for i in range(len(host))])
    return np.lexsort((host, turn))


def _starts(costs: _Costs, allowed: Array) -> Iterator[Array]:
    """First placements: slots in order and backwards, shifted (less often where they are many), in turn over hosts;
    grown on hosts."""
    slots = len(allowed)
    for places in range(min(SHIFTED, slots, 1 + 256 // slots)):
        for order in (np.arange(slots), np.arange(slots)[::-1]):
            shifted = np.roll(order, -places)
            yield shifted[_matched(allowed[:, shifted])]
    grown = (_grown(costs, allowed, host) for host in range(min(GROWN, costs.hosts)))
    yield from (at for at in (_in_turn(costs.host), *grown) if costs.may(allowed, at))


def _grown(costs: _Costs, allowed: Array, host: int) -> Array:
    """From the rank that tells most, on a host, to those that tell most to the ranks that are placed, each where that
    is done soonest; -1 where one has nowhere to go."""
    at = np.full(len(allowed), -1)
    spent_s = costs.reads_s.copy()  # of each rank in each slot, with those that are placed
    open_to = allowed.copy()
    told = costs.bytes.sum(1)  # to the ranks that are placed
    first = open_to & (costs.host == host)
    for count in range(len(allowed)):
        left = np.flatnonzero(at < 0)
        rank = left[np.argmax(told[left])] if count < costs.ranks else left[0]
        slots = np.flatnonzero(first[rank] if count == 0 else open_to[rank])
        if not len(slots):
            break
        at[rank] = slot = slots[np.argmin(spent_s[rank, slots])]
        open_to[:, slot] = False
        for amounts, rates in costs.kinds:
            spent_s += np.outer(amounts[rank], rates[costs.host[slot]][costs.host])
        told = costs.bytes[rank] + (told if count else 0.0)
    return at


def _swapped(costs: _Costs, allowed: Array, at: Array) -> Array:
    """The two ranks change places, or one goes to a slot that is free, that gain most; until nothing gains."""
    ranks, at = costs.ranks, at.copy()
    told_s = costs.told_s(at)
    while True:
        each, hosts = told_s[:, costs.host] + costs.reads_s, costs.host[at]
        own = each[np.arange(len(at)), at]
        more_s = each[:ranks, at] + each[:, at[:ranks]].T - own[:ranks, None] - own
        for amounts, rates in costs.kinds:
            within = rates.diagonal()[hosts]  # what two ranks tell each other stays what it was if they change places
            more_s += amounts[:ranks] * (2 * rates[np.ix_(hosts[:ranks], hosts)] - within[:ranks, None] - within)
        more_s[~(allowed[:ranks, at] & allowed[:, at[:ranks]].T)] = np.inf
        a, b = divmod(int(np.argmin(more_s)), len(at))
        if more_s[a, b] >= -EVEN * own.sum():
            return at
        for amounts, rates in costs.kinds:
            told_s += np.outer(amounts[a] - amounts[b], rates[hosts[b]] - rates[hosts[a]])
        at[a], at[b] = at[b], at[a]


def _in_order(costs: _Costs, allowed: Array, at: Array) -> Array:
    """Ranks of a host in the order of its slots, where they may be so, and no more has to be read."""
    for host in range(costs.hosts):
        members = np.flatnonzero(costs.host[at] == host)
        slots = np.sort(at[members])
        read_s, before_s = costs.reads_s[members, slots].sum(), costs.reads_s[members, at[members]].sum()
        if allowed[members, slots].all() and read_s <= before_s * (1 + EVEN):
            at = at.copy()
            at[members] = slots
    return at
