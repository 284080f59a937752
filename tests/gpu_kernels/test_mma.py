"""Tensor-core templates on the emulator: several blocks, epilogues, rounding, and what must not fit."""

from dataclasses import replace

import numpy as np
import pytest

from gpu_kernels import emulate, tensor_core
from gpu_kernels.async_tiles import Layout, commit, copy_async, in_shared, layout_of, wait
from gpu_kernels.emulate import KernelFault
from gpu_kernels.grid import Grid
from gpu_kernels.ptx import cuda, store, take
from gpu_kernels.specialise import flatten
from gpu_kernels.tensor_core import SPLIT, Operand
from rapydli_flow import ops
from rapydli_flow.ops import Sample
from rapydli_flow.spec import HALVES, Block, Spec
from rapydli_flow.template import Device, Epilogue, templates
from rapydli_flow.testing import gpu
from rapydli_flow.testing.gpu import CARD, assert_close, bias_residual_relu, chosen, emulated, tolerance

FLOATS = ("float32", *HALVES)


def of(family):
    """The tensor-core template of a family."""
    return next(t for t in templates(family, "cuda") if t.name == "tensor_cores")


def matmul(m, i, k, **how):
    op = ops.Matmul(**how)
    return Sample(op, (Spec((i, m) if op.ta else (m, i)), Spec((k, i) if op.tb else (i, k))))


def conv(x, w, *, stride=1, padding=(0, 0), dilation=1, **how):
    n = len(x) - 2
    op = ops.Conv(stride=(stride,) * n, padding=(padding,) * n, dilation=(dilation,) * n, **how)
    return Sample(op, (Spec(x), Spec(w)))


def gradients(sample):
    """Of the input and of the filters of a convolution."""
    op, (x, w) = sample.op, sample.ins
    (y,) = op.out_specs(x, w)
    yield Sample(ops.ConvInputGrad(size=x.shape[1:-1], **op.geometry), (y, w))
    yield Sample(ops.ConvFilterGrad(window=w.shape[:-2], **op.geometry), (x, y))


CONVOLUTIONS = [
    conv((2, 13, 11, 5), (3, 3, 5, 37), padding=(1, 1)),
    conv((1, 9, 9, 64), (3, 3, 64, 72), padding=(1, 1)),
    conv((2, 15, 15, 16), (3, 3, 16, 40), stride=2, padding=(1, 1)),
    conv((2, 15, 15, 16), (1, 1, 16, 40), stride=2),
    conv((1, 15, 15, 8), (4, 4, 8, 40), stride=2, padding=(3, 3), dilation=2),
    conv((2, 13, 11, 16), (3, 3, 4, 24), padding=(1, 1), groups=4),
    conv((1, 17, 15, 4), (5, 3, 4, 68), stride=3, padding=(2, 0)),
    conv((2, 12, 11, 3), (3, 2, 3, 7), padding=(-1, -2)),
    conv((1, 9, 10, 8), (3, 3, 8, 33), padding=(4, 5), dilation=2),
    conv((2, 150, 3), (7, 3, 10), stride=2, padding=(3, 3)),
    conv((1, 5, 6, 7, 2), (3, 3, 3, 2, 9), padding=(1, 0)),
]
PRODUCTS = [matmul(136, 72, 200, ta=ta, tb=tb) for ta in (False, True) for tb in (False, True)]
BATCHES = [
    Sample(ops.BatchMatmul(), (Spec((3, 2, 70, 40)), Spec((3, 2, 40, 36)))),
    Sample(ops.BatchMatmul(ta=True, tb=True), (Spec((3, 40, 132)), Spec((3, 68, 40)))),
]
SAMPLES = [*PRODUCTS, *BATCHES, *CONVOLUTIONS, *(s for c in CONVOLUTIONS for s in gradients(c))]


def name(sample):
    return f"{sample.op.name}-{'-'.join(map(str, sample.ins))}"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sample", SAMPLES, ids=name)
