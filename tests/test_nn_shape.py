"""Shapes, reductions, gathering and resizing: numbers against NumPy, what they refuse, NaN, and splits over ranks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from lockstep import assert_split, collectives
from networks import step_of

from cpu_kernels.compile import compile_kernel, host, run_kernel
from rapydli_flow import nn
from rapydli_flow.errors import GraphError, NotDifferentiable, SettingError, ShapeError
from rapydli_flow.graph import Graph, gradients, predicting, trace, with_batch
from rapydli_flow.ops import ArgMax, Embedding, EmbeddingGrad, Gather, GatherGrad, Max, MaxGrad, Min, Op
from rapydli_flow.scheduler import data_parallel
from rapydli_flow.spec import Array, Block, Spec
from rapydli_flow.template import templates
from rapydli_flow.testing.interpret import interpret, start
from rapydli_flow.testing.kernels import Buffer

IMAGE = Spec((2, 4, 6, 3), "float64")


def image(seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=IMAGE.shape)


def run(network: Callable[..., Any], *arrays: Array) -> Array:
    names = [f"x{i}" for i in range(len(arrays))]
    graph = Graph()
    leaves = [graph.leaf("batch", n, Spec(a.shape, a.dtype.name)) for n, a in zip(names, arrays, strict=True)]
    graph.outputs["y"] = network(*leaves).id
    return interpret(graph, dict(zip(names, arrays, strict=True))).outputs["y"]


@pytest.mark.parametrize(
    ("layer", "want"),
    [
        (lambda x: nn.reshape(x, (4, -1)), lambda x: x.reshape(2, 4, 18)),
        (lambda x: nn.reshape(x, -1), lambda x: x.reshape(2, 72)),
        (lambda x: nn.flatten(x), lambda x: x.reshape(2, 72)),
        (lambda x: nn.transpose(x, (0, 3, 1, 2)), lambda x: x.transpose(0, 3, 1, 2)),
        (lambda x: nn.transpose(x, (0, -1, 2, 1)), lambda x: x.transpose(0, 3, 2, 1)),
        (lambda x: nn.concatenate([x, nn.tanh(x)]), lambda x: np.concatenate([x, np.tanh(x)], -1)),
        (lambda x: nn.concatenate((x, x, x), axis=-3), lambda x: np.concatenate([x] * 3, 1)),
        (lambda x: nn.slice_axis(x, -2, 1, 6, step=2), lambda x: x[:, :, 1:6:2]),
        (lambda x: nn.slice_axis(x, 1, -2), lambda x: x[:, -2:]),
        (lambda x: nn.slice_axis(x, 1, 0, -1), lambda x: x[:, :-1]),
        (lambda x: nn.split(x, 3, axis=2)[1], lambda x: x[:, :, 2:4]),
        (lambda x: nn.split(x, (1, 2))[1], lambda x: x[..., 1:]),
        (lambda x: nn.pad(x, 1), lambda x: np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))),
        (
            lambda x: nn.pad(x, ((0, 2), 1), value=-3.0),
            lambda x: np.pad(x, ((0, 0), (0, 2), (1, 1), (0, 0)), constant_values=-3.0),
        ),
        (lambda x: nn.pad(x, ((0, 1),), axes=-1), lambda x: np.pad(x, ((0, 0), (0, 0), (0, 0), (0, 1)))),
        (lambda x: nn.sum(x, -1), lambda x: x.sum(-1)),
        (lambda x: nn.sum(x, (1, -2), keep=True), lambda x: x.sum((1, 2), keepdims=True)),
        (lambda x: nn.mean(x, (1, 2)), lambda x: x.mean((1, 2))),
        (lambda x: nn.mean(x, -1, keep=True), lambda x: x.mean(-1, keepdims=True)),
        (lambda x: nn.variance(x, (1, 2)), lambda x: x.var((1, 2))),
        (lambda x: nn.max(x, (1, -1)), lambda x: x.max((1, 3))),
        (lambda x: nn.min(x, -2, keep=True), lambda x: x.min(2, keepdims=True)),
        (lambda x: nn.argmax(x), lambda x: x.argmax(-1)),
        (lambda x: nn.argmin(x, 1, keep=True), lambda x: x.argmin(1, keepdims=True)),
        (lambda x: nn.upsample(x, (3, 2)), lambda x: x.repeat(3, 1).repeat(2, 2)),
    ],
)
def test_values(layer: Any, want: Any) -> None:
    got, expected = run(layer, image()), want(image())
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < 1e-14


def test_gather_is_take_along_axis() -> None:
    indices = np.random.default_rng(1).integers(0, 6, (2, 4, 5, 3))
    got = run(lambda x, i: nn.gather(x, i, axis=-2), image(), indices)
    assert np.array_equal(got, np.take_along_axis(image(), indices, 2))


def test_linear_interpolation_has_centres_at_half_positions() -> None:
    line = np.array([[0.0, 4.0, 8.0]])[..., None]
    assert run(lambda x: nn.upsample(x, 2, "bilinear"), line).ravel().tolist() == [0, 1, 3, 5, 7, 8]
    assert run(lambda x: nn.resize(x, 1), line).ravel().tolist() == [4]
    assert run(lambda x: nn.resize(x, 2), line).ravel().tolist() == [1, 7]
    twice = run(lambda x: nn.resize(x, (4, 9)), image())
    rows = run(lambda x: nn.resize(x, (4, 9)), image()[:, 1:2].repeat(4, 1))
    assert np.abs(twice[:, 1] - rows[:, 1]).max() < 1e-14  # along one axis after the other


def test_embedding_is_a_layer_with_a_table() -> None:
    graph = trace(lambda ids: nn.tanh(nn.embedding(ids, 200, 30, dtype="float64")), Spec((4, 5), "int32"))
    assert [(x.name, x.spec) for x in graph.leaves("param")] == [("embedding_1/w", Spec((200, 30), "float64"))]
    (table,) = start(graph, 3).values()
    assert abs(table.std() - 1.0) < 0.05
    ids = np.random.default_rng(0).integers(0, 200, (4, 5), np.int32)
    assert np.array_equal(interpret(graph, {"ids": ids}, 3).outputs["y"], np.tanh(table[ids]))


def test_ties_share_the_gradient_of_a_maximum() -> None:
    x = np.array([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0], [5.0, 5.0, 5.0]])
    want = np.array([[0, 0.5, 0.5], [1, 0, 0], [1 / 3] * 3])
    assert np.array_equal(MaxGrad(axes=(1,))(np.ones(3), x), want)
    assert np.array_equal(kernel(MaxGrad(axes=(1,)), np.ones(3), x)[0], want)


def test_whole_numbers_have_no_gradient() -> None:
    graph = trace(lambda x: nn.sum(nn.argmax(nn.dense(x, 3)), 0), Spec((4, 5)))
    with pytest.raises(NotDifferentiable, match="arg_max_1: arg_max has no gradient"):
        gradients(graph, graph.tensor(graph.outputs["y"]), graph.leaves("param"))


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (lambda x: nn.reshape(x, (5, -1)), ShapeError, r"reshape: samples of 72 elements cannot become \(5, -1\)"),
        (lambda x: nn.reshape(x, (-1, -1)), ShapeError, r"cannot become \(-1, -1\) .*One size may be -1"),
        (lambda x: nn.reshape(x, (5, 5)), ShapeError, r"reshape: samples of 72 elements cannot become \(5, 5\)"),
        (lambda x: nn.transpose(x, (0, 1)), ShapeError, "transpose: order .* does not name each of the 4 axes once"),
        (lambda x: nn.transpose(x, (0, 1, 2, -1, 3)), ShapeError, "transpose: .* several different ones"),
        (lambda x: nn.concatenate([]), GraphError, r"concatenate: \[\] is not a list of one or more tensors"),
        (lambda x: nn.concatenate([x, 1.0]), GraphError, r"concatenate: \['Tensor', 'float'\] is not a list"),
        (lambda x: nn.concatenate(x), GraphError, r"Write \[a, b\]"),
        (lambda x: nn.concatenate([x, x], axis=4), ShapeError, "concatenate: 4 is not an axis of x.*-4 to -1"),
        (lambda x: nn.split(x, 4, axis=2), ShapeError, "split: axis 2 of size 6 cannot be cut into 4"),
        (lambda x: nn.split(x, (1, 1)), ShapeError, r"split: axis 3 of size 3 cannot be cut into \(1, 1\)"),
        (lambda x: nn.split(x, 0), ShapeError, "split: axis 3 of size 3 cannot be cut into 0"),
        (lambda x: nn.slice_axis(x, 1, 4), ShapeError, "slice: nothing lies between"),
        (lambda x: nn.slice_axis(x, 1, step=-1), SettingError, "slice_axis: step=-1 is not 1 or more"),
        (lambda x: nn.pad(x, (1, 1, 1)), SettingError, "pad: padding=.* for each of 2 axes"),
        (lambda x: nn.pad(nn.flatten(x), 1), ShapeError, "pad: x has no spatial axes"),
        (lambda x: nn.mean(x, 4), ShapeError, "mean: 4 is not an axis of x"),
        (lambda x: nn.max(x, (1, -3)), ShapeError, r"max: \(1, -3\) is not an axis of x, or several different ones"),
        (lambda x: nn.gather(x, x), ShapeError, "gather: x is floating and indices are whole numbers"),
        (lambda x: nn.embedding(x, 3, 0), SettingError, "embedding: features=0 is not a whole number"),
        (lambda x: nn.embedding(x, 3, 2), ShapeError, "embedding: ids are whole numbers"),
        (lambda x: nn.upsample(x, 2, "cubic"), SettingError, "upsample: mode='cubic' is not one of nearest, bilinear"),
        (lambda x: nn.upsample(x, 1.5), SettingError, "upsample: factor=1.5 is not a positive number"),
        (lambda x: nn.resize(nn.flatten(x), 3), GraphError, "resize: x has 0 spatial axes"),
    ],
)
def test_refused(layer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trace(layer, IMAGE)


# what the suite does not draw: numbers outside of an axis, NaN -----------------------------------------


def kernel(op: Op, *ins: Array, threads: int = 1) -> list[Array]:
    """The default kernel of an op between guards, which must survive."""
    specs = [Spec(x.shape, x.dtype.name) for x in ins]
    outs = op.out_specs(*specs)
    (template,) = templates(op.family, "cpu")
    made = compile_kernel(template, op, specs, outs, host())
    given = [Buffer.of(spec, x) for spec, x in zip(specs, ins, strict=True)]
    results = [Buffer.of(spec) for spec in outs]
    work = [Buffer.of(spec) for spec in template.workspace(op, specs, outs, **dict(made.config))]
    at = np.array([*Block.all(outs[0].shape).lo, *outs[0].shape], np.int64)
    arrays = [[b.array for b in group] for group in (given, results, work)]
    run_kernel(made, arrays[0], arrays[1], work=arrays[2], at=at, threads=threads)
    assert all(b.whole for b in (*given, *results, *work))
    return arrays[1]


IDS = np.array([[0, 3, -1], [5, 2**40, 3]])


@pytest.mark.parametrize(
    ("op", "ins"),
    [
        (Embedding(), (np.arange(10.0).reshape(5, 2), IDS)),
        (EmbeddingGrad(vocabulary=5), (np.arange(12.0).reshape(2, 3, 2), IDS)),
        (Gather(axis=1), (np.arange(10.0).reshape(2, 5), IDS)),
        (GatherGrad(axis=1, size=5), (np.arange(6.0).reshape(2, 3), IDS)),
    ],
    ids=lambda value: value.name if isinstance(value, Op) else "",
)
def test_numbers_outside_of_an_axis(op: Op, ins: tuple[Array, ...]) -> None:
    want = op(*ins)
    outside = (ins[1] < 0) | (ins[1] >= 5)
    if "grad" in op.name:  # no gradient where there was no element
        assert want.sum() == ins[0][~outside].sum()
        assert np.array_equal(
            want, op(np.where(outside.reshape(2, 3, *[1] * (ins[0].ndim - 2)), np.nan, ins[0]), ins[1])
        )
    else:
        assert np.array_equal(np.isnan(want.reshape(2, 3, -1)).all(-1), outside)
    for threads in (1, 2):
        assert np.array_equal(kernel(op, *ins, threads=threads)[0], want, equal_nan=True)


@pytest.mark.parametrize("op", [Max(axes=(1,)), Min(axes=(1,)), Max(axes=(0,)), ArgMax(axes=(1,))], ids=str)
def test_a_nan_wins(op: Op) -> None:
    x = np.array([[1.0, np.nan, 7.0, np.nan], [2.0, -3.0, 5.0, 5.0]])
    want = op(x)
    assert np.array_equal(kernel(op, x)[0], want, equal_nan=True)
    assert want[0] == 1 if op.family == "arg_extreme" else np.isnan(want).any()


# on ranks ----------------------------------------------------------------------------------------------

X = Spec((4, 6, 5, 2), "float64")


def mixed(x: Any) -> Any:
    """Parts, joins, margins, other orders of axes, extremes: along rows, columns and channels."""
    x = nn.conv(x, 4, 3, padding=1)
    top, rest = nn.split(x, (2, 4), axis=1)
    a, b = nn.split(nn.tanh(rest), 2)
    y = nn.concatenate([a, nn.slice_axis(x, 1, 1, 5), b])  # N,4,5,8
    y = nn.concatenate([nn.pad(top, (1, 0)), y])  # N,4,5,12
    y = nn.transpose(nn.upsample(y, (2, 1)), (0, 2, 1, 3))  # N,5,8,12
    y = nn.concatenate([nn.max(y, 1), nn.slice_axis(nn.mean(y, 1), -1, 0, 5, step=2)])  # N,8,15
    return nn.dense(y, 3)


def words(ids: Any) -> Any:
    x = nn.resize(nn.embedding(ids, 7, 5, dtype="float64"), 4)
    return nn.dense(x, 3)


def feeds(shape: tuple[int, ...], whole: bool = False) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    x = {"ids": rng.integers(0, 7, shape)} if whole else {"x": rng.normal(size=shape)}
    return {**x, "label": rng.integers(0, 3, shape[0])}


def test_rows_and_samples_give_what_one_rank_gives() -> None:
    graph = step_of(trace(mixed, X))
    by_rows = {"x": Block.along(X.shape, 1, (0, 3, 6))}
    rows = assert_split(graph, 2, by_rows, feeds(X.shape))
    assert any(text.startswith("exchange") for text in collectives(rows[0]))
    samples = assert_split(graph, 2, data_parallel(graph, 2).layouts, feeds(X.shape))
    assert not any(text.startswith("exchange") for text in collectives(samples[0]))


def test_a_table_is_summed_over_ranks() -> None:
    graph = step_of(trace(words, Spec((4, 6), "int64")))
    (rank, _) = assert_split(graph, 2, data_parallel(graph, 2).layouts, feeds((4, 6), whole=True))
    assert collectives(rank)
    halves = {"embedding_1/w": Block.along((7, 5), 1, (0, 3, 5))}
    assert_split(graph, 2, halves, feeds((4, 6), whole=True))


def test_slices_hold_for_smaller_batches() -> None:
    graph = predicting(trace(lambda x: nn.concatenate(nn.split(x[:, 1:3], 2, axis=1)[::-1], axis=1), X))
    small = with_batch(graph, 1)
    x = feeds(X.shape)["x"]
    assert np.array_equal(interpret(small, {"x": x[:1]}).outputs["y"], x[:1, [2, 1]])
