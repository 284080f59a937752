"""Templates that slide windows or move data, on the emulator: several blocks, tails, ties, what must not fit."""

import numpy as np
import pytest

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


def window(*sizes, stride, padding=(0, 0)):
    n = len(sizes)
    return {"window": sizes, "stride": (stride,) * n, "padding": (padding,) * n}


def pools(x, g):
    """Pooling and its gradients on one geometry."""
    y, argmax = ops.MaxPool(**g).infer(x)
    taps = int(np.prod(g["window"]))
    return [
        Sample(ops.MaxPool(**g), (x,)),
        Sample(ops.SumPool(**g), (x,)),
        Sample(ops.MaxPoolGrad(size=x.shape[1:-1], **g), (y, argmax), {1: (0, taps)}),
        Sample(ops.SumPoolGrad(size=x.shape[1:-1], **g), (y,)),
    ]


POOLS = [
    *pools(Spec((3, 13, 11, 24)), window(3, 3, stride=2)),
    *pools(Spec((2, 14, 14, 16)), window(3, 3, stride=1, padding=(1, 1))),
    *pools(Spec((2, 15, 9, 8)), window(2, 2, stride=3)),  # windows with gaps
    *pools(Spec((2, 7, 7, 40)), window(7, 7, stride=7)),  # global
    *pools(Spec((1, 21, 19, 4)), window(9, 9, stride=1, padding=(4, 4))),  # a loop over taps
    *pools(Spec((1, 20, 20, 2)), window(17, 17, stride=2, padding=(3, 0))),  # taps in int32
    *pools(Spec((1, 6, 9, 8, 4)), window(2, 3, 3, stride=2, padding=(1, 1))),
    *pools(Spec((2, 40, 6)), window(5, stride=3, padding=(2, 2))),
]
# parts of a larger array: some windows begin inside, some end beyond
PARTS = {"window": (3, 3), "stride": (2, 2), "padding": ((-1, 1), (2, -1))}


def titles(samples):
    return [f"{i}-{sample.op.name}" for i, sample in enumerate(samples)]


def check(sample, *, count=4, dtype=None):
    """Every template of the op, in several configs."""
    stored = as_dtype(sample, dtype) if dtype else sample
    values = stored.draw(np.random.default_rng(5))
    want, found = wanted(stored.op, values), 0
    for template in templates(stored.op.family, "cuda"):
        for config in chosen(template, stored, seed=11, count=count):
            assert_close(emulated(template, stored.op, values, config), want, tolerance(stored))
            found += 1
    assert found


@pytest.mark.parametrize("sample", POOLS, ids=titles(POOLS))
def test_pooling_of_several_blocks(sample):
    check(sample)


@pytest.mark.parametrize("sample", POOLS[:4], ids=titles(POOLS[:4]))
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_pooling_of_other_floats(sample, dtype):
    check(sample, count=2, dtype=dtype)


def test_pooling_of_a_block_whose_padding_is_negative():
    x = Spec((2, 12, 9, 4))
    y, argmax = Spec((2, 5, 4, 4)), Spec((2, 5, 4, 4), "uint8")
    assert ops.SumPool(**PARTS).infer(x) == y
    check(Sample(ops.SumPool(**PARTS), (x,)))
    check(Sample(ops.MaxPool(**PARTS), (x,)))
    check(Sample(ops.SumPoolGrad(size=(12, 9), **PARTS), (y,)))
    check(Sample(ops.MaxPoolGrad(size=(12, 9), **PARTS), (y, argmax), {1: (0, 9)}))


def test_of_equal_values_the_first_wins_and_a_nan_wins_over_all():
    op = ops.MaxPool(**window(3, 3, stride=2, padding=(1, 1)))
    rng = np.random.default_rng(3)
    x = rng.integers(0, 3, (2, 9, 9, 8)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    x[1, :4, :4] = -np.inf
    y, argmax = op.run(x)
    (template,) = templates("max_pool", "cuda")
    for config in chosen(template, Sample(op, (Spec(x.shape),)), seed=2):
        got, tap = emulated(template, op, [x], config)
        np.testing.assert_array_equal(tap, argmax)
        np.testing.assert_array_equal(got, y)
    assert np.isnan(y).any()
    assert (y == -np.inf).any()


TAILED = [POOLS[0], POOLS[1], POOLS[2], POOLS[3], POOLS[15]]


@pytest.mark.parametrize("sample", TAILED, ids=titles(TAILED))
def test_tails_of_pooling(sample):
    check_tail(sample)


def check_tail(sample):
    """Bias, residual and ReLU are applied before the store."""
    rng = np.random.default_rng(1)
    outs = sample.op.out_specs(*sample.ins)
    epilogue = bias_residual_relu(outs[0], scaled=True)
    extras = [np.asarray(rng.normal(size=e.shape), np.float32) for e in epilogue.extras]
    values = sample.draw(rng)
    first, *rest = sample.op.run(*values)
    want = (np.maximum(first + extras[0] + extras[1], 0) * extras[2], *rest)
    for template in templates(sample.op.family, "cuda"):
        for config in chosen(template, sample, seed=5, count=3)[:5]:
            got = emulated(template, sample.op, values, config, epilogue=epilogue, extras=extras)
            assert_close(got, want, tolerance(sample))


@pytest.mark.parametrize(
    ("op", "ins"),
    [
        (ops.SumPool(**window(2, stride=2)), (Spec((2**20, 2**11, 1)),)),
        (ops.MaxPool(**window(2, stride=2)), (Spec((0, 8, 4)),)),
    ],
    ids=["too many elements", "no elements"],
)
def test_what_does_not_fit(op, ins):
    for template in templates(op.family, "cuda"):
        assert template.default(op, ins, op.out_specs(*ins), CARD) is None
