"""What kernels on plain arrays copy, take as it is, or refuse; and shapes by chance beside each op's reference."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.compile import host
from rapydli_flow import kernels, ops
from rapydli_flow.errors import ArgumentError, DTypeError, SettingError, ShapeError
from rapydli_flow.spec import Spec
from rapydli_flow.template import templates

RNG = np.random.default_rng(7)
TOLERANCE = {"float32": 2e-5, "float64": 1e-11}
ONE = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}


def random(*shape, dtype="float32"):
    return RNG.uniform(-1, 1, shape).astype(dtype)


X, W, BIAS = random(2, 5, 6, 3), random(3, 3, 3, 4), random(4)
Y = ops.Conv(**ONE).reference(X, W) + BIAS


def conv(x=X, w=W, **how):
    return kernels.conv(x, w, **{"padding": 1, "bias": BIAS, **how})


def close(got, want):
    np.testing.assert_allclose(
        got, want, rtol=0, atol=TOLERANCE[got.dtype.name] * max(1.0, np.abs(want).max(initial=0))
    )


def misaligned(x):
    """The same numbers, one byte off."""
    raw = np.zeros(x.nbytes + 1, np.uint8)
    out = raw[1:].view(x.dtype).reshape(x.shape)
    out[...] = x
    assert not out.flags.aligned
    return out


def read_only(x):
    out = x.copy()
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    "turn",
    [
        np.asfortranarray,
        read_only,
        misaligned,
        lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
        lambda x: x[::-1].copy()[::-1],
        lambda x: np.ascontiguousarray(x.swapaxes(0, -1)).swapaxes(0, -1),
        lambda x: x.astype(x.dtype.newbyteorder("S")),
    ],
    ids=["fortran", "read-only", "misaligned", "strided", "reversed", "transposed", "byte order"],
)
def test_operands_that_lie_otherwise(turn):
    for x, w, bias in ((turn(X), W, BIAS), (X, turn(W), BIAS), (X, W, turn(BIAS)), (turn(X), turn(W), turn(BIAS))):
        close(conv(x, w, bias=bias), Y)
        close(conv(x, w, bias=bias, out=np.empty_like(Y)), Y)


def test_lists_and_broadcast_views():
    np.testing.assert_array_equal(kernels.matmul([[1.0, 2.0]], [[3.0], [4.0]]), [[11.0]])
    close(conv(bias=np.broadcast_to(np.float32(2.0), (4,))), Y - BIAS + 2)


def test_out_is_filled_and_given_back():
    out = np.full(Y.shape, np.nan, "f")
    assert conv(out=out) is out
    close(out, Y)
    both = np.full((2, *Y.shape), np.nan, "f")
    conv(out=both[1])
    close(both[1], Y)
    assert np.isnan(both[0]).all()
    backing = np.zeros((2, 5, 6, 6), "f")  # x is copied, so its memory is free to be written to
    backing[..., ::2] = X
    flat = backing.reshape(-1)[: Y.size].reshape(Y.shape)
    close(conv(backing[..., ::2], out=flat), Y)


def test_out_that_cannot_be_filled():
    joint = np.zeros(X.size + Y.size, "f")
    x, near = joint[: X.size].reshape(X.shape), joint[X.size - 1 :][: Y.size].reshape(Y.shape)
    same = Y.astype("f")
    for how, error, text in [
        ({"out": np.empty((2, 5, 6, 3), "f")}, ShapeError, r"out is float32\[2, 5, 6, 3\] but the result is float32\["),
        ({"out": Y.astype("f8")}, ShapeError, r"out is float64\[2, 5, 6, 4\] but the result is float32\[2, 5, 6, 4\]"),
        ({"out": Y.astype(">f4")}, ShapeError, "out is >f4"),
        ({"out": Y.tolist()}, DTypeError, "out is a list, not a NumPy array. Leave it out"),
        ({"out": read_only(same)}, ShapeError, "out is read-only. Leave it out"),
        ({"out": np.asfortranarray(same)}, ShapeError, r"out is not C-contiguous \(strides"),
        ({"out": misaligned(same)}, ShapeError, "out is not aligned to its elements"),
        ({"x": x, "out": near}, ShapeError, "out shares memory with x, which is still read"),
        ({"residual": same, "out": same}, ShapeError, "out shares memory with residual"),
    ]:
        with pytest.raises(error, match=f"kernels.conv: {text}"):
            conv(**how)


def test_nothing_to_compute_and_nothing_to_sum():
    assert conv(X[:0]).shape == (0, 5, 6, 4)
    assert kernels.conv_input_grad(Y[:0], W, (0, 5, 6, 3), padding=1).shape == (0, 5, 6, 3)
    dw = kernels.conv_filter_grad(X[:0], Y[:0].astype("f"), W.shape, padding=1)
    np.testing.assert_array_equal(dw, np.zeros_like(W))
    y = kernels.matmul(np.zeros((2, 0), "f"), np.zeros((0, 4), "f"), bias=BIAS, activation="relu")
    np.testing.assert_array_equal(y, np.maximum([BIAS, BIAS], 0))
    assert kernels.matmul(np.zeros((0, 3), "f"), np.zeros((3, 4), "f")).shape == (0, 4)
    close(conv(X[..., :0], W[:, :, :0]), np.broadcast_to(BIAS, Y.shape))


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ({"x": X.astype("f2")}, DTypeError, "x has dtype float16, but kernels compute in float32 or float64. Cast"),
        ({"w": W.astype("i4")}, DTypeError, "w has dtype int32, but kernels compute in float32 or float64"),
        ({"x": X.astype("c8")}, DTypeError, "x has dtype complex64, but"),
        ({"x": X.astype("f2")[:, ::2]}, DTypeError, "x has dtype float16, but"),
        ({"x": "image.png"}, DTypeError, "x has dtype <U9, but"),
        ({"x": np.ma.masked_array(X)}, DTypeError, "x is a masked array, and kernels know no masks"),
        ({"w": W.astype("f8")}, DTypeError, r"operands need one dtype \(x f32\[2,5,6,3\], w f64\[3,3,3,4\], bias f32"),
        ({"bias": BIAS.astype("f8")}, DTypeError, r"need one dtype \(.* bias f64\[4\]\). Cast them first"),
        ({"x": X[0, 0]}, ShapeError, r"x f32\[6,3\] has 0 spatial axes, not 1 to 3. x is N,\*space,C"),
        ({"x": np.zeros((1,) * 6, "f")}, ShapeError, "has 4 spatial axes, not 1 to 3"),
        ({"w": W[0]}, ShapeError, "conv: 2 strides need x and w with 4 axes"),
        ({"w": W[:, :, :2]}, ShapeError, r"conv: x has 3 channels but w expects 2 \(x f32\[2,5,6,3\], w f32\[3,3,2,"),
        ({"groups": 2}, ShapeError, "conv: x has 3 channels but w expects 3 x 2 groups"),
        ({"w": W[:, :, :1], "groups": 3}, ShapeError, "conv: 4 filters are not divisible by 3 groups"),
        ({"groups": 0}, ShapeError, "groups=0 is not a number of 1 or more"),
        ({"groups": 1.0}, SettingError, "groups=1.0 is not a whole number"),
        ({"w": np.zeros((9, 3, 3, 4), "f")}, ShapeError, "a window of 9 .* does not fit in 5"),
        ({"stride": 0}, SettingError, "stride=0 is not a positive number, or one for each of 2 axes"),
        ({"stride": 2.0}, SettingError, "stride=2.0 is not a whole number, or one for each axis"),
        ({"stride": (1, 2.5)}, SettingError, "stride=2.5 is not a whole number"),
        ({"dilation": (1, 1, 1)}, SettingError, r"dilation=\(1, 1, 1\) is not a positive number"),
        ({"padding": -1}, SettingError, "padding=-1 is not 0 or more, or a .low, high. pair for each of 2 axes"),
        ({"padding": "same"}, SettingError, "padding=same is not 0 or more"),
        ({"bias": BIAS[:3]}, ShapeError, r"bias is f32\[3\] but must be f32\[4\], a number for each filter"),
        ({"residual": X}, ShapeError, r"residual is f32\[2,5,6,3\] but must be f32\[2,5,6,4\], added to each element"),
        ({"activation": "rely"}, SettingError, r"activation='rely' is not one of elu, .*\. Nearest: 'relu'"),
        ({"activation": ops.Add()}, SettingError, r"activation=Add\(\) is not one of"),
        ({"activation": ops.Cast(to="float64")}, SettingError, "is not one of elu, .* nor an operator of one operand"),
        ({"activation": 3}, SettingError, "activation=3 is not one of"),
        ({"threads": 0}, SettingError, "threads=0 is not a number of 1 or more"),
        ({"strides": 2}, ArgumentError, "there is no argument 'strides'. Nearest: 'stride'"),
    ],
)  # fmt: skip
def test_what_a_convolution_refuses(how, error, text):
    for _ in range(2):  # nothing of a refused call is remembered
        with pytest.raises(error, match=text):
            conv(**how)


def test_gradients_of_another_convolution():
    dy = np.zeros((2, 5, 6, 4), "f")
    for call, error, text in [
        (
            lambda: kernels.conv_input_grad(dy, W, X.shape),
            ShapeError,
            r"kernels.conv_input_grad: dy is f32\[2,5,6,4\] but this convolution gives f32\[2,3,4,4\] "
            r"\(x f32\[2,5,6,3\], w f32\[3,3,3,4\]\). Give the shape, stride",
        ),
        (lambda: kernels.conv_input_grad(dy, W, (3, 5, 6, 3), padding=1), ShapeError, r"gives f32\[3,5,6,4\]"),
        (
            lambda: kernels.conv_input_grad(dy, W, (2, 5, 6, 2), padding=1),
            ShapeError,
            "x has 2 channels but w expects 3",
        ),
        (lambda: kernels.conv_input_grad(dy, W, 4, padding=1), ShapeError, "x_shape=4 is not a shape"),
        (lambda: kernels.conv_input_grad(dy, W, (2, -5, 6, 3), padding=1), ShapeError, "has a negative size"),
        (lambda: kernels.conv_filter_grad(X, dy, W.shape), ShapeError, r"this convolution gives f32\[2,3,4,4\]"),
        (lambda: kernels.conv_filter_grad(X, dy, (3, 3, 3, 9), padding=1), ShapeError, r"gives f32\[2,5,6,9\]"),
        (
            lambda: kernels.conv_filter_grad(X, dy, (3, 3.0, 3, 4), padding=1),
            SettingError,
            "w_shape=3.0 is not a whole",
        ),
        (lambda: kernels.matmul(X, dy), ShapeError, "matmul: a and b are matrices"),
        (lambda: kernels.matmul(dy[0, 0], dy[0, 0]), ShapeError, "matmul: a gives 4 values but b expects 6"),
        (lambda: kernels.matmul(dy[0, 0], W[0, 0], ta=1), SettingError, "ta=1 and tb=False must be True or False"),
    ]:
        with pytest.raises(error, match=text):
            call()


# beyond 2^31 elements -----------------------------------------------------------------------------------------


def sparse(tmp_path, shape):
    """A float32 array in a file without blocks: what is never written costs nothing."""
    return np.memmap(tmp_path / "sparse", np.float32, "w+", shape=shape)


def test_addresses_beyond_31_bits(tmp_path):
    step, positions = 1 << 20, 2**11 + 3
    x = sparse(tmp_path, (1, step * (positions - 1) + 2, 1))
    assert x.size > 2**31
    picked = random(positions)
    x[0, ::step, 0], x[0, -1, 0] = picked, 5.0
    w = np.array([2.0, 3.0], "f").reshape(2, 1, 1)
    want = 2 * picked
    want[-1] += 3 * 5.0
    close(kernels.conv(x, w, stride=step).reshape(-1), want)
    dy = random(1, positions, 1)
    dw = kernels.conv_filter_grad(x, dy, w.shape, stride=step)
    close(dw.reshape(-1), np.array([picked @ dy.reshape(-1), 5.0 * dy[0, -1, 0]]))


def test_index_arithmetic_is_64_bit():
    """Where results lie cannot be tried so cheaply: no kernel's text makes a number of less than 64 bits."""
    x, w = Spec((1, 1 << 31, 2)), Spec((3, 2, 5))
    op = ops.Conv(stride=(1,), padding=((1, 1),), dilation=(1,))
    y, geometry = op.infer(x, w), op.geometry
    asked = [
        (op, (x, w)),
        (ops.ConvInputGrad(size=x.shape[1:-1], **geometry), (y, w)),
        (ops.ConvFilterGrad(window=(3,), **geometry), (x, y)),
        (ops.Matmul(), (Spec((1 << 31, 3)), Spec((3, 2)))),
    ]
    from cpu_kernels.compile import Asked
    from rapydli_flow.template import Epilogue

    for op, ins in asked:
        outs = op.out_specs(*ins)
        for template in templates(op.family, "cpu"):
            config = template.default(op, ins, outs, host())
            if config is not None:
                text = Asked(template, op, ins, outs, config, Epilogue.none(outs[0])).text()
                assert not re.search(r"\bu?int(8|16|32)\b", text), template.name


