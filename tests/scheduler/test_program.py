"""Programs: nothing is read that was overwritten, updates go home, views take no memory."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from networks import small, step_of, traced

from cpu_kernels.compile import host
from rapydli_flow import nn, optim
from rapydli_flow.graph import Graph, fuse, predicting, trace
from rapydli_flow.ops import Add, Conv, Copy, Dropout, Leaf, Moments, Momentum, Multiply, Op, Relu, Reshape, Scale, Sum
from rapydli_flow.runtime.rank import Rank
from rapydli_flow.scheduler import (
    AllReduce,
    Buffer,
    Call,
    Collective,
    Exchange,
    Plan,
    Program,
    compile_program,
    data_parallel,
)
from rapydli_flow.scheduler.arena import ALIGN, aligned
from rapydli_flow.spec import Block, Spec
from rapydli_flow.testing.interpret import interpret
from rapydli_flow.tuner import Tuning

TUNING = Tuning(host())
X = Spec((5, 8, 6, 4), "float64")
F3 = Spec((3,))


class Memory:
    """Who wrote each 64 bytes of the arena last."""

    def __init__(self, program: Program) -> None:
        assert program.arena_bytes % ALIGN == 0
        self.writer: list[Any] = [None] * (program.arena_bytes // ALIGN)

    def places(self, buffer: Buffer) -> range:
        assert buffer.offset % ALIGN == 0
        first = buffer.offset // ALIGN
        places = range(first, first + aligned(buffer.spec.size_bytes) // ALIGN)
        assert places.stop <= len(self.writer), "outside the arena"
        return places

    def write(self, buffer: Buffer, who: Any) -> None:
        for place in self.places(buffer):
            self.writer[place] = who

    def assert_holds(self, buffer: Buffer, who: Any, reader: str) -> None:
        found = {self.writer[place] for place in self.places(buffer)}
        assert found == {who}, f"{reader} reads {who} where {found} is"


def stands(op: Exchange, step: Any, j: int, k: int) -> bool:
    """Does input j of an exchange lie in output k, at its place?"""
    (_, want), held = op.want[op.wanted[k]], op.have[op.held[j]].block
    numbers = np.arange(want.size).reshape(want.shape)[held.inside(want)].ravel()
    first = (step.ins[j].offset - step.outs[k].offset) // np.dtype(op.dtype).itemsize
    return np.array_equal(numbers, first + np.arange(held.size))


def overlap(a: Buffer, b: Buffer) -> bool:
    return a.offset < b.offset + aligned(b.spec.size_bytes) and b.offset < a.offset + aligned(a.spec.size_bytes)


def assert_sound(graph: Graph, program: Program) -> None:
    """Walk a program beside its graph: each buffer that is read still holds what its producer wrote."""
    memory = Memory(program)
    root: dict[Any, Any] = {}

    def owner(value: Any) -> Any:
        return owner(root[value]) if value in root else value

    for i, node in enumerate(graph.nodes):
        if isinstance(node.op, Leaf):
            memory.write(program.leaves[node.name], (i, 0))
    leaves = list(program.leaves.values())
    assert not any(overlap(a, b) for n, a in enumerate(leaves) for b in leaves[:n])
    steps = iter(program.steps)
    donated = 0
    for i, node in enumerate(graph.nodes):
        if isinstance(node.op, Leaf):
            continue
        if node.op.view:
            root[i, 0] = node.inputs[0]
            continue
        step = next(steps)
        assert step.name == node.name
        ins = [*step.ins, *(step.extras if isinstance(step, Call) else ())]
        assert [b.spec for b in ins] == [graph.spec(v) for v in node.inputs]
        assert [b.spec for b in step.outs] == list(node.specs)
        for buffer, value in zip(ins, node.inputs, strict=True):
            memory.assert_holds(buffer, owner(value), node.name)
        work = step.work if isinstance(step, Call) else ()
        index = node.op.indexing(*(b.spec for b in ins))
        for k, out in enumerate(step.outs):
            assert not any(overlap(out, other) for other in step.outs[:k])
            shared = [j for j, buffer in enumerate(ins) if overlap(out, buffer)]
            if isinstance(node.op, Exchange) and all(stands(node.op, step, j, k) for j in shared):
                root |= {node.inputs[j]: (i, k) for j in shared}  # from now on, with a border
                shared = []
            assert all(index.in_place(j, k) and ins[j].offset == out.offset for j in shared), node.name
            donated += bool(shared) or any(out.offset == b.offset for b in leaves)
        for n, scratch in enumerate(work):
            assert not any(overlap(scratch, other) for other in (*ins, *step.outs, *work[:n])), node.name
            memory.write(scratch, ("work", node.name))
        for k, out in enumerate(step.outs):
            memory.write(out, (i, k))
    assert donated == program.donated
    copies = list(steps)
    assert len(copies) == program.copied
    for step in copies:
        assert isinstance(step, Call)
        assert step.request.op == Copy()
        ((source,), (target,)) = step.ins, step.outs
        (writer,) = {memory.writer[place] for place in memory.places(source)}
        memory.write(target, writer)
    for name, value in graph.outputs.items():
        memory.assert_holds(program.outputs[name], owner(value), f"output {name}")
        assert program.outputs[name].spec == graph.spec(value)
    for i, node in enumerate(graph.nodes):
        if isinstance(node.op, Leaf):
            value = graph.updates.get(node.name, (i, 0))
            memory.assert_holds(program.leaves[node.name], owner(value), f"leaf {node.name}")


def made(graph: Graph) -> Program:
    program = compile_program(graph, TUNING)
    assert_sound(graph, program)
    return program


def one(graph: Graph) -> Graph:
    return Plan().rank_graphs(graph)[0]


def step(optimizer: Any = None) -> Graph:
    return step_of(traced(small, X), optimizer or optim.sgd(0.1, momentum=0.9), metrics={"accuracy": nn.accuracy})


def all_bytes(graph: Graph) -> int:
    return sum(aligned(s.size_bytes) for node in graph if not node.op.view for s in node.specs)


PLANS = {
    "one rank": {},
    "samples": data_parallel(step(), 3).layouts,
    "rows": {"x": Block.along(X.shape, 1, (0, 5, 8))},
    "filters": {"conv_1/w": Block.along((3, 3, 4, 4), 3, (0, 1, 4))},
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("rule", [optim.sgd(0.1), optim.sgd(0.1, momentum=0.9), optim.adam(0.1)])
def test_training_steps(name: str, rule: Any) -> None:
    graph, layouts = step(rule), PLANS[name]
    ranks = len(next(iter(layouts.values()), (0,)))
    for part in Plan(ranks, 1, layouts).rank_graphs(graph):
        program = made(part)
        assert program.arena_bytes < all_bytes(part)
        assert program.donated >= len(part.updates) - program.copied
        assert set(program.updates) == set(graph.updates)


def test_one_picture_divided_by_rows() -> None:
    """Maps, and their gradients, lie within what they are in with a border."""
    x = Spec((1, 16, 8, 4), "float64")
    graph = step_of(traced(small, x), optim.sgd(0.1))
    for part in Plan(2, 1, {"x": Block.along(x.shape, 1, (0, 10, 16))}).rank_graphs(graph):
        exchanges = [s for s in made(part).steps if isinstance(s, Collective) and isinstance(s.op, Exchange)]
        inside = {s.name for s in exchanges if any(overlap(s.ins[0], out) for out in s.outs)}
        assert {"residual_1/relu_1/move_1", "grad/residual_1/relu_2/relu_grad_1/move_1"} <= inside


def test_graphs_that_are_not_fused() -> None:
    for graph in (step(), predicting(traced(small, X)), step_of(traced(small, X))):
        program = made(graph)
        assert program.arena_bytes < all_bytes(graph)


def test_the_arena_is_much_smaller_than_all_buffers_of_a_deep_network() -> None:
    def deep(x: Any) -> Any:
        for _ in range(12):
            x = nn.tanh(nn.dense(x, 64))
        return x

    graph = predicting(trace(deep, Spec((256, 64))))
    program = made(graph)
    leaves = sum(aligned(b.spec.size_bytes) for b in program.leaves.values())
    assert program.arena_bytes - leaves <= 2 * 256 * 64 * 4
    assert all_bytes(graph) - leaves == 36 * 256 * 64 * 4


@pytest.mark.parametrize("damage", ["output", "input", "work"])
def test_the_checker_finds_what_is_wrong(damage: str) -> None:
    graph = one(step())
    program = compile_program(graph, TUNING)
    calls = [(n, s) for n, s in enumerate(program.steps) if isinstance(s, Call) and s.work and s.ins]
    n, call = calls[len(calls) // 2]
    if damage == "output":  # onto a parameter
        call = replace(call, outs=(Buffer(program.leaves["conv_1/w"].offset, call.outs[0].spec), *call.outs[1:]))
    elif damage == "input":
        call = replace(call, ins=(Buffer(call.ins[0].offset + ALIGN, call.ins[0].spec), *call.ins[1:]))
    else:
        call = replace(call, work=(Buffer(call.ins[0].offset, call.work[0].spec), *call.work[1:]))
    with pytest.raises(AssertionError):
        assert_sound(graph, replace(program, steps=(*program.steps[:n], call, *program.steps[n + 1 :])))


# where updates go --------------------------------------------------------------------------------------


def leaves(*names: str, spec: Spec = F3) -> tuple[Graph, list[Any]]:
    graph = Graph()
    return graph, [graph.leaf("batch" if name == "x" else "state", name, spec) for name in names]


def test_an_update_goes_home() -> None:
    program = made(one(step()))
    homes = {b.offset for name, b in program.leaves.items() if name in program.updates}
    written = {b.offset for s in program.steps for b in s.outs}
    assert len(homes & written) == len(program.updates)
    assert program.copied == 2  # the running means are the shift of `moments`, and its gradient reads them too
    copies = {s.name for s in program.steps if s.name.endswith("/copy")}
    assert copies == {f"residual_{i}/batch_norm_1/mean/copy" for i in (1, 2)}


def test_an_update_goes_home_after_the_last_read_of_what_it_replaces() -> None:
    graph, (x, w) = leaves("x", "w")
    new = Add()(w, x)
    graph.outputs["y"] = Multiply()(Relu()(w), x).id  # the old w is read after its successor is made
    graph.updates["w"] = new.id
    program = made(graph)
    assert program.copied == 1
    assert [s.name for s in program.steps][-1] == "w/copy"
    graph, (x, w) = leaves("x", "w")
    graph.outputs["y"] = Multiply()(Relu()(w), x).id
    graph.updates["w"] = Add()(x, x).id
    assert made(graph).copied == 0


def test_an_update_that_reads_its_leaf_elsewhere_does_not_go_home() -> None:
    graph, (w,) = leaves("w", spec=Spec((2, 6, 3)))
    f = graph.leaf("param", "f", Spec((3, 3, 3)))
    graph.updates["w"] = Conv(stride=(1,), padding=((1, 1),), dilation=(1,))(w, f).id
    assert made(graph).copied == 1


def test_what_is_lent_takes_no_memory_and_is_not_written_to() -> None:
    graph, (x, w) = leaves("x", "w", spec=Spec((64, 64)))
    graph.outputs["y"] = Add()(Relu()(w), x).id
    whole, program = made(graph), compile_program(graph, Tuning(host()), lent=["w"])
    assert whole.arena_bytes - program.arena_bytes == Spec((64, 64)).size_bytes
    assert all(buffer.offset >= 0 for step in program.steps for buffer in step.outs)
    rank, value = Rank(program, host(), poison=True), np.random.default_rng(0).standard_normal((64, 64), np.float32)
    kept = value.copy()
    rank.load({"w": value})
    rank.leaf("x")[...] = 1
    rank.step(0, 0)
    np.testing.assert_array_equal(rank.output("y"), np.maximum(kept, 0) + 1)
    np.testing.assert_array_equal(value, kept)


def run(graph: Graph, feeds: Mapping[str, Any], steps: int = 3) -> None:
    """A rank's outputs and leaves, step after step, are those of the interpreter."""
    program = made(graph)
    rank = Rank(program, host(), poison=True)
    values = dict(feeds)
    for name, value in values.items():
        rank.leaf(name)[...] = value
    for n in range(steps):
        rank.step(0, n)
        want = interpret(graph, values, 0, n)
        for name, value in want.outputs.items():
            assert rank.output(name) == pytest.approx(value, rel=1e-6), name
        values |= want.updates
        for name, value in values.items():
            assert rank.leaf(name) == pytest.approx(value, rel=1e-6), name


