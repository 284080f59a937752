"""A compiled graph as a Dask collection: visualize, compute, persist, several in one dask.compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from dask._task_spec import Task, TaskRef
from dask.base import DaskMethodsMixin, tokenize
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.threaded import get

from ..errors import SettingError
from ..graph import Graph, to_json
from ..ops import Leaf
from ..scheduler import Plan
from ..spec import Array, Block
from ..tuner import Tuning
from .bodies import pick
from .lower import Ref, lower
from .participant import CLOCKS
from .workers import tuning_there


class Compiled(DaskMethodsMixin):
    """The outputs of a graph, to be computed: ``compute()`` gives a dict of arrays."""

    __dask_scheduler__ = staticmethod(get)

    def __init__(self, graph: HighLevelGraph, name: str, outputs: tuple[str, ...]) -> None:
        self.dask, self.name, self.outputs = graph, name, outputs

    def __dask_graph__(self) -> HighLevelGraph:
        return self.dask

    def __dask_layers__(self) -> tuple[str, ...]:
        return (self.name,)

    def __dask_keys__(self) -> list[Any]:
        return [(self.name, output) for output in self.outputs]

    def __dask_tokenize__(self) -> tuple[str, str]:
        return ("rapydli_flow", self.name)

    @staticmethod
    def __dask_optimize__(graph: Any, keys: Any, **options: Any) -> Any:
        """Nothing: fusing tasks would drop what they are called."""
        return graph

    def __dask_postcompute__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _named, (self.outputs,)

    def __dask_postpersist__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _rebuilt, (self.name, self.outputs)

    def __repr__(self) -> str:
        return f"<Compiled: {', '.join(self.outputs)}; {len(self.dask)} tasks>"


def _named(values: list[Array], outputs: tuple[str, ...]) -> dict[str, Array]:
    return dict(zip(outputs, values, strict=True))


def _rebuilt(tasks: Any, name: str, outputs: tuple[str, ...], *, rename: Mapping[str, str] | None = None) -> Compiled:
    name = (rename or {}).get(name, name)
    if not isinstance(tasks, HighLevelGraph):
        tasks = HighLevelGraph({name: MaterializedLayer(dict(tasks))}, {name: set()})
    return Compiled(tasks, name, outputs)


def compile_graph(
    graph: Graph,
    feeds: Mapping[str, Any] | None = None,
    *,
    state: Mapping[str, Array] | None = None,
    seed: int = 0,
    step: int = 0,
    granularity: str = "op",
    tuning: Tuning | None = None,
    threads: int = 1,
    device: str | None = None,
) -> Compiled:
    """Lower a graph to Dask tasks; ``feeds`` are arrays for its inputs, ``state`` defaults to the initial one.

    An input that is not fed is an error of the task that reads it, so that a graph can be looked at
    without data. ``device``: what kernels run on, as of `predict`; arrays between tasks stay on a GPU. Where only some
    workers have one, the tasks go to these. ``tuning``: by default what is known for it here.

    Raises SettingError for inputs or a device that mean nothing, MissingDependency for a device that is not there,
    DeviceMismatch where no worker has it.
    """
    tuning, workers = tuning_there("compile", device, tuning)
    (fused,) = Plan(1, threads).rank_graphs(graph)
    feeds = dict(feeds or {})
    unknown = [name for name in feeds if name not in {x.name for x in graph.leaves("batch")}]
    if unknown:
        inputs = ", ".join(x.name for x in graph.leaves("batch"))
        raise SettingError(f"compile: {', '.join(unknown)} is not an input of the graph; its inputs are {inputs}.")
    choices = sorted(tuning.choices.items())
    token = tokenize(to_json(graph), feeds, state, seed, step, granularity, tuning.device.key, choices, threads)
    tasks: dict[Any, Any] = {}
    leaves: dict[str, Ref] = {}
    for x in fused.leaves():
        node = fused.nodes[x.node]
        assert isinstance(node.op, Leaf)
        if node.op.kind == "clock":
            values = {**CLOCKS, "seed": seed, "step": step}
            leaves[node.name] = Ref(np.asarray(values.get(node.name, 0), node.op.dtype))
            continue
        value = feeds.get(node.name) if node.op.kind == "batch" else (state or {}).get(node.name)
        key = (f"{node.op.kind}-{token}", node.name)
        tasks[key] = Task(key, read_leaf, node.op, value, seed)
        leaves[node.name] = Ref(key)
    lowered = lower([fused], [leaves], [tuning], token=token, granularity=granularity, threads=threads)
    tasks.update(lowered.tasks)
    name = f"outputs-{token}"
    for output, ref in lowered.outputs[0].items():
        tasks[name, output] = Task((name, output), pick, TaskRef(ref.source), ref.item)
    layer = MaterializedLayer(tasks, annotations={"workers": list(workers)} if workers else None)
    return Compiled(HighLevelGraph({name: layer}, {name: set()}), name, tuple(lowered.outputs[0]))


def read_leaf(leaf: Leaf, value: Any, seed: int) -> Array:
    """The body of a task: what a leaf holds."""
    if value is None and leaf.kind == "batch":
        raise SettingError(f"{leaf.label} is not fed. Give it to rf.compile(graph, {{{leaf.label!r}: array}}).")
    if value is None:
        return leaf.start(seed, Block.all(leaf.shape))
    array = np.asarray(value)
    if array.shape != leaf.shape or not np.can_cast(array.dtype, leaf.dtype, "same_kind"):
        raise SettingError(
            f"{leaf.label} is fed {array.dtype} {array.shape} but the graph takes {leaf.dtype} {leaf.shape}."
        )
    return array.astype(leaf.dtype, copy=False)
