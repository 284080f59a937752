"""The cluster of convenience: each worker has its share."""

import os

import psutil
import pytest
from distributed import Client
from small_runs import many, same_bits

import rapydli_flow as rf
from rapydli_flow.errors import SettingError


def environment(dask_worker):
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAPYDLI_THREADS")
    return [os.environ.get(name) for name in names], dask_worker.memory_manager.memory_pause_fraction


def test_workers_have_their_share(data, step):
    with rf.LocalCluster(2, threads=1) as cluster, Client(cluster) as client:
        client.wait_for_workers(2)
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        assert {worker["nthreads"] for worker in workers} == {1}
        total = psutil.virtual_memory().total
        assert all(0.45 * total < worker["memory_limit"] <= 0.5 * total for worker in workers)
        assert list(client.run(environment).values()) == [(["1", "1", "1"], False)] * 2
        assert client.dashboard_link
        run = rf.fit(step, data["train"], steps=4, client=client, seed=3)
    assert same_bits(run.state, rf.fit(step, data["train"], steps=4, plan=many(step, 2), seed=3).state)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"workers": 0}, "LocalCluster: workers=0, threads=None are not 1 or more"),
        ({"threads": 0}, "LocalCluster: workers=1, threads=0 are not 1 or more"),
        ({"workers": 4096}, r"LocalCluster: 4096 workers on \d+ cores. Use fewer, or say threads=1 if they may share"),
    ],
)
def test_clusters_that_cannot_be(how, message):
    with pytest.raises(SettingError, match=message):
        rf.LocalCluster(**how)
