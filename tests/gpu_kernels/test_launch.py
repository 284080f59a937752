"""Launching through the driver's C interface, with a driver made of Python: which calls are made, in which order."""

import ctypes
from dataclasses import replace

import numpy as np
import pytest

from gpu_kernels import compile as compiling
from gpu_kernels import launch
from gpu_kernels.compile import Cubin
from gpu_kernels.driver import Driver
from gpu_kernels.grid import TensorMap
from gpu_kernels.launch import Card, DeviceFault
from gpu_kernels.many import Many, alike
from rapydli_flow import ops
from rapydli_flow.errors import MissingDependency
from rapydli_flow.spec import Spec

CODE = Cubin(b"\x7fELF", "sm_90a", "kernel", 7, 128, 0, 3)


def succeed(*args):
    return 0


class Recording:
    """Answers every call of the driver with success, and keeps memory in NumPy arrays."""

    def __init__(self, refuse=None, error=b"CUDA_ERROR_LAUNCH_FAILED"):
        self.calls, self.refuse, self.error = [], refuse, error
        self.memory = {}

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, args))
            if name == self.refuse:
                return 719
            return (getattr(type(self), f"_{name}", None) or succeed)(self, *args) or 0

        return call

    def _cuGetErrorName(self, code, text):
        text._obj.value = self.error

    def _cuStreamCreate(self, stream, flags):
        assert flags.value == 1
        stream._obj.value = 0x5000

    def _cuMemAlloc_v2(self, address, size):
        block = np.zeros(size.value + 16, np.uint8)
        address._obj.value = block.ctypes.data + -block.ctypes.data % 16
        self.memory[address._obj.value] = block

    def _cuMemcpyHtoDAsync_v2(self, target, source, size, stream):
        ctypes.memmove(target.value, source.value, size.value)

    def _cuMemcpyDtoHAsync_v2(self, target, source, size, stream):
        ctypes.memmove(target.value, source.value, size.value)

    def _cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {16: 132, 75: 9, 76: 0, 1: 1024, 8: 49152, 82: 65536}[attribute.value]

    def _cuDeviceGetName(self, name, size, device):
        name.value = b"A card"

    def named(self, name):
        return [args for called, args in self.calls if called == name]


def card(**refusing):
    library = Recording(**refusing)
    return Card(driver=Driver(library)), library


def test_memory_goes_there_and_back():
    gpu, library = card()
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    with gpu.array(x) as there:
        np.testing.assert_array_equal(there.read(), x)
        there.write(x + 1)
        np.testing.assert_array_equal(there.read(), x + 1)
    assert len(library.named("cuMemFree_v2")) == 1
    assert len(library.named("cuStreamSynchronize")) == 4  # each copy is done when it returns


def test_launch_packs_arguments_once():
    gpu, library = card()
    go = gpu.load((CODE,)).bind([0x100, 0x200])
    go()
    go()
    first, second = library.named("cuLaunchKernel")
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert [size.value for size in first[1:8]] == [7, 1, 1, 128, 1, 1, 0]
    assert first[8].value == 0x5000
    assert [ctypes.c_uint64.from_address(place).value for place in first[9]] == [0x100, 0x200, 0]


def test_kernels_of_one_call_run_in_their_order():
    gpu, library = card()
    gpu.load((CODE, replace(CODE, grid=3, block=32))).bind([0x100, 0x200])()
    assert [(args[1].value, args[4].value) for args in library.named("cuLaunchKernel")] == [(7, 128), (3, 32)]


def test_one_kernel_for_many_takes_the_address_of_their_table(monkeypatch):
    gpu, library = card()
    key = alike(ops.Relu(), (Spec((4,)),), (Spec((4,)),))
    few, more = Many(key, (5000,)), Many(key, (4, 5000, 100_000))
    monkeypatch.setattr(compiling, "cubins", lambda request, folder=None: (replace(CODE, pointers=2),))
    launches = [gpu.prepare_many(many, "sm_90a").bind([0x400]) for many in (few, more)]
    for launch_it in launches:
        launch_it()
    launched = library.named("cuLaunchKernel")
    assert [args[1].value for args in launched] == [few.blocks, more.blocks] == [3, 1 + 3 + 49]
    for args in launched:
        assert [ctypes.c_uint64.from_address(place).value for place in args[9]] == [0x400, 0]


