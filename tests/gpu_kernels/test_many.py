"""Many pointwise ops as one kernel, on the emulator and as machine code."""

import random
from dataclasses import replace

import numpy as np
import pytest

from gpu_kernels import compile as compiling
from gpu_kernels import emulate
from gpu_kernels.emulate import Buffer, KernelFault
from gpu_kernels.many import Bytes, Many, Step, alike, together
from rapydli_flow import ops
from rapydli_flow.errors import TemplateError
from rapydli_flow.ops import Sample
from rapydli_flow.spec import HALVES, Spec
from rapydli_flow.template import Epilogue, Scalar
from rapydli_flow.testing.gpu import assert_close, tolerance, wanted

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


MOMENTUM = alike(ops.Momentum(), (*[Spec((3,))] * 3, Spec(())), (Spec((3,)),) * 2)
RELU = alike(ops.Relu(), (Spec((3,)),), (Spec((3,)),))


def places(names):
    """Arrays of 16 bytes, by name."""
    numbers = [int.from_bytes(name.encode(), "little") for name in names.split()]
    return tuple((16 * number, 16 * number + 16) for number in numbers)


def step(key, reads, writes, size=1):
    return Step(key, places(reads), places(writes), size)


def test_updates_wait_for_each_other_but_not_for_what_needs_them():
    program = [
        step(None, "x w1", "y"),
        step(None, "y w2", "dy"),
        step(MOMENTUM, "w2 m2 g2", "w2 m2"),
        step(None, "dy", "g1"),
        step(MOMENTUM, "w1 m1 g1", "w1 m1"),
        step(None, "w2", "average"),
        step(MOMENTUM, "w3 m3 g3", "w3 m3"),
    ]
    assert together(program, most=100) == [(0,), (1,), (3,), (2, 4), (5,), (6,)]
    assert together(program, most=1) == [(i,) for i in range(7)]


def test_memory_that_is_used_again_is_not_waited_for():
    program = [step(MOMENTUM, "w1 m1 a", "w1 m1"), step(None, "x", "a"), step(MOMENTUM, "w2 m2 a", "w2 m2")]
    assert together(program, most=100) == [(0,), (1,), (2,)]


def test_a_byte_in_common_is_enough():
    """Two arrays that overlap, at different times: the second one is made where the first one ends."""
    first, second = Step(MOMENTUM, ((0, 40),), ((64, 104),), 10), Step(MOMENTUM, ((200, 240),), ((128, 168),), 10)
    for made, apart in (((40, 64), False), ((39, 41), True), ((100, 120), True), ((104, 128), False), ((0, 300), True)):
        order = together([first, Step(None, (), (made,)), second], most=100)
        assert order == ([(0,), (1,), (2,)] if apart else [(1,), (0, 2)])
    assert together([first, Step(None, ((0, 40),), ()), second], most=100) == [(1,), (0, 2)]  # it only reads, too


@pytest.mark.parametrize("seed", range(10))
def test_bytes_are_a_set(seed):
    draw, known, found = random.Random(seed), set(), Bytes()
    for _ in range(60):
        first = draw.randrange(200)
        one = first, first + draw.randrange(12)
        assert found.meets((one,)) == bool(known & set(range(*one)))
        if draw.random() < 0.5:
            found.add((one,))
            known |= set(range(*one))


@pytest.mark.parametrize("seed", range(30))
def test_any_program_computes_the_same_together(seed):
    draw = random.Random(seed)

    def some(count):
        """Ranges of 40 bytes, of which each is remembered."""
        starts = [draw.randrange(38) for _ in range(count)]
        return tuple((first, first + draw.randrange(1, 4)) for first in starts)

    program = [Step(draw.choice([None, MOMENTUM, RELU]), some(2), some(1), 1) for _ in range(40)]

    def outcome(order):
        memory = {place: place for place in range(41)}
        for group in order:
            found = [
                (
                    [b for each in s.writes for b in range(*each)],
                    hash((i, *[memory[b] for r in s.reads for b in range(*r)])),
                )
                for i, s in group
            ]
            written = [b for writes, _ in found for b in writes]
            assert len(set(written)) == len(written)
            for writes, value in found:
                memory.update(dict.fromkeys(writes, value))
        return memory

    order = together(program, most=5)
    assert sorted(i for group in order for i in group) == list(range(40))
    assert any(len(group) > 1 for group in order)
    groups = [[(i, program[i]) for i in group] for group in order]
    assert outcome(groups) == outcome([[(i, s)] for i, s in enumerate(program)])


def test_addresses_are_aligned():
    key = alike(ops.Relu(), (Spec((4,)),), (Spec((4,)),))
    with pytest.raises(TemplateError, match=r"many: addresses \['0x18'\] are not multiples of 16"):
        Many(key, (4,)).table([[0x18, 0x20]])


@pytest.mark.skipif(compiling.missing() is not None, reason=str(compiling.missing()))
@pytest.mark.filterwarnings("default")  # of numba-cuda's own imports
@pytest.mark.parametrize("op", CASES[:2], ids=lambda op: op.name)
def test_one_kernel_serves_all_sizes(op, tmp_path):
    first = samples(op)[0]
    key = alike(op, first.ins, op.out_specs(*first.ins))
    few, more = Many(key, (100, 7)), Many(key, (100, 7, 5000))
    one, other = few.cubin("sm_90a", tmp_path), more.cubin("sm_90a", tmp_path)
    assert one.clean
    assert one.stack_bytes == 0
    assert (one.grid, other.grid) == (few.blocks, more.blocks) == (2, 5)
    assert other == replace(one, grid=5)
    assert len(list(tmp_path.glob("*.cubin"))) == 1
