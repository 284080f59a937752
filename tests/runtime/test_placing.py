"""Ranks on several hosts: namespaces of this machine that have names of their own, one of which does not see a folder.

a   two workers; an empty file system hides the folder of records
b   two workers
"""

import json
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest
from distributed import Client
from small_runs import make_step, many, same_bits

import rapydli_flow as rf
from rapydli_flow import nn
from rapydli_flow.config import settings
from rapydli_flow.data import Dataset
from rapydli_flow.errors import NoWorkers, RunLost
from rapydli_flow.runtime import links
from rapydli_flow.runtime.workers import ready_workers
from rapydli_flow.scheduler import Links, make_plan


def deep(x):
    """Three layers for three stages."""
    x = nn.relu(nn.conv(x, 4, 3, padding=1))
    x = nn.relu(nn.conv(x, 4, 3, padding=1))
    return nn.dense(nn.max_pool(x, 2), 5)


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    """The folder that host a does not see."""
    return tmp_path_factory.mktemp("hidden")


@pytest.fixture(scope="module")
def hosts(hidden):
    """A client of two workers on host a and two on host b."""
    allowed = subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True, check=False)
    if allowed.returncode:
        pytest.skip("namespaces need root")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as running:

        def start(words, host, hide=""):
            inside = ["unshare", "--uts", "--mount", "sh", "-c", f'hostname {host}; {hide} exec "$@"', "sh"]
            process = subprocess.Popen([*inside, sys.executable, "-m", "dask", *words], stderr=subprocess.DEVNULL)
            running.callback(process.wait, 30)
            running.callback(process.terminate)

        start(["scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"], "b")
        plain = ["--nthreads", "1", "--memory-limit", "0", "--no-nanny", "--no-dashboard"]
        for host, hide in (("a", f"mount -t tmpfs none {hidden};"), ("b", "")):
            for _ in range(2):
                start(["worker", f"tcp://127.0.0.1:{port}", *plain], host, hide)
        with Client(f"tcp://127.0.0.1:{port}", timeout=60) as client:
            client.wait_for_workers(4, timeout=60)
            yield client


@pytest.fixture
def no_links(tmp_path, monkeypatch):
    """Where links are remembered: none yet."""
    monkeypatch.setenv("RAPYDLI_CACHE_DIR", str(tmp_path))
    settings.cache_clear()
    yield tmp_path / "links.json"
    settings.cache_clear()


def test_ranks_that_tell_each_other_much_share_a_host(hosts, no_links, step, data, expected):
    found = rf.placement(step, hosts, plan=many(step, 2), data=data["train"])
    assert found.hosts == ("a", "a")
    assert found.moved.between_bytes == 0
    assert not no_links.exists()  # of hosts that are not needed nothing is measured
    assert dict(found.others)["in turn over hosts"].between_bytes > 0
    run = rf.fit(step, data["train"], steps=3, client=hosts, plan=many(step, 2))
    assert same_bits(run.state, expected)
    assert found.explain() in run.started.explanation
    assert many(step, 2).explain(step, found).endswith(found.explain())


def test_links_are_measured_once(hosts, no_links, step):
    found = rf.placement(step, hosts, plan=many(step, 3))
    assert sorted(found.hosts) == ["a", "a", "b"]
    (row,) = json.loads(no_links.read_text())
    assert (row["hosts"], row["protocol"]) == (["a", "b"], "tcp")
    assert 0 < row["latency_s"] < 1
    assert 1e6 < row["bytes_s"] < 1e12
    row["latency_s"] = 0.25
    no_links.write_text(json.dumps([row, {**row, "hosts": ["b", "c"]}]))
    assert rf.placement(step, hosts, plan=many(step, 3)).moved.seconds > 0.25  # not measured again
    again = rf.measure_links(hosts)
    assert list(again.measured) == [("a", "b")]
    assert again.link("b", "a").latency_s < 0.25
    assert "<Links: 1 measured>" in repr(again)
    rows = json.loads(no_links.read_text())
    assert [row["hosts"] for row in rows] == [["b", "c"], ["a", "b"]]


def test_hosts_that_do_not_reach_each_other(hosts, no_links):
    workers = ready_workers(hosts, 4, 30.0)
    with pytest.raises(RunLost, match=r"links: a and b do not reach each other within 0 s \(TimeoutError"):
        links.measured_links(hosts, workers, 0.0)
    assert not no_links.exists()


def test_one_host_is_not_measured(client, no_links, step):
    assert rf.measure_links(client) == Links()
    assert not no_links.exists()


def test_who_reads_goes_where_the_records_are(hosts, hidden, data):
    there = rf.ingest(data["train"].read(), hidden / "there.zarr")
    step = make_step(net=deep)
    plan = make_plan(step, 3, strategy="pipeline", micro_batches=2)
    assert rf.placement(step, hosts, plan=plan).hosts != ("b", "a", "b")
    found = rf.placement(step, hosts, plan=plan, data=there)
    assert found.hosts == ("b", "a", "b")  # pictures are read by the first stage, labels by the last
    run = rf.fit(step, there, steps=3, client=hosts, plan=plan)
    assert same_bits(run.state, rf.fit(step, there, steps=3, plan=plan).state)
    everyone = many(step, 3)
    with pytest.raises(NoWorkers, match=r"no worker is left for rank 2: of 4, 4 have .* and 2 see the dataset"):
        rf.fit(step, there, steps=3, client=hosts, plan=everyone)


def test_where(data, hidden):

    train = data["train"]
    size_bytes = len(train) * (6 * 6 * 2 * 8 + 8)
    assert train.where() == {socket.gethostname(): size_bytes}
    assert train[:10].where() == {socket.gethostname(): size_bytes // len(train) * 10}
    assert Dataset(str(hidden / "nothing")).where() == {}
    remote = rf.ingest(train.read(), "memory://records.zarr")
    assert remote.where() == {"*": size_bytes}
