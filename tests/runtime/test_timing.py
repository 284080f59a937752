"""rf.time: each kernel has its layer and phase, totals add up, and every form says the same."""

import json
import xml.dom.minidom
from dataclasses import replace

import pytest

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow import nn, optim
from rapydli_flow.errors import SettingError
from rapydli_flow.graph import hoist
from rapydli_flow.runtime import peak
from rapydli_flow.runtime.attribution import SHARED, Place, copied, places
from rapydli_flow.runtime.peak import Peak
from rapydli_flow.runtime.timing import Measured, Timed, network_of, programs_of
from rapydli_flow.runtime.timing_report import Timing
from rapydli_flow.tuner import Tuning


def network(x):
    x = nn.batch_norm(nn.conv(x, 4, 3, padding=1))
    x = nn.max_pool(nn.relu(nn.conv(nn.relu(x), 4, 3, padding=1)), 2)
    return nn.dense(nn.dropout(x, 0.3), 3)


def make(**options):
    graph = rf.trace(network, rf.Spec((6, 8, 8, 2)))
    return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1, momentum=0.9), **options)


@pytest.fixture(scope="module")
def step():
    return make(metrics={"accuracy": nn.accuracy})


@pytest.fixture(scope="module")
def timing(step):
    patch = pytest.MonkeyPatch()
    patch.setattr(peak, "measured_peak", lambda device, threads: Peak(1e11, 1e10, threads))
    patch.setattr(peak, "_known", {})
    with patch.context():
        yield rf.time(step, iterations=2, threads=1, name="tiny", tuning=Tuning(host()))
    patch.undo()


def test_every_kernel_has_its_layer_and_phase(step):
    step = hoist(step)
    (fused,) = rf.plan(step, ranks=1, threads=1).rank_graphs(step)
    found = places(step, fused)
    phases = {}
    for name, place in found.items():
        phases.setdefault((place.layer, place.phase), []).append(fused[name].op.title)
    assert phases["conv_2", "forward"][-1] == "conv+add+relu"
    assert set(phases["conv_2", "backward"]) >= {"sum", "conv_filter_grad"}
    assert any(title.startswith("conv_input_grad") for title in phases["conv_2", "backward"])  # not the ReLU's before
    assert phases["max_pool_1", "backward"][0].startswith("max_pool_grad")
    assert phases["conv_1", "update"] == ["momentum"] * len(phases["conv_1", "update"])
    assert ("batch_norm_1", "update") in phases  # gain and bias; running statistics
    assert phases[SHARED, "update"] == ["constant_rate"]
    assert {layer for layer, _ in phases} >= {"dropout_1", "dense_1", "cross_entropy_1"}
    assert not any("grad" in layer for layer, _ in phases)
    assert copied("conv_1/w/old/copy", step) == Place("conv_1", "update")
    assert copied("loss/copy", step).layer == SHARED


def test_totals_add_up(timing):
    assert sum(timing.phase_s(p) for p in ("forward", "backward", "update")) == pytest.approx(timing.kernels_s)
    assert sum(layer.time_s for layer in timing.layers) == pytest.approx(timing.kernels_s)
    assert timing.records_s == 6 / timing.step_s
    assert timing.overhead_s == pytest.approx((timing.step_s - timing.kernels_s) / len(timing.kernels))
    conv = next(k for k in timing.kernels if k.title == "conv+add+relu")
    assert conv.flops == 2 * 6 * 8 * 8 * 4 * 9 * 4 + 2 * 6 * 8 * 8 * 4  # direct, and the tail
    assert conv.size_bytes == 4 * (2 * 6 * 8 * 8 * 4 + 9 * 4 * 4 + 4)  # read once, written once
    assert conv.state == "default"
    assert conv.choice.startswith("tiles ")


def test_what_a_kernel_could_reach():
    one = Timed("a", Place("a", "forward"), "a", "rows", "default", 1.0, flops=200, size_bytes=100)
    slow, fast = Peak(50.0, 100.0, 1), Peak(1e3, 10.0, 1)
    assert (one.least_s(slow), one.computes(slow)) == (4.0, True)
    assert (one.least_s(fast), one.computes(fast)) == (10.0, False)
    assert replace(one, itemsize=8).least_s(slow) == 8.0  # half as many float64 in a vector
    assert one.intensity == 2.0


def test_the_table_says_what_runs(timing):
    text = str(timing)
    assert text.startswith("tiny: training step, batch 6, 1 thread of ")
    assert "peak 100 GFLOP/s, 10.0 GB/s" in text
    row = next(line for line in text.splitlines() if line.startswith("conv_2 "))
    assert "fwd conv+add+relu: tiles " in row
    assert "(default)" in row
    for words in ("whole step, without clocks", "records/s", "us a call", "arena: ", "Winograd", "without workspaces"):
        assert words in text
    rows = timing.table(kernels=True).splitlines()
    assert sum(" default  " in line for line in rows) == len(timing.kernels)
    assert repr(timing).startswith("<Timing: tiny, batch 6, ")


def test_pages_pictures_and_json(timing, tmp_path):
    page = timing.save_html(tmp_path / "made" / "t.html").read_text()
    for words in ("<svg", "conv_filter_grad", "Roofline", "100 GFLOP/s"):
        assert words in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    picture = timing.save_svg(tmp_path / "r.svg").read_text()
    dots = [c for c in xml.dom.minidom.parseString(picture).getElementsByTagName("circle") if c.childNodes]
    assert len(dots) == sum(k.flops > 0 and k.time_s > 0 for k in timing.kernels)
    assert "<svg" in timing._repr_html_()
    form = json.loads(timing.save_json(tmp_path / "t.json").read_text())
    assert form["step_s"] == timing.step_s
    assert [k["time_s"] for k in form["kernels"]] == [k.time_s for k in timing.kernels]
    assert {k["phase"] for k in form["kernels"]} == {"forward", "backward", "update"}


def test_nothing_to_draw_and_nothing_timed():
    empty = Measured("none", 1, 1, "cpu", False, 1, Peak(1e9, 1e9, 1), (), 1.0, 0)
    assert "<svg" not in Timing.of(empty)._repr_html_()
    assert Timing.of(empty).overhead_s == 1.0


def test_forward_only(step):
    predicting = network_of(step)
    assert [leaf.name for leaf in predicting.leaves("batch")] == ["x"]
    timing = rf.time(step, iterations=1, threads=1, inference=True)
    assert {k.place.phase for k in timing.kernels} == {"forward"}
    assert str(timing).startswith("network: prediction, ")
    assert not any("dropout" in k.title for k in timing.kernels)
    same = rf.time(predicting, iterations=1, threads=1)
    assert [k.name for k in same.kernels] == [k.name for k in timing.kernels]


def test_a_run_needs_three_programs(step):
    training, scoring, predicting = programs_of(step, Tuning(host()), 1)
    assert set(training.outputs) == set(scoring.outputs) == {"loss", "accuracy"}
    assert set(predicting.outputs) == {"y"}
    assert len(programs_of(network_of(step), Tuning(host()), 1)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "time: iterations=0 is not 1 or more"),
        ({"tune_s": -1.0}, r"time: tune_s=-1.0 is not 0 \(no tuning\) or more seconds"),
        ({"threads": 0}, r"time: threads=0 is not 1 or more"),
    ],
)
def test_wrong_options(step, options, message):
    with pytest.raises(SettingError, match=message):
        rf.time(step, **options)