FEEDS = {name: np.arange(i, i + 3, dtype=np.float32) for i, name in enumerate("xabc")}


def feeds_of(graph: Graph) -> dict[str, Any]:
    return {leaf.name: FEEDS[leaf.name] for leaf in graph.leaves()}


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_leaf_that_becomes_the_old_value_of_another(order: str) -> None:
    graph, (x, a, _) = leaves("x", "a", "b")
    values = {"a": Add()(a, x).id, "b": a.id}
    graph.updates = {name: values[name] for name in order}
    run(graph, feeds_of(graph))


def test_leaves_that_change_places() -> None:
    graph, (a, b) = leaves("a", "b")
    graph.updates = {"a": b.id, "b": a.id}
    run(graph, feeds_of(graph))
    graph, (a, b, c) = leaves("a", "b", "c")
    graph.updates = {"a": b.id, "b": c.id, "c": a.id}
    graph.outputs["old"] = a.id
    run(graph, feeds_of(graph))


def test_one_value_for_two_leaves() -> None:
    graph, (x, a, _) = leaves("x", "a", "b")
    new = Add()(a, x)
    graph.updates = {"a": new.id, "b": new.id}
    graph.outputs["new"] = new.id
    assert made(graph).copied == 2
    run(graph, feeds_of(graph))


