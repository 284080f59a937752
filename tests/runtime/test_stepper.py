"""A loop of one's own: the same bits as fit, states that are values, and errors that harm none of them."""

import pickle
import threading

import numpy as np
import pytest
from small_runs import BATCH, CLASSES, make_step, many, records, same_bits

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.data import Feed
from rapydli_flow.errors import DatasetError, DTypeError, NonFinite, RunLost, SettingError, ShapeError
from rapydli_flow.ops import Op
from rapydli_flow.runtime import stepping
from rapydli_flow.runtime import worker as tasks

PLACES = ["alone", "threads", "cluster"]


@pytest.fixture(params=PLACES)
def made(request, step):
    """Makes steppers in one place: (graph) -> stepper; all are closed in the end."""
    steppers = []

    def make(graph=step, **options):
        ranks = 1 if request.param == "alone" else 2
        client = request.getfixturevalue("client") if request.param == "cluster" else None
        steppers.append(rf.stepper(graph, client, plan=many(graph, ranks), **options))
        return steppers[-1]

    yield make
    for stepper in steppers:
        stepper.close()


@pytest.fixture(scope="module")
def batches(data):
    with Feed(data["train"], BATCH, seed=3) as feed:
        yield [feed.batch(i) for i in range(6)]


def walk(step, state, batches):
    metrics = []
    for batch in batches:
        state, numbers = step(state, batch)
        metrics.append(numbers)
    return state, metrics


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_bits_as_fit(step, data, batches, ranks):
    run = rf.fit(step, data["train"], steps=6, plan=many(step, ranks), seed=3)
    with rf.stepper(step, plan=many(step, ranks), seed=3) as own:
        state, metrics = walk(own, own.init(), batches)
        assert state.step == 6
        assert same_bits(dict(state), run.state)
    assert [m["loss"] for m in metrics] == run.scalars["loss"]
    assert [m["accuracy"] for m in metrics] == run.scalars["accuracy"]


def test_the_same_bits_on_a_cluster(step, data, client, batches, monkeypatch):
    run = rf.fit(step, data["train"], steps=6, plan=many(step, 2), seed=3)
    with rf.stepper(step, client, plan=many(step, 2), seed=3) as own:
        state, metrics = walk(own, own.init(), batches[:3])
        monkeypatch.setattr(stepping, "SMALL_BYTES", 0)  # from here on batches are sent before their step
        state, more = walk(own, state, batches[3:])
        assert same_bits(dict(state), run.state)
        assert "2 ranks on workers, ready" in repr(own)
    assert [m["loss"] for m in metrics + more] == run.scalars["loss"]
    assert not any(client.run(lambda: len(tasks._held)).values())


def test_states_are_fetched_when_they_are_looked_at(made, batches, monkeypatch):
    own = made()
    asked = []
    each = own._ranks.each
    monkeypatch.setattr(own._ranks, "each", lambda f, a: asked.append(f.__name__) or each(f, a))
    state, _ = walk(own, own.init(), batches[:3])
    assert "held" not in asked  # nobody looked, and no older state was kept
    assert "on its ranks" in repr(state)
    assert "dense_1/w" in state
    assert len(state) == len(list(state)) == len(own.graph.leaves("param", "state"))
    state["dense_1/w"], state["dense_1/b"]
    assert asked.count("held") == 1
    assert "load" not in asked
    with pytest.raises(ValueError, match="read-only"):
        state["dense_1/w"][...] = 0
    again = pickle.loads(pickle.dumps(state))
    assert again.step == 3
    assert same_bits(dict(again), dict(state))


def test_going_back_in_time(made, batches):
    own = made()
    zero = own.init()
    states, losses = [zero], []
    for batch in batches[:4]:
        state, metrics = own(states[-1], batch)
        states.append(state)
        losses.append(metrics["loss"])
    first = rf.init(own.graph)
    assert same_bits(dict(zero), first)  # an old state can be read after later steps
    for i in (3, 1, 0):  # 3: the one that the ranks hold aside
        state, metrics = own(states[i], batches[i])
        assert (state.step, metrics["loss"]) == (i + 1, losses[i])
        assert same_bits(dict(state), dict(states[i + 1]))
    state, metrics = own(dict(states[0]), batches[0])  # a dict of arrays is of step 0
    assert (state.step, metrics["loss"]) == (1, losses[0])
    rejected, _ = own(state, batches[3])  # a step that is not taken
    taken, metrics = own(state, batches[1])
    assert metrics["loss"] == losses[1]
    assert same_bits(dict(taken), dict(states[2]))
    assert not same_bits(dict(rejected), dict(taken))
    again = own.init()
    assert same_bits(dict(again), first)


