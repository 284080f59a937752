"""Depthwise convolutions and their gradients on the emulator."""

import numpy as np
import pytest

from gpu_kernels.depthwise import lines, rows_of
from rapydli_flow import ops
from rapydli_flow.ops import Sample
from rapydli_flow.spec import Spec
from rapydli_flow.template import templates
from rapydli_flow.testing.gpu import (
    CARD,
    as_dtype,
    assert_close,
    bias_residual_relu,
    chosen,
    emulated,
    tolerance,
    wanted,
)


def of(family):
    return next(t for t in templates(family, "cuda") if t.name == "depthwise")


def convolutions(x, window, *, stride=1, padding=(0, 0), dilation=1):
    """A depthwise convolution and both of its gradients."""
    n, channels = len(x) - 2, x[-1]
    stride, padding, dilation = ((v,) * n if isinstance(v, int) else v for v in (stride, padding, dilation))
    padding = tuple(p if isinstance(p, tuple) else (p, p) for p in padding)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": channels}
    x, w = Spec(x), Spec((*window, 1, channels))
    y = ops.Conv(**geometry).infer(x, w)
    return (
        Sample(ops.Conv(**geometry), (x, w)),
        Sample(ops.ConvInputGrad(size=x.shape[1:-1], **geometry), (y, w)),
        Sample(ops.ConvFilterGrad(window=window, **geometry), (x, y)),
    )


CASES = {
    "3x3": convolutions((2, 13, 11, 24), (3, 3), padding=1),
    "3x3/2": convolutions((2, 14, 13, 8), (3, 3), stride=2, padding=1),
    "stride over the window": convolutions((1, 11, 13, 4), (2, 1), stride=(3, 4)),
    "5x5": convolutions((1, 9, 10, 20), (5, 5), padding=2),
    "7x7 of odd channels": convolutions((1, 9, 8, 7), (7, 7), padding=3),
    "dilation": convolutions((2, 10, 9, 6), (3, 2), padding=(2, 1), dilation=(2, 3)),
    "dilation and stride": convolutions((1, 12, 11, 4), (3, 3), stride=(2, 3), padding=2, dilation=2),
    "cropped": convolutions((1, 12, 11, 8), (3, 3), padding=((-1, 0), (0, -2))),
    "1-D": convolutions((3, 70, 12), (4,), stride=2, padding=1),
    "3-D": convolutions((1, 5, 6, 7, 4), (2, 3, 3), stride=(2, 1, 1), padding=1),
    "many channels": convolutions((1, 6, 5, 264), (3, 3), padding=1),
}


@pytest.mark.parametrize("which", [0, 1, 2], ids=["forward", "input", "filter"])
@pytest.mark.parametrize("name", CASES)
def test_depthwise(name, which):
    for dtype in ("float32", "bfloat16", "float64"):
        sample = as_dtype(CASES[name][which], dtype)
        values = sample.draw(np.random.default_rng(7))
        want = wanted(sample.op, values)
        template = of(sample.op.family)
        for config in chosen(template, sample, seed=3, count=2)[: 3 if dtype == "float32" else 1]:
            assert_close(emulated(template, sample.op, values, config), want, tolerance(sample))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["forward", "input", "filter"])
def test_an_epilogue_is_applied_before_the_store(which):
    rng = np.random.default_rng(1)
    sample = CASES["3x3/2"][which]
    template, outs = of(sample.op.family), sample.op.out_specs(*sample.ins)
    epilogue = bias_residual_relu(outs[0], scaled=True)
    extras = [np.asarray(rng.normal(size=e.shape), np.float32) for e in epilogue.extras]
    values = sample.draw(rng)
    want = np.maximum(wanted(sample.op, values)[0] + extras[0] + extras[1], 0) * extras[2]
    for config in chosen(template, sample, seed=5, count=2):
        got = emulated(template, sample.op, values, config, epilogue=epilogue, extras=extras)
        assert_close(got, (want,), tolerance(sample))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_other_groups_do_not_fit(which):
    g = {"stride": (1, 1), "padding": ((1, 1),) * 2, "dilation": (1, 1), "groups": 4}
    x, w = Spec((2, 6, 6, 8)), Spec((3, 3, 2, 8))
    y = ops.Conv(**g).infer(x, w)
    op, ins = (
        (ops.Conv(**g), (x, w)),
        (ops.ConvInputGrad(size=(6, 6), **g), (y, w)),
        (ops.ConvFilterGrad(window=(3, 3), **g), (x, y)),
    )[which]
    assert of(op.family).default(op, ins, op.out_specs(*ins), CARD) is None


@pytest.mark.parametrize(("which", "reads"), [(0, 4 * 6), (1, 4 * 6)])
def test_a_tile_reads_each_row_once(which, reads):
    """2 x 4 pixels of a 3 x 3 window read 4 rows of 6, forward and backward."""
    sample = CASES["3x3"][which]
    axes = lines(sample.op, sample.ins, sample.op.out_specs(*sample.ins), 2, 4)
    rows = rows_of(axes, (1, 3, 3))
    assert len(rows) * len(axes[2].offsets) == reads
    assert sum(len(row.sums(4)) for row in rows) == 2 * 4 * 9


def test_a_strided_gradient_computes_no_product_with_zero():
    """2 x 2 phases of a 3 x 3 window have 1, 2, 2 and 4 taps."""
    sample = CASES["3x3/2"][1]
    axes = lines(sample.op, sample.ins, sample.op.out_specs(*sample.ins), 1, 1)
    assert sum(len(row.sums(4)) for row in rows_of(axes, (1, 3, 3))) == 1 + 2 + 2 + 4
