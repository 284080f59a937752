"""Splits: ranks in lock-step compute what one rank computes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import assert_split, collectives
from networks import batch, small, step_of, traced

from rapydli_flow import nn, optim
from rapydli_flow.errors import ShapeError
from rapydli_flow.graph import Graph, gradients, predicting, trace
from rapydli_flow.ops import Conv, Matmul, Moments, Op, Relu, Reshape, Sum, SumPool
from rapydli_flow.scheduler import AllReduce, Exchange, Plan, Shard, Split, data_parallel, split
from rapydli_flow.scheduler.collective import meet
from rapydli_flow.spec import Block, Spec

X = Spec((5, 8, 6, 4), "float64")
MOMENTUM = optim.sgd(0.1, momentum=0.9, weight_decay=0.01)


def along(shape: Any, axis: int, *bounds: int) -> tuple[Block, ...]:
    return Block.along(tuple(shape), axis, (0, *bounds, tuple(shape)[axis]))


def step(optimizer: Any = MOMENTUM) -> Graph:
    return step_of(traced(small, X), optimizer, metrics={"accuracy": nn.accuracy})


LAYOUTS = {
    "2 samples": {"x": along(X.shape, 0, 2), "label": along((5,), 0, 2)},
    "4 samples": {"x": along(X.shape, 0, 1, 3, 4), "label": along((5,), 0, 1, 3, 4)},
    "samples of x only": {"x": along(X.shape, 0, 4)},
    "samples cut in two ways": {"x": along(X.shape, 0, 4), "label": along((5,), 0, 1)},
    "rows": {"x": along(X.shape, 1, 5)},
    "3 columns": {"x": along(X.shape, 2, 1, 3)},
    "input channels": {"x": along(X.shape, 3, 1)},
    "filters": {f"conv_1/{n}": along(s, len(s) - 1, 3) for n, s in (("w", (3, 3, 4, 4)), ("w/momentum", (3, 3, 4, 4)))},
    "filters and bias": {
        "conv_1/w": along((3, 3, 4, 4), 3, 1),
        "conv_1/b": along((4,), 0, 1),
        "conv_1/w/momentum": along((3, 3, 4, 4), 3, 2),
    },
    "input channels of the filters": {"conv_1/w": along((3, 3, 4, 4), 2, 2)},
    "taps of the filters": {"conv_1/w": along((3, 3, 4, 4), 0, 1)},
    "dense": {"dense_1/w": along((60, 6), 0, 30), "dense_2/w": along((6, 5), 1, 3)},
    "channels of a batch norm": {"residual_1/batch_norm_1/gain": along((4,), 0, 3)},
    "sharded state": {
        "x": along(X.shape, 0, 3),
        "label": along((5,), 0, 3),
        "conv_1/w/momentum": along((3, 3, 4, 4), 3, 3),
        "dense_1/w/momentum": along((60, 6), 0, 11),
        "dense_2/b/momentum": along((5,), 0, 2),
    },
    "grouped filters are never divided": {"residual_1/conv_2/w": along((3, 3, 2, 4), 3, 2)},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_training_step(name: str) -> None:
    graph, layouts = step(), LAYOUTS[name]
    ranks = len(next(iter(layouts.values())))
    graphs = assert_split(graph, ranks, layouts, batch(X), scale=1.0)
    assert all(collectives(part) for part in graphs)


def test_gradients_and_adam() -> None:
    layouts = data_parallel(step(), 3).layouts
    assert_split(step_of(traced(small, X)), 3, layouts, batch(X), scale=1.0)
    adam = optim.adam(0.01, eps=1e-3)  # of a bias before a batch norm, whose gradient is noise, eps is all there is
    assert_split(step(adam), 3, layouts, batch(X), scale=1.0)


def test_prediction_needs_one_collective_for_samples() -> None:
    graph = predicting(traced(small, X))
    (graphs, *_) = assert_split(graph, 2, {"x": along(X.shape, 0, 3)}, {"x": batch(X)["x"]})
    assert len(collectives(graphs)) == 1


def test_a_network_whose_labels_are_whole() -> None:
    graph = trace(lambda x: nn.softmax(nn.dense(x, 3)), Spec((4, 5), "float64"))
    assert_split(graph, 3, {"x": along((4, 5), 1, 1, 3)}, {"x": np.random.default_rng(0).normal(size=(4, 5))})


def linear_step(network: Any, spec: Spec) -> tuple[Graph, dict[str, Any]]:
    """The sum of squares of a network's output, and all gradients, that of the input too."""
    graph = trace(network, spec)
    y = graph.tensor(graph.outputs["y"])
    loss = Sum(axes=tuple(range(len(y.shape))))(y * y)
    wanted = graph.leaves("batch", "param")
    graph.outputs["loss"] = loss.id
    for leaf, g in zip(wanted, gradients(graph, loss, wanted), strict=True):
        graph.outputs[f"d {leaf.name}"] = g.id
    rng = np.random.default_rng(0)
    return graph, {leaf.name: rng.normal(size=leaf.shape) for leaf in wanted}


