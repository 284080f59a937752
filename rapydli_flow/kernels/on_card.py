"""Calls on arrays that lie on a GPU: of CuPy, PyTorch, Numba, or `to_device`.

CuPy, PyTorch, ...   address, shape, strides by __cuda_array_interface__; results are of the operands' library;
                     kernels go to the caller's stream, and nothing is waited for
CardArray            of this package; kernels are done when a call returns
"""

from __future__ import annotations

import operator
import sys
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu_kernels.launch import ALIGNMENT

from ..config import checked_device, settings
from ..errors import DTypeError, SettingError, ShapeError
from ..runtime.card_array import CardArray, Desk, desk_of, give_back
from ..runtime.devices import card_named, device_of
from ..runtime.remembered import known
from ..spec import HALVES, Spec
from ..template import Device
from ..tuner import Tuning
from .form import FLOATS, Form, refused_dtype

DTYPES = (*FLOATS, *HALVES)
MOST_LAUNCHES = 16  # of one prepared call, each for other addresses


class Given(NamedTuple):
    """An array on a card, as kernels see it."""

    address: int
    spec: Spec
    writeable: bool
    stream: int  # where what is in it was made; 0 where nobody says
    array: Any


def to_device(x: Any, device: str | None = None) -> CardArray:
    """An array as one on a GPU, which the functions of `rf.kernels` take, and give back; `np.asarray` brings it back.

    ``x``: anything that NumPy takes for an array. ``device``: 'cuda', 'cuda:1' or 'emulated'; by default that of this
    process. Needs nothing but the driver. Other libraries take the result without a copy, by
    ``__cuda_array_interface__``.

    Raises SettingError for a device that is none, MissingDependency where it is not there, DTypeError for a dtype that
    no kernel knows, TooLittleMemory where the card has none left.
    """
    if checked_device(device or settings().device, "kernels.to_device: device=") == "cpu":
        raise SettingError("kernels.to_device: device='cpu' is not a GPU. Give 'cuda', or 'emulated' to try it out.")
    array = np.asarray(x)
    if array.dtype.name not in DTYPES:
        raise DTypeError(f"kernels.to_device: x has dtype {array.dtype}, which is not one of {', '.join(DTYPES)}.")
    return desk_of(device_of(device)).put(array.astype(array.dtype.newbyteorder("="), copy=False))


def on_card(x: Any) -> bool:
    """Does an array lie on a GPU?"""
    return type(x) is CardArray or hasattr(x, "__cuda_array_interface__")


def turned(x: Any) -> bool:
    """Is it a matrix whose columns lie one behind the other?"""
    if type(x) is CardArray:
        return False
    seen = x.__cuda_array_interface__
    strides, shape, size = seen.get("strides"), seen["shape"], np.dtype(seen["typestr"]).itemsize
    return strides is not None and len(shape) == 2 and tuple(strides) == (size, size * shape[0])


def device_with(x: Any) -> Device:
    """The device that an array lies on."""
    if type(x) is CardArray:
        return x.desk.device
    where = getattr(x, "device", None)
    number = getattr(where, "index", None)  # of PyTorch
    number = getattr(where, "id", None) if number is None or callable(number) else number  # of CuPy, JAX
    if number is None:
        number = card_named("cuda:0").number_of(x.__cuda_array_interface__["data"][0])
    return device_of(f"cuda:{number}")


def seen(form: Form, name: str, x: Any) -> Given:
    """An operand; DTypeError or ShapeError for one that kernels cannot read where it is."""
    if type(x) is CardArray:
        return Given(x.address, x.spec, True, 0, x)
    if not on_card(x):
        raise SettingError(
            f"kernels.{form.name}: {name} lies on the host, other operands on a GPU. Bring all to one of them."
        )
    said = x.__cuda_array_interface__
    shape, (address, read_only) = tuple(said["shape"]), said["data"]
    dtype = np.dtype("bfloat16") if said["typestr"] == "<V2" else np.dtype(said["typestr"])  # as PyTorch has it
    if dtype.name not in DTYPES or not dtype.isnative:
        raise refused_dtype(form, name, dtype, DTYPES)
    if said.get("mask") is not None:
        raise DTypeError(f"kernels.{form.name}: {name} has a mask, and kernels know no masks.")
    spec = Spec(shape, dtype.name)
    strides = said.get("strides")
    for kept, fault in (
        (_contiguous(shape, strides, dtype.itemsize), f"is not C-contiguous (strides {strides})"),
        (address % ALIGNMENT == 0, f"begins at an address that is no multiple of {ALIGNMENT} ({address:#x})"),
    ):
        if not kept:
            raise ShapeError(f"kernels.{form.name}: {name} {fault}. Give a contiguous copy.")
    return Given(address, spec, not read_only, said.get("stream") or 0, x)


