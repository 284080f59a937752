"""The Python API: from a function to a trained network. Everything here is also `rapydli_flow.<name>`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributed import Client

from cpu_kernels.compile import host

from . import data as store
from .config import settings
from .data import Dataset, ingest, latest, load, read_snapshot
from .errors import SettingError, SnapshotError
from .graph import Graph, from_json, to_json, trace, train_step
from .ops import Leaf
from .runtime import tuning as tuner
from .runtime.backend import Backend
from .runtime.cluster import Cluster, place, ready_workers
from .runtime.collection import Compiled
from .runtime.collection import compile_graph as compile
from .runtime.evaluate import Predictor, mean_scores, score, scored
from .runtime.events import Callback, Event, MetricsLog, Started, Stepped, Validated
from .runtime.feeding import check_fields
from .runtime.flow import Flow
from .runtime.local import Local
from .runtime.predict import predict
from .runtime.train import Loop, Schedule
from .runtime.tuning import TuningReport
from .runtime.worker import Job
from .scheduler import Plan, Program, compile_program, data_parallel
from .spec import Array, Block
from .tuner import Choice, Tuning
from .version import __version__

__all__ = [
    "Compiled",
    "Model",
    "Plan",
    "Run",
    "autotune",
    "compile",
    "evaluate",
    "fit",
    "ingest",
    "init",
    "load",
    "load_model",
    "plan",
    "predict",
    "save_model",
    "trace",
    "train_step",
]

GRANULARITIES = ("segment", "stage", "op")


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

    @property
    def metrics(self) -> dict[str, float]:
        """The last validation metrics, or the scalars of the last step."""
        if self.validation:
            return dict(self.validation[-1].metrics)
        return {name: values[-1] for name, values in self.scalars.items() if values}

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        return f"<Run: {self.steps} steps; {numbers}>"


class _Collect(Callback):
    """Keeps what a run measures."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_event(self, event: Event) -> None:
        if isinstance(event, Stepped):
            self.run.segments.append(event)
            for name, values in event.scalars.items():
                self.run.scalars.setdefault(name, []).extend(values)
        elif isinstance(event, Validated):
            self.run.validation.append(event)


@dataclass(frozen=True)
class Model:
    """A network and its trained state, as kept on disk."""

    graph: Graph
    state: dict[str, Array]

    def __repr__(self) -> str:
        outputs = ", ".join(f"{name} {self.graph.spec(v)}" for name, v in self.graph.outputs.items())
        return f"<Model: {self.graph.parameters:,} parameters; {outputs}>"

    def predict(self, data: Any) -> Any:
        """The prediction for every record, a lazy Dask array."""
        return predict(self.graph, self.state, data)


def plan(step: Graph, client: Client | None = None, *, ranks: int | None = None, threads: int | None = None) -> Plan:
    """A data-parallel plan: a rank on every worker of the client, or ``ranks`` of them in this process."""
    if client is not None:
        known = ready_workers(client, ranks, 30.0)
        ranks = ranks or len(known)
        threads = threads or min(worker["threads"] for worker in known.values())
    return data_parallel(step, ranks or 1, threads=threads or settings().threads)


def init(graph: Graph, *, seed: int = 0) -> dict[str, Array]:
    """The state that a network or training step begins with: parameters and state by name."""
    leaves = [(graph.nodes[x.node].op, x) for x in graph.leaves("param", "state")]
    return {x.name: op.start(seed, Block.all(x.shape)) for op, x in leaves if isinstance(op, Leaf)}


def autotune(
    step: Graph,
    client: Client | None = None,
    *,
    budget_s: float = 60.0,
    plan: Plan | None = None,
    watch: Callable[[str], None] | None = None,
) -> TuningReport:
    """Find the fastest config of every kernel of a graph, within ``budget_s`` seconds, and remember it.

    With a client one worker is tuned for all workers of its kind. Later runs use what was found.
    """
    plan = plan or data_parallel(step, 1, threads=settings().threads)
    return tuner.autotune(plan.rank_graphs(step), plan.threads, client, budget_s=budget_s, watch=watch)


def evaluate(
    graph: Graph, state: Mapping[str, Array], data: Dataset, *, tuning: Tuning | None = None
) -> dict[str, float]:
    """Loss and metrics of a training step's network over a dataset, in this process."""
    check_fields(graph, data)
    predictor = Predictor(scored(graph), state, tuning or tuner.known(host()), threads=settings().threads)
    return mean_scores([score(predictor, data, 0, len(data))])


