"""Workers that have a card, beside workers that have none: each run takes those of one kind."""

import numpy as np
import pytest
from small_runs import make_step, records

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.config import settings
from rapydli_flow.errors import DeviceMismatch, SettingError
from rapydli_flow.runtime import tuning
from rapydli_flow.runtime.workers import workers_for

pytestmark = pytest.mark.filterwarnings("ignore:no GPU kernel serves")


def test_processors_and_cards_in_one_cluster(loose, tmp_path):
    client, start = loose
    start(2, RAPYDLI_DEVICE="emulated")
    start(1, RAPYDLI_DEVICE="cpu")
    client.wait_for_workers(3, timeout=60)
    assert sorted(w["device"].emulated for w in workers_for(client, None, 30.0, "emulated").values()) == [True, True]
    step, data = make_step(dtype="float32"), records(dtype="float32")
    wanted = rf.fit(step, data, steps=6, validation=data, device="cpu")
    assert rf.plan(step, client, device="emulated").ranks == 2
    for device, shard in (("cpu", None), ("emulated", None), ("emulated", "parameters")):
        plan = rf.plan(step, client, device=device, threads=1, shard=shard)
        run = rf.fit(step, data, steps=6, validation=data, client=client, plan=plan, device=device)
        np.testing.assert_allclose(run.scalars["loss"], wanted.scalars["loss"], rtol=1e-5)
        np.testing.assert_allclose(run.metrics["loss"], wanted.metrics["loss"], rtol=1e-5)
        assert run.started.settings["device"].endswith("-emulated") == (device == "emulated")
    with rf.stepper(step, client, device="emulated") as advance:
        batch = {"x": data["x"][:8], "label": data["label"][:8]}
        _, metrics = advance(advance.init(), batch)
    assert np.isfinite(metrics["loss"])
    said = rf.predict(run.graph, run.state, data["x"], device="emulated").compute()
    np.testing.assert_allclose(said, rf.predict(run.graph, run.state, data["x"], device="cpu").compute(), atol=1e-5)
    with pytest.raises(DeviceMismatch, match=r"^fit needs 1 worker.s. with device 'cuda' but 0 of 3 have one"):
        rf.fit(step, data, steps=1, client=client, device="cuda")
    with pytest.raises(SettingError, match=r"^fit: device='cuda:1': which GPU a worker has is said where"):
        rf.fit(step, data, steps=1, client=client, device="cuda:1")


def test_workers_with_the_device_that_is_named_tune(loose, tmp_path, monkeypatch):
    monkeypatch.setenv("RAPYDLI_CACHE_DIR", str(tmp_path))
    settings.cache_clear()
    client, start = loose
    start(1, RAPYDLI_DEVICE="emulated")
    start(1, RAPYDLI_DEVICE="cpu")
    client.wait_for_workers(2, timeout=60)
    graph = rf.trace(lambda x: nn.dense(x, 4), rf.Spec((8, 16)))
    step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))
    monkeypatch.setattr(tuning, "jobs_of", lambda *_: [])  # who tunes, not what
    how = {"budget_s": 20}
    try:
        (session,) = rf.autotune(step, client, device="emulated", **how).sessions
        assert session.device.emulated
        kinds = [session.device.emulated for session in rf.autotune(step, client, **how).sessions]
        assert sorted(kinds) == [False, True]
        with pytest.raises(DeviceMismatch, match=r"^autotune needs 1 worker.s. with device 'cuda' but 0 of 2 have one"):
            rf.autotune(step, client, device="cuda", **how)
        network, x = step.network, np.ones((8, 16), np.float32)
        with pytest.raises(DeviceMismatch, match=r"^predict needs 1 worker.s. with device 'cuda' but 0 of 2 have one"):
            rf.predict(network, rf.init(network), x, device="cuda")  # asks them, not this process
        with pytest.raises(SettingError, match=r"^autotune: device='gpu' is not 'cpu', 'cuda'"):
            rf.autotune(step, client, device="gpu", **how)
    finally:
        settings.cache_clear()
