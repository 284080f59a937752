"""init, plan, evaluate, autotune, and models on disk."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_runs import make_step, many, records, same_bits

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow import nn
from rapydli_flow.data import list_snapshots
from rapydli_flow.errors import DatasetError, SettingError, SnapshotError
from rapydli_flow.runtime import tuning
from rapydli_flow.runtime.measure import Measure
from rapydli_flow.tuner import Choice


def test_init_is_the_state_that_fit_begins_with(data):
    step = make_step(rate=1e-300)  # too small to change a weight
    for seed in (0, 3):
        run = rf.fit(step, data["train"], steps=1, seed=seed)
        first = rf.init(step, seed=seed)
        for leaf in step.leaves("param"):
            np.testing.assert_allclose(run.state[leaf.name], first[leaf.name], rtol=0, atol=1e-290)
        assert first.keys() == run.state.keys()
    assert not same_bits(rf.init(step), rf.init(step, seed=1))
    assert rf.init(step.network).keys() < rf.init(step).keys()


def test_evaluate_is_what_a_hand_computes(step, data):
    run = rf.fit(step, data["train"], steps=10)
    test = records(13, seed=1)
    scores = rf.predict(run.graph, run.state, test["x"]).compute(scheduler="sync")
    logarithms = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    loss = -logarithms[np.arange(13), test["label"]].mean()
    accuracy = (scores.argmax(1) == test["label"]).mean()
    got = rf.evaluate(step, run.state, data["test"])
    assert got == pytest.approx({"loss": loss, "accuracy": accuracy}, rel=1e-10)
    with pytest.raises(DatasetError, match="there is no field 'label'"):
        rf.evaluate(step, run.state, rf.ingest({"x": test["x"]}, "memory://no-label.zarr"))
    with pytest.raises(SettingError, match=r"make it with rf.train_step"):
        rf.evaluate(step.network, run.state, data["test"])


def test_a_run_is_a_model(step, data, tmp_path):
    run = rf.fit(step, data["train"], steps=6, run_dir=tmp_path, snapshot_every=3)
    for path, steps in ((tmp_path, 6), (tmp_path / "snapshots", 6), (list_snapshots(tmp_path / "snapshots")[0], 3)):
        model = rf.load_model(path)
        again = rf.fit(step, data["train"], steps=steps)
        assert same_bits(model.state, {name: again.state[name] for name in model.state})
    assert repr(rf.load_model(tmp_path)).startswith("<Model: ")
    got = rf.load_model(tmp_path).predict(data["test"]).compute(scheduler="sync")
    np.testing.assert_array_equal(got, rf.predict(run.graph, run.state, data["test"]).compute(scheduler="sync"))
    with pytest.raises(SnapshotError, match="there is no snapshot here"):
        rf.load_model(tmp_path / "nothing")


def test_models_are_kept_without_optimizer_state(step, data, tmp_path):
    run = rf.fit(step, data["train"], steps=3)
    rf.save_model(tmp_path / "model", run.graph, run.state)
    model = rf.load_model(tmp_path / "model")
    assert model.state.keys() == {leaf.name for leaf in run.graph.leaves("param", "state")}
    assert same_bits(model.state, {name: run.state[name] for name in model.state})
    assert str(model.graph) == str(run.graph)
    with pytest.raises(SnapshotError, match="holds a model already"):
        rf.save_model(tmp_path / "model", run.graph, run.state)


def test_plans(step, client):
    plan = rf.plan(step, ranks=3, threads=2)
    assert (plan.ranks, plan.threads) == (3, 2)
    assert [block.shape[0] for block in plan.layouts["x"]] == [3, 3, 2]
    assert rf.plan(step).ranks == 1
    on_workers = rf.plan(step, client, ranks=2)
    assert (on_workers.ranks, on_workers.threads) == (2, 1)
    assert "collectives" in on_workers.explain(step)


TUNE = """
import rapydli_flow as rf
from rapydli_flow import nn, optim

if __name__ == "__main__":
    graph = rf.trace(lambda x: nn.dense(nn.relu(nn.dense(x, 6)), 3), rf.Spec((4, 5), "float64"))
    step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))
    lines = []
    report = rf.autotune(step, budget_s=90.0, trials=2, watch=lines.append, plan=rf.plan(step, threads=1))
    print(report)
    assert report.found, "nothing was reached"
    assert sum(bool(line.ended) for line in lines) == len(report.found)
    for found in report.found:
        assert found.best.time_s is not None
        assert found.gain > 0.5
    from rapydli_flow.runtime import tuning
    from cpu_kernels.compile import host

    assert tuning.known(host()).choices == report.tuning.choices
    assert 0 < len(report.tuning.choices) <= len(report.found)
    import numpy as np

    rng = np.random.default_rng(0)
    records = {"x": rng.normal(size=(12, 5)), "label": rng.integers(0, 3, 12)}
    tuned = rf.fit(step, records, steps=6)
    plain = rf.fit(step, records, steps=6, tuning=tuning.Tuning(host()))
    np.testing.assert_allclose(tuned.scalars["loss"], plain.scalars["loss"], rtol=1e-10)
"""


@pytest.mark.slow
def test_autotune_in_a_cache_of_its_own(tmp_path):
    script = tmp_path / "tune.py"
    script.write_text(TUNE)
    env = {**os.environ, "RAPYDLI_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(Path(rf.__file__).parents[1])}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "kernels, " in done.stdout
    assert "a step takes" in done.stdout
    assert (tmp_path / "cache" / "tuning.sqlite").stat().st_size > 0


def test_kernels_are_checked_and_timed_in_the_order_of_the_choices():
    device = host()
    graph = rf.trace(lambda x: nn.dense(nn.relu(nn.dense(x, 6)), 3), rf.Spec((4, 5), "float64"))
    requests = tuning.requests_of([graph], device)
    assert [str(request) for request in requests]
    request = next(iter(requests))
    default = tuning.Tuning(device).choose(request)
    broken = Choice("nothing_like_this")
    trials = Measure(device, threads=1)(request, [broken, default, Choice(default.template, default.config)])
    assert [trial.choice.template for trial in trials] == ["nothing_like_this", default.template, default.template]
    assert trials[0].time_s is None
    assert "nothing_like_this" in trials[0].error
    assert trials[1].time_s > 0
    assert trials[0].stage == "compile"


def test_names_are_loaded_when_they_are_used():
    program = (
        "import sys, rapydli_flow as rf\n"
        "assert not {'dask', 'distributed', 'numba'} & set(sys.modules)\n"
        "assert callable(rf.fit) and 'fit' in dir(rf)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(rf.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program], env=env, check=True)
    with pytest.raises(AttributeError, match="has no attribute 'fot'"):
        rf.fot  # noqa: B018
    assert nn.relu is rf.nn.relu


def test_a_plan_is_explained(step):
    text = many(step, 2).explain(step)
    assert "x: rank 0" in text
    assert "collectives a step" in text
