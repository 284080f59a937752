"""Templates that slide windows or move data, on the emulator: several blocks, tails, ties, what must not fit."""

import numpy as np
import pytest

from rapydli_flow import ops
from rapydli_flow.ops import Sample
from rapydli_flow.spec import DTYPES, HALVES, Spec
from rapydli_flow.template import Epilogue, Scalar, templates
from rapydli_flow.testing.gpu import (
    CARD,
    OLDER,
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


def serving(sample):
    """The templates that fit, which are some."""
    outs = sample.op.out_specs(*sample.ins)
    found = [t for t in templates(sample.op.family, "cuda") if t.default(sample.op, sample.ins, outs, CARD)]
    assert found
    return found


def check(sample, *, count=4, dtype=None):
    """Every template of the op, in several configs."""
    stored = as_dtype(sample, dtype) if dtype else sample
    values = stored.draw(np.random.default_rng(5))
    want = wanted(stored.op, values)
    for template in serving(stored):
        for config in chosen(template, stored, seed=11, count=count):
            assert_close(emulated(template, stored.op, values, config), want, tolerance(stored))


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


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_of_equal_values_the_first_wins_and_a_nan_wins_over_all(dtype):
    op = ops.MaxPool(**window(3, 3, stride=2, padding=(1, 1)))
    rng = np.random.default_rng(3)
    x = rng.integers(-1, 2, (2, 9, 9, 8)).astype(dtype)
    x[x == 0] *= rng.choice(np.array([-1, 1], dtype), x[x == 0].shape)  # zeros of both signs are equal
    x[rng.random(x.shape) < 0.1] = np.nan
    x[rng.random(x.shape) < 0.05] = -np.nan
    x[1, :4, :4] = -np.inf
    y, argmax = op.run(x)
    (template,) = templates("max_pool", "cuda")
    configs = chosen(template, Sample(op, (Spec(x.shape, dtype),)), seed=2)
    assert {config["pairs"] for config in configs} == ({0} if dtype == "float32" else {0, 1})
    for config in configs:
        got, tap = emulated(template, op, [x], config)
        np.testing.assert_array_equal(tap, argmax)
        np.testing.assert_array_equal(np.float32(got), np.float32(y))
    assert np.isnan(np.float32(y)).any()
    assert (y == -np.inf).any()


def test_bfloat16_is_compared_in_pairs_from_sm_90_on():
    op = ops.MaxPool(**window(3, 3, stride=2))
    (template,) = templates("max_pool", "cuda")
    for dtype, older in (("bfloat16", 0), ("float16", 1)):
        ins = (Spec((8, 55, 55, 64), dtype),)
        outs = op.out_specs(*ins)
        assert template.default(op, ins, outs, CARD)["pairs"] == 1
        assert template.default(op, ins, outs, OLDER)["pairs"] == older


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_cast_to_every_other(dtype, to):
    check(Sample(ops.Cast(to=to), (Spec((37, 12), dtype),), {0: (0, 9)}), count=2)


def test_numbers_without_axes():
    """Rates, and operands that are one number."""
    for sample in (
        Sample(ops.Multiply(), (Spec(()), Spec(()))),
        Sample(ops.Multiply(), (Spec((300, 20)), Spec(()))),
        Sample(ops.Multiply(), (Spec((1, 1)), Spec((300, 20)))),
        Sample(ops.StepDecay(rate=0.1, factor=0.5, every=3), (Spec((), "int64"),), {0: (0, 9)}),
        Sample(ops.ClipFactor(), (Spec(()),), {0: (0.2, 4.0)}),
        Sample(ops.Momentum(), (*[Spec((7, 33))] * 3, Spec(()))),
        Sample(ops.Where(), (*[Spec((40, 31))] * 2, Spec((31,)))),
    ):
        check(sample, count=3)


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
    for template in serving(sample):
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


def part(x, starts, stops, steps, dtype="float32"):
    return Sample(ops.Slice(starts=starts, stops=stops, steps=steps), (Spec(x, dtype),))


def back(x, starts, steps, shape):
    return Sample(ops.SliceGrad(starts=starts, steps=steps, shape=shape), (Spec(x),))


def turn(x, *order, dtype="float32"):
    return Sample(ops.Transpose(order=order), (Spec(x, dtype),))


def join(axis, *xs, dtype="float32"):
    return Sample(ops.Concatenate(axis=axis), tuple(Spec(x, dtype) for x in xs))


RESPONSES = [
    Sample(cls(**attributes), (Spec(x),) * operands)
    for cls, operands in ((ops.LocalResponse, 1), (ops.LocalResponseGrad, 2))
    for attributes, x in (
        ({"alpha": 0.8, "k": 2.0}, (2, 9, 7, 48)),
        ({"size": 4, "alpha": 1.3, "beta": 0.6}, (37, 21)),
        ({"size": 9, "alpha": 1.1}, (3, 5, 16)),  # wider than vectors, than half of the channels
        ({"size": 1, "alpha": 0.5, "k": 0.5}, (600, 2)),
    )
]
COPIES = [
    part((9, 17, 40), (1, 0, 8), (8, None, 32), (1, 2, 1)),
    part((70, 33), (3, 1), (None, 32), (2, 3)),
    part((64, 30), (5, 0), (60, None), (1, 1), "int64"),
    part((50, 24), (0, 4), (None, 20), (1, 1), "uint8"),
    back((7, 9, 24), (1, 0, 8), (1, 2, 1), (9, 18, 40)),
    back((33, 10), (3, 1), (2, 3), (70, 33)),
    Sample(ops.Pad(low=(0, 1, 2, 0), high=(0, 3, 0, 0), value=0.5), (Spec((3, 10, 11, 12)),)),
    Sample(ops.Pad(low=(2, 5), high=(1, 6)), (Spec((40, 29)),)),
    Sample(ops.Pad(low=(2, 4), high=(1, 8), value=3.0), (Spec((40, 28), "int64"),)),
    join(3, (2, 7, 5, 16), (2, 7, 5, 64), (2, 7, 5, 8), (2, 7, 5, 8)),
    join(1, (5, 30), (5, 1), (5, 70)),
    join(0, (33, 12), (2, 12), dtype="uint8"),
    turn((3, 21, 19, 16), 0, 2, 1, 3),
    turn((70, 130), 1, 0),
    turn((2, 9, 13, 40), 0, 3, 1, 2),  # channels first
    turn((2, 40, 9, 13), 0, 2, 3, 1),  # and last again
    turn((2, 3, 30, 40), 0, 2, 3, 1),
    turn((16, 6, 5, 24), 3, 1, 2, 0),
    turn((37, 41, 3), 2, 1, 0, dtype="int64"),
    Sample(ops.Reshape(shape=(12, 33)), (Spec((9, 4, 99)),)),
]


def adaptive(x, *size):
    """Pooling to a size, and its gradients."""
    x = Spec(x)
    y, argmax = ops.AdaptiveMaxPool(size=size).infer(x)
    return [
        Sample(ops.AdaptiveAvgPool(size=size), (x,)),
        Sample(ops.AdaptiveMaxPool(size=size), (x,)),
        Sample(ops.AdaptiveAvgPoolGrad(size=x.shape[1:-1]), (y,)),
        Sample(ops.AdaptiveMaxPoolGrad(size=x.shape[1:-1]), (y, argmax), {1: (0, int(np.prod(x.shape[1:-1])))}),
    ]


def resize(x, *size):
    """Interpolation to a size, and the gradient of that from there."""
    there = Spec((x[0], *size, x[-1]))
    return [Sample(ops.Resize(size=size), (Spec(x),)), Sample(ops.ResizeGrad(size=x[1:-1]), (there,))]


def embedding(size, length, *places, dtype="int64", reach=None):
    ids = Spec(places, dtype)
    bounds = {1: (0, reach or size)}
    return [
        Sample(ops.Embedding(), (Spec((size, length)), ids), {1: (0, size)}),
        Sample(ops.EmbeddingGrad(vocabulary=size), (Spec((*places, length)), ids), bounds),
    ]


PLACED = [
    *adaptive((3, 13, 11, 40), 6, 5),
    *adaptive((2, 3, 7, 24), 5, 7),
    *adaptive((2, 21, 23, 4), 1, 1),
    *resize((2, 9, 7, 24), 21, 14),
    *resize((3, 17, 12, 8), 5, 12),
    *resize((2, 31, 6), 7),
    *resize((1, 3, 4, 5, 16), 6, 4, 9),
    *embedding(37, 24, 19, 11),
    *embedding(5, 3, 130, dtype="uint8"),
    *embedding(300, 16, 400, dtype="int32", reach=3),  # few rows have all places, most have none
    Sample(ops.Gather(axis=1), (Spec((3, 50, 7)), Spec((3, 21, 7), "int32")), {1: (0, 50)}),
    Sample(ops.GatherGrad(axis=1, size=30), (Spec((3, 21, 7)), Spec((3, 21, 7), "int64")), {1: (0, 30)}),
]


@pytest.mark.parametrize("sample", PLACED, ids=titles(PLACED))
def test_what_is_placed_by_numbers(sample):
    check(sample)


PLACED_TAILED = [s for s in PLACED if len(s.op.out_specs(*s.ins)) == 1][:20]


@pytest.mark.parametrize("sample", PLACED_TAILED, ids=titles(PLACED_TAILED))
def test_tails_of_what_is_placed_by_numbers(sample):
    check_tail(sample)


@pytest.mark.parametrize("family", ["gather", "embedding"])
def test_numbers_outside_of_the_axis_give_nan_and_no_gradient(family):
    numbers = np.array([[0, -1], [7, 5], [2**40, 3], [-(2**40), 6]])
    outside = (numbers < 0) | (numbers >= 7)
    x, dy = np.ones((7, 2), np.float32), np.ones((4, 2), np.float32)
    op, back = ops.Gather(axis=0), ops.GatherGrad(axis=0, size=7)
    if family == "embedding":
        op, back, dy = ops.Embedding(), ops.EmbeddingGrad(vocabulary=7), np.ones((4, 2, 2), np.float32)
    for one, values in ((op, [x, numbers]), (back, [dy, numbers])):
        sample = Sample(one, tuple(Spec(v.shape, v.dtype.name) for v in values))
        for template in serving(sample):
            for config in chosen(template, sample, seed=2, count=2):
                (got,) = emulated(template, one, values, config)
                np.testing.assert_array_equal(got, one.run(*values)[0])
                if one is op:
                    np.testing.assert_array_equal(np.isnan(got).reshape(4, 2, -1).any(-1), outside)


def test_the_first_of_equal_values_wins_a_bin_and_a_nan_wins_over_all():
    op = ops.AdaptiveMaxPool(size=(3, 4))
    rng = np.random.default_rng(3)
    x = rng.integers(0, 3, (2, 7, 9, 8)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    x[1, :4, :4] = -np.inf
    y, argmax = op.run(x)
    (template,) = templates("adaptive_max_pool", "cuda")
    for config in chosen(template, Sample(op, (Spec(x.shape),)), seed=2, count=3):
        got, place = emulated(template, op, [x], config)
        np.testing.assert_array_equal(place, argmax)
        np.testing.assert_array_equal(got, y)


@pytest.mark.parametrize("sample", RESPONSES, ids=titles(RESPONSES))
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_local_response_of_several_blocks(sample, dtype):
    check(sample, dtype=dtype)


@pytest.mark.parametrize("sample", COPIES, ids=titles(COPIES))
def test_copies_of_several_blocks(sample):
    check(sample)


@pytest.mark.parametrize("sample", COPIES, ids=titles(COPIES))
def test_copies_of_halves(sample):
    if sample.ins[0].floating:
        check(sample, dtype="bfloat16", count=3)


TAILED_COPIES = [*RESPONSES[:2], *RESPONSES[4:6], *(s for s in COPIES if s.ins[0].dtype == "float32")]


@pytest.mark.parametrize("sample", TAILED_COPIES, ids=titles(TAILED_COPIES))
def test_tails_of_copies(sample):
    check_tail(sample)


def test_a_tail_of_a_slice_reads_an_operand_where_the_slice_is_read():
    """relu's gradient behind a slice: the other operand has the shape of what was sliced."""
    sample = part((9, 17, 40), (1, 0, 8), (8, None, 32), (1, 2, 1))
    rng = np.random.default_rng(1)
    x, y = sample.draw(rng)[0], rng.normal(size=(9, 17, 40)).astype(np.float32)
    (out,) = sample.op.out_specs(*sample.ins)
    scalar = Scalar(("v", "e0"), ("t0 = (v if e0 > T(0.0) else T(0.0))",), ("t0",))
    epilogue = Epilogue(scalar, (Spec(y.shape),), out, Spec(x.shape))
    want = sample.op.run(np.where(y > 0, x, np.float32(0)))
    (template,) = templates("slice", "cuda")
    for config in chosen(template, sample, seed=3, count=4):
        assert_close(emulated(template, sample.op, [x], config, epilogue=epilogue, extras=[y]), want, 1e-6)


def test_what_moves_the_last_axis_goes_through_tiles():
    for sample, name in ((COPIES[12], "reordered"), (COPIES[13], "turned"), (COPIES[14], "turned")):
        assert [template.name for template in serving(sample)] == [name]
