"""What cannot be trained: one clear error, nothing lost, and a cluster that trains the next run."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from small_runs import BATCH, make_step, many, records, same_bits

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow import nn, optim
from rapydli_flow.data import latest, list_snapshots, read_snapshot
from rapydli_flow.errors import (
    CorruptChunk,
    DatasetError,
    DatasetNotFound,
    NonFinite,
    NoWorkers,
    SettingError,
    ShapeError,
    TooLittleMemory,
    VersionMismatch,
)
from rapydli_flow.runtime.events import Ended, Saved, Started, Stepped, read_log
from rapydli_flow.testing.plans import programs
from rapydli_flow.tuner import Tuning

RANKS = ["process", "threads", "cluster"]


@pytest.fixture
def where(request, step):
    """Options of fit: one rank here, two threads, or two workers of a cluster that must stay usable."""
    if request.param == "process":
        return {"plan": many(step, 1)}
    if request.param == "threads":
        return {"plan": many(step, 2)}
    return {"plan": many(step, 2), "client": request.getfixturevalue("usable")}


# the dataset --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": np.zeros((20, 5, 6, 2))}, r"records of 'x' are f64\[5,6,2\] but the network takes f64\[6,6,2\]"),
        ({"x": np.zeros((20, 6, 6, 2), complex)}, "complex128"),
        ({"label": np.zeros(20)}, "records of 'label' are float64, which does not become int64 without loss"),
        ({"label": np.zeros((20, 1), int)}, r"records of 'label' are i64\[1\] but the network takes i64\[\]"),
        ({"label": None}, "there is no field 'label'; the network is fed 'label' but the dataset has x"),
        ({"x": None, "label": None}, "no arrays|no records|nothing|empty|field"),
        ({"x": np.zeros((0, 6, 6, 2)), "label": np.zeros(0, int)}, "no record|empty"),
        ({"label": np.zeros(19, int)}, "19"),
    ],
)
@pytest.mark.parametrize("role", ["train", "validation"])
def test_records_that_do_not_fit(step, data, change, text, role):
    wrong = {k: v for k, v in {**records(20), **change}.items() if v is not None}
    parts = {"data": data["train"], "validation": wrong} if role == "validation" else {"data": wrong}
    with pytest.raises((DatasetError, TypeError), match=text):
        rf.fit(step, **parts, steps=1)


def test_a_batch_that_does_not_fill(step):
    with pytest.raises(DatasetError, match=f"7 records are fewer than one batch of {BATCH}. Choose a smaller batch"):
        rf.fit(step, records(7), steps=1)


def test_a_dataset_that_is_not_there(step, tmp_path):
    with pytest.raises(DatasetNotFound, match=re.escape(str(tmp_path / "nothing.zarr"))):
        rf.load(tmp_path / "nothing.zarr")


def test_a_group_of_splits_is_not_records(step, data):
    with pytest.raises(
        DatasetError, match=r'splits \(test, train\) and no records of its own. Choose one: data\["test"'
    ):
        rf.fit(step, data, steps=1)


@pytest.mark.parametrize("where", RANKS, indirect=True)
def test_a_label_out_of_range_in_training(step, where, tmp_path):
    wrong = records(40)
    wrong["label"][29] = 5
    with pytest.raises(DatasetError, match=r"label 5 at record 29 of 'label' is outside 0\.\.4 \(5 classes\)"):
        rf.fit(step, wrong, steps=5, shuffle=False, run_dir=tmp_path, snapshot_every=1, **where)
    kept = read_snapshot(latest(tmp_path / "snapshots"))
    assert kept.step == 3  # record 29 is in the fourth batch
    rf.fit(step, records(40), steps=5, shuffle=False, run_dir=tmp_path, resume=True, **where)


@pytest.mark.parametrize("where", RANKS, indirect=True)
def test_a_label_out_of_range_in_validation(step, data, where):
    wrong = records(13)
    wrong["label"][11] = -1
    with pytest.raises(DatasetError, match=r"label -1 at record 11 of 'label' is outside 0\.\.4"):
        rf.fit(step, data["train"], validation=wrong, steps=3, **where)


def test_a_label_of_a_part_is_named_by_its_record(step, tmp_path):
    wrong = records(40)
    wrong["label"][29] = 9
    part = rf.ingest(wrong, tmp_path / "d.zarr")[20:40]
    with pytest.raises(DatasetError, match="label 9 at record 29"):
        rf.fit(step, part, steps=2)
    with pytest.raises(DatasetError, match="label 9 at record 29"):
        rf.evaluate(step, rf.init(step), part)


@pytest.mark.parametrize("where", RANKS, indirect=True)
def test_a_chunk_that_breaks_in_the_middle(step, where, tmp_path):
    kept = rf.ingest(records(80), tmp_path / "d.zarr", chunk_records=BATCH)
    chunk = tmp_path / "d.zarr" / "x" / "c" / "5" / "0" / "0" / "0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2])
    how = {"steps": 10, "shuffle": False, "run_dir": tmp_path / "run", "snapshot_every": 2, **where}
    with pytest.raises(CorruptChunk, match=r"chunk c/5/0/0/0 of array 'x' \(records 40\.\.47\) cannot be decoded"):
        rf.fit(step, kept, **how)
    assert read_snapshot(latest(tmp_path / "run" / "snapshots")).step == 4
    chunk.write_bytes(whole)
    run = rf.fit(step, kept, resume=True, **how)
    unbroken = rf.fit(step, kept, **{**how, "run_dir": None, "snapshot_every": None})
    assert same_bits(run.state, unbroken.state)


# numbers ------------------------------------------------------------------------------------------------


def exploding():
    """Learns well for five steps, then its weights become 1e200."""
    return make_step(optim.step_decay(0.05, factor=1e200, every=5))


@pytest.mark.parametrize("granularity", ["segment", "stage", "op"])
@pytest.mark.parametrize("where", RANKS, indirect=True)
def test_a_loss_that_is_not_finite(data, where, granularity, tmp_path):
    step = exploding()
    how = {"run_dir": tmp_path / "run", "snapshot_every": 2, "granularity": granularity, **where}
    with pytest.raises(NonFinite, match=r"loss is (nan|inf) at step \d+\. The first output that is not finite") as e:
        rf.fit(step, data["train"], steps=60, **how)
    name = re.search(r"is of (\S+) ", str(e.value)).group(1)
    assert name in {node.name for graph in where["plan"].rank_graphs(step) for node in graph}
    assert "Use a smaller learning rate" in str(e.value)
    for path in list_snapshots(tmp_path / "run" / "snapshots"):
        kept = read_snapshot(path)
        assert all(np.isfinite(value).all() for value in kept.arrays.values())
    assert kept.step >= 4
    assert read_log(tmp_path / "run" / "metrics.jsonl")[-1]["outcome"].startswith("NonFinite: loss is")


def test_the_first_node_is_the_same_wherever_it_runs(client, data):
    step = exploding()
    texts = set()
    for ranks, client_ in ((1, None), (2, None), (2, client), (1, client)):
        with pytest.raises(NonFinite) as e:
            rf.fit(step, data["train"], steps=60, plan=many(step, ranks), client=client_)
        texts.add(re.sub(r"\d,6,6|\[\d,", "", str(e.value)))
    assert len({re.search(r"at step (\d+)\. Use", text).group(1) for text in texts}) == 1
    assert len({re.search(r"is of (\S+)/", text).group(1) for text in texts}) == 1


@pytest.mark.parametrize("where", RANKS, indirect=True)
def test_parameters_that_the_last_step_breaks(data, where, tmp_path):
    step = make_step(optim.step_decay(1e3, factor=1e305, every=3))
    with pytest.raises(NonFinite, match="not finite"):
        rf.fit(step, data["train"], steps=4, run_dir=tmp_path, snapshot_every=3, **where)
    assert [path.name for path in list_snapshots(tmp_path / "snapshots")] == ["step-00000003"]


# the cluster --------------------------------------------------------------------------------------------


def wide(units):
    return rf.train_step(
        rf.trace(lambda x: nn.dense(nn.dense(x, units), 3), rf.Spec((4, units))),
        loss=nn.cross_entropy,
        optimizer=optim.sgd(0.1),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_too_little_memory_is_told_before_any_is_taken(usable, tmp_path, workers):
    step = wide(300_000)  # 360 GB of weights
    narrow = {"x": np.zeros((8, 300_000), np.float32), "label": np.zeros(8, int)}
    how = {"plan": many(step, max(1, workers)), "client": usable if workers else None}
    with pytest.raises(TooLittleMemory, match=r"needs [\d,]+ bytes for its arena but [\d,]+ are free") as e:
        rf.fit(step, narrow, steps=1, run_dir=tmp_path / "run", **how)
    assert "dense_1/w f32[300000,300000]" in str(e.value)
    assert "360,000,000,000" in str(e.value)


def test_too_little_memory_does_not_replace_a_run(step, data, tmp_path):
    rf.fit(step, data["train"], steps=2, run_dir=tmp_path)
    narrow = {"x": np.zeros((8, 300_000), np.float32), "label": np.zeros(8, int)}
    with pytest.raises(TooLittleMemory):
        rf.fit(wide(300_000), narrow, steps=1, run_dir=tmp_path, overwrite=True)
    assert latest(tmp_path / "snapshots") is not None
    assert [line["kind"] for line in read_log(tmp_path / "metrics.jsonl")][-1] == "ended"


def test_ranks_of_this_process_share_its_memory(step, data, monkeypatch):
    """Each of two ranks would fit alone. The machine's own memory would have to be filled to see it."""
    needs = sum(program.arena_bytes for program in programs(step, many(step, 2), Tuning(host())))
    how = {"steps": 1, "plan": many(step, 2), "tuning": Tuning(host())}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needs))
    rf.fit(step, data["train"], **how)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needs - 1))
    with pytest.raises(TooLittleMemory, match=r"rank 1 needs [\d,]+ bytes .* are free in this process: 1 are missing"):
        rf.fit(step, data["train"], **how)


