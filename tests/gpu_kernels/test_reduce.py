"""Reductions on the emulator at sizes that fill several blocks and slabs, with epilogues, and bad operands."""

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


def sums(shape, axes):
    return Sample(ops.Sum(axes=axes), (Spec(shape),))


def scores(op, n, k):
    return Sample(op, (Spec((n, k)), Spec((n,), "int64")), {1: (0, k)})


BIGGER = {
    "channels kept": sums((4, 40, 40, 12), (0, 1, 2)),
    "few channels": sums((4, 64, 64, 3), (0, 1, 2)),
    "everything": sums((100, 1031), (0, 1)),
    "rows of 10": sums((333, 10), (1,)),
    "middle": sums((3, 70, 20), (1,)),
    "first and last": sums((30, 7, 24), (0, 2)),
    "moments": Sample(ops.Moments(), (Spec((3, 40, 40, 20)), Spec((20,)))),
    "moments of 3": Sample(ops.Moments(), (Spec((2, 64, 64, 3)), Spec((3,)))),
    "normalize sums": Sample(ops.NormalizeSums(), (*[Spec((2, 30, 31, 8))] * 2, *[Spec((8,))] * 2), {3: (0.5, 2.0)}),
    "softmax": Sample(ops.Softmax(), (Spec((3, 1000)),)),
    "long softmax": Sample(ops.Softmax(), (Spec((2, 5003)),)),
    "cross entropy": scores(ops.CrossEntropy(smoothing=0.1), 3, 3001),
    "correct": scores(ops.Correct(), 5, 777),
    "layer norm": Sample(ops.Standardize(), (Spec((5, 1024)),)),
    "max": Sample(ops.Max(axes=(0, 1)), (Spec((40, 30, 12)),)),
    "argmax": Sample(ops.ArgMax(axes=(0,)), (Spec((900, 12)),)),
}


def cases():
    for name, sample in BIGGER.items():
        for template in templates(sample.op.family, "cuda"):
            for dtype in ("float32", "bfloat16"):
                stored = as_dtype(sample, dtype)
                if template.default(stored.op, stored.ins, stored.op.out_specs(*stored.ins), CARD):
                    yield pytest.param(template, stored, id=f"{name}-{template.name}-{dtype}".replace(" ", "-"))


@pytest.mark.parametrize(("template", "sample"), list(cases()))
def test_bigger(template, sample):
    values = sample.draw(np.random.default_rng(5))
    want = wanted(sample.op, values)
    for config in chosen(template, sample, seed=1, count=3)[:6]:
        assert_close(emulated(template, sample.op, values, config), want, 2 * tolerance(sample))


@pytest.mark.parametrize("name", ["channels kept", "few channels", "rows of 10", "middle", "softmax", "layer norm"])
def test_epilogue_is_applied_before_the_store(name):
    sample, rng = BIGGER[name], np.random.default_rng(6)
    epilogue = bias_residual_relu(sample.op.out_specs(*sample.ins)[0])
    extras = [np.asarray(rng.normal(size=extra.shape), np.float32) for extra in epilogue.extras]
    values = sample.draw(rng)
    want = np.maximum(wanted(sample.op, values)[0] + extras[0] + extras[1], 0)
    for template in templates(sample.op.family, "cuda"):
        if config := template.default(sample.op, sample.ins, sample.op.out_specs(*sample.ins), CARD):
            got = emulated(template, sample.op, values, config, epilogue=epilogue, extras=extras)
            assert_close(got, (want,), tolerance(sample))


def test_streamed_rows_without_a_rest():
    sample = Sample(ops.Softmax(), (Spec((2, 4096)),))
    values = sample.draw(np.random.default_rng(0))
    config = {"threads": 128, "group": 128, "vector": 4, "items": 4, "held": False}
    got = emulated(templates("softmax", "cuda")[0], sample.op, values, config, as_compiled=True)
    assert_close(got, wanted(sample.op, values), tolerance(sample))


def of_default(sample, values):
    template = templates(sample.op.family, "cuda")[0]
    config = template.default(sample.op, sample.ins, sample.op.out_specs(*sample.ins), CARD)
    return emulated(template, sample.op, values, config)


@pytest.mark.parametrize("label", [-1, 7, 2**40])
def test_a_label_that_is_no_class_is_no_number(label):
    x, labels = np.zeros((2, 7), np.float32), np.asarray([label, 3])
    for op in (ops.CrossEntropy(), ops.Hinge(), ops.AtLabel()):
        (y,) = of_default(scores(op, 2, 7), (x, labels))
        assert np.isnan(y).tolist() == [True, False]


def test_nan_is_the_largest():
    x = np.asarray([[1, np.nan, 3, np.nan], [5, 2, 5, 1]], np.float32)
    sample = Sample(ops.ArgMax(axes=(1,)), (Spec(x.shape),))
    for template in templates("arg_extreme", "cuda"):
        config = template.default(sample.op, sample.ins, sample.op.out_specs(*sample.ins), CARD)
        (where,) = emulated(template, sample.op, (x,), config)
        assert where.tolist() == [1, 0]


def test_float64_and_what_32_bits_do_not_index_are_left_out():
    for spec in (Spec((8, 8), "float64"), Spec((2**16, 2**15))):
        sample = Sample(ops.Sum(axes=(0,)), (spec,))
        for template in templates("sum", "cuda"):
            assert template.default(sample.op, sample.ins, sample.op.out_specs(spec), CARD) is None
