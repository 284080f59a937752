"""Staging: what goes between a rank on a card and the host while kernels go on; in every step, through pinned memory,

Feeds     a batch, by a queue of its own while kernels read the one before; two in turn
Clocks    seed, step and rates, one place for each step that may be under way
Numbers   scalar outputs, the same the other way

and when it is asked for

SetAside  parameters and state: a copy on the card, and from there to the host by a queue and a thread of their own
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from gpu_kernels.card import Accelerator

from ..scheduler import Buffer
from ..scheduler.arena import aligned
from ..spec import Array, Spec

FEEDS = 2
ITEM = 8  # bytes of the largest scalar
Addressed = Mapping[str, tuple[int, Spec]]


class Feeds:
    """Room for batches of some specs, by the name of the leaf and its address."""

    def __init__(self, card: Accelerator, line: Accelerator, leaves: Addressed, reserve: Callable[[int], int]) -> None:
        self.card, self.leaves, self.sent = card, leaves, 0
        size = sum(aligned(spec.size_bytes) for _, spec in leaves.values())
        self.slots = [_Slot(card, line, leaves, reserve(size)) for _ in range(FEEDS if leaves else 0)]

    def send(self, batch: Mapping[str, Array]) -> None:
        """Have a batch in its leaves for the kernels that are launched next."""
        if not self.slots:
            return
        slot = self.slots[self.sent % FEEDS]
        self.sent += 1
        slot.send(batch)
        for name, (array, at) in slot.arrays.items():
            self.card.copy(self.leaves[name][0], at, array.nbytes)
        slot.read.set()


class _Slot:
    """Room for a batch, on the host and on the card."""

    def __init__(self, card: Accelerator, line: Accelerator, leaves: Addressed, address: int) -> None:
        self.card, self.line, self.sent, self.read = card, line, line.mark(), card.mark()
        self.arrays: dict[str, tuple[Array, int]] = {}
        memory, at = line.pinned(sum(aligned(spec.size_bytes) for _, spec in leaves.values())), 0
        for name, (_, spec) in leaves.items():
            array = memory[at : at + spec.size_bytes].view(spec.dtype).reshape(spec.shape)
            self.arrays[name] = array, address + at
            at += aligned(spec.size_bytes)

    def send(self, batch: Mapping[str, Array]) -> None:
        """Bring a batch to the card; the card's own queue waits for it."""
        self.sent.wait()
        self.line.after(self.read)
        for name, (array, at) in self.arrays.items():
            np.copyto(array, batch[name], casting="same_kind")
            self.line.upload(at, array)
        self.sent.set()
        self.card.after(self.sent)


class Clocks:
    """Clock leaves of an arena that begins at ``base``: those that lie side by side are set by one copy."""

    def __init__(self, card: Accelerator, leaves: Mapping[str, Buffer], base: int, slots: int) -> None:
        self.card, runs = card, _runs(leaves)
        width = sum(last - first for first, last, _ in runs)
        memory = card.pinned(max(1, slots * width))
        self.slots: list[list[tuple[Array, int, dict[str, Array]]]] = []
        for slot in range(slots):
            at, pieces = slot * width, []
            for first, last, names in runs:
                piece = memory[at : at + last - first]
                at += last - first
                views = {name: _view(piece, leaves[name].offset - first, leaves[name].spec) for name in names}
                pieces.append((piece, base + first, views))
            self.slots.append(pieces)

    def send(self, slot: int, values: Mapping[str, float]) -> None:
        """Set them for the kernels that are launched next."""
        for piece, address, views in self.slots[slot]:
            for name, view in views.items():
                view[...] = values[name]
            self.card.upload(address, piece)


class Numbers:
    """Scalars by name and address."""

    def __init__(self, card: Accelerator, scalars: Addressed, slots: int) -> None:
        self.card, width = card, ITEM * len(scalars)
        memory = card.pinned(max(1, slots * width))
        places = [(name, i * ITEM, address, spec) for i, (name, (address, spec)) in enumerate(scalars.items())]
        self.slots = [
            [(name, _view(memory, slot * width + at, spec), address) for name, at, address, spec in places]
            for slot in range(slots)
        ]

    def fetch(self, slot: int) -> None:
        """Have what the kernels left there brought over."""
        for _, view, address in self.slots[slot]:
            self.card.download(view, address)

    def read(self, slots: int) -> list[dict[str, float]]:
        """What the first few slots have."""
        return [{name: float(view[0]) for name, view, _ in slot} for slot in self.slots[:slots]]


class SetAside:
    """A copy on the card of parameters and state, by name and address: to go back to, and to be brought to the host."""

    def __init__(self, card: Accelerator, held: Addressed) -> None:
        self.card, self.held, self.first, self.taken = card, held, 0, card.mark()
        self.still = False  # are parameters and state as they were set aside?
        self._bringing = ThreadPoolExecutor(1, thread_name_prefix="rapydli-state")
        self._coming: Future[dict[str, Array]] | None = None  # what was set aside last, on its way to the host

    @property
    def there(self) -> bool:
        """Was anything set aside?"""
        return self.first > 0

    def _places(self) -> Iterator[tuple[str, Spec, int, int]]:
        """Where each is, and where it is set aside."""
        at = self.first
        for name, (address, spec) in self.held.items():
            yield name, spec, address, at
            at += aligned(spec.size_bytes)

    def set_aside(self, reserve: Callable[[int], int]) -> None:
        """Copy what is there now. What is on its way to the host is waited for, as it lies at the same place."""
        if self.still:
            return
        if self._coming is not None:
            wait([self._coming])  # its error is that of who asks for it
            self._coming = None
        if not self.there:
            self.first = reserve(sum(aligned(spec.size_bytes) for _, spec in self.held.values()))
        for _, spec, now, then in self._places():
            self.card.copy(then, now, spec.size_bytes)
        self.taken.set()
        self.still = True

    def later(self, bring: Callable[[], dict[str, Array]]) -> Future[dict[str, Array]]:
        """What was set aside, once it is on the host: a thread has it brought, once."""
        if self._coming is None:
            self._coming = self._bringing.submit(bring)
        return self._coming

    def bring(self, queue: Accelerator) -> dict[str, Array]:
        """What was set aside, by another queue of the card."""
        queue.use()
        queue.after(self.taken)
        found = {}
        for name, spec, _, then in self._places():
            found[name] = np.empty(spec.shape, spec.dtype)
            queue.download(found[name], then)
        queue.wait()
        return found

    def back(self) -> None:
        """Have what was set aside where it was taken from."""
        for _, spec, now, then in self._places():
            self.card.copy(now, then, spec.size_bytes)

    def close(self) -> None:
        """Return when nothing is on its way any more."""
        self._bringing.shutdown()


def _view(memory: Array, at: int, spec: Spec) -> Array:
    return memory[at : at + spec.size_bytes].view(spec.dtype)


def _runs(buffers: Mapping[str, Buffer]) -> Sequence[tuple[int, int, list[str]]]:
    """Buffers that lie side by side, as intervals of the arena."""
    out: list[tuple[int, int, list[str]]] = []
    for name, buffer in sorted(buffers.items(), key=lambda item: item[1].offset):
        first, last = buffer.offset, buffer.offset + buffer.spec.size_bytes
        if out and first - out[-1][1] < aligned(1):
            out[-1] = (out[-1][0], last, [*out[-1][2], name])
        else:
            out.append((first, last, [name]))
    return out
