"""What ranks on cards tell each other without the host: collectives as work of a card, by NCCL.

    sum        from array to array, where they lie
    exchange   round by round: pieces of arrays -> messages -> the other cards -> to their places, or added up there

Each collective is bound once, to addresses, copies and the kernel that adds. What goes behind kernels has a queue and
communicators of its own. `wait` looks whether the others are still there; where NCCL or the driver holds a rank's
thread, another one looks.
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np

from gpu_kernels.card import Accelerator, Box, Communicator
from gpu_kernels.launch import ALIGNMENT
from gpu_kernels.many import Many, alike
from gpu_kernels.nccl import library

from ..errors import RunLost
from ..ops import Add
from ..scheduler import AllReduce, Buffer, Collective, Exchange, Program
from ..scheduler.arena import aligned
from ..scheduler.collective import Wait
from ..scheduler.messages import CARD_BYTES, Round, Slices, rounds, staged
from ..spec import Spec
from ..template import Device
from .transport import Transport

WATCH_S = 0.5
POLL_S = 20e-6  # between two looks at the card, while a rank waits for others
Group = tuple[bool, tuple[int, ...]]  # behind kernels or not, and the ranks that meet
Work = Callable[[Communicator | None], None]


class Meetings:
    """The collectives of a program on a card. ``address``: of a buffer; ``reserve``: new memory of the card."""

    def __init__(
        self,
        program: Program,
        device: Device,
        transport: Transport,
        card: Accelerator,
        beside: Accelerator,
        address: Callable[[Buffer], int],
        reserve: Callable[[int], int],
    ) -> None:
        if not device.emulated:
            library()  # is it there? Else that is said before anything runs
        self._transport, self._card, self._beside = transport, card, beside
        self._address, self._reserve, self._device = address, reserve, device
        self._staging = reserve(program.staged_bytes) if program.staged_bytes else 0
        self._everyone = tuple(range(transport.ranks))
        self._ways: dict[Group, Communicator] = {}
        self._met = self._over = False
        meetings = [step for step in program.steps if isinstance(step, Collective) and not isinstance(step.op, Wait)]
        self._work = {step.name: self._bound(step) for step in meetings}
        self._groups = {step.name: self._group(step) for step in meetings}
        behind = [step.name for step in meetings if step.op.behind]
        self._marks = {name: (card.mark(), beside.mark()) for name in behind}
        self._last = card.mark()
        self._since: float | None = None  # when a call that is under way began
        del self._address, self._reserve  # of the rank, which these would keep alive

    def _group(self, part: Collective) -> Group:
        """Who meets. Messages go between any two of all ranks: some may have none."""
        op = part.op
        assert isinstance(op, AllReduce | Exchange)
        own = isinstance(op, AllReduce) or len(op.ranks) == 1
        return op.behind, op.ranks if own else self._everyone

    def begin(self) -> None:
        """Meet the other cards, when all ranks are there; does nothing after that."""
        if not self._met:
            self._meet_others()
            self._met = True
            watch = threading.Thread(target=_watch, args=(weakref.ref(self),), name="rapydli-watch", daemon=True)
            watch.start()

    def _meet_others(self) -> None:
        mine = sorted({group for group in self._groups.values() if len(group[1]) > 1})
        each = self._share(mine)
        groups = sorted({(behind, tuple(ranks)) for found in each for behind, ranks in found})
        first = [i for i, (_, ranks) in enumerate(groups) if ranks[0] == self._transport.rank]
        made = {i: self._card.meeting().hex() for i in first}
        known = {int(i): text for found in self._share(made) for i, text in found.items()}
        for i, (behind, ranks) in enumerate(groups):  # all ranks in this order: so nobody waits in a circle
            if self._transport.rank in ranks:
                where = ranks.index(self._transport.rank), len(ranks)
                self._ways[behind, ranks] = self._card.meet(bytes.fromhex(known[i]), *where, self._coming)

    def _share(self, value: Any) -> list[Any]:
        """A value of each rank, for all of them."""
        said = self._transport.share("the meeting of cards", json.dumps(value).encode())
        return [json.loads(each) for each in said]

    def meet(self, part: Collective) -> None:
        """Have the card carry out a collective, or wait for one that goes behind kernels."""
        if self._over:
            raise RunLost(f"rank {self._transport.rank}: the run was given up.")
        with self._leaving():
            self.begin()
            self._since = time.monotonic()
            if isinstance(part.op, Wait):
                self._card.after(self._marks[part.name][1])
                return
            group = self._groups[part.name]
            way = self._ways[group] if len(group[1]) > 1 else None
            if not part.op.behind:
                self._work[part.name](way)
                return
            before, done = self._marks[part.name]
            before.set()
            self._beside.after(before)
            self._work[part.name](way)
            done.set()

    def wait(self) -> None:
        """Until the card has done everything; RunLost if another rank does not come."""
        self._last.set()
        begin = time.perf_counter()
        with self._leaving():
            while not self._last.passed():
                for way in list(self._ways.values()):
                    way.check()
                self._alive(time.perf_counter() - begin)
                time.sleep(POLL_S)
        self._card.wait()

    @contextmanager
    def _leaving(self) -> Iterator[None]:
        """Who cannot go on leaves, so that nothing on the card waits for others any more."""
        try:
            yield
        except BaseException:
            self.abort()
            raise
        finally:
            self._since = None

    def _coming(self, waited_s: float) -> None:
        """As `_alive`, which it is once the cards have met."""
        if not self._met and waited_s > self._transport.timeout_s:
            raise RunLost(
                f"rank {self._transport.rank}: the GPUs of the ranks did not meet in {self._transport.timeout_s:g} s. "
                "A worker may be dead, or a firewall between them; NCCL_SOCKET_IFNAME says which network NCCL uses."
            )
        self._alive(waited_s)

    def stuck(self) -> bool:
        """Is this rank to leave, though its own thread may not be able to look?"""
        since = self._since
        late = since is not None and time.monotonic() - since > self._transport.timeout_s + WATCH_S
        return late or self._transport.given_up

    def _alive(self, waited_s: float) -> None:
        rank, limit_s = self._transport.rank, self._transport.timeout_s
        if self._transport.given_up:
            raise RunLost(f"rank {rank}: the run was given up.")
        if waited_s > limit_s:
            raise RunLost(
                f"rank {rank}: a step on the card did not end in {limit_s:g} s: another rank did not come. Its worker "
                "may be dead or stopped; resume from the last snapshot."
            )

    def abort(self) -> None:
        """Leave the others: what is under way on the card ends, whether they came or not. All ways at once, as what is
        queued for one may stand behind what is stuck in another."""
        self._over = True
        ways = list(self._ways.values())
        leaving = [threading.Thread(target=way.abort, name="rapydli-abort", daemon=True) for way in ways]
        for thread in leaving:
            thread.start()
        for thread in leaving:
            thread.join()

    # binding ------------------------------------------------------------------------------------------

    def _bound(self, part: Collective) -> Work:
        queue = self._beside if part.op.behind else self._card
        if isinstance(part.op, AllReduce):
            return self._sum(part, queue)
        assert isinstance(part.op, Exchange)
        assert not part.op.behind  # what is staged is for one at a time
        each = [self._round(part, part.op, now) for now in rounds(part.op, CARD_BYTES)]

        def exchange(way: Communicator | None) -> None:
            for work in each:
                work(way)

        return exchange

    def _sum(self, part: Collective, queue: Accelerator) -> Work:
        places = [(self._address(x), self._address(y)) for x, y in zip(part.ins, part.outs, strict=True)]
        sums = [(*place, x.spec.size) for place, x in zip(places, part.ins, strict=True) if x.spec.size]
        dtype = part.ins[0].spec.dtype

        def work(way: Communicator | None) -> None:
            if way is not None:
                way.all_reduce(queue, sums, dtype)
                return
            for source, target, elements in sums:  # of one rank: the sum is what it has
                if source != target:
                    queue.copy(target, source, elements * np.dtype(dtype).itemsize)

        return work

    def _round(self, part: Collective, op: Exchange, now: Round) -> Work:
        """One round of an exchange."""
        item = np.dtype(op.dtype).itemsize
        held = {i: self._placed(buffer) for i, buffer in zip(op.held, part.ins, strict=True)}
        wanted = {i: self._placed(buffer) for i, buffer in zip(op.wanted, part.outs, strict=False)}
        room = staged(now, item)
        before: list[_Copy] = []
        sends, gets = [], [(rank, self._staging + room.gets[rank], size) for rank, size in now.gets.items()]
        for reader, moves in now.sends.items():
            at = first = self._staging + room.sends[reader]
            for move in moves:
                before += held[move.source].part(move.out_of).to(_flat(at, move.shape, item))
                at += prod(move.shape) * item
            sends.append((reader, first, at - first))
        parts = sorted({shard.part for shard in op.have})  # pieces of one part lie beside each other, never over
        after: list[list[_Copy | Callable[[], None]]] = [[] for _ in parts]
        adds: list[list[tuple[_Region, _Region]]] = [[] for _ in parts]
        for owner, move in now.writes:
            place = wanted[move.target].part(move.into)
            if owner == op.rank:
                piece = held[move.source].part(move.out_of)
                if place.meets(piece):
                    continue  # it was made there
            else:
                piece = _flat(self._staging + room.gets[owner] + move.begin, move.shape, item)
            turn = parts.index(op.have[move.source].part)
            if move.added:
                adds[turn].append((place, piece))
            else:
                after[turn] += piece.to(place)
        spare = self._staging + room.sums
        for turn, pairs in enumerate(adds):
            after[turn] += self._added(pairs, op.dtype, spare)
            spare += sum(2 * aligned(place.size * item) for place, _ in pairs)

        def work(way: Communicator | None) -> None:
            for copy in before:
                copy(self._card)
            if sends or gets:
                assert way is not None
                way.swap(self._card, sends, gets)
            for each in after:
                for do in each:
                    do(self._card) if isinstance(do, _Copy) else do()

        return work

    def _added(
        self, pairs: Sequence[tuple[_Region, _Region]], dtype: str, spare: int
    ) -> Iterator[_Copy | Callable[[], None]]:
        """Pieces are added to their places by one kernel: where bytes lie as it wants them, else there is room."""
        if not pairs:
            return
        item = np.dtype(dtype).itemsize
        rows, behind = [], list[_Copy]()
        for place, piece in pairs:
            own = []
            for region in (place, piece):
                if region.plain and region.first % ALIGNMENT == 0:
                    own.append(region.first)
                else:
                    own.append(spare)
                    yield from region.to(_flat(spare, region.shape, item))
                spare += aligned(region.size * item)
            if own[0] != place.first:
                behind += _flat(own[0], place.shape, item).to(place)
            rows.append((own[0], own[1], own[0]))
        specs = [Spec((place.size,), dtype) for place, _ in pairs]
        key = alike(Add(), (specs[0], specs[0]), (specs[0],))
        assert key is not None
        many = Many(key, tuple(spec.size for spec in specs))
        table = many.table(rows)
        at = self._reserve(table.nbytes)
        self._card.upload(at, table)
        self._card.wait()
        yield self._card.prepare_many(many, self._device.target).bind([at])
        yield from behind

    def _placed(self, buffer: Buffer) -> _Region:
        return _flat(self._address(buffer), buffer.spec.shape, np.dtype(buffer.spec.dtype).itemsize)


def _watch(reference: weakref.ref[Meetings]) -> None:
    """Abort for a rank whose own thread cannot: NCCL, or the driver, holds it until another rank comes. One that can
    has the time between two looks."""
    looks = 0
    while True:
        time.sleep(WATCH_S)
        meetings = reference()
        if meetings is None or meetings._over:
            return
        looks = looks + 1 if meetings.stuck() else 0
        if looks > 1:
            meetings.abort()
            return
        del meetings


class _Region(NamedTuple):
    """Elements of an array of the card: their first address, how many there are along each axis, and the steps from one
    to the next, in bytes."""

    first: int
    shape: tuple[int, ...]
    steps: tuple[int, ...]
    item: int

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def plain(self) -> bool:
        """Do they lie side by side?"""
        return self._side_by_side(0)

    def part(self, slices: Slices) -> _Region:
        starts = [s.start or 0 for s in slices]
        first = self.first + sum(map(int.__mul__, starts, self.steps))
        shape = tuple(len(range(*s.indices(size))) for s, size in zip(slices, self.shape, strict=True))
        return self._replace(first=first, shape=shape)

    def meets(self, other: _Region) -> bool:
        """Have both bytes between their first and last one in common?"""
        return self.first < other._end and other.first < self._end

    @property
    def _end(self) -> int:
        return self.first + sum((n - 1) * step for n, step in zip(self.shape, self.steps, strict=True)) + self.item

    def _side_by_side(self, axis: int) -> bool:
        """Do all elements of the axes from this one on lie side by side?"""
        size = self.item
        for n, step in zip(self.shape[:axis:-1], self.steps[:axis:-1], strict=True):
            if n > 1 and step != size:
                return False
            size *= n
        return axis >= len(self.shape) or self.shape[axis] == 1 or self.steps[axis] == size

    def to(self, target: _Region) -> Iterator[_Copy]:
        """Copies that write these elements to a region of the same shape."""
        axes = len(self.shape)
        inner = axes  # the first of the axes along which both lie side by side
        while inner > 0 and self._side_by_side(inner - 1) and target._side_by_side(inner - 1):
            inner -= 1
        width = prod(self.shape[inner:]) * self.item
        rows, planes = (self.shape[inner - k] if inner >= k else 1 for k in (1, 2))
        bounds = []
        for region in (target, self):
            pitch = region.steps[inner - 1] if inner >= 1 else width
            height = region.steps[inner - 2] // pitch if inner >= 2 else rows
            bounds += [pitch, height]
        box = Box(width, rows, planes, *bounds)
        if not width or not rows or not planes:
            return
        for at in product(*map(range, self.shape[: max(0, inner - 2)])):
            source, place = (r.first + sum(map(int.__mul__, at, r.steps)) for r in (self, target))
            yield _Copy(place, source, box)


class _Copy(NamedTuple):
    target: int
    source: int
    box: Box

    def __call__(self, card: Accelerator) -> None:
        if self.box.rows == self.box.planes == 1:
            card.copy(self.target, self.source, self.box.width)
        else:
            card.copy_box(self.target, self.source, self.box)


def _flat(first: int, shape: tuple[int, ...], item: int) -> _Region:
    """Elements side by side."""
    steps = tuple(item * prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return _Region(first, shape, steps, item)
