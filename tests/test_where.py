"""Errors say where: the user's line, the nodes that led there, and the nearest of a misspelt name."""

import re

import pytest

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.errors import ArgumentError, GraphError, NotDifferentiable, ShapeError

X = rf.Spec((2, 8, 8, 3))


def test_a_shape_error_shows_the_line_and_the_nodes_that_led_there() -> None:
    def network(x):
        x = nn.relu(nn.conv(x, 4, 3))
        x = nn.max_pool(x, 2)
        return nn.conv(x, 4, 30)

    with pytest.raises(ShapeError) as caught:
        rf.trace(network, X)
    message, at, after = str(caught.value).splitlines()
    assert message.startswith("conv: a window of 30 (stride 1, dilation 1) does not fit in 3")
    assert re.fullmatch(r"  at test_where\.py:\d+: return nn\.conv\(x, 4, 30\)", at)
    steps = after.removeprefix("  after  ").split(" -> ")
    assert steps[0] == "x f32[2,8,8,3]"
    assert re.fullmatch(r"relu_1 f32\[2,6,6,4\] \(test_where\.py:\d+\)", steps[3])
    assert re.fullmatch(r"max_pool_1\.y f32\[2,3,3,4\] \(test_where\.py:\d+\)", steps[4])


def test_both_operands_are_followed_back_but_not_parameters() -> None:
    with pytest.raises(ShapeError) as caught:
        rf.trace(lambda x: x + nn.conv(x, 4, 3, bias=False), X)
    assert str(caught.value).count("  after  x f32[2,8,8,3]") == 2
    with pytest.raises(ShapeError) as caught:
        rf.trace(lambda x: nn.conv(x, 4, 9), X)
    assert "conv_1/w f32" not in str(caught.value).split("after")[1]


def test_long_paths_are_cut_at_the_front() -> None:
    def network(x):
        for _ in range(20):
            x = nn.relu(x)
        return nn.conv(x, 4, 30)

    with pytest.raises(ShapeError, match=r"after  \.\.\. -> relu_15 .* -> relu_20 f32\[2,8,8,3\]"):
        rf.trace(network, X)


def test_an_error_inside_a_block_names_the_line_inside() -> None:
    @nn.block
    def residual(x):
        y = nn.conv(x, 4, 3)
        return y + x  # the line

    with pytest.raises(ShapeError, match=r"at test_where\.py:\d+: return y \+ x  # the line"):
        rf.trace(lambda x: residual(nn.relu(x)), X)


def test_nodes_remember_their_line_through_passes_and_gradients() -> None:
    graph = rf.trace(lambda x: nn.dense(nn.relu(nn.conv(x, 4, 3)), 5), X)
    step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))
    nodes = [node for node in step if node.name.startswith(("conv", "grad"))]
    lines = {node.where.rpartition(":")[0].rpartition("/")[2] for node in nodes}
    assert lines == {"test_where.py"}


def test_a_missing_gradient_names_the_line() -> None:
    from rapydli_flow.ops import Correct

    def loss(y, label):
        return nn.mean(Correct()(y, label), 0)

    graph = rf.trace(lambda x: nn.dense(x, 5), X)
    with pytest.raises(NotDifferentiable, match=r"correct has no gradient.* made at test_where\.py:\d+"):
        rf.train_step(graph, loss=loss, optimizer=optim.sgd(0.1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: nn.conv(x, 4, 3, strides=2), "conv: there is no argument 'strides'. Nearest: 'stride'"),
        (lambda x: nn.max_pool(x, 2, pading=1), "max_pool: there is no argument 'pading'. Nearest: 'padding'"),
        (lambda x: nn.dense(x, 2, activation="relu"), "dense: there is no argument 'activation'"),
    ],
)
def test_a_misspelt_argument_of_a_layer(call, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        rf.trace(call, X)


def test_misspelt_arguments_elsewhere() -> None:
    graph = rf.trace(lambda x: nn.dense(x, 5), X)
    with pytest.raises(ArgumentError, match=r"sgd: there is no argument 'momentun'. Nearest: 'momentum'"):
        optim.sgd(0.1, momentun=0.9)
    with pytest.raises(ArgumentError, match=r"train_step: there is no argument 'optimiser'. Nearest: 'optimizer'"):
        rf.train_step(graph, loss=nn.cross_entropy, optimiser=optim.sgd(0.1))
    with pytest.raises(ArgumentError, match=r"fit: there is no argument 'epoch'. Nearest: 'epochs'"):
        rf.fit(graph, {}, epoch=1)
    with pytest.raises(TypeError, match="there is no argument"):  # as Python's own error of this kind
        rf.load("x", spilt=1)


def test_indices_of_a_tensor() -> None:
    shapes = {}

    def network(x):
        for name, y in {
            "rows": x[:, 1:7:2],
            "channel": x[..., -1],
            "corner": x[:, 0, 0],
            "whole": x[:],
            "square": x**2,
        }.items():
            shapes[name] = y.shape
        return nn.dense(x, 2)

    rf.trace(network, X)
    assert shapes == {
        "rows": (2, 3, 8, 3),
        "channel": (2, 8, 8),
        "corner": (2, 3),
        "whole": (2, 8, 8, 3),
        "square": (2, 8, 8, 3),
    }


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda x: x[0, 0, 0, 0, 0], r"5 indices for 4 axes"),
        (lambda x: x[:, 8], r"index 8 is outside of axis 1"),
        (lambda x: x[:, ::-1], r"is not a number, or a slice with a positive step"),
        (lambda x: list(x), r"x is one tensor, not several.* nn\.split"),
        (lambda x: x if x > 0 else -x, r"has no value while the network is traced.* nn\.where"),
        (lambda x: x**x, r"power: the exponent is Tensor, not a number"),
    ],
)
def test_misuse_of_tensors(use, message) -> None:
    with pytest.raises(GraphError, match=message):
        rf.trace(use, X)