def test_outputs_show_what_a_leaf_was_in_this_step() -> None:
    graph, (x, a) = leaves("x", "a")
    graph.outputs = {"old": a.id, "new": Add()(a, x).id}
    graph.updates["a"] = graph.outputs["new"]
    run(graph, feeds_of(graph))
    graph = Graph()
    a = graph.leaf("state", "a", Spec((2, 3)))
    graph.outputs["view"] = Reshape(shape=(3, 1))(a).id
    graph.updates["a"] = Scale(by=2.0)(a).id
    run(graph, {"a": np.ones((2, 3), np.float32)})


def test_a_leaf_that_stays() -> None:
    graph, (a,) = leaves("a")
    graph.updates["a"] = a.id
    assert made(graph).steps == ()


# what may lie on what ----------------------------------------------------------------------------------


def offsets(program: Program, name: str) -> tuple[list[int], list[int]]:
    (step,) = (s for s in program.steps if s.name == name)
    return [b.offset for b in step.ins], [b.offset for b in step.outs]


def test_an_output_takes_the_place_of_a_dying_input() -> None:
    graph, (x,) = leaves("x")
    y = Relu()(Scale(by=2.0)(x))
    graph.outputs["y"] = y.id
    program = made(graph)
    assert program.donated == 1
    ins, outs = offsets(program, "relu_1")
    assert ins == outs
    assert outs[0] != program.leaves["x"].offset  # what is fed stays
    assert program.arena_bytes == 2 * ALIGN


