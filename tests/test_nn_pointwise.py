"""Arithmetic, activations and losses: values in closed form, safe forms, ties, and what is refused."""

import math
from typing import Any

import numpy as np
import pytest

from cpu_kernels.compile import compile_kernel, run_kernel
from rapydli_flow import nn
from rapydli_flow.errors import DTypeError, GraphError, SettingError, ShapeError
from rapydli_flow.graph import Graph, fuse, gradients, trace, train_step
from rapydli_flow.ops import AtLabel, CrossEntropy, Hinge, HingeGrad, InTop, LogSoftmax, Maximum, Minimum, Op, Sum
from rapydli_flow.spec import Spec
from rapydli_flow.template import templates
from rapydli_flow.testing.interpret import interpret, start

BIG = np.array([-1000.0, -30.0, -1.0, 0.0, 1.0, 30.0, 1000.0])
NAN = math.nan


def spec_of(x: Any) -> Spec:
    return Spec(x.shape, x.dtype.name)


def run(function: Any, *arrays: Any) -> Any:
    """What a function of tensors gives for arrays."""
    names = [f"x{i}" for i in range(len(arrays))]
    graph = Graph()
    y = function(*(graph.leaf("batch", name, spec_of(x)) for name, x in zip(names, arrays, strict=True)))
    graph.outputs = {"y": y.id}
    return interpret(graph, {**start(graph, 0), **dict(zip(names, arrays, strict=True))}, 1, 1).outputs["y"]


def pull(function: Any, *arrays: Any) -> list[Any]:
    """The gradients of the sum of a function by its floating operands."""
    names = [f"x{i}" for i in range(len(arrays))]
    graph = Graph()
    leaves = [graph.leaf("batch", name, spec_of(x)) for name, x in zip(names, arrays, strict=True)]
    y = function(*leaves)
    total = Sum(axes=tuple(range(len(y.shape))))(y) if y.shape else y
    found = gradients(graph, total, [leaf for leaf in leaves if leaf.spec.floating])
    graph.outputs = {str(i): dx.id for i, dx in enumerate(found)}
    return [*interpret(graph, dict(zip(names, arrays, strict=True)), 1, 1).outputs.values()]


def kernel(op: Op, *arrays: Any) -> Any:
    """What the CPU template gives."""
    specs = [spec_of(x) for x in arrays]
    (out,) = op.out_specs(*specs)
    (template,) = templates(op.family, "cpu")
    y = np.zeros(out.shape, out.dtype)
    run_kernel(compile_kernel(template, op, specs, [out]), [*arrays], [y])
    return y


# single elements ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "want"),
    [
        (nn.sigmoid, lambda v: 1 / (1 + math.exp(-v)) if v > 0 else math.exp(v) / (1 + math.exp(v))),
        (nn.softplus, lambda v: max(v, 0) + math.log1p(math.exp(-abs(v)))),
        (nn.swish, lambda v: v / (1 + math.exp(-v)) if v > -700 else 0.0),
        (nn.gelu, lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2)))),
        (nn.elu, lambda v: v if v > 0 else math.expm1(v)),
        (lambda x: nn.leaky_relu(x, 0.2), lambda v: v if v > 0 else 0.2 * v),
        (nn.prelu, lambda v: v if v > 0 else 0.25 * v),
        (nn.abs, abs),
        (lambda x: x**2, lambda v: v * v),
        (lambda x: x**3 - nn.power(x, 17), lambda v: v**3 - v**17),
        (lambda x: nn.power(nn.maximum(x, 0.5), -2), lambda v: max(v, 0.5) ** -2),
        (lambda x: nn.power(nn.abs(x), 0.5) - nn.sqrt(nn.abs(x)), lambda v: 0.0),
        (lambda x: nn.power(nn.abs(x), 1.5), lambda v: abs(v) ** 1.5),
        (lambda x: nn.power(x, 0), lambda v: 1.0),
        (lambda x: nn.log(nn.exp(nn.clip(x, -2, 3))), lambda v: min(max(v, -2), 3)),
        (lambda x: nn.minimum(2.0, x), lambda v: min(v, 2.0)),
        (lambda x: nn.clip(x, high=0.5), lambda v: min(v, 0.5)),
        (lambda x: nn.where(x > 0.0, 7.0, x), lambda v: 7.0 if v > 0 else v),
        (lambda x: nn.where(x < 0.0, nn.abs(x), x), abs),
    ],
)
def test_values_of_any_size(function: Any, want: Any) -> None:
    """No exponential overflows: NumPy's warnings are errors here."""
    assert run(function, BIG) == pytest.approx(np.array([want(v) for v in BIG.tolist()]), rel=1e-12, abs=1e-300)
    with np.errstate(over="ignore"):  # 1000**17 is no float32
        assert run(function, BIG[1:-1].astype(np.float32)).dtype == np.float32


