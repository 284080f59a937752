"""Building graphs, looking into them, tracing, training steps, and the rules that verify checks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import batch, perceptron, record, small, step_of, traced

from rapydli_flow import nn, optim
from rapydli_flow.config import settings
from rapydli_flow.errors import DTypeError, GraphError, SettingError, ShapeError
from rapydli_flow.graph import Graph, Node, checked, predicting, trace, train_step, verify
from rapydli_flow.ops import Add, Fill, Leaf, Normal, Op, Relu, Scale, Statistics, operand_names, registry, spec_of
from rapydli_flow.spec import Block, Spec
from rapydli_flow.testing.interpret import interpret, start

TABLE = """
node              op            output      parameters   GFLOP   bytes
----------------------------------------------------------------------
x                 leaf (batch)  f32[64,50]                      12,800
dense_1/matmul_1  matmul        f32[64,7]          350  <0.001   1,792
dense_1/add_1     add           f32[64,7]            7  <0.001   1,792
relu_1            relu          f32[64,7]               <0.001   1,792
dense_2/matmul_1  matmul        f32[64,3]           21  <0.001     768
dense_2/add_1     add           f32[64,3]            3  <0.001     768
----------------------------------------------------------------------
total             12 nodes                         381  <0.001  21,252
"""


def test_table_of_a_network() -> None:
    assert str(traced(perceptron, Spec((64, 50)))) == TABLE.strip()


def test_table_counts_giga_flops_and_fused_titles() -> None:
    graph = traced(lambda x: nn.dense(x, 4096), Spec((1024, 1024)))
    assert graph.flops == 2 * 1024 * 1024 * 4096 + 1024 * 4096
    assert "8.59" in str(graph)
    assert graph.parameters == 1024 * 4096 + 4096


def test_lookup_by_name_and_scope() -> None:
    graph = traced(small)
    assert graph["conv_1/w"].op.name == "leaf"
    assert graph["residual_1"].name == "residual_1/relu_2"  # the last op of the scope
    assert graph.find("residual_2/conv_1").name == "residual_2/conv_1/add_1"
    assert "conv_1/w" in graph
    assert "conv_9" not in graph
    assert len(list(graph)) == len(graph)
    assert [x.name for x in graph.leaves("batch")] == ["x"]
    assert {x.name for x in graph.leaves()} > {"x", "seed", "step", "residual_1/batch_norm_1/gain"}


def test_lookup_names_what_is_near() -> None:
    with pytest.raises(GraphError, match=r"no node is named 'conv_1/v'. Nearest: conv_1/"):
        traced(small)["conv_1/v"]
    with pytest.raises(GraphError, match=r"no node is named 'zzzzzz'\.$"):
        traced(small)["zzzzzz"]


def test_names_of_values() -> None:
    graph = traced(small)
    i = next(i for i, node in enumerate(graph) if isinstance(node.op, Statistics))
    assert graph.value_name((i, 3)) == "residual_1/batch_norm_1/statistics_1.running_var"
    assert graph.value_name(graph.find("x").id) == "x"
    assert repr(graph.find("x")) == "<x f64[4,6,6,2]>"


def test_pictures_are_written(tmp_path: Path) -> None:
    graph = traced(perceptron, Spec((2, 3)))
    graph.save_svg(str(tmp_path / "net.svg"))
    assert (tmp_path / "net.svg").exists()
    assert isinstance(graph._repr_html_(), str)


def test_arithmetic_of_tensors_and_numbers() -> None:
    def network(a: Any, b: Any) -> Any:
        return {"sum": 1 + a + b + 2, "less": 3.0 - a - b - 1, "times": 2 * a * b * 0.5, "over": a / b / 4, "not": -a}

    a, b = np.array([1.0, 2.0]), np.array([3.0, 5.0])
    out = interpret(trace(network, Spec((2,), "float64"), Spec((2,), "float64")), {"a": a, "b": b}).outputs
    want = {"sum": a + b + 3, "less": 2 - a - b, "times": a * b, "over": a / b / 4, "not": -a}
    assert set(out) == set(want)
    for name, value in want.items():
        assert out[name] == pytest.approx(value)


def test_arithmetic_refuses_other_things() -> None:
    x = Graph().leaf("batch", "x", Spec((2,)))
    with pytest.raises(GraphError, match="add: the second operand is str, not a tensor or a number"):
        x + "1"
    other = Graph().leaf("batch", "x", Spec((2,)))
    with pytest.raises(GraphError, match="add: operands are of different graphs, or not tensors: <x "):
        x + other
    with pytest.raises(GraphError, match=r"add: operands are of different graphs, or not tensors: 1\.0"):
        Add()(x, 1.0)


def test_two_leaves_of_one_name_are_refused() -> None:
    graph = Graph()
    graph.leaf("batch", "x", Spec((2,)))
    with pytest.raises(GraphError, match=r"two leaves are named 'x'. Names of parameters and inputs are unique."):
        graph.leaf("batch", "x", Spec((2,)))


# ops ---------------------------------------------------------------------------------------------------


def test_ops_compute_on_arrays() -> None:
    assert Relu()(np.array([-1.0, 2.0])).tolist() == [0.0, 2.0]
    mean, *_ = Statistics(count=2)(*(np.ones(3),) * 4)
    assert mean.tolist() == [1.5] * 3
    assert str(Scale(by=2.0)) == "scale(by=2.0)"
    assert operand_names(registry["cross_entropy"]()) == ("x", "label")
    assert spec_of(3.5) == Spec((), "float64")


def test_two_ops_of_one_name_are_refused() -> None:
    with pytest.raises(
        GraphError, match=r"two ops are named 'relu': rapydli_flow.ops.activation.Relu and .*Relu. Rename"
    ):
        type("Relu", (Op,), {"__module__": "elsewhere"})
    assert registry["relu"] is Relu


def test_families_are_those_of_ops_not_of_their_base() -> None:
    for name in ("conv", "conv_input_grad", "max_pool", "sum_pool_grad", "matmul"):
        assert registry[name].family == name
    assert registry["adam"].family == registry["dropout"].family == registry["cosine_decay"].family == "pointwise"


def test_leaves_start_from_their_init_in_blocks() -> None:
    shape = (4, 3)
    for init in (Normal(std=0.5, stream=3, shape=shape), Fill(value=2.5, shape=shape), None):
        leaf = Leaf(kind="param", label="w", shape=shape, init=init)
        whole = leaf.start(7, Block.all(shape))
        at = Block((1, 0), (3, 3), shape)
        assert np.array_equal(leaf.start(7, at), whole[at.slices])
        assert whole.dtype == np.float32
    assert not whole.any()
    with pytest.raises(SettingError, match=r"leaf: w has no value of its own; feed it. Its init is None."):
        leaf.run()
    with pytest.raises(SettingError, match="leaf: kind 'weight' is not one of param, state, batch, clock"):
        Leaf(kind="weight", label="w", shape=shape).infer()


def test_an_op_that_makes_more_seeds_more() -> None:
    leaf = Leaf(kind="param", label="w", shape=(100,), init=Normal(std=1.0, stream=3, shape=(100,)))
    assert not np.array_equal(leaf.start(0, Block.all((100,))), leaf.start(1, Block.all((100,))))


# tracing -----------------------------------------------------------------------------------------------


def test_trace_names_inputs_and_outputs() -> None:
    graph = trace(lambda image, mask: {"a": image + mask, "b": image}, Spec((2, 3)), mask=Spec((3,)))
    assert [x.name for x in graph.leaves("batch")] == ["image", "mask"]
    assert list(graph.outputs) == ["a", "b"]


@pytest.mark.parametrize(
    ("network", "specs", "message"),
    [
        (lambda x: x, (Spec((2,)), Spec((2,))), r"trace: 2 specs for a function of 1 parameters \['x'\]"),
        (lambda x: x, (), "trace: 0 specs for a function of 1 parameters"),
        (lambda x: 3, (Spec((2,)),), "trace: output y is int, not a tensor of the graph"),
        (lambda x: {"a": None}, (Spec((2,)),), "trace: output a is NoneType, not a tensor"),
    ],
)
def test_trace_refuses(network: Any, specs: tuple[Spec, ...], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        trace(network, *specs)


def test_train_step_has_loss_metrics_and_updates() -> None:
    step = step_of(traced(small), optim.sgd(0.1, momentum=0.9), metrics={"accuracy": nn.accuracy})
    assert list(step.outputs) == ["loss", "accuracy"]
    params = {x.name for x in step.leaves("param")}
    assert params < set(step.updates)
    assert {f"{name}/momentum" for name in params} < set(step.updates)
    assert "residual_1/batch_norm_1/mean" in step.updates
    assert "grad/residual_1/conv_1/conv_1" in str(step)
    values = interpret(step, {**start(step), **batch()})
    assert np.isfinite(values.outputs["loss"])
    assert {name: v.shape for name, v in values.updates.items()} == {
        name: step.find(name).shape for name in step.updates
    }


def test_training_lowers_the_loss() -> None:
    x = Spec((16, 5))
    step = step_of(traced(perceptron, x), optim.adam(0.02))
    state, feeds, losses = start(step, 1), batch(x, 3), []
    for i in range(60):
        values = interpret(step, {**state, **feeds}, step=i)
        state |= values.updates
        losses.append(float(values.outputs["loss"]))
    assert losses[-1] < 0.3 * losses[0]


def test_train_step_refuses() -> None:
    with pytest.raises(GraphError, match="train_step: the network has no parameters to train"):
        step_of(trace(nn.relu, Spec((2, 3))))


def test_label_can_have_another_name_and_dtype() -> None:
    step = train_step(
        traced(perceptron, Spec((4, 3))), loss=nn.cross_entropy, optimizer=record, label={"digit": Spec((4,), "uint8")}
    )
    assert step["digit"].specs == (Spec((4,), "uint8"),)


def test_interpret_refuses_wrong_feeds() -> None:
    graph = predicting(traced(perceptron, Spec((4, 3))))
    with pytest.raises(GraphError, match=r"interpret: nothing is fed for x \(f32\[4,3\]\)"):
        interpret(graph, {})
    with pytest.raises(ShapeError, match=r"interpret: x is f32\[4,3\] but f32\[2,3\] is fed"):
        interpret(graph, {"x": np.zeros((2, 3), np.float32)})
    with pytest.raises(DTypeError, match=r"interpret: x is f32\[4,3\] but f64\[4,3\] is fed. Cast it first."):
        interpret(graph, {"x": np.zeros((4, 3))})


# verify ------------------------------------------------------------------------------------------------


def broken(change: Any) -> Graph:
    graph = step_of(traced(perceptron, Spec((4, 3))), optim.sgd(0.1))
    change(graph)
    return graph


def swap(graph: Graph, i: int, **changes: Any) -> None:
    node = graph.nodes[i]
    fields = {"name": node.name, "op": node.op, "inputs": node.inputs, "specs": node.specs, **changes}
    graph.nodes[i] = Node(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: swap(g, -1, name="x"), "two nodes are named 'x'"),
        (lambda g: swap(g, -1, inputs=((999, 0),)), r"reads value \(999, 0\), which does not exist before node"),
        (lambda g: swap(g, -1, inputs=((0, 1),)), r"reads value \(0, 1\), which does not exist"),
        (lambda g: swap(g, 2, specs=(Spec((1,)),)), r"x: has f32\[1\] but its op gives f32\[4,3\]"),
        (lambda g: g.outputs.update(z=(999, 0)), r"output z: value \(999, 0\) does not exist"),
        (lambda g: g.updates.update({"dense_1/w": (0, 7)}), r"update dense_1/w: value \(0, 7\) does not exist"),
        (lambda g: g.updates.update({"dense_1/matmul_1": (0, 0)}), "update dense_1/matmul_1: .* is not a leaf"),
        (lambda g: g.updates.update({"dense_1/w": (0, 0)}), r"a leaf f32\[3,7\] cannot become i64\[\]"),
    ],
)
def test_verify_finds_broken_rules(change: Any, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        verify(broken(change))


def test_passes_are_verified_where_the_setting_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = checked(lambda graph: broken(lambda g: g.outputs.update(z=(999, 0))))
    try:
        monkeypatch.setenv("RAPYDLI_VERIFY", "0")
        settings.cache_clear()
        wrong(Graph())
        monkeypatch.setenv("RAPYDLI_VERIFY", "1")
        settings.cache_clear()
        with pytest.raises(GraphError, match="output z: value"):
            wrong(Graph())
    finally:
        monkeypatch.undo()
        settings.cache_clear()
