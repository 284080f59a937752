"""What a run tells the cluster's scheduler while it goes on, for the page "rapydli" on Dask's dashboard.

    callback in the client --log_event("rapydli", lines)--> scheduler -> Page (plugin) -> rapydli_flow.dashboard.page

Lines are those of ``metrics.jsonl``. They are sent by the client's event loop, few and small, and nobody waits
for them: a run goes on as it would without a page, also where there is no dashboard.
"""

from __future__ import annotations

import importlib
import logging
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from distributed import Client, SchedulerPlugin

from ..scheduler import Program
from .events import Callback, Ended, Event, Recovered, Saved, Stepped, Validated
from .timeline import KINDS, Span
from .workers import scheduler_of

TOPIC, TUNING = "rapydli", "rapydli-tuning"
PAGES = {  # imported by name, on the scheduler: they are floors above this one
    TOPIC: "rapydli_flow.dashboard.page",
    TUNING: "rapydli_flow.dashboard.tuning_page",
}
POINTS = 32  # steps of a segment that are told, the last one among them
LINES = 200  # of one message
TIMELINE_S = 2.0  # from one timeline to the next: the scheduler keeps a thousand messages
FLUSH_S = 1.0  # the end of a run is waited for, so that a client may close after it

log = logging.getLogger(__name__)


class Page(SchedulerPlugin):
    """Puts our pages onto the scheduler's dashboard, and hands them what is told. One for all runs and clients."""

    name = "rapydli-page"
    idempotent = True

    async def start(self, scheduler: Any) -> None:
        made = {topic: importlib.import_module(page).install(scheduler) for topic, page in PAGES.items()}
        self.pages = {topic: page for topic, page in made.items() if page is not None}

    def log_event(self, topic: str, msg: Any) -> None:
        if topic in self.pages:
            self.pages[topic].hear(msg)

    def remove_client(self, scheduler: Any, client: str) -> None:
        if TOPIC in self.pages:
            self.pages[TOPIC].leave(client)


class Publisher(Callback):
    """Tells the scheduler what happens in a run."""

    def __init__(self, client: Client, about: Mapping[str, Any]) -> None:
        self.client = client
        self.about = {**about, "run": uuid.uuid4().hex[:12], "client": client.id}
        self.waiting: deque[dict[str, Any]] = deque()
        self.sent = threading.Event()
        self.sending = self.broken = False
        self.timeline: Sequence[Sequence[Span]] = ()  # the newest, until it is told
        self.drawn = -TIMELINE_S  # when one was told last

    def on_event(self, event: Event) -> None:
        if self.broken:
            return
        told = lines(event)
        if isinstance(event, Stepped) and self.about["granularity"] != "segment":
            told[-1].pop("feed_s")  # batches are read by tasks of their own
        if isinstance(event, Stepped) and event.timeline:
            self.timeline = event.timeline
        if isinstance(event, Recovered):
            self.timeline = ()  # of ranks that are no more
        if self.timeline and (isinstance(event, Ended) or time.monotonic() - self.drawn >= TIMELINE_S):
            told[-1]["timeline"] = [[(KINDS.index(kind), a, b) for kind, a, b in spans] for spans in self.timeline]
            self.timeline, self.drawn = (), time.monotonic()
        self.sent.clear()
        self.waiting.extend(told)
        loop = self.client.loop
        assert loop is not None
        loop.add_callback(self._send)
        if isinstance(event, Ended):
            self.sent.wait(FLUSH_S)

    async def _send(self) -> None:
        """Send what waits, in order; in the client's event loop."""
        if self.sending:
            return
        self.sending = True
        try:
            while self.waiting:
                part = [self.waiting.popleft() for _ in range(min(LINES, len(self.waiting)))]
                about = self.about if part[0].get("kind") == "started" else {"run": self.about["run"]}
                await scheduler_of(self.client).log_event(topic=TOPIC, msg={**about, "lines": part})
        except Exception as error:  # whatever it is: a run does not end for want of a page
            self.broken = True
            self.waiting.clear()
            log.info("the dashboard's page is not told of this run any more: %s: %s", type(error).__name__, error)
        finally:
            self.sending = False
            if not self.waiting:
                self.sent.set()


def show_page(client: Client) -> bool:
    """Put the page onto the scheduler's dashboard if it is not there; False where that cannot be."""
    try:
        client.register_plugin(Page())
    except Exception as error:  # no right to install plugins, another version: the run itself can do without
        log.info("there is no page of this run on the dashboard: %s: %s", type(error).__name__, error)
        return False
    return True


def publishing(
    client: Client | None,
    name: str,
    programs: Sequence[Program],
    *,
    sent_bytes: Sequence[Sequence[int]],
    addresses: Sequence[str],
    granularity: str,
) -> tuple[Callback, ...]:
    """The callback that tells a run to the scheduler of a client, and the page there; () where there is none.

    ``sent_bytes``: what each rank sends to each in a step; ``addresses``: the worker of each rank, where ranks stay on
    workers.
    """
    if client is None or not show_page(client):
        return ()
    about = {
        "name": name,
        "begun": time.time(),
        "granularity": granularity,
        "addresses": list(addresses),
        "sent_bytes": [list(row) for row in sent_bytes],
        "arena_bytes": [program.memory_bytes for program in programs],
        "tasks": [] if granularity == "segment" else _tasks(programs),
    }
    return (Publisher(client, about),)


def lines(event: Event) -> list[dict[str, Any]]:
    """An event as lines of a log; of the steps of a long segment only some."""
    kind = type(event).__name__.lower()
    if isinstance(event, Stepped):
        stride = -(-event.steps // POINTS)
        kept = range(event.steps - 1, -1, -stride)
        steps = [
            {"kind": "step", "step": event.first + i, **{name: series[i] for name, series in event.scalars.items()}}
            for i in reversed(kept)
        ]
        times: dict[str, Any] = {"time_s": event.time_s, "feed_s": event.feed_s, "ops": dict(event.ops)}
        times |= {"ranks": event.ranks} if event.ranks else {}
        return [*steps, {"kind": "segment", "step": event.first, "steps": event.steps, **times}]
    if isinstance(event, Validated):
        return [{"kind": kind, "step": event.step - 1, "epoch": event.epoch, **event.metrics}]
    fields = asdict(event)
    if isinstance(event, Recovered):
        return [{"kind": kind, **fields}]
    if isinstance(event, Saved):
        fields["step"] -= 1
    return [{"kind": kind, **{k: v for k, v in fields.items() if isinstance(v, int | float | str)}}]


def _tasks(programs: Sequence[Program]) -> list[str]:
    """What the tasks of a flow are called."""
    titles = {re.sub("[^a-z0-9]+", "_", step.title) for program in programs for step in program.steps}
    return sorted(titles | {"stage", "load_batch", "scalars"})
