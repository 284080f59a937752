"""A training run whose workers are killed, stopped, slowed down and cut off at random: it must end as if undisturbed.

    python benchmarks/chaos.py --seed 1 --faults 30 [--workers 4] [--ranks 3] [--transport comm] [--cut]

Faults: SIGKILL (the nanny starts another worker), SIGSTOP for good (it is killed once the run has gone on without it),
a worker stopped and let go again several times (slow), and with ``--cut``, which needs root, a worker whose network is
taken away for some seconds: workers then live in network namespaces of their own. After each fault the run must have
gone on within ``LIMIT_S``. In the end parameters have the same bits as those of a run in this process, or deviate by
rounding if it went on with fewer ranks in between. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from common import write
from distributed import Client, LocalCluster

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.runtime.events import Recovered, Stepped
from rapydli_flow.runtime.workers import answering

LIMIT_S = 60.0
STEPS_A_FAULT = 250
CLASSES, BATCH, RECORDS = 5, 12, 240
BRIDGE = "10.213.7"


def network(x: Any) -> Any:
    x = nn.relu(nn.batch_norm(nn.conv(x, 8, 3, padding=1, bias=False)))
    x = nn.dropout(nn.max_pool(nn.relu(nn.conv(x, 8, 3, padding=1)), 2), 0.25)
    return nn.dense(x, CLASSES)


def training_step() -> Any:
    graph = rf.trace(network, rf.Spec((BATCH, 12, 12, 3), "float64"))
    return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.01, momentum=0.9))


class Faults(rf.Callback):
    """Strikes a worker of the run whenever it has gone some steps since the last time."""

    def __init__(self, client: Client, kinds: list[str], rng: np.random.Generator, links: dict[str, str]) -> None:
        self.client, self.kinds, self.rng, self.links = client, kinds, rng, links
        self.next_step, self.struck, self.stopped = 60, 0.0, set[int]()
        self.recovered: list[Recovered] = []
        self.log: list[dict[str, Any]] = []

    def on_event(self, event: Any) -> None:
        if isinstance(event, Recovered):
            self.recovered.append(event)
            after = time.monotonic() - self.struck
            print(f"    on again at step {event.step} with {event.ranks} ranks after {after:.1f} s: {event.reason}")
            self.log[-1] |= {"seconds": after, "ranks": event.ranks}
            self._bury()
        if isinstance(event, Stepped) and event.first >= self.next_step and self.kinds:
            self.next_step = event.first + int(self.rng.integers(STEPS_A_FAULT // 2, STEPS_A_FAULT))
            self._strike(self.kinds.pop(), event.first)

    def _strike(self, kind: str, step: int) -> None:
        self._bury()
        alive = sorted(answering(self.client, 2.0).items())
        if not alive:
            return
        address, worker = alive[int(self.rng.integers(len(alive)))]
        print(f"  {len(self.log) + 1:3}  {kind} {address} at step {step}", flush=True)
        self.struck = time.monotonic()
        self.log.append({"kind": kind, "step": step})
        pid = worker["pid"]
        if kind == "kill":
            os.kill(pid, signal.SIGKILL)
        elif kind == "stop":
            os.kill(pid, signal.SIGSTOP)
            self.stopped.add(pid)
        elif kind == "slow":
            threading.Thread(target=_slow, args=(pid,), daemon=True).start()
        else:
            threading.Thread(target=_cut, args=(self.links[address.split("//")[1].split(":")[0]],), daemon=True).start()

    def _bury(self) -> None:
        """Kill what was stopped, so that its nanny starts another one."""
        for pid in self.stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.stopped.clear()


def _slow(pid: int) -> None:
    for _ in range(10):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.2)
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.1)


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
    kinds = [
        str(rng.choice(["kill", "kill", "stop", "slow", *["cut"] * 2 * options.cut])) for _ in range(options.faults)
    ]
    step, steps = training_step(), STEPS_A_FAULT * (options.faults + 1)
    x = rng.normal(size=(RECORDS, 12, 12, 3))
    records = {"x": x, "label": rng.integers(0, CLASSES, RECORDS)}
    plan = rf.plan(step, ranks=options.ranks, threads=1)
    with tempfile.TemporaryDirectory() as scratch:
        data = rf.ingest(records, os.path.join(scratch, "data.zarr"))
        want = rf.fit(step, data, steps=steps, plan=plan, seed=options.seed)
        begin = time.monotonic()
        with (in_namespaces if options.cut else in_processes)(options.workers) as (client, links):
            client.wait_for_workers(options.workers)
            faults = Faults(client, kinds, rng, links)
            how = {"seed": options.seed, "transport": options.transport, "callbacks": [faults]}
            how |= {"min_workers": 2, "patience_s": 10.0}
            run = rf.fit(step, data, steps=steps, plan=plan, client=client, **how)
            faults._bury()
    seconds = time.monotonic() - begin
    same = all(run.state[name].tobytes() == want.state[name].tobytes() for name in want.state)
    apart = max(float(np.abs(run.state[k] - v).max() / max(1.0, np.abs(v).max())) for k, v in want.state.items())
    fewer = [event for event in faults.recovered if event.ranks < options.ranks]
    slowest = max((entry["seconds"] for entry in faults.log if "seconds" in entry), default=0.0)
    good = (same or (bool(fewer) and apart < 1e-6)) and slowest < LIMIT_S and not faults.kinds
    print(
        f"{len(faults.log)} faults, {len(faults.recovered)} recoveries, the slowest after {slowest:.1f} s; "
        f"{steps} steps in {seconds:.0f} s; {'the same bits' if same else f'apart by {apart:.1e}'}"
        f"{f', with fewer ranks {len(fewer)} times' if fewer else ''}: {'good' if good else 'BAD'}"
    )
    result = {"faults": faults.log, "recoveries": len(faults.recovered), "slowest_s": slowest, "same_bits": same}
    write(f"chaos{'-cut' if options.cut else ''}", {**vars(options), **result, "apart": apart, "seconds": seconds})
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
