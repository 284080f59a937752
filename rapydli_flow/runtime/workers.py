"""Which workers a cluster has, what they are, and whether they will do.

Client and workers must run the same version of the package (plans and programs are pickled), of Python, and of the
libraries that make the kernels or compute in their place: each host compiles for itself, and what several ranks hold
must have the same bits on all of them. For the same reason the workers of a run have one kind of processor.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from distributed import Client, default_client

from ..config import checked_device, settings
from ..errors import DeviceMismatch, MissingDependency, NoWorkers, SettingError, VersionMismatch
from ..graph import Graph
from ..scheduler import Plan, make_plan
from ..scheduler.devices import kind_of
from ..tuner import Tuning
from ..version import __version__
from . import worker as tasks
from .remembered import tuning_of, tuning_on
from .worker import Resident

LOOK_S = 30.0  # for workers to come, and to say what they are


def scheduler_of(client: Client) -> Any:
    """What a client asks its scheduler by; NoWorkers where it was closed."""
    scheduler = client.scheduler
    if scheduler is None:
        raise NoWorkers("the client was closed, so there are no workers. Close it only after its runs have ended.")
    return scheduler


def answers(
    client: Client, addresses: Iterable[str], timeout_s: float, function: Callable[..., Any], *arguments: Any
) -> dict[str, Any]:
    """What a function gives on each of these workers that answers in time, by address."""

    async def ask() -> dict[str, Any]:
        asked = [asyncio.wait_for(client._run(function, *arguments, workers=[a]), timeout_s) for a in addresses]
        found = await asyncio.gather(*asked, return_exceptions=True)
        return {address: answer for each in found if isinstance(each, dict) for address, answer in each.items()}

    return dict(client.sync(ask))


def answering(client: Client, timeout_s: float, devices: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
    """What each worker is that answers in time, by address; only those of this version, and of a device with one of
    these keys."""
    addresses = client.sync(scheduler_of(client).identity, n_workers=-1)["workers"]
    found = answers(client, addresses, timeout_s, tasks.who)
    same = {address: worker for address, worker in found.items() if not mismatch(address, worker)}
    return {a: worker for a, worker in same.items() if devices is None or worker["device"].key in devices}


def mismatch(address: str, worker: Mapping[str, Any]) -> str:
    """What a worker has in another version than this process, in words; '' if nothing."""
    if worker["version"] != __version__:
        return (
            f"worker {address} runs rapydli_flow {worker['version']} but this client runs {__version__}. "
            "Install the same version everywhere: kernels and plans are exchanged between them."
        )
    if worker["libraries"] != tasks.libraries():
        return (
            f"worker {address} has {worker['libraries']} but this client has {tasks.libraries()}. Install the same "
            "versions everywhere: each host compiles its own kernels, and all must compute the same bits."
        )
    return ""


def workers_for(
    client: Client,
    ranks: int | None,
    timeout_s: float,
    device: str | Sequence[str] | None = None,
    where: str = "fit",
) -> dict[str, dict[str, Any]]:
    """`ready_workers` of one kind of processor, of that which most have: enough for the ranks, or all that there are.
    With a ``device`` ('cpu', 'cuda', 'emulated'), of those that have one; with one for each rank, of each kind.
    ``where``: the function that asks.

    Raises DeviceMismatch where those of one kind are too few.
    """
    known = ready_workers(client, ranks, timeout_s)
    if device is None:
        return _alike(known, ranks or len(known))
    if isinstance(device, str):
        known = having(device, known, ranks or 1, where)
        return _alike(known, ranks or len(known))
    found: dict[str, dict[str, Any]] = {}
    for name, count in Counter(device).items():
        found |= _alike(having(name, known, count, where), count)
    return found


def _alike(known: Mapping[str, dict[str, Any]], least: int) -> dict[str, dict[str, Any]]:
    """The workers of the kind of device that most have; DeviceMismatch where they are fewer than ``least``."""
    kinds: dict[str, dict[str, dict[str, Any]]] = {}
    for address, worker in sorted(known.items()):
        kinds.setdefault(worker["device"].key, {})[address] = worker
    most = max(kinds.values(), key=len)
    if len(most) < least:
        other = next(kind for kind in kinds.values() if kind is not most)
        raise DeviceMismatch(
            f"{_first(most)} but {_first(other)}. Kernels are compiled for the processor of each, and what several "
            f"ranks hold would not stay equal to the bit. Plan for workers of one kind, ranks={len(most)} or fewer; or "
            "start all with NUMBA_CPU_NAME and NUMBA_CPU_FEATURES set to what the least of them has."
        )
    return most


def having(device: str, workers: Mapping[str, dict[str, Any]], least: int, where: str) -> dict[str, dict[str, Any]]:
    """The workers with such a device; DeviceMismatch where they are fewer than ``least``, SettingError for the name of
    one GPU of several."""
    kind = kind_of(checked_device(device, f"{where}: device="))
    if device.partition(":")[1]:
        raise SettingError(
            f"{where}: device={device!r}: which GPU a worker has is said where it is started, by CUDA_VISIBLE_DEVICES "
            "or RAPYDLI_DEVICE. Use device='cuda' with a client."
        )
    found = {a: w for a, w in workers.items() if w["device"].is_a(kind)}
    if len(found) < least:
        raise DeviceMismatch(
            f"{where} needs {least} worker(s) with device {device!r} but {len(found)} of {len(workers)} have one "
            f"({_first(workers)}). Start workers with RAPYDLI_DEVICE={device}."
        )
    return found


def _first(workers: Mapping[str, Mapping[str, Any]]) -> str:
    """The first of some workers, and its device, in words."""
    address, worker = next(iter(workers.items()))
    return f"worker {address} has device {worker['device'].name} ({worker['device'].key})"


def ready_workers(client: Client, ranks: int | None, timeout_s: float) -> dict[str, dict[str, Any]]:
    """What each worker is, by address.

    NoWorkers, DeviceMismatch, SettingError or VersionMismatch where the cluster will not do.
    """
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
        known: dict[str, Any] = client.sync(client._run, _who, on_error="return", callback_timeout=timeout_s)
    except TimeoutError:
        raise NoWorkers(f"a worker of the cluster does not answer in {timeout_s:g} s. Is it stopped?") from None
    for address, worker in sorted(known.items()):
        if isinstance(worker, OSError):
            raise NoWorkers(f"worker {address} does not answer ({worker}). Is it stopped, or gone?") from worker
        if isinstance(worker, MissingDependency):  # it has the package, but not what it is told to run on
            raise DeviceMismatch(
                f"worker {address} cannot use its device: {worker} Start workers there with another RAPYDLI_DEVICE."
            ) from worker
        if isinstance(worker, SettingError):
            raise SettingError(f"worker {address}: {worker}") from worker
        if isinstance(worker, Exception):
            raise VersionMismatch(
                f"worker {address} cannot use rapydli_flow {__version__} ({worker}). Install the same version on every "
                "worker."
            ) from worker
        wrong = mismatch(address, worker)
        if wrong:
            raise VersionMismatch(wrong)
    client.register_plugin(Resident())
    return known


def _who(dask_worker: Any) -> Any:
    """On a worker: what it is, or why it cannot be that; an error that is raised there would be logged there, too."""
    try:
        return tasks.who(dask_worker)
    except (MissingDependency, SettingError) as error:
        return error


def tuning_there(where: str, device: str | None, tuning: Tuning | None) -> tuple[Tuning, tuple[str, ...]]:
    """What tasks begin with that nobody has sent to a worker yet: `tuning_on`, or, where a GPU is asked for and there
    is a client, of a GPU of its workers; and the workers that have one, unless all do."""
    client = _client()
    if client is None or device is None or kind_of(checked_device(device, f"{where}: device=")) != "cuda":
        return tuning_on(where, device, tuning), ()
    workers = workers_for(client, None, LOOK_S, device, where)
    return tuning_of(where, next(iter(workers.values()))["device"], tuning), some_of(client, workers)


def some_of(client: Client, workers: Mapping[str, Any]) -> tuple[str, ...]:
    """The addresses of some workers; () where they are all that the cluster has."""
    return () if set(workers) == everyone(client) else tuple(workers)


def everyone(client: Client) -> set[str]:
    """The addresses of all workers that a cluster has now."""
    return set(client.sync(scheduler_of(client).identity, n_workers=-1)["workers"])


def _client() -> Client | None:
    """The client whose workers compute, unless it is said otherwise."""
    try:
        return default_client()  # type: ignore[no-any-return]
    except ValueError:
        return None


class Usual(NamedTuple):
    """What a plan for some workers has, unless it is said otherwise."""

    ranks: int
    threads: int
    overlap: bool
    device: str | None  # the name of a card; None for processors

    @classmethod
    def of(cls, workers: Mapping[str, Mapping[str, Any]]) -> Usual:
        """A rank for each, with as many threads as the least of them; sums behind the backward pass where they are on
        several hosts. Without workers one rank, in this process."""
        threads = min((worker["threads"] for worker in workers.values()), default=settings().threads)
        hosts = {worker["host"] for worker in workers.values()}
        kinds = {worker["device"].called for worker in workers.values()} or {kind_of(settings().device)}
        named = next(iter(kinds))  # they are of one, or the plan says which
        return cls(len(workers) or 1, threads, len(hosts) > 1, None if named == "cpu" else named)

    def plan(self, graph: Graph) -> Plan:
        """The plan that divides records so."""
        return make_plan(graph, self.ranks, threads=self.threads, overlap=self.overlap)
