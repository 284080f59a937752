"""Ranks of several hosts, some of them on the same one: shared memory within a host, comms between hosts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..spec import Array
from .peers import Peers
from .shared import SharedMemory
from .transport import Transport


class Hosts(Transport):
    """``far`` reaches everyone; ``near`` the ranks ``here``, those of this host, if there are others on it."""

    chunk_bytes = 1 << 24  # between those of shared memory and of comms: what is handed on is in both

    def __init__(self, far: Peers, here: Sequence[int], near: SharedMemory | None) -> None:
        self.rank, self.ranks, self.far, self.near = far.rank, far.ranks, far, near
        self.topology, self.timeout_s = far.topology, far.timeout_s
        self.numbers = {rank: number for number, rank in enumerate(here)}  # in shared memory
        if far.aside is not None:
            assert near is None or near.aside is not None
            self.aside = Hosts(far.aside, here, near and near.aside)

    @property
    def waited_s(self) -> float:  # type: ignore[override]
        return self.far.waited_s + (self.near.waited_s if self.near is not None else 0.0)

    def post(self, name: str, sends: Mapping[int, Sequence[Array]]) -> None:
        self.far.post(name, {r: parts for r, parts in sends.items() if r not in self.numbers})
        if self.near is not None:
            self.near.post(name, {self.numbers[r]: parts for r, parts in sends.items() if r in self.numbers})

    def take(self, name: str, sizes: Mapping[int, int]) -> dict[int, Array]:
        got: dict[int, Array] = {}
        if self.near is not None:
            near = self.near.take(name, {self.numbers[r]: size for r, size in sizes.items() if r in self.numbers})
            got |= {r: near[number] for r, number in self.numbers.items() if number in near}
        return got | self.far.take(name, {r: size for r, size in sizes.items() if r not in self.numbers})

    def release(self) -> None:
        if self.near is not None:
            self.near.release()

    def joined(self) -> None:
        if self.near is not None:
            self.near.joined()

    @property
    def given_up(self) -> bool:
        return self.far.given_up

    def close(self) -> None:
        self.far.close()
        if self.near is not None:
            self.near.close()
