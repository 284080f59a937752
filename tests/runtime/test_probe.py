"""Looking inside: every node's value is what its reference gives, and only what is needed is computed."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
from small_runs import BATCH, make_step, records

import rapydli_flow as rf
from rapydli_flow import nn
from rapydli_flow.errors import DatasetError, DTypeError, GraphError, SettingError, ShapeError
from rapydli_flow.graph import predicting
from rapydli_flow.ops import Leaf
from rapydli_flow.runtime import probe as probing
from rapydli_flow.runtime.rank import Rank
from rapydli_flow.testing.interpret import run_nodes, start


@pytest.fixture(scope="module")
def feeds():
    return {name: array[:BATCH] for name, array in records().items()}


def test_every_node_of_a_training_step(step, feeds):
    every = run_nodes(step, {**start(step, 4), **feeds}, seed=4, step=2)
    names = [node.name for node in step if not isinstance(node.op, Leaf)]
    got = rf.probe(step, names, feeds, seed=4, step=2)
    assert len(got) > len(names)  # moments have two outputs
    for i, node in enumerate(step.nodes):
        for k in range(len(node.specs)):
            name = step.value_name((i, k))
            if name in got:
                np.testing.assert_allclose(got[name], every[i][k], rtol=1e-9, atol=1e-12, err_msg=name)


def test_gradients_are_those_of_differences(step, feeds):
    found = rf.gradients(step, feeds, seed=1, step=3)
    state = rf.init(step, seed=1)
    assert list(found) == [leaf.name for leaf in step.leaves("param")]
    for name, array in found.items():
        at = np.unravel_index(np.abs(array).argmax(), array.shape)
        losses = []
        for way in (1e-6, -1e-6):
            moved = {**state, name: state[name].copy()}
            moved[name][at] += way
            losses.append(rf.probe(step, "loss", feeds, state=moved, seed=1, step=3)["loss"])
        assert array[at] == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5)


def test_a_network_is_seen_as_it_predicts(step, feeds):
    graph = rf.trace(
        lambda x: nn.dense(nn.dropout(nn.relu(nn.conv(x, 3, 3)), 0.5), 2), rf.Spec((BATCH, 6, 6, 2), "float64")
    )
    got = rf.probe(graph, ["y", "relu_1", "conv_1", "conv_1/w"], {"x": feeds["x"]})
    network = predicting(graph)
    every = {
        n.name: v[0] for n, v in zip(network, run_nodes(network, {**start(network), "x": feeds["x"]}), strict=True)
    }
    assert list(got) == ["y", "relu_1", "conv_1", "conv_1/w"]
    np.testing.assert_allclose(got["relu_1"], every["relu_1"], rtol=1e-12)
    np.testing.assert_array_equal(got["relu_1"], np.maximum(got["conv_1"], 0))
    np.testing.assert_array_equal(got["conv_1/w"], rf.init(graph)["conv_1/w"])
    with pytest.raises(
        GraphError, match=r"'dropout_1/dropout_1' is not run when the network predicts. Probe its training step"
    ):
        rf.probe(graph, "dropout_1/dropout_1", {"x": feeds["x"]})


def test_names_and_patterns(step, feeds):
    got = rf.probe(step, ["conv_*/w", "dense_1/*", "loss"], feeds)
    assert next(iter(got)) == "conv_1/w"
    assert {"dense_1/w", "dense_1/b", "loss"} <= set(got)
    assert all(name.startswith("grad/") for name in rf.probe(step, "grad/*", feeds))
    with pytest.raises(GraphError, match=r"no node is named 'conv_1/v'. Nearest: conv_1/w"):
        rf.probe(step, "conv_1/v", feeds)
    with pytest.raises(GraphError, match=r"probe: no node matches 'konv_1/\*'. Nearest: .*conv_1/"):
        rf.probe(step, "konv_1/*", feeds)
    with pytest.raises(KeyError, match=r"'los' was not asked for; there is loss"):
        got["los"]


def test_only_what_is_needed_is_computed(step, feeds, monkeypatch):
    ran = []

    class Watched(Rank):
        def step(self, *args, **kwargs):
            ran.extend(call.name for call in self.program.steps)
            return super().step(*args, **kwargs)

    monkeypatch.setattr(probing, "rank_on", Watched)
    got = rf.probe(step, "conv_1", {"x": feeds["x"]})  # without labels
    assert ran == ["conv_1/conv_1"]
    assert got["conv_1"].shape == (BATCH, 6, 6, 4)
    ran.clear()
    np.testing.assert_array_equal(rf.probe(step, "conv_1/w", {})["conv_1/w"], rf.init(step)["conv_1/w"])
    assert ran == []


def test_a_state_may_be_given(step, feeds, data):
    state = rf.fit(step, data["train"], steps=3).state
    np.testing.assert_array_equal(rf.probe(step, "conv_1/w", {}, state=state)["conv_1/w"], state["conv_1/w"])
    network = {leaf.name: state[leaf.name] for leaf in step.network.leaves("param", "state")}
    assert len(network) < len(state)
    assert rf.gradients(step, feeds, state=network).keys() == rf.gradients(step, feeds, state=state).keys()
    with pytest.raises(SettingError, match="the state has no 'conv_1/w'; it has nothing"):
        rf.probe(step, "conv_1", feeds, state={})


def test_wrong_feeds(step, feeds):
    for change, error, text in [
        (
            {"x": feeds["x"][:3]},
            ShapeError,
            r"probe: x is fed float64 \(3, 6, 6, 2\) but the graph takes float64 \(8, 6",
        ),
        ({"label": feeds["label"] + 0.5}, DTypeError, "probe: label is fed float64 .* but the graph takes int64"),
        ({"label": feeds["label"] + 3}, DatasetError, "label [5-7] at record . of 'label' is outside 0..4"),
        ({"y": 1}, SettingError, "probe: y is no input of the graph; its inputs are x, label"),
    ]:
        with pytest.raises(error, match=text):
            rf.probe(step, "loss", feeds | change)
    with pytest.raises(SettingError, match=r"probe: label \(i64\[8\]\) is not fed; the batch has x"):
        rf.probe(step, "loss", {"x": feeds["x"]})
    with pytest.raises(SettingError, match=r"probe: a batch is a dict of arrays \(x, label\), not ndarray"):
        rf.probe(step, "loss", feeds["x"])
    with pytest.raises(SettingError, match="gradients: this graph does not know gradients; make a training step"):
        rf.gradients(step.network, feeds)


def test_the_table_and_its_histograms(feeds):
    arrays = {
        "some": np.array([[0.0, 1.0, 3.0], [np.nan, np.inf, 0.0]], "float32"),
        "constant": np.full(5, 1e9),
        "count": np.arange(4),
        "nothing": np.zeros((0, 3)),
        "<b>": np.array(np.nan),
    }
    values = probing.Values(arrays)
    some = values.numbers()["some"]
    assert (some.least, some.mean, some.most, some.not_finite) == (0, 1, 3, 2)
    assert some.zeros == pytest.approx(2 / 6)
    assert some.std == pytest.approx(np.std([0, 1, 3, 0]))
    lines = repr(values).splitlines()
    assert lines[0].split() == ["node", "value", "min", "mean", "max", "std", "zeros", "not", "finite"]
    assert lines[2].split() == ["some", "f32[2,3]", "0", "1", "3", "1.225", "33.3%", "2"]
    assert lines[5].split() == ["nothing", "f64[0,3]"]
    counts = values.histograms(bins=3)
    np.testing.assert_array_equal(counts["some"][0], [2, 1, 1])
    np.testing.assert_array_equal(counts["some"][1], [0, 1, 2, 3])
    assert [int(n.sum()) for n, _ in counts.values()] == [4, 5, 4, 0, 0]
    html = ET.fromstring(values._repr_html_())  # well-formed: names are escaped
    assert len(html.findall(".//{http://www.w3.org/2000/svg}path")) == 5
    assert html.find("./tbody/tr[5]/td").text == "<b>"
    with pytest.raises(SettingError, match="histograms: bins=0 is not 1 or more"):
        values.histograms(0)


@pytest.mark.slow
def test_float32_as_well(feeds):
    step = make_step(dtype="float32")
    got = rf.probe(step, "grad/dense_1/*", feeds)
    assert {array.dtype.name for array in got.values()} == {"float32"}
