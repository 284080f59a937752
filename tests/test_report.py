"""The report: from real runs and from logs with every kind of gap; one file that needs no network."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import perceptron, traced

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.dashboard.curves import MOST_WRONG, _rgba, curves, gallery
from rapydli_flow.dashboard.numbers import read_numbers, smooth
from rapydli_flow.dashboard.report import Predictions, report
from rapydli_flow.errors import SettingError, ShapeError
from rapydli_flow.graph import to_json
from rapydli_flow.runtime.events import Ended, Event, MetricsLog, Recovered, Saved, Started, Stepped, Validated
from rapydli_flow.spec import Spec

STARTED = Started(0, 20, 10, 32, 2, 4, "segment", "2 ranks <here>")
VOID = ("meta", "img", "br", "path", "rect", "input", "link")


class Page(HTMLParser):
    """The text outside of scripts and styles, and every tag with its attributes; tags must be closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open) and data.strip():
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return "\n".join(self.words)


def log(folder: Path, *events: Event) -> Path:
    watching = MetricsLog(folder)
    for event in events:
        watching.on_event(event)
    watching.close()
    return folder


def stepped(first: int, steps: int, ops: dict[str, float] | None = None, **scalars: float) -> Stepped:
    series = {k: tuple(v / (1 + first + i) for i in range(steps)) for k, v in (scalars or {"loss": 4.0}).items()}
    return Stepped(first, steps, series, 0.1 * steps, 0.01 * steps, ops or {})


def outcomes(n: int = 40, channels: int = 1, size: int = 8, wrong: int = 5) -> Predictions:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, n)
    said = labels.copy()
    said[:wrong] = (said[:wrong] + 1) % 10
    p = np.full((n, 10), 0.05)
    p[np.arange(n), said] = 0.55
    return Predictions(rng.random((n, size, size, channels)), labels, said, p)


def test_report_of_a_real_run(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(64, 6)).astype(np.float32), "label": rng.integers(0, 3, 64)}
    step = rf.train_step(
        traced(perceptron, Spec((8, 6))),
        loss=nn.cross_entropy,
        optimizer=optim.sgd(0.1),
        metrics={"accuracy": nn.accuracy},
    )
    rf.fit(step, data, validation=data, epochs=3, run_dir=tmp_path / "first")
    path = report(tmp_path / "first", predictions=outcomes())
    assert path == tmp_path / "first" / "report.html"
    page = Page(path)
    for word in ("first", "done", "24 of 24 steps", "3 epochs", "batch 8", "1 rank", "validation loss", "test images"):
        assert word in page.words
    assert "matmul+add" in page.text  # time by op
    assert "dense_1/matmul_1" in page.text  # the graph table, from the snapshot
    assert ("svg", "rf") in [(tag, attrs.get("class")) for tag, attrs in page.tags]
    assert "snapshots/step-00000024" in page.text
    assert "35 of 40 right (87.50%). All 5 wrong ones" in page.text


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    page = Page(report(log(tmp_path, STARTED, stepped(0, 20), Ended(20, 2.0)), predictions=outcomes()))
    assert {"script", "style"} <= {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        assert "src" not in attrs
        assert tag not in ("link", "img", "iframe", "object")


def test_a_run_that_failed_says_why(tmp_path: Path) -> None:
    message = "NonFinite: loss is nan at step 3 <&>"
    scalars = {"loss": (1.0, 2.0, float("nan"), float("inf"))}
    page = Page(report(log(tmp_path, STARTED, Stepped(0, 4, scalars, 0.4, 0.0), Ended(4, 1.0, message)), title="a <b>"))
    assert "failed" in page.words
    assert message in page.words
    assert "a <b>" in page.words
    assert "inf" in page.words  # the last loss
    assert "2 ranks <here>" in page.words


def test_a_recovery_says_why_and_no_tables(tmp_path: Path) -> None:
    again = Recovered(5, 2, 0.5, "rank 1 left", ("tcp://a", "tcp://b"), (1, 2), "where", ((0, 7), (7, 0)))
    page = Page(report(log(tmp_path, STARTED, again)))
    assert "ranks 2, seconds 0.5, reason rank 1 left" in page.words


def test_a_run_that_goes_on_or_was_stopped(tmp_path: Path) -> None:
    page = Page(report(log(tmp_path / "a", STARTED, stepped(0, 5))))
    assert "unfinished" in page.words
    assert "is still going on, or was killed" in page.text
    page = Page(report(log(tmp_path / "b", STARTED, stepped(0, 5), Ended(5, 4000.0, "interrupted"))))
    assert "interrupted" in page.words
    assert "1 h 6 min" in page.words
    page = Page(report(log(tmp_path / "c", STARTED, stepped(0, 5), Ended(5, 66.0), STARTED)))
    assert "unfinished" in page.words  # the end is of the run before


def test_a_run_that_failed_before_its_first_step(tmp_path: Path) -> None:
    page = Page(report(log(tmp_path, STARTED, Ended(0, 0.1, "NoWorkers: 0 of 2"))))
    assert "0 of 20 steps" in page.words
    assert "loss" not in page.words
    assert "script" not in {tag for tag, _ in page.tags}


def test_one_step_of_the_loss_only(tmp_path: Path) -> None:
    page = Page(report(log(tmp_path, STARTED, stepped(0, 1, {"conv": 0.01}), Ended(1, 0.1))))
    assert "training loss" in page.words
    assert "10.000 ms" in page.words  # the only segment counts


def test_logs_with_missing_fields(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"kind": "started"},
        {"kind": "step", "loss": 1.0},
        {"kind": "segment", "steps": 0},
        {"kind": "segment", "steps": 2, "time_s": 0.5, "ops": {"conv": 0.0}},
        {"kind": "step", "step": 1, "loss": None, "error": -1.0},
        {"kind": "validated", "accuracy": 0.5, "epoch": 1},
        {"kind": "saved"},
        {"step": 3},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "st')
    page = Page(report(tmp_path))
    assert "2 steps" in page.words
    assert "steps a second" in page.words
    assert "validation accuracy" in page.words
    assert "waiting for data" not in page.words
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 0, "loss": 1.0}\n')
    assert "unfinished" in Page(report(tmp_path)).words


