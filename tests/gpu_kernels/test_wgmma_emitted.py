"""What Hopper's intrinsics emit, without a compiler: their arithmetic and exchanges on NumPy arrays over threads.

Shared memory is filled as the copy engine fills it (128-byte swizzle), and read as the PTX ISA says wgmma reads: by the
canonical layouts of its descriptors, and by the fragments of its registers.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from gpu_kernels import warpgroup
from gpu_kernels.hopper import CHUNK_BYTES

THREADS = np.arange(128)


class Arithmetic:
    """Stands for llvmlite's builder: computes instead."""

    add = staticmethod(lambda a, b: a + b)
    mul = staticmethod(lambda a, b: a * b)
    xor = staticmethod(lambda a, b: a ^ b)
    and_ = staticmethod(lambda a, b: a & b)
    or_ = staticmethod(lambda a, b: a | b)
    lshr = staticmethod(lambda a, b: a >> b)
    zext = staticmethod(lambda a, kind: a)
    select = staticmethod(lambda on, a, b: np.where(on, a, b))
    icmp_unsigned = staticmethod(lambda how, a, b: {"!=": np.not_equal, "==": np.equal}[how](a, b))
    load = staticmethod(lambda place: place)


@pytest.fixture
def computing(monkeypatch):
    """Constants are numbers, and the few PTX statements that matter answer."""

    def call(builder, asm, constraints, args, result=None):
        if "%tid.x" in asm:
            return THREADS
        if "%laneid" in asm:
            return THREADS % 32
        if "shfl.sync.bfly" in asm:
            return args[0][THREADS ^ int(asm.split(",")[2])]
        raise AssertionError(asm)

    ir = pytest.importorskip("llvmlite.ir")
    monkeypatch.setattr(ir, "Constant", lambda kind, value: value)
    monkeypatch.setattr(warpgroup, "_number", lambda value: value)
    monkeypatch.setattr(warpgroup, "emit_ptx", call)
    return Arithmetic()


def swizzled(lines):
    """Bytes of shared memory after a copy of these lines."""
    pieces = lines.view(np.uint8).reshape(len(lines), 8, 16)
    return np.stack([piece[np.arange(8) ^ i % 8] for i, piece in enumerate(pieces)]).ravel()


def by_descriptor(memory, descriptor, rows, deep, dtype, *, mn_major):
    """A ``rows`` x ``deep`` operand of one wgmma, from the canonical layouts with 128-byte swizzle."""
    assert descriptor >> 62 == 1
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    row, k = np.arange(rows)[:, None], np.arange(deep)
    size = np.dtype(dtype).itemsize
    if mn_major:
        line = 128 // size
        at = start + row % line * size + row // line * leading + k % 8 * 128 + k // 8 * stride
    else:
        at = start + row % 8 * 128 + row // 8 * stride + k * size
    at = at ^ (at >> 7 & 7) << 4
    return memory[at[..., None] + np.arange(size)].copy().view(dtype)[..., 0]


@pytest.mark.parametrize("mn_major", [False, True])
@pytest.mark.parametrize("rows", [64, 128, 256])
def test_descriptors_of_halves(computing, rows, mn_major):
    first = 64  # lines before the operand
    lines = np.arange((first + rows) * 64, dtype=np.uint16).reshape(-1, 64)
    memory = swizzled(lines)
    own = lines[first:]
    want = own.reshape(-1, 64, 64).swapaxes(1, 2).reshape(rows, 64) if mn_major else own
    descriptor = warpgroup._descriptor(computing, 0, first, mn_major)
    for step in range(warpgroup.STEPS):
        here = warpgroup._ahead(computing, descriptor, step * warpgroup._step_bytes(mn_major))
        got = by_descriptor(memory, here, rows, 16, np.uint16, mn_major=mn_major)
        np.testing.assert_array_equal(got, want[:, 16 * step : 16 * step + 16])


def test_the_second_part_of_a_is_a_chunk_further(computing):
    lines = np.arange(128 * 64, dtype=np.uint16).reshape(-1, 64)
    descriptor = warpgroup._ahead(computing, warpgroup._descriptor(computing, 0, 0, True), CHUNK_BYTES)
    got = by_descriptor(swizzled(lines), descriptor, 64, 16, np.uint16, mn_major=True)
    np.testing.assert_array_equal(got, lines[64:80].T)


def test_descriptors_of_float32(computing):
    lines = np.arange(192 * 32, dtype=np.float32).reshape(-1, 32)
    descriptor = warpgroup._descriptor(computing, 0, 64, False)
    for step in range(warpgroup.STEPS):
        here = warpgroup._ahead(computing, descriptor, 32 * step)
        got = by_descriptor(swizzled(lines), here, 128, 8, np.float32, mn_major=False)
        np.testing.assert_array_equal(got, lines[64:, 8 * step : 8 * step + 8])


@pytest.mark.parametrize("mn_major", [False, True])
def test_fragments_of_a_in_registers(computing, monkeypatch, mn_major):
    """Register i of a thread: row lane / 4, 8 further down for odd i; column lane % 4, 4 further for i >= 2."""
    first = 64
    lines = np.arange((first + 64) * 32, dtype=np.float32).reshape(-1, 32)
    memory = swizzled(lines).view(np.float32)
    monkeypatch.setattr(
        warpgroup,
        "_read",
        lambda builder, place, count, offset=0: [memory[(place + offset) // 4 + i] for i in range(count)],
    )
    own = lines[first:]
    a = own.reshape(2, 32, 32).swapaxes(1, 2).reshape(64, 32) if mn_major else own
    read = warpgroup._values_across if mn_major else warpgroup._values_along
    found = read(computing, 0, first)
    k_at = np.argsort(warpgroup.PLACES)  # which k lies where in a line of b
    for step in range(warpgroup.STEPS):
        for i in range(4):
            row = THREADS // 32 * 16 + THREADS % 32 // 4 + i % 2 * 8
            k = k_at[8 * step + THREADS % 4 + i // 2 * 4]
            np.testing.assert_array_equal(found[step][i], a[np.asarray(warpgroup.ROWS)[row] if mn_major else row, k])


def test_columns_are_exchanged(computing, monkeypatch):
    acc = warpgroup._spread(np.arange(64 * 64, dtype=np.float32).reshape(64, 64))
    monkeypatch.setattr(warpgroup, "_array", lambda context, builder, kind, value: value)
    monkeypatch.setattr(warpgroup, "_at", lambda builder, data, first, more: data[first + more])
    types = pytest.importorskip("numba").types
    monkeypatch.setitem(__import__("sys").modules, "numba.cuda", SimpleNamespace(types=types))
    _, _, emit = warpgroup._columns_rule(SimpleNamespace(), types.int32)
    context = SimpleNamespace(make_tuple=lambda builder, kind, values: values)
    signature = SimpleNamespace(args=(None, None), return_type=None)
    for first in (0, 2, 16, 18):
        got = emit(context, computing, signature, (acc, first))
        np.testing.assert_array_equal(np.stack(got), np.stack(warpgroup.columns(acc, first)))
