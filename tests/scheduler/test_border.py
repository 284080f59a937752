"""Maps that lie within what an exchange makes of them: a border around."""

from typing import Any

import pytest

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow import nn, optim
from rapydli_flow.graph import Graph, Tensor
from rapydli_flow.ops import Relu, Reshape, Scale
from rapydli_flow.scheduler import Exchange, Plan, Shard, compile_program
from rapydli_flow.scheduler.border import Inner, borders
from rapydli_flow.scheduler.join import joins
from rapydli_flow.spec import Block, Spec
from rapydli_flow.testing import plans
from rapydli_flow.tuner import Tuning


def network(x: Any) -> Any:
    """A map with two readers, a joined one, and one that is read two rows around."""
    x = nn.relu(nn.conv(x, 8, 3, padding=1))
    x = x + nn.relu(nn.conv(x, 8, 3, padding=1))
    x = nn.concatenate([nn.relu(nn.conv(x, 8, 3, padding=1)), nn.relu(nn.conv(x, 8, 1))])
    x = nn.relu(nn.conv(nn.relu(nn.conv(x, 8, 5, padding=2)), 8, 3, stride=2, padding=1))
    return nn.dense(nn.global_avg_pool(x), 3)


def step_of(x: Spec) -> Graph:
    return rf.train_step(rf.trace(network, x), loss=nn.cross_entropy, optimizer=optim.sgd(0.002, momentum=0.9))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-10)])
def test_one_picture_divided_by_rows_trains_as_a_whole_one(dtype: str, tolerance: float) -> None:
    x, tuning = Spec((1, 24, 8, 8), dtype), Tuning(host())
    step = step_of(x)
    plan = Plan(3, 1, {"x": Block.along(x.shape, 1, (0, 7, 16, 24))})
    for graph in plan.rank_graphs(step):
        inner = {graph.value_name(v) for v in borders(graph)}
        assert {"relu_1", "add_1", "concatenate_1", "grad/relu_3/relu_grad_1"} <= inner
        assert joins(graph, tuning)  # whose whole lies within another value again
    fed = plans.batches(step, 2, 3)
    whole, split = (
        plans.train(plans.programs(step, use, tuning), fed, 6, device=host(), threads=1) for use in (Plan(), plan)
    )
    assert plans.deviation(split, whole) < tolerance


def test_half_of_a_picture_takes_little_more_than_half_of_its_memory() -> None:
    def convolutions(x: Any) -> Any:
        for _ in range(5):
            x = nn.relu(nn.conv(x, 16, 3, padding=1))
        return nn.dense(nn.global_avg_pool(x), 10)

    step = rf.train_step(
        rf.trace(convolutions, rf.Spec((1, 256, 256, 3))), loss=nn.cross_entropy, optimizer=optim.sgd(0.1)
    )
    plan = rf.plan(step, ranks=2, threads=1, strategy="spatial")
    (whole,) = plans.programs(step, Plan(), Tuning(host()))
    assert all(half.arena_bytes < 0.6 * whole.arena_bytes for half in plans.programs(step, plan, Tuning(host())))


# which values -------------------------------------------------------------------------------------------

MAP = (1, 12, 4, 8)  # rows of 128 bytes


def exchanged(have: Block, want: Block, *, part: int = 0) -> tuple[Graph, Tensor, Tensor]:
    """A rank that has one block, which it computes, and wants another; rank 1 has all."""
    graph = Graph()
    x = Scale(by=2.0)(graph.leaf("batch", "x", Spec(have.shape)))
    op = Exchange(rank=0, have=(Shard(0, have), Shard(1, Block.all(have.whole), part)), want=((0, want),))
    y = graph.add(op, (x,), "move")
    graph.outputs["y"] = Relu()(y).id
    return graph, x, y


def rows(lo: int, hi: int, shape: tuple[int, ...] = MAP) -> Block:
    return Block((0, lo, 0, 0), (shape[0], hi, *shape[2:]), shape)


def columns(lo: int, hi: int) -> Block:
    return Block((0, 0, lo, 0), (1, 12, hi, 8), MAP)


@pytest.mark.parametrize(("lo", "hi", "first"), [(4, 9, 0), (3, 8, 128), (2, 9, 256), (4, 8, 0)])
def test_rows_of_one_picture(lo: int, hi: int, first: int) -> None:
    graph, x, y = exchanged(rows(4, 8), rows(lo, hi))
    assert borders(graph) == {x.id: Inner(y.id, first)}
    program = compile_program(graph, Tuning(host()))
    made, move, read = program.steps
    assert made.outs[0].offset == move.outs[0].offset + first
    assert read.outs[0].offset == move.outs[0].offset  # with its border it dies as others do
    assert program.arena_bytes == (4 + hi - lo) * 128


def test_planes_of_a_volume_and_the_row_of_a_plane() -> None:
    whole = (1, 1, 6, 4, 4)
    graph, x, y = exchanged(
        Block((0, 0, 2, 0, 0), (1, 1, 5, 4, 4), whole), Block((0, 0, 1, 0, 0), (1, 1, 6, 4, 4), whole)
    )
    assert borders(graph) == {x.id: Inner(y.id, 64)}


@pytest.mark.parametrize(
    ("have", "want", "part"),
    [
        (columns(0, 2), columns(0, 3), 0),  # not in one piece
        (rows(4, 8, (2, 12, 4, 8)), rows(3, 9, (2, 12, 4, 8)), 0),
        (rows(4, 8, (1, 12, 4, 3)), rows(3, 9, (1, 12, 4, 3)), 0),  # not at 64 bytes
        (rows(4, 8), rows(5, 9), 0),  # some of it is not wanted
        (rows(4, 8), rows(0, 12), 0),  # most of it is of others
        (rows(4, 8), rows(3, 9), 1),  # a sum of it is wanted
    ],
)
def test_what_is_copied(have: Block, want: Block, part: int) -> None:
    graph, _, _ = exchanged(have, want, part=part)
    assert borders(graph) == {}


def test_what_lies_elsewhere_stays_there() -> None:
    def moved(graph: Graph, x: Tensor, name: str = "move") -> Tensor:
        op = Exchange(rank=0, have=(Shard(0, rows(4, 8)), Shard(1, rows(8, 12))), want=((0, rows(4, 9)),))
        return graph.add(op, (x,), name)

    graph = Graph()
    leaf = graph.leaf("batch", "x", Spec((1, 4, 4, 8)))
    moved(graph, leaf, "of a leaf")
    moved(graph, Reshape(shape=(4, 4, 8))(Scale(by=4.0)(leaf)), "of a view")
    replaced = graph.leaf("state", "s", Spec((1, 4, 4, 8)))
    graph.updates["s"] = Scale(by=2.0)(replaced).id
    moved(graph, Scale(by=3.0)(leaf), "first")
    twice = Scale(by=3.0)(leaf)
    first = moved(graph, twice, "one border")
    moved(graph, twice, "another border")
    assert borders(graph)[twice.id].whole == first.id
    assert leaf.id not in borders(graph)


def test_it_is_not_overwritten_while_it_has_a_border() -> None:
    """What reads the map last does not take its place: the border around it would be lost."""
    graph, x, _ = exchanged(rows(4, 8), rows(3, 9))
    graph.outputs = {"z": Relu()(x).id}
    program = compile_program(graph, Tuning(host()))
    _, move, _, last = program.steps
    assert last.outs[0].offset >= move.outs[0].offset + move.outs[0].spec.size_bytes
