"""Kernels on plain arrays: right numbers, prepared once, kept in bounds, tuned like the rest. Shapes are small."""

import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow import kernels, ops
from rapydli_flow.config import settings
from rapydli_flow.errors import ArgumentError, SettingError
from rapydli_flow.kernels import prepared
from rapydli_flow.runtime.remembered import cache
from rapydli_flow.tuner import Tuning

TOLERANCE = {"float32": 2e-5, "float64": 1e-11}
GEOMETRY = {"stride": (2, 1), "padding": ((1, 0), (1, 1)), "dilation": (1, 1), "groups": 1}
RNG = np.random.default_rng(5)


def random(*shape, dtype="float32"):
    return RNG.uniform(-1, 1, shape).astype(dtype)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[got.dtype.name] * max(1.0, np.abs(want).max()))


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing is prepared, nothing known; kernels are those of other tests."""
    usual = settings().cache_dir / "kernels"
    usual.mkdir(parents=True, exist_ok=True)
    (tmp_path / "kernels").symlink_to(usual)

    def use(**environ):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        settings.cache_clear()
        kernels.release()

    use(RAPYDLI_CACHE_DIR=str(tmp_path))
    yield use
    monkeypatch.undo()
    settings.cache_clear()
    kernels.release()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_convolution_with_its_tail_and_gradients(dtype):
    x, w = random(2, 7, 6, 3, dtype=dtype), random(3, 2, 3, 17, dtype=dtype)
    op = ops.Conv(**GEOMETRY)
    y = op.reference(x, w)
    bias, residual, dy = random(17, dtype=dtype), random(*y.shape, dtype=dtype), random(*y.shape, dtype=dtype)
    got = kernels.conv(x, w, **GEOMETRY, bias=bias, residual=residual, activation="relu")
    assert (got.shape, got.dtype) == (y.shape, np.dtype(dtype))
    close(got, np.maximum(y + bias + residual, 0))
    dx = kernels.conv_input_grad(dy, w, x.shape, **GEOMETRY)
    close(dx, ops.ConvInputGrad(size=x.shape[1:-1], **GEOMETRY).reference(dy, w))
    dw = kernels.conv_filter_grad(x, dy, w.shape, **GEOMETRY)
    close(dw, ops.ConvFilterGrad(window=w.shape[:-2], **GEOMETRY).reference(x, dy))


def test_the_axes_of_space_and_ways_to_write_padding():
    x, w = random(2, 9, 3), random(3, 3, 4)
    want = ops.Conv(stride=(1,), padding=((2, 1),), dilation=(1,)).reference(x, w)
    for padding in ((2, 1), [2, 1], ((2, 1),), (np.int64(2), np.int32(1)), np.array([2, 1])):
        close(kernels.conv(x, w, padding=padding), want)
    x, w = random(1, 4, 5, 3, 2), random(2, 2, 2, 1, 4)
    op = ops.Conv(stride=(1, 2, 1), padding=((1, 1),) * 3, dilation=(1, 1, 1), groups=2)
    close(kernels.conv(x, w, stride=(1, 2, 1), padding=1, groups=2), op.reference(x, w))


@pytest.mark.parametrize(
    ("name", "op"), [*kernels.form.ACTIVATIONS.items(), (ops.LeakyRelu(slope=0.2), ops.LeakyRelu(slope=0.2))], ids=str
)
def test_activations_by_name_or_as_an_operator(name, op):
    a, b = random(3, 4), random(4, 5)
    close(kernels.matmul(a, b, activation=name), op.reference(a @ b))


def test_matrices_are_taken_as_they_lie():
    a, b, bias = random(5, 7), random(7, 9), random(9)
    before = len(prepared._own.calls)
    for ta, tb in itertools.product((False, True), repeat=2):
        left, right = np.ascontiguousarray(a.T) if ta else a, np.ascontiguousarray(b.T) if tb else b
        close(kernels.matmul(left, right, ta=ta, tb=tb, bias=bias), a @ b + bias)
        close(kernels.matmul(left.T if ta else left, right.T if tb else right, bias=bias), a @ b + bias)  # the same
    assert len(prepared._own.calls) == before + 4


@pytest.mark.parametrize("channels", [1, 3, 17])
def test_odd_numbers_of_channels(channels):
    x, w = random(1, 4, 4, channels), random(3, 3, channels, channels)
    op = ops.Conv(stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
    close(kernels.conv(x, w, padding=1), op.reference(x, w))


def test_what_is_not_finite_stays_so():
    x, w = random(1, 5, 5, 2), random(2, 2, 2, 3)
    x[0, 1, 1, 0], x[0, 3, 3, 1] = np.nan, np.inf
    w[0, 0, 1, 0] = 0.0  # inf * 0
    want = np.maximum(ops.Conv(stride=(1, 1), padding=((0, 0),) * 2, dilation=(1, 1)).reference(x, w), 0)
    got = kernels.conv(x, w, activation="relu")
    assert np.isnan(want).sum() > 12
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(np.isposinf(got), np.isposinf(want))
    a, b = np.array([[np.inf, 1.0]], "f"), np.array([[0.0, -1.0], [1.0, 1.0]], "f")
    np.testing.assert_array_equal(kernels.matmul(a, b), [[np.nan, -np.inf]])


# prepared calls -----------------------------------------------------------------------------------------------


def test_a_second_call_reuses_everything_and_shapes_do_not_add_up(monkeypatch):
    monkeypatch.setattr(prepared, "MOST_CALLS", 3)
    kernels.release()
    x, w = random(1, 4, 4, 1), random(3, 3, 1, 1)
    first = kernels.conv(x, w, padding=1)
    (made,) = prepared._own.calls.values()
    second = kernels.conv(x + 1, w, padding=1)
    assert list(prepared._own.calls.values()) == [made]
    assert not np.may_share_memory(first, second)
    close(kernels.conv(x, w, padding=1), first)
    for rows in (0, 2, 0, 3, 0, 4, 0):  # empty operands are prepared without compiling
        kernels.conv(random(1, 4, 4, 1), w, padding=1)
        kernels.matmul(random(rows, 0), random(0, 5))
    assert len(prepared._own.calls) == 3
    assert made in prepared._own.calls.values()  # the latest used stay
    work = prepared._own.memory.size
    assert work == max(call.work_bytes for call in [made])
    kernels.release()
    assert (len(prepared._own.calls), prepared._own.memory.size) == (0, 0)


def test_a_workspace_that_grows_serves_earlier_calls_too():
    kernels.release()
    (x, w), (big, more) = (random(1, 4, 4, 1), random(3, 3, 1, 1)), (random(2, 7, 6, 3), random(3, 2, 3, 17))
    small = ops.Conv(stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1)).reference(x, w)
    large = ops.Conv(**GEOMETRY).reference(big, more)
    for _ in range(2):
        close(kernels.conv(x, w, padding=1), small)
        close(kernels.conv(big, more, **GEOMETRY, bias=np.zeros(17, "f"), residual=np.zeros_like(large)), large)
    assert prepared._own.memory.size == max(call.work_bytes for call in prepared._own.calls.values()) > 0


def test_python_threads_call_at_once():
    x, w = random(2, 7, 6, 3), random(3, 2, 3, 17)
    bias, residual = random(17), random(2, 4, 7, 17)
    inputs = [x * factor for factor in (1, 2, 3, 4)]
    op = ops.Conv(**{**GEOMETRY, "padding": ((1, 0), (1, 1))})
    wanted = [np.maximum(op.reference(each, w) + bias + 0 * op.reference(each, w), 0) for each in inputs]
    residual = np.zeros_like(wanted[0])
    wrong, start = [], threading.Barrier(4)

    def work(i):
        try:
            start.wait()
            for _ in range(200):
                out = kernels.conv(inputs[i], w, **GEOMETRY, bias=bias, residual=residual, activation="relu", threads=2)
                close(out, wanted[i])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_results_do_not_depend_on_threads():
    a, b = random(40, 7), random(7, 9)
    assert np.array_equal(kernels.matmul(a, b, threads=1), kernels.matmul(a, b, threads=3))


def test_calling_loads_no_dask():
    code = "import sys, rapydli_flow as rf; rf.kernels.conv; sys.exit(bool({'dask', 'distributed'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


# tuning -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tuning_is_remembered_with_the_rest_and_used(fresh):
    a, b = random(24, 16), random(16, 32)
    kernels.matmul(a, b, bias=b[0])
    report = kernels.tune("matmul", a, (16, 32), bias=rf.Spec((32,)), budget_s=60.0, trials=2, strategy="random")
    (found,) = report.found
    assert found.best.time_s is not None
    request = found.request
    assert cache().tuning(host()).choices[request.key(host())] == found.best.choice
    close(kernels.matmul(a, b, bias=b[0]), a @ b + b[0])
    network = rf.trace(lambda x: rf.nn.dense(x, 32), rf.Spec((24, 16)))
    (part,) = rf.plan(network).rank_graphs(network)
    (node,) = (n for n in part if "matmul" in n.op.title)
    assert Tuning(host()).serve(node.op, [part.spec(v) for v in node.inputs])[0].key(host()) == request.key(host())


def test_what_was_chosen_runs(fresh, monkeypatch):
    request = kernels.tuned._request("matmul", (random(24, 16), random(16, 32)), {}, None)[0]
    (template, *_) = request.templates(host())
    _, other, *_ = template.configs(request.op, request.ins, request.outs, host())
    asked = []
    real = prepared.kernel_of
    monkeypatch.setattr(prepared, "kernel_of", lambda r, choice, d: asked.append(choice) or real(r, choice, d))
    choice = rf.tuner.Choice.of(template, other)
    monkeypatch.setattr(prepared, "known", lambda device: Tuning(device, {request.key(device): choice}))
    a, b = random(24, 16), random(16, 32)
    close(kernels.matmul(a, b), a @ b)
    assert asked == [choice]


def test_rapydli_tuning_is_respected(fresh):
    a, b = random(24, 16), random(16, 32)
    fresh(RAPYDLI_TUNING="strict")
    with pytest.raises(SettingError, match=r"RAPYDLI_TUNING=strict, and nothing is known for matmul f32\[24,16\]"):
        kernels.matmul(a, b)
    for how in ("strict", "offline", "off"):
        fresh(RAPYDLI_TUNING=how)
        with pytest.raises(SettingError, match=f"nothing is tuned with RAPYDLI_TUNING={how}"):
            kernels.tune("matmul", a, b)
    close(kernels.matmul(a, b), a @ b)


def test_tuning_what_cannot_be_called():
    a = random(3, 4)
    for call, error, text in [
        (lambda: kernels.tune("conf", a, a), ArgumentError, "no function 'conf'. Nearest: 'conv'"),
        (lambda: kernels.tune("matmul", a), ArgumentError, "matmul is not called like this: missing .* 'b'"),
        (lambda: kernels.tune("matmul", a, a, bios=a), ArgumentError, "unexpected keyword argument 'bios'"),
        (lambda: kernels.tune("matmul", a, a), ValueError, "matmul: a gives 4 values but b expects 3"),
    ]:
        with pytest.raises(error, match=text):
            call()
