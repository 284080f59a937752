"""What users get wrong: arguments of the wrong kind get one clear error, as near to the mistake as can be."""

import json

import numpy as np
import pytest

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.errors import GraphError, SettingError


def network(x):
    return nn.dense(nn.relu(nn.conv(x, 4, 3, padding=1)), 3)


@pytest.fixture(scope="module")
def graph():
    return rf.trace(network, rf.Spec((4, 6, 6, 1)))


@pytest.fixture(scope="module")
def step(graph):
    return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(8, 6, 6, 1)).astype("float32"), "label": rng.integers(0, 3, 8)}


def test_a_shape_is_not_a_spec():
    with pytest.raises(GraphError, match=r"trace: x is given as \(4, 6, 6, 1\), not a Spec\. Write rf\.Spec"):
        rf.trace(network, (4, 6, 6, 1))


def test_names_are_not_functions(graph):
    with pytest.raises(GraphError, match=r"train_step: loss is 'mse', not a function such as nn\.cross_entropy"):
        rf.train_step(graph, loss="mse", optimizer=optim.sgd(0.1))
    with pytest.raises(GraphError, match=r"train_step: optimizer is 'adam', not a function"):
        rf.train_step(graph, loss=nn.cross_entropy, optimizer="adam")
    with pytest.raises(SettingError, match=r"learning rate: '0\.1' is not a number, or a rule"):
        optim.sgd("0.1")


def test_means_take_one_axis_or_several_also_from_the_end():
    def means(x):
        return {"a": nn.mean(x, 1), "b": nn.mean(x, (-2, -1)), "c": 2.0 / x}

    made = rf.trace(means, rf.Spec((2, 3, 4), "float64"))
    x = np.random.default_rng(0).uniform(1.0, 2.0, (2, 3, 4))
    got = rf.compile(made, {"x": x}).compute(scheduler="sync")
    np.testing.assert_allclose(got["a"], x.mean(1))
    np.testing.assert_allclose(got["b"], x.mean((1, 2)))
    np.testing.assert_allclose(got["c"], 2.0 / x)


def test_division_of_what_is_not_a_number():
    def ratio(x):
        return "one" / x

    with pytest.raises(TypeError, match="unsupported operand"):
        rf.trace(ratio, rf.Spec((2, 3)))


def test_a_model_needs_its_whole_state(tmp_path, graph, step, arrays):
    state = rf.init(graph)
    with pytest.raises(SettingError, match=r"the state has no 'conv_1/b'; it has "):
        rf.save_model(tmp_path / "a", graph, {k: v for k, v in state.items() if k != "conv_1/b"})
    with pytest.raises(SettingError, match=r"state 'conv_1/b' has shape \(5,\) but the network expects \(4,\)"):
        rf.save_model(tmp_path / "a", graph, {**state, "conv_1/b": np.zeros(5, "float32")})
    with pytest.raises(SettingError, match=r"the state has no 'conv_1/w'; it has nothing"):
        rf.predict(graph, {}, arrays["x"])


def test_a_training_step_is_not_a_network(tmp_path, step, arrays):
    state = rf.init(step)
    with pytest.raises(SettingError, match=r"save_model: this graph is a training step; give its network"):
        rf.save_model(tmp_path / "a", step, state)
    with pytest.raises(SettingError, match=r"predict: this graph is a training step; give its network"):
        rf.predict(step, state, arrays["x"])


def test_data_of_another_kind(step, arrays):
    with pytest.raises(SettingError, match=r"data is tuple, not a dataset or a dict of arrays"):
        rf.fit(step, (arrays["x"], arrays["label"]), steps=1)
    with pytest.raises(SettingError, match=r"data is str, not a dataset or a dict of arrays"):
        rf.evaluate(step, rf.init(step), "records.zarr")


def test_evaluate_takes_a_dict_as_fit_does(step, arrays):
    metrics = rf.evaluate(step, rf.init(step), arrays)
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    ("ask", "how", "said"),
    [
        ("plan", {"ranks": 0}, "plan: ranks=0 is not 1 or more."),
        ("plan", {"ranks": True}, "plan: ranks=True is not a whole number."),
        ("plan", {"ranks": 2.5}, "plan: ranks=2.5 is not a whole number."),
        ("plan", {"threads": 0}, "plan: threads=0 is not 1 or more."),
        ("plan", {"threads": "a"}, "plan: threads='a' is not a whole number."),
        ("plan", {"strategy": "pipeline", "stages": True}, "plan: stages=True is not a whole number."),
        ("plan", {"staleness": 1.5}, "plan: staleness=1.5 is not a whole number."),
        ("plan", {"average_every": False}, "plan: average_every=False is not a whole number."),
        ("plan", {"overlap": 3}, "plan: overlap=3 is not True or False."),
        ("plan", {"nccl": 1}, "plan: nccl=1 is not True or False."),
        ("plan", {"grid": 2, "strategy": "spatial"}, "plan: grid=2 is not a number of ranks, 1 or more, for each axis"),
        ("plan", {"shares": 3}, "plan: shares=3 is not a number above 0 for each of 2 rank(s), for strategy 'data'."),
        ("plan", {"shares": [True, 1]}, "plan: shares=[True, 1] is not a number above 0 for each of 2 rank(s)"),
        ("time", {"iterations": 1.5}, "time: iterations=1.5 is not a whole number."),
        ("time", {"tune_s": True}, "time: tune_s=True is not 0 (no tuning) or more seconds."),
        ("autotune", {"budget_s": -1}, "autotune: budget_s=-1 is not 0 or more seconds."),
        ("autotune", {"budget_s": "a"}, "autotune: budget_s='a' is not 0 or more seconds."),
        ("autotune", {"trials": 0}, "autotune: trials=0 is not 1 or more."),
    ],
)
def test_numbers_that_are_none(step, ask, how, said):
    how = {"ranks": 2, **how} if ask == "plan" else how
    with pytest.raises(SettingError) as error:
        getattr(rf, ask)(step, **how)
    assert str(error.value).startswith(said)


def test_numbers_of_numpy_are_numbers(step):
    plan = rf.plan(step, ranks=np.int64(2), shares=np.array([3, 1]))
    assert json.loads(json.dumps(plan.to_json()))["ranks"] == 2
    assert rf.plan(step, ranks=4, strategy="spatial", grid=(np.int64(2), 2)).ranks == 4