def test_several_blocks(sample, dtype):
    template, stored = of(sample.op.family), gpu.as_dtype(sample, dtype)
    if template.default(stored.op, stored.ins, stored.op.out_specs(*stored.ins), CARD) is None:
        assert dtype in HALVES
        assert any(spec.shape[-1] // getattr(sample.op, "groups", 1) % 2 for spec in sample.ins)
        return
    values = stored.draw(np.random.default_rng(7))
    want = gpu.wanted(stored.op, values)
    for config in chosen(template, stored, seed=3, count=3)[: 4 if dtype == "float32" else 2]:
        assert_close(emulated(template, stored.op, values, config), want, tolerance(stored))


FUSED = [PRODUCTS[0], BATCHES[0], CONVOLUTIONS[2], CONVOLUTIONS[5], *gradients(CONVOLUTIONS[2])]


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sample", FUSED, ids=name)
def test_epilogue_is_applied_before_the_store(sample, dtype, splits):
    template, stored, rng = of(sample.op.family), gpu.as_dtype(sample, dtype), np.random.default_rng(1)
    (out,) = stored.op.out_specs(*stored.ins)
    epilogue, values = bias_residual_relu(out, scaled=True), stored.draw(rng)
    extras = [np.asarray(rng.normal(size=e.shape), dtype) for e in epilogue.extras]
    bias, residual, scale = (np.float64(extra) for extra in extras)
    want = np.maximum(gpu.wanted(stored.op, values)[0] + bias + residual, 0) * scale
    config = {**template.default(stored.op, stored.ins, (out,), CARD), "bk": 16, "splits": splits}
    if not template.fits(stored.op, stored.ins, (out,), CARD, **config):
        assert splits > 1  # a phase has fewer terms
        return
    got = emulated(template, stored.op, values, config, epilogue=epilogue, extras=extras)
    assert_close(got, (want,), tolerance(stored))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("sample", [PRODUCTS[0], *gradients(conv((2, 15, 15, 40), (3, 3, 40, 72), stride=2))], ids=name)
def test_dropout_in_an_epilogue_counts_in_the_whole_array(sample, splits):
    """Also where a kernel's rows are pixels of a phase, and where a second kernel adds up."""
    template, rng = of(sample.op.family), np.random.default_rng(4)
    (out,), values = sample.op.out_specs(*sample.ins), sample.draw(rng)
    clock, dropout = (np.asarray(1 << 35), np.asarray(11)), ops.Dropout(rate=0.5, stream=4)
    lo = tuple(range(1, len(out.shape) + 1))
    at = Block(lo, tuple(np.add(lo, out.shape)), tuple(np.add(lo, out.shape) + 5))
    extras = (Spec((), "int64"), Spec((), "int64"))
    epilogue = Epilogue(dropout.scalar(("v", "e0", "e1")), extras, out)
    config = {**template.default(sample.op, sample.ins, (out,), CARD), "bk": 16, "splits": splits}
    got = emulated(template, sample.op, values, config, epilogue=epilogue, extras=clock, at=at)
    want = dropout.run(gpu.wanted(sample.op, values)[0], *clock, at=at)
    assert_close(got, want, tolerance(sample))
    assert 0.3 < np.mean(want[0] == 0) < 0.7


# ---- arithmetic


def errors(k, low, **how):
    """Relative to the largest result: of float32 fused multiply-adds in their order, and of the template.

    The emulator truncates where tensor cores do.
    """
    sample, rng = matmul(64, k, 64, **how), np.random.default_rng(3)
    template, (a, b) = of("matmul"), [rng.uniform(low, 1, s.shape).astype(np.float32) for s in sample.ins]
    want = gpu.wanted(sample.op, (a, b))[0]
    plain = np.zeros(want.shape, np.float32)
    for i in range(k):
        plain = (plain + np.float64(a[:, i : i + 1]) * b[i]).astype(np.float32)
    config = {**template.default(sample.op, sample.ins, sample.op.out_specs(*sample.ins), CARD), "splits": 1}
    found = plain, emulated(template, sample.op, (a, b), config)[0]
    return [float(np.abs(y - want).max() / np.abs(want).max()) for y in found]


@pytest.mark.parametrize("low", [-1, 0])  # sums that stay small, and sums that grow
def test_long_sums_of_three_products_are_as_good_as_float32(low):
    plain, split = errors(4096, low)
    assert split < plain
    assert split < 1.5e-6


def test_tensor_cores_truncate():
    x = np.asarray([1 + 2.0**-24, -1 - 2.0**-24, 1 + 2.0**-23, 1 - 2.0**-25, 2.0**-30])
    np.testing.assert_array_equal(tensor_core.toward_zero(x), [1, -1, 1 + 2.0**-23, 1 - 2.0**-24, 2.0**-30])


def test_one_product_of_tf32_is_coarser():
    assert 1e-5 < errors(1024, -1, tf32=True)[1] < 1e-3


def test_rounding_to_tf32():
    one, last = np.float32(1), np.float32(2**-10)
    x = np.asarray([1, 1 + last / 2, 1 + last / 2 - 2**-23, -1 - last / 2, 0, -0.0, np.inf], np.float32)
    np.testing.assert_array_equal(tensor_core.rounded(x), [1, one + last, 1, -one - last, 0, -0.0, np.inf])
    assert np.isnan(tensor_core.rounded(np.asarray([np.nan], np.float32)))
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    high = tensor_core.rounded(x)
    assert np.abs(x - high).max() <= 2**-11 * np.abs(x).max()
    low = tensor_core.truncated(x - high)
    assert np.all(np.abs(np.float64(x) - high - low) <= 2.0**-22 * np.abs(x))


def test_rounding_by_two_products_is_to_nearest():
    sizes = np.float32(10) ** np.arange(-10, 10).repeat(1000)
    x = np.random.default_rng(1).normal(size=20000).astype(np.float32) * sizes
    x = np.concatenate([x, np.float32([1, 1.9998, 2 - 2**-22, 2, -3, 0])])
    found = tensor_core.nearest(x)
    np.testing.assert_array_equal(found, tensor_core.truncated(found))
    assert np.all(np.abs(np.float64(found) - x) <= 2.0**-11 * np.abs(x))
    assert np.mean(found == tensor_core.rounded(x)) > 0.999  # all but ties, and those next to a power of two
    assert not np.isfinite(tensor_core.nearest(np.float32([np.nan, 1e38]))).any()


def test_kind_of_product_is_a_property_of_the_op():
    assert tensor_core.kind_of(ops.Matmul(), "float32") == SPLIT
    assert tensor_core.kind_of(ops.Matmul(tf32=True), "float32") == "tf32"
    assert {tensor_core.kind_of(ops.Matmul(tf32=True), dtype) for dtype in HALVES} == {"half"}


# ---- shared memory

LAYOUTS = [
    (dtype, rows, left, pitch)
    for dtype in ("float32", "bfloat16")
    for rows in (True, False)
    for left in (True, False)
    for pitch in ((16, 32, 64) if rows else (64, 128, 256) if left else (32, 64, 128, 256))
]


@pytest.mark.parametrize(("dtype", "rows", "left", "pitch"), LAYOUTS)
def test_reads_meet_no_bank_twice(dtype, rows, left, pitch):
    """Eight threads at a time read 16 bytes each: all 32 banks once."""
    layout = layout_of(dtype, lines=64, pitch=pitch, rows=rows, left=left)
    operand = Operand(dtype, 64 if left else 32, rows, left, layout)
    own = operand.own(np.arange(32), 0)
    for step in range(min(layout.pitch if rows else layout.lines, 32) // operand.depth):
        for x, p, _ in operand.loads(step):
            chunks = ((own ^ x) + p).reshape(4, 8) // layout.chunk % 8
            if operand.matrices:
                assert all(len(set(chunks[matrix])) == 8 for matrix in range(4))
            else:  # lanes that are served together
                assert all(len(set(chunks[quarter])) == 8 for quarter in range(4))


@pytest.mark.parametrize(("dtype", "rows", "left", "pitch"), LAYOUTS)
def test_a_layout_has_a_place_for_each_element(dtype, rows, left, pitch):
    layout = layout_of(dtype, lines=64, pitch=pitch, rows=rows, left=left)
    line, column = np.divmod(np.arange(layout.size), pitch)
    places = layout.place(line, column)
    assert sorted(places) == list(range(layout.size))
    for far in (4, 16, 32):  # from lines 0 to 3
        x, p = layout.move(far, 0)
        near = line < 4
        np.testing.assert_array_equal((places[near] ^ x) + p, layout.place(line[near] + far, column[near]))


def copying(*, waits=True, barriers=1, again=False):
    """Reverses 32 numbers through shared memory, by asynchronous copies."""
    begin, arrived, write = copy_async("float32", 1), wait(0), store("float32", 1)

    def kernel(ins, outs, work, extras, at):
        shared = cuda.shared.array(0, in_shared("float32"), alignment=1024)
        thread = cuda.threadIdx.x
        begin(thread < 31, ins[0], thread, shared, thread)
        commit()
        if waits:
            arrived()
        for _ in range(barriers):
            cuda.syncthreads()
        found = shared.read(31 - thread)
        if again:
            begin(thread < 31, ins[0], thread, shared, thread)
        write(thread < 32, outs[0], thread, (found,))

    return Grid(kernel, 1, 32, 128)


def test_asynchronous_copies_give_zeros_where_inactive():
    x = np.arange(1, 33, dtype=np.float32)
    (y,) = emulate.run(copying(), (x,), (Spec((32,)),))
    np.testing.assert_array_equal(y, [0, *x[30::-1]])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"waits": False}, "read while an asynchronous copy to it is under way"),
        ({"barriers": 0}, "read before the barrier"),
        ({"again": True}, "overwritten before the barrier after its last read"),
    ],
)
def test_copies_without_wait_or_barrier_are_faults(how, message):
    with pytest.raises(KernelFault, match=message):
        emulate.run(copying(**how), (np.zeros(32, np.float32),), (Spec((32,)),))


