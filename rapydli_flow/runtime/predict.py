"""Prediction as a lazy Dask array: one task for each batch of records, not pinned to any worker."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import dask.array as da
import numpy as np
from dask._task_spec import DataNode, Task, TaskRef
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from distributed import get_worker

from ..config import settings
from ..data import Dataset
from ..errors import SettingError
from ..graph import Graph, from_json, predicting, to_json
from ..spec import Array, Spec
from ..template import Device
from ..tuner import Tuning
from .bodies import worker_gpu
from .devices import device_of
from .evaluate import Predictor, batches, check_state
from .remembered import known
from .workers import tuning_there


def predict(
    graph: Graph,
    state: Mapping[str, Array],
    data: Any,
    *,
    output: str = "y",
    tuning: Tuning | None = None,
    device: str | None = None,
) -> Any:
    """Output ``output`` of a network for every record of a dataset, array, or dict of arrays: a Dask array.

    Chunks are equal batches, at most as large as the network was traced with; nothing runs before ``compute``.
    ``tuning``: by default what is known here; a worker with another processor uses what is known there. ``device``:
    'cpu', 'cuda', 'cuda:1', 'emulated'; by default each process uses its own (RAPYDLI_DEVICE). With a Dask client
    'cuda' is a GPU of its workers, and this process needs none; where only some have one, say which of them compute:
    ``rf.predict(...).compute(workers=addresses)``.

    Raises SettingError for an output, a state, data or a device that do not fit, MissingDependency for a device that
    is not there, DeviceMismatch where no worker has it.
    """
    if graph.network is not None:
        raise SettingError("predict: this graph is a training step; give its network, step.network or run.graph.")
    network = predicting(graph)
    if output not in network.outputs:
        raise SettingError(f"predict: there is no output {output!r}; the network has {', '.join(network.outputs)}.")
    network.outputs = {output: network.outputs[output]}
    network = predicting(only_needed(network))
    inputs = {leaf.name: leaf.spec for leaf in network.leaves("batch")}
    records = _records(data, inputs)
    check_state(network, state)
    state = {leaf.name: np.asarray(state[leaf.name]) for leaf in network.leaves("param", "state")}
    spec = network.spec(network.outputs[output])
    text = to_json(network)
    given = tuning is not None
    tuning, _ = tuning_there("predict", device, tuning)  # where arrays are computed is not kept by Dask
    fed = records if isinstance(records, dict) else records.__getstate__()
    token = tokenize(text, state, fed, tuning.device.key, sorted(tuning.choices.items()), given, device)
    held, chosen = f"state-{token}", f"tuning-{token}"
    name = f"predict-{token}"
    tasks: dict[Any, Any] = {held: DataNode(held, state), chosen: DataNode(chosen, (tuning, given, device))}
    sizes = []
    count = len(records) if isinstance(records, Dataset) else len(next(iter(records.values())))
    if count == 0:
        raise SettingError("predict: there are no records.")
    for i, (lo, hi) in enumerate(batches(0, count, spec.shape[0])):
        key = (name, i, *[0] * (len(spec.shape) - 1))
        part = records if isinstance(records, Dataset) else {k: v[lo:hi] for k, v in records.items()}
        tasks[key] = Task(key, predict_batch, text, token, TaskRef(held), part, lo, hi, output, TaskRef(chosen))
        sizes.append(hi - lo)
    chunks = (tuple(sizes), *((size,) for size in spec.shape[1:]))
    collected = HighLevelGraph.from_collections(name, tasks)
    return da.Array(collected, name, chunks, dtype=spec.dtype)


def predict_batch(
    text: str,
    token: str,
    state: Mapping[str, Array],
    part: Any,
    lo: int,
    hi: int,
    output: str,
    chosen: tuple[Tuning, bool, str | None],
) -> Array:
    """The body of a task: one batch. ``chosen``: what the client knows, whether it is to be used anywhere, and the
    device that was asked for."""
    shared = _shared(text, token)
    with shared.lock:  # tasks of several threads meet here; kernels use the cores themselves
        if shared.predictor is None:
            tuning, given, name = chosen
            if not given or _on_worker():
                device = _own(name)
                if tuning.device.key == device.key:
                    tuning = replace(tuning, device=device)
                elif not given:
                    tuning = known(device)
            shared.predictor = Predictor(from_json(text), state, tuning, threads=settings().threads)
        feeds = part.read(np.arange(lo, hi), shared.predictor.inputs) if isinstance(part, Dataset) else part
        return shared.predictor(feeds)[output]


def _own(name: str | None) -> Device:
    """The device with a name in this process. A worker's GPU is the one that it was started with."""
    return (worker_gpu() if name == "cuda" else None) or device_of(name, "predict")


def _on_worker() -> bool:
    try:
        get_worker()
    except ValueError:
        return False
    return True


@dataclass
class _Shared:
    """The predictor of this process for one network and state."""

    predictor: Predictor | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


@lru_cache(maxsize=4)
def _shared(text: str, token: str) -> _Shared:
    return _Shared()


def only_needed(network: Graph) -> Graph:
    """Without inputs that the wanted output does not read, such as labels."""
    needed: set[int] = set()
    todo = [v[0] for v in network.outputs.values()]
    while todo:
        i = todo.pop()
        if i not in needed:
            needed.add(i)
            todo += [v[0] for v in network.nodes[i].inputs]
    new = Graph(counts=dict(network.counts))
    to: dict[tuple[int, int], Any] = {}
    for i, node in enumerate(network.nodes):
        if i in needed:
            made = new.copy(network, node, [to[v] for v in node.inputs])
            for k, y in enumerate(made if isinstance(made, tuple) else (made,)):
                to[i, k] = y
    new.outputs = {name: to[v].id for name, v in network.outputs.items()}
    return new


def _records(data: Any, inputs: Mapping[str, Spec]) -> Any:
    """A dataset, or a dict of arrays, that has what the network is fed."""
    if isinstance(data, Dataset):
        fields = data.specs
        shapes = {name: fields[name].shape for name in inputs if name in fields}
    else:
        data = dict(data) if isinstance(data, Mapping) else {next(iter(inputs)): np.asarray(data)}
        shapes = {name: np.shape(data[name])[1:] for name in inputs if name in data}
        data = {name: np.asarray(data[name]) for name in shapes}
    for name, spec in inputs.items():
        if name not in shapes:
            raise SettingError(f"predict: the network is fed {name!r}, which the data does not have.")
        if shapes[name] != spec.shape[1:]:
            raise SettingError(f"predict: records of {name!r} are {shapes[name]}, the network takes {spec.shape[1:]}.")
    return data
