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
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from cloudpickle import dumps, loads

from ..config import settings

START_S = 120.0  # most for starting a child and importing, on a busy machine
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
        self.begun = False  # has the child imported what it needs for the call?

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
        self._said, self.begun = None, False
        try:
            self._connection.send_bytes(dumps((function, arguments)))
        except OSError:  # it died while it was idle: once more, in a new one
            self.stop()
            self.start()
            self._connection.send_bytes(dumps((function, arguments)))

    def answer(self, limit_s: float) -> Any:
        """What the call gave; `Failed` if it raised, `Lost` if the child died or said nothing for ``limit_s`` s.

        The time begins when the child does: starting it, and importing what it needs, may take `START_S`.
        """
        while True:
            limit = limit_s if self.begun else START_S
            if not self.connection.poll(limit):
                return self.give_up(limit)
            done, answer = self.receive()
            if done:
                return answer

    def receive(self) -> tuple[bool, Any]:
        """The next message: a word of where it is (False), or the answer (True)."""
        try:
            kind, value = loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            said, why = self._said, self._ending()
            self.stop()
            return True, Lost(why, said)
        if kind == "begun":
            self.begun = True
        elif kind == "said":
            self._said = value
        else:
            return True, Failed(value) if kind == "failed" else value
        return False, None

    def give_up(self, limit_s: float) -> Lost:
        """Stop a child that hangs."""
        said = self._said
        self.stop()
        return Lost(f"hung: nothing for {limit_s:g} s", said)

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
    waiting = list(range(len(calls)))[::-1]
    busy: dict[Contained, tuple[int, float]] = {}  # the call, and when it must have said something

    def give(child: Contained) -> None:
        call = waiting.pop()
        child.ask(*calls[call])
        busy[child] = (call, time.monotonic() + START_S)

    def done(child: Contained, answer: Any) -> None:
        answers[busy.pop(child)[0]] = answer
        if waiting:
            give(child)

    for child in children[: len(calls)]:
        give(child)
    while busy:
        places = {child.connection: child for child in busy}
        ready = wait(list(places), max(0.0, min(end for _, end in busy.values()) - time.monotonic()))
        for connection in ready:
            child = places[connection]  # type: ignore[index]
            over, answer = child.receive()
            if over:
                done(child, answer)
            else:
                busy[child] = (busy[child][0], time.monotonic() + limit_s)
        for child in [c for c, (_, end) in busy.items() if end <= time.monotonic()]:
            done(child, child.give_up(limit_s if child.begun else START_S))
    return answers


def serve(descriptor: int) -> None:
    """The child's side: answer calls until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection: Connection[Any, Any] = Connection(descriptor)

    def tell(kind: str, value: Any) -> None:
        connection.send_bytes(dumps((kind, value)))

    with suppress(EOFError, OSError):  # the parent is gone
        while True:
            message = connection.recv_bytes()
            try:
                function, arguments = loads(message)
                tell("begun", None)
                tell("done", function(*arguments, say=lambda value: tell("said", value)))
            except Exception as error:  # of any kind: it is the answer
                tell("failed", f"{type(error).__name__}: {error}")
