"""A training run whose workers are killed, stopped, slowed down and cut off at random: it must end as if undisturbed.

    python benchmarks/chaos.py --seed 1 --faults 30 [--workers 4] [--ranks 3] [--transport comm] [--cut]

Faults: SIGKILL (the nanny starts another worker), SIGSTOP for good (it is killed once the run has gone on without it),
a worker stopped and let go again several times (slow), and with ``--cut``, which needs root, a worker whose network is
taken away for some seconds: workers then live in network namespaces of their own. After each fault the run must have
gone on within a minute. In the end parameters have the same bits as those of a run in this process, or deviate by
rounding if it went on with fewer ranks in between. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from common import write
from distributed import Client, LocalCluster

from rapydli_flow.testing.chaos import survive

BRIDGE = "10.213.7"


def _cut(link: str) -> None:
    _ip("link", "set", link, "down")
    time.sleep(15.0)
    _ip("link", "set", link, "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextlib.contextmanager
def in_processes(workers: int) -> Iterator[tuple[Client, dict[str, str]]]:
    """Workers of this host."""
    how: dict[str, Any] = {"threads_per_worker": 1, "dashboard_address": ":0", "silence_logs": 50}
    with LocalCluster(n_workers=workers, **how) as cluster, Client(cluster) as client:
        yield client, {}


@contextlib.contextmanager
def in_namespaces(workers: int) -> Iterator[tuple[Client, dict[str, str]]]:
    """Workers with a network of their own, on a bridge; the links that can be cut, by address."""
    bridge, links, processes = f"rapc{os.getpid() % 10000}", {}, []
    with contextlib.ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(subprocess.run, ["ip", "link", "del", bridge])
        _ip("addr", "add", f"{BRIDGE}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        cluster = stack.enter_context(
            LocalCluster(n_workers=0, host=f"{BRIDGE}.1", dashboard_address=":0", silence_logs=50)
        )
        client = stack.enter_context(Client(cluster))
        for i in range(workers):
            space, outer, inner = f"{bridge}n{i}", f"{bridge}v{i}", f"{bridge}w{i}"
            _ip("netns", "add", space)
            stack.callback(subprocess.run, ["ip", "netns", "del", space])
            _ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", space)
            _ip("link", "set", outer, "master", bridge, "up")
            for arguments in (("addr", "add", f"{BRIDGE}.{i + 2}/24", "dev", inner), ("link", "set", inner, "up")):
                _ip("-n", space, *arguments)
            _ip("-n", space, "link", "set", "lo", "up")
            links[f"{BRIDGE}.{i + 2}"] = outer
            worker = f"{sys.executable} -m distributed.cli.dask_worker {cluster.scheduler_address} --nthreads 1"
            worker += f" --no-dashboard --host {BRIDGE}.{i + 2}"
            again = f"while true; do {worker}; sleep 1; done"  # a worker that lost its scheduler ends, and its nanny
            command = ["ip", "netns", "exec", space, "bash", "-c", again]
            processes.append(
                subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
            )
            stack.callback(processes[-1].wait)
            stack.callback(os.killpg, processes[-1].pid, signal.SIGKILL)
        yield client, links


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--cut", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    among = ["kill", "kill", "stop", "slow", *["cut"] * 2 * options.cut]
    kinds = [str(rng.choice(among)) for _ in range(options.faults)]
    with (in_namespaces if options.cut else in_processes)(options.workers) as (client, links):
        client.wait_for_workers(options.workers)

        def cut(address: str) -> None:
            _cut(links[address.split("//")[1].split(":")[0]])

        how = {"ranks": options.ranks, "seed": options.seed, "transport": options.transport}
        outcome = survive(client, kinds, cut=cut, tell=partial(print, flush=True), **how)
    print(outcome)
    result = {"recoveries": len(outcome.recoveries), "slowest_s": outcome.slowest_s, "same_bits": outcome.same_bits}
    result |= {"apart": outcome.apart, "seconds": outcome.seconds}
    rows = [asdict(fault) for fault in outcome.faults]
    write(f"chaos{'-cut' if options.cut else ''}", rows, **vars(options), **result)
    return int(not outcome.good)


if __name__ == "__main__":
    sys.exit(main())
