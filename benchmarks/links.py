"""Sums of 25 MB between Dask workers on a link of 1 and of 10 Gbit/s: which share of the link they fill, and ways.

    namespace A                                           namespace B
    dask scheduler, dask worker rank-0   == veth pair ==   dask worker rank-1
    10.99.0.1                            tbf, both ways   10.99.0.2

Two network namespaces of this host stand for two hosts. The workers sum over `rapydli_flow.runtime.peers.Peers`: each
sends all its bytes to the other. In turns with it they send as many both ways at once through a plain socket, which is
what the link and this machine's cores can do. The rate that is set counts headers, which are 4.5 % of full Ethernet
frames. Then four ranks, two on each end, sum by hosts and by pieces. Needs the rights to make namespaces (root).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import link_ends
from common import environment
from distributed import Client

from rapydli_flow.scheduler.topology import BY_HOSTS, PIECES

SIZE = 25_000_000
RATES = (1, 10)  # Gbit/s
TARGET = 0.9  # of the link
HOSTS = ("10.99.0.1", "10.99.0.2")
SCHEDULER = f"tcp://{HOSTS[0]}:8786"
BURST, QUEUE = "256kb", "20ms"  # what a link lets through at once, and how long a byte may wait for it
LIMIT_S = 400


def measure(given: Namespace) -> list[dict[str, Any]]:
    """Two rows for each rate. PermissionError where namespaces may not be made."""
    return [row for rate in RATES for row in (of_two(rate, given.seconds), of_four(rate, given.seconds))]


def of_two(gbit_s: int, seconds: float) -> dict[str, Any]:
    """Gbit/s of the sum and of the socket, and their shares of the link."""
    rounds = max(3, min(30, int(seconds / (2.2 * SIZE * 8 / (gbit_s * 1e9)))))
    with link(gbit_s) as names, workers(names):
        found = inside(names[0], __file__, "two", rounds)
    sums = list(map(max, *(each["sum"] for each in found)))
    ours, plain = (SIZE * 8 / median(times) / 1e9 for times in (sums, found[0]["plain"]))
    return {
        "link_gbit_s": gbit_s,
        "ranks": 2,
        "sum_ms": median(sums) * 1e3,
        "sum_gbit_s": ours,
        "socket_gbit_s": plain,
        "of_link": ours / gbit_s,
        "of_socket": ours / plain,
        "target": TARGET,
        "rounds": rounds,
    }


def of_four(gbit_s: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of a sum of four ranks, two on each end of the link, by hosts and by pieces."""
    rounds = max(3, min(20, int(seconds / (4.5 * SIZE * 8 / (gbit_s * 1e9)))))
    with link(gbit_s) as names, workers(names, 2):
        found = inside(names[0], __file__, "four", rounds)
    ours, pieces = (list(map(max, *times)) for times in zip(*found, strict=True))
    return {
        "link_gbit_s": gbit_s,
        "ranks": 4,
        "sum_ms": median(ours) * 1e3,
        "by_pieces_ms": median(pieces) * 1e3,
        "of_pieces": median(ours) / median(pieces),
        "rounds": rounds,
    }


def inside(name: str, script: str, *arguments: object) -> Any:
    """What a script prints in a namespace in its last line, which is JSON."""
    driver = [sys.executable, str(Path(script).resolve()), *map(str, arguments)]
    said = subprocess.run(
        [*_inside(name), *driver], env=environment(), stdout=subprocess.PIPE, check=True, timeout=LIMIT_S
    )
    return json.loads(said.stdout.splitlines()[-1])


@contextmanager
def link(gbit_s: int) -> Iterator[tuple[str, str]]:
    """Two namespaces and the link between them; they are gone afterwards, with all that is in them."""
    names = tuple(f"rapydli-{os.getpid()}-{end}" for end in "ab")
    with ExitStack() as made:
        for name in names:
            _ip("netns", "add", name)
            made.callback(_ip, "netns", "del", name)
        a, b = names
        _ip("link", "add", "name", "wire", "netns", a, "type", "veth", "peer", "name", "wire", "netns", b)
        for name, host in zip(names, HOSTS, strict=True):
            shape = ("root", "tbf", "rate", f"{gbit_s}gbit", "burst", BURST, "latency", QUEUE)
            _command("tc", "-n", name, "qdisc", "add", "dev", "wire", *shape)
            _ip("-n", name, "address", "add", f"{host}/24", "dev", "wire")
            for device in ("lo", "wire"):
                _ip("-n", name, "link", "set", device, "up")
        yield a, b


@contextmanager
def workers(names: Sequence[str], per_host: int = 1) -> Iterator[None]:
    """A scheduler in the first namespace, and workers of one thread in each: ranks are numbered host by host."""
    commands = [(names[0], ["scheduler", "--host", HOSTS[0], "--port", "8786", "--no-dashboard"])]
    for number in range(per_host * len(HOSTS)):
        name, host = names[number // per_host], HOSTS[number // per_host]
        how = ["--host", host, "--name", f"rank-{number}", "--nthreads", "1", "--memory-limit", "0"]
        commands.append((name, ["worker", SCHEDULER, *how, "--no-nanny", "--no-dashboard"]))
    with ExitStack() as running:
        for name, command in commands:
            full = [*_inside(name), sys.executable, "-m", "dask", *command]
            process = subprocess.Popen(full, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            running.callback(_end, process)
        yield


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _inside(name: str) -> list[str]:
    return ["ip", "netns", "exec", name]


def _ip(*arguments: str) -> None:
    _command("ip", *arguments)


def _command(*words: str) -> None:
    """Run a command of the system; PermissionError with what it said where it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise PermissionError(f"links: there is no command {words[0]!r} here (package iproute2).") from None
    if done.returncode:
        raise PermissionError(
            f"links: '{' '.join(words)}' failed ({done.stderr.strip()}). Network namespaces and shaped links need root."
        )


def drive(what: str, rounds: int) -> Any:
    """In the first namespace: let the workers measure; what they found."""
    ranks = 2 if what == "two" else 4
    with Client(SCHEDULER, timeout=60) as client:
        client.wait_for_workers(ranks, timeout=120)
        where = [{"workers": [f"rank-{rank}"], "pure": False} for rank in range(ranks)]
        if what == "two":
            addresses = client.gather([client.submit(link_ends.listen, rank, **where[rank]) for rank in range(ranks)])
            given: tuple[Any, ...] = (addresses, SIZE, rounds)
            ends = [client.submit(link_ends.measure, rank, *given, **where[rank]) for rank in range(ranks)]
        else:
            run = f"links-{os.getpid()}"
            opened = [client.submit(link_ends.open_all, rank, ranks, run, **where[rank]) for rank in range(ranks)]
            given = (client.gather(opened), run, SIZE, rounds, [BY_HOSTS, PIECES])
            ends = [client.submit(link_ends.measure_all, rank, *given, **where[rank]) for rank in range(ranks)]
        return client.gather(ends)


if __name__ == "__main__":
    print(json.dumps(drive(sys.argv[1], int(sys.argv[2]))))
