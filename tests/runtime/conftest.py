"""One cluster of three worker processes for all that leaves it whole; records; nothing left in shared memory."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

import rapydli_flow as rf
from rapydli_flow.runtime.shared import folder

sys.path.insert(0, str(Path(__file__).parent))  # for small_runs.py, here and in workers, whatever pytest's import mode

from small_runs import make_step, many, records, same_bits


@pytest.fixture(scope="session")
def client():
    """A client of three workers. Tests may fail runs on it, but not lose its workers."""
    with (
        LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def mortal():
    """A client of three workers that may be killed; nannies start new ones at new addresses."""
    with (
        LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def loose():
    """A cluster, and what starts workers without nannies: those that are killed stay away.

    ``start(2, "--memory-limit", "1GB", path=[folder], within=["unshare", "--uts"], NUMBA_CPU_NAME="x86-64")``: with
    options, folders to import from, as the child of a program, with variables of the environment.
    """
    folders = [str(Path(__file__).parent), str(Path(rf.__file__).parents[1])]
    started = []
    with LocalCluster(n_workers=0, dashboard_address=":0") as cluster, Client(cluster) as client:

        def start(count, *options, path=(), within=(), **env):
            command = [*within, sys.executable, "-m", "distributed.cli.dask_worker", cluster.scheduler_address]
            command += ["--no-nanny", "--nthreads", "1", "--no-dashboard", *options]
            env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *folders]), **env}
            started.extend(subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) for _ in range(count))

        yield client, start
        for process in started:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def step():
    return make_step()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """61 records to train with, 13 to validate with, in chunks of 8."""
    parts = {"train": records(), "test": records(13, seed=1)}
    return rf.ingest(parts, tmp_path_factory.mktemp("records") / "data.zarr", chunk_records=8)


@pytest.fixture(scope="session")
def expected(step, data):
    """The state after three steps on two ranks."""
    return rf.fit(step, data["train"], steps=3, plan=many(step, 2)).state


@pytest.fixture
def usable(client, step, data, expected):
    """The cluster, which must train as if nothing had happened when the test is over."""
    yield client
    assert len(client.scheduler_info(n_workers=-1)["workers"]) == 3
    assert same_bits(rf.fit(step, data["train"], steps=3, plan=many(step, 2), client=client).state, expected)


@pytest.fixture(autouse=True)
def _nothing_left_in_shared_memory():
    before = set(folder().glob("rapydli-*"))
    yield
    limit = time.monotonic() + 60  # those of tests beside this one go by themselves
    while (left := set(folder().glob("rapydli-*")) - before) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not left
