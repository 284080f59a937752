"""Runs in mixed precision: overflows are passed over, state is snapshot and goes on, and a card gives the same."""

import warnings

import numpy as np
import pytest
from small_runs import CLASSES, many, same_bits

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.errors import GraphError, NonFinite
from rapydli_flow.runtime.devices import device_of
from rapydli_flow.runtime.events import read_log
from rapydli_flow.spec import HALVES
from rapydli_flow.tuner import Tuning, choice

pytestmark = pytest.mark.filterwarnings("ignore:NumPy computes with", "ignore:no GPU kernel serves")
RNG = np.random.default_rng(0)
DATA = {"x": RNG.normal(size=(16, 6)).astype(np.float32), "label": RNG.integers(0, CLASSES, 16)}
TOO_MUCH = {**DATA, "x": np.where(np.arange(16)[:, None] == 5, np.float32(3e38), DATA["x"])}  # no half holds it


def perceptron(x):
    return nn.dense(nn.relu(nn.dense(x, 8)), CLASSES)


def step_of(precision="float16", *, start=1024.0, **more):
    graph = rf.trace(perceptron, rf.Spec((4, 6)))
    how = {"optimizer": optim.adam(0.02), "precision": precision}
    how |= {"loss_scale": rf.LossScale(start=start, every=3)} if precision == "float16" else {}
    return rf.train_step(graph, loss=nn.cross_entropy, **{**how, **more})


@pytest.fixture(scope="module")
def step():
    return step_of()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("granularity", ["segment", "op"])
def test_a_run_goes_on_after_an_overflow_in_the_forward_pass(step, granularity, ranks, tmp_path):
    run = rf.fit(
        step, TOO_MUCH, steps=8, shuffle=False, plan=many(step, ranks), granularity=granularity, run_dir=tmp_path
    )
    assert [i for i, loss in enumerate(run.scalars["loss"]) if not np.isfinite(loss)] == [1, 5]
    assert run.scalars["loss_scale"] == [1024.0, 512.0, 512.0, 512.0, 1024.0, 512.0, 512.0, 512.0]
    assert run.state["loss_scale/updates"] == 6
    assert all(np.isfinite(value).all() for value in run.state.values())
    assert len(read_log(tmp_path / "metrics.jsonl")) > 8


def test_what_is_passed_over_leaves_no_trace(step):
    with rf.stepper(step, plan=many(step, 1)) as advance:
        good, bad = ({k: v[i : i + 4] for k, v in TOO_MUCH.items()} for i in (0, 4))
        first, _ = advance(advance.init(), good)
        after, told = advance(first, bad)
        assert not np.isfinite(told["loss"])
        assert told["loss_scale"] == 512.0
        for name, value in first.items():
            if name not in ("loss_scale/scale", "loss_scale/row"):
                np.testing.assert_array_equal(after[name], value, err_msg=name)


@pytest.mark.parametrize("granularity", ["segment", "op"])
def test_a_scale_that_fell_as_far_as_it_may_ends_the_run(granularity):
    step = step_of(start=2.0)
    message = r"loss is nan at step 1, and its scale has fallen to 1\. The first output .* at step 1\. .*bfloat16"
    with pytest.raises(NonFinite, match=message):
        rf.fit(step, TOO_MUCH, steps=8, shuffle=False, plan=many(step, 1), granularity=granularity)


def test_an_overflow_that_was_skipped_is_not_taken_for_the_one_that_ends_the_run():
    twice = {**DATA, "x": np.where(np.isin(np.arange(16), (5, 9))[:, None], np.float32(3e38), DATA["x"])}
    step = step_of(start=4.0)
    with pytest.raises(NonFinite, match=r"loss is nan at step 2, .* at step 2\. "):
        rf.fit(step, twice, steps=4, shuffle=False, plan=many(step, 1))