def test_gelu_by_tanh_is_near_the_exact_one() -> None:
    x = np.linspace(-5, 5, 101)
    apart = run(lambda x: nn.gelu(x, approximate="tanh"), x) - run(nn.gelu, x)
    assert 1e-5 < np.abs(apart).max() < 1e-3
    assert run(lambda x: nn.gelu(x, approximate="tanh"), np.array([1.0])) == pytest.approx(0.841191990608)


@pytest.mark.parametrize(
    ("function", "want"),
    [
        (nn.sigmoid, [0, 0, 0.25, 0, 0]),
        (nn.softplus, [0, 0, 0.5, 1, 1]),
        (nn.swish, [0, 0, 0.5, 1, 1]),
        (nn.gelu, [0, 0, 0.5, 1, 1]),
        (lambda x: nn.gelu(x, approximate="tanh"), [0, 0, 0.5, 1, 1]),
        (nn.elu, [0, 0, 1, 1, 1]),
        (lambda x: nn.leaky_relu(x, 0.2), [0.2, 0.2, 0.2, 1, 1]),
        (nn.abs, [-1, -1, 0, 1, 1]),
        (lambda x: nn.power(x, 1), [1, 1, 1, 1, 1]),
        (lambda x: nn.power(x, 0), [0, 0, 0, 0, 0]),
        (lambda x: x**2, [-2000, -200, 0, 200, 2000]),
        (lambda x: nn.clip(x, 0.0, 100.0), [0, 0, 1, 1, 0]),
    ],
)
def test_slopes_of_any_size(function: Any, want: list[float]) -> None:
    (dx,) = pull(function, np.array([-1000.0, -100.0, 0.0, 100.0, 1000.0]))
    assert dx == pytest.approx(np.array(want), abs=1e-12)


def test_small_values_keep_their_digits() -> None:
    """Where 1 + exp(x) would be 1: relative precision, in values and slopes."""
    x = np.array([-40.0])
    assert run(nn.softplus, x) == pytest.approx(np.exp(x), rel=1e-14, abs=0)
    assert run(nn.sigmoid, x) == pytest.approx(np.exp(x), rel=1e-14, abs=0)
    assert pull(nn.softplus, x)[0] == pytest.approx(np.exp(x), rel=1e-14, abs=0)


def test_ties_share_the_gradient() -> None:
    a, b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0])
    assert [dx.tolist() for dx in pull(nn.maximum, a, b)] == [[0, 0.5, 1], [1, 0.5, 0]]
    assert [dx.tolist() for dx in pull(nn.minimum, a, b)] == [[1, 0.5, 0], [0, 0.5, 1]]
    assert pull(nn.maximum, a, np.array(2.0))[1] == 1.5


def test_nan_of_either_operand_stays() -> None:
    a, b = np.array([1.0, NAN, 1.0, NAN]), np.array([2.0, 2.0, NAN, NAN])
    for op, first in ((Maximum(), 2.0), (Minimum(), 1.0)):
        for y in (op(a, b), kernel(op, a, b)):
            assert np.array_equal(y, [first, NAN, NAN, NAN], equal_nan=True)


