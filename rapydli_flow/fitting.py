"""One call of fit: from options to a backend, a schedule and a finished run."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from distributed import Client

from .arguments import check_seconds
from .comparison import (
    Comparable,
    Comparison,
    Summary,
    best_metrics,
    last_metrics,
    optimizer_words,
    records_s,
    settings_of,
)
from .config import checked_device
from .data import Dataset, Feed, Snapshot, ingest, latest, read_snapshot
from .errors import GraphError, SettingError, SnapshotError, UnknownOp
from .graph import Graph, from_json, precision_of, to_json
from .runtime import tuning as tuner
from .runtime.backend import Backend
from .runtime.elastic import Elastic, Policy
from .runtime.evaluate import complete_state
from .runtime.events import (
    SNAPSHOTS,
    Callback,
    Ended,
    Event,
    MetricsLog,
    Started,
    Stepped,
    Validated,
    read_log,
    validations,
)
from .runtime.feeding import check_fields
from .runtime.flow import Flow
from .runtime.job import Job
from .runtime.kinds import devices_for, names_of, tunings_for
from .runtime.leaving import Leaving
from .runtime.local import Local
from .runtime.own import bring, defined_outside
from .runtime.participant import CLOCKS
from .runtime.process import this_process
from .runtime.publish import publishing
from .runtime.sheet import sheet
from .runtime.train import Loop, Schedule
from .runtime.workers import Usual, some_of, workers_for
from .scheduler import Placement, Plan, Program, remade, traffic
from .spec import Array
from .template import Device
from .tuner import Choice, Tuning
from .version import __version__

GRANULARITIES = ("segment", "stage", "op")
TRANSPORTS = ("auto", "shared", "comm")


@dataclass
class Run:
    """A training run: the network, its state at the end, and what was measured."""

    graph: Graph
    state: dict[str, Array]
    steps: int
    scalars: dict[str, list[float]] = field(default_factory=dict)
    validation: list[Validated] = field(default_factory=list)
    segments: list[Stepped] = field(default_factory=list)
    path: Path | None = None
    outcome: str = ""
    started: Started | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The last validation metrics, or the scalars of the last step."""
        return last_metrics(self.validation, self.scalars)

    def summary(self) -> Summary:
        """What the run came to."""
        settings = settings_of({**asdict(self.started), **this_process()}) if self.started is not None else {}
        return Summary(
            name=self.path.name if self.path is not None else "this run",
            outcome=self.outcome,
            steps=self.steps,
            last=self.metrics,
            best=best_metrics(self.validation, self.scalars),
            records_s=records_s(settings.get("batch"), [(part.steps, part.time_s) for part in self.segments]),
            settings=settings,
        )

    def compare(self, other: Comparable) -> Comparison:
        """This run beside another one, live or found by `rapydli_flow.runs`: numbers, and what was set otherwise."""
        return Comparison(self.summary(), other.summary())

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        ended = f"; {self.outcome}" if self.outcome not in ("", "done") else ""
        return f"<Run: {self.steps} steps; {numbers}{ended}>"

    def _repr_html_(self) -> str:
        return sheet(self.steps, self.scalars, self.validation, self.path)


