"""Runs in mixed precision: overflows are passed over, state is snapshot and goes on, and a card gives the same."""

import warnings

import numpy as np
import pytest
from small_runs import CLASSES, many, same_bits

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.errors import GraphError, NonFinite
from rapydli_flow.runtime.events import read_log
from rapydli_flow.tuner import choice

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


def test_ranks_that_average_go_on_too(step):
    plan = rf.plan(step, ranks=2, strategy="data", average_every=2, threads=1)
    run = rf.fit(step, TOO_MUCH, steps=4, shuffle=False, plan=plan)
    assert all(np.isfinite(value).all() for value in run.state.values())


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