def test_launch_on_another_stream():
    gpu, library = card()
    gpu.load((CODE,)).bind([0x100, 0x200], at=0x300, stream=0x77)()
    (args,) = library.named("cuLaunchKernel")
    assert args[8].value == 0x77
    assert ctypes.c_uint64.from_address(args[9][2]).value == 0x300


def test_wrong_arguments():
    kernel = card()[0].load((CODE,))
    with pytest.raises(DeviceFault, match="kernel takes 3 addresses but 2 are given"):
        kernel.bind([0x100])
    with pytest.raises(DeviceFault, match=r"addresses \['0x104'\] are not multiples of 16"):
        kernel.bind([0x100, 0x104])


def test_large_dynamic_shared_memory_is_asked_for():
    gpu, library = card()
    gpu.load((Cubin(b"", "sm_90a", "kernel", 1, 32, 100_000, 1),))
    ((_, attribute, size),) = library.named("cuFuncSetAttribute")
    assert (attribute.value, size.value) == (8, 100_000)


def test_description():
    described = card()[0].describe()
    assert (described.name, described.target, described.cores) == ("A card", "sm_90a", 132)
    assert described.limits == {"cores": 132, "threads": 1024, "registers": 65536, "shared_bytes": 49152}


def test_faults_have_the_drivers_name():
    gpu, _ = card(refuse="cuStreamSynchronize")
    with pytest.raises(DeviceFault, match=r"cuStreamSynchronize: CUDA_ERROR_LAUNCH_FAILED \(719\)"):
        gpu.wait()


def test_no_device():
    with pytest.raises(MissingDependency, match=r"driver is there but no such device .*NO_DEVICE"):
        card(refuse="cuDeviceGet", error=b"CUDA_ERROR_NO_DEVICE")


def test_no_driver(monkeypatch):
    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(launch.ctypes, "CDLL", absent)
    with pytest.raises(MissingDependency, match=r"no CUDA driver: libcuda\.so\.1 is not there"):
        Card()


def test_a_driver_that_is_too_old():
    class Old:
        def cuInit(self, flags):
            return 0

    with pytest.raises(MissingDependency, match=r"too old: it has no cuTensorMapEncodeTiled\. Install"):
        Driver(Old())("cuTensorMapEncodeTiled")


def test_a_graph_of_launches():
    gpu, library = card()
    go = gpu.load((CODE,)).bind([0x100, 0x200])
    replay = gpu.capture([go, go])
    names = [name for name, _ in library.calls]
    begin, end = names.index("cuStreamBeginCapture_v2"), names.index("cuStreamEndCapture")
    assert names[begin:end].count("cuLaunchKernel") == 2
    assert names[end + 1 :] == ["cuGraphInstantiateWithFlags", "cuGraphDestroy"]
    replay()
    replay()
    assert [args[1].value for args in library.named("cuGraphLaunch")] == [0x5000, 0x5000]
    assert len(library.named("cuLaunchKernel")) == 2
    del replay
    assert len(library.named("cuGraphExecDestroy")) == 1


def test_a_capture_that_fails_ends():
    gpu, library = card(refuse="cuLaunchKernel", error=b"CUDA_ERROR_INVALID_VALUE")
    with pytest.raises(DeviceFault, match="cuLaunchKernel"):
        gpu.capture([gpu.load((CODE,)).bind([0x100, 0x200])])
    assert len(library.named("cuStreamEndCapture")) == 1


