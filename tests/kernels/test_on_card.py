"""Kernels on arrays of a GPU, which NumPy plays: this package's own, and those that other libraries describe."""

import threading
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from gpu_kernels import emulated
from gpu_kernels.launch import Card
from rapydli_flow import kernels, ops
from rapydli_flow.errors import DeviceFault, DTypeError, SettingError, ShapeError, TooLittleMemory
from rapydli_flow.kernels import on_card, prepared
from rapydli_flow.runtime import card_array
from rapydli_flow.runtime.card_array import CardArray, Desk
from rapydli_flow.runtime.devices import device_of
from rapydli_flow.spec import Spec

CARD = "emulated"
RNG = np.random.default_rng(3)
TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3}


def random(*shape, dtype="float32"):
    return RNG.uniform(-1, 1, shape).astype(dtype)


def close(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1.0, np.abs(want).max()))


def there(x):
    return kernels.to_device(x, CARD)


@pytest.fixture(autouse=True)
def released():
    kernels.release()
    yield
    kernels.release()


GEOMETRY = {"stride": (2, 1), "padding": ((1, 0), (1, 1)), "dilation": (1, 1), "groups": 1}


def test_a_convolution_its_tail_and_gradients():
    x, w, bias = random(2, 7, 6, 4), random(3, 2, 4, 8), random(8)
    y = ops.Conv(**GEOMETRY).reference(x, w)
    residual, dy = random(*y.shape), random(*y.shape)
    tail = {"bias": bias, "residual": residual}
    got = kernels.conv(there(x), there(w), **GEOMETRY, **{k: there(v) for k, v in tail.items()}, activation="relu")
    assert type(got) is CardArray
    close(got, kernels.conv(x, w, **GEOMETRY, **tail, activation="relu"))
    dx = kernels.conv_input_grad(there(dy), there(w), x.shape, **GEOMETRY)
    close(dx, kernels.conv_input_grad(dy, w, x.shape, **GEOMETRY))
    dw = kernels.conv_filter_grad(there(x), there(dy), w.shape, **GEOMETRY, tf32=True, exact=False)
    np.testing.assert_allclose(np.asarray(dw), kernels.conv_filter_grad(x, dy, w.shape, **GEOMETRY), atol=5e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves(dtype):
    a, b = random(16, 32, dtype=dtype), random(32, 24, dtype=dtype)
    got = kernels.matmul(there(a), there(b), activation="tanh")
    assert got.dtype == a.dtype
    wanted = np.tanh(a.astype(np.float64) @ b.astype(np.float64))
    np.testing.assert_allclose(np.asarray(got).astype(np.float64), wanted, atol=TOLERANCE[dtype])
    with pytest.raises(DTypeError, match=r"a has dtype .*, but kernels compute in float32 or float64"):
        kernels.matmul(a, b)  # on a processor


def test_a_result_goes_where_it_is_wanted():
    x, w = there(random(1, 5, 5, 4)), there(random(3, 3, 4, 8))
    out = there(np.zeros((1, 3, 3, 8), np.float32))
    assert kernels.conv(x, w, out=out) is out
    close(out, kernels.conv(np.asarray(x), np.asarray(w)))
    assert kernels.conv(x, w) is not out


def test_calls_are_prepared_once(monkeypatch):
    made = []
    monkeypatch.setattr(on_card, "CardCall", lambda *how, _made=on_card.CardCall: made.append(how) or _made(*how))
    x, w = there(random(1, 5, 5, 4)), there(random(3, 3, 4, 8))
    monkeypatch.setattr(prepared, "MOST_CALLS", 2)
    for padding in (0, 1, 0, 2, 1):  # 1 is the oldest when 2 comes
        kernels.conv(x, w, padding=padding)
    assert len(made) == 4
    assert len(prepared._own.on_cards) == 2
    kernels.release()
    assert not prepared._own.on_cards
    kernels.conv(x, w)
    assert len(made) == 5


BAD = [
    (lambda x, w: kernels.conv(x, np.asarray(w)), SettingError, "w lies on the host, other operands on a GPU"),
    (lambda x, w: kernels.conv(np.asarray(x), w), SettingError, "x lies on the host, other operands on a GPU"),
    (lambda x, w: kernels.conv(x, w, threads=1), SettingError, "threads=1 is for arrays of the host"),
    (lambda x, w: kernels.conv(x, w, out=w), ShapeError, r"out is f32\[3,3,4,8\] but the result is f32\[1,3,3,8\]"),
    (lambda x, w: kernels.conv(x, w, out=np.zeros(3)), SettingError, "out lies on the host"),
    (lambda x, w: kernels.conv(x, there(np.ones((3, 3, 5, 8), "float32"))), ShapeError, "conv"),
    (lambda x, w: kernels.conv(x, there(np.asarray(w, "float16"))), DTypeError, "operands need one dtype"),
    (lambda x, w: kernels.conv(there(np.ones((0, 5, 5, 4), "float32")), w), ShapeError, "must be something to compute"),
    (lambda x, w: kernels.conv(np.asarray(x), np.asarray(w), stream=3), SettingError, "stream=3 is for arrays of a"),
    (lambda x, w: kernels.to_device(x, "cpu"), SettingError, "device='cpu' is not a GPU"),
    (lambda x, w: kernels.to_device(x, "gpu"), SettingError, "to_device: device='gpu' is not 'cpu', 'cuda'"),
    (lambda x, w: kernels.to_device(np.array(["a"]), CARD), DTypeError, "x has dtype <U1, which is not one of float32"),
    (lambda x, w: kernels.to_device(np.ones(3, "int32"), CARD), DTypeError, "x has dtype int32, which is not one of"),
]


@pytest.mark.parametrize("at", range(len(BAD)))
def test_what_does_not_fit(at):
    call, error, message = BAD[at]
    with pytest.raises(error, match=message):
        call(there(random(1, 5, 5, 4)), there(random(3, 3, 4, 8)))


def test_what_no_kernel_serves_is_said(monkeypatch):
    a = there(np.ones((8, 8), np.float32))
    monkeypatch.setattr(on_card, "known", lambda device: SimpleNamespace(serve=lambda *_: (None, REFERENCE)))
    with pytest.raises(SettingError, match=r"matmul: no GPU kernel serves f32\[8,8\], f32\[8,8\]. Cast to float32"):
        kernels.matmul(a, a)


REFERENCE = SimpleNamespace(reference=True)


# arrays of other libraries


class Foreign:
    """An array of another library, on the card that NumPy plays."""

    device = None

    def __init__(self, held, *, shape=None, strides=None, offset=0, read_only=False, stream=None, **more):
        self.held, self.asked = held, 0
        address, typestr = held.address + offset, "<V2" if held.spec.dtype == "bfloat16" else held.dtype.str
        self.said = {"shape": shape or held.shape, "typestr": typestr, "data": (address, read_only), "version": 3}
        self.said |= {"strides": strides, "stream": stream} | more

    @property
    def __cuda_array_interface__(self):
        return self.said

    def new_empty(self, shape):
        self.asked += 1
        return Foreign(self.held.desk.put(np.empty(shape, self.held.dtype)))

    @property
    def T(self):
        return Foreign(self.held)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.held)