@pytest.mark.parametrize(
    "tail",
    [
        lambda y, x: Multiply()(y, y),  # read twice by one op
        lambda y, x: Multiply()(Reshape(shape=())(y), y),  # as itself and as its view
        lambda y, x: Add()(Relu()(y), y),  # read again later
    ],
)
def test_what_is_read_again_is_not_overwritten(tail: Any) -> None:
    graph, (x,) = leaves("x")
    y = Scale(by=2.0)(x)
    graph.outputs["y"] = tail(y, x).id
    program = made(graph)
    first = next(s for s in program.steps if s.name != y.name)
    assert first.outs[0].offset != next(s for s in program.steps if s.name == y.name).outs[0].offset


def test_outputs_without_readers_are_given_back() -> None:
    graph = Graph()
    x, shift = graph.leaf("batch", "x", Spec((64, 3))), graph.leaf("state", "shift", F3)
    total, _ = Moments()(Scale(by=2.0)(x), shift)
    y = Sum(axes=(0,))(x)
    graph.outputs = {"total": total.id, "y": y.id}
    program = made(graph)
    assert program.outputs["y"].offset != program.outputs["total"].offset


def test_momentum_updates_both_leaves_in_place() -> None:
    graph, (w, m, x) = leaves("w", "m", "x")
    rate = graph.leaf("clock", "rate", Spec(()))
    w1, m1 = Momentum()(w, m, x, rate)
    graph.updates = {"w": w1.id, "m": m1.id}
    program = made(graph)
    ins, outs = offsets(program, "momentum_1")
    assert ins[:2] == outs
    assert (program.donated, program.copied, program.arena_bytes) == (2, 0, 4 * ALIGN)


