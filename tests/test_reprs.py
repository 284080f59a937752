"""What notebooks show of plans, runs, datasets and tunings: HTML that is closed, escaped, and loads nothing."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from networks import perceptron, traced

import rapydli_flow as rf
from rapydli_flow import markup, nn, optim
from rapydli_flow.api import Run
from rapydli_flow.notebook import KEPT, NotebookProgress, clock
from rapydli_flow.runtime.events import Ended, Started, Stepped, Validated
from rapydli_flow.runtime.session import Job, Session, StepTime
from rapydli_flow.runtime.tuning_report import TuningReport
from rapydli_flow.spec import Block, Spec
from rapydli_flow.template import Device
from rapydli_flow.tuner import Choice, Found, Funnel, Request, Trial, Tuning

ODD = "<b>&\"'"


def cells(text: str) -> list[list[str]]:
    """The rows of a table; what is around it must be well formed, and load nothing."""
    root = ET.fromstring(f"<page>{text}</page>")
    for node in root.iter():
        assert node.tag.rpartition("}")[2] not in ("script", "link", "img", "iframe", "style", "b'"), node.tag
        assert not set(node.attrib) & {"src", "onclick", "onload"}
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    return [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]


def words(text: str) -> str:
    return " ".join("".join(ET.fromstring(f"<page>{text}</page>").itertext()).split())


@pytest.fixture(scope="module")
def step():
    return rf.train_step(
        traced(perceptron, Spec((9, 6))), loss=nn.cross_entropy, optimizer=optim.sgd(0.1, momentum=0.9)
    )


# plans -------------------------------------------------------------------------------------------------


def test_a_plan_shows_what_each_rank_holds(step):
    plan = rf.plan(step, ranks=2, threads=3)
    head, first, second = cells(plan._repr_html_())
    assert head == ["", "holds", "inputs", "parameters", "state", "sent a step", "memory"]
    assert first[:2] == ["rank 0", "x [0:5,0:6]  label [0:5]"]
    graphs = plan.rank_graphs(step)
    for row, graph in zip((first, second), graphs, strict=True):
        for cell, kind in zip(row[2:5], ("batch", "param", "state"), strict=True):
            assert cell == markup.size(sum(leaf.spec.size_bytes for leaf in graph.leaves(kind)))
    assert first[5] == second[5] != "0 B"
    assert all(row[6].split(" ")[1] in ("B", "kB") for row in (first, second))
    assert "3 threads each" in words(plan._repr_html_())


def test_memory_of_a_plan_is_that_of_its_arrays(step):
    (row,) = cells(rf.plan(step, ranks=1)._repr_html_())[1:]
    assert row[1] == "everything"
    assert row[5] == "0 B"
    value, unit = row[6].split(" ")
    leaves = sum(node.specs[0].size_bytes for node in step if node.op.name == "leaf")
    assert float(value) * {"B": 1, "kB": 1e3}[unit] >= leaves * 0.99


def test_a_plan_without_a_graph_shows_blocks():
    plan = rf.Plan(2, 1, {"x": Block.along((4, 6), 1, (0, 3, 6))})
    assert cells(plan._repr_html_()) == [["", "holds"], ["rank 0", "x [0:4,0:3]"], ["rank 1", "x [0:4,3:6]"]]


def test_plans_are_equal_whatever_they_were_made_for(step):
    assert rf.plan(step, ranks=1, threads=2) == rf.Plan(1, 2)
    assert "graph" not in repr(rf.plan(step, ranks=1))


# runs --------------------------------------------------------------------------------------------------


def test_a_run_shows_its_numbers_and_curves(step, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(36, 6)).astype(np.float32), "label": rng.integers(0, 3, 36)}
    run = rf.fit(step, data, validation=data, epochs=3, run_dir=tmp_path / f"a {ODD}")
    text = run._repr_html_()
    assert cells(text) == [
        ["", "training", "validation"],
        ["loss", f"{run.scalars['loss'][-1]:.4g}", f"{run.validation[-1].metrics['loss']:.4g}"],
    ]
    assert text.count("<polyline") == 2
    assert "12 steps" in words(text)
    assert "<a " not in text
    (run.path / "report.html").write_text("")
    (link,) = ET.fromstring(f"<page>{run._repr_html_()}</page>").iter("a")
    assert (tmp_path / link.attrib["href"]).resolve() == run.path / "report.html"


def test_a_run_without_numbers(step):
    text = Run(step, {}, 0)._repr_html_()
    assert cells(text) == []
    assert "0 steps" in words(text)


# datasets ----------------------------------------------------------------------------------------------


def test_a_dataset_shows_fields_or_splits(tmp_path):
    train = {"x": np.zeros((10, 4, 4, 1), np.uint8), "label": np.zeros(10, np.int64)}
    data = rf.ingest({"train": train, "a<b": train}, tmp_path / "d&.zarr", chunk_records=4)
    assert cells(data._repr_html_()) == [
        ["split", "fields", "records", "bytes"],
        ["a<b", "label int64[], x uint8[4,4,1]", "10", "240 B"],
        ["train", "label int64[], x uint8[4,4,1]", "10", "240 B"],
    ]
    part = data["train"][2:5]._repr_html_()
    assert cells(part)[1:] == [["label", "scalar", "int64", "4", "8"], ["x", "4\u00d74\u00d71", "uint8", "4", "16"]]
    assert "3 of 10 records" in words(part)
    assert "d&.zarr/train" in words(part)


# tunings -----------------------------------------------------------------------------------------------


def test_a_tuning_shows_its_choices(step):
    device = Device("cpu", ODD)
    request, _ = Tuning(device).serve(step["dense_1/matmul_1"].op, [Spec((9, 6)), Spec((6, 20))])
    assert isinstance(request, Request)
    best, default = (Trial(Choice("blocked", (("tile", n),)), time_s=n / 1e3) for n in (2, 3))
    tuning = Tuning(device, {request.key(device): best.choice})
    assert cells(tuning._repr_html_()) == [["kernel of", "template and config"], [request.op.family, "blocked tile=2"]]
    assert ODD in words(tuning._repr_html_())
    wrong = Trial.failed(Choice(ODD), "check", f"deviates {ODD}")
    found = Found(request, default, best, (), (default, best, wrong), Funnel.empty(), (), "budget spent", 1.0, "random")
    session = Session(device, (found,), (Job(request), Job(request)), None, StepTime(3e-3, 2e-3), 1.0, False)
    report = TuningReport((session,), tuning, lost=(ODD,))
    row = cells(report._repr_html_())[1]
    assert row[:2] == [str(request)[:60], "blocked tile=2"]
    assert row[3:6] == ["3.000\N{NO-BREAK SPACE}ms", "2.000\N{NO-BREAK SPACE}ms", "1.50x"]
    assert "1 of 2 kernels, 3 configs" in words(report._repr_html_())
    assert f"deviates {ODD}" in words(report._repr_html_())
    assert f"lost while tuning: {ODD}" in words(report._repr_html_())
    assert "1.50x" in str(report)
    assert cells(Tuning(device)._repr_html_()) == []


# pieces ------------------------------------------------------------------------------------------------


def test_tables_escape_and_end():
    text = markup.table((ODD, "n"), [(ODD, i) for i in range(markup.MOST_ROWS + 3)], right=1)
    rows = cells(text)
    assert rows[0] == [ODD, "n"]
    assert rows[-1] == [ODD, str(markup.MOST_ROWS - 1)]
    assert "and 3 more" in words(text)


def test_curves_leave_out_what_is_not_a_number():
    nan, inf = float("nan"), float("inf")
    text = markup.curve(ODD, [(0, 1.0), (1, nan), (2, 3.0), (3, inf)])
    (line,) = (n for n in ET.fromstring(text).iter() if n.tag.endswith("polyline"))
    assert len(line.attrib["points"].split()) == 2
    assert markup.curve("loss", [(0, nan), (1, inf)], [(1, 2.0)]) == ""
    flat = markup.curve("loss", [(i, 1.0) for i in range(5000)])
    (line,) = (n for n in ET.fromstring(flat).iter() if n.tag.endswith("polyline"))
    assert len(line.attrib["points"].split()) <= markup.MOST_POINTS
    assert line.attrib["points"].split()[-1].startswith(f"{markup.WIDTH - 8.0:.1f},")


def test_curves_that_span_decades_are_logarithmic():
    def heights(values):
        text = markup.curve("loss", list(enumerate(values)))
        (line,) = (n for n in ET.fromstring(text).iter() if n.tag.endswith("polyline"))
        return np.array([float(pair.split(",")[1]) for pair in line.attrib["points"].split()])

    assert np.diff(heights([1.0, 0.1, 0.01])) == pytest.approx([61.0, 61.0], abs=0.11)
    assert np.diff(heights([3.0, 2.0, 1.0])) == pytest.approx([61.0, 61.0], abs=0.11)
    assert np.diff(heights([-1.0, 100.0])) < 0


def test_sizes_and_times_as_people_read_them():
    assert [markup.size(n) for n in (0, 999, 1500, 2.5e9, 3e15)] == ["0 B", "999 B", "1.5 kB", "2.5 GB", "3e+03 TB"]
    assert [clock(t) for t in (0.4, 61, 3725)] == ["0:00", "1:01", "1:02:05"]
    assert (markup.number("accuracy", 0.5), markup.number("accuracy", float("nan"))) == ("50.00%", "nan")


# progress ----------------------------------------------------------------------------------------------


def test_progress_as_a_picture():
    progress = NotebookProgress()
    progress.on_event(Started(0, 3 * KEPT, KEPT, 32, 1, 2, "segment", ODD))
    assert "compiling and loading" in words(progress.html())
    assert ODD in words(progress.html())
    for first in range(0, KEPT + 200, 100):
        progress.on_event(Stepped(first, 100, {"loss": tuple(2.0 - 1e-4 * (first + i) for i in range(100))}, 0.5, 0.0))
    progress.on_event(Validated(KEPT + 200, 2, {"loss": 0.5}))
    text = words(progress.html())
    for part in ("epoch 2/3, step 2,200 of 6,000", "to go", "loss 1.7801", "validation loss 0.5000", "6,400 records/s"):
        assert part in text
    assert len(progress.training["loss"]) <= KEPT
    assert progress.training["loss"][-1] == (KEPT + 199, pytest.approx(1.7801))
    progress.on_event(Ended(KEPT + 200, 12.0, f"ValueError: {ODD}"))
    assert "failed after 2,200 of 6,000 steps" in words(progress.html())
    assert f"ValueError: {ODD}" in words(progress.html())
    progress.on_event(Started(40, 100, 25, 32, 1, 2, "segment"))
    assert "resumed at step 40" in words(progress.html())
