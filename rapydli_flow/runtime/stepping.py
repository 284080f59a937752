"""The ranks of a stepper, in this process or on workers, and what they are asked for.

A rank holds two states: the present one, and the one that its last step began with, to which a step that
fails goes back. Functions that take a trainer run where the rank is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from ..errors import NonFinite
from ..spec import Array
from .cluster import Cluster
from .feeding import Given
from .local import Local
from .segment import SegmentResult, Trainer
from .transport import Threads
from .worker import on_trainer

SMALL_BYTES = 2**20  # of a batch that travels with the tasks of its step; a larger one is sent before them


@dataclass(frozen=True)
class Advance:
    """One step, and a rank's rows of its batch; None: they were handed over before."""

    step: int
    clocks: Mapping[str, float]
    part: Mapping[str, Array] | None


def advance(trainer: Trainer, order: Advance) -> SegmentResult | NonFinite:
    """One step. A loss that is not finite is a result, on all ranks alike: they undo the step and can go on."""
    assert isinstance(trainer.feed, Given)
    trainer.next = None
    if order.part is not None:
        trainer.feed.part = order.part
    try:
        return trainer.segment(order.step, 1, clocks=order.clocks)
    except NonFinite as error:
        trainer.rank.back()
        return error


def hand(trainer: Trainer, part: Mapping[str, Array]) -> None:
    """Rows of the next batch, which are too many to travel with the order."""
    assert isinstance(trainer.feed, Given)
    trainer.feed.part = part


def start(trainer: Trainer, seed: int) -> None:
    trainer.rank.start(seed)


def load(trainer: Trainer, state: Mapping[str, Array]) -> None:
    trainer.rank.load(state)


def back(trainer: Trainer, _: None) -> None:
    trainer.rank.back()


def held(trainer: Trainer, aside: bool) -> dict[str, Array]:
    return trainer.rank.aside() if aside else trainer.rank.state()


class Ranks(ABC):
    """Where the ranks of a stepper are."""

    place: str
    closed = False
    #: after an error: do the ranks hold the state that the step began with?
    mended = False

    @abstractmethod
    def each(self, function: Callable[[Trainer, Any], Any], arguments: Sequence[Any]) -> list[Any]:
        """Do something with the first ranks, an argument for each, at once."""

    @abstractmethod
    def advance(self, orders: Sequence[Advance]) -> list[Any]:
        """One training step."""

    @abstractmethod
    def load(self, arrays: Mapping[str, Array]) -> None:
        """Give every rank its blocks of whole arrays."""

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """Let go of everything."""


class Here(Ranks):
    """Ranks of this process; they survive errors."""

    place, mended = "in this process", True

    def __init__(self, local: Local, timeout_s: float) -> None:
        self.local, self.timeout_s = local, timeout_s

    def each(self, function: Callable[[Trainer, Any], Any], arguments: Sequence[Any]) -> list[Any]:
        return [function(trainer, a) for trainer, a in zip(self.local.trainers, arguments, strict=False)]

    def advance(self, orders: Sequence[Advance]) -> list[Any]:
        for trainer in self.local.trainers:
            trainer.begun = False
        try:
            return self.local.each(lambda trainer: advance(trainer, orders[trainer.number]))
        except BaseException:
            self._mend()
            raise

    def _mend(self) -> None:
        """Undo what a step did that was broken off, and let the ranks meet again."""
        trainers, many = self.local.trainers, len(self.local.trainers)
        if self.local.pool is not None:
            for trainer in trainers:
                trainer.rank.transport.close()
            self.local.pool.shutdown(cancel_futures=True)
            self.local.pool = ThreadPoolExecutor(many, thread_name_prefix="rapydli-rank")
            for trainer, transport in zip(trainers, Threads.of(many, timeout_s=self.timeout_s), strict=True):
                trainer.rank.transport = transport
        for trainer in trainers:
            if trainer.begun:
                back(trainer, None)

    def load(self, arrays: Mapping[str, Array]) -> None:
        self.each(load, [arrays] * len(self.local.trainers))

    def close(self, *, failed: bool) -> None:
        self.closed = True
        self.local.close(failed=failed)


class There(Ranks):
    """Ranks on the workers of a cluster."""

    place = "on workers"

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        try:
            cluster.start(None)
        except BaseException:
            cluster.close(failed=True)
            raise

    def each(self, function: Callable[[Trainer, Any], Any], arguments: Sequence[Any]) -> list[Any]:
        name, run = function.__name__.strip("_"), self.cluster.job.run
        what = (run, _same, lambda _: function, arguments.__getitem__)
        return self.cluster.results(self.cluster.each(name, on_trainer, *what, ranks=len(arguments)))

    def advance(self, orders: Sequence[Advance]) -> list[Any]:
        parts = [dict(order.part or {}) for order in orders]
        if sum(array.nbytes for part in parts for array in part.values()) > SMALL_BYTES:
            client = self.cluster.client
            places = zip(parts, self.cluster.addresses, strict=True)
            self.each(hand, [client.scatter([part], workers=[address], hash=False)[0] for part, address in places])
            orders = [replace(order, part=None) for order in orders]
        return self.each(advance, orders)

    def load(self, arrays: Mapping[str, Array]) -> None:
        sent = self.cluster.client.scatter([dict(arrays)], hash=False)[0]
        self.each(load, [sent] * self.cluster.job.ranks)

    def close(self, *, failed: bool) -> None:
        self.closed = True
        self.cluster.close(failed=failed)


def _same(number: int) -> int:
    return number
