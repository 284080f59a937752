"""A process of its own for work that may crash or hang: it is told what to call, and restarted when it is lost.

    parent  --(function, arguments)-->  child         pickled by value where the child cannot import it
            <--("said", ...)---------                 where the work is; each word starts the clock anew
            <--("done", value) or ("failed", text)--
            <--end of file-----------                 the child is gone: how, says its exit status

Children are started with a plain `python -c`, not by multiprocessing: that neither runs the user's script again nor
is refused inside a Dask worker. They ignore Ctrl-C, and end when their parent does.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from cloudpickle import dumps, loads

from ..config import settings

SERVE = "import sys; from rapydli_flow.runtime.contained import serve; serve(int(sys.argv[1]))"


@dataclass(frozen=True)
class Lost:
    """The child is gone, or was stopped: why, and the last word it said."""

    why: str
    said: Any = None


@dataclass(frozen=True)
class Failed:
    """The function raised."""

    why: str


class Contained:
    """One child process. Ask it for one thing at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._said: Any = None

    def start(self) -> None:
        """Start the child if there is none; this does not wait for it."""
        if self._process is not None:
            return
        ours, theirs = socket.socketpair()
        environ = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "RAPYDLI_CACHE_DIR": str(settings().cache_dir),
        }
        command = [sys.executable, "-c", SERVE, str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        theirs.close()
        self._connection = Connection(ours.detach())

    def ask(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begin a call in the child. A function that takes ``say`` is given a callable for words about where it is."""
        self.start()
        assert self._connection is not None
        self._said = None
        try:
            self._connection.send_bytes(dumps((function, arguments)))
        except OSError:  # it died while it was idle: once more, in a new one
            self.stop()
            self.start()
            self._connection.send_bytes(dumps((function, arguments)))

    def answer(self, limit_s: float) -> Any:
        """What the call gave; `Failed` if it raised, `Lost` if the child died or said nothing for ``limit_s`` s."""
        while True:
            assert self._connection is not None
            if not self._connection.poll(limit_s):
                said = self._said
                self.stop()
                return Lost(f"hung: nothing for {limit_s:g} s", said)
            try:
                kind, value = loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                said, why = self._said, self._ending()
                self.stop()
                return Lost(why, said)
            if kind == "said":
                self._said = value
                continue
            return Failed(value) if kind == "failed" else value

    def _ending(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            return "crashed"
        if code < 0:
            return f"crashed: {signal.Signals(-code).name}"
        return f"crashed: exit status {code}"

    def stop(self) -> None:
        """End the child, whatever it does."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None

    @property
    def connection(self) -> Connection[Any, Any]:
        assert self._connection is not None
        return self._connection


def share(children: Sequence[Contained], calls: Sequence[tuple[Any, ...]], limit_s: float) -> list[Any]:
    """The answers to calls (function, *arguments), shared out among children as they become free."""
    answers: list[Any] = [None] * len(calls)
    waiting, busy = list(range(len(calls)))[::-1], {}  # type: list[int], dict[Any, tuple[Contained, int, float]]

    def give(child: Contained) -> None:
        i = waiting.pop()
        child.ask(*calls[i])
        busy[child.connection] = (child, i, time.monotonic() + limit_s)

    for child in children[: len(calls)]:
        give(child)
    while busy:
        left = min(end for *_, end in busy.values()) - time.monotonic()
        ready = wait(list(busy), max(0.0, left))
        late = [] if ready else [c for c, (*_, end) in busy.items() if end <= time.monotonic()]
        for connection in [*ready, *late]:
            child, i, _ = busy.pop(connection)
            answers[i] = child.answer(limit_s if connection in ready else 0.0)
            if isinstance(answers[i], Lost) and connection not in ready:
                answers[i] = Lost(f"hung: nothing for {limit_s:g} s")
            if waiting:
                give(child)
    return answers


def serve(descriptor: int) -> None:
    """The child's side: answer calls until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection: Connection[Any, Any] = Connection(descriptor)

    def tell(kind: str, value: Any) -> None:
        connection.send_bytes(dumps((kind, value)))

    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            function, arguments = loads(message)
            tell("done", function(*arguments, say=lambda value: tell("said", value)))
        except Exception as error:  # of any kind: it is the answer
            tell("failed", f"{type(error).__name__}: {error}")
