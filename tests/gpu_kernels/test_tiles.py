"""Register tiles on the emulator: gradients, groups, batches and split sums of shapes that fill several blocks."""

import numpy as np
import pytest

from rapydli_flow import ops
from rapydli_flow.ops import Sample
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, templates
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

NAMES = {"matmul": "simt", "batch_matmul": "simt"}


def of(family):
    return next(t for t in templates(family, "cuda") if t.name == NAMES.get(family, "implicit_gemm"))


def convolutions(x, w, *, stride=1, padding=(0, 0), dilation=1, groups=1):
    """A convolution and both of its gradients."""
    n = len(x) - 2

    def each(value):
        return value if isinstance(value, tuple) and isinstance(value[0], tuple | int) else (value,) * n

    stride, dilation = each(stride), each(dilation)
    geometry = {"stride": stride, "padding": (padding,) * n, "dilation": dilation, "groups": groups}
    x, w = Spec(x), Spec(w)
    y = ops.Conv(**geometry).infer(x, w)
    return (
        Sample(ops.Conv(**geometry), (x, w)),
        Sample(ops.ConvInputGrad(size=x.shape[1:-1], **geometry), (y, w)),
        Sample(ops.ConvFilterGrad(window=w.shape[:-2], **geometry), (x, y)),
    )


