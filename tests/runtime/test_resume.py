"""Runs that are killed, and go on: nothing lost but the steps since the last snapshot, and to the same bits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small_runs
from small_runs import SNAPSHOT_EVERY, Once, deviation, make_step, many, same_bits

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.data import latest, list_snapshots, read_snapshot
from rapydli_flow.errors import RunLost, SettingError, SnapshotError
from rapydli_flow.graph import precision_of
from rapydli_flow.runtime.events import read_log
from rapydli_flow.runtime.workers import ready_workers

STEPS = 200


def killed(data, run_dir, workers):
    """A training process that got SIGKILL between two snapshots, some time after step 40."""
    here = str(Path(small_runs.__file__).parent)
    path = os.pathsep.join([here, str(Path(rf.__file__).parents[1])])
    process = subprocess.Popen(
        [sys.executable, small_runs.__file__, data.url, str(run_dir), str(STEPS), str(workers)],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        steps = [line["step"] for line in read_log(run_dir / "metrics.jsonl") if line["kind"] == "step"]
        if steps and steps[-1] > 40 and (steps[-1] + 1) % SNAPSHOT_EVERY:
            break
        time.sleep(0.02)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def logged_steps(run_dir, name="loss"):
    lines = [line for line in read_log(run_dir / "metrics.jsonl") if line["kind"] == "step"]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line[name] for line in lines]


@pytest.fixture(scope="module")
def whole(step, data):
    """The run that nobody kills, by ranks."""
    return {n: rf.fit(step, data["train"], steps=STEPS, seed=3, plan=many(step, n)) for n in (1, 2, 3)}


def test_a_killed_process_goes_on_to_the_same_bits(data, step, whole, tmp_path):
    run_dir = tmp_path / "run"
    killed(data, run_dir, workers=0)
    left = latest(run_dir / "snapshots")
    assert left is not None
    assert 30 <= read_snapshot(left).step < STEPS
    run = small_runs.train(data, run_dir, STEPS, 0, resume=True)
    assert same_bits(run.state, whole[1].state)
    assert logged_steps(run_dir) == whole[1].scalars["loss"]
    lines = read_log(run_dir / "metrics.jsonl")
    assert [line["kind"] for line in lines if line["kind"] in ("started", "ended")] == ["started", "started", "ended"]
    assert [line["epoch"] for line in lines if line["kind"] == "validated"] == list(range(1, 30))
    assert lines[-1]["outcome"] == "done"


@pytest.mark.slow
def test_a_killed_client_of_a_cluster_goes_on_to_the_same_bits(data, step, whole, tmp_path):
    run_dir = tmp_path / "run"
    killed(data, run_dir, workers=2)
    pids = (tmp_path / "workers").read_text().split()
    assert len(pids) == 2
    limit = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(map(alive, pids))  # workers do not outlive the client that made them
    run = small_runs.train(data, run_dir, STEPS, 2, resume=True)
    assert same_bits(run.state, whole[2].state)
    assert logged_steps(run_dir) == whole[2].scalars["loss"]


@pytest.mark.parametrize("ranks", [1, 3])
def test_other_ranks_go_on_up_to_rounding(data, step, whole, tmp_path, ranks):
    how = {"run_dir": tmp_path / "run", "seed": 3, "snapshot_every": 50}
    rf.fit(step, data["train"], steps=100, plan=many(step, 2), **how)
    run = rf.fit(step, data["train"], steps=STEPS, plan=many(step, ranks), resume=True, **how)
    assert deviation(run.state, whole[2].state) < 1e-10
    assert len(run.scalars["loss"]) == 100
    assert logged_steps(tmp_path / "run")[:100] == whole[2].scalars["loss"][:100]


def test_a_run_goes_on_with_the_ranks_and_threads_that_it_had(data, step, whole, client, tmp_path):
    how = {"run_dir": tmp_path / "run", "seed": 3, "snapshot_every": 60}
    rf.fit(step, data["train"], steps=60, plan=many(step, 2), client=client, **how)
    local = rf.fit(step, data["train"], steps=120, resume=True, **how)
    assert read_snapshot(latest(tmp_path / "run" / "snapshots")).meta["plan"]["ranks"] == 2
    run = rf.fit(step, data["train"], steps=STEPS, resume=True, client=client, **how)
    assert local.scalars["loss"] == whole[2].scalars["loss"][60:120]
    assert same_bits(run.state, whole[2].state)


@pytest.mark.parametrize("granularity", ["stage", "op"])
def test_a_run_goes_on_at_another_granularity(data, step, whole, tmp_path, granularity):
    how = {"run_dir": tmp_path / "run", "seed": 3, "plan": many(step, 2)}
    rf.fit(step, data["train"], steps=6, granularity=granularity, **how)
    run = rf.fit(step, data["train"], steps=12, resume=True, **how)
    assert run.scalars["loss"] == whole[2].scalars["loss"][6:12]


def test_what_cannot_be_resumed(data, step, tmp_path):
    train, run_dir = data["train"], tmp_path / "run"
    with pytest.raises(SettingError, match="resume needs the run_dir"):
        rf.fit(step, train, steps=4, resume=True)
    with pytest.raises(SnapshotError, match=r"no complete snapshot in .*run/snapshots to resume from"):
        rf.fit(step, train, steps=4, resume=True, run_dir=run_dir)
    first = rf.fit(step, train, steps=4, run_dir=run_dir)
    with pytest.raises(SnapshotError, match="step-00000004 is of another training step; resume with the graph that"):
        rf.fit(make_step(0.01), train, steps=8, resume=True, run_dir=run_dir)
    with pytest.raises(SettingError, match="is at step 4 already; ask for more"):
        rf.fit(step, train, steps=4, resume=True, run_dir=run_dir)
    with pytest.raises(SnapshotError, match="was begun with seed=0, not 9; resume with the same"):
        rf.fit(step, train, steps=8, seed=9, resume=True, run_dir=run_dir)
    with pytest.raises(SettingError, match=r"holds a run already. Use resume=True, overwrite=True or another run_dir"):
        rf.fit(step, train, steps=4, run_dir=run_dir)
    assert len(logged_steps(run_dir)) == 4  # all of them left the run as it was
    assert same_bits(rf.load_model(run_dir).state, {k: first.state[k] for k in rf.load_model(run_dir).state})
    second = rf.fit(step, train, steps=2, seed=9, run_dir=run_dir, overwrite=True)
    assert [path.name for path in list_snapshots(run_dir / "snapshots")] == ["step-00000002"]
    assert logged_steps(run_dir) == second.scalars["loss"]


@pytest.mark.filterwarnings("ignore:NumPy computes with")
@pytest.mark.parametrize(("had", "asked"), [("float32", "bfloat16"), ("bfloat16", "float16"), ("tf32", "float32")])
def test_a_run_of_another_precision_cannot_be_resumed(tmp_path, had, asked):
    graph = rf.trace(lambda x: nn.dense(nn.relu(nn.dense(x, 8)), 3), rf.Spec((4, 6)))
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(8, 6)).astype(np.float32), "label": rng.integers(0, 3, 8)}
    how = {"loss": nn.cross_entropy, "optimizer": optim.sgd(0.1)}
    steps = {name: rf.train_step(graph, precision=name, **how) for name in (had, asked)}
    assert [precision_of(step) for step in steps.values()] == [had, asked]
    rf.fit(steps[had], data, steps=2, run_dir=tmp_path)
    words = rf"step-00000002 is of a training step with precision='{had}' but this one has precision='{asked}'; resume"
    with pytest.raises(SnapshotError, match=words):
        rf.fit(steps[asked], data, steps=4, run_dir=tmp_path, resume=True)
    assert rf.fit(steps[had], data, steps=4, run_dir=tmp_path, resume=True).steps == 4


def test_snapshots_may_be_left_out(data, step, tmp_path):
    rf.fit(step, data["train"], steps=9, run_dir=tmp_path, snapshot_every=0)
    assert not (tmp_path / "snapshots").exists()
    assert len(logged_steps(tmp_path)) == 9


# losing workers -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("transport", "victim"), [("shared", 1), ("shared", 0), ("comm", 1)])
def test_a_killed_worker_is_named_and_the_run_goes_on(mortal, data, step, whole, tmp_path, transport, victim):
    address = sorted(ready_workers(mortal, 3, 60.0))[:2][victim]
    pid = mortal.run(os.getpid)[address]
    death = Once(40, lambda: os.kill(pid, signal.SIGKILL))
    how = {
        "run_dir": tmp_path / "run",
        "seed": 3,
        "snapshot_every": 10,
        "transport": transport,
        "client": mortal,
        "retries": 0,
    }
    with pytest.raises(RunLost, match=rf"rank {victim} is lost: its worker {address} left the cluster.*resume=True"):
        rf.fit(step, data["train"], steps=5000, plan=many(step, 2), callbacks=[death], **how)
    assert time.monotonic() - death.at < 10
    snapshots = list_snapshots(tmp_path / "run" / "snapshots")
    assert 1 <= len(snapshots) <= 3
    assert all(read_snapshot(path).step % 10 == 0 for path in snapshots)
    reached = read_snapshot(snapshots[-1]).step
    assert reached >= 40
    assert read_log(tmp_path / "run" / "metrics.jsonl")[-1]["outcome"].startswith("RunLost: rank")
    run = rf.fit(step, data["train"], steps=reached + 20, resume=True, **how)
    unbroken = rf.fit(step, data["train"], steps=reached + 20, seed=3, plan=many(step, 2))
    assert same_bits(run.state, unbroken.state)
    assert logged_steps(tmp_path / "run") == unbroken.scalars["loss"]


def test_a_worker_that_stands_still_is_noticed(mortal, data, step, tmp_path):
    addresses = sorted(ready_workers(mortal, 3, 60.0))[:2]
    pid = mortal.run(os.getpid)[addresses[1]]
    halt = Once(20, lambda: os.kill(pid, signal.SIGSTOP))
    try:
        with pytest.raises(RunLost, match=r"rank 1 (is lost: its worker .* has not answered|did not come to)"):
            rf.fit(
                step,
                data["train"],
                steps=5000,
                plan=many(step, 2),
                client=mortal,
                callbacks=[halt],
                timeout_s=3,
                retries=0,
                run_dir=tmp_path,
                snapshot_every=10,
            )
        assert time.monotonic() - halt.at < 25
    finally:
        os.kill(pid, signal.SIGCONT)
    assert read_snapshot(latest(tmp_path / "snapshots")).step >= 20
    ready_workers(mortal, 3, 60.0)
    assert rf.fit(step, data["train"], steps=5, client=mortal).steps == 5
