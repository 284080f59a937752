"""The page on Dask's dashboard: what it shows of real runs, as a browser's connection sees it."""

import logging
import time
from dataclasses import dataclass
from urllib.request import urlopen

import numpy as np
import pytest
from bokeh.client import pull_session
from bokeh.models import ColumnDataSource
from distributed import Client, LocalCluster
from prometheus_client.parser import text_string_to_metric_families
from small_runs import many

import rapydli_flow as rf
from rapydli_flow.dashboard.history import EVENTS, RUNS, SEGMENTS, STEPS, History
from rapydli_flow.markup import size
from rapydli_flow.runtime.events import Ended, Saved, Started, Stepped, Validated
from rapydli_flow.runtime.publish import POINTS, lines, publishing
from rapydli_flow.runtime.timeline import KINDS
from rapydli_flow.scheduler import traffic
from rapydli_flow.testing.plans import NUMPY


def address(client, page="rapydli"):
    return client.dashboard_link.rsplit("/", 1)[0] + f"/{page}"


class Look:
    """A session of one who looks at the page."""

    def __init__(self, client):
        self.session = pull_session(url=address(client))

    @property
    def sources(self):
        figures = self.session.document.get_model_by_name("figures")
        return {s.name: s.data for s in figures.select({"type": ColumnDataSource}) if s.name}

    def text(self, name):
        return self.session.document.get_model_by_name(name).text

    def close(self):
        self.session.close()


@pytest.fixture
def look():
    """Sessions that are closed when the test is over."""
    opened = []

    def open_(client):
        opened.append(Look(client))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


@pytest.mark.parametrize("granularity", ["segment", "stage", "op"])
def test_the_page_holds_the_numbers_of_a_run(client, step, data, look, tmp_path, granularity):
    run = rf.fit(
        step,
        data["train"],
        validation=data["test"],
        steps=4,
        client=client,
        plan=many(step, 2),
        granularity=granularity,
        run_dir=tmp_path / f"run <{granularity}>",
    )
    page = look(client)
    for name, values in run.scalars.items():
        np.testing.assert_array_equal(page.sources[f"training {name}"]["raw"], values)
        np.testing.assert_array_equal(page.sources[f"training {name}"]["step"], range(4))
        np.testing.assert_array_equal(page.sources[f"validation {name}"]["value"], [run.metrics[name]])
    assert (page.sources["speed"]["speed"] > 0).all()
    header = page.text("header")
    for words in (f"run &lt;{granularity}&gt;", ">done<", "4 of 4 steps", "2 ranks", "1 thread each"):
        assert words in header
    assert "validation accuracy" in page.text("tiles")
    assert "snapshots/step-00000004" in page.text("events")
    assert "2 ranks" in page.text("plan")
    assert ("stage" if granularity == "stage" else "conv") in page.text("ops")
    if granularity == "segment":
        assert page.text("memory").count("plan ") == 3  # of two ranks, and in the words above
        assert "rank 1" in page.text("memory")
        assert (page.sources["time"]["wait"] <= page.sources["time"]["all"]).all()
    else:
        assert "time" not in page.sources  # batches are read by tasks: nobody waits inside of a step
        assert page.text("memory").count("<tr") == 3  # all workers


def test_the_page_follows_a_run(client, step, data, look):
    seen = []

    class Watch(rf.Callback):
        def on_event(self, event):
            if isinstance(event, Validated) and not seen:
                page = look(client)
                limit = time.monotonic() + 30
                while "validation loss" not in page.sources and time.monotonic() < limit:
                    time.sleep(0.1)
                    page.session.pull()
                seen.append((page.text("header"), dict(page.sources)))

    run = rf.fit(
        step, data["train"], validation=data["test"], epochs=2, client=client, plan=many(step, 2), callbacks=[Watch()]
    )
    ((header, sources),) = seen
    assert ">running<" in header
    assert "of 14 steps" in header
    known = len(sources["training loss"]["raw"])
    np.testing.assert_array_equal(sources["training loss"]["raw"], run.scalars["loss"][:known])
    assert sources["validation loss"]["value"][0] == run.validation[0].metrics["loss"]


