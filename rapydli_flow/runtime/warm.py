"""The kernel cache filled before kernels are needed: what is missing is compiled in several processes at once.

    pairs --which are not kept on disk?--> the largest first --shared out--> this process, and children of it

Numba compiles one function at a time in a process, so more processes are the only way to use more cores; cubins of a
GPU are compiled in the same way. Children are `Contained`: they run no kernel, and their machine code comes back
through the cache on disk. RAPYDLI_COMPILERS says how many processes compile, this one included; 1 starts none. A kernel
that a child cannot compile is left to who needs it, and fails there as if nothing had been tried before.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Thread

from ..config import settings
from ..template import Device
from ..tuner import Choice, Request
from .bench import COMPILE_S, compile_one
from .building import build, built
from .contained import Contained, Failed, Lost
from .own import carry

FEW = 2  # so many are compiled before a child has imported what it needs

Pair = tuple[Request, Choice]
Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Warmed:
    """How many kernels were compiled and how many were there before; those that failed, with what was said of them."""

    compiled: int
    found: int
    failed: tuple[tuple[Pair, str], ...]
    processes: int
    time_s: float
    device: Device

    def check(self) -> None:
        """Raise the error of the first kernel that failed, as compiling it here does."""
        for (request, choice), _ in self.failed:
            build(request, choice, self.device)

    def __str__(self) -> str:
        words = f"{self.compiled} kernels compiled, {self.found} found, {self.time_s:.1f} s"
        words += f" in {self.processes} processes" if self.processes > 1 else ""
        return words + (f"; {len(self.failed)} failed" if self.failed else "")


def warm(
    pairs: Sequence[Pair],
    device: Device,
    *,
    compilers: int | None = None,
    watch: Watch = lambda done, all_of_them: None,
) -> Warmed:
    """Compile what the cache on disk does not have. ``watch``: told how many are done, and of how many."""
    begun = time.monotonic()
    wanted = list(dict.fromkeys(pair for pair in pairs if not pair[1].reference))
    there = kept_of(wanted, device)
    missing = [pair for pair, known in zip(wanted, there, strict=True) if not known]
    missing.sort(key=lambda pair: -pair[0].op.flops(*pair[0].ins))
    processes = 1 if len(missing) <= FEW else min(compilers or settings().compilers, len(missing))
    failed = _Crew(missing, device, watch).run(processes - 1) if missing else []
    return Warmed(
        len(missing) - len(failed),
        len(wanted) - len(missing),
        tuple(failed),
        processes,
        time.monotonic() - begun,
        device,
    )


def kept_of(pairs: Sequence[Pair], device: Device) -> list[bool]:
    """Which kernels are on disk, or in this process."""
    return built(pairs, device)


class _Crew:
    """This process and its children, which take kernels from one queue."""

    def __init__(self, missing: Sequence[Pair], device: Device, watch: Watch) -> None:
        self.todo, self.count, self.device, self.watch = deque(missing), len(missing), device, watch
        self.done = 0
        self.failed: list[tuple[Pair, str]] = []

    def run(self, helpers: int) -> list[tuple[Pair, str]]:
        """Compile all; those that failed."""
        children = [Contained() for _ in range(helpers)]
        threads = [Thread(target=self._follow, args=(child,), daemon=True) for child in children]
        try:
            for thread in threads:
                thread.start()
            while (pair := self._next()) is not None:
                self._note(pair, self._here(pair))
            for thread in threads:
                thread.join()
        finally:
            self.todo.clear()
            for child in children:
                child.stop()
        return self.failed

    def _next(self) -> Pair | None:
        try:
            return self.todo.popleft()
        except IndexError:
            return None

    def _note(self, pair: Pair, trouble: str) -> None:
        self.done += 1
        if trouble:
            self.failed.append((pair, trouble))
        self.watch(self.done, self.count)

    def _here(self, pair: Pair) -> str:
        try:
            build(*pair, self.device)
        except Exception as error:  # of any kind: whoever needs the kernel will meet it again
            return f"{type(error).__name__}: {error}"
        return ""

    def _follow(self, child: Contained) -> None:
        """Let one child compile what is left, one after the other."""
        while (pair := self._next()) is not None:
            request, choice = pair
            try:
                child.ask(compile_one, carry(request, self.device), choice, self.device)
                answer = child.answer(COMPILE_S)
            except Exception as error:  # a request that cannot be carried, or a child that cannot be started
                answer = Failed(f"{type(error).__name__}: {error}")
            self._note(pair, answer.why if isinstance(answer, Lost | Failed) else "")