def test_a_plan_for_another_network(step, data):
    graph = rf.trace(lambda x: nn.dense(x, 5), rf.Spec((BATCH + 1, 6, 6, 2), "float64"))
    other = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))
    with pytest.raises(ShapeError, match=r"the layout of x is for \(9, 6, 6, 2\), but it is f64\[8,6,6,2\]"):
        rf.fit(step, data["train"], steps=1, plan=many(other, 2))
    with pytest.raises(ShapeError, match=r"plan: no layer is named 'conv_1/conv_1'\."):
        rf.fit(other, records(18), steps=1, plan=rf.plan(step, ranks=2, strategy="filters"))
    shards = rf.plan(step, ranks=2, shard="state").layouts
    momentum = {name: layout for name, layout in shards.items() if name.endswith("momentum")}
    with pytest.raises(ShapeError, match=r"plan: it says where '\S+/momentum' lies, but this graph has no such leaf\."):
        rf.fit(other, records(18), steps=1, plan=rf.Plan(2, layouts=momentum))


def test_more_ranks_than_records(step):
    with pytest.raises(ShapeError, match=r"x has 8 records for 9 ranks\. Use a larger batch or fewer ranks"):
        rf.plan(step, ranks=9)


def test_workers_that_do_not_come(usable, step, data, tmp_path):
    rf.fit(step, data["train"], steps=2, run_dir=tmp_path)
    with pytest.raises(NoWorkers, match=r"the plan needs 4 worker\(s\) but the cluster has 3 after 0\.5 s. Start more"):
        rf.fit(
            step,
            data["train"],
            steps=1,
            client=usable,
            plan=many(step, 4),
            timeout_s=0.5,
            run_dir=tmp_path,
            overwrite=True,
        )
    assert latest(tmp_path / "snapshots") is not None


