"""More ranks than there is to divide: a clear error, or ranks that all have something to do. Never an empty block."""

from functools import cache
from typing import Any

import pytest
from networks import step_of

from rapydli_flow import nn
from rapydli_flow.errors import SettingError, ShapeError
from rapydli_flow.graph import Graph, trace
from rapydli_flow.scheduler import Call, Plan, Split, make_plan
from rapydli_flow.spec import Spec
from rapydli_flow.testing.plan_matrix import LIMIT
from rapydli_flow.testing.plans import batches, deviation, programs, train

X = Spec((6, 7, 5, 3), "float64")  # 6 records of 7 rows; then 4 rows and 6 filters, then 2 rows


def network(x: Any) -> Any:
    x = nn.relu(nn.conv(x, 6, 3, stride=2, padding=1))
    return nn.dense(nn.max_pool(nn.relu(nn.conv(x, 4, 3, padding=1)), 2), 5)


@cache
def step() -> Graph:
    return step_of(trace(network, X))


PLANS: dict[str, dict[str, Any]] = {
    "data": {},
    "data, sharded state": {"shard": "state"},
    "data, sharded parameters": {"shard": "parameters"},
    "rows": {"strategy": "spatial"},
    "rows, sharded parameters": {"strategy": "spatial", "shard": "parameters"},
    "filters": {"strategy": "filters"},
    "channels": {"strategy": "channels"},
    "hybrid": {"strategy": "hybrid"},
    "pipeline": {"strategy": "pipeline", "micro_batches": 2},
}


def of(ranks: int) -> dict[str, dict[str, Any]]:
    """Plans that name a number of parts."""
    return {
        "columns": {"strategy": "spatial", "grid": (1, ranks)},
        "samples of layers": {"splits": {"*": Split(samples=ranks)}},
        "rows of layers": {"splits": {"conv_*": Split(height=ranks)}},
        "filters of layers": {"splits": {"conv_2": Split(filters=ranks)}},
        "channels of layers": {"splits": {"conv_2": Split(channels=ranks)}},
        "micro-batches": {"splits": {"*": Split(samples=ranks)}, "micro_batches": ranks},
        "data and pipeline": {"strategy": "pipeline", "stages": 2, "micro_batches": ranks},
    }


@pytest.mark.parametrize("name", [*PLANS, *of(1)])
def test_no_rank_has_an_empty_block(name: str) -> None:
    done = []
    for ranks in (2, 3, 4, 5, 6, 7, 8, 12):
        try:
            parts = make_plan(step(), ranks, **{**PLANS, **of(ranks)}[name]).rank_graphs(step())
        except (ShapeError, SettingError):
            continue
        done.append(ranks)
        for rank, part in enumerate(parts):
            work = [node for node in part if not node.op.collective]
            assert not [node.name for node in work if any(spec.size == 0 for spec in node.specs)], (ranks, rank)
            assert any(node.inputs for node in work), (ranks, rank)
    assert done


def test_a_rank_that_the_plan_names_nowhere_is_idle() -> None:
    graph, fed = step(), batches(step(), 2, 5)
    made = programs(graph, make_plan(graph, 3, splits={"*": Split(samples=2, ranks=(0, 2))}))
    assert not any(isinstance(part, Call) for part in made[1].steps)
    assert deviation(train(made, fed, 2), train(programs(graph, Plan()), fed, 2)) <= LIMIT


@pytest.mark.parametrize(
    ("name", "ranks", "text"),
    [
        ("data", 7, r"plan: x has 6 records for 7 ranks\. Use a larger batch or fewer ranks"),
        ("data, sharded state", 7, "x has 6 records for 7 ranks"),
        ("data, sharded parameters", 7, "x has 6 records for 7 ranks"),
        ("hybrid", 7, "x has 6 records for 7 ranks"),
        ("rows", 8, r"x f64\[6,7,5,3\], axis 1: 7 cannot be divided into 8 parts\. Use fewer ranks"),
        ("rows, sharded parameters", 8, "axis 1: 7 cannot be divided into 8 parts"),
        ("columns", 6, "axis 2: 5 cannot be divided into 6 parts"),
        ("filters", 7, r"plan: no layer has 7 filters for 7 ranks\. Use fewer ranks"),
        ("channels", 33, r"plan: no layer has 33 channels for 33 ranks\. Use fewer ranks"),
        ("pipeline", 7, "layers cannot be divided into 7 stages"),
        ("data and pipeline", 4, "3 records of a rank cannot be divided into 4 micro-batches. Use fewer, or a larger"),
        ("micro-batches", 3, "2 records of a rank cannot be divided into 3 micro-batches"),
        ("samples of layers", 7, "samples: 6 cannot be divided into 7 parts"),
        ("rows of layers", 5, "conv_1/conv_1: height: 4 cannot be divided into 5 parts"),
        ("filters of layers", 5, "conv_2/conv_1: filters: 4 cannot be divided into 5 parts"),
        ("channels of layers", 7, "conv_2/conv_1: channels: 6 cannot be divided into 7 parts"),
    ],
)
def test_what_cannot_be_divided_so(name: str, ranks: int, text: str) -> None:
    with pytest.raises((ShapeError, SettingError), match=text):
        make_plan(step(), ranks, **{**PLANS, **of(ranks)}[name]).rank_graphs(step())