class _Collect(Callback):
    """Keeps what a run measures."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_event(self, event: Event) -> None:
        if isinstance(event, Stepped):
            if self.run.segments:  # of a long run they would be too much
                self.run.segments[-1] = replace(self.run.segments[-1], timeline=())
            self.run.segments.append(event)
            for name, values in event.scalars.items():
                self.run.scalars.setdefault(name, []).extend(values)
        elif isinstance(event, Validated):
            self.run.validation.append(event)
        elif isinstance(event, Started):
            self.run.started = event
        elif isinstance(event, Ended):
            self.run.steps, self.run.outcome = event.step, event.outcome


NUMBERS: tuple[str, ...] = ("epochs", "steps", "seed", "snapshot_every", "keep", "timeout_s", "tune_s", "retries")
NUMBERS += ("min_workers", "patience_s", "walltime_s")


@dataclass(frozen=True)
class Options:
    """What `rapydli_flow.fit` was asked for; see there."""

    epochs: float | None
    steps: int | None
    granularity: str
    seed: int
    shuffle: bool
    run_dir: Path | None
    snapshot_every: int | None
    keep: int
    resume: bool
    overwrite: bool
    transport: str
    timeout_s: float
    state: Mapping[str, Array] | None = None
    tune_s: float = 0.0
    retries: int = 100
    min_workers: int | None = None
    patience_s: float = 30.0
    walltime_s: float | None = None
    device: str | None = None

    def check(self, step: Graph) -> None:
        """Raise SettingError for options that mean nothing, before anything is done."""
        for name in NUMBERS:
            if isinstance(getattr(self, name), bool):  # Python counts with them
                raise SettingError(f"fit: {name}={getattr(self, name)} is not a number.")
        for name, allowed in (("granularity", GRANULARITIES), ("transport", TRANSPORTS)):
            if getattr(self, name) not in allowed:
                raise SettingError(f"fit: {name}={getattr(self, name)!r} is not one of {', '.join(allowed)}.")
        if (self.epochs is None) == (self.steps is None):
            raise SettingError("fit: give either epochs or steps.")
        if self.device is not None:
            checked_device(self.device, "fit: device=")
        if step.network is None:
            raise SettingError("fit: this graph is not a training step; make one with rf.train_step.")
        if self.resume and self.run_dir is None:
            raise SettingError("fit: resume needs the run_dir of the run that is to go on.")
        if self.resume and self.state is not None:
            raise SettingError("fit: resume goes on from the state of a snapshot; give state or resume, not both.")
        if self.snapshot_every is not None and self.snapshot_every < 0:
            raise SettingError(f"fit: snapshot_every={self.snapshot_every} is not 0 (none) or more steps.")
        check_seconds("fit", "0 (no tuning) or more", tune_s=self.tune_s)
        if self.keep < 1:
            raise SettingError(f"fit: keep={self.keep} is not 1 or more snapshots.")
        if self.retries < 0 or not self.patience_s >= 0:
            raise SettingError(f"fit: retries={self.retries}, patience_s={self.patience_s} are not 0 or more.")
        if self.walltime_s is not None and not self.walltime_s > 0:
            raise SettingError(f"fit: walltime_s={self.walltime_s} is not more than 0 seconds.")
        if self.min_workers is not None and self.min_workers < 1:
            raise SettingError(f"fit: min_workers={self.min_workers} is not 1 or more.")


class Fitting:
    """The parts of a run, made from options."""

    def __init__(
        self, step: Graph, train: Dataset, validation: Dataset | None, options: Options, client: Client | None
    ) -> None:
        self.step, self.train, self.validation, self.options, self.client = step, train, validation, options, client
        for dataset in (train, validation):
            if dataset is not None:
                check_fields(step, dataset)
        self.batch = step.leaves("batch")[0].spec.shape[0]
        with Feed(train, self.batch) as feed:
            self.per_epoch = feed.steps_per_epoch
        steps = options.steps if options.steps is not None else round((options.epochs or 0.0) * self.per_epoch)
        if steps < 1:
            raise SettingError(f"fit: {steps} steps are nothing to train. Give 1 or more.")
        self.steps = steps
        self.before = self._before()
        self.first = self.before.arrays if self.before else None
        if options.state is not None:
            self.first = complete_state(step, options.state, options.seed)

    def run(self, plan: Plan | None, tuning: Tuning | None, callbacks: Sequence[Callback]) -> Run:
        """Train."""
        options, before = self.options, self.before
        self._refuse_to_replace()
        workers = self._workers(plan)
        plan = plan or self._plan(workers)
        devices = devices_for("fit", names_of("fit", options.device, plan), workers)
        self._check_granularity(plan, devices)
        if options.tune_s and tuning is None and before is None:
            self._tune(plan)
        tunings = tuple(frozen(each, before, plan) for each in tunings_for("fit", devices, tuning))
        programs = plan.programs(self.step, *tunings)
        backend = self._backend(plan, programs, tunings, workers)
        started = self._started(plan, programs, backend.placement if isinstance(backend, Elastic) else None)
        for callback in callbacks:
            callback.check(started)
        folder = self._folder()  # last: an older run is only replaced by one that can begin
        run = Run(self._network, {}, self.steps, path=folder)
        log = MetricsLog(folder, first_step=started.step) if folder else None
        past = validations(read_log(log.path)) if log else []
        told = publishing(
            self.client,
            folder.name if folder else "",
            programs,
            sent_bytes=traffic(programs, average_every=plan.average_every),
            addresses=backend.addresses if isinstance(backend, Elastic) else (),
            granularity=options.granularity,
        )
        watching = [_Collect(run), *([log] if log else []), *told, *callbacks]
        try:
            with Leaving(options.walltime_s) as leave:
                loop = Loop(backend, self._schedule(plan), watching, self._meta(plan, programs), leave)
                run.state = loop.run(self.first, started, past)
        finally:
            if log is not None:
                log.close()
        return run

    def _started(self, plan: Plan, programs: Sequence[Program], placement: Placement | None) -> Started:
        """What a run says of itself when it begins."""
        options, names = self.options, self._network.outputs
        clocks = {name: value for name, value in CLOCKS.items() if name in self.step}
        if self.before is not None:
            clocks |= self.before.meta.get("clocks", {})
        return Started(
            step=self.before.step if self.before else 0,
            steps=self.steps,
            steps_per_epoch=self.per_epoch,
            batch=self.batch,
            ranks=plan.ranks,
            threads=plan.threads,
            granularity=options.granularity,
            explanation=_on_cards(plan, programs).explain(self.step, placement),
            seed=options.seed,
            metrics=tuple(k for k, v in names.items() if self._network.spec(v).shape == ()) if self.validation else (),
            clocks=clocks,
            run_dir=str(options.run_dir) if options.run_dir is not None else None,
            settings={
                "shuffle": options.shuffle,
                "records": len(self.train),
                "device": _keys(programs),
                "parameters": self._network.parameters,
                "network": f"{zlib.crc32(to_json(self._network).encode()):08x}",
                "optimizer": optimizer_words(self.step),
            },
        )

    @property
    def _network(self) -> Graph:
        assert self.step.network is not None
        return self.step.network

    @property
    def _every(self) -> int:
        """Steps from snapshot to snapshot; 0: none."""
        if self.options.run_dir is None:
            return 0
        return self.per_epoch if self.options.snapshot_every is None else self.options.snapshot_every

    def _schedule(self, plan: Plan) -> Schedule:
        first = self.before.step if self.before else 0
        every = max(1, plan.average_every)
        return Schedule(first, self.steps, self.per_epoch, self._every, self.validation is not None, every)

    def _before(self) -> Snapshot | None:
        """The snapshot to go on from."""
        options = self.options
        if not options.resume or options.run_dir is None:
            return None
        newest = latest(options.run_dir / "snapshots")
        if newest is None:
            raise SnapshotError(
                f"fit: there is no complete snapshot in {options.run_dir / 'snapshots'} to resume from."
            )
        snapshot = read_snapshot(newest)
        if snapshot.meta.get("graph") != to_json(self.step):
            had, asked = _precision(snapshot), precision_of(self.step)
            if had and had != asked:
                raise SnapshotError(
                    f"fit: {newest} is of a training step with precision={had!r} but this one has precision={asked!r}; "
                    "resume with the precision that the run was begun with."
                )
            raise SnapshotError(
                f"fit: {newest} is of another training step; resume with the graph that it was made with."
            )
        for name in ("seed", "shuffle"):
            if snapshot.meta[name] != getattr(options, name):
                raise SnapshotError(
                    f"fit: the run in {options.run_dir} was begun with {name}={snapshot.meta[name]}, not "
                    f"{getattr(options, name)}; resume with the same."
                )
        if snapshot.step >= self.steps:
            raise SettingError(
                f"fit: {options.run_dir} is at step {snapshot.step} already; ask for more than that to go on."
            )
        return snapshot

    def _folder(self) -> Path | None:
        """The folder of the run, emptied of an older run if that is wanted."""
        folder = self.options.run_dir
        if folder is None:
            return None
        if not self.options.resume and self.options.overwrite:
            saved = [line.get("name") for line in read_log(folder / "metrics.jsonl") if line.get("kind") == "saved"]
            for name in {SNAPSHOTS, *filter(None, saved)}:  # the older run's own, and what Save left of it
                shutil.rmtree(folder / name, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _refuse_to_replace(self) -> None:
        options = self.options
        if options.run_dir is None or options.resume or options.overwrite:
            return
        if latest(options.run_dir / "snapshots") is not None:
            raise SettingError(
                f"fit: {options.run_dir} holds a run already. Use resume=True, overwrite=True or another run_dir."
            )

    def _workers(self, plan: Plan | None) -> dict[str, dict[str, Any]]:
        """What the workers of the client are, by address."""
        if self.client is None:
            return {}
        plan = plan or (self._plan({}) if self.before else None)
        names = names_of("fit", self.options.device, plan)
        return workers_for(self.client, plan.ranks if plan else None, self.options.timeout_s, names)

    def _check_granularity(self, plan: Plan, devices: Sequence[Device]) -> None:
        """SettingError for a plan that only ranks that stay on workers carry out."""
        granularity = self.options.granularity
        if granularity == "segment":
            return
        if plan.apart or plan.nccl:
            what = "nccl" if plan.nccl else "average_every or staleness"
            raise SettingError(f"fit: a plan with {what} is for granularity 'segment', not {granularity!r}.")
        if self.client is not None and len(devices) > 1:
            kinds = " and ".join(device.name for device in devices)
            raise SettingError(
                f"fit: granularity={granularity!r} is for workers of one kind, not for {kinds}. Use 'segment'."
            )

    def _tune(self, plan: Plan) -> None:
        """Tune what ranks run, for each kind of device in turn."""
        names = plan.devices or (self.options.device,) * plan.ranks
        graphs, kinds = plan.rank_graphs(self.step), dict.fromkeys(names)
        how: dict[str, Any] = {"budget_s": self.options.tune_s / len(kinds), "known_too": False}
        for name in kinds:
            those = [graph for graph, its in zip(graphs, names, strict=True) if its == name]
            tuner.autotune(those, plan.threads, self.client, device=name, **how)

    def _plan(self, workers: Mapping[str, Any]) -> Plan:
        """As the snapshot says, of no device if all ranks were on one kind; else samples over all workers, else one
        rank here."""
        if self.before is not None:
            plan = Plan.from_json(self.before.meta["plan"])
            return plan if plan.mixed else replace(plan, devices=())
        return Usual.of(workers).plan(self.step)

    def _backend(
        self,
        plan: Plan,
        programs: tuple[Program, ...],
        tunings: Sequence[Tuning],
        workers: Mapping[str, Any],
    ) -> Backend:
        """Where the run happens."""
        options = self.options
        where: dict[str, Any] = {
            "seed": options.seed,
            "shuffle": options.shuffle,
            "run_dir": options.run_dir,
            "keep": options.keep,
        }
        train, validation = self.train, self.validation
        loose = [replace(tuning, strict=False) for tuning in tunings]  # nobody tunes the kernels of validation
        if self.client is not None:
            bring(self.client, tuple(workers), defined_outside(self.step, programs))
        if options.granularity != "segment":
            only = () if self.client is None else some_of(self.client, workers)
            flow: dict[str, Any] = {"granularity": options.granularity, "client": self.client, "workers": only}
            return Flow(self.step, plan, loose, train, validation, **flow, **where)
        if self.client is None:
            how: dict[str, Any] = {"timeout_s": options.timeout_s, **where}
            return Local(self.step, plan, programs, loose[0], train, validation, **how)

        def job_of(ranks: int) -> tuple[Job, dict[str, Any]]:
            """The job for so many ranks, and what its snapshots say of it."""
            use = remade(plan, self.step, ranks)
            made = programs if use is plan else use.programs(self.step, *tunings)
            job = Job(
                run="run",
                step=self.step,
                programs=made,
                plan=replace(use, graph=None, recipe=None),
                tunings=tuple(loose),
                threads=use.threads,
                data=self.train,
                validation=self.validation,
                transport=options.transport,
                timeout_s=options.timeout_s,
                keeps_copies=options.retries > 0,
                **where,
            )
            return job, self._meta(use, made)

        policy = Policy(options.retries, options.min_workers or plan.ranks, options.patience_s)
        return Elastic(self.client, job_of, plan.ranks, policy, workers)

    def _meta(self, plan: Plan, programs: Sequence[Program]) -> dict[str, Any]:
        """What a snapshot says of its run: enough to go on with the same bits."""
        choices = {
            request.key(half.device): [choice.template, [list(pair) for pair in choice.config]]
            for program in programs
            for half in program.halves
            for request, choice in half.requests
        }
        return {
            "graph": to_json(self.step),
            "network": to_json(self._network),
            "plan": plan.to_json(),
            "device": _keys(programs),
            "choices": choices,
            "seed": self.options.seed,
            "shuffle": self.options.shuffle,
            "batch": self.batch,
            "version": __version__,
        }


def _precision(snapshot: Snapshot) -> str:
    """Of the training step that a snapshot is of; '' where that cannot be read."""
    try:
        return precision_of(from_json(snapshot.meta["graph"]))
    except (KeyError, GraphError, UnknownOp):
        return ""


def as_dataset(data: Dataset | Mapping[str, Array], scratch: str, name: str) -> Dataset:
    """A dataset as it is, or a dict of arrays written to a folder for the length of the run."""
    if isinstance(data, Dataset):
        return data
    if not isinstance(data, Mapping):
        raise SettingError(
            f"data is {type(data).__name__}, not a dataset or a dict of arrays. Use rf.load(path), or "
            "{'x': ..., 'label': ...}."
        )
    return ingest(dict(data), os.path.join(scratch, f"{name}.zarr"))


def _on_cards(plan: Plan, programs: Sequence[Program]) -> Plan:
    """A plan that says no device, for what it turned out to be: memory is counted with the kernels of cards."""
    names = tuple(program.on.called for program in programs)
    return plan if plan.devices or set(names) == {"cpu"} else replace(plan, devices=names)


def _keys(programs: Sequence[Program]) -> str:
    """The kinds of device that ranks are on."""
    return ", ".join(dict.fromkeys(program.on.key for program in programs))


def frozen(tuning: Tuning, before: Snapshot | None, plan: Plan) -> Tuning:
    """The choices of the run that is resumed, if it had the same plan; on the same device they are part of its bits."""
    if before is None or replace(Plan.from_json(before.meta["plan"]), devices=()) != replace(plan, devices=()):
        return tuning
    choices = before.meta["choices"].items()
    chosen = {key: Choice(name, tuple((a, b) for a, b in config)) for key, (name, config) in choices}
    return Tuning(tuning.device, chosen, pinned=frozenset(chosen))  # one that cannot be kept is told, not hidden
