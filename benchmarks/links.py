"""A sum of 25 MB between two Dask workers on a link of 1 and of 10 Gbit/s: which share of the link it fills.

    namespace A                                           namespace B
    dask scheduler, dask worker rank-0   == veth pair ==   dask worker rank-1
    10.99.0.1                            tbf, both ways   10.99.0.2

Two network namespaces of this host stand for two hosts. The workers sum over `rapydli_flow.runtime.peers.Peers`, and in
turns with it one sends the same number of bytes to the other through a plain socket. In a sum of two ranks each sends
all its bytes: half as pieces, and half as sums of the other pieces. The rate that is set counts headers, which are
4.5 % of full Ethernet frames. Needs the rights to make namespaces (root).
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

SIZE = 25_000_000
RATES = (1, 10)  # Gbit/s
TARGET = 0.9  # of the link
HOSTS = ("10.99.0.1", "10.99.0.2")
SCHEDULER = f"tcp://{HOSTS[0]}:8786"
BURST, QUEUE = "256kb", "20ms"  # what a link lets through at once, and how long a byte may wait for it
LIMIT_S = 180


def measure(given: Namespace) -> list[dict[str, Any]]:
    """A row for each rate. PermissionError where namespaces may not be made."""
    return [row(rate, given.seconds) for rate in RATES]


def row(gbit_s: int, seconds: float) -> dict[str, Any]:
    """Gbit/s of the sum and of the socket, and their shares of the link."""
    rounds = max(3, min(30, int(seconds / (2.2 * SIZE * 8 / (gbit_s * 1e9)))))
    with link(gbit_s) as names, workers(names):
        driver = [sys.executable, str(Path(__file__).resolve()), str(rounds)]
        said = subprocess.run(
            [*_inside(names[0]), *driver], env=environment(), stdout=subprocess.PIPE, check=True, timeout=LIMIT_S
        )
    found = json.loads(said.stdout.splitlines()[-1])
    sums = list(map(max, *(each["sum"] for each in found)))
    ours, plain = (SIZE * 8 / median(times) / 1e9 for times in (sums, found[0]["plain"]))
    return {
        "link_gbit_s": gbit_s,
        "sum_ms": median(sums) * 1e3,
        "sum_gbit_s": ours,
        "socket_gbit_s": plain,
        "of_link": ours / gbit_s,
        "of_socket": ours / plain,
        "target": TARGET,
        "rounds": rounds,
    }


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
def workers(names: Sequence[str]) -> Iterator[None]:
    """A scheduler in the first namespace, and a worker of one thread in each."""
    commands = [["scheduler", "--host", HOSTS[0], "--port", "8786", "--no-dashboard"]]
    for number, host in enumerate(HOSTS):
        how = ["--host", host, "--name", f"rank-{number}", "--nthreads", "1", "--memory-limit", "0"]
        commands.append(["worker", SCHEDULER, *how, "--no-nanny", "--no-dashboard"])
    with ExitStack() as running:
        for name, command in zip((names[0], *names), commands, strict=True):
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


def drive(rounds: int) -> None:
    """In the first namespace: let the workers measure, and print what both found as a line of JSON."""
    with Client(SCHEDULER, timeout=60) as client:
        client.wait_for_workers(2, timeout=120)
        where = [{"workers": [f"rank-{rank}"], "pure": False} for rank in range(2)]
        addresses = client.gather([client.submit(link_ends.listen, rank, **where[rank]) for rank in range(2)])
        ends = [client.submit(link_ends.measure, rank, addresses, SIZE, rounds, **where[rank]) for rank in range(2)]
        print(json.dumps(client.gather(ends)))


if __name__ == "__main__":
    drive(int(sys.argv[1]))