def test_states_outlive_their_stepper(step, batches):
    with rf.stepper(step, plan=many(step, 2)) as own:
        first, _ = own(own.init(), batches[0])
        second, _ = own(first, batches[1])
    with rf.stepper(step, plan=many(step, 1)) as other:
        state, _ = other(other.init(), batches[0])
        np.testing.assert_allclose(state["dense_1/w"], first["dense_1/w"], rtol=1e-10)
        moved, _ = other(first, batches[1])
        assert moved.step == second.step == 2
        np.testing.assert_allclose(moved["dense_1/w"], second["dense_1/w"], rtol=1e-10)
    with pytest.raises(SettingError, match=r"step: this stepper is closed. Make another with rf.stepper"):
        own(second, batches[2])
    assert "closed" in repr(own)
    assert not [t for t in threading.enumerate() if t.name.startswith("rapydli-rank")]


def test_evaluate_predict_save_and_load(step, data, batches, tmp_path):
    with rf.stepper(step) as own:
        state, _ = walk(own, own.init(), batches[:2])
        metrics = rf.evaluate(step, state, data["test"])
        assert metrics == rf.evaluate(step, dict(state), data["test"])
        wanted = rf.predict(step.network, state, data["test"]).compute()
        rf.save_model(tmp_path / "model", step.network, state)
        model = rf.load_model(tmp_path / "model")
        np.testing.assert_array_equal(model.predict(data["test"]).compute(), wanted)
        assert rf.probe(step, "loss", batches[2], state=state, step=2)["loss"] == own(state, batches[2])[1]["loss"]
        onward = own.init(model.state, step=2)
        assert onward.step == 2
        fresh = rf.init(step)
        assert len(model.state) < len(onward)
        for name, array in onward.items():
            np.testing.assert_array_equal(array, model.state.get(name, fresh[name]))
        assert own.init(onward).step == 2
        own(onward, batches[2])


def test_batches_that_do_not_fit(made, batches):
    own = made()
    state, _ = own(own.init(), batches[0])
    batch = batches[1]
    for wrong, error, text in [
        ({"x": batch["x"]}, SettingError, r"step: label \(i64\[8\]\) is not fed; the batch has x"),
        (batch | {"weight": 1}, SettingError, "step: weight is no input of the graph; its inputs are x, label"),
        (
            batch | {"x": batch["x"][:7]},
            ShapeError,
            r"step: x is fed float64 \(7, 6, 6, 2\) but the graph takes float64",
        ),
        (
            batch | {"label": batch["label"] * 1.0},
            DTypeError,
            "step: label is fed float64 .* but the graph takes int64",
        ),
        (batch | {"label": batch["label"] + CLASSES}, DatasetError, "label . at record 0 of 'label' is outside 0..4"),
        (batch["x"], SettingError, r"step: a batch is a dict of arrays \(x, label\), not ndarray"),
    ]:
        with pytest.raises(error, match=text):
            own(state, wrong)
    with rf.stepper(own.graph, plan=own.plan) as other:
        wanted = walk(other, other.init(), batches[:2])[0]
        assert same_bits(dict(own(state, batch)[0]), dict(wanted))


