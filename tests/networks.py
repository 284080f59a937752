"""Networks that several tests share; small, with every kind of layer."""

from collections.abc import Callable
from typing import Any

import numpy as np

from rapydli_flow import nn
from rapydli_flow.graph import Graph, Tensor, train_step
from rapydli_flow.graph import trace as trace_graph
from rapydli_flow.graph.tracing import Pairs
from rapydli_flow.spec import Spec

X = Spec((4, 6, 6, 2), "float64")


@nn.block
def residual(x: Any, filters: int) -> Any:
    y = nn.relu(nn.batch_norm(nn.conv(x, filters, 3, padding=1)))
    y = nn.conv(y, filters, 3, padding=1, groups=2)
    return nn.relu(x + y)


def small(x: Any) -> Any:
    x = nn.relu(nn.conv(x, 4, 3, stride=2, padding=(1, (1, 0))))
    x = residual(residual(x, 4), 4)
    x = nn.dropout(nn.max_pool(x, 2, stride=1, padding=((0, 1), 0)), 0.3)
    x = nn.tanh(nn.dense(nn.avg_pool(x, 2, stride=1, padding=1), 6))
    return nn.dense(x, 5)


def perceptron(x: Any) -> Any:
    return nn.dense(nn.relu(nn.dense(x, 7)), 3)


def traced(network: Callable[..., Any] = small, x: Spec = X) -> Graph:
    return trace_graph(network, x)


def record(graph: Graph, pairs: Pairs, step: Tensor) -> None:
    """An optimizer that changes nothing and shows the gradients."""
    graph.outputs |= {f"d {w.name}": g.id for w, g in pairs}


def step_of(graph: Graph, optimizer: Any = record, **options: Any) -> Graph:
    return train_step(graph, loss=nn.cross_entropy, optimizer=optimizer, **options)


def batch(x: Spec = X, classes: int = 5, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=x.shape).astype(x.dtype), "label": rng.integers(0, classes, x.shape[:1])}