@st.composite
def chains(draw: Any) -> tuple[list[dict[str, Any]], tuple[int, ...], int, tuple[int, ...]]:
    """Layers, the input's shape, the axis that is cut, and where."""
    space = draw(st.sampled_from((1, 2, 2, 3)))
    size = tuple(draw(st.integers(4, 13 if space < 3 else 6)) for _ in range(space))
    shape = (draw(st.integers(1, 3)), *size, draw(st.integers(1, 3)))
    layers = []
    for _ in range(draw(st.integers(1, 3))):

        def each(values: Any) -> tuple[Any, ...]:
            return tuple(draw(values) for _ in range(space))

        layers.append(
            {
                "kind": draw(st.sampled_from(("conv", "conv", "conv", "max", "avg"))),
                "window": each(st.integers(1, 3)),
                "stride": each(st.integers(1, 3)),
                "padding": each(st.tuples(st.integers(0, 2), st.integers(0, 2))),
                "dilation": each(st.integers(1, 2)),
                "filters": draw(st.integers(1, 3)),
                "relu": draw(st.booleans()),
            }
        )
    axis = draw(st.integers(1, min(2, space)))
    ranks = draw(st.integers(2, min(4, shape[axis])))
    inner = draw(st.lists(st.integers(1, shape[axis] - 1), min_size=ranks - 1, max_size=ranks - 1, unique=True))
    return layers, shape, axis, tuple(sorted(inner))


def chain(x: Any, layers: Any) -> Any:
    for a in layers:
        if a["kind"] == "conv":
            geometry = {name: a[name] for name in ("stride", "padding", "dilation")}
            x = nn.conv(x, a["filters"], a["window"], **geometry)
        else:
            padding = [(min(lo, k - 1), min(hi, k - 1)) for (lo, hi), k in zip(a["padding"], a["window"], strict=True)]
            pool = nn.max_pool if a["kind"] == "max" else nn.avg_pool
            x = pool(x, a["window"], stride=a["stride"], padding=padding)
        x = nn.relu(x) if a["relu"] else x
    return x


def test_random_chains_of_convolutions() -> None:
    tried = {"split": 0, "nothing": 0}

    @settings(max_examples=120, deadline=None, derandomize=True, database=None)
    @given(chains())
    def run(case: Any) -> None:
        layers, shape, axis, inner = case
        try:
            graph, feeds = linear_step(lambda x: chain(x, layers), Spec(shape, "float64"))
        except ShapeError:  # a window does not fit
            return
        layouts = {"x": along(shape, axis, *inner)}
        try:
            split(graph, len(inner) + 1, layouts)
        except ShapeError:
            with pytest.raises(ShapeError, match="would hold nothing of"):  # a part that reads padding only
                split(graph, len(inner) + 1, layouts)
            tried["nothing"] += 1
            return
        assert_split(graph, len(inner) + 1, layouts, feeds)
        tried["split"] += 1

    run()
    assert tried["split"] >= 50
    assert tried["split"] > 2 * tried["nothing"], tried


