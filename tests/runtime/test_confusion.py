"""confusion_matrix: labels against predictions, counted where they are predicted."""

import numpy as np
import pytest
from distributed import get_task_stream
from small_runs import CLASSES, records

import rapydli_flow as rf
from rapydli_flow import nn
from rapydli_flow.confusion import MOST_CLASSES
from rapydli_flow.errors import DatasetError, DTypeError, SettingError, ShapeError


@pytest.fixture(scope="module")
def run(step, data):
    return rf.fit(step, data["train"], steps=10)


@pytest.fixture(scope="module")
def wanted(run):
    """Counted one by one."""
    fed = records(13, seed=1)
    said = rf.predict(run.graph, run.state, fed).compute(scheduler="sync").argmax(1)
    counts = np.zeros((CLASSES, CLASSES), int)
    for label, predicted in zip(fed["label"], said, strict=True):
        counts[label, predicted] += 1
    return counts


def test_datasets_and_arrays(step, run, data, wanted):
    for given in (data["test"], records(13, seed=1)):
        found = rf.confusion_matrix(run.graph, run.state, given)
        np.testing.assert_array_equal(found.counts, wanted)
        assert found.total == 13
        assert found.accuracy == pytest.approx(rf.evaluate(step, run.state, given)["accuracy"])
    part = rf.confusion_matrix(run.graph, run.state, data["test"][3:7])
    assert part.total == 4


def test_on_a_cluster(client, run, data):
    here = rf.confusion_matrix(run.graph, run.state, records())
    with get_task_stream(client) as stream:
        there = rf.confusion_matrix(run.graph, run.state, data["train"])
    np.testing.assert_array_equal(here.counts, there.counts)
    assert len({task["worker"] for task in stream.data}) > 1


def test_every_place_of_an_image():
    graph = rf.trace(lambda x: nn.conv(x, 3, 1, init=nn.normal(1.0)), rf.Spec((4, 5, 5, 2)))
    rng, state = np.random.default_rng(0), rf.init(graph)
    fed = {"x": rng.normal(size=(6, 5, 5, 2)).astype(np.float32), "map": rng.integers(0, 3, (6, 5, 5))}
    found = rf.confusion_matrix(graph, state, fed, label="map", names=["sky", "sea", "land"])
    assert found.total == 150
    np.testing.assert_array_equal(found.counts.sum(1), np.bincount(fed["map"].ravel()))
    assert found.names == ("sky", "sea", "land")


def test_what_it_tells():
    found = rf.ConfusionMatrix(np.array([[8, 2, 0], [1, 4, 0], [0, 0, 0]]), ("cat", "dog", "<ape>"))
    assert found.accuracy == 0.8
    np.testing.assert_allclose(found.recall, [0.8, 0.8, np.nan])
    np.testing.assert_allclose(found.precision, [8 / 9, 4 / 6, np.nan])
    assert found.confused() == [("cat", "dog", 2), ("dog", "cat", 1)]
    assert found.confused(1) == [("cat", "dog", 2)]
    assert repr(found).splitlines() == [
        "80.00% of 15 labels right; labels by row, predictions by column",
        "             cat    dog  <ape>  recall",
        "--------------------------------------",
        "      cat      8      2      .   80.0%",
        "      dog      1      4      .   80.0%",
        "    <ape>      .      .      .",
        "precision  88.9%  66.7%",
    ]
    page = found._repr_html_()
    assert "&lt;ape&gt;" in page
    assert page.count("background:rgba(74,131,207") == 2
    assert page.count("background:rgba(200,50,79") == 2
    assert np.isnan(rf.ConfusionMatrix(np.zeros((2, 2), int)).accuracy)


def test_many_classes_show_what_is_confused_most():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, MOST_CLASSES + 1, 1000)
    said = np.where(labels == 7, 9, labels)
    found = rf.ConfusionMatrix.of(labels, said, MOST_CLASSES + 1)
    assert repr(found).splitlines()[-1].split() == ["7", "9", str((labels == 7).sum())]
    assert "most frequent mistakes" in found._repr_html_()


def test_wrong_arguments(run, data):
    fed = records(13, seed=1)
    with pytest.raises(DatasetError, match=r"the data has no field 'class'. Give a dict with it, or label="):
        rf.confusion_matrix(run.graph, run.state, fed, label="class")
    with pytest.raises(DatasetError, match="there is no field 'class'"):
        rf.confusion_matrix(run.graph, run.state, data["test"], label="class")
    with pytest.raises(DatasetError, match=r"label 5 at record 11 of 'label' is outside 0\.\.4"):
        rf.confusion_matrix(run.graph, run.state, {**fed, "label": np.where(np.arange(13) == 11, CLASSES, 0)})
    with pytest.raises(ShapeError, match=r"labels 'label' have shape \(13, 2\) where scores have \(13, 5\)"):
        rf.confusion_matrix(run.graph, run.state, {**fed, "label": np.zeros((13, 2), int)})
    with pytest.raises(DTypeError, match="class numbers are integers"):
        rf.confusion_matrix(run.graph, run.state, {**fed, "label": np.zeros(13)})
    with pytest.raises(SettingError, match="2 names for 5 classes"):
        rf.confusion_matrix(run.graph, run.state, fed, names=("a", "b"))
    graph = rf.trace(lambda x: nn.argmax(x, 1), rf.Spec((4, 5)))
    with pytest.raises(ShapeError, match=r"'y' is int64\[4\], not scores"):
        rf.confusion_matrix(graph, {}, {"x": np.zeros((4, 5), np.float32), "label": np.zeros(4, int)})
    with pytest.raises(ShapeError, match=r"labels have shape \(2,\), predictions \(3,\)"):
        rf.ConfusionMatrix.of(np.zeros(2, int), np.zeros(3, int), 2)
    with pytest.raises(ShapeError, match=r"counts have shape \(2, 3\)"):
        rf.ConfusionMatrix(np.zeros((2, 3), int))
    with pytest.raises(DTypeError, match="counts are float64"):
        rf.ConfusionMatrix(np.zeros((2, 2)))
