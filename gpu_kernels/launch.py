"""Runs cubins: the CUDA driver through ctypes, with nothing but the driver installed.

A launch is prepared once (function, sizes, packed arguments) and costs one call of `cuLaunchKernel` after
that; several become one CUDA graph with `Card.capture`. Work goes to one non-blocking stream, or to one that the
caller has (PyTorch's, CuPy's). The primary context is used, so that arrays of those libraries can be passed by
address. Without a driver or a device the first use raises `MissingDependency`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import numpy as np

from rapydli_flow.errors import DeviceFault, TooLittleMemory
from rapydli_flow.spec import Array
from rapydli_flow.template import Device

from .card import Accelerator, Alive, Box, Communicator, Mark
from .compile import Cubin, Request, cubins
from .driver import Driver
from .grid import TensorMap
from .many import Many
from .nccl import Nccl, new_meeting

_Pointer, _Unsigned = ctypes.c_void_p, ctypes.c_uint
_NON_BLOCKING = 1
_ON_CARD = 2  # CU_MEMORYTYPE_DEVICE
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
_OPT_IN_SHARED_BYTES = 48 * 1024
_ATTRIBUTES = {  # CU_DEVICE_ATTRIBUTE_...
    "cores": 16,
    "major": 75,
    "minor": 76,
    "threads": 1,
    "shared_bytes": 8,
    "registers": 82,
}
_CAPTURE_THIS_THREAD = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what other threads do is none of its business
_FACTS = {  # CU_DEVICE_ATTRIBUTE_..., for people
    "clock_khz": 13,
    "memory_clock_khz": 36,
    "memory_bus_bits": 37,
    "l2_bytes": 38,
    "threads_per_core": 39,
    "shared_bytes_per_core": 81,
    "shared_bytes_opt_in": 97,
}
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
ALIGNMENT = 16  # of every array that a kernel gets
_MAP_BYTES = 128
_MAPS_AT_ONCE = 512  # of which memory is reserved
_MAP_DTYPES = {"float16": 6, "float32": 7, "bfloat16": 9}  # CU_TENSOR_MAP_DATA_TYPE_...
_SWIZZLE_128, _PROMOTE_256 = 3, 3


class Card(Accelerator):
    """One GPU: memory, cubins and a stream of its own."""

    def __init__(self, number: int = 0, *, driver: Driver | None = None) -> None:
        self.name = f"cuda:{number}"
        self.call = driver or Driver()
        device, context, stream, before = ctypes.c_int(), _Pointer(), _Pointer(), _Pointer()
        self.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(number))
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxGetCurrent", ctypes.byref(before))
        self.call("cuCtxSetCurrent", context)
        self.call("cuStreamCreate", ctypes.byref(stream), _Unsigned(_NON_BLOCKING))
        if before.value:  # of another library, which goes on with its device
            self.call("cuCtxSetCurrent", before)
        self._device, self._context, self.stream = device, context, int(stream.value or 0)
        self._number, self._pinned, self.places = number, list[int](), Places()

    def describe(self) -> Device:
        """What templates are told of this card."""
        name, total = ctypes.create_string_buffer(128), ctypes.c_size_t()
        self.call("cuDeviceGetName", name, ctypes.c_int(len(name)), self._device)
        self.call("cuDeviceTotalMem_v2", ctypes.byref(total), self._device)
        found = {}
        for key, attribute in _ATTRIBUTES.items():
            value = ctypes.c_int()
            self.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), self._device)
            found[key] = value.value
        target = f"sm_{found['major']}{found['minor']}" + ("a" if found["major"] == 9 else "")  # for wgmma
        limits: dict[str, Any] = {key: found[key] for key in ("cores", "threads", "shared_bytes", "registers")}
        limits |= {"vector_bytes": 16, "memory_bytes": total.value}
        return Device("cuda", name.value.decode(), target=target, number=self._number, **limits)

    def facts(self) -> dict[str, int]:
        """More of what the driver knows, for people."""
        found = {}
        for key, attribute in _FACTS.items():
            value = ctypes.c_int()
            self.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), self._device)
            found[key] = value.value
        return found

    def free_bytes(self) -> int:
        self.use()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def use(self) -> None:
        """Make this card's context the thread's current one."""
        self.call("cuCtxSetCurrent", self._context)

    def array(self, data: Array) -> Memory:
        """A copy of ``data`` on the card."""
        return Memory(self, np.asarray(data, order="C"))

    def load(self, cubins: Sequence[Cubin]) -> Kernel:
        """The kernels of one call, ready to be bound to addresses."""
        return Kernel(self, cubins)

    def wait(self) -> None:
        """Until all work of the stream is done; faults of kernels are raised here."""
        self.wait_for(self.stream)

    def wait_for(self, stream: int) -> None:
        self.call("cuStreamSynchronize", _Pointer(stream))

    def follow(self, stream: int, other: int) -> None:
        event = _Pointer()
        self.call("cuEventCreate", ctypes.byref(event), _Unsigned(_NO_TIMING))
        try:
            self.call("cuEventRecord", event, _Pointer(other))
            self.call("cuStreamWaitEvent", _Pointer(stream), event, _Unsigned(0))
        finally:
            self.call("cuEventDestroy_v2", event)  # once it has passed

    def number_of(self, address: int) -> int:
        """Of the card on which an address is."""
        number = ctypes.c_int()
        what = ctypes.byref(number), ctypes.c_int(_ORDINAL), ctypes.c_uint64(address)
        self.call("cuPointerGetAttribute", *what)
        return number.value

    # memory -----------------------------------------------------------------------------------------

    def reserve(self, size_bytes: int) -> int:
        self.use()
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(ALIGNMENT, size_bytes)))
        return int(address.value)

    def free(self, address: int) -> None:
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def pinned(self, size_bytes: int) -> Array:
        self.use()
        address, size = _Pointer(), max(ALIGNMENT, size_bytes)
        self.call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(size), _Unsigned(0))
        assert address.value is not None
        self._pinned.append(address.value)
        data: Any = (ctypes.c_uint8 * size).from_address(address.value)
        return np.frombuffer(data, np.uint8)

    def pin(self, data: Array) -> None:
        self.use()
        with suppress(
            DeviceFault, TooLittleMemory
        ):  # a limit on locked memory: copies go through memory of the driver's then
            self.call("cuMemHostRegister_v2", _Pointer(data.ctypes.data), ctypes.c_size_t(data.nbytes), _Unsigned(0))

    def unpin(self, data: Array) -> None:
        with suppress(DeviceFault):  # it was refused
            self.call("cuMemHostUnregister", _Pointer(data.ctypes.data))

    @contextmanager
    def briefly(self) -> Iterator[None]:
        self.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent_v2", ctypes.byref(_Pointer()))

    def upload(self, address: int, data: Array) -> None:
        if data.nbytes:
            source, size = _Pointer(data.ctypes.data), ctypes.c_size_t(data.nbytes)
            self.call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, size, _Pointer(self.stream))

    def download(self, data: Array, address: int) -> None:
        if data.nbytes:
            target, size = _Pointer(data.ctypes.data), ctypes.c_size_t(data.nbytes)
            self.call("cuMemcpyDtoHAsync_v2", target, ctypes.c_uint64(address), size, _Pointer(self.stream))

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        if size_bytes:
            places = ctypes.c_uint64(target), ctypes.c_uint64(source)
            self.call("cuMemcpyDtoDAsync_v2", *places, ctypes.c_size_t(size_bytes), _Pointer(self.stream))

    def copy_box(self, target: int, source: int, box: Box) -> None:
        if box.width and box.rows and box.planes:
            copy = _Copy3D(target, source, box)
            self.call("cuMemcpy3DAsync_v2", ctypes.byref(copy), _Pointer(self.stream))

    def fill(self, address: int, size_bytes: int, byte: int) -> None:
        size = ctypes.c_size_t(size_bytes)
        self.call("cuMemsetD8Async", ctypes.c_uint64(address), ctypes.c_ubyte(byte), size, _Pointer(self.stream))

    # other cards ------------------------------------------------------------------------------------

    def meeting(self) -> bytes:
        return new_meeting()

    def meet(self, meeting: bytes, rank: int, ranks: int, alive: Alive) -> Communicator:
        return Nccl(self, meeting, rank, ranks, alive)

    # work -------------------------------------------------------------------------------------------

    def prepare(self, request: Request) -> Kernel:
        self.use()
        return self.load(cubins(request))

    def prepare_many(self, many: Many, target: str) -> Kernel:
        self.use()
        return self.load((many.cubin(target),))

    def capture(self, launches: Sequence[Callable[[], None]]) -> Callable[[], None]:
        graph, stream = _Pointer(), _Pointer(self.stream)
        self.call("cuStreamBeginCapture_v2", stream, ctypes.c_int(_CAPTURE_THIS_THREAD))
        try:
            for launch in launches:
                launch()
        except BaseException:
            with suppress(DeviceFault):  # the first error says more
                self.call("cuStreamEndCapture", stream, ctypes.byref(graph))
            raise
        self.call("cuStreamEndCapture", stream, ctypes.byref(graph))
        return Replay(self, graph, launches)

    def mark(self) -> Event:
        return Event(self)

    def after(self, mark: Mark) -> None:
        assert isinstance(mark, Event)
        self.call("cuStreamWaitEvent", _Pointer(self.stream), mark.event, _Unsigned(0))

    def close(self) -> None:
        self.wait()
        self.places.close(self)
        while self._pinned:
            self.call("cuMemFreeHost", _Pointer(self._pinned.pop()))
        if self.stream:
            self.call("cuStreamDestroy_v2", _Pointer(self.stream))
            self.stream = 0


class Replay:
    """A CUDA graph of launches, ready to be launched itself; it holds on to what they need."""

    def __init__(self, card: Card, graph: Any, launches: Sequence[Callable[[], None]]) -> None:
        self._card, self._launches, self._ready = card, tuple(launches), _Pointer()
        card.call("cuGraphInstantiateWithFlags", ctypes.byref(self._ready), graph, ctypes.c_ulonglong(0))
        card.call("cuGraphDestroy", graph)

    def __call__(self) -> None:
        self._card.call("cuGraphLaunch", self._ready, _Pointer(self._card.stream))

    def __del__(self) -> None:
        with suppress(Exception), self._card.briefly():  # of a card that failed, or at the end of the process
            self._card.call("cuGraphExecDestroy", self._ready)


class Event(Mark):
    """A moment of a card's stream."""

    def __init__(self, card: Card) -> None:
        self._card, self.event = card, _Pointer()
        card.call("cuEventCreate", ctypes.byref(self.event), _Unsigned(0))

    def set(self) -> None:
        self._card.call("cuEventRecord", self.event, _Pointer(self._card.stream))

    def wait(self) -> None:
        self._card.call("cuEventSynchronize", self.event)

    def passed(self) -> bool:
        return self._card.call.ready("cuEventQuery", self.event)

    def seconds_since(self, before: Mark) -> float:
        assert isinstance(before, Event)
        time_ms = ctypes.c_float()
        self._card.call("cuEventElapsedTime", ctypes.byref(time_ms), before.event, self.event)
        return time_ms.value * 1e-3

    def __del__(self) -> None:
        with suppress(Exception):  # of a card that failed, or at the end of the process
            self._card.call("cuEventDestroy_v2", self.event)