def test_reserved_memory_and_copies_on_the_stream():
    gpu, library = card()
    address = gpu.reserve(32)
    x, y = np.arange(8, dtype=np.float32), np.empty(8, np.float32)
    gpu.upload(address, x)
    gpu.download(y, address)
    np.testing.assert_array_equal(x, y)
    gpu.copy(address + 16, address, 16)
    gpu.fill(address, 32, 0xFF)
    assert {args[-1].value for name, args in library.calls if "Async" in name} == {0x5000}
    assert library.named("cuStreamSynchronize") == []  # nobody has waited
    gpu.free(address)
    assert [args[0].value for args in library.named("cuMemFree_v2")] == [address]


def test_events():
    gpu, library = card()
    before, after = gpu.mark(), gpu.mark()
    before.set()
    after.set()
    after.wait()
    assert after.seconds_since(before) == 0.0
    assert [args[1].value for args in library.named("cuEventRecord")] == [0x5000, 0x5000]
    assert len(library.named("cuEventSynchronize")) == 1


def test_a_closed_card_has_given_everything_back():
    gpu, library = card()
    host = np.zeros(64, np.uint8)
    type(library)._cuMemHostAlloc = lambda self, address, size, flags: setattr(address._obj, "value", host.ctypes.data)
    try:
        assert gpu.pinned(64).size == 64
    finally:
        del type(library)._cuMemHostAlloc
    gpu.close()
    gpu.close()
    assert len(library.named("cuMemFreeHost")) == len(library.named("cuStreamDestroy_v2")) == 1


def test_memory_that_cannot_be_pinned_is_used_as_it_is():
    gpu, library = card(refuse="cuMemHostRegister_v2", error=b"CUDA_ERROR_OUT_OF_MEMORY")
    gpu.pin(np.zeros(4096, np.uint8))
    assert len(library.named("cuMemHostRegister_v2")) == 1


def test_another_cards_work_is_not_disturbed():
    """A kernel that nobody needs any more may go while its thread works on another card."""
    gpu, library = card()
    kernel = gpu.load((CODE,))
    library.calls.clear()
    del kernel
    assert [name for name, _ in library.calls] == ["cuCtxPushCurrent_v2", "cuModuleUnload", "cuCtxPopCurrent_v2"]


def test_a_queue_waits_for_a_moment_of_another():
    gpu, library = card()
    line = Card(driver=gpu.call)
    sent = line.mark()
    sent.set()
    gpu.after(sent)
    ((stream, event, flags),) = library.named("cuStreamWaitEvent")
    assert (stream.value, event.value, flags.value) == (gpu.stream, sent.event.value, 0)


# ---- descriptors of arrays

TILED = TensorMap(1, "bfloat16", (96, 70), (96,), (64, 32))
PIXELS = TensorMap(0, "float32", (8, 9, 7, 2), (8, 72, 504), (32, 128), (-1, -2), (0, 1), (2, 1))


def numbers(array):
    return list(array)


def test_descriptors_are_encoded_and_passed_by_address():
    """In the order of the driver: dtype, rank, address, sizes, pitches in bytes, box, steps; swizzled by 128 bytes."""
    gpu, library = card()
    kernel = gpu.load([replace(CODE, pointers=3, maps=(TILED, PIXELS))])
    launched = kernel.bind([0x10000, 0x20000], at=0)
    ((place, dtype, rank, address, sizes, pitches, box, steps, *how),) = library.named("cuTensorMapEncodeTiled")
    assert place.value % 64 == 0
    assert (dtype.value, rank.value, address.value) == (9, 2, 0x20000)
    assert (numbers(sizes), numbers(pitches), numbers(box), numbers(steps)) == ([96, 70], [192], [64, 32], [1, 1])
    assert [value.value for value in how] == [0, 3, 3, 0]
    call = library.named("cuTensorMapEncodeIm2col")[0]
    _, dtype, rank, address, sizes, pitches, lower, upper, channels, pixels, steps, *how = call
    assert (dtype.value, rank.value, address.value) == (7, 4, 0x10000)
    assert (numbers(sizes), numbers(pitches)) == ([8, 9, 7, 2], [32, 288, 2016])
    assert (numbers(lower), numbers(upper), channels.value, pixels.value) == ([-1, -2], [0, 1], 32, 128)
    assert numbers(steps) == [1, 2, 1, 1]
    assert [value.value for value in how] == [0, 3, 3, 0]
    launched()
    ((*_, packed, _),) = library.named("cuLaunchKernel")
    given = [ctypes.cast(packed[i], ctypes.POINTER(ctypes.c_uint64)).contents.value for i in range(5)]
    assert given[:3] == [0x10000, 0x20000, 0]
    ((_, size),) = library.named("cuMemAlloc_v2")
    (memory,) = library.memory
    assert all(memory <= place <= memory + size.value - 128 and (place - memory) % 128 == 0 for place in given[3:])
    assert given[3] != given[4]


