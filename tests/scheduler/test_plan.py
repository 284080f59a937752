"""Plans are values; what they say about themselves."""

from networks import perceptron, small, step_of, traced

from rapydli_flow import optim
from rapydli_flow.graph import Graph, verify
from rapydli_flow.ops import Relu
from rapydli_flow.scheduler import AllReduce, Exchange, Plan, data_parallel
from rapydli_flow.spec import Block, Spec


def step() -> Graph:
    return step_of(traced(perceptron, Spec((5, 6))), optim.sgd(0.1))


def test_data_parallel_divides_what_is_fed() -> None:
    plan = data_parallel(step(), 3, threads=2)
    assert (plan.ranks, plan.threads) == (3, 2)
    assert [str(block) for block in plan.layouts["x"]] == ["[0:2,0:6]", "[2:4,0:6]", "[4:5,0:6]"]
    assert [str(block) for block in plan.layouts["label"]] == ["[0:2]", "[2:4]", "[4:5]"]
    assert set(plan.layouts) == {"x", "label"}
    assert data_parallel(step(), 3, threads=2) == plan
    assert data_parallel(step(), 5).layouts["label"] == Block.along((5,), 0, range(6))


def test_one_rank_needs_no_layouts() -> None:
    assert data_parallel(step(), 1) == Plan()
    (part,) = Plan().rank_graphs(step())
    assert not any(node.op.collective for node in part)
    graph = Graph()
    graph.outputs["y"] = Relu()(graph.leaf("batch", "x", Spec((1,)))).id
    assert data_parallel(graph, 1) == Plan()


def test_explain() -> None:
    held = "bytes of inputs, 292 of parameters, 0 of state; sends 296 in 1 collectives a step"
    assert data_parallel(step(), 2, threads=4).explain(step()) == "\n".join(
        [
            "2 ranks, 4 thread(s) each",
            "  x: rank 0 [0:3,0:6]  rank 1 [3:5,0:6]",
            "  label: rank 0 [0:3]  rank 1 [3:5]",
            f"  rank 0: 96 {held}; needs 1,408",
            f"  rank 1: 64 {held}; needs 1,280",
        ]
    )
    assert Plan().explain(step()).startswith("1 rank, 1 thread(s) each\n  rank 0: 160 bytes of inputs")


def test_rank_graphs_are_verified_and_alike() -> None:
    graph = step_of(traced(small, Spec((5, 6, 6, 2))), optim.adam(0.1))
    columns = Plan(2, 1, {"x": Block.along((5, 6, 6, 2), 2, (0, 1, 6))})
    for plan in (data_parallel(graph, 4), columns):
        parts = [verify(part) for part in plan.rank_graphs(graph)]
        assert len(parts) == plan.ranks
        assert [set(part.outputs) for part in parts] == [set(graph.outputs)] * plan.ranks
        meetings = [[(n.name, n.op.ranks) for n in part if isinstance(n.op, AllReduce | Exchange)] for part in parts]
        assert meetings == [meetings[0]] * plan.ranks
        if plan is not columns:  # whose first rank has no halo on its left
            assert len({tuple(node.name for node in part) for part in parts}) == 1
            assert not any(isinstance(node.op, Exchange) for part in parts for node in part)