class Stream:
    """What a library that is no CUDA library here would have."""

    def __init__(self, handle, **_):
        self.cuda_stream = handle


@pytest.fixture
def allocated():
    """Streams whose memory results are in."""
    return []


@pytest.fixture
def launched(monkeypatch, allocated):
    """Streams that kernels went to; foreign arrays are PyTorch's, and on the emulated card."""
    streams = []
    bind = Desk.bind
    monkeypatch.setattr(on_card, "device_with", lambda x: device_of(CARD))
    monkeypatch.setattr(
        Desk, "bind", lambda self, *how, stream: streams.append(stream) or bind(self, *how, stream=stream)
    )

    @contextmanager
    def at(stream):
        allocated.append(stream.cuda_stream)
        yield

    cuda = SimpleNamespace(stream=at, ExternalStream=Stream, current=0)
    cuda.current_stream, cuda.default_stream = lambda _: Stream(cuda.current), lambda _: Stream(0)
    torch = SimpleNamespace(Tensor=Foreign, cuda=cuda)
    monkeypatch.setitem(on_card.sys.modules, "torch", torch)
    return streams


def foreign(x, **how):
    return Foreign(there(x), **how)


def test_arrays_of_another_library(launched):
    x, w, b = random(2, 6, 6, 4), random(3, 3, 4, 8), random(8)
    given = [foreign(x), foreign(w)]
    y = kernels.conv(*given, padding=1, bias=foreign(b), activation="relu")
    assert type(y) is Foreign
    assert given[0].asked == 1
    close(y, kernels.conv(x, w, padding=1, bias=b, activation="relu"))
    out = foreign(np.zeros((2, 6, 6, 8), np.float32))
    for _ in range(3):
        assert kernels.conv(*given, padding=1, bias=foreign(b), activation="relu", out=out) is out
    close(out, y)
    a, halves = foreign(random(8, 16, dtype="bfloat16")), foreign(random(16, 8, dtype="bfloat16"))
    assert np.asarray(kernels.matmul(a, halves)).dtype == np.dtype("bfloat16")  # PyTorch calls it <V2