def descriptors(library):
    """Where they were copied to, on which streams."""
    return [(target.value, stream.value) for target, _, _, stream in library.named("cuMemcpyHtoDAsync_v2")]


def test_descriptors_come_to_the_card_before_the_launch_and_nobody_waits():
    gpu, library = card()
    launched = gpu.load([replace(CODE, pointers=2, maps=(PIXELS, PIXELS))]).bind([0x10000])
    assert [stream for _, stream in descriptors(library)] == [0x5000, 0x5000]
    assert library.named("cuStreamSynchronize") == []
    launched()
    assert library.calls[-1][0] == "cuLaunchKernel"


def test_what_is_copied_to_the_card_is_the_descriptor():
    def encode(self, place, *rest):
        ctypes.memset(place.value, 0x5A, 128)

    gpu, library = card()
    type(library)._cuTensorMapEncodeTiled = encode
    try:
        launched = gpu.load([replace(CODE, pointers=3, maps=(TILED,))]).bind([0x10000, 0x20000])
    finally:
        del type(library)._cuTensorMapEncodeTiled
    ((place, _),) = descriptors(library)
    assert ctypes.string_at(place, 128) == b"\x5a" * 128
    del launched


def test_launches_that_are_no_more_leave_their_places_to_others_of_the_stream():
    gpu, library = card()
    kernel = gpu.load([replace(CODE, pointers=3, maps=(TILED, TILED))])
    for _ in range(1000):
        kernel.bind([0x10000, 0x20000])()
    assert len(library.named("cuMemAlloc_v2")) == 1
    assert len({place for place, _ in descriptors(library)}) == 2
    library.calls.clear()
    kept = [kernel.bind([0x10000, 0x20000], stream=stream) for stream in (0x77, 0x77, 0x5000)]
    places = descriptors(library)
    assert [stream for _, stream in places] == [0x77] * 4 + [0x5000] * 2
    assert len({place for place, _ in places}) == 6
    assert len(library.named("cuMemAlloc_v2")) == 1  # for the other stream
    del kept


def test_many_launches_take_more_memory_and_a_closed_card_has_freed_it():
    gpu, library = card()
    kernel = gpu.load([replace(CODE, pointers=3, maps=(TILED,))])
    kept = [kernel.bind([0x10000, 0x20000]) for _ in range(1000)]
    assert len({place for place, _ in descriptors(library)}) == 1000
    assert len(library.named("cuMemAlloc_v2")) == 2
    gpu.close()
    names = [name for name, _ in library.calls]
    assert names.index("cuStreamSynchronize") < names.index("cuMemFree_v2")  # kernels have read them
    assert {args[0].value for args in library.named("cuMemFree_v2")} == set(library.memory)
    library.calls.clear()
    kept.clear()
    assert library.calls == []


def test_a_bind_that_fails_keeps_no_place():
    gpu, library = card()
    kernel = gpu.load([replace(CODE, pointers=3, maps=(TILED,))])
    library.refuse = "cuMemcpyHtoDAsync_v2"
    for _ in range(3):
        with pytest.raises(DeviceFault, match="cuMemcpyHtoDAsync_v2"):
            kernel.bind([0x10000, 0x20000])
    assert len({place for place, _ in descriptors(library)}) == 1