@pytest.mark.parametrize("scale", [None, 64.0])
def test_without_a_scale_that_moves_an_overflow_ends_the_run(scale):
    step = step_of("bfloat16", loss_scale=scale)
    with pytest.raises(NonFinite, match=r"loss is nan at step 1\. The first output"):
        rf.fit(step, TOO_MUCH, steps=8, shuffle=False, plan=many(step, 1))


@pytest.mark.parametrize("how", [{"average_every": 2}, {"staleness": 0}, {"staleness": 1}], ids=str)
def test_ranks_that_do_not_wait_for_each_other_go_on_too(step, how):
    plan = rf.plan(step, ranks=2, strategy="data", threads=1, **how)
    run = rf.fit(step, TOO_MUCH, steps=8, shuffle=False, plan=plan)
    assert np.isfinite(run.scalars["loss"]).tolist() == [True, False, True, True, True, False, True, True]
    assert all(np.isfinite(value).all() for value in run.state.values())
    with pytest.raises(NonFinite, match=r"loss .* is (not finite|nan) at step 1, and its scale has fallen to 1\."):
        rf.fit(step_of(start=2.0), TOO_MUCH, steps=8, shuffle=False, plan=plan)


def test_updates_that_wait_for_all_are_those_of_one_worker(step):
    """The loss is handed to those that update, as gradients are."""
    want = rf.fit(step, TOO_MUCH, steps=8, shuffle=False, plan=many(step, 1))
    plan = rf.plan(step, ranks=2, strategy="data", threads=1, staleness=0)
    run = rf.fit(step, TOO_MUCH, steps=8, shuffle=False, plan=plan)
    assert run.state["loss_scale/updates"] == want.state["loss_scale/updates"] == 6
    assert run.state["loss_scale/scale"] == want.state["loss_scale/scale"]
    np.testing.assert_allclose(run.state["dense_1/w"], want.state["dense_1/w"], atol=0.01)


def test_a_metric_cannot_be_called_as_the_scale():
    with pytest.raises(GraphError, match="a metric is called loss_scale"):
        step_of(metrics={"loss_scale": nn.accuracy})


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_snapshot_goes_on_to_the_same_bits(step, ranks, tmp_path):
    plan = many(step, ranks)
    whole = rf.fit(step, DATA, steps=11, plan=plan)
    rf.fit(step, DATA, steps=6, plan=plan, run_dir=tmp_path, snapshot_every=5)
    run = rf.fit(step, DATA, steps=11, plan=plan, run_dir=tmp_path, snapshot_every=5, resume=True)
    assert same_bits(run.state, whole.state)
    assert run.state["loss_scale/scale"] == 2.0**13  # three times three updates


def test_that_a_processor_is_slow_with_halves_is_said_once():
    choice._warn_of_halves.cache_clear()
    step = step_of("bfloat16")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            rf.fit(step, DATA, steps=1, plan=many(step, 1))
    assert [str(w.message)[:29] for w in seen if "NumPy" in str(w.message)] == ["NumPy computes with bfloat16 "]


def test_that_is_not_said_of_a_run_on_a_card():
    choice._warn_of_halves.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        rf.fit(step_of("bfloat16"), DATA, steps=1, device="emulated")
    assert [str(w.message) for w in seen if "NumPy" in str(w.message)] == []


@pytest.mark.parametrize(("precision", "near"), [("tf32", 1e-6), ("bfloat16", 0.02), ("float16", 0.003)])
def test_a_perceptron_in_each_precision(precision, near):
    wanted = rf.fit(step_of("float32"), DATA, steps=24, plan=many(step_of("float32"), 1))
    step = step_of(precision)
    run = rf.fit(step, DATA, steps=24, plan=many(step, 1))
    np.testing.assert_allclose(run.scalars["loss"], wanted.scalars["loss"], atol=near)
    assert run.scalars["loss"][-1] < 0.8 * run.scalars["loss"][0]


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_a_network_in_another_precision_predicts(half):
    step = step_of("float32")
    run = rf.fit(step, DATA, steps=4, plan=many(step, 1))
    wanted = rf.predict(run.graph, run.state, DATA["x"]).compute()
    found = rf.predict(rf.precision(run.graph, half), run.state, DATA["x"]).compute()
    assert found.dtype == np.float32
    assert 0.0 < np.abs(found - wanted).max() < 0.03


