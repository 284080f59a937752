"""Which workers a cluster has, and what they are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from distributed import Client

from ..errors import NoWorkers, VersionMismatch
from ..version import __version__
from . import worker as tasks
from .worker import Resident


def answers(
    client: Client, addresses: Iterable[str], timeout_s: float, function: Callable[..., Any], *arguments: Any
) -> dict[str, Any]:
    """What a function gives on each of these workers that answers in time, by address."""

    async def ask() -> dict[str, Any]:
        asked = [asyncio.wait_for(client._run(function, *arguments, workers=[a]), timeout_s) for a in addresses]
        found = await asyncio.gather(*asked, return_exceptions=True)
        return {address: answer for each in found if isinstance(each, dict) for address, answer in each.items()}

    return dict(client.sync(ask))


def answering(client: Client, timeout_s: float) -> dict[str, dict[str, Any]]:
    """What each worker is that answers in time, by address; only those of this version."""
    addresses = client.sync(client.scheduler.identity, n_workers=-1)["workers"]
    found = answers(client, addresses, timeout_s, tasks.who)
    return {address: worker for address, worker in found.items() if worker["version"] == __version__}


def ready_workers(client: Client, ranks: int | None, timeout_s: float) -> dict[str, dict[str, Any]]:
    """What each worker is, by address; NoWorkers or VersionMismatch where the cluster will not do."""
    least = ranks or 1
    try:
        client.wait_for_workers(least, timeout=timeout_s)
    except TimeoutError:
        have = len(client.scheduler_info(n_workers=-1)["workers"])
        raise NoWorkers(
            f"the plan needs {least} worker(s) but the cluster has {have} after {timeout_s:g} s. Start more workers, "
            "or plan for fewer ranks."
        ) from None
    try:
        known: dict[str, dict[str, Any]] = client.sync(client._run, tasks.who, callback_timeout=timeout_s)
    except TimeoutError:
        raise NoWorkers(f"a worker of the cluster does not answer in {timeout_s:g} s. Is it stopped?") from None
    except (ModuleNotFoundError, AttributeError) as error:
        raise VersionMismatch(
            f"a worker cannot import rapydli_flow {__version__} ({error}). Install the same version on every worker."
        ) from error
    for address, worker in sorted(known.items()):
        if worker["version"] != __version__:
            raise VersionMismatch(
                f"worker {address} runs rapydli_flow {worker['version']} but this client runs {__version__}. "
                "Install the same version everywhere: kernels and plans are exchanged between them."
            )
    client.register_plugin(Resident())
    return known