# by chance ----------------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw):
    """Operands and geometry of a convolution that fits."""
    space, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 1, 2, 3]))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(space))  # noqa: E731
    window, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    padding = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(space))
    size = tuple(
        max(1, d * (k - 1) + 1 - sum(p)) + draw(st.integers(0, 4))
        for k, d, p in zip(window, dilation, padding, strict=True)
    )
    c, k = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 3, 5, 8, 17]))
    batch = draw(st.integers(0, 3))
    dtype = draw(st.sampled_from(["float32", "float64"]))
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return (batch, *size, c * groups), (*window, c, k * groups), dtype, geometry


def check_convolution(case, activation, seed):
    """A convolution with everything, and both gradients, beside the reference in float64."""
    x_shape, w_shape, dtype, geometry = case
    rng = np.random.default_rng(seed)
    op = ops.Conv(**geometry)
    shape = op.infer(Spec(x_shape), Spec(w_shape)).shape
    shapes = (x_shape, w_shape, shape[-1:], shape, shape)
    x, w, bias, residual, dy = (rng.uniform(-1, 1, each).astype(dtype) for each in shapes)
    wide = [a.astype("f8") for a in (x, w, bias, residual, dy)]
    y = op.reference(*wide[:2]) + wide[2] + wide[3]
    want = kernels.form.ACTIVATIONS[activation].reference(y) if activation else y
    got = kernels.conv(x, w, **geometry, bias=bias, residual=residual, activation=activation)
    close(got, want)
    dx = kernels.conv_input_grad(dy, w, x.shape, **geometry)
    close(dx, ops.ConvInputGrad(size=x.shape[1:-1], **geometry).reference(wide[4], wide[1]))
    dw = kernels.conv_filter_grad(x, dy, w.shape, **geometry)
    close(dw, ops.ConvFilterGrad(window=w.shape[:-2], **geometry).reference(wide[0], wide[4]))


@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(convolutions(), st.sampled_from([None, "relu", "tanh", "gelu"]))
def test_some_convolutions(case, activation):
    check_convolution(case, activation, 0)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(convolutions(), st.sampled_from([None, *kernels.form.ACTIVATIONS]), st.integers(0, 9))
def test_many_convolutions(case, activation, seed):
    check_convolution(case, activation, seed)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(
    st.tuples(*[st.integers(0, 40)] * 3), st.booleans(), st.booleans(), st.sampled_from(["float32", "float64"]),
    st.sampled_from([None, *kernels.form.ACTIVATIONS]),
)  # fmt: skip
def test_many_products(extents, ta, tb, dtype, activation):
    m, i, k = extents
    rng = np.random.default_rng(m + i + k)
    a, b, bias = (rng.uniform(-1, 1, s).astype(dtype) for s in ((i, m) if ta else (m, i), (k, i) if tb else (i, k), k))
    y = (a.T if ta else a).astype("f8") @ (b.T if tb else b).astype("f8") + bias
    want = kernels.form.ACTIVATIONS[activation].reference(y) if activation else y
    close(kernels.matmul(a, b, ta=ta, tb=tb, bias=bias, activation=activation), want)