def test_the_stream_is_the_callers(launched, allocated, monkeypatch):
    followed = []
    monkeypatch.setattr(emulated.Emulated, "follow", lambda self, *streams: followed.append(streams))
    a, b, c = (foreign(random(8, 8), stream=stream) for stream in (None, 7, 8))
    kernels.matmul(a, a)
    on_card.sys.modules["torch"].cuda.current = 12
    kernels.matmul(a, a)
    kernels.matmul(a, b)
    assert followed == []
    kernels.matmul(b, c)
    assert followed == [(7, 8)]  # what is in c is made in another stream
    followed.clear()
    numba, of_default = (SimpleNamespace(handle=SimpleNamespace(value=value)) for value in (11, None))
    for stream in (9, SimpleNamespace(cuda_stream=5), SimpleNamespace(ptr=6), numba, of_default):
        kernels.matmul(a, b, stream=stream)
    assert launched == [0, 12, 7, 7, 9, 5, 6, 11, 0]
    assert allocated == launched  # PyTorch gives out memory by stream
    assert followed == [(stream, 7) for stream in (9, 5, 6, 11, 0)]
    with pytest.raises(SettingError, match=r"stream='main' is not a stream of CuPy, PyTorch or Numba, nor its handle"):
        kernels.matmul(a, b, stream="main")


def test_packed_arguments_are_kept_for_the_latest_addresses(launched, monkeypatch):
    monkeypatch.setattr(on_card, "MOST_LAUNCHES", 2)
    a, outs = foreign(random(8, 8)), [foreign(np.zeros((8, 8), np.float32)) for _ in range(3)]
    for at in (0, 1, 0, 2, 0, 1):  # when 2 comes, 1 goes
        kernels.matmul(a, a, out=outs[at])
    assert len(launched) == 4
    for out in outs:
        close(out, np.asarray(a) @ np.asarray(a))


def test_arrays_of_this_package_on_a_stream_of_another(launched, monkeypatch):
    waited = []
    monkeypatch.setattr(emulated.Emulated, "wait_for", lambda self, stream: waited.append(stream))
    a = there(random(8, 8))
    y = kernels.matmul(a, a, stream=4)
    assert type(y) is CardArray
    assert launched == waited == [4]  # who reads it asks another queue
    close(y, np.asarray(a) @ np.asarray(a))


def test_a_launch_that_fails_is_named(launched, monkeypatch):
    def refused():
        raise DeviceFault("cuLaunchKernel: CUDA_ERROR_LAUNCH_FAILED (719).", sticky=True)

    monkeypatch.setattr(Desk, "bind", lambda *_, **how: refused)
    with pytest.raises(
        DeviceFault, match=r"^matmul \(f32\[8,8\]\) with \w+.* on emulated: cuLaunchKernel: .*"
    ) as caught:
        kernels.matmul(*[foreign(random(8, 8))] * 2)
    assert caught.value.sticky


def refused(size_bytes):
    raise TooLittleMemory("the card has too little memory free.")


def test_a_workspace_grows_and_goes(launched, monkeypatch):
    desk, log = Desk(device_of(CARD)), []
    monkeypatch.setattr(desk.card, "wait_for", lambda stream: log.append(stream))
    scratch = on_card.Scratch(desk, 5)
    first = scratch.of(100)
    assert scratch.of(50) == first
    assert log == []
    assert scratch.of(1000) != first
    assert log == [5]  # kernels may have been at work in the old one
    assert len(desk.card._memory) == 1
    reserve = desk.card.reserve
    monkeypatch.setattr(desk.card, "reserve", refused)
    with pytest.raises(TooLittleMemory):
        scratch.of(5000)
    monkeypatch.setattr(desk.card, "reserve", reserve)
    assert (scratch.address, scratch.size_bytes) == (0, 0)  # what it had is somebody else's now
    assert scratch.of(10) in desk.card._memory
    del scratch
    assert not desk.card._memory


