"""The Python API: from a function to a trained network. Everything here is also `rapydli_flow.<name>`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import Client

from .arguments import check_seconds, check_whole
from .config import checked_device, settings
from .confusion import ConfusionMatrix, confusion_matrix
from .data import Dataset, SnapshotWriter, ingest, latest, load, read_snapshot
from .errors import SettingError, SnapshotError
from .fitting import GRANULARITIES, Fitting, Options, Run, as_dataset
from .graph import Graph, from_json, to_json, trace, train_step
from .ops import Leaf
from .runtime import tuning as tuner
from .runtime.collection import Compiled
from .runtime.collection import compile_graph as compile
from .runtime.evaluate import Predictor, check_state, mean_scores, score, scored
from .runtime.events import Callback
from .runtime.feeding import check_fields
from .runtime.kinds import devices_for, names_of, tunings_for
from .runtime.links import known_links, measured_links
from .runtime.placing import placed
from .runtime.predict import predict
from .runtime.probe import gradients, probe
from .runtime.remembered import tuning_on
from .runtime.session import Progress
from .runtime.stepper import State, Stepper, stepper
from .runtime.timing import measure_step, network_of
from .runtime.timing_report import Timing
from .runtime.tuning_report import TuningReport
from .runtime.workers import Usual, workers_for
from .scheduler import Links, Placement, Plan, Split, data_parallel, make_plan
from .space import Rules
from .spec import Array, Block
from .tuner import Tuning

__all__ = [
    "GRANULARITIES",
    "Compiled",
    "ConfusionMatrix",
    "Links",
    "Model",
    "Placement",
    "Plan",
    "Run",
    "State",
    "Stepper",
    "autotune",
    "compile",
    "confusion_matrix",
    "evaluate",
    "fit",
    "gradients",
    "ingest",
    "init",
    "load",
    "load_model",
    "measure_links",
    "placement",
    "plan",
    "predict",
    "probe",
    "save_model",
    "stepper",
    "time",
    "trace",
    "train_step",
]


@dataclass(frozen=True)
class Model:
    """A network and its trained state, as kept on disk."""

    graph: Graph
    state: dict[str, Array]

    def __repr__(self) -> str:
        outputs = ", ".join(f"{name} {self.graph.spec(v)}" for name, v in self.graph.outputs.items())
        return f"<Model: {self.graph.parameters:,} parameters; {outputs}>"

    def predict(self, data: Any, *, device: str | None = None) -> Any:
        """The prediction for every record, a lazy Dask array."""
        return predict(self.graph, self.state, data, device=device)


def plan(
    step: Graph,
    client: Client | None = None,
    *,
    ranks: int | None = None,
    threads: int | None = None,
    strategy: str | None = None,
    splits: Mapping[str, Split] | None = None,
    grid: Sequence[int] | None = None,
    stages: int | None = None,
    micro_batches: int | None = None,
    shard: str | None = None,
    average_every: int | None = None,
    staleness: int | None = None,
    overlap: bool | None = None,
    wire: str | None = None,
    nccl: bool = False,
    device: str | Sequence[str] | None = None,
    shares: Sequence[float] | None = None,
) -> Plan:
    """How a training step is divided: over all workers of the client, or over ``ranks`` in this process.

    ``strategy``: 'data' (each rank some records; the default), 'spatial' (each a part of every picture, in a ``grid``
    of rows and columns), 'filters' or 'channels' (each some of every layer's), 'hybrid' (records of convolutions,
    filters of dense layers), 'pipeline' (each some layers: ``stages`` of them, as many as ranks unless given, which
    pass on ``micro_batches``, twice as many unless given). ``splits``: how layers are divided, by name or pattern,
    ``{"conv_1": rf.Split(height=2), "dense_*": rf.Split(filters=2)}``, over the strategy, or without one. ``shard``:
    'state' divides optimizer state over ranks, 'parameters' parameters as well. ``average_every``: ranks train by
    themselves on their records, and average parameters and optimizer state every so many steps (local SGD): less to
    send, but no longer the run of one worker.
    ``staleness``: parameters and optimizer state are divided over ranks, which send each other gradients and new
    parameters while they train, and may be so many steps ahead of the updates: nobody waits for the slowest in each
    step, but it is no longer the run of one worker, unless it is 0.

    ``overlap``: gradients are summed while the backward pass goes on; by default where workers are on several hosts.
    ``wire='bfloat16'``: float32 gradients are rounded to that on their way, half the bytes; no longer the run of one
    worker. ``nccl``: GPUs hand each other what ranks tell each other, by NCCL, instead of through the host; sums that
    all ranks get then have NCCL's order: the same for all, but not that of other ways. ``device``: what ranks are on,
    'cpu', 'cuda' or 'emulated', or one for each, ``["cuda", "cuda", "cpu"]``; of a client the workers that have one, by
    default those of the kind that most have. What ranks on several kinds hold must be computed on one of them: with
    shard='state', or in a pipeline. ``shares``: how many records each rank has, to each other, where some are faster:
    ``[8, 8, 1]``; for strategy 'data', by default evenly.

    Raises SettingError for options that mean nothing together, ShapeError for what cannot be divided so.
    """
    if device is not None and not isinstance(device, str):
        ranks = len(device) if ranks is None else ranks
    for name in (device,) if isinstance(device, str) else device or ():
        checked_device(name, "plan: device=")
    usual = Usual.of(workers_for(client, ranks, 30.0, device, "plan") if client is not None else {})
    return make_plan(
        step,
        usual.ranks if ranks is None else ranks,
        threads=usual.threads if threads is None else threads,
        strategy=strategy,
        splits=splits,
        grid=grid,
        stages=stages,
        micro_batches=micro_batches,
        shard=shard,
        average_every=average_every,
        staleness=staleness,
        overlap=usual.overlap if overlap is None else overlap,
        wire=wire,
        nccl=nccl,
        device=device if device is not None else usual.device,
        shares=shares,
    )


def placement(
    step: Graph,
    client: Client,
    *,
    plan: Plan | None = None,
    data: Dataset | None = None,
    tuning: Tuning | None = None,
    timeout_s: float = 30.0,
) -> Placement:
    """Where `fit` would place the ranks of a plan on the workers that are there now, and why; nothing runs.

    ``plan``: by default samples, one rank a worker. ``data``: ranks that read it go where it is. Print ``explain()``:
    the worker of each rank, and the bytes that this and other placements move in a step. Links between hosts that are
    needed and were never measured are measured: see `measure_links`.

    Raises NoWorkers, TooLittleMemory or VersionMismatch as `fit` does.
    """
    names = names_of("placement", None, plan)
    workers = workers_for(client, plan.ranks if plan else None, timeout_s, names, "placement")
    plan = plan or Usual.of(workers).plan(step)
    programs = plan.programs(step, *tunings_for("placement", devices_for("placement", names, workers), tuning))
    links = known_links(client, workers, plan.ranks, timeout_s)
    return placed(client, programs, plan, workers, links=links, data=data)


def measure_links(client: Client, *, timeout_s: float = 60.0) -> Links:
    """Measure latency and bandwidth between the hosts of a client's workers, and remember them on this disk.

    One worker of each host is asked, a fraction of a second for each pair; with one host nothing is measured. Runs
    measure by themselves what they need and do not know yet: call this when the network has changed. RunLost where two
    hosts do not reach each other within ``timeout_s`` seconds.
    """
    return measured_links(client, workers_for(client, None, timeout_s), timeout_s)


def init(graph: Graph, *, seed: int = 0) -> dict[str, Array]:
    """The state that a network or training step begins with: parameters and state by name."""
    leaves = [(graph.nodes[x.node].op, x) for x in graph.leaves("param", "state")]
    return {x.name: op.start(seed, Block.all(x.shape)) for op, x in leaves if isinstance(op, Leaf)}


def autotune(
    step: Graph,
    client: Client | None = None,
    *,
    budget_s: float = 60.0,
    trials: int | None = None,
    plan: Plan | None = None,
    strategy: str = "guided",
    soft: Rules = (),
    seed: int = 0,
    watch: Callable[[Progress], None] | None = None,
    device: str | None = None,
) -> TuningReport:
    """Find the fastest config of every kernel of a graph, within ``budget_s`` seconds, and remember it.

    Kernels are tuned in the order of their share of the step's time, for the local shapes of ``plan`` and its threads.
    ``trials``: at most so many configs of a kernel. ``strategy``: 'guided' (by a model), 'greedy',
    'evolutionary', 'random', 'transfer' (from similar shapes) or 'exhaustive'. ``soft``: constraints of your own over
    the parameters of templates, by name or as a list: ``["rows >= 6", "lanes != 4"]``; each applies to the templates
    that have all its names. ``watch`` is told how it goes. With a client one worker of each kind of device tunes for
    all of its kind. ``device``: what to tune for, as of `fit`; with a client only workers that have one tune. Ctrl-C
    ends it and keeps what was learnt. Later runs use what was found; see `rapydli tune`.

    Raises SettingError for settings or a device that mean nothing, MissingDependency for a device that is not there,
    DeviceMismatch where no worker has one, NoWorkers where there are none, RunLost where all disappear.
    """
    check_seconds("autotune", budget_s=budget_s)
    check_whole("autotune", trials=trials)
    plan = plan or data_parallel(step, 1, threads=settings().threads)
    return tuner.autotune(
        plan.rank_graphs(step),
        plan.threads,
        client,
        budget_s=budget_s,
        trials=trials,
        strategy=strategy,
        soft=soft,
        seed=seed,
        watch=watch,
        device=device,
    )


def time(
    graph: Graph,
    *,
    iterations: int = 10,
    threads: int | None = None,
    inference: bool = False,
    tune_s: float = 0.0,
    tuning: Tuning | None = None,
    name: str = "network",
    seed: int = 0,
    device: str | None = None,
) -> Timing:
    """Time a training step, or a network that predicts, kernel by kernel on random records, in this process.

    ``iterations``: steps with a clock after each call, in turns with as many steps without; medians count.
    ``inference``: of a training step only the network that predicts. ``tune_s``: seconds to tune its kernels first, as
    `autotune` does. ``name``: what the report calls it. Print the result, or use its ``table(kernels=True)``,
    ``layers``, ``kernels``, ``save_html(path)`` with a roofline, ``to_json()``. ``device``: where, as of
    `fit`; a ``tuning`` that is given is of that device.

    Raises SettingError for numbers or a device that mean nothing, MissingDependency for a device that is not there.
    """
    graph = network_of(graph) if inference or graph.network is None else graph
    check_whole("time", threads=threads)
    threads = threads or settings().threads
    check_seconds("time", "0 (no tuning) or more", tune_s=tune_s)
    if device is not None:
        checked_device(device, "time: device=")
    if tune_s:
        autotune(graph, budget_s=tune_s, plan=data_parallel(graph, 1, threads=threads), device=device)
    tuning = tuning_on("time", device, tuning)
    return Timing.of(measure_step(graph, tuning, name=name, threads=threads, iterations=iterations, seed=seed))


def evaluate(
    step: Graph,
    state: Mapping[str, Array],
    data: Dataset | Mapping[str, Array],
    *,
    tuning: Tuning | None = None,
    device: str | None = None,
) -> dict[str, float]:
    """Loss and metrics of a training step's network over a dataset, or dict of arrays, in this process.

    A number for each, by name: means over all records. ``device``: where, as of `fit`; a ``tuning`` that is given
    is of that device.

    Raises SettingError for a state, a device or a tuning that does not fit, DatasetError for data that does not,
    MissingDependency for a device that is not there.
    """
    with tempfile.TemporaryDirectory(prefix="rapydli-") as scratch:
        records = as_dataset(data, scratch, "data")
        check_fields(step, records)
        tuning = tuning_on("evaluate", device, tuning)
        predictor = Predictor(scored(step), state, tuning, threads=settings().threads)
        return mean_scores([score(predictor, records, 0, len(records))])


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
    state: Mapping[str, Array] | None = None,
    tuning: Tuning | None = None,
    tune_s: float = 0.0,
    transport: str = "auto",
    timeout_s: float = 120.0,
    retries: int = 100,
    min_workers: int | None = None,
    patience_s: float = 30.0,
    walltime_s: float | None = None,
    device: str | None = None,
) -> Run:
    """Train. In this process, or on the workers of a Dask client; the numbers are the same up to rounding.

    ``device``: 'cpu', 'cuda' (the first GPU), 'cuda:1' and so on, or 'emulated' (a GPU that NumPy plays, for tests);
    by default that of this process (RAPYDLI_DEVICE, else 'cpu'), and with a client of the kind that most workers have.

    ``step``: a training step from `train_step`. ``data``, ``validation``: datasets (`load`), or dicts of
    arrays. ``epochs`` or ``steps``: how long. ``plan``: how ranks divide the work; by default samples,
    one rank a worker. ``granularity``: 'segment' (fast), 'stage' or 'op' (every kernel is a Dask task).
    ``run_dir``: keeps metrics, and snapshots every ``snapshot_every`` steps (default: an epoch), the
    newest ``keep`` of them; it must be on a file system that the workers share. ``resume`` goes on from
    the newest snapshot there; with the same number of ranks, to the same bits. ``callbacks`` watch the run,
    or decide how it goes on. ``state``: parameters to begin with, by name, instead of random ones (of another run, or
    moved over from elsewhere). ``tune_s``: seconds to tune first the kernels of which nothing is known yet, as
    `autotune` does; not of a run that is resumed, whose configs are those of its snapshot. ``timeout_s``: how long
    ranks and workers are waited for.

    On workers a run goes on when one is lost, ``retries`` times: ranks are placed anew, on spare workers if there are,
    and go back to copies in the memory of the others, at most a segment. ``patience_s``: seconds to wait for workers to
    come; then, if ``min_workers`` allows it, the run goes on with fewer ranks, and with more when they are back.

    On SIGTERM, or after ``walltime_s`` seconds, it writes a last snapshot, if it writes any, and returns.

    Raises, before anything is trained, SettingError for options that mean nothing, DatasetError for data that does not
    fit, SnapshotError for a run that cannot be resumed, MissingDependency for a device that is not there,
    TooLittleMemory; with a client NoWorkers, DeviceMismatch and VersionMismatch. While it trains NonFinite, DeviceFault
    where a card fails, RunLost where too many workers do.
    """
    options = Options(
        epochs=epochs,
        steps=steps,
        granularity=granularity,
        seed=seed,
        shuffle=shuffle,
        run_dir=Path(run_dir).absolute() if run_dir is not None else None,
        snapshot_every=snapshot_every,
        keep=keep,
        resume=resume,
        overwrite=overwrite,
        transport=transport,
        timeout_s=timeout_s,
        state=state,
        tune_s=tune_s,
        retries=retries,
        min_workers=min_workers,
        patience_s=patience_s,
        walltime_s=walltime_s,
        device=device,
    )
    options.check(step)
    with tempfile.TemporaryDirectory(prefix="rapydli-") as scratch:
        train = as_dataset(data, scratch, "train")
        held_out = as_dataset(validation, scratch, "validation") if validation is not None else None
        return Fitting(step, train, held_out, options, client).run(plan, tuning, callbacks)


def save_model(path: str | os.PathLike[str], graph: Graph, state: Mapping[str, Array]) -> None:
    """Keep a network and its state: a Zarr group of parameters, and the graph as JSON beside it."""
    folder = Path(path)
    if latest(folder) is not None:
        raise SnapshotError(f"{folder} holds a model already; give another path.")
    if graph.network is not None:
        raise SettingError("save_model: this graph is a training step; give its network, step.network or run.graph.")
    names = {leaf.name for leaf in graph.leaves("param", "state")}
    check_state(graph, state)
    with SnapshotWriter(folder) as writer:
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
