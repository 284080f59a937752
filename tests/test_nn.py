"""Layers and losses: shapes, names of parameters, numbers, and what they refuse."""

from typing import Any

import numpy as np
import pytest

from rapydli_flow import nn
from rapydli_flow.errors import GraphError, SettingError
from rapydli_flow.graph import Graph, predicting, trace, training
from rapydli_flow.ops import Conv, Normal
from rapydli_flow.spec import Spec
from rapydli_flow.testing.interpret import interpret, start

IMAGE = Spec((2, 7, 6, 4), "float64")


def run(network: Any, x: Any, **feeds: Any) -> Any:
    graph = training(trace(network, Spec(x.shape, x.dtype.name)))
    return interpret(graph, {"x": x, **feeds}, 1, 2).outputs["y"]


def shape(network: Any, spec: Spec = IMAGE) -> tuple[int, ...]:
    graph = trace(network, spec)
    return graph.spec(graph.outputs["y"]).shape


def image(seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=IMAGE.shape)


@pytest.mark.parametrize(
    ("layer", "want"),
    [
        (lambda x: nn.conv(x, 5, 3), (2, 5, 4, 5)),
        (lambda x: nn.conv(x, 5, (3, 1), stride=(2, 1), padding=(1, 0)), (2, 4, 6, 5)),
        (lambda x: nn.conv(x, 5, 3, padding=((1, 2), 1), dilation=2), (2, 6, 4, 5)),
        (lambda x: nn.conv(x, 6, 3, groups=2, bias=False), (2, 5, 4, 6)),
        (lambda x: nn.max_pool(x, 2), (2, 3, 3, 4)),
        (lambda x: nn.max_pool(x, 3, stride=2, padding=1), (2, 4, 3, 4)),
        (lambda x: nn.avg_pool(x, (3, 2), stride=1), (2, 5, 5, 4)),
        (lambda x: nn.flatten(x), (2, 168)),
        (lambda x: nn.dense(x, 3), (2, 3)),
        (lambda x: nn.mean(x, (1, 2)), (2, 4)),
        (lambda x: nn.softmax(nn.flatten(x)), (2, 168)),
        (lambda x: nn.batch_norm(x), (2, 7, 6, 4)),
        (lambda x: nn.dropout(x, 0.5), (2, 7, 6, 4)),
        (lambda x: nn.relu(nn.tanh(x)), (2, 7, 6, 4)),
    ],
)
def test_shapes(layer: Any, want: tuple[int, ...]) -> None:
    assert shape(layer) == want


@pytest.mark.parametrize("sizes", [(8,), (5, 4, 3)])
def test_convolution_over_1_and_3_axes(sizes: tuple[int, ...]) -> None:
    spec = Spec((2, *sizes, 3))
    assert shape(lambda x: nn.conv(x, 5, 3, padding=1), spec) == (2, *sizes, 5)
    assert shape(lambda x: nn.max_pool(x, 3, stride=1, padding=1), spec) == spec.shape


def test_along_one_axis_a_pair_of_padding_may_stand_alone() -> None:
    spec = Spec((2, 8, 3))
    for padding in ((3, 4), ((3, 4),)):
        assert shape(lambda x, padding=padding: nn.conv(x, 5, 8, padding=padding), spec) == (2, 8, 5)


def test_parameters_have_scoped_names() -> None:
    @nn.block
    def pair(x: Any) -> Any:
        return nn.conv(nn.conv(x, 4, 1), 4, 1, bias=False)

    graph = trace(lambda x: nn.dense(pair(pair(x)), 3), IMAGE)
    assert [leaf.name for leaf in graph.leaves("param")] == [
        "pair_1/conv_1/w",
        "pair_1/conv_1/b",
        "pair_1/conv_2/w",
        "pair_2/conv_1/w",
        "pair_2/conv_1/b",
        "pair_2/conv_2/w",
        "dense_1/w",
        "dense_1/b",
    ]
    assert pair.__name__ == "pair"


def test_a_layer_of_ones_own_gets_names_too() -> None:
    @nn.layer("shift")
    def shift(x: Any) -> Any:
        return x + x.graph.leaf("param", "by", Spec(x.shape[-1:], x.dtype))

    assert [leaf.name for leaf in trace(shift, IMAGE).leaves("param")] == ["shift_1/by"]