def test_split_products_have_one(launched):
    a, b = random(8, 4096), random(4096, 8)
    got = kernels.matmul(foreign(a), foreign(b))
    np.testing.assert_allclose(np.asarray(got), a @ b, atol=1e-3)
    assert list(prepared._own.scratches) == [(card_array.desk_of(device_of(CARD)), 0)]


def test_threads_have_workspaces_of_their_own(launched):
    kernels.matmul(*[foreign(random(8, 8))] * 2)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(dict(prepared._own.scratches)))
    thread.start()
    thread.join()
    assert seen == [{}]


def test_a_matrix_whose_columns_lie_one_behind_the_other(launched):
    a, b = random(8, 16), random(8, 12)
    turned = foreign(a, shape=(16, 8), strides=(4, 64))
    close(kernels.matmul(turned, foreign(b)), a.T @ b)


FOREIGN = [
    ({"strides": (64, 4)}, ShapeError, r"a is not C-contiguous \(strides \(64, 4\)\). Give a contiguous copy"),
    ({"offset": 4}, ShapeError, r"a begins at an address that is no multiple of 16 \(0x"),
    ({"mask": 1}, DTypeError, "a has a mask, and kernels know no masks"),
    ({"typestr": ">f4"}, DTypeError, "a has dtype >f4, but kernels compute in"),
    ({"typestr": "<c8"}, DTypeError, "a has dtype complex64, but kernels compute in"),
]


@pytest.mark.parametrize("how", FOREIGN, ids=lambda how: str(how[0]))
def test_what_kernels_cannot_read(launched, how):
    how, error, message = how
    with pytest.raises(error, match=f"^kernels.matmul: {message}"):
        kernels.matmul(foreign(random(8, 8), **how), foreign(random(8, 8)))


def test_strides_need_not_be_said(launched):
    a = foreign(random(8, 8))
    del a.said["strides"]
    close(kernels.matmul(a, a), np.asarray(a) @ np.asarray(a))
    a.said["data"] = (a.said["data"][0] + 4, False)
    with pytest.raises(ShapeError, match="begins at an address"):
        kernels.matmul(a, a)


def test_strides_that_say_nothing_are_fine(launched):
    a = random(1, 8)
    close(kernels.matmul(foreign(a, strides=(999, 4)), foreign(np.eye(8, dtype=np.float32), strides=(32, 4))), a)


def test_where_a_result_cannot_go(launched, monkeypatch):
    a, b = foreign(random(8, 8)), foreign(random(8, 8))
    with pytest.raises(ShapeError, match="out is read-only"):
        kernels.matmul(a, a, out=foreign(random(8, 8), read_only=True))
    with pytest.raises(ShapeError, match="out shares memory with b, which is still read"):
        kernels.matmul(a, b, out=b)
    monkeypatch.delitem(on_card.sys.modules, "torch")
    with pytest.raises(SettingError, match=r"it is not known how a Foreign is made. Give out="):
        kernels.matmul(a, a)


@pytest.mark.parametrize("out", [False, True])
def test_arrays_on_several_cards(monkeypatch, out):
    devices = iter([device_of(CARD)] * (1 + out) + [replace(device_of(CARD), number=1)])
    monkeypatch.setattr(on_card, "device_with", lambda x: next(devices))
    with pytest.raises(SettingError, match="these arrays lie on several GPUs"):
        kernels.matmul(*[foreign(random(8, 8))] * 2, out=foreign(random(8, 8)) if out else None)