# the other ways to run it -------------------------------------------------------------------------------

PICTURES = {"x": RNG.normal(size=(8, 6, 6, 3)).astype(np.float32), "label": RNG.integers(0, CLASSES, 8)}


def convolutional(x):
    x = nn.relu(nn.batch_norm(nn.conv(x, 8, 3, padding=1, bias=False)))
    x = nn.relu(nn.conv(nn.max_pool(x, 2), 8, 3, padding=1))
    return nn.dense(nn.avg_pool(x, 3), CLASSES)


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def mixed(request):
    graph = rf.trace(convolutional, rf.Spec((4, 6, 6, 3)))
    optimizer = optim.sgd(0.05, momentum=0.9)
    return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optimizer, precision=request.param)


@pytest.mark.parametrize(
    "how",
    [
        {"strategy": "data"},
        {"strategy": "spatial"},
        {"strategy": "filters"},
        {"strategy": "pipeline", "micro_batches": 2},
        {"strategy": "data", "shard": "parameters"},
        {"strategy": "data", "wire": "bfloat16"},
    ],
    ids=str,
)
def test_halves_travel_between_workers(client, mixed, how):
    """Rows of a neighbour, filters of others, activations of the stage before, weights that another rank keeps: to the
    bits of ranks in one process."""
    plan = rf.plan(mixed, ranks=2, threads=1, **how)
    sent = {node.specs[0].dtype for part in plan.rank_graphs(mixed) for node in part if node.op.collective}
    assert bool(sent & set(HALVES)) == (how["strategy"] != "data" or "shard" in how)
    want = rf.fit(mixed, PICTURES, steps=4, plan=plan)
    one = rf.fit(mixed, PICTURES, steps=4, plan=many(mixed, 1))
    np.testing.assert_allclose(want.scalars["loss"], one.scalars["loss"], rtol=0.05)
    for transport in ("shared", "comm"):
        run = rf.fit(mixed, PICTURES, steps=4, plan=plan, client=client, transport=transport)
        assert same_bits(run.state, want.state)


def test_a_card_gives_what_a_processor_gives(mixed):
    """Every op of halves has a kernel; what they store is rounded as NumPy rounds it, up to the order of sums."""
    cpu, card = (rf.fit(mixed, PICTURES, steps=4, validation=PICTURES, device=name) for name in ("cpu", "emulated"))
    np.testing.assert_allclose(card.scalars["loss"], cpu.scalars["loss"], rtol=0.01)
    np.testing.assert_allclose(card.metrics["loss"], cpu.metrics["loss"], rtol=0.01)
    for name, value in cpu.state.items():
        np.testing.assert_allclose(card.state[name], value, atol=0.02 * max(1.0, np.abs(value).max()), err_msg=name)
    (program,) = many(mixed, 1).programs(mixed, Tuning(device_of("emulated")))
    assert [call.title for call in program.steps if call.choice.reference] == []
    scores = [rf.predict(run.graph, run.state, PICTURES["x"], device="emulated").compute() for run in (cpu, card)]
    np.testing.assert_allclose(*scores, atol=0.05)


def test_a_card_passes_over_an_overflow(step):
    cpu, card = (rf.fit(step, TOO_MUCH, steps=4, shuffle=False, device=name) for name in ("cpu", "emulated"))
    assert np.isfinite(card.scalars["loss"]).tolist() == [True, False, True, True]
    assert card.scalars["loss_scale"] == cpu.scalars["loss_scale"]
    for name, value in cpu.state.items():
        np.testing.assert_allclose(card.state[name], value, atol=0.01, err_msg=name)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_predictions_of_halves_are_counted(half):
    graph = rf.trace(perceptron, rf.Spec((4, 6), half))
    found = rf.confusion_matrix(graph, rf.init(graph), {**DATA, "x": DATA["x"].astype(half)})
    assert found.total == 16
