"""The suite of operators fails what is wrong: each op here breaks one rule, and the check that is for it says so.

``abstract=True`` keeps these ops out of the registry.
"""

from typing import Any

import numpy as np
import pytest

from rapydli_flow.errors import UnknownOp
from rapydli_flow.graph import Fused, parts
from rapydli_flow.ops import (
    Cast,
    Conv,
    Fill,
    Leaf,
    MaxPool,
    Normal,
    Op,
    Phase,
    Pointwise,
    Reject,
    Relu,
    ReluGrad,
    Reshape,
    Sample,
    Sum,
    Tanh,
    TanhGrad,
)
from rapydli_flow.ops import formula as f
from rapydli_flow.spec import Spec
from rapydli_flow.template import Loop, template, templates
from rapydli_flow.testing import kernels
from rapydli_flow.testing import ops as suite

ROW = (Spec((3, 5)),)


class HalfGradient(Pointwise, abstract=True):
    def formula(self, x: Any) -> Any:
        return f.tanh(x)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (TanhGrad()(dy, y) * 0.5,)


class LeakyGradient(Pointwise, abstract=True):
    """Right where x > 0, wrong elsewhere: a kink must not hide it."""

    def formula(self, x: Any) -> Any:
        return f.maximum(x, 0.0)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (ReluGrad()(dy, y) + 0.001 * dy,)


class NoGradientAtAll(Pointwise, abstract=True):
    def formula(self, x: Any) -> Any:
        return x

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (None,)


class TwoGradients(NoGradientAtAll, abstract=True):
    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return dy, dy


class WideGradient(NoGradientAtAll, abstract=True):
    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (np.stack([dy, dy]),)


class GradientOfNumbers(Cast, abstract=True):
    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (dy,)


class Steps(Pointwise, abstract=True):
    def formula(self, x: Any) -> Any:
        return f.floor(x * 1e7)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (dy,)