class Memory:
    """An array on the card, until `free` or the end of a ``with``."""

    def __init__(self, card: Card, data: Array) -> None:
        self._card, self._shape, self._dtype = card, data.shape, data.dtype
        address = ctypes.c_uint64()
        card.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(ALIGNMENT, data.nbytes)))
        self.address = int(address.value)
        self.write(data)

    def write(self, data: Array) -> None:
        data = np.asarray(data, self._dtype, order="C")
        self._copy("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(self.address), _Pointer(data.ctypes.data), data.nbytes)

    def _copy(self, how: str, target: Any, source: Any, size_bytes: int) -> None:
        """On the stream of the kernels, which does not wait for the default one; done when this returns."""
        if size_bytes:
            self._card.call(how, target, source, ctypes.c_size_t(size_bytes), _Pointer(self._card.stream))
        self._card.wait()

    def read(self) -> Array:
        """A copy on the host, after all work of the stream."""
        out = np.empty(self._shape, self._dtype)
        self._copy("cuMemcpyDtoHAsync_v2", _Pointer(out.ctypes.data), ctypes.c_uint64(self.address), out.nbytes)
        return out

    def free(self) -> None:
        if self.address:
            self._card.call("cuMemFree_v2", ctypes.c_uint64(self.address))
            self.address = 0

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: Any) -> None:
        self.free()