def test_a_cupy_array_gets_one(monkeypatch):
    class Array:
        device = SimpleNamespace(id=2)

    used = []

    class Using:
        def __init__(self, number):
            used.append(number)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    cupy = SimpleNamespace(ndarray=Array, empty=lambda *how: how, cuda=SimpleNamespace(Device=Using))
    monkeypatch.setitem(on_card.sys.modules, "cupy", cupy)
    cupy.cuda.ExternalStream, cupy.cuda.Stream = Using, SimpleNamespace(null=nullcontext())
    form = SimpleNamespace(name="conv")
    for stream in (0, 9):
        assert on_card.empty(form, Array(), Spec((2, 3), "float16"), stream) == ((2, 3), "float16")
    assert used == [2, 2, 9]


def test_an_array_of_a_gpu_is_described_to_other_libraries(monkeypatch):
    card = SimpleNamespace(reserve=lambda size: 4096, name="cuda:0")
    desk = SimpleNamespace(card=card, device=SimpleNamespace(emulated=False))
    monkeypatch.setattr(card_array.weakref, "finalize", lambda *_: SimpleNamespace())
    array = CardArray(desk, Spec((2, 3), "bfloat16"))
    assert array.__cuda_array_interface__ == {
        "shape": (2, 3),
        "typestr": "<V2",
        "data": (4096, False),
        "strides": None,
        "version": 3,
    }
    assert not hasattr(there(np.ones(3)), "__cuda_array_interface__")


def test_which_card_an_array_is_on(monkeypatch):
    assert on_card.device_with(there(np.ones(3))) is device_of(CARD)
    named = []
    monkeypatch.setattr(on_card, "device_of", lambda name: named.append(name) or "it")
    monkeypatch.setattr(on_card, "card_named", lambda name: SimpleNamespace(number_of={0x7000: 3}.__getitem__))
    said = {"__cuda_array_interface__": {"data": (0x7000, False)}}
    for device in ({"device": SimpleNamespace(index=1)}, {"device": SimpleNamespace(id=2)}, {}):
        assert on_card.device_with(SimpleNamespace(**device, **said)) == "it"
    assert named == ["cuda:1", "cuda:2", "cuda:3"]


@pytest.mark.parametrize("before", [None, 0x500])
def test_a_card_leaves_another_librarys_device_as_it_was(before):
    current = []

    class Driver:
        def __call__(self, name, *args):
            if name == "cuCtxGetCurrent":
                args[0]._obj.value = before
            elif name == "cuDevicePrimaryCtxRetain":
                args[0]._obj.value = 0x900
            elif name == "cuCtxSetCurrent":
                current.append(args[0].value)

    Card(driver=Driver())
    assert current == [0x900, *([before] if before else [])]


def test_a_stream_follows_another():
    asked = []

    class Driver:
        def __call__(self, name, *args):
            if name.startswith(("cuEvent", "cuStreamWait")):
                asked.append((name, *(arg.value for arg in args if hasattr(arg, "value"))))

    Card(driver=Driver()).follow(5, 7)
    names = [name for name, *_ in asked]
    assert names == ["cuEventCreate", "cuEventRecord", "cuStreamWaitEvent", "cuEventDestroy_v2"]
    assert asked[0][1:] == (2,)  # without a clock
    assert asked[1][-1] == 7
    assert asked[2][1] == 5


def test_the_driver_says_which_card_an_address_is_on():
    class Driver:
        def __call__(self, name, *args):
            if name == "cuPointerGetAttribute":
                assert (args[1].value, args[2].value) == (9, 0x7000)
                args[0]._obj.value = 3

    assert Card(driver=Driver()).number_of(0x7000) == 3


def test_tuning_for_a_card(tmp_path, monkeypatch):
    asked = []

    def tune_one(request, threads, device, **how):
        asked.append((request.op.name, [str(spec) for spec in request.ins], device.emulated))

    monkeypatch.setattr("rapydli_flow.runtime.tuning.tune_one", tune_one)
    kernels.tune("matmul", there(random(8, 4, dtype="float16")), there(random(4, 8, dtype="float16")))
    kernels.tune("matmul", (8, 4), (4, 8), device=CARD)
    kernels.tune("matmul", (8, 4), (4, 8))
    halves = ["f16[8,4]", "f16[4,8]"]
    floats = ["f32[8,4]", "f32[4,8]"]
    assert asked == [("matmul", halves, True), ("matmul", floats, True), ("matmul", floats, False)]
    with pytest.raises(SettingError, match=r"kernels.tune: device='gpu'"):
        kernels.tune("matmul", (8, 4), (4, 8), device="gpu")