def test_a_choice_passes_no_gradient_to_what_was_not_chosen() -> None:
    x = np.array([-4.0, 9.0])

    def guarded(x: Any) -> Any:
        return nn.where(x > 0.0, nn.sqrt(nn.where(x > 0.0, x, 1.0)), 0.0)

    assert run(guarded, x).tolist() == [0, 3]
    assert pull(guarded, x)[0] == pytest.approx(np.array([0, 1 / 6]))


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "float64"])
def test_conditions_are_true_where_they_are_not_zero(dtype: str) -> None:
    condition, a, b = np.array([0, 1, 2, 3], dtype), np.full(4, 5.0), np.full(4, 7.0)
    assert run(nn.where, condition, a, b).tolist() == [7, 5, 5, 5]
    assert [dx.tolist() for dx in pull(lambda a, b: nn.where(a > b, a, b), a, b)] == [[0] * 4, [1] * 4]


def test_comparisons_stop_the_gradient() -> None:
    x = np.array([-1.0, 2.0])
    assert pull(lambda x: x * (x > 0.0), x)[0].tolist() == [0, 1]
    assert run(lambda x: x < 0.0, x).tolist() == [1, 0]
    with pytest.raises(GraphError, match="does not depend on x0"):
        pull(lambda x: x > 0.0, x)


def test_a_number_beside_whole_numbers_keeps_its_fraction() -> None:
    assert run(lambda x: nn.maximum(x, 1.5), np.array([1, 2])).tolist() == [1.5, 2]
    assert run(lambda x: nn.maximum(x, 1), np.array([0, 2])).dtype == np.int64


@pytest.mark.parametrize("shared", [False, True])
def test_prelu_trains_its_slope(shared: bool) -> None:
    x = np.array([[[-1.0, 2.0], [-3.0, -5.0]]])
    graph = trace(lambda x: nn.prelu(x, shared=shared), spec_of(x))
    (slope,) = graph.leaves("param")
    assert (slope.name, slope.shape) == ("prelu_1/slope", () if shared else (2,))
    graph.outputs["d"] = gradients(graph, Sum(axes=(0, 1, 2))(graph.tensor(graph.outputs["y"])), [slope])[0].id
    out = interpret(graph, {**start(graph, 0), "x": x}, 1, 1).outputs
    assert out["y"].tolist() == [[[-0.25, 2.0], [-0.75, -1.25]]]
    assert out["d"].tolist() == (-9.0 if shared else [-4.0, -5.0])


def test_gradients_from_outputs_leave_the_activation_in_its_host() -> None:
    """The pre-activation is read by nothing else, so each of these is a tail of the matrix product."""
    for activation in (nn.leaky_relu, nn.elu, nn.sigmoid, nn.softplus, nn.tanh):
        network = trace(lambda x, f=activation: nn.dense(f(nn.dense(x, 4)), 3), Spec((2, 5)))
        step = fuse(train_step(network, loss=nn.cross_entropy, optimizer=keep))
        name = activation.__name__
        assert any(node.op.title == f"matmul+add+{name}" for node in step), name


def keep(graph: Graph, pairs: Any, step: Any) -> None:
    for w, g in pairs:
        graph.outputs[f"d {w.name}"] = g.id


# rows of scores ----------------------------------------------------------------------------------------

SCORES = np.random.default_rng(3).normal(size=(2, 3, 4)) * 5
LABEL = np.array([[0, 3, 1], [2, 2, 0]])
AT_LABEL = np.take_along_axis(SCORES, LABEL[..., None], -1)
ONEHOT = np.arange(4) == LABEL[..., None]


def log_softmax(x: Any) -> Any:
    z = x - x.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_softmax_of_every_place() -> None:
    assert run(nn.log_softmax, SCORES) == pytest.approx(log_softmax(SCORES))
    assert run(nn.softmax, SCORES) == pytest.approx(np.exp(log_softmax(SCORES)))
    big = np.array([[1000.0, 0.0, -1000.0]])
    for y in (run(nn.log_softmax, big), kernel(LogSoftmax(), big)):
        assert y.tolist() == [[0, -1000, -2000]]