class _Copy3D(ctypes.Structure):
    """CUDA_MEMCPY3D, of memory of the card."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        field
        for side in ("source", "target")
        for field in (
            *((f"{side}_{at}", ctypes.c_size_t) for at in ("x", "y", "z", "lod")),
            (f"{side}_kind", _Unsigned),
            *((f"{side}_{what}", _Pointer) for what in ("host", "device", "array", "reserved")),
            (f"{side}_pitch", ctypes.c_size_t),
            (f"{side}_height", ctypes.c_size_t),
        )
    ] + [(name, ctypes.c_size_t) for name in ("width", "rows", "planes")]

    def __init__(self, target: int, source: int, box: Box) -> None:
        super().__init__(source_kind=_ON_CARD, source_device=source, target_kind=_ON_CARD, target_device=target)
        self.source_pitch, self.source_height = box.source_pitch, box.source_height
        self.target_pitch, self.target_height = box.target_pitch, box.target_height
        self.width, self.rows, self.planes = box.width, box.rows, box.planes


def described(call: Driver, m: TensorMap, address: int) -> bytes:
    """The descriptor of an array at an address; lines of 128 bytes are swizzled in shared memory."""

    def array(kind: Any, values: Sequence[int]) -> Any:
        return (kind * len(values))(*values)

    memory = ctypes.create_string_buffer(2 * _MAP_BYTES)
    start = -ctypes.addressof(memory) % _MAP_BYTES
    rank, size = len(m.dims), np.dtype(m.dtype).itemsize
    what = [_Pointer(ctypes.addressof(memory) + start), ctypes.c_int(_MAP_DTYPES[m.dtype]), _Unsigned(rank)]
    what += [_Pointer(address), array(ctypes.c_uint64, m.dims)]
    what += [array(ctypes.c_uint64, [size * pitch for pitch in m.pitches])]
    how = [ctypes.c_int(value) for value in (0, _SWIZZLE_128, _PROMOTE_256, 0)]  # not interleaved; zeros outside
    if m.lower:
        corners = [array(ctypes.c_int, m.lower), array(ctypes.c_int, m.upper)]
        steps = array(ctypes.c_uint32, (1, *m.steps, 1))
        call("cuTensorMapEncodeIm2col", *what, *corners, *map(_Unsigned, m.box), steps, *how)
    else:
        call("cuTensorMapEncodeTiled", *what, array(ctypes.c_uint32, m.box), array(ctypes.c_uint32, [1] * rank), *how)
    return memory.raw[start : start + _MAP_BYTES]


class Places:
    """Memory of a card for the descriptors of its launches, which take places and give them back; freed with the card.

    A place stays with its stream: what the next launch copies there comes after the kernels that read what was there.
    """

    def __init__(self) -> None:
        self._reserved: list[int] = []
        self._free: dict[int, list[int]] = {}  # by stream

    def take(self, card: Card, stream: int) -> int:
        """An address for one descriptor of a launch on this stream."""
        free = self._free.setdefault(stream, [])
        if not free:
            size_bytes = _MAPS_AT_ONCE * _MAP_BYTES
            first = card.reserve(size_bytes)
            self._reserved.append(first)
            free.extend(range(first, first + size_bytes, _MAP_BYTES))
        return free.pop()

    def give_back(self, place: int, stream: int) -> None:
        """Calls no driver, so that it may happen at any time: in a capture, or when the card is closed."""
        if stream in self._free:
            self._free[stream].append(place)

    def close(self, card: Card) -> None:
        """Free it all; nothing on the card may read it any more."""
        self._free.clear()
        while self._reserved:
            card.free(self._reserved.pop())


class Kernel:
    """The cubins of a call, on the card; keep it as long as launches of it."""

    def __init__(self, card: Card, cubins: Sequence[Cubin]) -> None:
        self.card, self.cubins = card, tuple(cubins)
        self._modules, self.functions = [], []
        for cubin in self.cubins:
            module, function = _Pointer(), _Pointer()
            card.call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(cubin.code))
            card.call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(cubin.entry.encode()))
            if cubin.dynamic_bytes > _OPT_IN_SHARED_BYTES:
                size = ctypes.c_int(cubin.dynamic_bytes)
                card.call("cuFuncSetAttribute", function, ctypes.c_int(_MAX_DYNAMIC_SHARED), size)
            self._modules.append(module)
            self.functions.append(function)

    def __del__(self) -> None:
        with suppress(Exception), self.card.briefly():  # of a card that failed, or at the end of the process
            for module in self._modules:
                self.card.call("cuModuleUnload", module)

    def bind(self, addresses: Sequence[int], *, at: int = 0, stream: int | None = None) -> Launch:
        """Pack the arguments: addresses of inputs, outputs, workspaces and extras, and of the output's lo and whole."""
        given = (*addresses, at)
        for cubin in self.cubins:
            if len(given) != cubin.pointers:
                raise DeviceFault(f"{cubin.entry} takes {cubin.pointers} addresses but {len(given)} are given.")
        if wrong := [hex(address) for address in addresses if address % ALIGNMENT]:
            raise DeviceFault(f"{self.cubins[0].entry}: addresses {wrong} are not multiples of {ALIGNMENT}.")
        return Launch(self, given, self.card.stream if stream is None else stream)