def test_ranks_are_shown_side_by_side_with_what_they_send(client, step, data, look):
    plan = rf.plan(step, ranks=2, threads=1)
    run = rf.fit(step, data["train"], steps=20, client=client, plan=plan)
    page = look(client)
    shown = page.text("ranks")
    end_s = max(spans[-1].end_s for spans in run.segments[-1].timeline)
    assert f"<i>{1e3 * end_s:.3g} ms</i>" in shown  # the newest step, however short the run was
    assert shown.count('class="lane"') == 2
    for kind in KINDS:
        assert f'<td class="{kind}">{kind}</td>' in shown
        assert f'title="{kind}: ' in shown
    sent = traffic(plan.programs(step, NUMPY))
    assert sent[0][1] > 0
    assert [row.count(size(sent[0][1])) for row in page.text("links").split("<tr>")[2:]] == [2, 2]  # and together


def test_prometheus_is_told_of_runs(client, step, data, tmp_path):
    how = {"client": client, "plan": many(step, 2), "validation": data["test"], "run_dir": tmp_path / "told"}
    run = rf.fit(step, data["train"], steps=20, snapshot_every=10, **how)
    with urlopen(address(client, "metrics"), timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [sample for family in families for sample in family.samples if sample.labels.get("name") == "told"]
    found = {(s.name, *(v for k, v in s.labels.items() if k not in ("run", "name"))): s.value for s in samples}
    assert found["rapydli_run_steps",] == found["rapydli_run_planned_steps",] == 20
    assert found["rapydli_run_going",] == 0
    assert found["rapydli_run_training", "loss"] == run.scalars["loss"][-1]
    assert found["rapydli_run_validation", "loss"] == run.validation[-1].metrics["loss"]
    assert found["rapydli_run_snapshots_total",] == 2
    assert found["rapydli_run_recoveries_total",] == 0
    assert found["rapydli_run_records_per_second",] == pytest.approx(8 / found["rapydli_run_step_seconds",])
    assert {key[1:] for key in found if key[0] == "rapydli_run_rank_seconds"} == {
        (kind, rank) for rank in "01" for kind in KINDS
    }
    assert found["rapydli_run_sent_bytes", "0"] == sum(traffic(how["plan"].programs(step, NUMPY))[0])


def test_runs_can_be_chosen(client, step, data, look, tmp_path):
    for name in ("first", "second"):
        rf.fit(step, data["train"], steps=2, client=client, plan=many(step, 2), run_dir=tmp_path / name)
    page = look(client)
    choice = page.session.document.get_model_by_name("run")
    assert "<h1>second " in page.text("header")
    assert [label.split(" ")[0] for _, label in choice.options[:3]] == ["newest", "second", "first"]
    choice.value = choice.options[2][0]
    page.session.force_roundtrip()
    page.session.pull()
    assert "<h1>first " in page.text("header")


def test_a_run_that_fails_says_why(client, step, data, look):
    class Bad(rf.Callback):
        def on_event(self, event):
            if isinstance(event, Stepped):
                raise ValueError("no <more>")

    with pytest.raises(ValueError, match="no <more>"):
        rf.fit(step, data["train"], steps=30, client=client, plan=many(step, 2), callbacks=[Bad()])
    page = look(client)
    assert ">failed<" in page.text("header")
    assert "ValueError: no &lt;more&gt;" in page.text("header")


def test_the_page_is_in_the_navigation_of_the_others(client):
    (callback,) = publishing(client, "", [], sent_bytes=(), addresses=(), granularity="segment")
    assert callback.client is client
    for page in ("status", "rapydli"):
        with urlopen(address(client, page)) as answer:
            text = answer.read().decode()
        assert text.count('<a href="rapydli">Rapydli</a>') == 1


def test_runs_of_a_client_that_is_gone(client, look):
    with Client(client.scheduler.address, set_as_default=False) as other:
        (callback,) = publishing(other, "left", [], sent_bytes=(), addresses=(), granularity="segment")
        callback.on_event(Started(0, 9, 9, 1, 1, 1, "segment"))
        assert callback.sent.wait(30)
        assert ">running<" in look(client).text("header")
    limit = time.monotonic() + 30
    while ">failed<" not in (header := look(client).text("header")) and time.monotonic() < limit:
        time.sleep(0.1)
    assert "the client of this run left the cluster" in header


def test_a_cluster_without_a_dashboard(step, data, caplog):
    with (
        caplog.at_level(logging.INFO),
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=False,
            protocol="tcp",
            dashboard_address=":0",
            scheduler_kwargs={"dashboard": False},
            silence_logs=False,
        ) as cluster,
        Client(cluster) as client,
    ):
        run = rf.fit(step, data["train"], steps=2, client=client)
    assert len(run.scalars["loss"]) == 2
    assert "no pages of rapydli_flow on this scheduler: it runs without a dashboard" in caplog.text