def test_a_wait_leaves_the_newest_groups_under_way():
    begin, arrived, write, pick = copy_async("float32", 1), wait(1), store("float32", 1), take(1)

    def kernel(place):
        def body(ins, outs, work, extras, at):
            shared = cuda.shared.array(0, in_shared("float32"), alignment=1024)
            held = cuda.local.array(1, np.float32)
            thread = cuda.threadIdx.x
            for group in range(2):
                begin(thread < 32, ins[0], thread, shared, group * 32 + thread)
                commit()
            arrived()
            cuda.syncthreads()
            held[0] = shared.read(place + thread)
            write(thread < 32, outs[0], thread, pick(held, 0))

        return Grid(body, 1, 32, 256)

    x = np.arange(32, dtype=np.float32)
    (y,) = emulate.run(kernel(0), (x,), (Spec((32,)),))
    np.testing.assert_array_equal(y, x)
    with pytest.raises(KernelFault, match="under way"):
        emulate.run(kernel(32), (x,), (Spec((32,)),))


def test_dynamic_shared_memory_is_one_array():
    def kernel(ins, outs, work, extras, at):
        cuda.shared.array(0, np.float32)
        cuda.shared.array(0, np.float32)

    with pytest.raises(KernelFault, match="no dynamic shared memory, or it is taken"):
        emulate.run(Grid(kernel, 1, 32, 128), (), (Spec((1,)),))