def fit(
    step: Graph,
    data: Dataset | Mapping[str, Array],
    *,
    epochs: float | None = None,
    steps: int | None = None,
    validation: Dataset | Mapping[str, Array] | None = None,
    client: Client | None = None,
    plan: Plan | None = None,
    granularity: str = "segment",
    seed: int = 0,
    shuffle: bool = True,
    run_dir: str | os.PathLike[str] | None = None,
    snapshot_every: int | None = None,
    keep: int = 3,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
    tuning: Tuning | None = None,
    transport: str = "auto",
    timeout_s: float = 120.0,
) -> Run:
    """Train. In this process, or on the workers of a Dask client; the numbers are the same up to rounding.

    ``step``: a training step from `train_step`. ``data``, ``validation``: datasets (`load`), or dicts of
    arrays. ``epochs`` or ``steps``: how long. ``plan``: how ranks divide the work; by default samples,
    one rank a worker. ``granularity``: 'segment' (fast), 'stage' or 'op' (every kernel is a Dask task).
    ``run_dir``: keeps metrics, and snapshots every ``snapshot_every`` steps (default: an epoch), the
    newest ``keep`` of them; it must be on a file system that the workers share. ``resume`` goes on from
    the newest snapshot there; with the same number of ranks, to the same bits. ``timeout_s``: how long
    ranks and workers are waited for.
    """
    if granularity not in GRANULARITIES:
        raise SettingError(f"fit: granularity={granularity!r} is not one of {', '.join(GRANULARITIES)}.")
    if (epochs is None) == (steps is None):
        raise SettingError("fit: give either epochs or steps.")
    if step.network is None:
        raise SettingError(
            "fit: this graph is not a training step; make one with rf.train_step(graph, loss, optimizer)."
        )
    with tempfile.TemporaryDirectory(prefix="rapydli-") as scratch:
        train = _dataset(data, scratch, "train")
        held_out = _dataset(validation, scratch, "validation") if validation is not None else None
        check_fields(step, train)
        if held_out is not None:
            check_fields(step, held_out)
        batch = step.leaves("batch")[0].spec.shape[0]
        per_epoch = store.Feed(train, batch, seed=seed).steps_per_epoch
        total = steps if steps is not None else round((epochs or 0.0) * per_epoch)
        if total < 1:
            raise SettingError(f"fit: {total} steps are nothing to train. Give 1 or more.")
        folder = _folder(run_dir, resume=resume, overwrite=overwrite)
        before = _before(folder, step, resume)
        if before is not None and before.step >= total:
            raise SettingError(f"fit: {folder} is at step {before.step} already; ask for more than that to go on.")
        workers = ready_workers(client, plan.ranks if plan else None, timeout_s) if client is not None else {}
        plan = plan or _plan(step, workers, before)
        device = next(iter(workers.values()))["device"] if workers else host()
        tuning = _frozen(tuning or tuner.known(device), before, plan)
        graphs = plan.rank_graphs(step)
        programs = [compile_program(graph, tuning) for graph in graphs]
        every = (per_epoch if snapshot_every is None else snapshot_every) if folder else 0
        snapshots = folder / "snapshots" if folder and every else None
        first = before.step if before else 0
        schedule = Schedule(first, total, per_epoch, every, held_out is not None)
        backend: Backend
        where = {"seed": seed, "shuffle": shuffle, "snapshots": snapshots, "keep": keep}
        if granularity != "segment":
            backend = Flow(step, plan, graphs, tuning, train, held_out, granularity=granularity, client=client, **where)
        elif client is None:
            backend = Local(step, plan, programs, tuning, train, held_out, timeout_s=timeout_s, **where)
        else:
            job = Job(
                "run",
                step,
                tuple(programs),
                plan.layouts,
                tuning,
                plan.threads,
                seed,
                train,
                held_out,
                shuffle,
                transport,
                timeout_s,
                snapshots,
                keep,
            )
            backend = Cluster(client, job, place(workers, plan.ranks), workers)
        run = Run(step.network, {}, total, path=folder)
        log = MetricsLog(folder, first_step=first) if folder else None
        watching = [_Collect(run), *([log] if log else []), *callbacks]
        meta = _meta(step, plan, programs, tuning, seed, shuffle, batch)
        started = Started(first, total, per_epoch, batch, plan.ranks, plan.threads, granularity, plan.explain(step))
        try:
            run.state = Loop(backend, schedule, watching, meta).run(before.arrays if before else None, started)
        finally:
            if log is not None:
                log.close()
        return run