def test_losses_of_every_place() -> None:
    log_p = log_softmax(SCORES)
    picked = np.take_along_axis(log_p, LABEL[..., None], -1)
    assert run(nn.cross_entropy, SCORES, LABEL) == pytest.approx(-picked.mean())
    assert run(nn.negative_log_likelihood, log_p, LABEL) == pytest.approx(-picked.mean())
    smooth = run(lambda y, label: nn.cross_entropy(y, label, smoothing=0.1), SCORES, LABEL)
    assert smooth == pytest.approx(-0.9 * picked.mean() - 0.1 * log_p.mean())
    assert run(nn.accuracy, SCORES, LABEL) == pytest.approx((SCORES.argmax(-1) == LABEL).mean())
    one = run(lambda y, label: nn.negative_log_likelihood(nn.log_softmax(y), label), SCORES[0], LABEL[0])
    assert one == pytest.approx(-picked[0].mean())


@pytest.mark.parametrize("power", [1, 2])
def test_hinge(power: int) -> None:
    apart = np.where(ONEHOT, 0.0, np.maximum(0.0, 1.0 - AT_LABEL + SCORES)) ** power
    got = run(lambda y, label: nn.hinge(y, label, power=power), SCORES, LABEL)
    assert got == pytest.approx((apart.sum(-1) / 4).mean())
    alone = np.maximum(0.0, 1.0 - np.where(ONEHOT, 1.0, -1.0) * SCORES) ** power
    got = run(lambda y, label: nn.hinge(y, label, power=power, one_against_all=True), SCORES, LABEL)
    assert got == pytest.approx(alone.sum(-1).mean())


@pytest.mark.parametrize("options", [{"power": 2}, {"one_against_all": True}])
def test_kernels_of_the_other_hinges(options: dict[str, Any]) -> None:
    x, label, dy = SCORES[0], LABEL[0], np.array([1.0, 2.0, 3.0])
    assert kernel(Hinge(**options), x, label) == pytest.approx(Hinge(**options)(x, label))
    assert kernel(HingeGrad(**options), dy, x, label) == pytest.approx(HingeGrad(**options)(dy, x, label))


def test_top_k() -> None:
    x = np.array([[3.0, 1.0, 2.0, 0.0]] * 4)
    label = np.arange(4)
    share = [float(run(nn.top_k(k), x, label)) for k in (1, 2, 3, 4)]
    assert share == [0.25, 0.5, 0.75, 1.0]
    assert run(nn.top_k(1), SCORES, LABEL) == run(nn.accuracy, SCORES, LABEL)


def test_of_equal_scores_the_first_are_in_the_top() -> None:
    x = np.array([[1.0, 1.0, 1.0], [NAN, 2.0, NAN], [0.0, NAN, 5.0], [NAN, NAN, NAN]])
    for k, want in (
        (1, [[1, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]]),
        (2, [[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 0]]),
    ):
        rows, label = np.repeat(x, 3, 0), np.tile(np.arange(3), 4)
        for y in (InTop(k=k)(rows, label), kernel(InTop(k=k), rows, label)):
            assert y.reshape(4, 3).tolist() == want


@pytest.mark.parametrize("op", [CrossEntropy(), Hinge(), AtLabel()])
def test_kernels_give_nan_for_a_label_that_is_no_class(op: Op) -> None:
    y = kernel(op, SCORES[0], np.array([-1, 4, 2]))
    assert np.isnan(y).tolist() == [True, True, False]
    assert kernel(InTop(k=4), SCORES[0], np.array([-1, 4, 2])).tolist() == [0, 0, 1]


# targets -----------------------------------------------------------------------------------------------

Y = np.array([[0.5, -2.0, 3.0], [1.0, 0.0, -0.25]])
TARGET = np.array([[0.0, 1.0, 3.0], [1.5, -4.0, 0.0]])