def test_states_that_do_not_fit(step, batches):
    with rf.stepper(step) as own:
        state = dict(own.init())
        for wrong, error, text in [
            (own(state, batches[0]), SettingError, "step: the state is tuple, .* state, metrics = step"),
            ({}, SettingError, "the state has no 'conv_1/w'; it has nothing"),
            (
                state | {"conv_9/w": 0},
                SettingError,
                "the training step has no conv_9/w. Is the state another network's",
            ),
            (state | {"dense_1/b": np.zeros(3)}, SettingError, r"state 'dense_1/b' has shape \(3,\)"),
            (
                state | {"dense_1/b": np.zeros(CLASSES, complex)},
                DTypeError,
                "state 'dense_1/b' is complex128, not float64",
            ),
        ]:
            with pytest.raises(error, match=text):
                own(wrong, batches[1])
        with pytest.raises(SettingError, match=r"rate_factor=0.5, but no optimizer of this training step reads it"):
            own(state, batches[0], rate_factor=0.5)


def test_a_loss_that_is_not_finite(made, batches):
    own = made()
    state, _ = own(own.init(), batches[0])
    bad = batches[1] | {"x": np.full_like(batches[1]["x"], np.inf)}
    with pytest.raises(NonFinite, match=r"loss is nan at step 1. The first output .* conv_1.*The step was undone"):
        own(state, bad)
    with rf.stepper(own.graph, plan=own.plan) as other:
        wanted = walk(other, other.init(), batches[:2])[0]
        assert same_bits(dict(own(state, batches[1])[0]), dict(wanted))


class Breaks(Op):
    """Itself, until there is a negative first element."""

    def infer(self, x):
        return x

    def reference(self, x):
        if x.flat[0] < 0:
            raise RuntimeError("it broke")
        return x.copy()

    def vjp(self, dy, y, x):
        return (dy,)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_error_in_the_middle_of_a_step_is_undone(ranks):
    net = rf.trace(lambda x: nn.dense(Breaks()(x), 2), rf.Spec((4, 3), "float64"))
    graph = rf.train_step(net, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))
    batch = {"x": np.ones((4, 3)), "label": np.arange(4) % 2}
    with rf.stepper(graph, plan=many(graph, ranks)) as own, rf.stepper(graph, plan=many(graph, ranks)) as other:
        state, _ = own(own.init(), batch)
        with pytest.raises(RuntimeError, match="it broke"):
            own(state, batch | {"x": -batch["x"]})
        wanted = walk(other, other.init(), [batch, batch])[0]
        assert same_bits(dict(own(state, batch)[0]), dict(wanted))


def test_a_stepper_whose_ranks_are_lost(client, step, batches):
    with rf.stepper(step, client, plan=many(step, 2)) as own:
        kept, _ = own(own.init(), batches[0])
        kept["dense_1/w"]
        state, _ = own(kept, batches[1])
        client.run(tasks.release, own._ranks.cluster.job.run)
        with pytest.raises(RunLost, match="is not on this worker any more"):
            own(state, batches[2])
        for use in (lambda: own(state, batches[2]), lambda: state["dense_1/w"]):
            with pytest.raises(RunLost, match=r"the ranks stopped in the middle of a step .* Make another stepper"):
                use()
        assert np.isfinite(kept["dense_1/w"]).all()


def test_a_factor_of_the_rate(batches):
    net = rf.trace(lambda x: nn.dense(nn.mean(x, axes=(1, 2)), CLASSES), rf.Spec((BATCH, 6, 6, 2), "float64"))
    step = rf.train_step(net, loss=nn.cross_entropy, optimizer=optim.sgd(optim.adjustable(0.1)))
    with rf.stepper(step) as own:
        zero = own.init()
        one, half = (own(zero, batches[0], rate_factor=factor)[0] for factor in (1.0, 0.5))
        moved = one["dense_1/w"] - zero["dense_1/w"]
        np.testing.assert_allclose(half["dense_1/w"] - zero["dense_1/w"], moved / 2, rtol=1e-10)


def test_what_is_not_a_training_step(step):
    with pytest.raises(SettingError, match=r"stepper: this graph is not a training step; make one with rf.train_step"):
        rf.stepper(step.network)
    with pytest.raises(SettingError, match="stepper: transport='pigeon' is not one of auto, shared, comm"):
        rf.stepper(step, transport="pigeon")


def test_float32_records_of_another_dtype(data):
    step = make_step(dtype="float32")
    batch = {name: array[:BATCH] for name, array in records().items()}  # float64
    with rf.stepper(step) as own:
        state, _ = own(own.init(), batch)
        assert state["conv_1/w"].dtype == np.float32
