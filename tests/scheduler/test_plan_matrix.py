"""The matrix of the promise: strategies x networks x ranks, 20 training steps in float64 against one worker.

Programs, arenas (NaN at first), threads and collectives are those of a real run; ops run in NumPy, so that nothing is
compiled. With real kernels: test_promise_in_process.py.
"""

from functools import cache
from importlib import import_module
from typing import Any

import pytest
from matrix import FLAT, NETWORKS, PLANS, RANKS, SHAPE, STOPS, grouped
from networks import batch, step_of

from rapydli_flow import nn, optim
from rapydli_flow.errors import SettingError, ShapeError
from rapydli_flow.graph import Graph, trace
from rapydli_flow.runtime.transport import Alone
from rapydli_flow.scheduler import AllReduce, Collective, Exchange, Plan, Split, make_plan
from rapydli_flow.spec import Spec
from rapydli_flow.testing.plan_matrix import LIMIT, cases, main
from rapydli_flow.testing.plans import Trained, batches, deviation, programs, train

X, STEPS = Spec(SHAPE, "float64"), 20


def combinations() -> list[Any]:
    """Each strategy once in the quick tests, all the others with the slow ones."""
    out = []
    for name in PLANS:
        for n, network in enumerate(NETWORKS):
            for m, ranks in enumerate(RANKS.get(name, (2, 3, 4))):
                if (name, network) not in STOPS | FLAT:
                    quick = m == 0 and n == len(name) % len(NETWORKS)
                    marks = () if quick else pytest.mark.slow
                    out.append(pytest.param(name, network, ranks, marks=marks))
    return out


@cache
def step(network: str) -> Graph:
    return step_of(trace(NETWORKS[network], X), optim.sgd(0.05, momentum=0.9), metrics={"accuracy": nn.accuracy})


@cache
def alone(network: str) -> Trained:
    graph = step(network)
    return train(programs(graph, Plan()), batches(graph, 4, 5), STEPS)


@pytest.mark.parametrize(("name", "network", "ranks"), combinations())
def test_the_matrix(name: str, network: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("rapydli_flow.scheduler.bucket"), "LEAST_BYTES", 1)  # several buckets
    graph, want = step(network), alone(network)
    made = programs(graph, make_plan(graph, ranks, **PLANS[name]))
    assert len(made) == ranks
    run = train(made, batches(graph, 4, 5), STEPS)
    assert deviation(run, want) <= LIMIT
    if ranks > 1:
        meetings = [s.op for program in made for s in program.steps if isinstance(s, Collective)]
        assert any(len(op.ranks) > 1 for op in meetings if isinstance(op, AllReduce | Exchange))
        assert any(op.behind for op in meetings) == ("behind" in name)
    assert want.losses[-4:].mean() < want.losses[:4].mean()


def test_adam_with_clipped_gradients_in_every_strategy() -> None:
    optimizer = optim.clip_norm(optim.adam(0.01, eps=1e-3), 0.5)
    graph = step_of(trace(grouped, X), optimizer)
    fed = batches(graph, 2, 5)
    want = train(programs(graph, Plan()), fed, 6)
    for name, ranks in (("data", 3), ("rows", 2), ("filters", 2), ("pipeline", 2), ("hybrid", 2), ("sharded state", 3)):
        made = programs(graph, make_plan(graph, ranks, **PLANS[name]))
        assert deviation(train(made, fed, 6), want) <= LIMIT, name


# what plans are made of --------------------------------------------------------------------------------


def meetings(graph: Graph, ranks: int, **how: Any) -> list[list[Any]]:
    parts = make_plan(graph, ranks, **how).rank_graphs(graph)
    return [[node.op for node in part if isinstance(node.op, AllReduce | Exchange)] for part in parts]


def test_data_parallel_sums_gradients_once() -> None:
    for ops in meetings(step("chain"), 3):
        assert [op.ranks for op in ops] == [(0, 1, 2)]


