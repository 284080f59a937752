"""Ranks of several hosts meet over `distributed.comm`: listeners of their own, on the cluster's protocol.

Every rank listens and connects to every other; each message goes straight to the rank that it is for. TLS and its
certificates are the worker's own.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import dask.config
import numpy as np
from dask.utils import parse_timedelta
from distributed.comm import CommClosedError, connect, listen
from distributed.comm.addressing import get_address_host, parse_address
from distributed.protocol import to_serialize
from distributed.utils import sync

from ..config import settings
from ..errors import RunLost, SettingError
from ..spec import Array
from .transport import TIMEOUT_S, Transport, flattened


class Peers(Transport):
    """Rank ``rank`` of ``ranks``, on a Dask worker. `open` first, then `connect` with everyone's addresses.

    ``aside``: with a line of its own for what goes on behind kernels. It has connections of its own, so that no short
    message stands behind long ones; they come to the same port.
    """

    chunk_bytes = 1 << 21  # a message costs about a millisecond
    aside: Peers | None = None
    _line = 0  # which of a rank's lines this is, as messages say

    def __init__(
        self, worker: Any, rank: int, ranks: int, *, timeout_s: float = TIMEOUT_S, aside: bool = False
    ) -> None:
        self.rank, self.ranks, self.timeout_s = rank, ranks, timeout_s
        self._lines = [self]
        if aside:
            self.aside = Peers(worker, rank, ranks, timeout_s=timeout_s)
            self.aside._line = 1
            self._lines.append(self.aside)
        self._worker, self._loop = worker, worker.loop
        self._comms: dict[int, Any] = {}
        self._inbox: dict[tuple[int, int], asyncio.Future[Array]] = {}
        self._sent, self._taken = [0] * ranks, [0] * ranks
        self._writes: deque[Future[None] | None] = deque()  # of what was posted and nothing was taken after
        self._error: Exception | None = None
        self._listener: Any = None

    def open(self) -> str:
        """Listen; the address that others connect to."""
        return str(sync(self._loop, self._listen))

    def connect(self, addresses: Sequence[str]) -> None:
        """Connect to the other ranks; RunLost, with the address that was tried, where one cannot be reached."""
        for line in self._lines:
            sync(self._loop, line._connect, list(addresses))

    def post(self, name: str, sends: Mapping[int, Sequence[Array]]) -> None:
        if not sends:
            self._writes.append(None)
            return
        flat = {id(parts): flattened(parts) for parts in sends.values()}
        writes = self._write({r: flat[id(parts)] for r, parts in sends.items()})
        self._writes.append(asyncio.run_coroutine_threadsafe(writes, self._loop.asyncio_loop))

    def take(self, name: str, sizes: Mapping[int, int]) -> dict[int, Array]:
        written = self._writes.popleft() if self._writes else None
        if written is None and not sizes:
            return {}
        try:
            return dict(sync(self._loop, self._read, list(sizes), written))
        except TimeoutError:
            missing = next((r for r in sizes if (r, self._taken[r]) in self._inbox), "?")
            raise RunLost(
                f"rank {self.rank}: rank {missing} did not come to {name} in {self.timeout_s:g} s. Its worker may be "
                "dead or stopped; resume from the last snapshot."
            ) from None
        except (CommClosedError, OSError) as error:
            raise RunLost(f"rank {self.rank}: the connection to another rank broke in {name} ({error}).") from error

    def release(self) -> None:
        """What was taken is this rank's own."""

    def joined(self) -> None:
        """Addresses stay."""

    @property
    def given_up(self) -> bool:
        return self._error is not None

    def close(self) -> None:
        self._loop.add_callback(self._close)  # not awaited: this may be the loop's own thread

    async def _listen(self) -> str:
        protocol, _ = parse_address(self._worker.address)
        host = get_address_host(self._worker.address)
        arguments = self._worker.security.get_listen_args("worker")
        ports = settings().peer_ports
        for port in ports:
            try:
                self._listener = await listen(f"{protocol}://{host}:{port}", self._accept, **arguments)
            except OSError as error:
                refused = error
            else:
                return str(self._listener.contact_address)
        raise SettingError(
            f"rank {self.rank} cannot listen on {host}, ports {ports[0]} to {ports[-1]} ({refused}). Let "
            "RAPYDLI_PEER_PORTS have a free port for every rank on this host."
        )

    async def _connect(self, addresses: list[str]) -> None:
        arguments = self._worker.security.get_connection_args("worker")
        patience_s = min(self.timeout_s, parse_timedelta(dask.config.get("distributed.comm.timeouts.connect")))
        for rank, address in enumerate(addresses):
            if rank == self.rank:
                continue
            try:
                async with asyncio.timeout(patience_s):  # once connected, it waits for the other's first word for ever
                    self._comms[rank] = await connect(address, timeout=patience_s / 2, **arguments)
            except OSError as error:
                reason = str(error.__cause__ or error) or "no answer"
                raise RunLost(
                    f"rank {self.rank} on worker {self._worker.address} cannot reach rank {rank} at {address} in "
                    f"{patience_s:g} s ({reason}). Is its worker there, and does a firewall between "
                    "them let this port through? Every rank listens on a port of its own; RAPYDLI_PEER_PORTS, set on "
                    "the workers, says which it may be."
                ) from error

    async def _accept(self, comm: Any) -> None:
        """Read what one other rank sends on one of its lines, until it leaves."""
        try:
            while True:
                message = await comm.read()
                data = np.frombuffer(message["data"], np.uint8)
                future = self._lines[message["line"]]._expect(message["rank"], message["count"])
                if not future.done():
                    future.set_result(data)
        except (CommClosedError, OSError) as error:
            for line in self._lines:
                line._fail(RunLost(f"rank {self.rank}: another rank closed its connection ({error})."))

    def _expect(self, rank: int, count: int) -> asyncio.Future[Array]:
        if (rank, count) not in self._inbox:
            self._inbox[rank, count] = asyncio.get_running_loop().create_future()
            if self._error is not None:
                self._inbox[rank, count].set_exception(self._error)
        return self._inbox[rank, count]

    async def _write(self, sends: Mapping[int, Array]) -> None:
        """Send each rank its data."""
        writes = []
        for target, data in sends.items():
            self._sent[target] += 1
            message = {"rank": self.rank, "line": self._line, "count": self._sent[target]}
            writes.append(self._comms[target].write({**message, "data": to_serialize(data.data)}))
        async with asyncio.timeout(self.timeout_s):
            await asyncio.gather(*writes)

    async def _read(self, sources: Sequence[int], written: Future[None] | None) -> dict[int, Array]:
        """What each of these ranks sends next, when this one has written what it posted before."""
        expected = {}
        for source in sources:
            self._taken[source] += 1
            expected[source] = self._expect(source, self._taken[source])
        async with asyncio.timeout(self.timeout_s):
            if written is not None:
                await asyncio.wrap_future(written)
            begin = time.monotonic()
            got = {source: await future for source, future in expected.items()}
            self.waited_s += time.monotonic() - begin
        for source in sources:
            del self._inbox[source, self._taken[source]]
        return got

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        for future in self._inbox.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: no warning where nobody waits

    async def _close(self) -> None:
        for line in self._lines:
            line._fail(RunLost(f"rank {self.rank}: the run was given up."))
        for comm in (comm for line in self._lines for comm in line._comms.values()):
            await comm.close()
        if self._listener is not None:
            self._listener.stop()
