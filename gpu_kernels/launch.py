"""Runs cubins: the CUDA driver through ctypes, with nothing but the driver installed.

A launch is prepared once (function, sizes, packed arguments) and costs one call of `cuLaunchKernel` after
that. Work goes to one non-blocking stream, or to one that the caller has (PyTorch's, CuPy's). The primary
context is used, so that arrays of those libraries can be passed by address. Without a driver or a device
the first use raises `MissingDependency`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from rapydli_flow.errors import MissingDependency, RapydliError
from rapydli_flow.spec import Array
from rapydli_flow.template import Device

from .compile import Cubin
from .grid import TensorMap

_Pointer, _Unsigned = ctypes.c_void_p, ctypes.c_uint
_NON_BLOCKING = 1
_OPT_IN_SHARED_BYTES = 48 * 1024
_ATTRIBUTES = {  # CU_DEVICE_ATTRIBUTE_...
    "cores": 16,
    "major": 75,
    "minor": 76,
    "threads": 1,
    "shared_bytes": 8,
    "registers": 82,
}
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
ALIGNMENT = 16  # of every array that a kernel gets
_MAP_BYTES = 128
_MAP_DTYPES = {"float16": 6, "float32": 7, "bfloat16": 9}  # CU_TENSOR_MAP_DATA_TYPE_...
_SWIZZLE_128, _PROMOTE_256 = 3, 3


class DeviceFault(RapydliError, RuntimeError):
    """The CUDA driver refused a call; the message has its name for the error."""


class Driver:
    """libcuda, with its error codes as exceptions."""

    def __init__(self, library: Any = None) -> None:
        if library is None:
            try:
                library = ctypes.CDLL("libcuda.so.1")
            except OSError:
                raise MissingDependency(
                    "no CUDA driver: libcuda.so.1 is not there. GPU kernels run on a machine with an NVIDIA card and "
                    "its driver; everything else of rapydli_flow runs without."
                ) from None
        self._library = library
        self("cuInit", _Unsigned(0))

    def __call__(self, name: str, *args: Any) -> None:
        code = getattr(self._library, name)(*args)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
            known = text.value.decode() if text.value else "unknown error"
            if known in ("CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_INVALID_DEVICE"):
                raise MissingDependency(f"the CUDA driver is there but no such device ({name}: {known}).")
            raise DeviceFault(f"{name}: {known} ({code}).")


class Card:
    """One GPU: memory, cubins and a stream of its own."""

    def __init__(self, number: int = 0, *, driver: Driver | None = None) -> None:
        self.call = driver or Driver()
        device, context, stream = ctypes.c_int(), _Pointer(), _Pointer()
        self.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(number))
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self.call("cuStreamCreate", ctypes.byref(stream), _Unsigned(_NON_BLOCKING))
        self._device, self._context, self.stream = device, context, int(stream.value or 0)

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
        target = f"sm_{found['major']}{found['minor']}" + ("a" if found["major"] >= 9 else "")
        limits = {key: found[key] for key in ("cores", "threads", "shared_bytes", "registers")}
        sizes = {"vector_bytes": 16, "memory_bytes": total.value}
        return Device("cuda", name.value.decode(), target=target, **sizes, **limits)

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
        self.call("cuStreamSynchronize", _Pointer(self.stream))


class Memory:
    """An array on the card, freed with this object."""

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
    """Kernels with their arguments packed: call it as often as you like."""

    def __init__(self, kernel: Kernel, addresses: Sequence[int], stream: int) -> None:
        self._kernel = kernel
        self._args: list[Any] = []
        self._kept: list[Any] = []  # what the arguments point to
        for cubin, function in zip(kernel.cubins, kernel.functions, strict=True):
            codes = b"".join(described(kernel.card.call, m, addresses[m.array]) for m in cubin.maps)
            maps = kernel.card.array(np.frombuffer(codes, np.uint8)) if codes else None
            places = [maps.address + i * _MAP_BYTES for i in range(len(cubin.maps))] if maps else []
            values = [ctypes.c_uint64(address) for address in (*addresses, *places)]
            packed = (_Pointer * len(values))(*[ctypes.addressof(value) for value in values])
            self._kept += [values, maps]
            sizes = [_Unsigned(size) for size in (cubin.grid, 1, 1, cubin.block, 1, 1, cubin.dynamic_bytes)]
            self._args.append((function, *sizes, _Pointer(stream), packed, _Pointer(0)))

    def __call__(self) -> None:
        for args in self._args:
            self._kernel.card.call("cuLaunchKernel", *args)
