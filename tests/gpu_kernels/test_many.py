"""Many pointwise ops as one kernel, on the emulator and as machine code."""

from dataclasses import replace

import numpy as np
import pytest

from gpu_kernels import compile as compiling
from gpu_kernels import emulate
from gpu_kernels.emulate import Buffer, KernelFault
from gpu_kernels.many import Many, alike
from rapydli_flow import ops
from rapydli_flow.errors import TemplateError
from rapydli_flow.ops import Sample
from rapydli_flow.spec import HALVES, Spec
from rapydli_flow.template import Epilogue, Scalar, templates
from rapydli_flow.testing.gpu import assert_close, instructions, request_of, tolerance, wanted

SHAPES = ((64, 3, 3, 5), (10,), (1,), (1031,), (4096,), (3, 700))
RATES = {ops.Momentum: 1, ops.Adam: 3, ops.Descent: 1, ops.RmspropMomentum: 1, ops.MovingAverage: 0, ops.Cast: 0}


def samples(op, dtype="float32"):
    """The op on arrays of several shapes, numbers as they are."""
    cls, singles = type(op), RATES[type(op)]
    count = len(cls.samples()[0].ins) - singles
    ranges = {i: (0.1, 1.0) for i in range(count + singles)}
    return [Sample(op, (*[Spec(s, dtype)] * count, *[Spec((), dtype)] * singles), ranges) for s in SHAPES]


def run(many, operands, outs):
    """The outputs of the kernel, on the emulator; ``operands`` and ``outs`` for each op."""
    emulate.memory.clear()
    results, addresses = [], []
    for values, specs in zip(operands, outs, strict=True):
        made = [np.full(spec.size, np.nan if spec.floating else 77, spec.dtype) for spec in specs]
        ins = [Buffer("operand", np.ascontiguousarray(v).ravel()) for v in values]
        ends = [Buffer("output", y, output=True) for y in made]
        addresses.append([emulate.memory.put(buffer) for buffer in (*ins, *ends)])
        results.append((made, ends))
    table = Buffer("table", many.table(addresses).ravel())
    grid = many.grid()
    for block in range(grid.grid):
        emulate.machine.start(grid.block, block)
        with np.errstate(all="ignore"):
            grid.kernel((table,), (), (), (), None)
    for _, ends in results:
        for buffer in ends:
            assert np.all(buffer.writes == 1)
    return [
        tuple(y.reshape(s.shape) for y, s in zip(made, specs, strict=True))
        for (made, _), specs in zip(results, outs, strict=True)
    ]


CASES = [
    ops.Momentum(decay=0.01),
    ops.Adam(),
    ops.Descent(),
    ops.RmspropMomentum(),
    ops.MovingAverage(),
    ops.Cast(to="bfloat16"),
]


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize("op", CASES, ids=lambda op: op.name)
def test_each_array_gets_what_its_own_op_gives(op, dtype):
    if op.name == "cast" and dtype == "bfloat16":
        op = ops.Cast(to="float32")
    rng = np.random.default_rng(4)
    several = samples(op, dtype)
    operands = [sample.draw(rng, dtype) for sample in several]
    outs = [op.out_specs(*sample.ins) for sample in several]
    (key,) = {alike(op, sample.ins, ys) for sample, ys in zip(several, outs, strict=True)}
    many = Many(key, tuple(ys[0].size for ys in outs), threads=64)
    got = run(many, operands, outs)
    for sample, values, ys in zip(several, operands, got, strict=True):
        assert_close(ys, wanted(op, values), 10 * tolerance(sample))


def test_a_tail_and_its_operand():
    scalar = Scalar(("v", "e0", "e1"), ("t0 = v * e0", "t1 = t0 + e1"), ("t1",))
    rng = np.random.default_rng(4)
    op, operands, outs, keys = ops.Relu(), [], [], set()
    for shape in SHAPES:
        x, out = Spec(shape), Spec(shape)
        epilogue = Epilogue(scalar, (Spec(()), out), out)
        keys.add(alike(op, (x,), (out,), epilogue))
        operands.append([rng.normal(size=s).astype(np.float32) for s in (shape, (), shape)])
        outs.append((out,))
    (key,) = keys
    got = run(Many(key, tuple(y.size for (y,) in outs), threads=32), operands, outs)
    for (x, factor, more), (y,) in zip(operands, got, strict=True):
        np.testing.assert_allclose(y, np.maximum(x, 0) * factor + more, rtol=1e-6, atol=1e-6)


