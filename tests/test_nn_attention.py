"""Attention and projections: numbers against plain NumPy, what they refuse, and ranks that share a batch."""

from typing import Any

import numpy as np
import pytest
from lockstep import assert_split, collectives
from networks import step_of

from rapydli_flow import nn
from rapydli_flow.errors import GraphError, SettingError
from rapydli_flow.graph import Graph, trace
from rapydli_flow.scheduler import data_parallel
from rapydli_flow.spec import Array, Spec
from rapydli_flow.testing.interpret import interpret

X = Spec((3, 5, 8), "float64")


def drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_against_loops(heads: int) -> None:
    query, key, value = drawn(3, 5, 4), drawn(3, 7, 4, seed=1), drawn(3, 7, 6, seed=2)
    graph = Graph()
    leaves = [
        graph.leaf("batch", name, Spec(x.shape, "float64")) for name, x in zip("qkv", (query, key, value), strict=True)
    ]
    graph.outputs["y"] = nn.attention(*leaves, heads=heads).id
    want = np.empty((3, 5, 6))
    for n in range(3):
        for head in range(heads):
            features, units = (slice(head * size // heads, (head + 1) * size // heads) for size in (4, 6))
            for t in range(5):
                e = np.exp(key[n, :, features] @ query[n, t, features] / np.sqrt(4 / heads))
                want[n, t, units] = (e / e.sum()) @ value[n, :, units]
    got = interpret(graph, {"q": query, "k": key, "v": value}).outputs["y"]
    assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 3, 2, 4)])
def test_projection(shape: tuple[int, ...]) -> None:
    x, w, b = drawn(*shape), drawn(4, 6, seed=1), np.arange(6.0)
    feeds = {"x": x, "project_1/w": w.reshape(*(1,) * (x.ndim - 2), 4, 6)}
    graph = trace(lambda x: nn.project(x, 6), Spec(shape, "float64"))
    assert interpret(graph, {**feeds, "project_1/b": b}).outputs["y"] == pytest.approx(x @ w + b)
    graph = trace(lambda x: nn.project(x, 6, bias=False), Spec(shape, "float64"))
    assert interpret(graph, feeds).outputs["y"] == pytest.approx(x @ w)


def test_refusals() -> None:
    def refuses(error: type[Exception], message: str, network: Any, spec: Spec = X) -> None:
        with pytest.raises(error, match=message):
            trace(network, spec)

    refuses(SettingError, "attention: 8 features and 8 units .* heads=3", lambda x: nn.attention(x, x, x, heads=3))
    refuses(SettingError, "attention: .* heads=0", lambda x: nn.attention(x, x, x, heads=0))
    refuses(GraphError, r"attention: .* key f64\[3,5,6\]", lambda x: nn.attention(x, nn.project(x, 6), x))
    refuses(GraphError, "attention: operands do not fit", lambda x: nn.attention(x, x, x), Spec((3, 8)))
    refuses(GraphError, "project: x has 0 axes of places", lambda x: nn.project(x, 4), Spec((3, 8)))


def transformer(x: Any) -> Any:
    y = nn.layer_norm(x)
    x = x + nn.project(nn.attention(*(nn.project(y, 8) for _ in range(3)), heads=2), 8)
    x = x + nn.project(nn.relu(nn.project(nn.layer_norm(x), 12)), 8)
    return nn.dense(nn.mean(x, 1), 4)


def test_ranks_by_samples_give_the_step_of_one() -> None:
    graph = step_of(trace(transformer, X))
    feeds = {"x": drawn(*X.shape), "label": np.array([0, 3, 1])}
    graphs = assert_split(graph, 2, data_parallel(graph, 2).layouts, feeds, 1.0)
    assert all(collectives(part) for part in graphs)
