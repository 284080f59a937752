"""Exchanges from card to card: copies of regions, and parts of sums that are added where they are wanted."""

import itertools
from types import SimpleNamespace

import ml_dtypes  # noqa: F401 - makes bfloat16 a dtype
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import in_threads

from gpu_kernels.emulated import Emulated
from gpu_kernels.many import Many
from rapydli_flow.runtime import card_meetings
from rapydli_flow.runtime.card_meetings import Meetings, _flat
from rapydli_flow.runtime.devices import device_of
from rapydli_flow.runtime.transport import Threads
from rapydli_flow.scheduler import Buffer, Collective, Exchange, messages
from rapydli_flow.scheduler.collective import Shard, assemble
from rapydli_flow.scheduler.messages import CARD_BYTES, rounds, staged, staged_bytes
from rapydli_flow.spec import Block, Spec

pytestmark = pytest.mark.filterwarnings("ignore:no GPU kernel serves")

CARD = "emulated"


@st.composite
def regions(draw):
    """The shapes of two arrays, and a region of the same shape in each of them."""
    axes = draw(st.integers(0, 5))
    sizes = [draw(st.integers(1, 4)) for _ in range(axes)]
    shapes, slices = [], []
    for _ in range(2):
        before = [draw(st.integers(0, 2)) for _ in range(axes)]
        behind = [draw(st.integers(0, 2)) for _ in range(axes)]
        shapes.append(tuple(map(sum, zip(before, sizes, behind, strict=True))))
        slices.append(tuple(slice(lo, lo + size) for lo, size in zip(before, sizes, strict=True)))
    return shapes, slices


@settings(max_examples=300, deadline=None)
@given(regions(), st.sampled_from([1, 2, 4, 8]))
def test_a_region_is_copied_to_another(case, item):
    (one, other), (out_of, into) = case
    rng = np.random.default_rng(0)
    source, target = (rng.integers(0, 99, shape).astype(f"u{item}") for shape in (one, other))
    want = target.copy()
    want[(..., *into)] = source[(..., *out_of)]
    card = Emulated()
    source_at, target_at = (_flat(x.ctypes.data, x.shape, item) for x in (source, target))
    for copy in source_at.part(out_of).to(target_at.part(into)):
        assert copy.box.target_pitch >= copy.box.width
        assert copy.box.source_pitch >= copy.box.width
        assert copy.box.source_height >= copy.box.rows
        assert copy.box.target_height >= copy.box.rows
        copy(card)
    np.testing.assert_array_equal(target, want)


WHOLE = (5, 7)
ALL = Block.all(WHOLE)
ROWS, COLUMNS = Block.along(WHOLE, 0, (0, 2, 5)), Block.along(WHOLE, 1, (0, 4, 7))
PARTS = {
    "whole": tuple(Shard(rank, ALL, rank) for rank in range(3)),
    "in blocks that lie across each other": (
        *(Shard(rank, block, 0) for rank, block in enumerate(ROWS)),
        Shard(2, ALL, 1),
        *(Shard(rank, block, 2) for rank, block in enumerate(COLUMNS)),
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("chunk", [64, CARD_BYTES])
@pytest.mark.parametrize("parts", PARTS)
def test_parts_of_sums_are_added_where_they_are_wanted(parts, dtype, chunk, monkeypatch):
    """Three ranks have parts of a sum; what they want lies at odd places, and across rows."""
    for module in (card_meetings, messages):
        monkeypatch.setattr(module, "CARD_BYTES", chunk)
    tables = watched_tables(monkeypatch)
    have = PARTS[parts]
    bounds = [((0, 0), (2, 7)), ((2, 0), (5, 3)), ((2, 3), (5, 7))]
    want = tuple((rank, Block(lo, hi, WHOLE)) for rank, (lo, hi) in enumerate(bounds))
    ops = [Exchange(rank=rank, have=have, want=want, dtype=dtype) for rank in range(3)]
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=shard.block.shape).astype(dtype) for shard in have]
    ends = Threads.of(3)
    assert all(staged(now, 2).size_bytes for now in rounds(ops[0], chunk))
    assert staged_bytes(ops[0]) > 0

    def run(rank):
        card, op = Emulated(), ops[rank]
        outs = op.infer()[0]
        base = card.reserve(8192)
        ins = tuple(Buffer(2 + 512 * k, Spec(arrays[i].shape, dtype)) for k, i in enumerate(op.held))
        part = Collective("x", op, ins, (Buffer(4098, outs),))
        program = SimpleNamespace(steps=(part,), staged_bytes=staged_bytes(op))
        how = (ends[rank], card, card, lambda buffer: base + buffer.offset, card.reserve)
        meetings = Meetings(program, device_of(CARD), *how)
        for buffer, i in zip(ins, op.held, strict=True):
            card.upload(base + buffer.offset, arrays[i])
        meetings.meet(part)
        meetings.wait()
        found = np.empty(outs.shape, dtype)
        card.download(found, base + 4098)
        meetings.abort()
        return found

    for rank, found in enumerate(in_threads(run, range(3))):
        (wanted,) = assemble(ops[rank], dict(enumerate(arrays)))
        assert found.tobytes() == wanted.tobytes()
    assert tables


def watched_tables(monkeypatch):
    """Tables of the kernel that adds: nothing that it writes may be written by another of its blocks."""
    made, table = [], Many.table

    def watched(self, addresses):
        item = np.dtype(self.key.outs[0]).itemsize
        places = sorted((row[-1], row[-1] + size * item) for row, size in zip(addresses, self.sizes, strict=True))
        assert all(end <= first for (_, end), (first, _) in itertools.pairwise(places))
        made.append(places)
        return table(self, addresses)

    monkeypatch.setattr(Many, "table", watched)
    return made