def test_what_does_not_go_together():
    w = Spec((8, 4))
    one = alike(ops.Momentum(), (w, w, w, Spec(())), (w, w))
    assert one is not None
    assert one == alike(ops.Momentum(), (*[Spec((3,))] * 3, Spec(())), (Spec((3,)),) * 2)
    assert one != alike(ops.Momentum(decay=0.1), (w, w, w, Spec(())), (w, w))
    assert one != alike(
        ops.Momentum(), (*[Spec((3,), "float16")] * 3, Spec((), "float16")), (Spec((3,), "float16"),) * 2
    )
    clock = Spec((), "int64")
    assert alike(ops.Dropout(rate=0.5, stream=1), (w, clock, clock), (w,)) is None  # counts elements
    assert alike(ops.Add(), (w, Spec((4,))), (w,)) is None  # broadcasts
    assert alike(ops.MaxPool(window=(2,), stride=(2,), padding=((0, 0),)), (w,), (w,)) is None


def test_an_address_of_nothing_is_a_fault():
    key = alike(ops.Relu(), (Spec((4,)),), (Spec((4,)),))
    many = Many(key, (4,))
    emulate.memory.clear()
    emulate.machine.start(many.threads, 0)
    with pytest.raises(KernelFault, match="no array lies at 0x10"):
        many.grid().kernel((Buffer("table", many.table([[16, 32]]).ravel()),), (), (), (), None)


def test_addresses_are_aligned():
    key = alike(ops.Relu(), (Spec((4,)),), (Spec((4,)),))
    with pytest.raises(TemplateError, match=r"many: addresses \['0x18'\] are not multiples of 16"):
        Many(key, (4,)).table([[0x18, 0x20]])


@pytest.mark.skipif(compiling.missing() is not None, reason=str(compiling.missing()))
@pytest.mark.filterwarnings("default")  # of numba-cuda's own imports
@pytest.mark.parametrize("op", CASES[:2], ids=lambda op: op.name)
def test_one_cubin_serves_all_sizes(op, tmp_path):
    first = samples(op)[0]
    key = alike(op, first.ins, op.out_specs(*first.ins))
    few, more = Many(key, (100, 7)), Many(key, (100, 7, 5000))
    one, other = few.cubin("sm_90a", tmp_path), more.cubin("sm_90a", tmp_path)
    assert one.clean
    assert one.stack_bytes == 0
    assert (one.grid, other.grid) == (few.blocks, more.blocks) == (2, 5)
    assert other == replace(one, grid=5)
    assert len(list(tmp_path.glob("*.cubin"))) == 1


FLOATS = {0x23: "FFMA", 0x20: "FMUL", 0x21: "FADD", 0x108: "MUFU"}  # the low 9 bits: above are kinds of operands


def arithmetic(request):
    found = dict.fromkeys(FLOATS.values(), 0)
    for word, count in instructions(compiling.cubins(request)[0].code).items():
        if word & 0x1FF in FLOATS:
            found[FLOATS[word & 0x1FF]] += count
    return found


@pytest.mark.skipif(compiling.missing() is not None, reason=str(compiling.missing()))
@pytest.mark.filterwarnings("default")  # of numba-cuda's own imports
@pytest.mark.parametrize("op", [ops.Momentum(decay=0.01, nesterov=True), ops.Descent(decay=0.1), ops.MovingAverage()])
def test_a_cubin_multiplies_and_adds_as_that_for_one_array(op):
    """An element's instructions are those of `elements`, products joined with sums alike: so the bits are the same."""
    count = len(type(op).samples()[0].ins) - RATES[type(op)]
    ins = (*[Spec((4096,))] * count, *[Spec(())] * RATES[type(op)])
    (template,) = templates("pointwise", "cuda")
    alone = request_of(template, op, ins, vector=4, items=1)
    many = Many(alike(op, ins, op.out_specs(*ins)), (4096,))
    one, other = arithmetic(alone), arithmetic(many.request(alone.target))
    assert one["FFMA"] > 0
    assert {name: number // 4 for name, number in one.items()} == {
        name: number // (many.key.vector * many.items + 1) for name, number in other.items()
    }
    assert not any(number % 4 for number in one.values())
    assert not any(number % (many.key.vector * many.items + 1) for number in other.values())
