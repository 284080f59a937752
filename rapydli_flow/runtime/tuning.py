"""Tuning the kernels of rank graphs, here or on workers, and remembering what was found.

On a cluster one worker of each kind of device tunes, all kinds at once; what they say on the way and what they
found goes to the client, to the page on the scheduler's dashboard, and into the cache of every host.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from distributed import Client, get_worker
from distributed import Event as DaskEvent

from cpu_kernels.compile import host

from ..errors import RunLost, SettingError
from ..graph import Graph
from ..ops import Leaf
from ..space import Rules, as_rules
from ..spec import Array
from ..template import Device
from ..tuner import Choice, Found, Request, Trial, Tuning, TuningCache, nearest
from .devices import device_of
from .own import carry, unpack
from .publish import TUNING, show_page
from .remembered import cache, check_allowed, known
from .session import Job, Options, Progress, Session, Sitting
from .tuning_report import TuningReport
from .workers import having, ready_workers

START_S, POLL_S, GONE_S = 30.0, 0.2, 3.0
EXHAUSTED = "nothing left to try"
SIMILAR = 3  # winners of similar shapes that a search starts with


def requests_of(graphs: Sequence[Graph], device: Device) -> dict[Request, int]:
    """The distinct kernels of rank graphs that have a template, and how often the largest share of ranks calls each."""
    tuning = Tuning(device)
    first: dict[str, Request] = {}
    most: dict[str, int] = {}
    for graph in graphs:
        calls: dict[str, int] = {}
        for node in graph:
            if not isinstance(node.op, Leaf) and not node.op.collective and not node.op.view:
                request = tuning.serve(node.op, [graph.spec(v) for v in node.inputs])[0]
                key = request.key(device)
                calls[key] = calls.get(key, 0) + 1
                if key not in first and request.templates(device):
                    first[key] = request
        most = {key: max(most.get(key, 0), n) for key, n in {**most, **calls}.items()}
    return {request: most[key] for key, request in first.items()}


def jobs_of(graphs: Sequence[Graph], device: Device, threads: int, known_too: bool) -> list[Job]:
    """What is to be tuned, with what is known of it."""
    store, jobs = cache(), []
    chosen = {} if known_too else known(device).choices
    for request, calls in requests_of(graphs, device).items():
        if request.key(device) in chosen:
            continue
        jobs.append(_job(store, device, request, calls, threads))
    return jobs


def _job(store: TuningCache, device: Device, request: Request, calls: int, threads: int) -> Job:
    """A kernel with what is known of it: times with as many threads. What failed may have been the machine's fault."""
    trials = [t for t in store.trials(device, request) if t.time_s is not None and t.threads == threads]
    return Job(request, calls, tuple(trials), similar(store, device, request))


def similar(store: TuningCache, device: Device, request: Request) -> tuple[Choice, ...]:
    """What won for the nearest shapes of the same family."""
    return nearest(request, store.winners(device, request.op.family))[:SIMILAR]


def check_soft(soft: Rules, requests: Sequence[Request], device: Device) -> None:
    """Refuse constraints of the user's that no template could keep to, before anything is measured."""
    rules = as_rules(soft)
    if not rules:
        return
    spaces = [t.space_of(r.op, r.ins, r.outs, device) for r in requests for t in r.templates(device)]
    for name, tree in rules.items():
        if not any(tree.names <= space.vocabulary for space in spaces):
            names = sorted(set().union(*(space.vocabulary for space in spaces)))
            raise SettingError(
                f"autotune: the constraint {name!r} names {', '.join(sorted(tree.names))}, but no template of this "
                f"step has all of them. Its parameters are {', '.join(names)}."
            )


def remember(store: TuningCache, device: Device, found: Found) -> None:
    """Keep what was found for one kernel. A choice needs more than the default's time, or nothing else to try."""
    store.record(device, found.request, found.trials)
    if found.best.time_s is not None and (len(found.trials) > 1 or found.ended == EXHAUSTED):
        store.add(device, found.request, found.best, found.default, found.ties)


def autotune(
    graphs: Sequence[Graph],
    threads: int,
    client: Client | None,
    *,
    budget_s: float,
    trials: int | None = None,
    strategy: str = "guided",
    soft: Rules = (),
    seed: int = 0,
    watch: Callable[[Progress], None] | None = None,
    known_too: bool = True,
    device: str | None = None,
) -> TuningReport:
    """Tune every distinct kernel of rank graphs and keep the results; those that are ``known_too``, or only others.

    With a client ``device`` says which workers tune; DeviceMismatch where none has one.
    """
    check_allowed()
    options = Options(threads, budget_s, trials, strategy, soft, seed)
    tell = watch or (lambda progress: None)
    lost: tuple[str, ...] = ()
    if client is None:
        there = device_of(device, "autotune")
        jobs = jobs_of(graphs, there, options.threads, known_too)
        check_soft(soft, [job.request for job in jobs], there)
        keep = partial(remember, cache(), there)
        sessions = [Sitting(jobs, there, options, graph=graphs[0], tell=tell, keep=keep).run()]
    else:
        sessions, lost = _on_workers(graphs, client, options, tell, known_too, device)
    return TuningReport(tuple(sessions), known(sessions[0].device), lost)