@pytest.mark.parametrize(
    ("spec", "layer"),
    [
        (Spec((2, 11, 3), "float64"), {"window": 4, "stride": 2, "padding": [(2, 1)]}),
        (Spec((2, 8, 7, 3), "float64"), {"window": (2, 3), "padding": 1, "dilation": (3, 2)}),
        (Spec((1, 6, 5, 4, 2), "float64"), {"window": (2, 3, 2), "stride": (1, 2, 1), "padding": 1}),
        (Spec((2, 9, 8, 4), "float64"), {"window": 3, "padding": 1, "groups": 2}),
        (Spec((2, 9, 8, 4), "float64"), {"window": 3, "padding": 1, "groups": 4}),
    ],
)
def test_every_axis_of_a_convolution(spec: Spec, layer: dict[str, Any]) -> None:
    graph, feeds = linear_step(lambda x: nn.conv(nn.relu(nn.conv(x, 4, **layer)), 3, 1), spec)
    for leaf in graph.leaves("batch", "param"):
        for axis, size in enumerate(leaf.shape):
            for ranks in range(2, min(3, size) + 1):
                bounds = [0, *range(size - ranks + 1, size), size]
                assert_split(graph, ranks, {leaf.name: Block.along(leaf.shape, axis, bounds)}, feeds)


def test_a_halo_is_all_that_moves() -> None:
    graph = trace(lambda x: nn.conv(x, 2, 3, padding=1, bias=False), Spec((1, 10, 6, 1)))
    layout = along((1, 10, 6, 1), 1, 6)
    first, second = split(graph, 2, {"x": layout})
    have, want = next((n.op.have, n.op.want) for n in first if isinstance(n.op, Exchange))
    assert have == tuple(Shard(rank, block) for rank, block in enumerate(layout))
    assert [(rank, str(block)) for rank, block in want] == [(0, "[0:1,0:7,0:6,0:1]"), (1, "[0:1,5:10,0:6,0:1]")]
    assert first["x/move_1"].specs == (Spec((1, 7, 6, 1)),)
    assert second["x/move_1"].specs == (Spec((1, 5, 6, 1)),)
    assert first["conv_1/conv_1"].op == Conv(stride=(1, 1), padding=((1, 0), (1, 1)), dilation=(1, 1))
    assert second["conv_1/conv_1"].op == Conv(stride=(1, 1), padding=((0, 1), (1, 1)), dilation=(1, 1))
    assert first["conv_1/conv_1"].specs == (Spec((1, 6, 6, 2)),)


def test_sums_of_parts_pass_through_linear_ops() -> None:
    graph = trace(lambda x: nn.mean(x, (0, 1)) * 2.0 + nn.mean(x, (0, 1)), Spec((6, 4, 3), "float64"))
    (part, _) = assert_split(
        graph, 2, {"x": along((6, 4, 3), 0, 2)}, {"x": np.random.default_rng(1).normal(size=(6, 4, 3))}
    )
    kinds = [type(node.op) for node in part]
    assert kinds.count(AllReduce) <= 2
    assert Exchange not in kinds


def test_what_is_summed_once_is_not_summed_again() -> None:
    graph = trace(lambda x: (lambda s: nn.tanh(s) + nn.relu(s))(nn.mean(x, (0,))), Spec((6, 3), "float64"))
    parts = split(graph, 2, {"x": along((6, 3), 0, 2)})
    assert [type(node.op) for node in parts[0]].count(AllReduce) == 1


def test_moved_values_are_moved_once() -> None:
    def network(x: Any) -> Any:
        return nn.flatten(x) * 2.0 + nn.tanh(nn.flatten(x))

    graph = trace(network, Spec((2, 6, 3), "float64"))
    parts = split(graph, 2, {"x": along((2, 6, 3), 1, 2)})
    assert len(collectives(parts[0])) == 1
    names = [node.name for node in parts[0] if node.op.collective]
    assert names == ["x/move_1"]