def test_a_scope_ends_where_its_layer_fails() -> None:
    graph = Graph()
    x = graph.leaf("batch", "x", IMAGE)
    with pytest.raises(SettingError):
        nn.conv(x, 3, 0)
    assert graph.scope == []


def test_weights_start_with_the_variance_of_their_gain() -> None:
    graph = trace(lambda x: nn.dense(nn.conv(x, 64, 3, init=nn.he(1.0)), 100), Spec((2, 8, 8, 16)))
    first = start(graph, 5)
    assert first["conv_1/w"].var() == pytest.approx(1.0 / (9 * 16), rel=0.05)
    assert first["dense_1/w"].var() == pytest.approx(2.0 / (6 * 6 * 64), rel=0.05)
    assert not first["conv_1/b"].any()
    init = graph["conv_1/w"].op.init  # type: ignore[attr-defined]
    assert isinstance(init, Normal)
    assert np.array_equal(first["conv_1/w"], start(graph, 5)["conv_1/w"])
    assert not np.array_equal(first["conv_1/w"], start(graph, 6)["conv_1/w"])


def test_fan_in_of_groups() -> None:
    graph = trace(lambda x: nn.conv(x, 6, 3, groups=2), IMAGE)
    op = next(node.op for node in graph if isinstance(node.op, Conv))
    assert (op.groups, graph["conv_1/w"].specs[0].shape) == (2, (3, 3, 2, 6))
    assert graph["conv_1/w"].op.init.std == pytest.approx((2.0 / 18) ** 0.5)  # type: ignore[attr-defined]


def test_dense_flattens_and_adds_a_bias() -> None:
    x, w, b = image(), np.random.default_rng(1).normal(size=(168, 3)), np.arange(3.0)
    got = run(lambda x: nn.dense(x, 3), x, **{"dense_1/w": w, "dense_1/b": b})
    assert got == pytest.approx(x.reshape(2, -1) @ w + b)
    assert run(lambda x: nn.dense(x, 3, bias=False), x, **{"dense_1/w": w}) == pytest.approx(x.reshape(2, -1) @ w)


def test_convolution_against_loops() -> None:
    x, w = image(), np.random.default_rng(1).normal(size=(3, 2, 4, 5))
    got = run(lambda x: nn.conv(x, 5, (3, 2), stride=(2, 1), padding=((1, 0), 1), bias=False), x, **{"conv_1/w": w})
    padded = np.pad(x, ((0, 0), (1, 0), (1, 1), (0, 0)))
    want = np.zeros((2, 3, 7, 5))
    for h in range(3):
        for v in range(7):
            want[:, h, v] = np.tensordot(padded[:, 2 * h : 2 * h + 3, v : v + 2], w, ((1, 2, 3), (0, 1, 2)))
    assert got == pytest.approx(want)


def test_pooling_against_loops() -> None:
    x = image()
    tiles = x[:, :6].reshape(2, 3, 2, 3, 2, 4)
    assert run(lambda x: nn.max_pool(x, 2), x) == pytest.approx(tiles.max((2, 4)))
    assert run(lambda x: nn.avg_pool(x, 2), x) == pytest.approx(tiles.mean((2, 4)))


def test_an_average_does_not_count_padding() -> None:
    assert run(lambda x: nn.avg_pool(x, 3, stride=2, padding=1), np.ones((1, 5, 4, 2))) == pytest.approx(1.0)
    got = run(lambda x: nn.avg_pool(x, 2, stride=1, padding=1), np.arange(4.0).reshape(1, 2, 2, 1))
    assert got[0, :, :, 0] == pytest.approx(np.array([[0, 0.5, 1], [1, 1.5, 2], [2, 2.5, 3]]))


def test_mean_and_softmax() -> None:
    x = image()
    assert run(lambda x: nn.mean(x, (1, 2)), x) == pytest.approx(x.mean((1, 2)))
    flat = x.reshape(2, -1)
    want = np.exp(flat) / np.exp(flat).sum(1, keepdims=True)
    assert run(lambda x: nn.softmax(nn.flatten(x)), x) == pytest.approx(want)


def test_batch_norm_keeps_running_statistics() -> None:
    graph = trace(lambda x: nn.batch_norm(x, momentum=0.8, eps=0.1), IMAGE)
    x = image()
    values = interpret(graph, {"x": x, "batch_norm_1/mean": np.full(4, 3.0), "batch_norm_1/var": np.full(4, 2.0)})
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    assert values.outputs["y"] == pytest.approx((x - mean) / np.sqrt(var + 0.1))
    assert values.updates["batch_norm_1/mean"] == pytest.approx(0.8 * 3.0 + 0.2 * mean)
    assert values.updates["batch_norm_1/var"] == pytest.approx(0.8 * 2.0 + 0.2 * var)


