"""Winograd's algorithm: its transforms, its accuracy, where it runs, and who forbids it."""

from dataclasses import replace

import numpy as np
import pytest

import rapydli_flow as rf
from cpu_kernels.compile import compile_kernel, host, run_kernel
from cpu_kernels.winograd import DEPTH
from rapydli_flow import nn, optim
from rapydli_flow.ops import Conv, ConvFilterGrad, ConvInputGrad
from rapydli_flow.runtime.tuning import requests_of
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, templates
from rapydli_flow.tuner import Request
from rapydli_flow.winograd import evaluate, filter_lines, input_lines, output_lines

GEOMETRY = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}
X, W = Spec((4, 18, 22, 64)), Spec((3, 3, 64, 96))
Y = Conv(**GEOMETRY).infer(X, W)
CALLS = {
    "conv": (Conv(**GEOMETRY), (X, W), Y),
    "conv_input_grad": (ConvInputGrad(size=(18, 22), **GEOMETRY), (Y, W), X),
    "conv_filter_grad": (ConvFilterGrad(window=(3, 3), **GEOMETRY), (X, Y), W),
}


def winograd(family):
    (found,) = (t for t in templates(family, "cpu") if "winograd" in t.name)
    return found


def chosen(op, ins, device=None):
    request = Request(op, ins, Epilogue.none(op.out_specs(*ins)[0]))
    return request.default(device or host()).template


def error(template, op, ins, out, device, config):
    """The largest of a kernel's errors on random numbers, as a part of the largest result."""
    kernel = compile_kernel(template, op, ins, (out,), device, config)
    assert kernel.template == template.name
    rng = np.random.default_rng(0)
    operands = [rng.standard_normal(spec.shape, dtype=np.float32) for spec in ins]
    result = np.full(out.shape, np.nan, np.float32)
    work = [np.full(spec.shape, np.nan, np.float32) for spec in template.workspace(op, ins, (out,), **config)]
    run_kernel(kernel, operands, [result], work=work, threads=2)
    wanted = op.run(*(a.astype(np.float64) for a in operands))[0]
    return np.abs(result - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize(("n", "outputs", "taps"), [(4, 2, 3), (6, 4, 3), (6, 2, 5), (4, 3, 2), (6, 3, 4), (6, 5, 2)])
def test_transforms_are_sums_of_a_sliding_window(n, outputs, taps):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=n), rng.normal(size=taps)
    products = np.multiply(evaluate(input_lines(n), x), evaluate(filter_lines(n, taps), w))
    np.testing.assert_allclose(evaluate(output_lines(n, outputs), products), np.correlate(x, w), atol=1e-14)


