"""Links between the hosts of a cluster, measured when they are first needed, and remembered on the client's disk.

One worker of each of two hosts: messages of a few bytes to and fro, then some of 8 MB both ways at once, as ranks send
them, over the connections that ranks would have (`Peers`). Pairs without a host in common are measured at once.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from distributed import Client, get_worker, wait
from distributed.comm.addressing import parse_address

from ..config import settings
from ..errors import RunLost
from ..scheduler import Link, Links
from .peers import Peers

SMALL_BYTES, LARGE_BYTES = 64, 8_000_000
SMALL_ROUNDS, LARGE_ROUNDS = 20, 5
KEPT = 10_000  # links that are remembered: names of containers never come again

Pair = tuple[str, str]  # hosts, in the order of their names
_open: dict[tuple[str, int], Peers] = {}


def known_links(client: Client, workers: Mapping[str, Mapping[str, Any]], ranks: int, timeout_s: float) -> Links:
    """The links between the hosts of workers. Those that were never measured are, if a run of so many ranks needs more
    hosts than one."""
    hosts = _first_workers(workers)
    most = max(sum(worker["host"] == host for worker in workers.values()) for host in hosts)
    found = remembered(workers)
    if ranks > most:
        missing = [pair for pair in combinations(hosts, 2) if pair not in found.measured]
        _measure_pairs(client, workers, missing, timeout_s)
        found = remembered(workers)
    return found


def measured_links(client: Client, workers: Mapping[str, Mapping[str, Any]], timeout_s: float) -> Links:
    """Measure the links between all hosts of workers, whatever is known of them."""
    _measure_pairs(client, workers, list(combinations(_first_workers(workers), 2)), timeout_s)
    return remembered(workers)


def remembered(workers: Mapping[str, Mapping[str, Any]]) -> Links:
    """What was measured before of the hosts of these workers, with their protocol."""
    protocol, hosts = _protocol(workers), _first_workers(workers)
    rows = [row for row in _rows() if row["protocol"] == protocol and hosts.keys() >= set(row["hosts"])]
    return Links({(row["hosts"][0], row["hosts"][1]): Link(row["latency_s"], row["bytes_s"]) for row in rows})


def _measure_pairs(
    client: Client, workers: Mapping[str, Mapping[str, Any]], pairs: Sequence[Pair], timeout_s: float
) -> None:
    """Measure links between hosts, and remember them; RunLost where two hosts do not reach each other in time."""
    hosts, found = _first_workers(workers), dict[Pair, Link]()
    for together in _rounds(pairs):
        ends = {pair: _ends(client, [hosts[host] for host in pair], timeout_s) for pair in together}
        for (a, b), futures in ends.items():
            try:
                with client.as_current():  # there may be several
                    wait(futures, timeout=timeout_s)
                found[a, b] = min(client.gather(futures), key=lambda link: link.bytes_s)
            except (TimeoutError, RunLost, OSError) as error:
                raise RunLost(
                    f"links: {a} and {b} do not reach each other within {timeout_s:g} s "
                    f"({type(error).__name__}: {error}). Ranks on both could not either: open the ports of workers "
                    "to each other, or use a plan whose ranks fit on one host."
                ) from error
    if found:
        _remember(found, _protocol(workers))


def _first_workers(workers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The first worker of each host, in the order of hosts."""
    first = {workers[address]["host"]: address for address in sorted(workers, reverse=True)}
    return dict(sorted(first.items()))


def _rounds(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Pairs in rounds, no host twice in one."""
    left = list(pairs)
    while left:
        busy: set[str] = set()
        now = []
        for pair in left:
            if busy.isdisjoint(pair):
                now.append(pair)
                busy.update(pair)
        left = [pair for pair in left if pair not in now]
        yield now


# on workers -----------------------------------------------------------------------------------------


def _ends(client: Client, addresses: Sequence[str], timeout_s: float) -> list[Any]:
    """Tasks on two workers that measure the link between them."""
    probe = uuid.uuid4().hex
    where = [{"workers": [address], "allow_other_workers": False, "pure": False, "retries": 0} for address in addresses]
    opened = [client.submit(_listen, probe, end, timeout_s, **where[end]) for end in range(2)]
    return [client.submit(_measure, probe, end, *opened, **where[end]) for end in range(2)]


def _listen(probe: str, end: int, timeout_s: float) -> str:
    """Where the other end reaches this one."""
    peers = _open[probe, end] = Peers(get_worker(), end, 2, timeout_s=timeout_s)
    return peers.open()


def _measure(probe: str, end: int, *addresses: str) -> Link:
    """What this end sees of the link."""
    peers = _open.pop((probe, end))
    try:
        peers.connect(addresses)
        latency_s = median(_swaps(peers, SMALL_BYTES, SMALL_ROUNDS))
        large_s = median(_swaps(peers, LARGE_BYTES, LARGE_ROUNDS))
    finally:
        peers.close()
    return Link(latency_s, LARGE_BYTES / max(large_s - latency_s, 1e-9))


def _swaps(peers: Peers, size_bytes: int, rounds: int) -> list[float]:
    """Seconds of swaps of so many bytes; one that nobody counts comes first."""
    message, other = [np.zeros(size_bytes, np.uint8)], 1 - peers.rank
    times = []
    for _ in range(1 + rounds):
        begin = time.perf_counter()
        peers.swap("the probe of a link", {other: message}, {other: size_bytes})
        times.append(time.perf_counter() - begin)
    return times[1:]


# on disk --------------------------------------------------------------------------------------------


def _protocol(workers: Mapping[str, Any]) -> str:
    return str(parse_address(min(workers))[0])


def _file() -> Path:
    return settings().cache_dir / "links.json"


def _rows() -> list[dict[str, Any]]:
    """What is remembered: hosts, protocol, latency_s, bytes_s and the time."""
    file = _file()
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else []


def _remember(found: Mapping[Pair, Link], protocol: str) -> None:
    """Add links to those that are remembered, in the place of older ones."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    rows = [row for row in _rows() if row["protocol"] != protocol or tuple(row["hosts"]) not in found]
    for hosts, link in found.items():
        rates = {"latency_s": link.latency_s, "bytes_s": link.bytes_s}
        rows.append({"hosts": list(hosts), "protocol": protocol, **rates, "measured": now})
    file = _file()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(rows[-KEPT:], indent=1), encoding="utf-8")
    partial.replace(file)