def test_without_a_client_nothing_is_told():
    assert publishing(None, "", [], sent_bytes=(), addresses=(), granularity="segment") == ()


# what is told, and what is kept of it -------------------------------------------------------------------


@dataclass(frozen=True)
class Cooled:
    """An event of a kind that is not known here."""

    step: int
    rate: float
    where: tuple[int, ...] = (1, 2)


def test_of_a_long_segment_some_steps_are_told():
    told = lines(Stepped(100, 1000, {"loss": tuple(map(float, range(1000)))}, 0.5, 0.1, {"conv": 0.2}))
    assert len(told) <= POINTS + 1
    assert told[-2] == {"kind": "step", "step": 1099, "loss": 999.0}
    assert told[-1] == {
        "kind": "segment",
        "step": 100,
        "steps": 1000,
        "time_s": 0.5,
        "feed_s": 0.1,
        "ops": {"conv": 0.2},
    }
    assert [line["step"] for line in lines(Stepped(3, 2, {"loss": (1.0, 2.0)}, 0.5, 0.1))[:-1]] == [3, 4]


def test_events_of_all_kinds_are_told():
    assert lines(Saved(15, "best")) == [{"kind": "saved", "step": 14, "name": "best"}]
    assert lines(Validated(15, 2, {"loss": 1.0})) == [{"kind": "validated", "step": 14, "epoch": 2, "loss": 1.0}]
    assert lines(Ended(15, 2.0)) == [{"kind": "ended", "step": 15, "time_s": 2.0, "outcome": "done"}]
    assert lines(Cooled(4, 0.1)) == [{"kind": "cooled", "step": 4, "rate": 0.1}]
    assert lines(Started(0, 9, 9, 1, 1, 1, "op"))[0]["granularity"] == "op"


def message(run, *told, **about):
    return {"run": run, "begun": 0.0, "client": "c", **about, "lines": list(told)}


def test_the_history_is_bounded_and_whole():
    history = History()
    events = [lines(Validated(i, i, {"loss": 0.5}))[0] for i in range(EVENTS + 50)]
    history.hear(message("a", *lines(Started(0, 9000, 9, 1, 1, 1, "segment")), *events))
    for first in range(0, 9000, 10):
        history.hear({"run": "a", "lines": lines(Stepped(first, 10, {"loss": (float(first),) * 10}, 0.5, 0.1))})
    run = history.newest
    assert STEPS // 2 <= len(run.steps) <= STEPS
    assert SEGMENTS // 2 <= len(run.segments) <= SEGMENTS
    assert len(run.events) == EVENTS
    numbers = run.numbers()
    assert (numbers.steps, numbers.outcome) == (9000, "running")
    assert numbers.started["steps"] == 9000
    steps = numbers.train["loss"].step
    assert steps[0] < 100
    assert steps[-1] == 8999
    assert (np.diff(steps) > 0).all()


def test_the_oldest_runs_are_forgotten():
    history = History()
    for i in range(RUNS + 2):
        history.hear(message(f"run{i}", {"kind": "started"}))
    assert len(history.runs) == RUNS
    assert history.newest.key == f"run{RUNS + 1}"
    history.hear({"run": "run0", "lines": [{"kind": "ended"}]})  # still sends, but is forgotten
    assert "run0" not in history.runs
    history.leave("c")
    assert all(run.over for run in history.runs.values())
