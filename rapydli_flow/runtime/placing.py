"""Where the ranks of a plan go on a cluster: what workers and links say, and the decision of `scheduler.place`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distributed import Client

from ..data import Dataset
from ..scheduler import Links, Placement, Plan, Program, Slot, check_room, place, traffic
from . import worker as tasks
from .feeding import fed_layout, read_bytes
from .workers import answers

LOOK_S = 10.0  # to open a dataset on all workers


def placed(
    client: Client,
    programs: Sequence[Program],
    plan: Plan,
    workers: Mapping[str, Mapping[str, Any]],
    *,
    links: Links,
    data: Dataset | None = None,
    before: str = "",
) -> Placement:
    """The worker of each rank, of those that are known. ``before``: a run whose chunks in memory are used.

    TooLittleMemory where an arena fits nowhere, NoWorkers where there are too few, or too few that see the data.
    """
    seen = answers(client, workers, LOOK_S, tasks.at_hand, data, before) if data is not None else {}
    slots = [_slot(address, worker, *seen.get(address, (True, 0.0))) for address, worker in workers.items()]
    layouts = [fed_layout(program) for program in programs]
    check_room(programs, slots)
    return place(
        traffic(programs, average_every=plan.average_every),
        slots,
        links,
        needs=[program.needed_bytes for program in programs],
        reads=[read_bytes(data, layout) if data is not None and layout else 0 for layout in layouts],
        threads=plan.threads,
        devices=[program.on.key for program in programs],
    )


def _slot(address: str, worker: Mapping[str, Any], reaches: bool, held: float) -> Slot:
    """A worker as a place for a rank."""
    limit, used = worker["memory_bytes"], worker["used_bytes"]
    free_bytes = max(0, limit - used) if limit else None
    return Slot(address, worker["host"], free_bytes, worker["threads"], worker["device"].key, reaches, held)