def test_rows_exchange_halos_between_neighbours() -> None:
    graph = step_of(trace(lambda x: nn.dense(nn.mean(nn.conv(x, 4, 3, padding=1), (1, 2)), 5), X))
    parts = make_plan(graph, 3, strategy="spatial").rank_graphs(graph)
    (halo,) = [node.op for node in parts[1] if isinstance(node.op, Exchange) and node.name.startswith("x/")]
    rows = {rank: block.shape[1] for rank, block in halo.want}
    assert halo.sent_bytes() == 2 * 8 * 7 * 4 * 8  # one row to each side
    assert rows == {0: 4, 1: 5, 2: 4}


def test_pipelines_pass_on_activations_and_their_gradients() -> None:
    first, last = meetings(step("chain"), 2, strategy="pipeline", micro_batches=4)
    between = [op for op in first if op.want[0][0] != op.have[0].rank]
    assert sum(op.have[0].rank == 0 for op in between) == 4
    assert len(first) == len(last)


def test_a_stage_has_its_layers_only() -> None:
    graph = step("chain")
    first, last = make_plan(graph, 2, strategy="pipeline", micro_batches=4).rank_graphs(graph)
    held = [{leaf.name for leaf in part.leaves("param")} for part in (first, last)]
    assert held[0] | held[1] == {leaf.name for leaf in graph.leaves("param")}
    assert not held[0] & held[1]
    assert "label" not in first
    assert "x" not in last


def test_one_forward_one_backward() -> None:
    graph = step_of(trace(lambda x: nn.dense(nn.conv(nn.relu(nn.conv(x, 4, 3)), 4, 3), 5), X), optim.sgd(0.1))
    splits = {"*": Split(ranks=(1,)), "conv_1": Split(ranks=(0,))}
    plan = make_plan(graph, 2, splits=splits, micro_batches=8)
    first, _ = plan.rank_graphs(graph)
    words = ["B" if "grad" in n.op.title else "F" for n in first if n.op.title.startswith("conv")]
    assert len(words) == 16
    assert words[:3] == ["F", "F", "B"]
    ahead = [words[: i + 1].count("F") - words[: i + 1].count("B") for i in range(len(words))]
    assert max(ahead) == 2  # as many as stages follow, and its own
    assert ahead[-1] == 0


def test_filters_need_less_memory_for_parameters() -> None:
    graph = step("chain")
    whole = programs(graph, Plan())[0]
    parts = programs(graph, make_plan(graph, 2, strategy="filters"))

    def size(program: Any) -> int:
        return sum(program.leaves[name].spec.size for name in program.kind("param", "state"))

    assert sum(map(size, parts)) <= size(whole) + 10  # biases of layers that are whole
    assert max(map(size, parts)) < 0.6 * size(whole)


def test_sharded_state_is_held_once() -> None:
    graph = step("chain")
    made = programs(graph, make_plan(graph, 3, shard="state"))
    held = sum(p.leaves["dense_1/w/momentum"].spec.size for p in made)
    assert held == graph["dense_1/w/momentum"].specs[0].size
    assert all(p.leaves["dense_1/w"].spec == graph["dense_1/w"].specs[0] for p in made)


def test_random_networks_under_random_plans() -> None:
    found = list(cases(5, 12, steps=3))
    assert sum(not case.refused for case in found) >= 8
    assert max(case.deviation for case in found) <= LIMIT


@pytest.mark.slow
def test_more_random_networks_under_random_plans() -> None:
    assert max(case.deviation for case in cases(11, 250)) <= LIMIT


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "4", "--cases", "2", "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 cases, " in out
    assert "the largest deviation is" in out


# errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "how", "message"),
    [
        (2, {"strategy": "modell"}, "plan: strategy='modell' is not one of data, spatial, filters, "),
        (2, {"shard": "all"}, "plan: shard='all' is not one of state, parameters"),
        (2, {"grid": (2, 1)}, "plan: grid is for strategy 'spatial', not 'data'"),
        (2, {"strategy": "data", "stages": 2}, "plan: stages is for strategy 'pipeline', not 'data'"),
        (2, {"strategy": "hybrid", "micro_batches": 2}, "plan: micro_batches is for pipelines and splits, not"),
        (4, {"strategy": "spatial", "grid": (2, 3)}, "plan: a grid of 2x3 needs 6 ranks, not 4"),
        (3, {"strategy": "pipeline", "stages": 2}, "plan: 3 ranks do not go evenly on 2 stages"),
        (2, {"strategy": "pipeline", "micro_batches": 0}, "plan: micro_batches=0 is not 1 or more"),
        (2, {"strategy": "filters", "shard": "state"}, "plan: state is sharded over ranks that all hold it"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing(ranks: int, how: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make_plan(step("chain"), ranks, **how)


@pytest.mark.parametrize(
    ("ranks", "how", "message"),
    [
        (9, {}, "plan: x has 8 records for 9 ranks"),
        (10, {"strategy": "spatial"}, r"plan: x f64\[8,9,7,4\], axis 1: 9 cannot be divided into 10 parts"),
        (8, {"strategy": "spatial", "grid": (2, 2, 2)}, r"plan: x f64\[8,9,7,4\] has 2 spatial axes, not the 3 of"),
        (7, {"strategy": "filters"}, "plan: no layer has 7 filters for 7 ranks"),
        (12, {"strategy": "pipeline"}, "layers cannot be divided into 12 stages"),
        (2, {"splits": {"conv_9": Split(filters=2)}}, "plan: no layer is named 'conv_9'. Nearest: conv_"),
        (2, {"splits": {"dense_1": Split(height=2)}}, "plan: nothing in 'dense_1' can be divided along height"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided(ranks: int, how: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        make_plan(step("chain"), ranks, **how)


@pytest.mark.parametrize(
    ("ranks", "splits", "message"),
    [
        (4, {"conv_1": Split(filters=3)}, r"conv_1/conv_1: 3 parts do not go evenly on 4 ranks \(filters in 3\)"),
        (2, {"conv_1": Split(ranks=(0, 2))}, r"conv_1/conv_1: ranks \(0, 2\) are not different ones of the plan's 2"),
        (2, {"conv_1": Split(height=(0, 5, 5))}, r"conv_1/conv_1: height: \(0, 5, 5\) are no boundaries of 4"),
        (6, {"conv_1": Split(filters=6)}, "conv_1/conv_1: filters: 5 cannot be divided into 6 parts. Use fewer ranks"),
    ],
)
def test_splits_that_do_not_fit(ranks: int, splits: dict[str, Split], message: str) -> None:
    graph = step("chain")
    with pytest.raises(ShapeError, match=message):
        make_plan(graph, ranks, splits=splits).rank_graphs(graph)


def test_a_batch_norm_stops_a_pipeline() -> None:
    graph = step("normal")
    message = (
        r"plan: a micro-batch cannot go through the pipeline without the others: batch_norm_1/.* reads all of them"
    )
    with pytest.raises(ShapeError, match=message):
        make_plan(graph, 2, strategy="pipeline", micro_batches=8).rank_graphs(graph)
    with pytest.raises(ShapeError, match="group_records: 8 records cannot be put into groups of 3"):
        trace(lambda x: nn.batch_norm(x, group=3), X)


def test_plans_are_kept_as_json() -> None:
    graph = step("chain")
    for name, how in PLANS.items():
        plan = make_plan(graph, RANKS.get(name, (2,))[0], **how)
        assert Plan.from_json(plan.to_json()) == plan
    uneven = Plan(2, 1, splits={"conv_1": Split(height=(0, 1, 4), ranks=(1, 0))})
    assert Plan.from_json(uneven.to_json()) == uneven
    fed = batch(X)
    made = programs(graph, uneven)
    one = train(programs(graph, Plan()), [fed], 3)
    assert deviation(train(made, [fed], 3), one) <= LIMIT
    assert Alone().ranks == 1