def test_batch_norm_is_exact_far_from_zero() -> None:
    """The running mean as shift: no cancellation of E[x^2] - E[x]^2 in float32."""
    x = (image() + 1000.0).astype(np.float32)
    graph = trace(nn.batch_norm, Spec(x.shape))
    got = interpret(graph, {"x": x, "batch_norm_1/mean": np.full(4, 1000, np.float32)}).updates["batch_norm_1/var"]
    assert got == pytest.approx(0.9 + 0.1 * x.astype(np.float64).var((0, 1, 2)), rel=1e-5)


def test_dropout_scales_what_it_keeps() -> None:
    x = np.ones((200, 50))
    y = run(lambda x: nn.dropout(x, 0.4), x)
    assert set(np.unique(y)) == {0.0, 1.0 / 0.6}
    assert (y == 0).mean() == pytest.approx(0.4, abs=0.02)
    graph = predicting(trace(lambda x: nn.dropout(x, 0.4), Spec(x.shape, "float64")))
    assert np.array_equal(interpret(graph, {"x": x}).outputs["y"], x)


def test_losses() -> None:
    def network(y: Any, label: Any) -> Any:
        return {"loss": nn.cross_entropy(y, label), "accuracy": nn.accuracy(y, label)}

    rng = np.random.default_rng(3)
    y, label = rng.normal(size=(6, 4)) * 50, rng.integers(0, 4, 6)
    out = interpret(trace(network, Spec((6, 4), "float64"), Spec((6,), "int64")), {"y": y, "label": label}).outputs
    largest = y.max(1, keepdims=True)
    log_p = y - largest - np.log(np.exp(y - largest).sum(1, keepdims=True))
    assert out["loss"] == pytest.approx(-log_p[np.arange(6), label].mean())
    assert out["accuracy"] == pytest.approx((y.argmax(1) == label).mean())


def test_of_equal_scores_the_first_counts() -> None:
    graph = trace(nn.accuracy, Spec((2, 3)), Spec((2,), "int64"))
    feeds = {"y": np.zeros((2, 3), np.float32), "label": np.array([0, 1])}
    assert interpret(graph, feeds).outputs["y"] == 0.5


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (
            lambda x: nn.conv(x, 3, 0),
            SettingError,
            "conv: window=0 is not a positive number, or one for each of 2 axes",
        ),
        (lambda x: nn.conv(x, 3, (3, 3, 3)), SettingError, r"conv: window=\(3, 3, 3\) is not a positive number"),
        (lambda x: nn.conv(x, 3, 3, stride=1.5), SettingError, "conv: stride=1.5 is not a positive number"),
        (
            lambda x: nn.conv(x, 3, 3, padding=-1),
            SettingError,
            "conv: padding=-1 is not 0 or more, or a .low, high. pair",
        ),
        (lambda x: nn.conv(x, 3, 3, padding=0.5), SettingError, "conv: padding=0.5 is not 0 or more"),
        (lambda x: nn.conv(x, 3, 3, padding=((1,), 1)), SettingError, r"conv: padding=\(\(1,\), 1\) is not 0 or more"),
        (lambda x: nn.max_pool(x, 2, padding=(1, 1, 1)), SettingError, "max_pool: padding=.* is not 0 or more"),
        (lambda x: nn.avg_pool(x, 2, stride=0), SettingError, "avg_pool: stride=0 is not a positive number"),
        (
            lambda x: nn.conv(nn.flatten(x), 3, 3),
            GraphError,
            r"conv: x has 0 spatial axes \(f64\[2,168\]\), not 1 to 3",
        ),
        (lambda x: nn.dense(nn.mean(x, (1, 2, 3)), 3), GraphError, r"dense: x is f64\[2\], not N,features"),
        (lambda x: nn.conv(x.spec, 3, 3), GraphError, "conv: x is Spec, not a tensor. Layers are called inside"),
        (lambda x: nn.dropout(x, 1.0), SettingError, r"dropout: rate 1.0 is not in \[0, 1\)"),
    ],
)
def test_layers_refuse(layer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trace(layer, IMAGE)
