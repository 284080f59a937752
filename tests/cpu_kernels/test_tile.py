"""Register tiles, and the kernels made of them: convolution, its gradients, matrix products."""

from itertools import product

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError

from cpu_kernels import conv_filter_grad, conv_geometry, dense
from cpu_kernels.buffer import local
from cpu_kernels.compile import compile_kernel, run_kernel
from cpu_kernels.tile import add, balanced, holds, load, outer, store, transpose, zeros
from rapydli_flow.ops.conv import Conv, ConvFilterGrad, ConvInputGrad
from rapydli_flow.ops.dense import Matmul
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Scalar, templates

DTYPES = ("float32", "float64")
OPS = (Conv, ConvInputGrad, ConvFilterGrad, Matmul)
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def tiled(family):
    """The template on register tiles that serves every shape."""
    (found,) = (one for one in templates(family, "cpu") if one.name.endswith("tiles"))
    return found


def device(vector_bytes):
    return Device("cpu", "test", vector_bytes=vector_bytes)


@pytest.mark.parametrize(("lanes", "dtype"), [*product((4, 8, 16), DTYPES), (2, "float64")])
def test_outer_store_and_load_touch_valid_lanes_only(lanes, dtype):
    width, tail = 2 * lanes - 1, lanes - 1

    @njit
    def kernel(x, w, y, copy):
        acc = zeros(2, 3, 2, lanes, y)
        for c in range(5):
            acc = outer(acc, x, c, 5, 20, w, c * width, tail)
        store(acc, y, 0, width, tail)
        store(load(acc, y, 0, width, tail), copy, 0, 2 * lanes, 0)

    rng = np.random.default_rng(0)
    x, w = rng.uniform(-2, 2, 40).astype(dtype), rng.uniform(-2, 2, (5, width)).astype(dtype)
    y, copy = np.full(6 * width + 1, np.nan, dtype), np.full(12 * lanes, np.nan, dtype)
    kernel(x, w.ravel(), y, copy)
    rows = np.array([x[line * 20 + i * 5 :][:5] for line in range(2) for i in range(3)])
    np.testing.assert_allclose(y[:-1].reshape(6, width), rows @ w, rtol=TOLERANCE[dtype], atol=1e-5)
    assert np.isnan(y[-1])
    np.testing.assert_array_equal(copy.reshape(6, -1)[:, :width], y[:-1].reshape(6, width))
    np.testing.assert_array_equal(copy.reshape(6, -1)[:, width:], 0)


def test_add_to_rows_that_overlap():
    @njit
    def kernel(x, y):
        add(load(zeros(1, 3, 2, 4, y), x, 0, 7, 3), y, 1, 2, 3)

    x, y = np.arange(21.0), np.full(13, 100.0)
    want = y.copy()
    for i in range(3):
        want[1 + 2 * i :][:7] += x[7 * i :][:7]
    kernel(x, y)
    np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize(("lanes", "dtype"), [*product((4, 8, 16), DTYPES), (2, "float64")])
def test_transpose(lanes, dtype):
    size = lanes * lanes

    @njit
    def kernel(x, y):
        square = zeros(1, lanes, 1, lanes, x)
        square = load(square, x, 0, lanes, 0)
        scratch = local(size, x)
        store(transpose(square), scratch, 0, lanes, 0)
        for i in range(lanes * lanes):
            y[i] = scratch[i]

    x = np.arange(lanes * lanes, dtype=dtype).reshape(lanes, lanes)
    y = np.zeros_like(x)
    kernel(x.ravel(), y.reshape(-1))
    np.testing.assert_array_equal(y, x.T)


def test_transpose_of_a_tile_that_is_not_square():
    @njit
    def kernel(x):
        transpose(zeros(1, 4, 1, 8, x))

    with pytest.raises(TypingError, match=r"is not square\. Give 1 line, 8 rows and 1 vector"):
        kernel(np.zeros(32, np.float32))


def test_extents_are_constants():
    @njit
    def kernel(x, n):
        zeros(1, n, 1, 8, x)

    with pytest.raises(TypingError, match="zeros: rows is not a constant"):
        kernel(np.zeros(32, np.float32), 4)


def test_balanced_pieces():
    assert [balanced(n, 14) for n in (1, 8, 14, 15, 27, 28, 32)] == [1, 8, 14, 8, 14, 14, 11]


def test_registers():
    assert holds(14, 2, 16, 4, 64)
    assert not holds(15, 2, 16, 4, 64)  # 33 vectors
    assert not holds(14, 2, 8, 4, 64)  # 16 registers of 32 bytes
    assert not holds(1, 1, 16, 4, 32)  # no such vectors