@pytest.mark.parametrize(
    ("op", "ins", "message"),
    [
        (HalfGradient(), ROW, "vjp of input 0 gives slope .* but differences give"),
        (LeakyGradient(), ROW, "vjp of input 0 gives slope .* but differences give"),
        (NoGradientAtAll(), ROW, "vjp gives None for every input"),
        (TwoGradients(), ROW, "vjp gives 2 cotangents for 1 inputs"),
        (WideGradient(), ROW, r"vjp of input 0 is f64\[2,3,5\], not f64\[3,5\]"),
        (GradientOfNumbers(), (Spec((3,), "uint8"),), "vjp gives a cotangent for input 0, which holds whole numbers"),
        (Steps(), ROW, "input 0: no smooth direction in 10 draws"),
    ],
)
def test_wrong_gradients(op: Op, ins: tuple[Spec, ...], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        suite.check_vjp(Sample(op, ins))


def test_right_gradients() -> None:
    for op in (Tanh(), Relu()):
        suite.check_vjp(Sample(op, ROW))


class Nameless(Op, abstract=True):
    """The base of ops on one row of which only the index formula matters."""

    def infer(self, x: Spec) -> Spec:
        return x

    def reference(self, x: Any) -> Any:
        return x + np.roll(x, 1, 1)


class TooLittle(Nameless, abstract=True):
    def index(self, x: Spec) -> str:
        return "a b -> a b"


class TooMuch(Nameless, abstract=True):
    def index(self, x: Spec) -> str:
        return "a r -> a b | b=5 r=5"


class JustRight(Nameless, abstract=True):
    def index(self, x: Spec) -> str:
        return "a . -> a ."


class Squares(Nameless, abstract=True):
    """Says that the sum over b can be cut, but squares it."""

    def infer(self, x: Spec) -> Spec:
        return Spec(x.shape[:1], x.dtype)

    def index(self, x: Spec) -> str:
        return "a b -> a"

    def reference(self, x: Any) -> Any:
        return x.sum(1) ** 2


class SquaresOfRows(Squares, abstract=True):
    """Says that rows are independent, but subtracts their mean."""

    def infer(self, x: Spec) -> Spec:
        return x

    def index(self, x: Spec) -> str:
        return "a b -> a b"

    def reference(self, x: Any) -> Any:
        return x - x.mean(0)


class ForgetsPadding(Conv, abstract=True):
    def local(self, ins: Any, outs: Any) -> Op:
        return self


class Transposed(Nameless, abstract=True):
    def infer(self, x: Spec) -> Spec:
        return Spec(x.shape[::-1], x.dtype)

    def index(self, x: Spec) -> str:
        return "a b -> a b"

    def reference(self, x: Any) -> Any:
        return x.T


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (TooLittle(), r"input 0 at .* moves output 0 at .*, but 'a b -> a b' does not tell"),
        (TooMuch(), "tells that input 0 at .* is read at .*; it is not"),
    ],
)
def test_wrong_formulas(op: Op, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        suite.check_index(Sample(op, ROW))
    suite.check_index(Sample(JustRight(), ROW))


def test_wrong_places() -> None:
    class Shifted(Nameless, abstract=True):
        def index(self, x: Spec) -> str:
            return "b a -> a b"

    suite.check_in_place(Sample(Shifted(), (Spec((4, 4)),)))  # transposes; the formula does not let it run in place
    suite.check_in_place(Sample(TooLittle(), ROW))


def test_wrong_blocks() -> None:
    with pytest.raises(AssertionError, match=r"b cut at .*: sum of output 0: at "):
        suite.check_local(Sample(Squares(), ROW))
    with pytest.raises(AssertionError, match=r"a cut at .*, block .*: output 0: at "):
        suite.check_local(Sample(SquaresOfRows(), ROW))
    conv = ForgetsPadding(stride=(1,), padding=((1, 1),), dilation=(1,))
    with pytest.raises(AssertionError, match=r"h cut at .*: infer says .*, not the shapes of"):
        suite.check_local(Sample(conv, (Spec((2, 8, 3)), Spec((3, 3, 2)))))


def test_wrong_shapes() -> None:
    class Narrow(Nameless, abstract=True):
        def index(self, x: Spec) -> str:
            return "a b -> a b"

        def reference(self, x: Any) -> Any:
            return x.astype(np.float32)

    class Pair(Narrow, abstract=True):
        outputs = ("a", "b")

        def reference(self, x: Any) -> Any:
            return x

    with pytest.raises(AssertionError, match=r"infer says f64\[3,5\] but reference gives f32\[3,5\]"):
        suite.check_infer(Sample(Narrow(), ROW))
    with pytest.raises(AssertionError, match=r"outputs are called \('a', 'b'\) but there are 1"):
        suite.check_infer(Sample(Pair(), ROW))


def test_wrong_attributes() -> None:
    class Affine(Relu, abstract=True):
        linear = True

    with pytest.raises(UnknownOp):
        suite.check_attributes(Sample(HalfGradient(), ROW))
    Affine.name = "relu"  # JSON gives a Relu, which is another class
    with pytest.raises(AssertionError, match="JSON gives another op"):
        suite.check_attributes(Sample(Affine(), ROW))
    Relu.linear = True
    try:
        with pytest.raises(AssertionError, match="op is not linear"):
            suite.check_attributes(Sample(Relu(), ROW))
    finally:
        del Relu.linear
    assert not Relu.linear


def test_wrong_rejects() -> None:
    class Lenient(Tanh, abstract=True):
        @classmethod
        def rejects(cls) -> tuple[Reject, ...]:
            return (Reject(cls(), ROW, "tanh: no"),)

    class Muddled(Tanh, abstract=True):
        @classmethod
        def rejects(cls) -> tuple[Reject, ...]:
            return (Reject(Sum(axes=(7,)), ROW, "sum: something else"),)

    with pytest.raises(AssertionError, match=r"f32\[3,5\] must be refused but infer gives f32\[3,5\]"):
        suite.check_rejects(Lenient)
    with pytest.raises(AssertionError, match=r"the message 'sum: axes .* does not match 'sum: something else'"):
        suite.check_rejects(Muddled)


def test_ops_without_samples_or_templates() -> None:
    class Bare(Nameless, abstract=True):
        family = "bare"

        def index(self, x: Spec) -> str:
            return "a b -> a b"

    with pytest.raises(AssertionError, match=r"bare: no samples. Give a few small ones"):
        suite.check_op(Bare)
    with pytest.raises(AssertionError, match="bare: cpu_kernels has no template of family 'bare'"):
        kernels.check_has_template(Bare)
    for op in (Leaf, Phase, Normal, Reshape, Fused):
        kernels.check_has_template(op)
    assert kernels.needs_template(MaxPool)
    assert not kernels.needs_samples(Leaf)


def test_sizes_are_consistent_and_ranges_kept() -> None:
    case = next(iter(Conv.samples()))
    other = suite.resized(case, lambda n: n + 1)
    assert other is not None
    assert other.ins == (Spec((3, 6, 7, 6)), Spec((4, 4, 6, 6)))  # the channels of x and w are one letter
    assert suite.resized(case, lambda n: 1 if n == 5 else 9) is None  # a window of 9 does not fit


def test_check_op_runs_everything() -> None:
    suite.check_op(Tanh)


# kernels -----------------------------------------------------------------------------------------------


class Doubled(Op, abstract=True):
    family = "test_doubled"

    def infer(self, x: Spec) -> Spec:
        return x

    def index(self, x: Spec) -> str:
        return "a b -> a b"

    def reference(self, x: Any) -> Any:
        return x * 2

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), ROW),)


