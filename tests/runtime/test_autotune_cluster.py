"""Tuning on the workers of a cluster: what comes back, what is shared and shown, and a worker that disappears."""

import os
import signal
import threading
import time

import pytest
from bokeh.client import pull_session
from distributed import Client, LocalCluster

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow import nn, optim
from rapydli_flow.config import settings
from rapydli_flow.dashboard.tuning_page import Told, header, kernels
from rapydli_flow.errors import RunLost
from rapydli_flow.runtime.session import Progress
from rapydli_flow.runtime.tuning import cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache of this user, and of workers that are started meanwhile."""
    monkeypatch.setenv("RAPYDLI_CACHE_DIR", str(tmp_path))
    settings.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    settings.cache_clear()


@pytest.fixture
def small():
    graph = rf.trace(lambda x: nn.dense(nn.relu(x), 3), rf.Spec((20, 6)))
    return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))


def cluster_in(folder):
    return LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=":0", env={"RAPYDLI_CACHE_DIR": str(folder)}
    )


@pytest.mark.slow
def test_one_worker_tunes_for_all_and_everybody_knows(folder, small):
    elsewhere = folder / "elsewhere"
    told = []
    with cluster_in(elsewhere) as cluster, Client(cluster) as client:
        plan = rf.plan(small, client)
        report = rf.autotune(small, client, plan=plan, trials=3, budget_s=120.0, watch=told.append)
        (session,) = report.sessions
        assert session.device.key == host().key
        assert report.lost == ()
        assert len(session.found) == report.requests > 5
        assert len(report.tuning) > 3
        page = pull_session(url=client.dashboard_link.rsplit("/", 1)[0] + "/rapydli-tuning")
        words = page.document.get_model_by_name("header").text
        shown = page.document.get_model_by_name("kernels").text
        assert "configs tried" in words
        assert "GFLOP/s" in words
        assert "matmul" in shown
        assert "Cartesian" in page.document.get_model_by_name("funnel").text
        (curves,) = page.document.get_model_by_name("page").select({"name": "curves"})
        assert len(curves.data["x"]) > 3
        page.close()
    assert told
    assert isinstance(told[-1], Progress)
    here = {known.key: known.best.choice for known in cache().known(host())}
    there = type(cache())(elsewhere / "tuning.sqlite")
    assert here == {known.key: known.best.choice for known in there.known(host())}
    request = session.found[0].request
    assert len(there.trials(host(), request)) == len(session.found[0].trials)


@pytest.mark.slow
def test_a_worker_that_disappears_is_named_and_what_it_found_is_kept(folder, small):
    killed = threading.Event()

    def watch(progress):
        if progress.ended and not killed.is_set():
            killed.set()
            os.kill(pid, signal.SIGKILL)

    with cluster_in(folder / "there") as cluster, Client(cluster) as client:
        address = min(client.scheduler_info(n_workers=-1)["workers"])
        pid = client.run(os.getpid, workers=[address])[address]
        cluster.workers[min(cluster.workers)].auto_restart = False
        with pytest.raises(RunLost, match=r"autotune: worker tcp://.* disappeared while tuning"):
            rf.autotune(small, client, plan=rf.plan(small, client), budget_s=300.0, trials=50, watch=watch)
    assert killed.is_set()
    there = type(cache())(folder / "there" / "tuning.sqlite")
    assert there.requests(host())


@pytest.mark.slow
def test_fit_tunes_first_what_is_not_known(folder, small):
    import numpy as np

    records = {"x": np.zeros((40, 6), "f"), "label": np.zeros(40, "i8")}
    with pytest.raises(rf.errors.SettingError, match="tune_s=-1 is not 0"):
        rf.fit(small, records, steps=1, tune_s=-1)
    rf.fit(small, records, steps=1, tune_s=40.0)
    first = {known.key: known.at for known in cache().known(host())}
    assert len(first) > 3
    begin = time.monotonic()
    rf.fit(small, records, steps=1, tune_s=40.0)
    assert {known.key: known.at for known in cache().known(host())} == first | {
        known.key: known.at for known in cache().known(host()) if known.key not in first
    }
    assert time.monotonic() - begin < 300


def test_the_page_before_and_after_kernels_fail():
    line = Progress("cpu-x", "conv <a>", 1, 2, 3, 3, None, None, None, None, 1.0, 0.0).to_json()
    told = Told()
    told.hear(line)
    assert "conv &lt;a&gt;" in header(told)
    assert "failed" in kernels(told)
    assert told.funnel.stages[0].left == 0
