"""Targets of training steps: of any shape, several, or none; losses of several outputs; and what is refused."""

from typing import Any

import numpy as np
import pytest
from networks import perceptron, record, traced

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.errors import DatasetError, GraphError
from rapydli_flow.runtime.feeding import label_classes

N = 6


def square(a: Any, b: Any) -> Any:
    return nn.mean((a - b) * (a - b), (0, 1))


def two_heads(x: Any) -> Any:
    h = nn.tanh(nn.dense(x, 5))
    return {"scores": nn.dense(h, 3), "box": nn.dense(h, 4)}


def mixed(out: Any, target: Any) -> Any:
    return nn.cross_entropy(out["scores"], target["kind"]) + 0.3 * square(out["box"], target["box"])


def arrays(count: int = 12) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(count, 4)),
        "kind": rng.integers(0, 3, count).astype("uint8"),
        "box": rng.normal(size=(count, 4)),
    }


@pytest.fixture(scope="module")
def step() -> Any:
    return rf.train_step(
        rf.trace(two_heads, rf.Spec((N, 4), "float64")),
        loss=mixed,
        optimizer=optim.sgd(0.1),
        metrics={"distance": lambda out, target: square(out["box"], target["box"])},
        label={"kind": rf.Spec((N,), "uint8"), "box": rf.Spec((N, 4), "float64")},
    )


def test_a_mixed_loss_of_several_outputs_and_targets(step: Any) -> None:
    data = arrays()
    run = rf.fit(step, data, steps=40)
    assert run.scalars["loss"][-1] < 0.8 * run.scalars["loss"][0]
    boxes = rf.predict(run.graph, run.state, data["x"], output="box").compute(scheduler="sync")
    scores = rf.predict(run.graph, run.state, data["x"], output="scores").compute(scheduler="sync")
    found = rf.evaluate(step, run.state, data)
    distance = ((boxes - data["box"]) ** 2).mean()
    entropy = np.log(np.exp(scores).sum(1)) - scores[np.arange(12), data["kind"]]
    assert found == pytest.approx({"loss": entropy.mean() + 0.3 * distance, "distance": distance}, rel=1e-10)


def test_only_classes_have_a_range(step: Any) -> None:
    assert label_classes(step) == label_classes(step.network) == {"kind": 3}
    wrong = arrays() | {"kind": np.full(12, 3, "uint8")}
    with pytest.raises(DatasetError, match=r"label 3 at record \d+ of 'kind' is outside 0\.\.2"):
        rf.fit(step, wrong, steps=1)


def test_gradients_are_named_by_parameter(step: Any) -> None:
    assert step.gradients.keys() == {leaf.name for leaf in step.leaves("param")}
    assert all(step.spec(value) == step.find(name).spec for name, value in step.gradients.items())


def test_regression_has_one_target_that_is_a_tensor() -> None:
    network = rf.trace(lambda x: nn.dense(x, 4), rf.Spec((N, 4), "float64"))
    label = {"box": rf.Spec((N, 4), "float64")}
    step = rf.train_step(network, loss=square, optimizer=optim.sgd(0.5), label=label)
    data = arrays()
    run = rf.fit(step, {"x": data["x"], "box": 3 * data["x"] - 1}, steps=300)
    np.testing.assert_allclose(run.state["dense_1/w"], 3 * np.eye(4), atol=0.01)
    wrong = rf.train_step(network, loss=lambda y, n: nn.cross_entropy(y, n), optimizer=optim.sgd(0.5), label="box")
    with pytest.raises(DatasetError, match=r"records of 'box' are float64, which does not .* label=\{'box': rf.Spec"):
        rf.evaluate(wrong, rf.init(wrong), {"x": data["x"], "box": data["x"][:, 0]})


@pytest.mark.parametrize("way", ["no label", "an input"])
def test_autoencoders(way: str) -> None:
    def network(x: Any) -> Any:
        y = nn.dense(nn.dense(x, 2), 4)
        return {"y": y, "x": x} if way == "no label" else y

    graph = rf.trace(network, rf.Spec((N, 4), "float64"))
    if way == "no label":
        step = rf.train_step(
            graph, loss=lambda out, none: square(out["y"], out["x"]), optimizer=optim.adam(0.05), label=None
        )
    else:
        step = rf.train_step(graph, loss=square, optimizer=optim.adam(0.05), label="x")
    assert [leaf.name for leaf in step.leaves("batch")] == ["x"]
    run = rf.fit(step, {"x": arrays()["x"]}, steps=30)
    assert run.scalars["loss"][-1] < 0.7 * run.scalars["loss"][0]


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (
            lambda y, label: {"a": nn.cross_entropy(y, label)},
            {},
            r"loss gave a dict \(a\), not one scalar\. Add the parts",
        ),
        (lambda y, label: 0.5, {}, "loss gave float, not a scalar made of its arguments"),
        (lambda y, label: y, {}, r"loss gave f32\[6,3\], not a scalar\. Average it"),
        (lambda y, label: y.graph.find("step"), {}, r"loss gave i64\[\], a whole number"),
        (square, {"label": {"box": (6, 4)}}, r"target box is given as \(6, 4\), not a Spec"),
        (square, {"label": {"box": rf.Spec((5, 4))}}, r"target box is f32\[5,4\] but the network is fed 6 records"),
        (
            square,
            {"label": {"x": rf.Spec((6, 3))}},
            r"target x is f32\[6,3\] but the network has an input .* f32\[6,4\]",
        ),
        (square, {"label": 7}, r"label is 7, not a name, a dict such as .* or None"),
        (square, {"metrics": {"y": square}}, "'y' is an output of the network and a metric"),
    ],
)
def test_refused(loss: Any, options: Any, message: str) -> None:
    with pytest.raises(GraphError, match=f"train_step: {message}"):
        rf.train_step(traced(perceptron, rf.Spec((N, 4))), loss=loss, optimizer=record, **options)


def test_a_loss_for_one_output_that_is_given_several_is_told_so() -> None:
    graph = rf.trace(two_heads, rf.Spec((N, 4)))
    with pytest.raises(GraphError) as caught:
        rf.train_step(graph, loss=nn.cross_entropy, optimizer=record)
    assert caught.value.__notes__ == ["train_step: the outputs scores, box are given to loss as a dict of tensors."]
