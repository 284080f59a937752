"""Prepared calls: what a function needs beside its arrays is made once for each shape, and kept. `on_card` has those
on arrays of a GPU.

    conv(x, w, stride=2) --key: form, how, shapes, dtypes--> Prepared: kernel, call list, place of its workspace
                                                             point it at x, w, out; run

Every Python thread has its own: at most `MOST_CALLS` prepared calls, the latest used, and one workspace for all of
them, as large as the largest needs. So threads never wait for each other, and memory does not grow with the number of
shapes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from cpu_kernels.compile import host
from cpu_kernels.driver import CallList

from ..config import settings
from ..errors import SettingError
from ..runtime.card_array import Desk
from ..runtime.participant import at_array
from ..runtime.rank import ALIGN, kernel_of, memory_of
from ..runtime.remembered import known
from ..spec import Array, Block, Spec
from ..tuner import Tuning
from .form import Form
from .on_card import CardCall, Scratch, called_on_card, on_card
from .operands import check_apart, taken, target

MOST_CALLS = 256  # of one thread


class Prepared:
    """A kernel for operands of these specs with its call list; without one, NumPy computes the reference.

    That is where no template fits, or where there is nothing to read: a sum over nothing is 0.
    """

    def __init__(self, form: Form, names: Sequence[str], specs: Sequence[Spec], how: Sequence[Any]) -> None:
        device = host()
        self.form, self.names = form, tuple(names)
        self.op, ins = form.of(dict(zip(names, specs, strict=True)), how)
        self.out = self.op.out_specs(*ins)[0]
        self.shape, self.dtype = self.out.shape, np.dtype(self.out.dtype)
        self.work_bytes, self._work_at = 0, 0
        self._calls: CallList | None = None
        if any(spec.size == 0 for spec in (*ins, self.out)):
            return
        request, choice = known(device).serve(self.op, ins)
        if choice.reference:
            return
        work = Tuning(device).workspace(request, choice)
        first = len(request.ins)  # buffers: inputs, output, workspaces, extras, at
        behind = first + 1 + len(work)
        self._inputs = (*range(first), *range(behind, behind + len(ins) - first))
        self._output = first
        self._work: list[tuple[int, int]] = []  # buffer, offset
        for i, spec in enumerate(work):
            self._work.append((first + 1 + i, self.work_bytes))
            self.work_bytes += -(-spec.size_bytes // ALIGN) * ALIGN
        self._at = at_array(Block.all(self.shape))
        kernel = kernel_of(request, choice, device)
        addresses = [0] * len(kernel.buffers)
        addresses[-1] = self._at.ctypes.data
        self._calls = CallList([(kernel, addresses)])

    def run(self, arrays: Sequence[Array], out: Array, work: int, threads: int) -> None:
        """Compute ``out``; ``work`` is the address of ``work_bytes`` that this call may overwrite."""
        calls = self._calls
        if calls is None:
            if out.size:
                out[...] = self.op.run(*arrays)[0]
            return
        point = calls.point
        for buffer, array in zip(self._inputs, arrays, strict=True):
            point(0, buffer, array.__array_interface__["data"][0])
        point(0, self._output, out.__array_interface__["data"][0])
        if work != self._work_at:
            for buffer, offset in self._work:
                point(0, buffer, work + offset)
            self._work_at = work
        calls.run(threads=threads)


class _Own(threading.local):
    """What one thread keeps."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.round = _round
        self.calls: OrderedDict[tuple[Any, ...], Prepared] = OrderedDict()
        self.memory = np.empty(0, np.uint8)
        self.work = 0  # its address
        self.on_cards: OrderedDict[tuple[Any, ...], CardCall] = OrderedDict()
        self.scratches: dict[tuple[Desk, int], Scratch] = {}  # by card and stream

    def keep(self, key: tuple[Any, ...], made: Prepared) -> None:
        """Remember a prepared call, in place of the one that was not used for longest; there is room for its work."""
        if made.work_bytes > self.memory.size:
            self.memory, self.work = np.empty(0, np.uint8), 0  # first let go of the old one
            self.memory = memory_of(made.work_bytes)
            self.work = self.memory.ctypes.data
        self.calls[key] = made
        if len(self.calls) > MOST_CALLS:
            self.calls.popitem(last=False)


_round = 0  # grows when nothing that was prepared holds any longer
_own = _Own()


def release() -> None:
    """Let go of prepared calls and workspaces: of this thread at once, of others when they call the next time.

    Later calls prepare again, with what the tuner knows by then. Compiled kernels are kept, as for all of the package.
    """
    global _round
    _round += 1
    _own.clear()


def called(
    form: Form, operands: Sequence[Any], how: tuple[Any, ...], out: Any, threads: int | None, stream: Any
) -> Any:
    """The result of a form on arrays; operands that are None are not given. ``how`` is hashable: see `frozen`."""
    arrays: list[Array] = []
    names: list[str] = []
    key: list[Any] = [form, how]
    for name, x in zip(form.operands, operands, strict=True):
        if x is None:
            continue
        if type(x) is not np.ndarray or not (x.flags.c_contiguous and x.flags.aligned and x.dtype.isnative):
            if type(x) is not np.ndarray and on_card(x):
                return _on_card(form, operands, how, out, threads, stream)
            x = taken(form, name, x)
        arrays.append(x)
        names.append(name)
        key += (name, x.shape, x.dtype)
    if threads is None:
        threads = settings().threads
    elif type(threads) is not int or threads < 1:
        raise SettingError(f"kernels.{form.name}: threads={threads!r} is not a number of 1 or more.")
    if stream is not None:
        raise SettingError(f"kernels.{form.name}: stream={stream!r} is for arrays of a GPU; these are on the host.")
    own, where = _own, tuple(key)
    if own.round != _round:
        own.clear()
    prepared = own.calls.get(where)
    if prepared is None:
        arrays = [taken(form, name, x) for name, x in zip(names, arrays, strict=True)]
        prepared = Prepared(form, names, [Spec(x.shape, x.dtype.name) for x in arrays], how)
        own.keep(where, prepared)
    else:
        own.calls.move_to_end(where)
    if out is None:
        result: Array = np.empty(prepared.shape, prepared.dtype)
    else:
        result = target(form, out, prepared.out, prepared.dtype)
        check_apart(form, names, arrays, result)
    prepared.run(arrays, result, own.work, threads)
    return result


def _on_card(
    form: Form, operands: Sequence[Any], how: tuple[Any, ...], out: Any, threads: int | None, stream: Any
) -> Any:
    """The same on arrays of a GPU."""
    if threads is not None:
        raise SettingError(f"kernels.{form.name}: threads={threads!r} is for arrays of the host; these are on a GPU.")
    if _own.round != _round:
        _own.clear()
    result = called_on_card(_own.on_cards, _own.scratches, form, operands, how, out, stream)
    if len(_own.on_cards) > MOST_CALLS:
        _own.on_cards.popitem(last=False)
    return result