# ---- the text that is compiled


@pytest.mark.parametrize("sample", [PRODUCTS[0], CONVOLUTIONS[5], *gradients(CONVOLUTIONS[2])], ids=name)
def test_text_computes_what_the_kernel_does(sample):
    """What is compiled, run by the emulator: procedures are written into it, and their names must not meet."""
    template, values = of(sample.op.family), sample.draw(np.random.default_rng(2))
    outs = sample.op.out_specs(*sample.ins)
    config = template.default(sample.op, sample.ins, outs, CARD)
    work = template.workspace(sample.op, sample.ins, outs, **config)

    def of_text(grid):
        flat = flatten(grid.kernel, ins=len(values), outs=1, work=len(work), extras=0)
        scope = {**flat.names, "cuda": cuda}
        exec(flat.source, scope)
        kernel = scope["kernel"]
        return replace(grid, kernel=lambda ins, outs, work, extras, at: kernel(*ins, *outs, *work, *extras, at))

    built = template.build(sample.op, sample.ins, outs, Epilogue.none(outs[0]), **config)
    got = emulate.run(tuple(map(of_text, built)), values, outs, work=work)
    assert_close(got, gpu.wanted(sample.op, values), tolerance(sample))


# ---- what must not fit


def default(sample, card=CARD):
    return of(sample.op.family).default(sample.op, sample.ins, sample.op.out_specs(*sample.ins), card)