def set_version(version):
    from rapydli_flow.runtime import worker

    worker.__version__ = version


def test_a_worker_with_another_version(usable, step, data):
    address = min(usable.scheduler_info()["workers"])
    usable.run(set_version, "0.0.9", workers=[address])
    try:
        with pytest.raises(VersionMismatch, match=rf"worker {address} runs rapydli_flow 0\.0\.9 but this client runs"):
            rf.fit(step, data["train"], steps=1, client=usable)
    finally:
        usable.run(set_version, rf.__version__, workers=[address])


# the caller ---------------------------------------------------------------------------------------------


class Raises(rf.Callback):
    """Raises at the first event of a kind after a step; remembers all events."""

    def __init__(self, kind, error, step=0):
        self.kind, self.error, self.step, self.seen = kind, error, step, []

    def on_event(self, event):
        self.seen.append(event)
        if isinstance(event, self.kind) and getattr(event, "first", self.step) >= self.step:
            raise self.error


@pytest.mark.parametrize("kind", [Started, Stepped, Saved])
@pytest.mark.parametrize("where", RANKS, indirect=True)
def test_a_callback_that_raises(step, data, where, kind, tmp_path):
    bad = Raises(kind, ValueError("enough"), 10)
    how = {"run_dir": tmp_path, "snapshot_every": 5, **where}
    with pytest.raises(ValueError, match="enough"):
        rf.fit(step, data["train"], steps=5000, callbacks=[bad], **how)
    assert isinstance(bad.seen[-1], Ended)
    assert bad.seen[-1].outcome == "ValueError: enough"
    assert read_log(tmp_path / "metrics.jsonl")[-1]["outcome"] == "ValueError: enough"
    for path in list_snapshots(tmp_path / "snapshots"):
        read_snapshot(path)
    rf.fit(step, data["train"], steps=3, overwrite=True, **how)