@pytest.mark.parametrize("m", [4, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", CALLS)
def test_rounding_errors(family, m):
    op, ins, out = CALLS[family]
    template = winograd(family)
    config = {**template.default(op, ins, (out,), host()), "m": m}
    assert error(template, op, ins, out, host(), config) < 3e-6


@pytest.mark.parametrize("low", [0, 2, 4])
@pytest.mark.parametrize("family", CALLS)
def test_windows_of_5(family, low):
    """With less padding than keeps the size, that which does, and more, and another at the other end."""
    geometry = {**GEOMETRY, "padding": ((low, 2), (2, low))}
    x, w = Spec((3, 15, 18, 24)), Spec((5, 5, 24, 41))
    y = Conv(**geometry).infer(x, w)
    op, ins, out = {
        "conv": (Conv(**geometry), (x, w), y),
        "conv_input_grad": (ConvInputGrad(size=(15, 18), **geometry), (y, w), x),
        "conv_filter_grad": (ConvFilterGrad(window=(5, 5), **geometry), (x, y), w),
    }[family]
    template = winograd(family)
    config = template.default(op, ins, (out,), host())
    assert config["m"] == 2
    assert template.broken(op, ins, (out,), host(), config) is None
    assert error(template, op, ins, out, host(), config) < 4e-6
    assert "points" in template.broken(op, ins, (out,), host(), {**config, "m": 4})


@pytest.mark.parametrize("tall", [4, 8])
def test_tasks_of_staged_filter_gradients(tall):
    op, ins, out = CALLS["conv_filter_grad"]
    template = winograd("conv_filter_grad")
    config = {**template.default(op, ins, (out,), host()), "rows": 4, "vectors": 1, "lanes": 8}
    config |= {"staged": True, "block": 32, "split": 4, "tall": tall}
    assert template.broken(op, ins, (out,), host(), config) is None
    assert error(template, op, ins, out, host(), config) < 3e-6


@pytest.mark.parametrize("beforehand", ["filters", "both", "patches"])
@pytest.mark.parametrize("family", ["conv", "conv_input_grad"])
def test_what_is_transformed_beforehand_does_not_matter(family, beforehand):
    """Channels that are no multiple of those taken at a time, nor of vectors; filters and tiles that fill nothing."""
    channels = {"conv": (DEPTH + 21, 41), "conv_input_grad": (41, DEPTH + 21)}[family]
    x, w = Spec((3, 7, 9, channels[0])), Spec((3, 3, *channels))
    y = Conv(**GEOMETRY).infer(x, w)
    op = {"conv": Conv(**GEOMETRY), "conv_input_grad": ConvInputGrad(size=(7, 9), **GEOMETRY)}[family]
    ins, out = {"conv": ((x, w), y), "conv_input_grad": ((y, w), x)}[family]
    template = winograd(family)
    config = {**template.default(op, ins, (out,), host()), "m": 4, "rows": 4, "vectors": 1, "lanes": 8}
    config |= {"block": 8, "panels": 2, "beforehand": beforehand}
    assert template.broken(op, ins, (out,), host(), config) is None
    assert error(template, op, ins, out, host(), config) < 5e-6


def test_filters_are_transformed_by_tasks_where_tiles_are_few():
    op, device = Conv(**GEOMETRY), Device("cpu", "test", vector_bytes=64, cores=2)
    for records, beforehand in ((8, "patches"), (128, "both")):
        x, w = Spec((records, 7, 7, 512)), Spec((3, 3, 512, 512))
        assert winograd("conv").default(op, (x, w), (op.infer(x, w),), device)["beforehand"] == beforehand


@pytest.mark.parametrize("family", CALLS)
def test_it_serves_large_3x3_convolutions_that_are_not_exact(family):
    op, ins, _ = CALLS[family]
    assert "winograd" in chosen(op, ins)
    assert "tiles" in chosen(replace(op, exact=True), ins)
    assert str(op) != str(replace(op, exact=True))
    assert "exact" not in str(op)  # what was tuned before there was a choice is still known


def test_it_serves_nothing_else():
    for change in ({"stride": (2, 2)}, {"dilation": (2, 2)}, {"groups": 2}):
        op = Conv(**{**GEOMETRY, **change})
        w = Spec((3, 3, 32, 96)) if op.groups == 2 else W
        assert chosen(op, (X, w)) == "tiles"
    small = (Spec((1, 6, 6, 4)), Spec((3, 3, 4, 4)))
    assert chosen(Conv(**GEOMETRY), small) == "tiles"


@pytest.mark.parametrize("vector_bytes", [16, 32, 64])
def test_defaults_fit_vectors_of_any_length(vector_bytes):
    device = Device("cpu", "test", vector_bytes=vector_bytes, cores=2)
    for family, (op, ins, out) in CALLS.items():
        config = winograd(family).default(op, ins, (out,), device)
        assert config["lanes"] == vector_bytes // 4


def test_a_graph_of_exact_convolutions_has_exact_gradients():
    graph = rf.trace(lambda x: nn.dense(nn.conv(nn.conv(x, 64, 3, padding=1), 64, 3), 3), rf.Spec((4, 20, 20, 64)))

    def served(graph):
        step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))
        requests = [r for r in requests_of([step], host()) if r.op.family.startswith("conv")]
        return {r.op.family: chosen(r.op, r.ins) for r in requests}

    assert all("winograd" in template for template in served(graph).values())
    exact = rf.exact(graph)
    assert all("tiles" in template for template in served(exact).values())
    assert [node.name for node in exact.nodes] == [node.name for node in graph.nodes]
    assert served(rf.trace(lambda x: nn.dense(nn.conv(x, 64, 3, exact=True), 3), rf.Spec((4, 20, 20, 64)))) == {
        "conv": "tiles",
        "conv_filter_grad": "tiles",
    }


@pytest.mark.slow
@pytest.mark.parametrize("vector_bytes", [16, 64])  # 4 and 16 lanes; those too long for this processor are split
@pytest.mark.parametrize("name", ["winograd", "depthwise"])
def test_vectors_of_any_length_give_right_results(name, vector_bytes):
    device = Device("cpu", "test", vector_bytes=vector_bytes, cores=2)
    for op, ins, out in CALLS.values():
        if name == "depthwise":
            op = replace(op, groups=19)
            ins = tuple(Spec((*s.shape[:-2], 1, 19)) if s.shape[0] == 3 else Spec((*s.shape[:-1], 19)) for s in ins)
            out = op.infer(*ins)
        (template,) = (t for t in templates(op.family, "cpu") if name in t.name)
        config = template.default(op, ins, (out,), device)
        assert error(template, op, ins, out, device, config) < 5e-6