def test_losses_of_targets() -> None:
    d = Y - TARGET
    assert run(nn.mean_squared_error, Y, TARGET) == pytest.approx((d**2).mean())
    assert run(nn.mean_absolute_error, Y, TARGET) == pytest.approx(np.abs(d).mean())
    want = np.where(np.abs(d) < 0.5, d * d, np.abs(d) - 0.25).mean()
    assert run(lambda y, t: nn.smooth_l1(y, t, beta=0.5), Y, TARGET) == pytest.approx(want)
    assert pull(nn.mean_squared_error, Y, TARGET)[1] == pytest.approx(-2 * d / 6)


@pytest.mark.parametrize("dtype", ["float64", "uint8"])
def test_sigmoid_cross_entropy_of_any_size(dtype: str) -> None:
    y, t = np.array([-1000.0, 1000.0, -1000.0, 1000.0, 0.0]), np.array([0, 1, 1, 0, 1], dtype)
    assert run(nn.sigmoid_cross_entropy, y, t) == pytest.approx((0 + 0 + 1000 + 1000 + math.log(2)) / 5)
    assert pull(nn.sigmoid_cross_entropy, y, t)[0] == pytest.approx(np.array([0, 0, -1, 1, -0.5]) / 5)


# what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss", [nn.mean_squared_error, nn.mean_absolute_error, nn.smooth_l1, nn.sigmoid_cross_entropy]
)
def test_targets_are_never_broadcast(loss: Any) -> None:
    message = rf"{loss.__name__}: y is f32\[4,3\] but target is f32\[4,1\]. The target has the shape of y"
    with pytest.raises(ShapeError, match=message):
        trace(loss, Spec((4, 3)), Spec((4, 1)))


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda y, n: nn.cross_entropy(y, n), ShapeError, r"cross_entropy: label has one .* \(x f32\[4,3\], label f32"),
        (lambda y, n: nn.hinge(y, y), ShapeError, "hinge: label has one whole number for each row of x"),
        (lambda y, n: nn.softmax(nn.mean(y, 1)), ShapeError, r"softmax: x has class scores on its last axis.*f32\[4\]"),
        (lambda y, n: nn.top_k(5)(y, nn.argmax(y)), ShapeError, "in_top: k=5 is not 1 to the number of classes, 3"),
        (lambda y, n: nn.maximum(y, n), ShapeError, "maximum: operands do not broadcast"),
        (lambda y, n: nn.maximum(1.0, 2.0), GraphError, "maximum: the operands are float and float. One is a tensor"),
        (lambda y, n: nn.where(True, y, y), GraphError, "where: the condition is bool, not a tensor"),
        (lambda y, n: nn.clip(y), SettingError, "clip: there is neither low nor high"),
        (lambda y, n: nn.clip(y, 1, 0), SettingError, "clip: low=1.0 is larger than high=0.0"),
        (lambda y, n: nn.power(y, math.inf), SettingError, "power: the exponent inf is not a finite number"),
        (lambda y, n: nn.leaky_relu(y, -1.0), SettingError, "leaky_relu: slope=-1.0 is not 0 or more"),
        (lambda y, n: nn.gelu(y, approximate="erf"), SettingError, "gelu: approximate='erf' is not one of none, tanh"),
        (lambda y, n: nn.smooth_l1(y, y, beta=0.0), SettingError, "smooth_l1: beta=0.0 is not positive"),
        (lambda y, n: nn.cross_entropy(y, nn.argmax(y), smoothing=-0.1), SettingError, "smoothing=-0.1 is not in"),
    ],
)
def test_refused(function: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trace(function, Spec((4, 3)), Spec((4,)))


def test_targets_of_another_dtype_are_refused() -> None:
    with pytest.raises(DTypeError, match="subtract: operands have dtypes float32 and float64"):
        trace(nn.mean_squared_error, Spec((4, 3)), Spec((4, 3), "float64"))
