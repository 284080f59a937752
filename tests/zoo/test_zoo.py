"""The zoo: published counts of parameters, shapes, a training step of each network, names that are not there."""

import numpy as np
import pytest
from small_networks import BATCH, CLASSES, RECORDS, small

import rapydli_flow as rf
from rapydli_flow import nn, optim, zoo
from rapydli_flow.errors import SettingError
from rapydli_flow.ops import Dropout
from rapydli_flow.testing.interpret import interpret
from rapydli_flow.zoo.rounding import up

LARGE = {"alexnet", "overfeat", "vgg_a", "resnet50"}  # seconds each, for their many parameters
COMPILED = ("lenet", "cifar10_quick")  # the others have so many shapes that compiling takes minutes; benchmarks do
EACH = [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in zoo.networks]


@pytest.mark.parametrize("network", zoo.networks.values(), ids=lambda network: network.name)
def test_parameters_and_scores_are_those_that_were_published(network: zoo.Network) -> None:
    graph = network.trace()
    assert graph.parameters == network.parameters
    assert graph.spec(graph.outputs["y"]) == rf.Spec((network.batch, network.classes))
    assert graph.leaves("batch")[0].spec == rf.Spec((network.batch, *network.record))
    assert f"{network.parameters:,}" in (network.function.__doc__ or "")
    assert network.name in zoo.__all__


def test_maps_have_the_sizes_of_the_papers() -> None:
    def maps(name: str) -> list[int]:
        graph = zoo.find(name).trace(1)
        sizes = [spec.shape[1] for node in graph for spec in node.specs[:1] if len(spec.shape) == 4 and node.inputs]
        return sorted({size for size in sizes if size > 1}, reverse=True)

    assert maps("lenet") == [24, 12, 8, 4]
    assert maps("cifar10_quick") == [32, 16, 8, 4]
    assert maps("alexnet") == [55, 27, 13, 6]
    assert maps("overfeat") == [56, 28, 24, 12, 6]
    assert maps("vgg_a") == [224, 112, 56, 28, 14, 7]
    assert maps("googlenet") == [112, 56, 28, 14, 7]
    assert maps("resnet18") == maps("resnet50") == [112, 56, 28, 14, 7]


@pytest.mark.parametrize("size", range(3, 20))
def test_pooling_rounds_up_as_caffe_does(size: int) -> None:
    graph = rf.trace(lambda x: nn.max_pool(x, 3, stride=2, padding=up(x, 3, 2)), rf.Spec((1, size, size + 1, 1)))
    want = [-(-(n - 3) // 2) + 1 for n in (size, size + 1)]
    assert list(graph.spec(graph.outputs["y"]).shape[1:3]) == want


@pytest.mark.parametrize("name", EACH)
def test_a_training_step_changes_every_parameter(name: str) -> None:
    step = rf.train_step(small(name), loss=nn.cross_entropy, optimizer=optim.sgd(0.01))
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(BATCH, *RECORDS[name])).astype(np.float32), rng.integers(0, CLASSES, BATCH)
    before = rf.init(step)
    after = interpret(step, {"x": x, "label": label, **before})
    assert np.isfinite(after.outputs["loss"])
    assert 0.1 < after.outputs["loss"] < 30.0  # values neither vanish nor explode on the way
    for leaf in step.leaves("param"):
        assert np.isfinite(after.updates[leaf.name]).all(), leaf.name
        assert not np.array_equal(after.updates[leaf.name], before[leaf.name]), leaf.name


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_training_step_gives_the_reference_s_loss(name: str) -> None:
    graph = small(name)
    step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.01, momentum=0.9))
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(BATCH, *RECORDS[name])).astype(np.float32), "label": rng.integers(0, CLASSES, BATCH)}
    with rf.stepper(step) as call:
        state = call.init()
        start = dict(state)
        _, metrics = call(state, batch)
    want = interpret(step, {**batch, **start}).outputs["loss"]
    assert metrics["loss"] == pytest.approx(float(want), rel=1e-4)


@pytest.mark.parametrize(("name", "count"), [("alexnet", 2), ("overfeat", 2), ("vgg_a", 2), ("googlenet", 1)])
def test_dropout_can_be_left_out(name: str, count: int) -> None:
    def dropped(**options: float) -> int:
        return sum(isinstance(node.op, Dropout) for node in small(name, **options))

    assert (dropped(), dropped(dropout=0.0)) == (count, 0)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(SettingError, match=r"zoo: there is no network 'resnet34'\. Nearest: .*'resnet18'.* There are"):
        zoo.find("resnet34")
    with pytest.raises(SettingError, match=r"no network 'x'\. There are lenet, cifar10_quick, alexnet"):
        zoo.find("x")


def test_the_zoo_is_an_attribute_of_the_package() -> None:
    assert rf.zoo is zoo
    assert rf.zoo.find("lenet").function.__name__ == "lenet"
    assert list(zoo.networks) == [network.name for network in zoo.networks.values()]