def _contiguous(shape: Sequence[int], strides: Sequence[int] | None, size: int) -> bool:
    if strides is None:
        return True
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride != size:
            return False
        size *= length
    return True


class CardCall:
    """What a function needs beside its arrays, for operands of these specs on one kind of card."""

    def __init__(self, form: Form, specs: dict[str, Spec], how: Sequence[Any], device: Device) -> None:
        op, ins = form.of(specs, how, DTYPES)
        self.out = op.out_specs(*ins)[0]
        if any(spec.size == 0 for spec in (*ins, self.out)):
            raise ShapeError(f"kernels.{form.name}: on a GPU there must be something to compute, but this is nothing.")
        self.desk = desk_of(device)
        self.request, self.choice = known(device).serve(op, ins)
        if self.choice.reference:
            raise SettingError(
                f"kernels.{form.name}: no GPU kernel serves {', '.join(map(str, ins))}. Cast to float32 or halves, or "
                "call it with arrays of the host."
            )
        self.first = len(self.request.ins)  # extras come behind
        self.places, self.work_bytes = list[int](), 0
        for spec in Tuning(device).workspace(self.request, self.choice):
            self.places.append(self.work_bytes)
            self.work_bytes += -(-spec.size_bytes // 256) * 256
        self.launches: OrderedDict[tuple[tuple[int, ...], int], Any] = OrderedDict()

    def launch(self, inputs: Sequence[int], out: int, work: int, stream: int) -> None:
        """To a stream of the caller's; the packed arguments of the latest calls are kept."""
        n = self.first
        addresses = (*inputs[:n], out, *(work + place for place in self.places), *inputs[n:])
        key = addresses, stream
        if key not in self.launches:
            self.launches[key] = self.desk.bind(self.request, self.choice, addresses, stream=stream)
            if len(self.launches) > MOST_LAUNCHES:
                self.launches.popitem(last=False)
        self.launches.move_to_end(key)
        with self.desk.naming(self.request, self.choice):
            self.launches[key]()


class Scratch:
    """Memory of one thread for kernels of one stream of a card: they come one after the other."""

    def __init__(self, desk: Desk, stream: int) -> None:
        self.desk, self.stream, self.size_bytes, self.address = desk, stream, 0, 0
        self._memory: Any = None

    def of(self, size_bytes: int) -> int:
        """The address of so many bytes."""
        if size_bytes > self.size_bytes:
            if self._memory is not None:
                self.desk.card.wait_for(self.stream)  # kernels may be at work there
                self._memory()
                self._memory, self.size_bytes, self.address = None, 0, 0
            self.address, self.size_bytes = self.desk.card.reserve(size_bytes), size_bytes
            self._memory = weakref.finalize(self, give_back, self.desk.card, self.address)
            self._memory.atexit = False
        return self.address


def stream_of(form: Form, stream: Any, given: Sequence[Given]) -> int:
    """The stream that a caller means: its handle, an object of CuPy, PyTorch or Numba; by default that of the operands,
    or CUDA's default stream."""
    if stream is None:
        named = next((x.stream for x in given if x.stream), 0)
        return named or next((_current(x.array) for x in given if _of_torch(x.array)), 0)
    for name in ("cuda_stream", "ptr", "handle"):  # of PyTorch, CuPy, Numba
        found = getattr(stream, name, None)
        if found is not None:
            stream = getattr(found, "value", found) or 0  # the default stream is a null pointer to Numba
            break
    try:
        return operator.index(stream)
    except TypeError:
        raise SettingError(
            f"kernels.{form.name}: stream={stream!r} is not a stream of CuPy, PyTorch or Numba, nor its handle."
        ) from None


def _of_torch(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _current(tensor: Any) -> int:
    """The stream that PyTorch is at, which its tensors do not name."""
    return int(sys.modules["torch"].cuda.current_stream(tensor.device).cuda_stream)


def _stream_of_torch(handle: int, device: Any) -> Any:
    """A stream as PyTorch's object; to its ExternalStream 0 is not the default one."""
    cuda = sys.modules["torch"].cuda
    known = (cuda.current_stream(device), cuda.default_stream(device))
    return next((s for s in known if s.cuda_stream == handle), None) or cuda.ExternalStream(handle, device=device)


def empty(form: Form, like: Any, spec: Spec, stream: int) -> Any:
    """A new array of the library that ``like`` is of, in memory that nothing else than this stream uses."""
    if type(like) is CardArray:
        return CardArray(like.desk, spec)
    if _of_torch(like):
        with sys.modules["torch"].cuda.stream(_stream_of_torch(stream, like.device)):
            return like.new_empty(spec.shape)
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(like, cupy.ndarray):
        with cupy.cuda.Device(like.device.id), cupy.cuda.ExternalStream(stream) if stream else cupy.cuda.Stream.null:
            return cupy.empty(spec.shape, spec.dtype)
    raise SettingError(
        f"kernels.{form.name}: it is not known how a {type(like).__name__} is made. Give out=, an array for the result."
    )


def check_out(form: Form, out: Given, spec: Spec, names: Sequence[str], given: Sequence[Given]) -> None:
    """ShapeError for an array that a result cannot be written to."""
    if out.spec != spec:
        raise ShapeError(f"kernels.{form.name}: out is {out.spec} but the result is {spec}.")
    if not out.writeable:
        raise ShapeError(f"kernels.{form.name}: out is read-only. Give another array.")
    for name, x in zip(names, given, strict=True):
        if x.address < out.address + spec.size_bytes and out.address < x.address + x.spec.size_bytes:
            raise ShapeError(
                f"kernels.{form.name}: out shares memory with {name}, which is still read while out is written. "
                "Leave it out, or give an array of its own."
            )


def called_on_card(
    kept: OrderedDict[tuple[Any, ...], CardCall],
    scratches: dict[tuple[Desk, int], Scratch],
    form: Form,
    operands: Sequence[Any],
    how: tuple[Any, ...],
    out: Any,
    stream: Any,
) -> Any:
    """The result of a form on arrays of a GPU. ``kept``, ``scratches``: what this thread has prepared, and its
    workspaces by card and stream."""
    names = [name for name, x in zip(form.operands, operands, strict=True) if x is not None]
    given = [seen(form, name, x) for name, x in zip(form.operands, operands, strict=True) if x is not None]
    target = None if out is None else seen(form, "out", out)
    devices = [device_with(x.array) for x in (*given, *([] if target is None else [target])) if x.address]
    if len({(device, device.number) for device in devices}) > 1:
        raise SettingError(f"kernels.{form.name}: these arrays lie on several GPUs. Bring all to one of them.")
    device = devices[0] if devices else device_of("cuda")
    key = (form, how, device, device.number, *names, *(x.spec for x in given))
    call = kept.get(key)
    if call is None:
        call = kept[key] = CardCall(form, dict(zip(names, (x.spec for x in given), strict=True)), how, device)
    kept.move_to_end(key)
    if target is not None:
        check_out(form, target, call.out, names, given)
    if all(type(x.array) is CardArray for x in given) and stream is None and type(out) in (CardArray, type(None)):
        (made,) = call.desk.run(
            call.request, call.choice, [x.array for x in given], None, outs=() if out is None else (out,)
        )
        return made
    where = stream_of(form, stream, given)
    card = call.desk.card
    with card.briefly():
        if target is None:
            target = seen(form, "out", empty(form, given[0].array, call.out, where))
        for other in {x.stream for x in (*given, target)} - {0, where}:
            card.follow(where, other)
        scratch = scratches.setdefault((call.desk, where), Scratch(call.desk, where))
        call.launch([x.address for x in given], target.address, scratch.of(call.work_bytes), where)
        if type(target.array) is CardArray:  # whoever reads it asks another queue
            card.wait_for(where)
    return target.array
