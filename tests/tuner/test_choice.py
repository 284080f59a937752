"""Requests and choices: what is the same kernel, what serves it, and what runs where there is no template."""

import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cpu_kernels.compile import host
from rapydli_flow.errors import TemplateError
from rapydli_flow.graph import Fused, Graph, fuse
from rapydli_flow.ops import Add, Conv, Dropout, Matmul, MaxPool, Op, Relu, Scale, Sum, Tanh
from rapydli_flow.runtime.rank import Rank
from rapydli_flow.scheduler import Call, Plan, compile_program
from rapydli_flow.spec import Block, Spec
from rapydli_flow.template import Device, Epilogue, Loop, template, templates
from rapydli_flow.tuner import REFERENCE, Choice, Request, Tuning

HERE = host()
X, W, B = Spec((2, 6, 6, 3)), Spec((3, 3, 3, 4)), Spec((4,))
CONV = Conv(stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
TAIL = ((Add(), (-1, 0)), (Relu(), (-1,)))


def request(op: Op, *ins: Spec, device: Device = HERE) -> Request:
    return Tuning(device).serve(op, ins)[0]


def fused(*tail: Any, anchor: Op = CONV) -> Fused:
    return Fused(anchor=anchor, arity=2, tail=tail or TAIL)


# keys --------------------------------------------------------------------------------------------------


def test_equal_requests_have_equal_keys() -> None:
    one = request(fused(), X, W, B)
    assert one == request(fused(), X, W, B)
    assert one.key(HERE) == request(fused(), X, W, B).key(HERE)
    assert one.key(HERE) == replace(one, title="another", whole=None).key(HERE)
    assert one.key(HERE) == pickle.loads(pickle.dumps(one)).key(HERE)
    assert one.key(HERE) == one.key(replace(HERE, name="renamed", cores=99))
    assert one.key(HERE).startswith("conv-")
    assert str(one) == "conv+add+relu f32[2,6,6,3], f32[3,3,3,4]"
    assert str(replace(one, title="")) == "conv f32[2,6,6,3], f32[3,3,3,4]"
    assert one.outs == (Spec((2, 6, 6, 4)),)


def test_different_requests_have_different_keys() -> None:
    wide = [Spec(s.shape, "float64") for s in (X, W, B)]
    clock = (Spec((), "int64"),) * 2
    requests = [
        request(CONV, X, W),
        request(replace(CONV, padding=((1, 1), (0, 1))), X, W),
        request(replace(CONV, dilation=(2, 2)), X, W),
        request(CONV, Spec((3, 6, 6, 3)), W),
        request(CONV, *wide[:2]),
        request(fused(), X, W, B),
        request(fused(), *wide),
        request(fused(TAIL[0]), X, W, B),
        request(fused(TAIL[0]), X, W, Spec((2, 6, 6, 4))),
        request(fused(TAIL[1]), X, W),
        request(fused((Tanh(), (-1,))), X, W),
        request(fused((Scale(by=2.0), (-1,))), X, W),
        request(fused((Scale(by=3.0), (-1,))), X, W),
        request(fused((Dropout(rate=0.5, stream=1), (-1, 0, 1))), X, W, *clock),
        request(fused((Dropout(rate=0.5, stream=2), (-1, 0, 1))), X, W, *clock),
        request(Relu(), X),
        request(Tanh(), X),
        request(Sum(axes=(0,)), X),
        request(Sum(axes=(1,)), X),
    ]
    assert len({r.key(HERE) for r in requests}) == len(requests)
    assert len(set(requests)) == len(requests)


@pytest.mark.parametrize("change", [{"kind": "cuda"}, {"target": "sapphirerapids-1"}, {"vector_bytes": 16}])
def test_keys_differ_by_device(change: Any) -> None:
    one = request(CONV, X, W)
    assert one.key(HERE) != one.key(replace(HERE, **change))


# choices -----------------------------------------------------------------------------------------------


class Negated(Op, abstract=True):
    family = "test_negated"

    def infer(self, x: Spec) -> Spec:
        return x

    def index(self, x: Spec) -> str:
        return "a b -> a b"

    def reference(self, x: Any) -> Any:
        return -x


def short(op: Any, ins: Any, outs: Any, device: Any, **config: Any) -> bool:
    return ins[0].shape[0] < 10


def work(op: Any, ins: Any, outs: Any, *, rows: int) -> Sequence[Spec]:
    return (Spec((rows,), "float64"),)


@template("test_negated", "cpu", fits=short, space={"rows": (4, 2)}, workspace=work)
def for_short_ones(op: Any, ins: Any, outs: Any, epilogue: Any, *, rows: int) -> Loop:
    raise NotImplementedError


@template("test_negated", "cpu")
def for_all(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
    raise NotImplementedError


SHORT, LONG = Spec((3, 5)), Spec((30, 5))


def test_the_first_template_that_fits_is_the_default() -> None:
    tuning = Tuning(HERE)
    assert [t.name for t in request(Negated(), SHORT).templates(HERE)] == ["for_short_ones", "for_all"]
    assert [t.name for t in request(Negated(), LONG).templates(HERE)] == ["for_all"]
    assert tuning.choose(request(Negated(), SHORT)) == Choice("for_short_ones", (("rows", 4),))
    assert tuning.choose(request(Negated(), LONG)) == Choice("for_all")


def test_what_is_known_is_chosen() -> None:
    one, best = request(Negated(), SHORT), Choice("for_short_ones", (("rows", 2),))
    tuning = Tuning(HERE, {one.key(HERE): best})
    assert tuning.choose(one) == best
    assert tuning.serve(Negated(), [SHORT]) == (one, best)
    assert tuning.workspace(one, best) == (Spec((2,), "float64"),)
    assert tuning.workspace(one, Choice("for_all")) == ()
    assert tuning.choose(request(Negated(), LONG)) == Choice("for_all")
    assert (list(tuning), len(tuning)) == ([one.key(HERE)], 1)
    assert len(Tuning(HERE)) == 0


def test_choices() -> None:
    (one, two) = templates("test_negated", "cpu")
    choice = Choice.of(one, {"rows": 2})
    assert choice == Choice("for_short_ones", (("rows", 2),))
    assert choice.config == Choice.of(one, dict(choice.config)).config
    assert Choice.of(one, {"b": 1, "a": 2}) == Choice.of(one, {"a": 2, "b": 1})
    assert str(choice) == "for_short_ones rows=2"
    assert choice.find(request(Negated(), SHORT), HERE) is one
    assert Choice("for_all").find(request(Negated(), SHORT), HERE) is two
    assert REFERENCE.reference
    assert not choice.reference
    message = "test_negated has no template 'lost' for cpu devices"
    with pytest.raises(TemplateError, match=message):
        Choice("lost").find(request(Negated(), SHORT), HERE)


# the reference -----------------------------------------------------------------------------------------


class Sorted(Op, abstract=True):
    """No template is for it."""

    family = "test_sorted"

    def infer(self, x: Spec) -> Spec:
        return x

    def index(self, x: Spec) -> str:
        return "a . -> a ."

    def reference(self, x: Any) -> Any:
        return np.sort(x, 1)


def test_the_reference_runs_the_tail_too() -> None:
    op = Fused(anchor=Sorted(), arity=1, tail=((Add(), (-1, 0)), (Relu(), (-1,))))
    ins = (Spec((3, 5)), Spec((5,)))
    asked, choice = Tuning(HERE).serve(op, ins)
    assert choice == REFERENCE
    assert (asked.op, asked.ins, asked.whole) == (op, ins, op)
    assert asked.epilogue == Epilogue.none(Spec((3, 5)))
    assert Tuning(HERE).workspace(asked, choice) == ()
    assert asked.templates(HERE) == ()


def graph_of(op: Op, dtype: str = "float32") -> Graph:
    graph = Graph()
    x, b = graph.leaf("batch", "x", Spec((7, 5), dtype)), graph.leaf("param", "b", Spec((5,), dtype))
    graph.outputs["y"] = Relu()(op(x) + b).id
    return graph


def test_an_op_without_a_template_runs_on_a_rank() -> None:
    graph = graph_of(Sorted())
    (part,) = Plan().rank_graphs(graph)
    program = compile_program(part, Tuning(HERE))
    (call,) = program.steps
    assert isinstance(call, Call)
    assert (call.title, call.choice, call.at) == ("sorted+add+relu", REFERENCE, None)
    rank = Rank(program, HERE, poison=True)
    rng = np.random.default_rng(0)
    x, b = rng.normal(size=(7, 5)).astype("f"), rng.normal(size=5).astype("f")
    rank.leaf("b")[...] = b
    rank.feed({"x": x})
    assert rank.step(0, 0) == {}
    assert np.array_equal(rank.output("y"), np.maximum(np.sort(x, 1) + b, 0))
    _, times = rank.step_timed(0, 0)
    assert [row[:2] for row in times] == [("relu_1", "sorted+add+relu")]
    assert rank.first_nonfinite(0, 0) is None


def test_an_indexed_tail_of_the_reference_knows_its_place() -> None:
    graph = Graph()
    x = graph.leaf("batch", "x", Spec((4, 5)))
    clock = [graph.leaf("clock", name, Spec((), "int64")) for name in ("seed", "step")]
    at = Block((4, 0), (8, 5), (8, 5))
    graph.outputs["y"] = graph.add(Dropout(rate=0.5, stream=3), (Sorted()(x), *clock), at=at).id
    program = compile_program(fuse(graph), Tuning(HERE))
    (call,) = program.steps
    assert isinstance(call, Call)
    assert (call.choice, call.at) == (REFERENCE, at)
    rank = Rank(program, HERE, poison=True)
    x0 = np.random.default_rng(0).normal(size=(4, 5)).astype("f")
    rank.feed({"x": x0})
    rank.step(5, 6)
    want = Dropout(rate=0.5, stream=3).run(np.sort(x0, 1), np.int64(5), np.int64(6), at=at)[0]
    assert np.array_equal(rank.output("y"), want)


def test_ops_with_several_outputs() -> None:
    op = MaxPool(window=(2, 2), stride=(2, 2), padding=((0, 0), (0, 0)))
    asked = request(op, X)
    assert asked.outs == (Spec((2, 3, 3, 3)), Spec((2, 3, 3, 3), "uint8"))
    assert asked.epilogue.identity
    assert request(Matmul(), Spec((3, 4)), Spec((4, 5))).epilogue.out == Spec((3, 5))