def test_a_folder_without_a_log(tmp_path: Path) -> None:
    with pytest.raises(
        SettingError, match=r"report: .*metrics.jsonl does not exist. Train with rf.fit\(\.\.\., run_dir="
    ):
        report(tmp_path)
    log(tmp_path)
    with pytest.raises(SettingError, match=r"metrics.jsonl is empty"):
        report(tmp_path)


def test_the_graph_is_that_of_graph_json_if_it_is_there(tmp_path: Path) -> None:
    log(tmp_path, STARTED, stepped(0, 5), Saved(5))
    (tmp_path / "graph.json").write_text(to_json(traced(perceptron, Spec((4, 50)))))
    assert "381 parameters" in Page(report(tmp_path)).text
    (tmp_path / "graph.json").write_text('{"format": 0}')
    assert "network" not in Page(report(tmp_path)).words


# numbers -----------------------------------------------------------------------------------------------


def test_numbers_of_a_log(tmp_path: Path) -> None:
    first = stepped(0, 1, {"conv": 9.0}, loss=4.0)
    rest = [stepped(1 + 5 * i, 5, {"conv": 0.02 + i, "relu": 0.5}, loss=4.0, accuracy=0.5) for i in range(3)]
    log(tmp_path, STARTED, first, *rest, Validated(16, 2, {"loss": 1.5}), Saved(16), Ended(16, 9.0))
    numbers = read_numbers(tmp_path)
    assert (numbers.steps, numbers.outcome, numbers.time_s, numbers.batch) == (16, "done", 9.0, 32)
    assert numbers.names == ["loss", "accuracy"]
    assert numbers.ops_s == {"conv": 1.02, "relu": 0.5}  # without the first segment
    assert numbers.feed_share == pytest.approx(0.1)
    assert numbers.step_s is not None
    assert numbers.step_s.step.tolist() == [3.0, 8.0, 13.0]
    assert numbers.step_s.value == pytest.approx([0.1] * 3)
    assert numbers.train["loss"].value[0] == 4.0
    assert numbers.held_out["loss"].step.tolist() == [15.0]
    assert [e["kind"] for e in numbers.events] == ["started", "validated", "saved", "ended"]


def test_smoothing_leaves_out_what_is_not_a_number() -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0, np.nan, np.nan, np.nan])
    assert smooth(values, 1)[[0, 2, 3]].tolist() == [1.0, 3.0, 5.0]
    assert smooth(values, 3) == pytest.approx([1.0, 2.0, 4.0, 4.0, 5.0, np.nan, np.nan], nan_ok=True)


