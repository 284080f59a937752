"""Finding runs again: how they stand, what they came to, and what makes two of them differ."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import small_runs
from small_runs import make_step, many

import rapydli_flow as rf
from rapydli_flow.data import latest, read_snapshot
from rapydli_flow.errors import SettingError
from rapydli_flow.runtime.events import Stepped, read_log


class At(rf.Callback):
    """Answers, or raises, at the first validation."""

    decides = True

    def __init__(self, answer):
        self.answer = answer

    def on_event(self, event):
        if type(event).__name__ == "Validated":
            if isinstance(self.answer, BaseException):
                raise self.answer
            return self.answer
        return None


@pytest.fixture(scope="module")
def kept(step, data, tmp_path_factory):
    """A folder of four runs, and the first one, live."""
    folder = tmp_path_factory.mktemp("runs")
    how = {"validation": data["test"], "steps": 14, "plan": many(step, 1)}
    first = rf.fit(step, data["train"], run_dir=folder / "done", seed=3, **how)
    rf.fit(step, data["train"], run_dir=folder / "sweep" / "stopped", callbacks=[At(rf.Stop("enough"))], **how)
    with pytest.raises(ValueError, match="mine"):
        rf.fit(step, data["train"], run_dir=folder / "failed", callbacks=[At(ValueError("mine"))], **how)
    with pytest.raises(KeyboardInterrupt):
        rf.fit(
            step, data["train"], run_dir=folder / "halted", snapshot_every=0, callbacks=[At(KeyboardInterrupt())], **how
        )
    (folder / "empty").mkdir()
    (folder / "empty" / "metrics.jsonl").write_text("")
    return folder, first


def test_how_runs_stand(kept):
    folder, first = kept
    found = rf.runs(folder)
    assert [row.name for row in found] == sorted([row.name for row in found], key=lambda n: (found[n].began, n))
    rows = {row.name: row for row in found}
    assert rows.keys() == {"done", "sweep/stopped", "failed", "halted"}
    assert {name: (row.status, row.why) for name, row in rows.items()} == {
        "done": ("done", ""),
        "sweep/stopped": ("stopped", "enough"),
        "failed": ("failed", "ValueError: mine"),
        "halted": ("interrupted", ""),
    }
    assert {name: (row.step, row.steps, row.snapshot) for name, row in rows.items()} == {
        "done": (14, 14, 14),
        "sweep/stopped": (7, 14, 7),
        "failed": (7, 14, 7),
        "halted": (7, 14, None),
    }
    done = rows["done"]
    assert done.last == first.metrics
    assert done.best["loss"] == min(event.metrics["loss"] for event in first.validation)
    assert done.best["accuracy"] == max(event.metrics["accuracy"] for event in first.validation)
    assert done.time_s > 0
    assert done.began.endswith("+00:00")
    assert done.go_on == ""
    assert rows["failed"].go_on == f"rf.fit(..., run_dir={str(folder / 'failed')!r}, resume=True) goes on from step 7"
    assert rows["halted"].go_on == "it has no snapshot to go on from"


def test_the_table_of_runs(kept):
    folder, _ = kept
    found = rf.runs(folder)
    lines = repr(found).splitlines()
    assert len(lines) == 6
    assert lines[0].split()[:3] == ["name", "status", "steps"]
    assert ["sweep/stopped", "stopped", "7", "of", "14", "loss"] in [line.split()[:6] for line in lines]
    page = found._repr_html_()
    assert page.count("<tr>") == 5
    assert "ValueError: mine" in page
    assert found[-1].name == list(found)[3].name
    assert len(found[1:]) == 3
    assert found["failed"].path == folder / "failed"
    assert [row.name for row in rf.runs(folder / "done")] == ["done"]
    with pytest.raises(SettingError, match=r"has no run 'other'; its runs: .*sweep/stopped"):
        found["other"]
    with pytest.raises(SettingError, match="nowhere is not a folder"):
        rf.runs(folder / "nowhere")
    assert repr(rf.runs(folder / "empty")) == f"no runs in {folder / 'empty'}"


def test_the_record_of_a_run_is_the_run(kept):
    folder, first = kept
    record = rf.runs(folder)["done"].record()
    assert record.scalars == first.scalars
    assert record.validation == first.validation
    assert record.metrics == first.metrics
    one, other = record.summary(), first.summary()
    assert one.records_s == pytest.approx(other.records_s)
    assert (one.outcome, one.steps, one.last, one.best) == (other.outcome, other.steps, other.last, other.best)
    assert first.compare(record).differences == {}


def test_two_runs_beside_each_other(kept, data):
    folder, first = kept
    other = make_step(0.01)
    second = rf.fit(other, data["train"], steps=7, validation=data["test"], plan=many(other, 2))
    differences = first.compare(second).differences
    one, two = differences.pop("optimizer")
    assert one.startswith("momentum(beta=0.9, ")
    assert "rate=0.05" in one
    assert one.replace("rate=0.05", "rate=0.01") == two
    assert differences.pop("plan")[1].startswith("2 ranks, 1 thread(s) each")
    assert differences == {"steps asked for": (14, 7), "ranks": (1, 2), "seed": (3, 0)}
    table = repr(first.compare(second)).splitlines()
    assert table[0].split() == ["done", "this", "run"]
    assert any(line.split() == ["outcome", "done", "done"] for line in table)
    assert any(line.startswith("best accuracy") for line in table)
    row = rf.runs(folder)["sweep/stopped"]
    page = row.compare(first)._repr_html_()
    assert "<td>stopped: enough</td><td>done</td>" in page
    assert row.compare(first).differences["seed"] == (0, 3)


def test_a_run_that_is_going_on(step, data, tmp_path):
    class Look(rf.Callback):
        status = None

        def on_event(self, event):
            if isinstance(event, Stepped) and self.status is None:
                self.status = rf.runs(tmp_path)["run"].status

    look = Look()
    rf.fit(step, data["train"], steps=3, run_dir=tmp_path / "run", callbacks=[look])
    assert look.status == "going on"


def test_a_run_whose_process_was_killed(data, tmp_path):
    here = str(Path(small_runs.__file__).parent)
    path = os.pathsep.join([here, str(Path(rf.__file__).parents[1])])
    process = subprocess.Popen(
        [sys.executable, small_runs.__file__, data.url, str(tmp_path / "run"), "200", "0"],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 240
    while time.monotonic() < limit and process.poll() is None:
        if any(line["kind"] == "saved" for line in read_log(tmp_path / "run" / "metrics.jsonl")):
            break
        time.sleep(0.02)
    assert rf.runs(tmp_path)["run"].status == "going on"
    process.kill()
    until = time.monotonic() + 10
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
        time.sleep(0.01)
    before = rf.runs(tmp_path)["run"]  # nobody has waited for the process yet
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    row = rf.runs(tmp_path)["run"]
    assert row == before
    assert (row.status, row.why) == ("unfinished", "its process is gone")
    assert row.step < 200
    assert row.time_s > 0
    assert row.snapshot == read_snapshot(latest(tmp_path / "run" / "snapshots")).step
    assert f"resume=True) goes on from step {row.snapshot}" in row.go_on
    small_runs.train(data, tmp_path / "run", 60, 0, resume=True)
    after = rf.runs(tmp_path)["run"]
    assert (after.status, after.step, after.began) == ("done", 60, row.began)
    assert after.time_s > 0


@pytest.mark.parametrize(
    ("started", "status", "why"),
    [
        ({"host": "elsewhere", "pid": 1, "born_s": 0.0}, "unfinished", "looked at from here: it was on host elsewhere"),
        ({"host": socket.gethostname(), "pid": os.getpid(), "born_s": 1.0}, "unfinished", "its process is gone"),
        ({}, "unfinished", "its log does not say where it was"),
    ],
)
def test_logs_without_an_end(tmp_path, started, status, why):
    line = {"kind": "started", "step": 0, **started}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (row,) = rf.runs(tmp_path)
    assert row.status == status
    assert why in row.why
    assert row.go_on == "it has no snapshot to go on from"
    assert (row.step, row.steps, row.last, row.best, row.time_s) == (0, None, {}, {}, 0)
    assert repr(rf.runs(tmp_path))
