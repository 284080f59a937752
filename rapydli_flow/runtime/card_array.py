"""Arrays on a card as what passes between tasks of a flow, and kernels that run on them.

    array of NumPy -> uploaded -> kernel -> CardArray -> kernel -> CardArray    tasks of this process, on this card
                                                            |
                                                            '-> pickled, or read as NumPy's: an array of the host

The tasks of a process share one queue of a card, one after the other; each kernel is waited for, so that a task is
over when its arrays are there, and one that fails is named.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from gpu_kernels.card import Accelerator

from ..errors import DeviceFault, TemplateError
from ..spec import Array, Block, Spec
from ..template import Device
from ..tuner import Choice, Request, Tuning
from .building import build, card_request
from .devices import card_of
from .participant import at_array

MOST_KERNELS = 1024  # that a process has on a card for its tasks


class CardArray:
    """An array that lies on a card, as long as this object is there. Other processes get an array of NumPy."""

    def __init__(self, desk: Desk, spec: Spec) -> None:
        self.spec, self.desk = spec, desk
        self.address = desk.card.reserve(spec.size_bytes)
        weakref.finalize(self, give_back, desk.card, self.address).atexit = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def dtype(self) -> Any:
        return np.dtype(self.spec.dtype)

    @property
    def nbytes(self) -> int:
        return self.spec.size_bytes

    def __sizeof__(self) -> int:
        """What Dask counts for it: it moves, and spills, that much."""
        return object.__sizeof__(self) + self.nbytes

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("an array on a card cannot be read without a copy.")
        found = np.empty(self.shape, self.dtype)
        with self.desk.at_work() as card:
            card.download(found, self.address)
        return found if dtype is None else found.astype(dtype, copy=False)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """What CuPy, PyTorch, Numba and others take it by, without a copy."""
        if self.desk.device.emulated:
            raise AttributeError("an array of an emulated card lies on the host; np.asarray(x) reads it")
        typestr = "<V2" if self.spec.dtype == "bfloat16" else self.dtype.str
        return {"shape": self.shape, "typestr": typestr, "data": (self.address, False), "strides": None, "version": 3}

    def __reduce__(self) -> tuple[Any, ...]:
        return np.asarray, (np.asarray(self),)

    def __repr__(self) -> str:
        return f"<CardArray: {self.spec} on {self.desk.card.name}>"


def give_back(card: Accelerator, address: int) -> None:
    """Free memory in the middle of whatever the thread does."""
    with suppress(DeviceFault), card.briefly():  # of a card that failed nothing can be given back
        card.free(address)


class Desk:
    """A card as the tasks of this process share it."""

    def __init__(self, device: Device) -> None:
        self.device, self.card = device, card_of(device)
        self._lock = threading.RLock()
        self._kernels: OrderedDict[tuple[Request, Choice], Any] = OrderedDict()

    @contextmanager
    def at_work(self) -> Iterator[Accelerator]:
        """The card, for this thread alone; what was asked of it is done afterwards."""
        with self._lock, self.card.briefly():
            try:
                yield self.card
            except BaseException:
                with suppress(DeviceFault):  # the first error says more; what is under way reads arrays of the host
                    self.card.wait()
                raise
            self.card.wait()

    def put(self, array: Array) -> CardArray:
        """A copy of an array of the host."""
        with self.at_work():
            return self._there(array, [])

    def bind(self, request: Request, choice: Choice, addresses: Sequence[int], *, stream: int) -> Any:
        """What launches a kernel in a stream of another library."""
        self._compile(request, choice)
        with self._lock, self.card.briefly():
            return self._kernel(request, choice).bind(addresses, stream=stream)

    def _kernel(self, request: Request, choice: Choice) -> Any:
        """A kernel on the card; those that were not used for longest go."""
        if (request, choice) not in self._kernels:
            self._kernels[request, choice] = self.card.prepare(card_request(request, choice, self.device))
            if len(self._kernels) > MOST_KERNELS:
                self._kernels.popitem(last=False)
        self._kernels.move_to_end((request, choice))
        return self._kernels[request, choice]

    def _compile(self, request: Request, choice: Choice) -> None:
        """Have a kernel on the disk, which takes seconds: others may use the card."""
        if (request, choice) not in self._kernels:
            build(request, choice, self.device)

    def run(
        self,
        request: Request,
        choice: Choice,
        arrays: Sequence[Any],
        at: Block | None,
        outs: Sequence[CardArray] = (),
    ) -> tuple[CardArray, ...]:
        """One kernel; results are new arrays on the card, unless there are ``outs``."""
        self._compile(request, choice)
        with self.naming(request, choice), self.at_work():
            return self._run(request, choice, arrays, at, outs)

    @contextmanager
    def naming(self, request: Request, choice: Choice) -> Iterator[None]:
        """What fails is said to be this kernel's."""
        try:
            yield
        except DeviceFault as error:
            kernel = f"{request.title} ({', '.join(map(str, request.outs))}) with {choice}"
            raise DeviceFault(f"{kernel} on {self.device.name}: {error}", sticky=error.sticky, kernel=kernel) from error

    def _run(
        self, request: Request, choice: Choice, arrays: Sequence[Any], at: Block | None, into: Sequence[CardArray]
    ) -> tuple[CardArray, ...]:
        sent: list[Array] = []  # to the card, which reads them until it has done this
        given = [self._there(array, sent) for array in arrays]
        for array, spec in zip(given, (*request.ins, *request.epilogue.extras), strict=True):
            if array.spec != spec:
                raise TemplateError(f"{request.title}: expected {spec} but got {array.spec}.")
        outs = tuple(into) or tuple(CardArray(self, spec) for spec in request.outs)
        work = [CardArray(self, spec) for spec in Tuning(self.device).workspace(request, choice)]
        where = None if at is None else self._there(at_array(at), sent)
        n = len(request.ins)
        addresses = [array.address for array in (*given[:n], *outs, *work, *given[n:])]
        launch = self._kernel(request, choice).bind(addresses, at=0 if where is None else where.address)
        launch()
        self.card.wait()
        return outs

    def _there(self, array: Any, sent: list[Array]) -> CardArray:
        """An array on this card: itself, or a copy."""
        if isinstance(array, CardArray) and array.desk is self:
            return array
        sent.append(np.asarray(array, order="C"))
        copy = CardArray(self, Spec(sent[-1].shape, sent[-1].dtype.name))
        self.card.upload(copy.address, sent[-1])
        return copy


_desks: dict[tuple[Device, int], Desk] = {}
_making = threading.Lock()


def desk_of(device: Device) -> Desk:
    """The queue of a card that tasks of this process share."""
    with _making:
        if (device, device.number) not in _desks:
            _desks[device, device.number] = Desk(device)
        return _desks[device, device.number]
