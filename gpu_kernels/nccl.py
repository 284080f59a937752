"""Cards that hand each other memory: NCCL, through CuPy. `MissingDependency` where one of them is not there.

What is asked of a communicator is queued on a card's stream, and waits there for the other cards: for ever, if one of
them is gone. So nobody waits for such a stream without looking whether the others are still there, and who gives up
aborts the communicator, which ends what is under way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from rapydli_flow.errors import DeviceFault, MissingDependency, RunLost

from .card import Alive, Communicator

if TYPE_CHECKING:
    from .card import Accelerator

POLL_S = 0.05
_BYTES, _SUM = 1, 0  # ncclUint8, ncclSum
_OTHERS = (2, 3, 6)  # ncclSystemError, ncclInternalError, ncclRemoteError
_TYPES = {  # ncclDataType_t
    "int8": 0,
    "uint8": 1,
    "int32": 2,
    "uint32": 3,
    "int64": 4,
    "uint64": 5,
    "float16": 6,
    "float32": 7,
    "float64": 8,
    "bfloat16": 9,
}


def library() -> Any:
    """CuPy's module for it."""
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise MissingDependency(_absent(str(error))) from None
    if not nccl.available:
        raise MissingDependency(_absent("CuPy finds no libnccl"))
    return nccl


def _absent(why: str) -> str:
    return (
        f"nccl=True needs CuPy and NCCL ({why}). Install rapydli-flow[cuda12] or [cuda13], as the driver says, or "
        "leave nccl out: what ranks tell each other then goes through the host."
    )


def new_meeting() -> bytes:
    """What cards find each other by."""
    nccl = library()
    return bytes(_said(nccl, nccl.get_unique_id))


def _said(nccl: Any, ask: Callable[..., Any], *args: Any) -> Any:
    """What NCCL answers; DeviceFault for what it refuses, RunLost where others are the reason."""
    try:
        return ask(*args)
    except nccl.NcclError as error:
        if getattr(error, "status", None) in _OTHERS:
            raise RunLost(f"another card is gone ({error}); resume from the last snapshot.") from error
        raise DeviceFault(
            f"NCCL refused ({error}). Each rank needs a GPU of its own, and GPUs and hosts that reach each other; "
            "NCCL_DEBUG=INFO has it say more. Without nccl=True it goes through the host."
        ) from error


class Nccl(Communicator):
    """A card's way to others, on streams of that card."""

    def __init__(self, card: Accelerator, meeting: bytes, rank: int, ranks: int, alive: Alive) -> None:
        self._nccl, self._aborted, self._lock = library(), False, threading.Lock()
        made: list[Any] = []

        def come() -> None:
            try:
                card.use()
                made.append(_said(self._nccl, self._nccl.NcclCommunicator, ranks, meeting, rank))
            except BaseException as error:  # raised where it was asked for
                made.append(error)

        # it returns when all have come: if one never does, this thread is left behind, and ends with the process
        coming = threading.Thread(target=come, name="rapydli-nccl", daemon=True)
        coming.start()
        waited_s = 0.0
        while coming.is_alive():
            coming.join(POLL_S)
            waited_s += POLL_S
            if coming.is_alive():
                alive(waited_s)
        if isinstance(made[0], BaseException):
            raise made[0]
        self._communicator = made[0]

    def all_reduce(self, queue: Accelerator, sums: Sequence[tuple[int, int, int]], dtype: str) -> None:
        kind, stream = _TYPES[np.dtype(dtype).name], _stream(queue)
        with _Group(self._nccl):
            for source, target, elements in sums:
                self._ask("allReduce", source, target, elements, kind, _SUM, stream)

    def swap(
        self, queue: Accelerator, sends: Sequence[tuple[int, int, int]], gets: Sequence[tuple[int, int, int]]
    ) -> None:
        stream = _stream(queue)
        with _Group(self._nccl):
            for name, messages in (("send", sends), ("recv", gets)):
                for rank, address, size_bytes in messages:
                    self._ask(name, address, size_bytes, _BYTES, rank, stream)

    def _ask(self, name: str, *args: int) -> None:
        """Of one that another thread aborted nothing is asked, and what it says is not its fault."""
        try:
            _said(self._nccl, getattr(self._communicator, name), *args)
        except DeviceFault:
            if self._aborted:
                self.check()
            raise

    def check(self) -> None:
        if self._aborted:
            raise RunLost("the cards do not meet any more: the run was given up.")
        try:
            self._communicator.check_async_error()
        except self._nccl.NcclError as error:
            raise RunLost(f"another card is gone ({error}); resume from the last snapshot.") from error

    def abort(self) -> None:
        with self._lock:
            first, self._aborted = not self._aborted, True
        if first:
            self._communicator.abort()


class _Group:
    """What is asked for within it begins together."""

    def __init__(self, nccl: Any) -> None:
        self._nccl = nccl

    def __enter__(self) -> None:
        _said(self._nccl, self._nccl.groupStart)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            _said(self._nccl, self._nccl.groupEnd)
        else:
            with suppress(self._nccl.NcclError):  # it says the same again
                self._nccl.groupEnd()


def _stream(queue: Accelerator) -> int:
    stream: int = queue.stream  # type: ignore[attr-defined]
    return stream
