"""Concatenations whose parts are written into the joined array."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow import nn, optim
from rapydli_flow.graph import Graph, predicting
from rapydli_flow.runtime.rank import Rank
from rapydli_flow.scheduler import Call, Plan, Program, compile_program
from rapydli_flow.scheduler.join import joins
from rapydli_flow.spec import Spec
from rapydli_flow.testing.interpret import interpret
from rapydli_flow.tuner import Choice, Tuning

X = (2, 8, 8, 6)


def inception(x: Any) -> Any:
    """Parts of widths that no vector divides: by products, by Winograd's algorithm, by groups, and of 5 x 5."""
    a = nn.relu(nn.conv(x, 17, 1))
    b = nn.relu(nn.conv(nn.relu(nn.conv(x, 16, 1)), 24, 3, padding=1))
    c = nn.relu(nn.conv(x, 6, 3, padding=1, groups=6))
    d = nn.relu(nn.conv(nn.max_pool(x, 3, stride=1, padding=1), 3, 5, padding=2))
    return nn.concatenate([a, b, c, d])


def classifier(x: Any) -> Any:
    return nn.dense(nn.flatten(nn.max_pool(inception(x), 2)), 4)


def step_of(network: Callable[[Any], Any], dtype: str = "float32", **settings: Any) -> Graph:
    graph = rf.trace(network, Spec(X, dtype))
    return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1, momentum=0.9), **settings)


def planned(graph: Graph) -> tuple[Graph, Program]:
    (part,) = Plan(1, 2).rank_graphs(graph)
    return part, compile_program(part, Tuning(host()))


def titles(program: Program) -> list[str]:
    return [step.title for step in program.steps]


def check(graph: Graph, program: Program, *, rtol: float, steps: int = 2) -> None:
    """A rank in poisoned memory against the interpreter, update by update."""
    rng, rank = np.random.default_rng(0), Rank(program, host(), threads=2, poison=True)
    rank.start(3)
    fed = {"x": rng.standard_normal(X).astype(graph["x"].specs[0].dtype), "label": np.array([1, 3])}
    fed = {name: fed[name] for name in program.kind("batch")}
    for n in range(steps):
        rank.feed(fed)
        want = interpret(graph, {**rank.state(), **fed}, 3, n)
        rank.step(3, n)
        for name, value in want.outputs.items():
            np.testing.assert_allclose(rank.output(name), value, rtol=rtol, atol=rtol, err_msg=name)
        for name, value in want.updates.items():
            np.testing.assert_allclose(rank.leaf(name), value, rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 2e-4), ("float64", 1e-10)])
def test_a_training_step_copies_no_parts(dtype: str, rtol: float) -> None:
    graph, program = planned(step_of(classifier, dtype))
    assert len(joins(graph, Tuning(host()))) == 4
    assert not any("concatenate" in title for title in titles(program))
    assert titles(program).count("slice+relu_grad") == 4
    check(graph, program, rtol=rtol)


def test_predictions_copy_no_parts() -> None:
    graph, program = planned(predicting(rf.trace(classifier, Spec(X))))
    assert not any("concatenate" in title for title in titles(program))
    check(graph, program, rtol=2e-4)


def test_parts_take_no_memory_of_their_own() -> None:
    _, program = planned(predicting(rf.trace(inception, Spec(X))))
    into = {s.request.epilogue.into: s.outs[0] for s in program.steps if isinstance(s, Call)}
    into.pop(None)
    assert sorted(first for first, _ in into) == [0, 17, 41, 47]
    assert {size for _, size in into} == {50}
    assert {buffer.offset for buffer in into.values()} == {program.outputs["y"].offset}


def test_dropout_in_a_part_drops_what_it_would_drop_alone() -> None:
    def network(x: Any) -> Any:
        y = nn.concatenate([nn.dropout(nn.conv(x, 5, 3, padding=1), 0.5), nn.conv(x, 8, 1)])
        return nn.dense(nn.flatten(y), 4)

    graph, program = planned(step_of(network))
    assert any("conv+add+dropout" in title for title in titles(program))
    assert len(joins(graph, Tuning(host()))) == 2
    check(graph, program, rtol=2e-4)


KEPT: dict[str, Callable[[Any, Any], Any]] = {
    "a part is an output": lambda a, b: {"y": nn.concatenate([a, b]), "a": a},
    "a part is read elsewhere": lambda a, b: {"y": nn.concatenate([a, b]), "z": nn.max_pool(a, 2)},
    "a part comes twice": lambda a, b: nn.concatenate([a, b, a]),
    "a part is joined twice": lambda a, b: {"y": nn.concatenate([a, b]), "z": nn.concatenate([b, a])},
    "a part is no convolution": lambda a, b: nn.concatenate([a, nn.max_pool(b, 1)]),
    "another axis": lambda a, b: nn.concatenate([a, b], axis=1),
    "something follows": lambda a, b: nn.tanh(nn.concatenate([a, b])),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_is_copied(case: str) -> None:
    def network(x: Any) -> Any:
        return KEPT[case](nn.conv(x, 5, 1), nn.conv(x, 5, 3, padding=1))

    graph, program = planned(predicting(rf.trace(network, Spec(X))))
    assert not joins(graph, Tuning(host()))
    assert any("concatenate" in title for title in titles(program))
    check(graph, program, rtol=2e-4, steps=1)


def test_a_template_that_cannot_join_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = planned(predicting(rf.trace(inception, Spec(X))))
    monkeypatch.setattr(Tuning, "choose", lambda self, request: Choice("reference"))
    program = compile_program(graph, Tuning(host()))
    assert any("concatenate" in title for title in titles(program))
    check(graph, program, rtol=2e-4, steps=1)


def test_the_first_output_that_is_not_finite_is_named_beside_others_that_were_not() -> None:
    _, program = planned(predicting(rf.trace(inception, Spec(X))))
    rank = Rank(program, host(), poison=True)  # what is not written yet is NaN
    rank.start(0)
    rank.feed({"x": np.ones(X, np.float32)})
    assert rank.first_nonfinite(0, 0) is None
    rank.leaf("conv_3/w")[...] = np.inf
    position = rank.first_nonfinite(0, 0)
    assert position is not None
    assert "f32[2,8,8,24]" in rank.describe(position)
