"""From a user's function to a graph, and from a network to its training step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import GraphError
from ..spec import Spec
from .gradients import gradients
from .graph import Graph, Tensor
from .rewrite import clean, merge_equal, predicting, training
from .verify import verify

Optimizer = Callable[[Graph, Tensor, Tensor], None]
Loss = Callable[[Any, Any], Any]


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
    label: str = "label",
    label_dtype: str = "int64",
) -> Graph:
    """The training step of a network: loss, gradients and update, still a graph.

    ``loss`` and each of ``metrics`` are functions of the network's output 'y' and the label, one
    value a record, that give a scalar. The label is fed under the name ``label``.
    """
    if "y" not in network.outputs:
        raise GraphError(f"train_step: the network has outputs {', '.join(network.outputs)} but no 'y'.")
    measures = {"loss": loss, **(metrics or {})}
    for name, given in (*measures.items(), ("optimizer", optimizer)):
        if not callable(given):
            raise GraphError(
                f"train_step: {name} is {given!r}, not a function such as nn.cross_entropy or optim.sgd(0.1)."
            )
    graph, scored = training(network), predicting(network)
    for g in (graph, scored):
        y = g.tensor(g.outputs["y"])
        target = g.leaf("batch", label, Spec(y.shape[:1], label_dtype))
        g.outputs |= {name: measure(y, target).id for name, measure in measures.items()}
    graph.network = verify(scored)
    value = graph.tensor(graph.outputs["loss"])
    del graph.outputs["y"]
    parameters = graph.leaves("param")
    if not parameters:
        raise GraphError("train_step: the network has no parameters to train.")
    for parameter, gradient in zip(parameters, gradients(graph, value, parameters), strict=True):
        optimizer(graph, parameter, gradient)
    return verify(merge_equal(clean(graph)))
