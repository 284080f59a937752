"""From a user's function to a graph, and from a network to its training step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ..errors import GraphError
from ..spec import Spec
from .gradients import gradients
from .graph import Graph, Tensor
from .mixed import precision as mixed
from .mixed import wider
from .rewrite import check_graph, clean, merge_equal, predicting, training
from .scaling import LossScale, scaling
from .verify import verify

Pairs = Sequence[tuple[Tensor, Tensor]]
Loss = Callable[[Any, Any], Any]


class Optimizer(Protocol):
    """Adds to a graph what becomes of parameters: ``graph.updates[leaf name]`` is the value that replaces a leaf.

    It is called once, with every pair of a parameter and its gradient, and the step as an int64 scalar:
    how many updates were made before, which under `optim.accumulate` are fewer than training steps. State
    is kept in leaves of kind 'state'; see `optim.slots`. A parameter that it leaves out is not trained.
    """

    def __call__(self, graph: Graph, pairs: Pairs, step: Tensor, /) -> None: ...


def trace(network: Callable[..., Any], *specs: Spec, **named: Spec) -> Graph:
    """Run ``network`` on symbols of these specs (whole batch, channels last) and keep what it does.

    Inputs are called as the function calls its parameters; the output is 'y', or the keys of a dict.
    """
    names = list(inspect.signature(network).parameters)
    inputs = dict(zip(names, specs, strict=False)) | named
    if len(specs) > len(names) or not inputs:
        raise GraphError(f"trace: {len(specs)} specs for a function of {len(names)} parameters {names}.")
    for name, spec in inputs.items():
        if not isinstance(spec, Spec):
            raise GraphError(
                f"trace: {name} is given as {spec!r}, not a Spec. Write rf.Spec((batch, *space, channels))."
            )
    graph = Graph()
    for clock in ("seed", "step"):
        graph.leaf("clock", clock, Spec((), "int64"))
    result = network(**{name: graph.leaf("batch", name, spec) for name, spec in inputs.items()})
    outputs = result if isinstance(result, Mapping) else {"y": result}
    for name, value in outputs.items():
        if not isinstance(value, Tensor):
            raise GraphError(f"trace: output {name} is {type(value).__name__}, not a tensor of the graph.")
        graph.outputs[name] = value.id
    return verify(clean(graph))


def train_step(
    network: Graph,
    *,
    loss: Loss,
    optimizer: Optimizer,
    metrics: Mapping[str, Loss] | None = None,
    label: str | Mapping[str, Spec] | None = "label",
    precision: str = "float32",
    loss_scale: float | LossScale | None = None,
) -> Graph:
    """The training step of a network: loss, gradients and update, still a graph.

    ``loss`` and each of ``metrics`` are functions of (out, target) that give a scalar, a mean over the
    batch. ``out`` is the network's output 'y' if that is all it gives, else a dict of its outputs.

    ``label`` says what the target is, which is fed beside the inputs: a name (a whole number for each
    record, int64); a dict of names and specs of the whole batch, ``{"label": rf.Spec((32,), "int64"),
    "box": rf.Spec((32, 4))}``; or None. ``target`` is a tensor, a dict where there are several, or None.
    A name of an input of the network is that input: ``label="x"`` trains an autoencoder.

    ``precision``: 'float32', 'tf32', 'bfloat16' or 'float16', as `rapydli_flow.precision` says; parameters, their
    updates and the loss are float32 in each. ``loss_scale``: a number that the loss is multiplied by before gradients
    are taken, which are divided by it, or a `LossScale` that finds one; by default that for float16, else none.

    Raises GraphError for a network, loss, metric or label that will not do, SettingError for a precision or scale.
    """
    check_graph(network, "train_step")
    if network.network is not None:
        raise GraphError("train_step: this graph is a training step already. Give it the network, step.network.")
    network = mixed(network, precision)
    measures = {"loss": loss, **(metrics or {})}
    functions: dict[str, Any] = {**measures, "optimizer": optimizer}
    for name, given in functions.items():
        if not callable(given):
            raise GraphError(
                f"train_step: {name} is {given!r}, not a function such as nn.cross_entropy or optim.sgd(0.1)."
            )
        if name in network.outputs:
            raise GraphError(
                f"train_step: {name!r} is an output of the network and a {'loss' if name == 'loss' else 'metric'}. "
                "Rename one."
            )
    if not network.leaves("param"):
        raise GraphError("train_step: the network has no parameters to train.")
    graph, scored = training(network), predicting(network)
    for g in (graph, scored):
        outputs = {name: g.tensor(value) for name, value in g.outputs.items()}
        out = outputs["y"] if outputs.keys() == {"y"} else outputs
        target = _target(g, label)
        g.outputs |= {name: _measured(name, measure, out, target).id for name, measure in measures.items()}
    graph.network = verify(scored)
    for name in network.outputs:
        del graph.outputs[name]
    parameters = graph.leaves("param")
    scale, step, total = scaling(graph, precision, loss_scale), graph.find("step"), graph.tensor(graph.outputs["loss"])
    found = gradients(graph, scale.loss(total) if scale else total, parameters)
    if scale:
        found, step = scale.gradients(found), scale.step(step)
        graph.like |= {g.id: w.id for w, g in zip(parameters, found, strict=True)}
    graph.gradients = {w.name: g.id for w, g in zip(parameters, found, strict=True)}
    optimizer(graph, list(zip(parameters, found, strict=True)), step)
    if scale:
        scale.finish(graph)
    return verify(wider(merge_equal(clean(graph))))


def _target(graph: Graph, label: str | Mapping[str, Spec] | None) -> Any:
    """What loss and metrics are compared with: leaves of the batch."""
    fed = {leaf.name: leaf for leaf in graph.leaves("batch")}
    records = next(iter(fed.values())).shape[:1]
    if label is None:
        return None
    if isinstance(label, str):
        return fed[label] if label in fed else graph.leaf("batch", label, Spec(records, "int64"))
    if not isinstance(label, Mapping) or not label:
        raise GraphError(
            f"train_step: label is {label!r}, not a name, a dict such as {{'box': rf.Spec((32, 4))}}, or None."
        )
    targets = {}
    for name, spec in label.items():
        if not isinstance(spec, Spec):
            raise GraphError(f"train_step: target {name} is given as {spec!r}, not a Spec of the whole batch.")
        if spec.shape[:1] != records:
            raise GraphError(
                f"train_step: target {name} is {spec} but the network is fed {records[0]} records. "
                "The first axis of a target is the batch."
            )
        if name in fed and fed[name].spec != spec:
            raise GraphError(
                f"train_step: target {name} is {spec} but the network has an input of this name, {fed[name].spec}."
            )
        targets[name] = fed[name] if name in fed else graph.leaf("batch", name, spec)
    return targets if len(targets) > 1 else next(iter(targets.values()))


def _measured(name: str, measure: Loss, out: Any, target: Any) -> Tensor:
    """What a loss or metric gives, if it is what it must be."""
    try:
        value = measure(out, target)
    except Exception as error:
        for what, given in (("outputs", out), ("targets", target)):
            if isinstance(given, dict):
                error.add_note(f"train_step: the {what} {', '.join(given)} are given to {name} as a dict of tensors.")
        raise
    graph = next(iter(out.values())).graph if isinstance(out, dict) else out.graph
    if isinstance(value, Mapping):
        raise GraphError(
            f"train_step: {name} gave a dict ({', '.join(map(str, value))}), not one scalar. Add the parts up, and "
            "give each as a metric to see it."
        )
    if not isinstance(value, Tensor) or value.graph is not graph:
        what = "a tensor of another graph" if isinstance(value, Tensor) else type(value).__name__
        raise GraphError(f"train_step: {name} gave {what}, not a scalar made of its arguments (out, target).")
    if value.shape != ():
        raise GraphError(
            f"train_step: {name} gave {value.spec}, not a scalar. Average it over the batch and all else: nn.mean."
        )
    if not value.spec.floating:
        raise GraphError(f"train_step: {name} gave {value.spec}, a whole number. Cast to a floating dtype first.")
    return value