def tune_one(
    request: Request,
    threads: int,
    device: Device | None = None,
    *,
    budget_s: float,
    trials: int | None = None,
    strategy: str = "guided",
    soft: Rules = (),
    seed: int = 0,
    operands: Sequence[Array] | None = None,
    watch: Callable[[Progress], None] | None = None,
) -> TuningReport:
    """Tune one kernel on a device of this host, by default its processor, and keep the result. ``operands``: what to
    measure on, not random numbers."""
    check_allowed()
    device, store = device or host(), cache()
    check_soft(soft, [request], device)
    job = _job(store, device, request, 1, threads)
    options = Options(threads, budget_s, trials, strategy, soft, seed)
    tell = watch or (lambda progress: None)
    sitting = Sitting([job], device, options, tell=tell, keep=partial(remember, store, device), operands=operands)
    return TuningReport((sitting.run(),), known(device))


# on a cluster --------------------------------------------------------------------------------------------


def _on_workers(
    graphs: Sequence[Graph],
    client: Client,
    options: Options,
    tell: Callable[[Progress], None],
    known_too: bool,
    named: str | None,
) -> tuple[list[Session], tuple[str, ...]]:
    """The sessions of all kinds of device, or of those with this name, and the kinds whose worker was lost."""
    workers = ready_workers(client, None, START_S)
    if named is not None:
        workers = having(named, workers, 1, "autotune")
    kinds: dict[str, tuple[Device, str]] = {}  # devices with equal keys run the same kernels equally fast
    for address in sorted(workers):
        device = workers[address]["device"]
        kinds.setdefault(device.key, (device, address))
    show_page(client)
    session = f"rapydli-tuning-{uuid.uuid4().hex[:10]}"
    stop, futures = DaskEvent(session, client=client), {}
    client.subscribe_topic(session, lambda event: tell(Progress.from_json(event[1])))
    try:
        for device, address in kinds.values():
            jobs = jobs_of(graphs, device, options.threads, known_too)
            check_soft(options.soft, [job.request for job in jobs], device)
            packed = [(carry(job.request, device), job.calls, job.known, job.similar) for job in jobs]
            there = {"workers": [address], "pure": False, "retries": 0}
            futures[address] = client.submit(tune_there, packed, device, options, graphs[0], session, **there)
        try:
            done, lost = _gathered(client, futures)
        except KeyboardInterrupt:
            stop.set()
            done, lost = _gathered(client, futures)
    finally:
        client.unsubscribe_topic(session)
    if not done:
        raise RunLost(
            f"autotune: {', '.join(lost)} disappeared while tuning. What was found until then is in the cache there; "
            "start the worker again and repeat the call."
        )
    for each in done:
        for found in each.found:
            remember(cache(), each.device, found)
    _share(client, [each.device for each in done])
    return done, lost


def _gathered(client: Client, futures: Mapping[str, Any]) -> tuple[list[Session], tuple[str, ...]]:
    """The results that come, and the workers that are gone, which are not waited for."""
    waiting, missed = dict(futures), dict.fromkeys(futures, 0.0)
    done: list[Session] = []
    lost: list[str] = []
    while waiting:
        there = client.scheduler_info(n_workers=-1)["workers"]
        for address, future in list(waiting.items()):
            missed[address] = 0.0 if address in there else missed[address] or time.monotonic()
            if future.done():
                done.append(waiting.pop(address).result())
            elif missed[address] and time.monotonic() - missed[address] > GONE_S:
                waiting.pop(address).cancel()
                lost.append(f"worker {address}")
        time.sleep(POLL_S)
    return done, tuple(lost)


def tune_there(
    packed: Sequence[tuple[bytes, int, tuple[Trial, ...], tuple[Choice, ...]]],
    device: Device,
    options: Options,
    graph: Graph,
    session: str,
) -> Session:
    """The task: tune on this worker, tell what happens, keep what is found in this host's cache too."""
    worker, stop = get_worker(), DaskEvent(session)
    jobs = [Job(unpack(data), calls, tried, similar) for data, calls, tried, similar in packed]
    asked = [0.0]

    def tell(progress: Progress) -> None:
        worker.log_event(session, progress.to_json())
        worker.log_event(TUNING, {"session": session, **progress.to_json()})

    def stopped() -> bool:  # the scheduler is asked once a second at most
        if time.monotonic() - asked[0] < 1.0:
            return False
        asked[0] = time.monotonic()
        return bool(stop.is_set())

    keep = partial(remember, cache(), device)
    return Sitting(jobs, device, options, graph=graph, tell=tell, stop=stopped, keep=keep).run()


def _share(client: Client, devices: Sequence[Device]) -> None:
    """Put what is known of these devices into the cache of every host of the cluster."""
    with tempfile.TemporaryDirectory() as folder:
        texts = []
        for number, device in enumerate(devices):
            path = Path(folder) / f"{number}.jsonl"
            cache().export(path, device, trials=True)
            texts.append(path.read_text(encoding="utf-8"))
    hosts: dict[str, str] = {}
    for address, worker in client.scheduler_info(n_workers=-1)["workers"].items():
        hosts.setdefault(worker["host"], address)
    client.run(take, "".join(texts), workers=sorted(hosts.values()))


def take(text: str) -> None:
    """On a worker: merge results into this host's cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shared.jsonl"
        path.write_text(text, encoding="utf-8")
        cache().merge(path)