def test_a_letter_too_short_is_not_cut() -> None:
    graph = trace(lambda x: nn.conv(x, 2, 3, stride=3), Spec((1, 6, 5, 1), "float64"))
    layout = along((1, 6, 5, 1), 1, 1, 2)
    parts = split(graph, 3, {"x": layout})
    assert {part["conv_1/conv_1"].specs for part in parts if "conv_1/conv_1" in part} <= {
        (Spec((1, 2, 1, 2), "float64"),)
    }
    assert_split(graph, 3, {"x": layout}, {"x": np.random.default_rng(0).normal(size=(1, 6, 5, 1))})


# errors ------------------------------------------------------------------------------------------------


def plain() -> Graph:
    return trace(lambda x: nn.dense(x, 3), Spec((4, 5)))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Block.along((4, 5), 0, (0, 1, 2, 4)), r"split: the layout of x has 3 blocks for 2 ranks\."),
        (Block.along((4, 6), 0, (0, 1, 4)), r"split: the layout of x is for \(4, 6\), but it is f32\[4,5\]\."),
        (Block.along((4, 5), 0, (0, 0, 4)), r"split: rank 0 of 2 would hold nothing of x \(4, 5\)\. Use fewer ranks\."),
        (
            (Block((0, 0), (2, 5), (4, 5)), Block((3, 0), (4, 5), (4, 5))),
            r"split: the blocks \[0:2,0:5\] \[3:4,0:5\] are not a grid of x f32\[4,5\]\. "
            r"Make them with Block\.along or Block\.grid\.",
        ),
        ((Block((0, 0), (3, 5), (4, 5)), Block((1, 0), (4, 5), (4, 5))), "are not a grid of x"),
        ((Block((0, 0), (2, 5), (4, 5)),) * 2, "are not a grid of x"),
        ((Block((0, 0), (2, 3), (4, 5)), Block((2, 3), (4, 5), (4, 5))), "are not a grid of x"),
        (Block.along((4, 5), 0, (0, 2, 3)), "are not a grid of x"),
    ],
)
def test_layouts_that_are_refused(layout: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        split(plain(), 2, {"x": tuple(layout)})


def test_a_layout_of_what_is_no_leaf() -> None:
    with pytest.raises(ShapeError, match="split: dense_1/add_1 is not a leaf; only leaves are given a layout"):
        split(plain(), 2, {"dense_1/add_1": Block.along((4, 3), 0, (0, 2, 4))})
    with pytest.raises(ShapeError, match="plan: it says where 'y' lies, but this graph has no such leaf"):
        split(plain(), 2, {"y": Block.along((4, 3), 0, (0, 2, 4))})


def test_whole_blocks_are_a_layout() -> None:
    graph = plain()
    (part, _) = split(graph, 2, {"x": (Block.all((4, 5)),) * 2})
    assert collectives(part) == []


def test_more_ranks_than_records() -> None:
    with pytest.raises(ShapeError, match=r"plan: x has 4 records for 5 ranks\. Use a larger batch or fewer ranks\."):
        data_parallel(plain(), 5)
    graph = Graph()
    x = graph.leaf("batch", "x", Spec(()))
    graph.outputs["y"] = Relu()(x).id
    with pytest.raises(ShapeError, match="plan: x has 1 records for 2 ranks"):
        data_parallel(graph, 2)


def test_a_rank_that_would_read_padding_only() -> None:
    graph = trace(lambda x: nn.conv(x, 1, 1, padding=((4, 4), 0), bias=False), Spec((1, 3, 3, 1), "float64"))
    feeds = {"x": np.random.default_rng(0).normal(size=(1, 3, 3, 1))}
    (part, *_) = assert_split(graph, 3, {"x": along((1, 3, 3, 1), 1, 1, 2)}, feeds)  # all do everything
    assert part["conv_1/conv_1"].specs == graph["conv_1/conv_1"].specs
    message = r"split: place 0 of 3 would hold nothing of conv_1/conv_1 .*Use fewer ranks"
    with pytest.raises(ShapeError, match=message):
        Plan(3, splits={"conv_1": Split(height=3)}).rank_graphs(graph)


def test_an_op_whose_local_form_is_wrong() -> None:
    class Shorter(Op, abstract=True):
        family = "test_shorter"

        def infer(self, x: Spec) -> Spec:
            return Spec((4, *x.shape[1:]), x.dtype)

        def index(self, x: Spec) -> str:
            return "a b -> a b"

        def reference(self, x: Any) -> Any:
            return x

    graph = Graph()
    x = graph.leaf("batch", "x", Spec((4, 5)))
    graph.outputs["y"] = Shorter()(x).id
    message = (
        r"split: shorter_1 on rank 0 makes f32\[4,5\] but its index formula says \(2, 5\)\. "
        "Correct local or index of shorter"
    )
    with pytest.raises(ShapeError, match=message):
        split(graph, 2, {"x": Block.along((4, 5), 0, (0, 2, 4))})


# collectives -------------------------------------------------------------------------------------------


def test_collectives_in_numbers() -> None:
    x = np.arange(6.0).reshape(2, 3)
    op = AllReduce(ranks=(0, 1), parts=2)
    (a, b), (c, _) = meet({0: (op, (x, x[0])), 1: (op, (x + 1, x[1]))}).values()
    assert np.array_equal(a, 2 * x + 1)
    assert np.array_equal(b, x[0] + x[1])
    assert np.array_equal(a, c)
    left, right = Block.along((2, 3), 1, (0, 1, 3))
    want = ((0, Block.all((2, 3))), (1, Block((1, 0), (2, 3), (2, 3))))
    ops = [Exchange(rank=r, have=(Shard(0, left), Shard(1, right)), want=want, dtype="float64") for r in range(2)]
    (y,), (z,) = meet({0: (ops[0], (x[:, :1],)), 1: (ops[1], (x[:, 1:],))}).values()
    assert np.array_equal(y, x)
    assert np.array_equal(z, x[1:])
    assert np.array_equal(ops[0].run(x[:, :1])[0], [[0, 0, 0], [3, 0, 0]])
    assert [op.sent_bytes() for op in ops] == [8, 32]
    assert AllReduce(ranks=(0, 1, 2)).sent_bytes(Spec((6,), "float64")) == 64


def test_a_receiver_adds_parts_of_a_sum() -> None:
    x, whole = np.arange(6.0).reshape(3, 2), Block.all((3, 2))
    upper, lower = Block.along((3, 2), 0, (0, 2, 3))
    have = (Shard(0, whole, 0), Shard(1, upper, 1), Shard(1, lower, 1))
    ops = [Exchange(rank=r, have=have, want=((0, lower), (2, upper)), dtype="float64") for r in range(3)]
    asks = [(x,), (x[:2] * 10, x[2:] * 10), ()]
    answers = meet({r: (op, ask) for r, (op, ask) in enumerate(zip(ops, asks, strict=True))})
    assert np.array_equal(answers[0][0], 11 * x[2:])
    assert answers[1][0].size == 0
    assert np.array_equal(answers[2][0], 11 * x[:2])


def test_collectives_as_ops() -> None:
    op = AllReduce(ranks=(0, 1), parts=2)
    specs = (Spec((3, 4)), Spec(()))
    assert op.outputs == ("y0", "y1")
    assert op.out_specs(*specs) == specs
    assert op.indexing(*specs).in_place(0, 0)
    assert op.flops(Spec((3, 4)), Spec((5,))) == 17
    assert [y.shape for y in op.run(np.ones((3, 4)), np.ones(()))] == [(3, 4), ()]
    whole = Block.all((3,))
    exchange = Exchange(rank=0, have=(Shard(0, whole),), want=((0, whole), (1, whole)))
    assert (exchange.title, exchange.flops(Spec((3,)))) == ("exchange", 0)
    assert exchange.ranks == (0, 1)
    assert exchange.index(Spec((3,))) == ". -> ."
    assert exchange.out_specs(Spec((3,))) == (Spec((3,)),)
    scalar = Block.all(())
    assert Exchange(rank=0, have=(Shard(0, scalar),), want=((0, scalar),)).index(Spec(())) == "() -> ()"
    assert Exchange(rank=1, have=(Shard(0, whole),), want=((1, whole),)).index() == " -> ."
    assert Exchange(rank=0, have=(Shard(0, whole),), want=((0, whole),)).title == "assemble"


def test_rank_graphs_can_be_printed() -> None:
    for part in data_parallel(step(), 2).rank_graphs(step()):
        assert "all_reduce" in str(part)
        assert part.flops > 0


def test_nodes_equal_on_one_rank_only_are_not_merged() -> None:
    """Two convolutions that differ in their padding behind: alike everywhere but on the last rank."""
    graph = Graph()
    x, w = graph.leaf("batch", "x", Spec((1, 8, 2), "float64")), graph.leaf("param", "w", Spec((3, 2, 2), "float64"))
    for name, behind in (("a", 1), ("b", 2)):
        y = Conv(stride=(1,), padding=((1, behind),), dilation=(1,))(x, w)
        graph.outputs[name] = Relu()(Sum(axes=(0, 1))(y)).id
    rng = np.random.default_rng(0)
    feeds = {"x": rng.normal(size=(1, 8, 2)), "w": rng.normal(size=(3, 2, 2))}
    layouts = {"x": Block.along((1, 8, 2), 1, (0, 3, 6, 8))}
    parts = split(graph, 3, layouts)
    assert parts[0]["conv_1"].op == parts[0]["conv_2"].op
    assert parts[2]["conv_1"].op != parts[2]["conv_2"].op
    assert_split(graph, 3, layouts, feeds)


def test_tails_are_fused_on_all_ranks_or_on_none() -> None:
    """One record of one channel: what is read by all records looks like an operand of the whole shape."""
    graph = trace(lambda x: nn.relu(nn.avg_pool(x, 2, padding=1)), Spec((3, 4, 4, 1), "float64"))
    x = np.random.default_rng(0).normal(size=(3, 4, 4, 1))
    plan = data_parallel(graph, 2)
    assert_split(graph, 2, plan.layouts, {"x": x})
    fused = [node.op.title for node in data_parallel(step(), 2).rank_graphs(step())[1]]
    assert "conv+add+relu" in fused


def test_more_kinds_of_operands() -> None:
    """A gradient without a value that it is like, moments by rows, and pools of sums."""
    graph = Graph()
    x = graph.leaf("batch", "x", Spec((2, 6, 3), "float64"))
    shift = graph.leaf("state", "shift", Spec((3,), "float64"))
    total, squares = Moments()(SumPool(window=(2,), stride=(2,), padding=((0, 0),))(x), shift)
    w = Matmul(ta=True)(Reshape(shape=(18,))(x), Reshape(shape=(18,))(x))
    graph.outputs = {"total": total.id, "squares": squares.id, "w": w.id}
    rng = np.random.default_rng(0)
    feeds = {"x": rng.normal(size=(2, 6, 3)), "shift": rng.normal(size=3)}
    for axis, inner in ((0, (1,)), (1, (1, 5)), (2, (1, 2))):
        assert_split(graph, len(inner) + 1, {"x": along((2, 6, 3), axis, *inner)}, feeds)
    assert_split(graph, 2, {"shift": along((3,), 0, 1)}, feeds)


def test_one_rank_is_not_split() -> None:
    graph = step()
    (part,) = Plan().rank_graphs(graph)
    assert collectives(part) == []
