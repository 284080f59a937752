"""Transposed and locally connected convolution, and pooling, as layers: shapes, numbers, gradients, splits, errors."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from lockstep import assert_split
from networks import step_of

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.errors import GraphError, SettingError, ShapeError
from rapydli_flow.graph import Graph, trace
from rapydli_flow.ops import MaxPool, MaxPoolGrad, Sample
from rapydli_flow.scheduler import Plan, compile_program
from rapydli_flow.spec import Array, Block, Spec
from rapydli_flow.testing.interpret import interpret, start
from rapydli_flow.testing.kernels import check_templates, host
from rapydli_flow.tuner import Tuning

IMAGE = Spec((2, 7, 6, 4), "float64")


def run(network: Any, x: Any, **feeds: Any) -> Any:
    return interpret(trace(network, Spec(x.shape, x.dtype.name)), {"x": x, **feeds}).outputs["y"]


def shape(network: Any, spec: Spec = IMAGE) -> tuple[int, ...]:
    graph = trace(network, spec)
    return graph.spec(graph.outputs["y"]).shape


def ops(network: Any, spec: Spec = IMAGE) -> list[str]:
    return [node.op.name for node in trace(network, spec)]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


# transposed convolution --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "how"),
    [
        ((5,), {"window": 3}),
        ((5, 4), {"window": (3, 2), "stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2)}),
        ((5, 4), {"window": 3, "stride": 2, "padding": ((1, 0), (0, 2)), "output_padding": 1, "groups": 2}),
        ((4, 3), {"window": 2, "dilation": 3, "output_padding": 2}),
        ((2, 3, 4), {"window": (1, 2, 3), "stride": 2, "padding": (0, 0, 1)}),
    ],
)
def test_sizes_of_a_transposed_convolution(space: tuple[int, ...], how: dict[str, Any]) -> None:
    def each(name: str, default: int) -> tuple[Any, ...]:
        value = how.get(name, default)
        return value if isinstance(value, tuple) else (value,) * len(space)

    want = []
    rows = zip(*(each(*a) for a in (("window", 0), ("stride", 1), ("dilation", 1), ("output_padding", 0))), strict=True)
    for size, (k, st, d, more), pad in zip(space, rows, each("padding", 0), strict=True):
        low, high = pad if isinstance(pad, tuple) else (pad, pad)
        want.append((size - 1) * st - low - high + d * (k - 1) + more + 1)
    assert shape(lambda x: nn.conv_transpose(x, 6, **how), Spec((2, *space, 4))) == (2, *want, 6)


def test_a_transposed_convolution_against_loops() -> None:
    x, w, b = normal(2, 4, 3, 4), normal(3, 2, 3, 4, seed=1), np.arange(6.0)
    stride, low, dilation = (2, 3), (1, 0), (1, 2)
    whole = np.zeros((2, 12, 12, 6))
    for h, v, r, s in product(range(4), range(3), range(3), range(2)):
        i, j = h * stride[0] + r * dilation[0], v * stride[1] + s * dilation[1]
        for g in range(2):  # w: *window, filters / groups, channels
            here, made = slice(2 * g, 2 * g + 2), slice(3 * g, 3 * g + 3)
            whole[:, i, j, made] += x[:, h, v, here] @ w[r, s, :, here].T
    got = run(
        lambda x: nn.conv_transpose(
            x, 6, (3, 2), stride=stride, padding=((1, 2), 0), output_padding=(1, 2), dilation=dilation, groups=2
        ),
        x,
        **{"conv_transpose_1/w": w, "conv_transpose_1/b": b},
    )
    assert got.shape == (2, 9 - 3 + 1, 9 + 2, 6)
    assert got == pytest.approx(whole[:, low[0] : low[0] + 7, :11] + b)


@pytest.mark.parametrize(("size", "more"), [(7, 0), (8, 1), (9, 0)])
def test_output_padding_says_which_size_a_convolution_came_from(size: int, more: int) -> None:
    def network(x: Any) -> Any:
        y = nn.conv(x, 5, 3, stride=2, padding=1)
        return nn.conv_transpose(y, 3, 3, stride=2, padding=1, output_padding=more)

    spec = Spec((1, size, 3))
    assert shape(network, spec) == spec.shape


def test_weights_of_a_transposed_convolution_keep_the_variance() -> None:
    graph = trace(lambda x: nn.conv_transpose(x, 8, 4, stride=2, padding=1, groups=2, init=nn.he(1.0)), IMAGE)
    assert graph["conv_transpose_1/w"].specs[0].shape == (4, 4, 4, 4)
    first = start(trace(lambda x: nn.conv_transpose(x, 64, 4, stride=2, init=nn.he(1.0)), Spec((1, 5, 5, 32))), 5)
    assert first["conv_transpose_1/w"].var() == pytest.approx(1.0 / (2 * 2 * 32), rel=0.05)  # 2 x 2 taps meet
    assert not first["conv_transpose_1/b"].any()


# locally connected convolution -------------------------------------------------------------------------


def test_a_local_convolution_against_loops() -> None:
    x, w, b = normal(2, 7, 6, 4), normal(3, 5, 3, 4, 4, 5, seed=1), normal(3, 5, 5, seed=2)
    got = run(
        lambda x: nn.local_conv(x, 5, (3, 4), stride=(2, 1), padding=((0, 1), (1, 1))),
        x,
        **{"local_conv_1/w": w, "local_conv_1/b": b},
    )
    padded = np.pad(x, ((0, 0), (0, 1), (1, 1), (0, 0)))
    want = np.zeros((2, 3, 5, 5))
    for h, v in product(range(3), range(5)):
        want[:, h, v] = np.tensordot(padded[:, 2 * h : 2 * h + 3, v : v + 4], w[h, v], 3) + b[h, v]
    assert got == pytest.approx(want)


@pytest.mark.parametrize("space", [(8,), (5, 6), (4, 3, 5)])
def test_a_local_convolution_with_equal_filters_is_a_convolution(space: tuple[int, ...]) -> None:
    x, w = normal(2, *space, 3), normal(*(2,) * len(space), 3, 5, seed=1)
    how: dict[str, Any] = {"stride": 2, "padding": 1, "bias": False}
    want = run(lambda x: nn.conv(x, 5, 2, **how), x, **{"conv_1/w": w})
    untied = np.broadcast_to(w, (*want.shape[1:-1], *w.shape)).copy()
    assert run(lambda x: nn.local_conv(x, 5, 2, **how), x, **{"local_conv_1/w": untied}) == pytest.approx(want)


# pooling -----------------------------------------------------------------------------------------------


def test_an_average_that_counts_padding() -> None:
    x = np.arange(4.0).reshape(1, 2, 2, 1)
    got = run(lambda x: nn.avg_pool(x, 2, stride=1, padding=1, count_padding=True), x)
    assert got[0, :, :, 0] == pytest.approx(np.array([[0, 0.25, 0.25], [0.5, 1.5, 1], [0.5, 1.25, 0.75]]))
    tiles = normal(2, 7, 6, 4)[:, :6].reshape(2, 3, 2, 3, 2, 4)
    for count in (False, True):  # without padding nothing is counted, nor divided by counts
        assert run(lambda x, c=count: nn.avg_pool(x, 2, count_padding=c), normal(2, 7, 6, 4)) == pytest.approx(
            tiles.mean((2, 4))
        )
        assert "divide" not in ops(lambda x, c=count: nn.avg_pool(x, 2, count_padding=c))


@pytest.mark.parametrize("space", [(9,), (7, 6), (3, 4, 5)])
def test_global_pooling(space: tuple[int, ...]) -> None:
    x, axes = normal(2, *space, 3), tuple(range(1, 1 + len(space)))
    assert run(nn.global_avg_pool, x) == pytest.approx(x.mean(axes))
    assert np.array_equal(run(nn.global_max_pool, x), x.max(axes))


def test_windows_of_more_taps_than_a_byte_counts() -> None:
    geometry: dict[str, Any] = {"window": (20, 18), "stride": (20, 18), "padding": ((0, 0), (0, 0))}
    x, pool = Spec((2, 20, 18, 3)), MaxPool(**geometry)
    y, argmax = pool.infer(x)
    assert (y.shape, argmax.dtype) == ((2, 1, 1, 3), "int32")
    assert check_templates(Sample(pool, (x,)), random_configs=0, corner=False) > 0
    ramp = np.arange(x.size, dtype=np.float32).reshape(x.shape)
    assert (pool(ramp)[1] == 359).all()
    assert check_templates(
        Sample(MaxPoolGrad(size=(20, 18), **geometry), (y, argmax), {1: (0, 360)}), random_configs=0, corner=False
    )


@pytest.mark.parametrize(("space", "size"), [((10,), (4,)), ((7, 5), (3, 2)), ((4, 3), (6, 2)), ((5, 4, 3), (2, 4, 2))])
def test_adaptive_pooling_against_loops(space: tuple[int, ...], size: tuple[int, ...]) -> None:
    x = normal(2, *space, 3)
    mean, largest = np.zeros((2, *size, 3)), np.zeros((2, *size, 3))
    for place in product(*map(range, size)):
        held = x
        for axis, (i, n, o) in enumerate(zip(place, space, size, strict=True), start=1):
            held = held.take(range(int(np.floor(i * n / o)), int(np.ceil((i + 1) * n / o))), axis)
        axes = tuple(range(1, 1 + len(space)))
        mean[:, *place], largest[:, *place] = held.mean(axes), held.max(axes)
    assert run(lambda x: nn.adaptive_avg_pool(x, size), x) == pytest.approx(mean)
    assert np.array_equal(run(lambda x: nn.adaptive_max_pool(x, size), x), largest)


def test_even_bins_are_windows() -> None:
    assert "sum_pool" in ops(lambda x: nn.adaptive_avg_pool(x, (7, 3)))
    assert "max_pool" in ops(lambda x: nn.adaptive_max_pool(x, 1))
    assert "adaptive_max_pool" in ops(lambda x: nn.adaptive_max_pool(x, 3))
    assert run(lambda x: nn.adaptive_avg_pool(x, 1), normal(2, 7, 6, 4)) == pytest.approx(
        normal(2, 7, 6, 4).mean((1, 2), keepdims=True)
    )


def test_l2_pooling() -> None:
    x = normal(2, 6, 6, 4)
    tiles = x.reshape(2, 3, 2, 3, 2, 4)
    assert run(lambda x: nn.l2_pool(x, 2), x) == pytest.approx(np.sqrt((tiles**2).sum((2, 4))))
    graph = step_of(trace(lambda x: nn.dense(nn.l2_pool(nn.conv(x, 2, 1), 2), 3), Spec(x.shape, "float32")))
    out = interpret(graph, {"x": np.zeros(x.shape, np.float32), "label": np.array([0, 1])}, 1).outputs
    assert all(np.isfinite(value).all() for value in out.values())  # every window is zero


# gradients and splits ----------------------------------------------------------------------------------

SHAPE, CLASSES = (3, 8, 6, 2), 3


def network(x: Any) -> Any:
    x = nn.tanh(nn.local_conv(x, 4, 3, padding=1))
    x = nn.l2_pool(x, 2, stride=1, padding=((0, 1), 0), eps=1e-3)
    x = nn.tanh(nn.conv_transpose(x, 3, 3, stride=2, padding=1, output_padding=1))
    x = nn.avg_pool(x, 2, padding=((1, 1), 0), count_padding=True)
    return nn.dense(nn.adaptive_avg_pool(x, (4, 3)) + nn.adaptive_max_pool(x, (4, 3)), CLASSES)


def feeds(graph: Graph, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    drawn = {leaf.name: 0.5 * rng.normal(size=leaf.shape) for leaf in graph.leaves("param", "batch")}
    return {**drawn, "label": rng.integers(0, CLASSES, SHAPE[0])}


def test_gradients_of_a_network_against_differences() -> None:
    graph = step_of(trace(network, Spec(SHAPE, "float64")))
    given = feeds(graph)
    out = interpret(graph, given).outputs
    names = [leaf.name for leaf in graph.leaves("param")]
    assert len(names) == 6
    for name in names:
        u = normal(*given[name].shape, seed=3)
        ends = [interpret(graph, {**given, name: given[name] + way * 1e-6 * u}).outputs["loss"] for way in (1, -1)]
        slope = (ends[0] - ends[1]) / 2e-6
        assert (out[f"d {name}"] * u).sum() == pytest.approx(slope, rel=1e-5, abs=1e-8), name
        assert abs(slope) > 1e-6, name


def along(axis: int, *inner: int) -> tuple[Block, ...]:
    return Block.along(SHAPE, axis, (0, *inner, SHAPE[axis]))


FILTERS = (8, 6, 3, 3, 2, 4)


@pytest.mark.parametrize(
    "layouts",
    [
        {"x": along(0, 1)},
        {"x": along(1, 4)},
        {"x": along(1, 1, 5)},
        {"x": along(2, 2)},
        {"x": along(1, 4), "local_conv_1/w": Block.along(FILTERS, 0, (0, 4, 8))},
        {"local_conv_1/w": Block.along(FILTERS, 5, (0, 3, 4))},
        {"conv_transpose_1/w": Block.along((3, 3, 3, 4), 3, (0, 1, 4))},
        {"conv_transpose_1/w": Block.along((3, 3, 3, 4), 2, (0, 1, 3))},
    ],
    ids=["samples", "rows", "uneven rows", "columns", "filters with rows", "filters", "channels", "output channels"],
)
def test_ranks_compute_what_one_computes(layouts: dict[str, tuple[Block, ...]]) -> None:
    graph = step_of(trace(network, Spec(SHAPE, "float64")))
    ranks = len(next(iter(layouts.values())))
    assert_split(graph, ranks, layouts, feeds(graph), scale=1.0)


def test_filters_of_a_local_convolution_are_split_with_the_rows() -> None:
    graph = step_of(trace(lambda x: nn.dense(nn.local_conv(x, 4, 3, padding=1), CLASSES), Spec(SHAPE)))
    layouts = {"x": along(1, 4), "local_conv_1/w": Block.along(FILTERS, 0, (0, 4, 8))}
    for part in Plan(2, 1, layouts).rank_graphs(graph):
        (node,) = (node for node in part if node.op.name == "local_conv_filter_grad")
        assert node.specs[0].shape == (4, *FILTERS[1:])


@pytest.mark.slow
def test_two_ranks_by_rows_train_as_one() -> None:
    """Two ranks with real kernels, none of them a reference, against the step in NumPy."""

    def network(x: Any) -> Any:
        y = nn.tanh(nn.conv_transpose(x, 2, 3, stride=2, padding=1, output_padding=1))
        return nn.mean(nn.local_conv(y, CLASSES, 3, stride=2), (1, 2))

    graph = trace(network, Spec((2, 4, 3, 2), "float64"))
    step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.5))
    plan = Plan(2, 1, {"x": Block.along((2, 4, 3, 2), 1, (0, 2, 4))})
    programs = [compile_program(part, Tuning(host())) for part in plan.rank_graphs(step)]
    assert not any(getattr(s, "choice", None) and s.choice.reference for p in programs for s in p.steps)
    data = {"x": normal(2, 4, 3, 2), "label": np.array([2, 0])}  # one batch is all records
    run = rf.fit(step, data, steps=4, plan=plan, seed=1)
    first = state = start(step, 1)
    for n in range(4):
        state = {**state, **interpret(step, {**data, **state}, 1, n).updates}
    assert len(state) == 4
    for name, value in state.items():
        assert np.abs(run.state[name] - value).max() <= 1e-10, name
        assert np.abs(first[name] - value).max() > 1e-4, name


# errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (
            lambda x: nn.conv_transpose(x, 3, 3, output_padding=1),
            SettingError,
            r"conv_transpose: output_padding=1 is not 0 or more and below stride \(1, 1\) or dilation \(1, 1\)",
        ),
        (lambda x: nn.conv_transpose(x, 3, 3, stride=2, output_padding=(1,)), SettingError, "such a number for each"),
        (
            lambda x: nn.conv_transpose(x, 6, 3, groups=3),
            SettingError,
            "conv_transpose: 4 channels and 6 filters are not divisible by 3 groups",
        ),
        (
            lambda x: nn.conv_transpose(x, 6, 1, padding=(1, 3)),
            SettingError,
            r"conv_transpose: padding=\(1, 3\) leaves nothing of x f64\[2,7,6,4\]: the output is \(5, 0\)",
        ),
        (lambda x: nn.conv_transpose(nn.flatten(x), 3, 3), GraphError, "conv_transpose: x has 0 spatial axes"),
        (lambda x: nn.local_conv(x, 3, 9), ShapeError, "local_conv: a window of 9 .* does not fit in 7 . padding"),
        (lambda x: nn.local_conv(nn.flatten(x), 3, 3), GraphError, "local_conv: x has 0 spatial axes"),
        (lambda x: nn.l2_pool(x, 2, eps=0.0), SettingError, "l2_pool: eps=0.0 is not above 0"),
        (lambda x: nn.global_max_pool(nn.flatten(x)), GraphError, "global_max_pool: x has 0 spatial axes"),
        (lambda x: nn.adaptive_avg_pool(x, (2, 2, 2)), SettingError, r"adaptive_avg_pool: size=\(2, 2, 2\) is not"),
        (lambda x: nn.adaptive_max_pool(x, 0), SettingError, "adaptive_max_pool: size=0 is not a positive number"),
    ],
)
def test_layers_refuse(layer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trace(layer, IMAGE)