@pytest.mark.parametrize("where", RANKS, indirect=True)
def test_an_interrupt(step, data, where, tmp_path):
    bad = Raises(Stepped, KeyboardInterrupt(), 20)
    with pytest.raises(KeyboardInterrupt):
        rf.fit(step, data["train"], steps=5000, callbacks=[bad], run_dir=tmp_path, snapshot_every=10, **where)
    assert bad.seen[-1].outcome == "interrupted"
    reached = read_snapshot(latest(tmp_path / "snapshots")).step
    assert reached >= 20
    run = rf.fit(step, data["train"], steps=reached + 5, run_dir=tmp_path, resume=True, **where)
    assert same_bits(run.state, rf.fit(step, data["train"], steps=reached + 5, **where).state)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": 1, "granularity": "atom"}, "granularity='atom' is not one of segment, stage, op"),
        ({}, "give either epochs or steps"),
        ({"steps": 1, "epochs": 1}, "give either epochs or steps"),
        ({"steps": 0}, "0 steps are nothing to train"),
        ({"epochs": 0.01}, "0 steps are nothing to train"),
        ({"steps": -3}, "-3 steps are nothing to train"),
        ({"steps": 1, "snapshot_every": -1, "run_dir": "unused"}, "snapshot_every=-1 is not 0"),
        ({"steps": 1, "transport": "pigeon"}, "transport='pigeon' is not one of auto, shared, comm"),
        ({"steps": 1, "resume": True}, "resume needs the run_dir"),
        ({"steps": 1, "keep": 0, "run_dir": "unused"}, "keep=0"),
        ({"steps": True}, "steps=True is not a number"),
        ({"epochs": True}, "epochs=True is not a number"),
        ({"steps": 1, "keep": True, "run_dir": "unused"}, "keep=True is not a number"),
    ],
)
def test_options_that_mean_nothing(step, data, options, text, tmp_path):
    if "run_dir" in options:
        options = {**options, "run_dir": tmp_path / "run"}
    with pytest.raises(SettingError, match=text):
        rf.fit(step, data["train"], **options)
    assert not (tmp_path / "run" / "snapshots").exists()


def test_a_network_alone_is_not_trained(step, data):
    with pytest.raises(SettingError, match=r"not a training step; make one with rf\.train_step"):
        rf.fit(step.network, data["train"], steps=1)


def test_a_run_dir_that_is_a_file(step, data, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match="file"):
        rf.fit(step, data["train"], steps=1, run_dir=file)


def test_snapshots_that_were_damaged(step, data, tmp_path):
    rf.fit(step, data["train"], steps=4, run_dir=tmp_path, snapshot_every=2)
    newest = latest(tmp_path / "snapshots")
    chunk = next(path for path in sorted((newest / "arrays").rglob("c.*")) if path.stat().st_size)
    chunk.write_bytes(b"\1" + chunk.read_bytes()[1:])
    with pytest.raises(OSError, match="has changed since it was written"):
        rf.fit(step, data["train"], steps=6, run_dir=tmp_path, resume=True)
    shutil.rmtree(newest)
    run = rf.fit(step, data["train"], steps=6, run_dir=tmp_path, resume=True)
    assert same_bits(run.state, rf.fit(step, data["train"], steps=6).state)
    assert Path(tmp_path / "snapshots" / "step-00000006").is_dir()
