"""Accelerator: what a rank needs of a card. A GPU (`launch.Card`) has it, and one that NumPy plays (`emulated`).

Memory is addresses. What is asked of a card is done later, in the order in which it was asked for, until `wait`;
arrays of the host that take part stay as they are, and where they are, until then.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from rapydli_flow.spec import Array
from rapydli_flow.template import Device

from .compile import Request
from .many import Many

PAGE = 4096  # bytes
Alive = Callable[[float], None]  # raises where nobody should wait any longer, given the seconds that it did


class Box(NamedTuple):
    """Bytes that lie regularly: ``planes`` of ``rows`` of ``width`` bytes. A row begins ``pitch`` bytes after the one
    before it, a plane ``height`` such steps after the one before it, in the target and in the source."""

    width: int
    rows: int
    planes: int
    target_pitch: int
    target_height: int
    source_pitch: int
    source_height: int


class Mark(ABC):
    """A moment between two pieces of a card's work."""

    @abstractmethod
    def set(self) -> None:
        """The moment when all that was asked for so far is done."""

    @abstractmethod
    def wait(self) -> None:
        """Until that moment; at once, if it was never set."""

    @abstractmethod
    def passed(self) -> bool:
        """Is that moment past? It is, if it was never set."""

    @abstractmethod
    def seconds_since(self, before: Mark) -> float:
        """Between two moments that are past."""


class Communicator(ABC):
    """The way of one of several cards to the others, which all do the same in the same order. What is asked of it is
    done in the order of a card's queue. RunLost where another one is gone."""

    @abstractmethod
    def all_reduce(self, queue: Accelerator, sums: Sequence[tuple[int, int, int]], dtype: str) -> None:
        """For each (source, target, elements): the target is the sum of that source on all cards, and may be it."""

    @abstractmethod
    def swap(
        self, queue: Accelerator, sends: Sequence[tuple[int, int, int]], gets: Sequence[tuple[int, int, int]]
    ) -> None:
        """Messages to ranks and from ranks, as (rank, address, bytes); those that have none need not take part."""

    @abstractmethod
    def check(self) -> None:
        """Raise what went wrong behind the queue."""

    @abstractmethod
    def abort(self) -> None:
        """Leave; what is under way is given up."""


class Accelerator(ABC):
    """A card, with a queue of work of its own."""

    name: str

    @abstractmethod
    def describe(self) -> Device:
        """What templates are told of it."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory that can be reserved now."""

    @abstractmethod
    def use(self) -> None:
        """Called by a thread before it asks for anything else."""

    @abstractmethod
    def briefly(self) -> AbstractContextManager[None]:
        """As `use`, and as it was afterwards: for what may happen in the middle of another card's work."""

    @abstractmethod
    def reserve(self, size_bytes: int) -> int:
        """The address of new memory; TooLittleMemory."""

    @abstractmethod
    def free(self, address: int) -> None:
        """Give memory back."""

    @abstractmethod
    def pinned(self, size_bytes: int) -> Array:
        """Bytes of the host that the card reaches itself, until it is closed."""

    @abstractmethod
    def pin(self, data: Array) -> None:
        """Have the card reach whole pages of the host itself, until `unpin`; where that is refused, it is slower."""

    @abstractmethod
    def unpin(self, data: Array) -> None:
        """What `pin` did is over."""

    @abstractmethod
    def upload(self, address: int, data: Array) -> None:
        """From the host to the card."""

    @abstractmethod
    def download(self, data: Array, address: int) -> None:
        """From the card to the host."""

    @abstractmethod
    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Within the card."""

    @abstractmethod
    def copy_box(self, target: int, source: int, box: Box) -> None:
        """Within the card, bytes that do not lie side by side."""

    @abstractmethod
    def fill(self, address: int, size_bytes: int, byte: int) -> None:
        """Set all bytes."""

    @abstractmethod
    def prepare(self, request: Request) -> Any:
        """The kernels of a call: ``bind(addresses, at=address, stream=handle)`` gives a function that launches them.

        ``addresses``: of inputs, outputs, workspaces and extras; ``at``: of lo and whole of the output's block, for ops
        that read them; ``stream``: one that another library has made, in place of this queue.
        """

    @abstractmethod
    def prepare_many(self, many: Many, target: str) -> Any:
        """The kernel of many ops: ``bind([address])`` of their table gives a function that launches it."""

    @abstractmethod
    def meeting(self) -> bytes:
        """What cards find each other by: one of them makes it, and tells the others. MissingDependency without NCCL."""

    @abstractmethod
    def meet(self, meeting: bytes, rank: int, ranks: int, alive: Alive) -> Communicator:
        """Meet the other cards, once all have come."""

    @abstractmethod
    def capture(self, launches: Sequence[Callable[[], None]]) -> Callable[[], None]:
        """All of these launches as one."""

    @abstractmethod
    def mark(self) -> Mark:
        """A moment to be set."""

    @abstractmethod
    def after(self, mark: Mark) -> None:
        """What is asked for from now on waits for a moment of another queue of this card; not, if it was never set."""

    @abstractmethod
    def wait(self) -> None:
        """Until everything is done; what failed on the card is raised here."""

    @abstractmethod
    def wait_for(self, stream: int) -> None:
        """Until everything in a stream of another library is done."""

    @abstractmethod
    def follow(self, stream: int, other: int) -> None:
        """What comes into a stream from now on waits for what another one has now; both are other libraries'."""

    @abstractmethod
    def close(self) -> None:
        """Give back the queue, and what is pinned; memory is freed by who reserved it."""