def test_views_take_no_memory() -> None:
    graph = Graph()
    x = graph.leaf("batch", "x", Spec((4, 6)))
    y = Relu()(Reshape(shape=(6,))(Reshape(shape=(2, 3))(Scale(by=2.0)(x))))
    graph.outputs = {"y": y.id, "x": Reshape(shape=(3, 2))(x).id}
    program = made(graph)
    assert [s.title for s in program.steps] == ["scale", "relu"]
    assert program.outputs["x"] == Buffer(program.leaves["x"].offset, Spec((4, 3, 2)))
    ins, outs = offsets(program, "relu_1")
    assert ins == outs  # in place of what the views look at
    unread = Graph()
    x = unread.leaf("batch", "x", Spec((4, 6)))
    Reshape(shape=(2, 3))(Scale(by=2.0)(x))
    unread.outputs["y"] = Relu()(x).id
    assert made(unread).arena_bytes == 4 * ALIGN


def test_collectives_are_steps() -> None:
    graph, (x,) = leaves("x")
    y = graph.add(AllReduce(ranks=(0,)), (Scale(by=2.0)(x),), "sum")
    graph.outputs["y"] = y.id
    program = made(graph)
    assert [(s.name, s.title) for s in program.steps] == [("scale_1", "scale"), ("sum", "all_reduce")]
    ins, outs = offsets(program, "sum")
    assert ins == outs


def test_indexed_ops_know_where_they_are() -> None:
    graph, (x,) = leaves("x", spec=Spec((4, 3)))
    clock = [graph.leaf("clock", name, Spec((), "int64")) for name in ("seed", "step")]
    at = Block((4, 0), (8, 3), (8, 3))
    for where in (None, at):
        graph.outputs[f"y{len(graph.outputs)}"] = graph.add(Dropout(rate=0.5, stream=1), (x, *clock), at=where).id
    program = made(graph)
    assert [s.at for s in program.steps if isinstance(s, Call)] == [Block.all((4, 3)), at]


def test_kernels_and_leaves_of_a_program() -> None:
    program = made(one(step()))
    assert program.kind("batch") == ("x", "label")
    assert program.kind("clock") == ("seed", "step")
    assert set(program.kind("param", "state")) >= {"conv_1/w", "conv_1/w/momentum"}
    assert program.layout["x"] == Block.all(X.shape)
    assert program.starts["x"].kind == "batch"
    calls = [s for s in program.steps if isinstance(s, Call)]
    assert 0 < len(program.requests) < len(calls)
    assert {(c.request, c.choice) for c in calls} == set(program.requests)


def test_ops_without_templates_have_no_workspace() -> None:
    class Thrice(Op, abstract=True):
        family = "test_thrice"

        def infer(self, x: Spec) -> Spec:
            return x

        def index(self, x: Spec) -> str:
            return "a -> a"

        def reference(self, x: Any) -> Any:
            return x * 3

    graph, (x,) = leaves("x")
    graph.outputs["y"] = Relu()(Thrice()(x)).id
    fused = fuse(graph)
    program = made(fused)
    (call,) = program.steps
    assert isinstance(call, Call)
    assert call.choice.reference
    assert (call.work, call.extras, call.title) == ((), (), "thrice+relu")
    run(fused, {"x": np.array([-1, 0, 2], np.float32)})
