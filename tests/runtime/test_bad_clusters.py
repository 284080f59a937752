"""Clusters that will not do, or not any more: one clear error before anything is trained, or the run of any other.

Workers are processes of their own: with other versions, another processor, another host, less memory, TLS.
"""

import re
import shutil
import socket
import subprocess
from types import SimpleNamespace

import pytest
from distributed import Client, LocalCluster, Security, get_worker
from small_runs import many, same_bits

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.errors import (
    DeviceMismatch,
    MissingDependency,
    NoWorkers,
    SettingError,
    TooLittleMemory,
    VersionMismatch,
)
from rapydli_flow.runtime import worker as tasks
from rapydli_flow.runtime import workers
from rapydli_flow.runtime.peers import Peers
from rapydli_flow.runtime.workers import answering, ready_workers, workers_for
from rapydli_flow.tuner import compilers

ROLES = ("scheduler", "worker", "client")
OLD_CPU = {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt"}


def addresses(client, count):
    client.wait_for_workers(count, timeout=60)
    return sorted(client.scheduler_info(n_workers=-1)["workers"])


def started(client, start, *arguments, **how):
    """Start one worker; its address."""
    before = set(client.scheduler_info(n_workers=-1)["workers"])
    start(1, *arguments, **how)
    (new,) = set(addresses(client, len(before) + 1)) - before
    return new


# versions -----------------------------------------------------------------------------------------------


def test_a_worker_with_other_compilers(loose, step, data, tmp_path):
    client, start = loose
    info = tmp_path / "numba-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: numba\nVersion: 0.1\n")
    good, bad = started(client, start), started(client, start, path=[tmp_path])
    text = rf"worker {bad} has numba 0\.1, llvmlite .* but this client has {re.escape(tasks.libraries())}\. Install the"
    with pytest.raises(VersionMismatch, match=text):
        rf.fit(step, data["train"], steps=1, client=client)
    assert compilers("cpu") in tasks.libraries()
    assert list(answering(client, 10.0)) == [good]  # nor does a run that has lost a worker go on there


def test_a_worker_without_the_package(loose, step, data, tmp_path):
    client, start = loose
    (tmp_path / "without.py").write_text("import sys\nsys.modules['rapydli_flow'] = None\n")
    bad = started(client, start, "--preload", str(tmp_path / "without.py"))
    with pytest.raises(
        VersionMismatch, match=rf"worker {bad} cannot use rapydli_flow .* \(ModuleNotFoundError.*\)\. Inst"
    ):
        rf.fit(step, data["train"], steps=1, client=client)


# devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "error", "text"),
    [
        ("cuda:99", DeviceMismatch, r" cannot use its device: .*\. Start workers there with another RAPYDLI_DEVICE\."),
        ("gpu", SettingError, ": RAPYDLI_DEVICE='gpu' is not 'cpu', 'cuda', 'cuda:1' and so on"),
    ],
)
def test_a_worker_without_the_device_that_it_is_to_use(loose, step, data, device, error, text):
    client, start = loose
    bad = started(client, start, RAPYDLI_DEVICE=device)
    with pytest.raises(error, match=rf"^worker {bad}{text}"):
        rf.fit(step, data["train"], steps=1, client=client)


def test_what_a_worker_cannot_be_is_told_not_raised_there(monkeypatch):
    """Dask would log a traceback on the worker beside the one line of the client."""
    for error in (MissingDependency("no card"), SettingError("no name")):
        monkeypatch.setattr(tasks, "device_of", raising(error))
        worker = SimpleNamespace(memory_manager=None, state=SimpleNamespace(nthreads=1))
        assert workers._who(worker) is error


def raising(error):
    def function(*_):
        raise error

    return function


def test_workers_with_different_processors(loose, step, data):
    client, start = loose
    old = started(client, start, **OLD_CPU)
    new = [started(client, start) for _ in range(2)]
    keys = {address: worker["device"].key for address, worker in ready_workers(client, 3, 60.0).items()}
    assert keys[new[0]] == keys[new[1]] != keys[old]
    text = (
        rf"worker {min(new)} has device .* \({keys[new[0]]}\) but worker {old} has device .* \({keys[old]}\)\. .* "
        r"Plan for workers of one kind, ranks=2 or fewer; or start all with NUMBA_CPU_NAME"
    )
    for plan in (None, many(step, 3)):
        with pytest.raises(DeviceMismatch, match=text):
            rf.fit(step, data["train"], steps=1, client=client, plan=plan)
    with pytest.raises(DeviceMismatch, match=text):
        rf.plan(step, client)
    assert sorted(workers_for(client, 2, 60.0)) == sorted(new)
    two = rf.fit(step, data["train"], steps=5, client=client, plan=many(step, 2))
    assert same_bits(two.state, rf.fit(step, data["train"], steps=5, plan=many(step, 2)).state)
    device = ready_workers(client, 3, 60.0)[new[0]]["device"]
    assert sorted(answering(client, 10.0, [device.key])) == sorted(new)


