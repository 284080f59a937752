"""How the ranks of a job reach each other: in shared memory, over comms, or by both.

opened      its own end: a rank listens, and the first one of a host makes the memory that the others map
connected   all ends are there: addresses are known, and all memory
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .hosts import Hosts
from .job import Job
from .peers import Peers
from .shared import SharedMemory
from .transport import Alone, Transport, swap_bytes


def opened(job: Job, number: int, worker: Any) -> tuple[Transport, str]:
    """A rank's own end, and what the others need to reach it."""
    if job.ranks == 1:
        return Alone(), ""
    if job.transport == "shared":
        return _memory(job, number) if number == 0 else Alone(), ""
    far = Peers(worker, number, job.ranks, timeout_s=job.timeout_s, aside=_aside(job))
    for line in filter(None, (far, far.aside)):
        line.topology = job.topology
    here = job.topology.beside(number)
    first = job.transport == "hosts" and here[0] == number
    return Hosts(far, here, _memory(job, number) if len(here) > 1 else None) if first else far, far.open()


def connected(job: Job, number: int, end: Transport, addresses: Sequence[str]) -> Transport:
    """The way of a rank to all the others, from its own end."""
    if job.ranks == 1:
        return end
    if job.transport == "shared":
        return end if isinstance(end, SharedMemory) else _memory(job, number)
    far = end.far if isinstance(end, Hosts) else end
    assert isinstance(far, Peers)
    far.connect(addresses)
    if job.transport == "comm" or end is not far:
        return end
    return Hosts(far, job.topology.beside(number), _memory(job, number))


def _memory(job: Job, number: int) -> SharedMemory:
    """The memory that the ranks of a host share."""
    here, chunk_bytes = job.topology.beside(number), (Hosts if job.transport == "hosts" else SharedMemory).chunk_bytes
    sizes = (swap_bytes(program, len(here), chunk_bytes) for program in job.programs)
    capacity = max(chunk_bytes if job.keeps_copies else 0, *sizes)
    name = f"{job.run}-{job.topology.hosts[number]}"
    how: dict[str, Any] = {"timeout_s": job.timeout_s, "aside": _aside(job)}
    memory = SharedMemory(name, here.index(number), len(here), capacity, **how)
    for line in filter(None, (memory, memory.aside)):
        line.topology = job.topology
    return memory


def _aside(job: Job) -> bool:
    """Does anything go on behind kernels, and wants a line of its own?"""
    return any(program.behind for program in job.programs)
