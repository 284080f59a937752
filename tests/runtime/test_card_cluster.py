"""Workers that have a card, beside workers that have none: each run takes those of one kind."""

import numpy as np
import pytest
from small_runs import make_step, records

import rapydli_flow as rf
from rapydli_flow.errors import DeviceMismatch, SettingError
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
    with pytest.raises(DeviceMismatch, match=r"needs 1 worker.s. with device 'cuda' but 0 of 3 have one"):
        rf.fit(step, data, steps=1, client=client, device="cuda")
    with pytest.raises(SettingError, match="which GPU a worker has is said where it is started"):
        rf.fit(step, data, steps=1, client=client, device="cuda:1")
