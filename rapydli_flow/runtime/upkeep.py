"""What the scheduler sees to for runs: their workers are not taken away, and a dead client leaves nothing behind.

One plugin for all runs and clients. A run is told to it when its ranks are placed, and again when it is over, or its
client goes away: then its workers are told to let go of memory, shared memory and connections. One that stands still
hears it when it goes on.
"""

from __future__ import annotations

from typing import Any

from distributed import Client, SchedulerPlugin

RELEASE = "rapydli-release"  # the message to workers; see `rapydli_flow.runtime.worker.Resident`


class Upkeep(SchedulerPlugin):
    """Knows which client has which run on which workers."""

    name = "rapydli-upkeep"
    idempotent = True

    async def start(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.runs: dict[str, tuple[str, tuple[str, ...]]] = {}

    def remove_client(self, scheduler: Any, client: str) -> None:
        for run, (owner, _) in list(self.runs.items()):
            if owner == client:
                self.over(run)

    def over(self, run: str) -> None:
        """Tell the workers of a run, and forget it."""
        _, addresses = self.runs.pop(run, ("", ()))
        present = [address for address in addresses if address in self.scheduler.workers]
        self.scheduler.send_all({}, {address: [{"op": RELEASE, "run": run}] for address in present})

    def valid_workers_downscaling(self, scheduler: Any, workers: Any) -> list[Any]:
        """A worker that holds a rank is not one that an adaptive cluster may take away."""
        used = {address for _, addresses in self.runs.values() for address in addresses}
        return [worker for worker in workers if worker.address not in used]


def begun(client: Client, run: str, addresses: tuple[str, ...]) -> None:
    """Tell the scheduler of a run."""
    client.register_plugin(Upkeep())
    client.run_on_scheduler(_note, run, client.id, addresses)


def over(client: Client, run: str) -> None:
    """The run's workers are free."""
    client.run_on_scheduler(_forget, run)


def _note(run: str, client: str, addresses: tuple[str, ...], dask_scheduler: Any) -> None:
    dask_scheduler.plugins[Upkeep.name].runs[run] = (client, addresses)


def _forget(run: str, dask_scheduler: Any) -> None:
    dask_scheduler.plugins[Upkeep.name].over(run)