@pytest.mark.slow
def test_workers_that_all_compile_for_the_least_processor(loose, step, data):
    client, start = loose
    start(2, **OLD_CPU)
    run = rf.fit(step, data["train"], steps=20, client=client, plan=many(step, 2))
    here = rf.fit(step, data["train"], steps=20, plan=many(step, 2))
    assert run.scalars["loss"] == pytest.approx(here.scalars["loss"], rel=1e-10)


# memory, threads, hosts ---------------------------------------------------------------------------------


def test_a_worker_with_less_memory_than_the_others(loose):
    client, start = loose
    started(client, start, "--memory-limit", "16GB")
    small = started(client, start, "--memory-limit", "1GB")
    graph = rf.trace(lambda x: nn.dense(x, 16_000), rf.Spec((4, 16_000)))
    step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))
    ones = {"x": [[1.0] * 16_000] * 4, "label": [0] * 4}
    with pytest.raises(TooLittleMemory) as e:
        rf.fit(step, ones, steps=1, client=client, plan=many(step, 2))
    found = re.match(
        r"rank [01] needs ([\d,]+) bytes for its arena but ([\d,]+) are free on worker (\S+): ([\d,]+) are missing\. "
        "Parameters and optimizer state alone take",
        str(e.value),
    )
    needs, free, where, missing = (text.replace(",", "") for text in found.groups())
    assert where == small
    assert int(needs) - int(free) == int(missing)
    assert 0 < int(free) < 1e9


def test_a_worker_without_a_limit_has_what_the_machine_has(loose):
    client, start = loose
    start(1, "--memory-limit", "0")
    (worker,) = ready_workers(client, 1, 60.0).values()
    assert worker["memory_bytes"] > 1 << 30


def test_more_threads_than_a_worker_has(client, step, data):
    plan = rf.plan(step, ranks=2, threads=3)
    run = rf.fit(step, data["train"], steps=5, client=client, plan=plan)
    assert same_bits(run.state, rf.fit(step, data["train"], steps=5, plan=many(step, 2)).state)


def test_workers_that_left_since_the_plan_was_made(loose, step, data):
    client, start = loose
    start(2)
    addresses(client, 2)
    plan = rf.plan(step, client)
    client.retire_workers(addresses(client, 2)[:1])
    with pytest.raises(NoWorkers, match=r"the plan needs 2 worker\(s\) but the cluster has 1 after 0\.5 s"):
        rf.fit(step, data["train"], steps=1, client=client, plan=plan, timeout_s=0.5)


def of_another_host(name):
    return ["unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh"]


@pytest.mark.skipif(
    subprocess.run([*of_another_host("elsewhere"), "true"], capture_output=True).returncode != 0,
    reason="a host name of its own needs root",
)
def test_workers_on_several_hosts(loose, step, data):
    client, start = loose
    start(1, within=of_another_host("here"))
    start(1, within=of_another_host("elsewhere"))
    assert {worker["host"] for worker in ready_workers(client, 2, 60.0).values()} == {"here", "elsewhere"}
    how = {"steps": 5, "plan": many(step, 2)}
    with pytest.raises(SettingError, match="transport='shared' is for ranks of one host, but these are on 2: else"):
        rf.fit(step, data["train"], client=client, transport="shared", **how)
    run = rf.fit(step, data["train"], client=client, **how)
    assert same_bits(run.state, rf.fit(step, data["train"], **how).state)


# ports and certificates -------------------------------------------------------------------------------


def test_ranks_listen_on_the_ports_that_they_may(loose, step, data):
    client, start = loose
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start(2, RAPYDLI_PEER_PORTS=str(port))
    how = {"client": client, "plan": many(step, 2), "transport": "comm", "steps": 1}
    with pytest.raises(SettingError, match=rf"rank 1 cannot listen on 127\.0\.0\.1, ports {port} to {port} \(.*in use"):
        rf.fit(step, data["train"], **how)
    assert client.submit(listens).result() == f"tcp://127.0.0.1:{port}"


@pytest.fixture
def certified(tmp_path):
    """What scheduler, workers and clients of a cluster with TLS are given: one certificate for all."""
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test", "-days", "2"]
    subprocess.run([*made, "-keyout", tmp_path / "key", "-out", tmp_path / "cert"], check=True, capture_output=True)
    own = {f"tls_{who}_{what}": str(tmp_path / what) for who in ROLES for what in ("key", "cert")}
    return Security(require_encryption=True, tls_ca_file=str(tmp_path / "cert"), **own)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made with openssl")
def test_a_cluster_with_tls(certified, step, data):
    how = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0", "protocol": "tls"}
    with LocalCluster(**how, security=certified) as cluster, Client(cluster, security=certified) as client:
        assert all(address.startswith("tls://") for address in addresses(client, 2))
        assert client.submit(listens).result().startswith("tls://")
        how = {"steps": 20, "plan": many(step, 2)}
        run = rf.fit(step, data["train"], client=client, transport="comm", **how)
    assert same_bits(run.state, rf.fit(step, data["train"], **how).state)


def listens():
    """Where a rank on this worker listens."""
    peer = Peers(get_worker(), 0, 2)
    try:
        return peer.open()
    finally:
        peer.close()
