"""Hopper's templates on the emulator: layouts, taps, tails and splits; and what goes wrong is found."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from gpu_kernels import emulate, hopper, warpgroup
from gpu_kernels.emulate import Buffer, KernelFault, View
from gpu_kernels.grid import Grid, TensorMap
from gpu_kernels.ptx import clear, cuda, float32, store
from rapydli_flow import ops
from rapydli_flow.spec import Spec
from rapydli_flow.template import templates
from rapydli_flow.testing import gpu
from rapydli_flow.testing.gpu import CARD, assert_close, bias_residual_relu, tolerance

HALF = "bfloat16"


def of(family):
    return next(t for t in templates(family, "cuda") if t.name.startswith("wgmma"))


def matmul(m, i, k, dtype=HALF, **how):
    op = ops.Matmul(**how)
    return ops.Sample(op, (Spec((i, m) if op.ta else (m, i), dtype), Spec((k, i) if op.tb else (i, k), dtype)))


def conv(x, w, dtype=HALF, *, stride=1, padding=0, dilation=1, **how):
    """The convolution and its gradients; that of the input for stride 1."""
    n = len(x) - 2
    each = lambda value: value if isinstance(value, tuple) else (value,) * n  # noqa: E731
    pairs = tuple(p if isinstance(p, tuple) else (p, p) for p in each(padding))
    op = ops.Conv(stride=each(stride), padding=pairs, dilation=each(dilation), **how)
    x, w = Spec(x, dtype), Spec(w, dtype)
    y = Spec(op.infer(x, w).shape, dtype)
    found = [ops.Sample(op, (x, w))]
    if max(op.stride) == 1:
        found.append(ops.Sample(ops.ConvInputGrad(size=x.shape[1:-1], **op.geometry), (y, w)))
    return [*found, ops.Sample(ops.ConvFilterGrad(window=w.shape[:-2], **op.geometry), (x, y))]


SAMPLES = {
    "matmul": [matmul(200, 136, 328), matmul(64, 8, 8), matmul(200, 136, 328, "float16")],
    "matmul transposed": [matmul(200, 136, 328, ta=ta, tb=tb) for ta, tb in ((1, 0), (0, 1), (1, 1))],
    "matmul fp32": [matmul(132, 100, 140, "float32", ta=ta, tb=tb) for ta in (False, True) for tb in (False, True)],
    "matmul tf32": [
        matmul(132, 100, 140, "float32", tf32=True, ta=ta, tb=tb) for ta in (False, True) for tb in (False, True)
    ],
    "matmul to float32": [matmul(72, 40, 136, wide=True)],
    "conv to float32": conv((2, 9, 7, 24), (3, 2, 24, 40), padding=1, wide=True),
    "conv": conv((2, 10, 9, 64), (3, 3, 64, 64), padding=1),
    "conv of rests": conv((3, 7, 8, 72), (3, 2, 72, 136), stride=(2, 1), padding=((1, 0), (2, 1))),
    "conv turned": conv((2, 9, 7, 24), (3, 2, 24, 40), padding=((2, 0), (0, 1)), dilation=(1, 2)),
    "conv 1-D": conv((2, 30, 16), (4, 16, 40), padding=((2, 1),)),
    "conv 3-D": conv((2, 5, 6, 4, 8), (2, 3, 2, 8, 24), padding=((1, 0), (1, 1), (0, 0))),
    "conv fp32": conv((2, 9, 7, 36), (3, 2, 36, 68), "float32", padding=((2, 0), (0, 1))),
    "conv fp32 of stride 2": conv((2, 9, 7, 36), (3, 2, 36, 68), "float32", stride=2, padding=1),
    "conv tf32": conv((2, 9, 7, 36), (3, 2, 36, 68), "float32", padding=1, tf32=True),
}


def configs(sample):
    """The default, and others that differ in everything."""
    template, outs = of(sample.op.family), sample.op.out_specs(*sample.ins)
    default = template.default(sample.op, sample.ins, outs, CARD)
    assert default is not None
    changes = [{}, {"bm": 64, "bn": 64, "stages": 3, "blocks": 0, "group": 1}, {"bm": 256, "bn": 128, "ahead": 0}]
    changes += [{"bn": 192, "stages": 3, "ahead": 1}, {"bm": 128, "bn": 64, "ahead": 0, "blocks": 132}]
    if "splits" in template.space:
        changes = [{**change, "splits": splits} for change, splits in zip(changes, (1, 3, 2, 1, 64), strict=True)]
    found = [{**default, **change} for change in changes]
    return [config for config in found if template.fits(sample.op, sample.ins, outs, CARD, **config)]


@pytest.mark.parametrize("name", SAMPLES)
def test_equals_the_reference(name):
    rng = np.random.default_rng(1)
    for sample in SAMPLES[name]:
        values = sample.draw(rng)
        want = gpu.wanted(sample.op, values)
        tried = configs(sample)
        assert len(tried) >= 2
        for config in tried:
            got = gpu.emulated(of(sample.op.family), sample.op, values, config)
            assert_close(got, want, 2e-3 if sample.op.tf32 else tolerance(sample))


@pytest.mark.parametrize("name", ["matmul", "matmul fp32", "conv", "conv fp32", "conv to float32"])
def test_the_epilogue_is_applied_before_the_store(name):
    rng = np.random.default_rng(2)
    for sample in SAMPLES[name]:
        out = sample.op.out_specs(*sample.ins)[0]
        epilogue = bias_residual_relu(out, scaled=True)
        extras = [rng.normal(size=e.shape).astype(e.dtype) for e in epilogue.extras]
        values = sample.draw(rng)
        want = gpu.wanted(sample.op, values)[0] + np.float64(extras[0]) + np.float64(extras[1])
        want = np.maximum(want, 0) * np.float64(extras[2])
        for config in configs(sample)[:3]:
            got = gpu.emulated(of(sample.op.family), sample.op, values, config, epilogue=epilogue, extras=extras)
            assert_close(got, (want,), tolerance(sample))


def test_a_persistent_block_computes_several_tiles():
    sample = matmul(136 * 64, 72, 64)
    config = {**configs(sample)[0], "bm": 64, "bn": 64, "stages": 3, "blocks": 132}
    outs = sample.op.out_specs(*sample.ins)
    (grid,) = of("matmul").build(sample.op, sample.ins, outs, gpu.Epilogue.none(outs[0]), **config)
    assert grid.grid == 132
    values = sample.draw(np.random.default_rng(3))
    assert_close(
        gpu.emulated(of("matmul"), sample.op, values, config), gpu.wanted(sample.op, values), tolerance(sample)
    )


@pytest.mark.parametrize("cores", [20, 78, 114, 132, 144])
def test_a_persistent_grid_has_a_block_for_each_multiprocessor_of_the_card(cores):
    """Of a part of an H100, an H20, an H100 PCIe, an H200, and of what may come."""
    one = replace(CARD, cores=cores)
    for sample in (matmul(64 * 150, 72, 64), conv((150, 8, 8, 64), (3, 3, 64, 64), padding=1)[-1]):
        template, outs = of(sample.op.family), sample.op.out_specs(*sample.ins)
        config = template.default(sample.op, sample.ins, outs, one)
        assert config["blocks"] == cores
        assert config in template.space_of(sample.op, sample.ins, outs, one)
        config |= {"bm": 64, "bn": 64, "stages": 3} | ({"splits": 24} if "splits" in config else {})
        first, *_ = template.build(sample.op, sample.ins, outs, gpu.Epilogue.none(outs[0]), **config)
        assert first.grid == cores


@pytest.mark.parametrize(
    ("sample", "rule"),
    [
        (matmul(64, 64, 60), "operands as they lie"),
        (matmul(64, 64, 64, "float32", exact=True), "floats"),
        (matmul(64, 64, 64, "float64"), "floats"),
        (conv((2, 9, 9, 20), (3, 3, 20, 64))[0], "a walk of the copy engine"),
        (conv((2, 200, 9, 8), (150, 1, 8, 8), padding=(149, 0))[0], "a walk of the copy engine"),
        (conv((2, 40, 9, 8), (3, 1, 8, 8), stride=(9, 1))[0], "a walk of the copy engine"),
        (conv((2, 9, 9, 64), (3, 3, 32, 64), groups=2)[0], "a walk of the copy engine"),
    ],
)
def test_what_does_not_fit(sample, rule):
    template, outs = of(sample.op.family), sample.op.out_specs(*sample.ins)
    config = template.default(sample.op, sample.ins, outs, CARD)
    assert config is None
    first = {name: values[0] for name, values in template.values(CARD).items()}
    assert template.broken(sample.op, sample.ins, outs, CARD, first) == rule


def test_nothing_is_chosen_for_other_cards():
    sample = matmul(64, 64, 64)
    outs = sample.op.out_specs(*sample.ins)
    assert of("matmul").default(sample.op, sample.ins, outs, gpu.OLDER) is None
    assert of("matmul").default(sample.op, sample.ins, outs, replace(CARD, target="sm_100a")) is None
    assert of("matmul").default(sample.op, sample.ins, outs, CARD) is not None


# ---- twins of the copy engine and of products


def test_a_box_is_zero_outside():
    data = np.arange(1, 71, dtype=np.float16)  # 7 rows of 10
    view = View(TensorMap(0, "float16", (10, 7), (10,), (8, 4)), Buffer("x", data))
    want = np.zeros((4, 8), np.float16)
    want[:2, :6] = data.reshape(7, 10)[5:, 4:]
    np.testing.assert_array_equal(hopper._box(view, (4, 5)), want)


def test_pixels_follow_each_other_as_outputs_do():
    """Against `windows`, which is what convolutions mean."""
    x = np.arange(1, 2 * 5 * 6 * 8 + 1, dtype=np.float16).reshape(2, 5, 6, 8)
    pad, steps, tap = ((1, 1), (2, 0)), (2, 1), (1, 2)
    out = tuple((n + sum(p) - 3) // s + 1 for n, p, s in zip((5, 6), pad, steps, strict=True))
    upper = tuple(-p[0] + (o - 1) * s + 1 - n for n, p, s, o in zip((5, 6), pad, steps, out, strict=True))
    description = TensorMap(0, "float16", (8, 6, 5, 2), (8, 48, 240), (8, 64), (-2, -1), upper[::-1], steps[::-1])
    padded = np.pad(x, ((0, 0), *pad, (0, 0)))
    want = padded[:, tap[0] :: steps[0], tap[1] :: steps[1]][:, : out[0], : out[1]].reshape(-1, 8)
    got = hopper._pixels(View(description, Buffer("x", x.ravel())), (0, -2, -1, 0), tap[::-1])
    np.testing.assert_array_equal(got[: len(want)], want)
    assert not got[len(want) :].any()
    second = hopper._pixels(View(description, Buffer("x", x.ravel())), (0, -2 + 1, -1 + 2, 0), tap[::-1])
    np.testing.assert_array_equal(second[:10], want[out[1] + 1 :][:10])


def test_columns_are_gathered_from_four_threads():
    product = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    acc = warpgroup._spread(product)
    for across in range(2):
        for half in range(2):
            values = np.stack(warpgroup.columns(acc, across * 16 + half * 2))
            for thread in (0, 5, 63, 127):
                row, first = thread // 32 * 16 + half * 8 + thread % 32 // 4, across * 32 + thread % 4 * 8
                np.testing.assert_array_equal(values[:, thread], product[row, first : first + 8])


def test_places_and_rows_are_permutations():
    assert sorted(warpgroup.PLACES) == list(range(32))
    assert sorted(warpgroup.ROWS) == list(range(64))


# ---- what goes wrong is found

TILE = TensorMap(0, HALF, (64, 64), (64,), (64, 64))
READY, SPARE = hopper.start_barriers(0, 1, 1), hopper.start_barriers(1, 1, 4)


def pipeline(produce, consume, *, size_bytes=2 * hopper.CHUNK_BYTES):
    """A producer and a consumer, with barrier 0 (full) and 1 (empty), and what each does."""
    place, bars_place, own = hopper.place_of(1024), hopper.place_of(8), hopper.acquire()

    def kernel(ins, outs, work, extras, at, maps):
        tiles = place(cuda.shared.array(0, np.uint16, alignment=16))
        bars = bars_place(cuda.shared.array(2, np.int64, alignment=8))
        group = hopper.own_warpgroup()
        if group == 0:
            READY(bars)
            SPARE(bars)
        cuda.syncthreads()
        if group == 0:
            own(maps[0])
            produce(maps, bars, tiles)
        else:
            acc = cuda.local.array(32, float32)
            clear(32)(acc)
            consume(bars, tiles, acc)
            store("float32", 1)(cuda.threadIdx.x >= 0, outs[0], cuda.threadIdx.x - 128, (acc[0],))

    return Grid(kernel, 1, 256, shared_bytes=size_bytes, maps=(TILE,), roles=True)


COPY, EXPECT = hopper.copy(2), hopper.expect(2 * hopper.CHUNK_BYTES)
MULTIPLY = warpgroup.multiply(HALF, 1, 64, mn_major=(False, False))
LATER = warpgroup.multiply(HALF, 1, 64, mn_major=(False, False), left=1)
SETTLE = warpgroup.settle(32)


def two_copies(maps, bars, tiles):
    EXPECT(bars, 0)
    COPY(maps[0], bars, 0, tiles, 0, 0, 0)
    COPY(maps[0], bars, 0, tiles, 64, 0, 0)


def run(produce, consume):
    x = np.ones((64, 64), ml_dtypes.bfloat16)
    return emulate.run(pipeline(produce, consume), (x,), (Spec((128,)),))[0]


def test_a_pipeline():
    def consume(bars, tiles, acc):
        hopper.wait(bars, 0, 0)
        MULTIPLY(acc, tiles, 0, 64)
        SETTLE(acc)

    np.testing.assert_array_equal(run(two_copies, consume), np.full(128, 64))


def test_reading_before_the_copy_is_there():
    """That the copy happens to be done already does not help."""

    def consume(bars, tiles, acc):
        MULTIPLY(acc, tiles, 0, 64)

    with pytest.raises(KernelFault, match="reads shared memory before the copy to it was waited for"):
        run(two_copies, consume)


def test_overwriting_what_a_product_reads():
    """The consumer says that a stage is free while its product is under way."""

    def produce(maps, bars, tiles):
        two_copies(maps, bars, tiles)
        hopper.wait(bars, 1, 0)
        two_copies(maps, bars, tiles)

    def consume(bars, tiles, acc):
        hopper.wait(bars, 0, 0)
        LATER(acc, tiles, 0, 64)
        hopper.arrive(bars, 1)
        hopper.wait(bars, 0, 1)

    with pytest.raises(KernelFault, match="overwritten while a product reads it"):
        run(produce, consume)


def test_overwriting_what_is_on_its_way():
    def produce(maps, bars, tiles):
        EXPECT(bars, 0)
        COPY(maps[0], bars, 0, tiles, 0, 0, 0)
        COPY(maps[0], bars, 0, tiles, 32, 0, 0)

    with pytest.raises(KernelFault, match="begins while another to the same lines is under way"):
        run(produce, lambda bars, tiles, acc: hopper.wait(bars, 0, 0))


def test_too_many_bytes():
    def produce(maps, bars, tiles):
        hopper.expect(hopper.CHUNK_BYTES)(bars, 0)
        COPY(maps[0], bars, 0, tiles, 0, 0, 0)
        COPY(maps[0], bars, 0, tiles, 64, 0, 0)  # of the next phase

    with pytest.raises(KernelFault, match="8192 bytes are under way when a block ends"):
        run(produce, lambda bars, tiles, acc: hopper.wait(bars, 0, 0))


def test_a_deadlock_is_a_fault():
    def produce(maps, bars, tiles):
        hopper.expect(3 * hopper.CHUNK_BYTES)(bars, 0)
        COPY(maps[0], bars, 0, tiles, 0, 0, 0)

    with pytest.raises(KernelFault, match=r"deadlock: warpgroups \[1\] wait"):
        run(produce, lambda bars, tiles, acc: hopper.wait(bars, 0, 0))


def test_too_many_arrivals():
    def consume(bars, tiles, acc):
        hopper.wait(bars, 0, 0)
        hopper.arrive(bars, 0)

    with pytest.raises(KernelFault, match="threads arrive at a barrier of 1"):
        run(two_copies, consume)


def test_a_barrier_that_was_never_started():
    with pytest.raises(KernelFault, match="barrier 7 is used but was never started"):
        run(two_copies, lambda bars, tiles, acc: hopper.wait(bars, 7, 0))