class Launch:
    """Kernels with their arguments packed: call it as often as you like, and keep it until the card has done it."""

    def __init__(self, kernel: Kernel, addresses: Sequence[int], stream: int) -> None:
        self._kernel, self._stream = kernel, stream
        self._args: list[Any] = []
        self._kept: list[Any] = []  # what the arguments point to, and what is copied to the card
        self._places: list[int] = []  # of descriptors
        for cubin, function in zip(kernel.cubins, kernel.functions, strict=True):
            places = [self._put(described(kernel.card.call, m, addresses[m.array])) for m in cubin.maps]
            values = [ctypes.c_uint64(address) for address in (*addresses, *places)]
            packed = (_Pointer * len(values))(*[ctypes.addressof(value) for value in values])
            self._kept.append(values)
            sizes = [_Unsigned(size) for size in (cubin.grid, 1, 1, cubin.block, 1, 1, cubin.dynamic_bytes)]
            self._args.append((function, *sizes, _Pointer(stream), packed, _Pointer(0)))

    def _put(self, descriptor: bytes) -> int:
        """Where it will be on the card: it is copied there before the launch, on the same stream."""
        card, data = self._kernel.card, ctypes.create_string_buffer(descriptor, len(descriptor))
        place = card.places.take(card, self._stream)
        self._places.append(place)
        self._kept.append(data)
        what = ctypes.c_uint64(place), _Pointer(ctypes.addressof(data)), ctypes.c_size_t(len(descriptor))
        card.call("cuMemcpyHtoDAsync_v2", *what, _Pointer(self._stream))
        return place

    def __call__(self) -> None:
        for args in self._args:
            self._kernel.card.call("cuLaunchKernel", *args)

    def __del__(self) -> None:
        for place in self._places:
            self._kernel.card.places.give_back(place, self._stream)