def save_model(path: str | os.PathLike[str], graph: Graph, state: Mapping[str, Array]) -> None:
    """Keep a network and its state: a Zarr group of parameters, and the graph as JSON beside it."""
    folder = Path(path)
    if latest(folder) is not None:
        raise SnapshotError(f"{folder} holds a model already; give another path.")
    names = {leaf.name for leaf in graph.leaves("param", "state")}
    with store.SnapshotWriter(folder) as writer:
        writer.write(0, {k: v for k, v in state.items() if k in names}, {"network": to_json(graph)})


def load_model(path: str | os.PathLike[str]) -> Model:
    """The model of a run, of one of its snapshots, or of `save_model`."""
    folder = Path(path)
    for place_ in (folder / "snapshots", folder):
        newest = latest(place_) if place_.is_dir() else None
        if newest is not None:
            snapshot = read_snapshot(newest)
            break
    else:
        snapshot = read_snapshot(folder)
    graph = from_json(snapshot.meta["network"])
    return Model(graph, {leaf.name: snapshot.arrays[leaf.name] for leaf in graph.leaves("param", "state")})


# parts of fit -------------------------------------------------------------------------------------------


def _dataset(data: Dataset | Mapping[str, Array], scratch: str, name: str) -> Dataset:
    return data if isinstance(data, Dataset) else ingest(dict(data), os.path.join(scratch, f"{name}.zarr"))


def _folder(run_dir: str | os.PathLike[str] | None, *, resume: bool, overwrite: bool) -> Path | None:
    """The folder of a run, emptied of an older run if that is wanted."""
    if run_dir is None:
        if resume:
            raise SettingError("fit: resume needs the run_dir of the run that is to go on.")
        return None
    folder = Path(run_dir).absolute()
    if latest(folder / "snapshots") is not None and not resume:
        if not overwrite:
            raise SettingError(
                f"fit: {folder} holds a run already. Use resume=True, overwrite=True or another run_dir."
            )
        shutil.rmtree(folder / "snapshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _before(folder: Path | None, step: Graph, resume: bool) -> store.Snapshot | None:
    if not resume or folder is None:
        return None
    newest = latest(folder / "snapshots")
    if newest is None:
        raise SnapshotError(f"fit: there is no complete snapshot in {folder / 'snapshots'} to resume from.")
    snapshot = read_snapshot(newest)
    if snapshot.meta.get("graph") != to_json(step):
        raise SnapshotError(f"fit: {newest} is of another training step; resume with the graph that it was made with.")
    return snapshot


def _plan(step: Graph, workers: Mapping[str, Any], before: store.Snapshot | None) -> Plan:
    """As the snapshot says, else samples over all workers, else one rank here."""
    ranks = len(workers) or 1
    threads = min((worker["threads"] for worker in workers.values()), default=settings().threads)
    if before is not None:
        threads = before.meta["threads"]
        ranks = before.meta["ranks"]
    return data_parallel(step, ranks, threads=threads)


def _frozen(tuning: Tuning, before: store.Snapshot | None, plan: Plan) -> Tuning:
    """The choices of the run that is resumed, if it had the same ranks."""
    if before is None or before.meta["ranks"] != plan.ranks:
        return tuning
    chosen = {k: Choice(name, tuple((a, b) for a, b in config)) for k, (name, config) in before.meta["choices"].items()}
    return Tuning(tuning.device, chosen)


def _meta(
    step: Graph, plan: Plan, programs: Sequence[Program], tuning: Tuning, seed: int, shuffle: bool, batch: int
) -> dict[str, Any]:
    """What a snapshot says of its run: enough to go on with the same bits."""
    choices = {
        request.key(tuning.device): [choice.template, [list(pair) for pair in choice.config]]
        for program in programs
        for request, choice in program.requests
    }
    assert step.network is not None
    return {
        "graph": to_json(step),
        "network": to_json(step.network),
        "ranks": plan.ranks,
        "threads": plan.threads,
        "device": tuning.device.key,
        "choices": choices,
        "seed": seed,
        "shuffle": shuffle,
        "batch": batch,
        "version": __version__,
    }