def check(op, ins, dtype, vector_bytes, config=None, template=None):
    """A kernel against the reference in float64; the output is NaN before, the workspace too."""
    ins = tuple(Spec(s.shape, dtype) for s in ins)
    out = op.infer(*ins)
    template = template or tiled(op.family)
    config = config or template.default(op, ins, (out,), device(vector_bytes))
    kernel = compile_kernel(template, op, ins, (out,), device(vector_bytes), config)
    rng = np.random.default_rng(1)
    arrays = [rng.uniform(-2, 2, s.shape).astype(dtype) for s in ins]
    y = np.full(out.shape, np.nan, dtype)
    work = [np.full(s.shape, np.nan, s.dtype) for s in template.workspace(op, ins, (out,), **config)]
    run_kernel(kernel, arrays, [y], work=work, threads=2)
    expected = op.reference(*(a.astype("float64") for a in arrays))
    error = np.abs(y - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE[dtype], f"{op} {dtype} {config}: relative error {error}"


SAMPLES = [pytest.param(s, i, id=f"{c.name}-{i}") for c in OPS for i, s in enumerate(c.samples())]


@pytest.mark.parametrize(("sample", "i"), SAMPLES)
def test_samples(sample, i):
    dtype, vector_bytes = DTYPES[i % 2], (64, 32, 16)[i % 3]
    check(sample.op, sample.ins, dtype, vector_bytes)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("sample", "i"), SAMPLES)
def test_every_config(sample, i):
    out = sample.op.infer(*sample.ins)
    template = tiled(sample.op.family)
    configs = list(template.configs(sample.op, sample.ins, (out,), device(64)))
    assert len(configs) <= 64
    for config in configs:
        check(sample.op, sample.ins, "float32", 64, config)


@pytest.mark.parametrize("padding", [((0, -1), (3, -2)), ((-2, -1), (-1, 0))])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
def test_negative_padding_crops(stride, padding):
    x, w = Spec((2, 11, 12, 3)), Spec((3, 2, 3, 7))
    geometry = {"stride": stride, "padding": padding, "dilation": (1, 1), "groups": 1}
    y = Conv(**geometry).infer(x, w)
    grad = ConvInputGrad(size=(11, 12), **geometry)
    check(Conv(**geometry), (x, w), "float32", 32)
    for overlap in (False, True):
        config = {"rows": 4, "vectors": 1, "lanes": 8, "tasks": 64, "chunk": 256, "overlap": overlap}
        check(grad, (y, w), "float32", 32, config)
    config = {"rows": 6, "vectors": 1, "lanes": 8, "split": 1, "pixels": 256, "together": 1}
    check(ConvFilterGrad(window=(3, 2), **geometry), (x, y), "float32", 32, config)


@pytest.mark.parametrize(("sample", "i"), [(c.samples()[0], i) for i, c in enumerate(OPS)])
def test_each_element_passes_the_epilogue_once(sample, i):
    """A bias, and a residual that is overwritten by the output."""
    op, ins = sample.op, sample.ins
    out = op.infer(*ins)
    template = tiled(op.family)
    scalar = Scalar(("v", "e0", "e1"), ("total = v + e0", "total = total + e1"), ("total",))
    config = template.default(op, ins, (out,), device(32))
    epilogue = Epilogue(scalar, (Spec(out.shape[-1:]), out), out)
    kernel = compile_kernel(template, op, ins, (out,), device(32), config, epilogue=epilogue)
    rng = np.random.default_rng(2)
    arrays = [rng.uniform(-2, 2, s.shape).astype("float32") for s in (*ins, *epilogue.extras)]
    work = [np.full(s.shape, np.nan, s.dtype) for s in template.workspace(op, ins, (out,), **config)]
    expected = op.reference(*arrays[:2]) + arrays[2] + arrays[3]
    y = arrays[3]
    run_kernel(kernel, arrays[:2], [y], work=work, extras=[arrays[2], y])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["conv", "conv_input_grad", "conv_filter_grad"])
def test_nothing_to_compute_has_no_config(family):
    geometry = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}
    x, w, y = Spec((2, 5, 5, 0)), Spec((3, 3, 0, 4)), Spec((2, 5, 5, 4))
    op, ins, out = {
        "conv": (Conv(**geometry), (x, w), y),
        "conv_input_grad": (ConvInputGrad(size=(5, 5), **geometry), (y, w), x),
        "conv_filter_grad": (ConvFilterGrad(window=(3, 3), **geometry), (x, y), w),
    }[family]
    for one in templates(family, "cpu"):
        assert one.default(op, ins, (out,), device(64)) is None
        assert not one.space_of(op, ins, (out,), device(64))


