"""The promise: any plan computes the training run of one rank, up to rounding. Real kernels, ranks as threads.

Memory holds NaN at first, so nothing that was not written can be read.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest
from networks import step_of

from cpu_kernels.compile import host
from rapydli_flow import nn, optim
from rapydli_flow.errors import RunLost, SettingError
from rapydli_flow.graph import Graph, trace
from rapydli_flow.runtime.rank import Rank
from rapydli_flow.runtime.transport import CHUNK_BYTES, Threads, swap_bytes
from rapydli_flow.scheduler import Collective, Plan, Program, data_parallel
from rapydli_flow.spec import Array, Block, Spec
from rapydli_flow.testing import plans
from rapydli_flow.testing.plans import Trained
from rapydli_flow.tuner import Tuning

BATCH, SHAPE, CLASSES, SEED = 5, (5, 8, 6, 2), 3, 7
FILTERS = (3, 3, 2, 4)


def network(x: Any, rate: float = 0.3) -> Any:
    x = nn.max_pool(nn.relu(nn.batch_norm(nn.conv(x, 4, 3, padding=1, bias=False))), 2)
    if rate:
        x = nn.dropout(x, rate)
    return nn.dense(nn.avg_pool(x, 3, stride=1, padding=(0, 1)), CLASSES)


def without_dropout(x: Any) -> Any:
    return network(x, 0.0)


@cache
def step(dtype: str = "float64", dropout: bool = True, gradients: bool = False) -> Graph:
    graph = trace(network if dropout else without_dropout, Spec(SHAPE, dtype))
    if gradients:
        return step_of(graph)
    return step_of(graph, optim.sgd(0.05, momentum=0.9), metrics={"accuracy": nn.accuracy})


@cache
def programs(plan: str, dtype: str = "float64", dropout: bool = True, gradients: bool = False) -> tuple[Program, ...]:
    graph = step(dtype, dropout, gradients)
    return plans.programs(graph, plan_of(plan, graph), Tuning(host()))


def plan_of(name: str, graph: Graph) -> Plan:
    def along(axis: int, ranks: int) -> dict[str, Any]:
        size = SHAPE[axis]
        return {"x": Block.along(SHAPE, axis, [-(-size * r // ranks) for r in range(ranks + 1)])}

    two = data_parallel(graph, 2).layouts
    filters = Block.along(FILTERS, 3, (0, 3, 4))
    return {
        "1 rank": data_parallel(graph, 1),
        "2 ranks": data_parallel(graph, 2),
        "3 ranks": data_parallel(graph, 3),
        "rows": Plan(2, 1, along(1, 2)),
        "columns": Plan(3, 1, along(2, 3)),
        "filters": Plan(2, 1, {"conv_1/w": filters, "conv_1/w/momentum": filters}),
        "sharded state": Plan(
            2, 1, {**two, "conv_1/w/momentum": filters, "dense_1/b/momentum": Block.along((3,), 0, (0, 2, 3))}
        ),
    }[name]


@cache
def data(dtype: str) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(4, *SHAPE)).astype(dtype), rng.integers(0, CLASSES, (4, BATCH))


def train(made: tuple[Program, ...], steps: int, order: Any = None, threads: int = 1) -> Trained:
    """Train all ranks of a plan with real kernels, each in a thread of its own."""
    xs, labels = data(made[0].leaves["x"].spec.dtype)
    order = np.arange(BATCH) if order is None else order
    fed = [{"x": x[order], "label": label[order]} for x, label in zip(xs, labels, strict=True)]
    return plans.train(made, fed, steps, device=host(), threads=threads)


@cache
def alone(dtype: str = "float64", steps: int = 200, dropout: bool = True) -> Trained:
    return train(programs("1 rank", dtype, dropout), steps)


def assert_same_run(run: Trained, want: Trained, tolerance: float) -> None:
    n = len(run.losses)
    assert run.losses == pytest.approx(want.losses[:n], rel=tolerance, abs=0)
    if n == len(want.losses):
        for name, value in want.state.items():
            assert np.abs(run.state[name] - value).max() <= tolerance * max(1.0, np.abs(value).max()), name


def test_one_rank_learns() -> None:
    losses = alone().losses
    assert np.isfinite(losses).all()
    assert losses[-20:].mean() < 0.5 * losses[:4].mean()
    assert all(np.isfinite(value).all() for value in alone().state.values())
    assert not any(call.choice.reference for call, *_ in [(s,) for s in programs("1 rank")[0].steps])


@pytest.mark.parametrize("plan", [pytest.param("2 ranks", marks=pytest.mark.slow), "3 ranks"])
def test_samples_that_do_not_divide_evenly(plan: str) -> None:
    made = programs(plan)
    rows = [program.layout["x"].shape[0] for program in made]
    assert rows == {"2 ranks": [3, 2], "3 ranks": [2, 2, 1]}[plan]
    assert_same_run(train(made, 200), alone(), 1e-10)


@pytest.mark.parametrize(
    "plan", ["rows", *(pytest.param(plan, marks=pytest.mark.slow) for plan in ("columns", "filters")), "sharded state"]
)
def test_other_splits(plan: str) -> None:
    made = programs(plan)
    run = train(made, 20)
    assert_same_run(run, alone(steps=20), 1e-10)
    assert any(isinstance(s, Collective) for s in made[0].steps)
    assert len({tuple(s.name for s in program.steps if isinstance(s, Collective)) for program in made}) == 1
    assert not any(np.isnan(value).any() for value in run.state.values())


def test_several_threads_give_the_same_bits() -> None:
    run = train(programs("2 ranks"), 20, threads=2)
    again = train(programs("2 ranks"), 20)
    assert np.array_equal(run.losses, again.losses)
    assert all(np.array_equal(run.state[name], value) for name, value in again.state.items())


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["2 ranks", "3 ranks"])
def test_float32_gradients(plan: str) -> None:
    one, several = (train(programs(p, "float32", False, True), 1) for p in ("1 rank", plan))
    names = [name for name in one.outputs if name.startswith("d ")]
    assert len(names) == 5
    for name in names:
        off = np.linalg.norm(several.outputs[name] - one.outputs[name])
        assert 0 <= off <= 1e-5 * np.linalg.norm(one.outputs[name]), name
        assert np.linalg.norm(one.outputs[name]) > 0


@pytest.mark.slow
def test_float32_losses_deviate_no_more_than_other_orders_of_one_batch() -> None:
    """The same records in another order change only the order of sums (there is no dropout here)."""
    steps = 30
    one = alone("float32", steps, False)

    def deviation(run: Trained) -> float:
        return float(np.abs(run.losses / one.losses - 1).max())

    orders = [np.random.default_rng(i).permutation(BATCH) for i in range(1, 6)]
    spread = max(deviation(train(programs("1 rank", "float32", False), steps, order)) for order in orders)
    assert 0 < spread < 1e-3
    for plan in ("2 ranks", "3 ranks"):
        assert deviation(train(programs(plan, "float32", False), steps)) <= 5 * spread, plan


# a rank alone ------------------------------------------------------------------------------------------


def ready(plan: str = "1 rank") -> Rank:
    rank = Rank(programs(plan)[0], host(), poison=True)
    rank.start(SEED)
    xs, labels = data("float64")
    rank.feed({"x": xs[0], "label": labels[0]})
    return rank


def test_a_timed_step_gives_the_same_numbers() -> None:
    a, b = ready(), ready()
    scalars, times = b.step_timed(SEED, 0)
    assert scalars == a.step(SEED, 0)
    assert [took.name for took in times] == [s.name for s in b.program.steps]
    assert all(took.time_s >= 0 for took in times)
    assert sum(took.time_s for took in times) > 0
    ends = [took.begin_s + took.time_s for took in times]
    assert all(end <= took.begin_s + 1e-6 for end, took in zip(ends, times[1:], strict=False))  # one after the other
    c = ready()
    assert c.first_nonfinite(SEED, 0) is None
    assert c.scalars() == scalars


def test_the_first_node_that_is_not_finite_is_named() -> None:
    rank = ready()
    rank.leaf("dense_1/b")[...] = np.inf
    at = rank.first_nonfinite(SEED, 0)
    assert at is not None
    assert rank.describe(at).startswith("dense_1/add_1 (matmul+add, f64[5,3]")


def test_state_moves_between_plans() -> None:
    rank, other = ready(), Rank(programs("filters")[1], host(), poison=True)
    rank.step(SEED, 0)
    state = rank.state()
    other.load(state)
    assert np.array_equal(other.leaf("conv_1/w"), state["conv_1/w"][..., 3:])
    assert other.block("conv_1/w") == Block((0, 0, 0, 3), FILTERS, FILTERS)
    again = Rank(programs("filters")[1], host())
    again.load(other.state(), whole=False)
    assert all(np.array_equal(again.state()[name], value) for name, value in other.state().items())
    with pytest.raises(SettingError, match="the state has no 'conv_1/w'; it has nothing"):
        rank.load({})
    with pytest.raises(SettingError, match=r"state 'conv_1/w' has shape \(2,\) but the network expects \(3, 3, 2, 4\)"):
        rank.load({**state, "conv_1/w": np.zeros(2)})
    with pytest.raises(SettingError, match=r"feed: x has shape \(4, 8, 6, 2\) but the program takes \(5, 8, 6, 2\)"):
        rank.feed({"x": np.zeros((4, 8, 6, 2)), "label": np.zeros(5, np.int64)})
    rank.close()


def test_a_rank_that_leaves_ends_the_run_for_all() -> None:
    one, two = Threads.of(2, timeout_s=30.0)
    two.close()
    with pytest.raises(RunLost, match="rank 0: another rank of this process stopped"):
        one.share("a test", b"")
    assert swap_bytes(programs("1 rank")[0], 1, CHUNK_BYTES) == 0
    assert swap_bytes(programs("2 ranks")[0], 2, CHUNK_BYTES) > 8 * np.prod(FILTERS)