def test_what_does_not_fit_is_left_out():
    plain = PRODUCTS[0]
    assert default(plain)
    assert default(Sample(replace(plain.op, exact=True), plain.ins)) is None
    assert default(gpu.as_dtype(plain, "float64")) is None
    assert default(plain, Device("cuda", "an old card", target="sm_75", cores=68)) is None
    assert default(conv((1, 40, 40, 4), (20, 20, 4, 8), padding=(9, 9))) is None  # 40 taps are more than 31 bits
    assert default(conv((1, 40, 40, 4), (20, 20, 4, 8))) is not None  # none lies outside
    odd = conv((2, 9, 9, 3), (3, 3, 3, 8))
    assert default(odd)
    assert default(gpu.as_dtype(odd, "bfloat16")) is None  # copies of two bytes
    assert default(matmul(2**16, 8, 2**16)) is None


@pytest.mark.parametrize(("target", "limit"), [("sm_80", 163), ("sm_86", 99), ("sm_90a", 227), ("sm_120", 99)])
def test_defaults_keep_to_the_shared_memory_of_the_card(target, limit):
    card = Device("cuda", "a card", target=target, cores=100)
    for sample in (matmul(4096, 4096, 4096), matmul(4096, 4096, 4096, tb=True), conv((64, 56, 56, 64), (3, 3, 64, 64))):
        config = default(sample, card)
        (first, *_) = of(sample.op.family).build(
            sample.op,
            sample.ins,
            sample.op.out_specs(*sample.ins),
            Epilogue.none(sample.op.out_specs(*sample.ins)[0]),
            **config,
        )
        assert 48 <= first.shared_bytes / 1024 <= limit


def test_phases_of_a_stride_have_their_taps_only():
    """A window of 3 with stride 2: odd pixels meet one tap of an axis, even ones two; no product is with zero."""
    from gpu_kernels.conv_input_grad_mma import problems

    op = ops.ConvInputGrad(size=(16, 16), stride=(2, 2), padding=((1, 1), (1, 1)), dilation=(1, 1))
    ins = (Spec((1, 8, 8, 32)), Spec((3, 3, 8, 32)))
    found = problems(op, ins, op.out_specs(*ins))
    assert sorted(p.k // 32 for p in found) == [1, 2, 2, 4]
    assert sum(p.flops for p in found) == op.flops(*ins)


def test_layout_swaps_chunks_not_elements():
    layout = Layout(8, 32, 4, 0)
    assert [int(layout.place(1, column)) for column in range(8)] == [36, 37, 38, 39, 32, 33, 34, 35]