def test_the_loss_has_a_log_axis_where_that_helps(tmp_path: Path) -> None:
    log(tmp_path, STARTED, stepped(0, 200, loss=4.0, error=1.0, accuracy=1.0, gap=-1.0))
    axes = {name: type(figure.yaxis[0]).__name__ for name, figure in curves(read_numbers(tmp_path))}
    linear = dict.fromkeys(("accuracy", "gap", "records a second", "time of a step"), "LinearAxis")
    assert axes == {"loss": "LogAxis", "error": "LogAxis"} | linear


def test_numbers_that_no_line_shows_are_points(tmp_path: Path) -> None:
    loss = (1.0, 2.0, float("nan"), 4.0, float("inf"))
    log(tmp_path, STARTED, Stepped(0, 5, {"loss": loss}, 0.5, 0.0), Validated(5, 1, {"loss": float("inf")}))
    ((_, figure), *_) = curves(read_numbers(tmp_path))
    train, held_out = figure.renderers[0].data_source.data, figure.renderers[-1].data_source.data
    assert np.isfinite(train["alone"]).tolist() == [False, False, False, True, False]
    assert np.isfinite(train["raw"]).tolist() == [True, True, False, True, False]  # a range has no room for inf
    assert np.isnan(held_out["value"]).all()


def test_many_ops_are_summed_up(tmp_path: Path) -> None:
    log(tmp_path, STARTED, stepped(0, 5, {f"op{i}": 0.001 for i in range(30)}))
    page = Page(report(tmp_path))
    assert "17 others" in page.words
    assert "56.7%" in page.words


# images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (2, 224)])
def test_wrong_images_come_first(channels: int, size: int) -> None:
    predictions = outcomes(channels=channels, size=size)
    figure, wrong, right = gallery(predictions)
    assert (wrong, right) == (5, 35)
    data = figure.renderers[0].data_source.data
    assert data["number"][:5].tolist() == [0, 1, 2, 3, 4]
    label, said = predictions.labels[0], predictions.predicted[0]
    assert data["text"][0] == f"{label} \u2192 {said}"
    assert data["sure"][0] == f"55.0% (5.0% for {label})"
    assert data["sure"][-1] == "55.0%"
    assert len(set(data["color"][:5])) == 1
    assert data["color"][0] != data["color"][5]
    assert data["image"][0].shape == (size, size)


def test_too_many_wrong_images_are_cut() -> None:
    _, wrong, right = gallery(outcomes(n=400, wrong=400))
    assert (wrong, right) == (MOST_WRONG, 0)


def test_the_caption_says_how_many_are_shown(tmp_path: Path) -> None:
    log(tmp_path, STARTED, stepped(0, 5))
    page = Page(report(tmp_path, predictions=outcomes(n=400, wrong=300)))
    assert re.search(r"100 of 400 right \(25\.00%\)\. The first 240 of 300 wrong ones", page.text)
    none = Predictions(np.zeros((0, 8, 8)), np.zeros(0, int), np.zeros(0, int))
    assert "0 of 0 right" in Page(report(tmp_path, predictions=none)).text


def test_pixels_are_stretched_and_nan_is_dark() -> None:
    grey = _rgba(np.array([[[0.0, 2.0], [1.0, np.nan]]])).view(np.uint8).reshape(4, 4)
    assert grey.tolist() == [[0, 0, 0, 255], [255, 255, 255, 255], [127, 127, 127, 255], [0, 0, 0, 255]]
    assert (_rgba(np.full((1, 2, 2, 3), 7)) == 0xFF000000).all()


def test_predictions_that_do_not_fit() -> None:
    x = np.zeros((3, 4, 4, 1))
    with pytest.raises(ShapeError, match=r"Predictions: labels has shape \(2,\) but there are 3 images"):
        Predictions(x, np.zeros(2), np.zeros(3))
    with pytest.raises(ShapeError, match=r"Predictions: images have shape \(3, 4\), not N,H,W,C"):
        Predictions(x[:, :, 0, 0], np.zeros(3), np.zeros(3))
    with pytest.raises(ShapeError, match="Predictions: 2 rows of probabilities for 3 images"):
        Predictions(x, np.zeros(3), np.zeros(3), np.zeros((2, 10)))
    assert gallery(Predictions(x[..., 0], np.zeros(3), np.zeros(3)))[1:] == (0, 3)