def test_parts_of_a_filter_gradient_add_up():
    geometry = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "groups": 1}
    op, ins = ConvFilterGrad(window=(3, 3), **geometry), (Spec((9, 6, 6, 5)), Spec((9, 6, 6, 4)))
    for split in (1, 8):
        check(
            op, ins, "float32", 32, {"rows": 8, "vectors": 1, "lanes": 8, "split": split, "pixels": 256, "together": 1}
        )


@pytest.mark.parametrize(
    ("dtype", "channels", "groups", "stride", "split", "together", "rows"),
    [
        ("float32", 150, 1, 1, 1, 2, 4),
        ("float32", 131, 1, 2, 2, 2, 6),
        ("float64", 70, 1, 1, 1, 4, 5),
        ("float32", 290, 2, 1, 1, 4, 6),
    ],
)
def test_channels_of_pixels_that_lie_far_apart_are_copied(dtype, channels, groups, stride, split, together, rows):
    geometry = {"stride": (stride,) * 2, "padding": ((1, 0), (0, 0)), "dilation": (1, 1), "groups": groups}
    x, w = Spec((2, 5, 6, channels), dtype), Spec((1, 1, channels // groups, 70), dtype)
    dy = Conv(**geometry).infer(x, w)
    op = ConvFilterGrad(window=(1, 1), **geometry)
    config = {"rows": rows, "vectors": 2, "lanes": 4, "split": split, "pixels": 256, "together": together}
    assert conv_filter_grad._blocking(op, (x, dy), (w,), config).gathered > 0
    check(op, (x, dy), dtype, 32, config)


def test_aliasing_rows_are_copied():
    for ta in (False, True):
        a = Spec((300, 512) if not ta else (512, 300))
        check(Matmul(ta=ta), (a, Spec((a.shape[int(not ta)], 40))), "float32", 32)


def test_phases_of_a_strided_input_gradient():
    axis = conv_geometry.backward(conv_geometry.Sizes(x=7, y=3, window=3, stride=2, low=0, dilation=1))
    assert (axis.taps, axis.count, axis.into) == ((2, 1), (4, 3), (0, 1))
    assert (axis.low, axis.high, axis.first) == (1, 1, (0, 1))


def test_pointwise_convolution_is_flat():
    op = Conv(stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1))
    ins = (Spec((2, 3, 4, 5)), Spec((1, 1, 5, 6)))
    g = conv_geometry.geometry(op, ins, (op.infer(*ins),)).flat()
    assert (g.n, [axis.out for axis in g.axes]) == (1, [1, 1, 24])


@pytest.mark.parametrize(("ta", "tb"), [*product((False, True), repeat=2)])
@pytest.mark.parametrize(
    ("m", "inner", "k"),
    [
        (131, 600, 301),  # several blocks, bands and depths, none of them even
        (707, 21, 90),  # one depth: tiles are written as they come
        (16, 9, 500),
        (5, 100, 2100),  # few rows: b is read where it lies, if it is not transposed
    ],
)
def test_products_of_many_blocks(m, inner, k, ta, tb):
    op, y = Matmul(ta=ta, tb=tb), Spec((m, k))
    a, b = Spec((inner, m) if ta else (m, inner)), Spec((k, inner) if tb else (inner, k))
    config = tiled("matmul").default(op, (a, b), (y,), device(32))
    assert config["pack"] == (tb or m > 5)
    blocking = dense.Blocking.of(y, inner, ta, **config)
    assert blocking.each >= 16
    assert blocking.single == (inner <= (256 if config["pack"] else 8))
    check(op, (a, b), "float32", 32)


@pytest.mark.parametrize("ta", [False, True])
@pytest.mark.parametrize(("m", "k", "dtype"), [(1, 40, "float32"), (8, 37, "float32"), (3, 3, "float64")])
def test_products_of_few_rows_with_a_large_matrix(m, k, ta, dtype):
    (streamed,) = (one for one in templates("matmul", "cpu") if one.name == "streamed")
    op, a, b, y = Matmul(ta=ta), Spec((205, m) if ta else (m, 205), dtype), Spec((205, k), dtype), Spec((m, k), dtype)
    for vector_bytes in (16, 32, 64):
        check(op, (a, b), dtype, vector_bytes, template=streamed)
    assert not streamed.space_of(Matmul(tb=True), (Spec((m, 205), dtype), Spec((k, 205), dtype)), (y,), device(32))
    assert not streamed.space_of(op, (Spec((205, 9)), b), (Spec((9, k)),), device(32))