CASES = {
    "several blocks": convolutions((2, 13, 11, 5), (3, 3, 5, 37), padding=(1, 1)),
    "stride 3": convolutions((1, 17, 15, 4), (5, 3, 4, 68), stride=3, padding=(2, 0)),
    "stride over the window": convolutions((2, 11, 10, 3), (2, 1, 3, 8), stride=(3, 4)),
    "cropped": convolutions((2, 12, 11, 3), (3, 2, 3, 7), padding=(-1, -2)),
    "dilation": convolutions((1, 9, 10, 8), (3, 3, 8, 33), padding=(4, 5), dilation=2),
    "dilation that shares a factor with the stride": convolutions(
        (1, 14, 13, 4), (3, 4, 4, 8), stride=(4, 2), padding=(3, 2), dilation=(2, 2)
    ),
    "dilation that shares none": convolutions(
        (2, 15, 12, 3), (4, 3, 3, 5), stride=(3, 2), padding=(2, 2), dilation=(2, 3)
    ),
    "1-D": convolutions((2, 150, 3), (7, 3, 10), stride=2, padding=(3, 3)),
    "3-D": convolutions((1, 5, 6, 7, 2), (3, 3, 3, 2, 9), stride=(1, 2, 3), padding=(1, 0)),
    "groups": convolutions((2, 9, 8, 24), (3, 3, 8, 36), padding=(1, 1), groups=3),
    "groups and stride": convolutions((1, 9, 8, 12), (3, 2, 3, 8), stride=2, padding=(1, 0), groups=4),
    "many pixels": convolutions((3, 40, 33, 4), (1, 1, 4, 12)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["forward", "input", "filter"])
@pytest.mark.parametrize("name", CASES)
def test_convolutions(name, which, dtype):
    sample = as_dtype(CASES[name][which], dtype)
    values = sample.draw(np.random.default_rng(7))
    want = wanted(sample.op, values)
    template = of(sample.op.family)
    for config in chosen(template, sample, seed=3, count=2)[: 9 if dtype == "float32" else 2]:
        assert_close(emulated(template, sample.op, values, config), want, tolerance(sample))


def test_float64_is_summed_in_float64():
    sample = as_dtype(CASES["several blocks"][0], "float64")
    values = sample.draw(np.random.default_rng(7))
    template = of("conv")
    config = template.default(sample.op, sample.ins, sample.op.out_specs(*sample.ins), CARD)
    assert_close(emulated(template, sample.op, values, config), wanted(sample.op, values), 1e-13)


def batch_matmul(*leading, m, i, k, ta=False, tb=False):
    a, b = ((i, m) if ta else (m, i)), ((k, i) if tb else (i, k))
    return Sample(ops.BatchMatmul(ta=ta, tb=tb), (Spec((*leading, *a)), Spec((*leading, *b))))


@pytest.mark.parametrize(
    "sample",
    [
        batch_matmul(2, 3, m=37, i=21, k=70),
        batch_matmul(5, m=33, i=64, k=17, ta=True),
        batch_matmul(3, m=66, i=40, k=36, tb=True),
        batch_matmul(2, m=9, i=300, k=7, ta=True, tb=True),
    ],
    ids=str,
)
def test_batches_of_matrices(sample):
    values = sample.draw(np.random.default_rng(2))
    for config in chosen(of("batch_matmul"), sample, seed=4):
        assert_close(
            emulated(of("batch_matmul"), sample.op, values, config), wanted(sample.op, values), tolerance(sample)
        )


LONG = Sample(ops.Matmul(ta=True), (Spec((5000, 64)), Spec((5000, 10))))


@pytest.mark.parametrize("sample", [LONG, *(CASES[name][2] for name in ("many pixels", "groups"))], ids=str)
def test_an_epilogue_follows_the_sum_of_all_parts(sample):
    rng = np.random.default_rng(1)
    template, outs = of(sample.op.family), sample.op.out_specs(*sample.ins)
    epilogue = bias_residual_relu(outs[0], scaled=True)
    extras = [np.asarray(rng.normal(size=e.shape), np.float32) for e in epilogue.extras]
    values = sample.draw(rng)
    want = np.maximum(wanted(sample.op, values)[0] + extras[0] + extras[1], 0) * extras[2]
    default = template.default(sample.op, sample.ins, outs, CARD)
    tried = [{**default, "splits": splits} for splits in template.values(CARD)["splits"]]
    fitting = [config for config in tried if template.fits(sample.op, sample.ins, outs, CARD, **config)]
    assert {1, 3} < {config["splits"] for config in fitting}
    for config in fitting[:9]:
        got = emulated(template, sample.op, values, config, epilogue=epilogue, extras=extras)
        assert_close(got, (want,), tolerance(sample))


def test_few_outputs_of_a_long_sum_are_split():
    def splits(sample):
        outs = sample.op.out_specs(*sample.ins)
        return of(sample.op.family).default(sample.op, sample.ins, outs, CARD)["splits"]

    assert splits(Sample(ops.Matmul(), (Spec((64, 50176)), Spec((50176, 10))))) > 8
    assert splits(convolutions((64, 56, 56, 64), (3, 3, 64, 64), padding=(1, 1))[2]) > 8
    assert splits(Sample(ops.Matmul(), (Spec((4096, 4096)), Spec((4096, 4096))))) == 1


@pytest.mark.parametrize("family", ["matmul", "batch_matmul", "conv", "conv_input_grad", "conv_filter_grad"])
def test_what_does_not_fit(family):
    template = of(family)
    huge = {
        "matmul": Sample(ops.Matmul(), (Spec((2**16, 8)), Spec((8, 2**16)))),
        "batch_matmul": batch_matmul(2**10, m=2**11, i=2, k=2**11),
        **{s.op.family: s for s in convolutions((2**12, 512, 512, 4), (1, 1, 4, 1))},
    }[family]
    assert template.default(huge.op, huge.ins, huge.op.out_specs(*huge.ins), CARD) is None


def test_costs_grow_with_the_work():
    card = Device("cuda", "H200", target="sm_90a", cores=132)

    def cost(sample):
        template, outs = of(sample.op.family), sample.op.out_specs(*sample.ins)
        return template.cost(sample.op, sample.ins, outs, card, template.default(sample.op, sample.ins, outs, card))

    small = convolutions((8, 56, 56, 64), (3, 3, 64, 64), padding=(1, 1))
    large = convolutions((64, 56, 56, 64), (3, 3, 64, 64), padding=(1, 1))
    for a, b in zip(small, large, strict=True):
        assert 4 < cost(b) / cost(a) < 12
        assert b.op.flops(*b.ins) / 60e12 < cost(b) < b.op.flops(*b.ins) / 25e12
    strided = convolutions((64, 56, 56, 64), (3, 3, 64, 64), stride=2, padding=(1, 1))[1]
    assert cost(strided) < cost(large[1]) / 2.5