@template("test_doubled", "cpu", space={"rows": (1, 3)})
def right(op: Any, ins: Any, outs: Any, epilogue: Any, *, rows: int) -> Loop:
    n = ins[0].shape[1]

    def body(task, x, y, extras, at):
        for i in range(task * rows * n, (task + 1) * rows * n):
            y[i] = x[i] * 2

    return Loop(body, ins[0].shape[0] // rows)


@template("test_doubled", "cpu")
def adds_to_what_is_there(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
    n = ins[0].size

    def body(task, x, y, extras, at):
        for i in range(n):
            y[i] += x[i] * 2

    return Loop(body, 1)


@template("test_doubled", "cpu")
def forgets_the_last(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
    n = ins[0].size

    def body(task, x, y, extras, at):
        for i in range(n - 1):
            y[i] = x[i] * 2

    return Loop(body, 1)


@template("test_doubled", "cpu")
def writes_outside(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
    n = ins[0].size

    def body(task, x, y, extras, at):
        for i in range(n):
            y[i] = x[i] * 2
        y[n + task] = 0

    return Loop(body, 1)


@template("test_doubled", "cpu")
def changes_its_input(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
    n = ins[0].size

    def body(task, x, y, extras, at):
        for i in range(n):
            y[i] = x[i] * 2
            x[i] = 0

    return Loop(body, 1)


@template("test_doubled", "cpu")
def not_in_place(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
    n = ins[0].size

    def body(task, x, y, extras, at):
        for i in range(n):
            y[i] = 0
        for i in range(n):
            y[i] += x[i] * 2

    return Loop(body, 1)


@template("test_doubled", "cpu")
def not_accurate(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
    n = ins[0].size

    def body(task, x, y, extras, at):
        for i in range(n):
            y[i] = x[i] * 2.0001

    return Loop(body, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adds_to_what_is_there", "output 0: at .* nan"),
        ("forgets_the_last", r"output 0: at \(2, 4\) .*nan"),
        ("writes_outside", "wrote outside its buffers"),
        ("changes_its_input", "input 0 was changed"),
        ("not_accurate", "output 0: at "),
    ],
)
def test_wrong_kernels(name: str, message: str) -> None:
    (one,) = (t for t in templates("test_doubled", "cpu") if t.name == name)
    with pytest.raises(AssertionError, match=f"test_doubled/{name} .*{message}"):
        kernels.check_kernel(Doubled.samples()[0], "float32", one, {})


def test_a_kernel_that_may_not_run_in_place() -> None:
    (one,) = (t for t in templates("test_doubled", "cpu") if t.name == "not_in_place")
    kernels.check_kernel(Doubled.samples()[0], "float32", one, {})
    with pytest.raises(AssertionError, match="with output 0 in place of input 0: output 0: at "):
        kernels.check_kernel_in_place(Doubled.samples()[0], "float32", one, {})


def test_right_kernels() -> None:
    one = templates("test_doubled", "cpu")[0]
    assert one.name == "right"
    (sample,) = Doubled.samples()
    kernels.check_kernel(sample, "float64", one, {"rows": 3})
    kernels.check_kernel_in_place(sample, "float64", one, {"rows": 1})


def test_a_template_that_fits_no_sample() -> None:
    class Odd(Doubled, abstract=True):
        family = "test_odd"

    template("test_odd", "cpu", fits=lambda *_, **__: False)(right)
    with pytest.raises(AssertionError, match=r"none of the templates \['right'\] fits float32"):
        kernels.check_has_template(Odd)
    assert kernels.check_templates(Odd.samples()[0]) == 0


def test_configs_that_are_tried() -> None:
    space = {"a": (1, 2, 3), "b": (10, 20)}
    one = next(t for t in templates("test_doubled", "cpu") if t.name == "right")
    made = type(one)("x", "cpu", one.build, space)
    fits = lambda config: config != {"a": 3, "b": 20}  # noqa: E731
    rng = np.random.default_rng(0)
    configs = kernels.chosen_configs(made, {"a": 1, "b": 10}, fits, rng, 2)
    assert configs[:2] == [{"a": 1, "b": 10}, {"a": 3, "b": 10}]
    assert len(configs) == 4
    assert len(kernels.chosen_configs(made, {"a": 1, "b": 10}, fits, rng, 50)) == 5
    assert kernels.chosen_configs(made, {"a": 1, "b": 10}, fits, rng, 0, corner=False) == [{"a": 1, "b": 10}]


def test_buffers_are_aligned_between_guards() -> None:
    buffer = kernels.Buffer.of(Spec((3, 5)))
    assert buffer.array.ctypes.data % 64 == 0
    assert np.isnan(buffer.array).all()
    assert buffer.whole
    buffer.raw[buffer.start - 1] = 0
    assert not buffer.whole
    assert kernels.host().kind == "cpu"
    assert parts(Fill(value=1.0), ())[0] == Fill(value=1.0)
