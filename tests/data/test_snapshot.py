"""Snapshots: exact, complete or not there, found again after a kill, and never silently wrong."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from rapydli_flow.data import (
    SnapshotWriter,
    begin,
    commit,
    latest,
    list_snapshots,
    prune,
    read_snapshot,
    snapshot,
    write_block,
)
from rapydli_flow.errors import DTypeError, SettingError, SnapshotError
from rapydli_flow.spec import Block, Spec, even_bounds

RNG = np.random.default_rng(1)
ARRAYS = {
    "conv_1/w": RNG.normal(size=(3, 3, 2, 8)).astype(np.float32),
    "conv_1/w/momentum": RNG.normal(size=(3, 3, 2, 8)).astype(np.float32),
    "conv_1.w": np.arange(5),
    "step": np.array(7, np.int64),
    "bits": np.array([0x7FF8000000000001, 0x8000000000000000, 1], np.uint64).view(np.float64),
    "none": np.zeros((0, 4), np.float32),
    "pixels": RNG.integers(0, 255, (5, 5), dtype=np.uint8),
    "__odd name?*": np.arange(3, dtype=np.int32),
}


def write(folder, step, arrays=ARRAYS, meta=None, keep=3):
    with SnapshotWriter(folder, keep=keep) as writer:
        writer.write(step, arrays, meta or {})


def same_bits(got, wanted):
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype
        assert got[name].shape == array.shape
        assert got[name].tobytes() == array.tobytes()


def test_every_bit_comes_back(tmp_path):
    write(tmp_path, 200, meta={"seed": 3, "plan": {"ranks": [1, 2]}})
    found = read_snapshot(latest(tmp_path))
    assert found.step == 200
    assert found.meta == {"seed": 3, "plan": {"ranks": [1, 2]}}
    same_bits(found.arrays, ARRAYS)
    found.arrays["conv_1/w"][:] = 0  # writable: training goes on from here
    assert sorted(os.listdir(tmp_path / "step-00000200")) == ["arrays", "manifest.json"]


def test_any_zarr_reader_opens_the_arrays(tmp_path):
    write(tmp_path, 5)
    group = zarr.open_group(tmp_path / "step-00000005" / "arrays", mode="r")
    assert {array.attrs["name"] for _, array in group.arrays()} == set(ARRAYS)
    for _, array in group.arrays():
        wanted = ARRAYS[array.attrs["name"]]
        assert array.dtype == wanted.dtype
        assert np.asarray(array[...]).tobytes() == wanted.tobytes()


def test_the_arrays_are_copied_before_write_returns(tmp_path):
    array = np.ones(1000, np.float32)
    with SnapshotWriter(tmp_path) as writer:
        writer.write(1, {"w": array}, {})
        array[:] = 2
        writer.wait()
    assert (read_snapshot(latest(tmp_path)).arrays["w"] == 1).all()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), max_size=4),
    cuts=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    data=st.data(),
)
def test_blocks_from_any_grid_make_the_whole(tmp_path_factory, shape, cuts, data):
    folder = tmp_path_factory.mktemp("blocks")
    shape = tuple(shape)
    array = np.arange(np.prod(shape, dtype=int), dtype=np.float64).reshape(shape) + 0.5
    bounds = [even_bounds(size, min(size, parts)) for size, parts in zip(shape, cuts, strict=False)]
    blocks = [Block.all(shape)]
    for axis, edges in enumerate(bounds):
        blocks = [
            Block((*b.lo[:axis], lo, *b.lo[axis + 1 :]), (*b.hi[:axis], hi, *b.hi[axis + 1 :]), shape)
            for b in blocks
            for lo, hi in pairwise(edges)
        ]
    begin(folder, 3, {"w": Spec(shape, "float64")})
    for block in data.draw(st.permutations(blocks)):
        write_block(folder, 3, "w", block, array[block.slices])
    commit(folder, 3, {})
    np.testing.assert_array_equal(read_snapshot(latest(folder)).arrays["w"], array)


def test_several_processes_write_their_blocks(tmp_path):
    array = np.arange(40.0).reshape(5, 8)
    begin(tmp_path, 1, {"w": Spec((5, 8), "float64")})
    code = """
import sys
import numpy as np
from rapydli_flow.spec import Block
from rapydli_flow.data import write_block
lo, hi = int(sys.argv[2]), int(sys.argv[3])
write_block(sys.argv[1], 1, "w", Block((0, lo), (5, hi), (5, 8)), np.arange(40.0).reshape(5, 8)[:, lo:hi])
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(lo), str(hi)])
        for lo, hi in ((0, 3), (3, 6), (6, 8), (6, 8))
    ]
    assert [run.wait() for run in runs] == [0, 0, 0, 0]
    commit(tmp_path, 1, {})
    np.testing.assert_array_equal(read_snapshot(latest(tmp_path)).arrays["w"], array)


def test_commit_refuses_what_is_not_all_written(tmp_path):
    begin(tmp_path, 1, {"w": Spec((4, 2)), "b": Spec((0,))})
    write_block(tmp_path, 1, "b", Block.all((0,)), np.zeros(0, np.float32))
    with pytest.raises(
        SnapshotError, match=r"array 'w' is not all written: its blocks hold 0 of 8 elements \(no block\)"
    ):
        commit(tmp_path, 1, {})
    write_block(tmp_path, 1, "w", Block((0, 0), (3, 2), (4, 2)), np.zeros((3, 2), np.float32))
    with pytest.raises(SnapshotError, match=r"hold 6 of 8 elements \(\[0:3,0:2\]\)\. A rank did not write its part"):
        commit(tmp_path, 1, {})
    assert list_snapshots(tmp_path) == ()
    write_block(tmp_path, 1, "w", Block((2, 0), (4, 2), (4, 2)), np.zeros((2, 2), np.float32))
    with pytest.raises(SnapshotError, match=r"blocks \[0:3,0:2\] and \[2:4,0:2\] of array 'w' overlap"):
        commit(tmp_path, 1, {})


def test_blocks_that_do_not_fit(tmp_path):
    whole = Block.all((4, 2))
    good = np.zeros((4, 2), np.float32)
    with pytest.raises(SnapshotError, match=r"the snapshot of step 1 was not begun\. Call begin"):
        write_block(tmp_path, 1, "w", whole, good)
    with pytest.raises(SnapshotError, match="the snapshot of step 1 was not begun"):
        commit(tmp_path, 1, {})
    begin(tmp_path, 1, {"w": Spec((4, 2))})
    with pytest.raises(SnapshotError, match="begun without an array 'v'"):
        write_block(tmp_path, 1, "v", whole, good)
    with pytest.raises(SnapshotError, match=r"block \[0:4,0:3\] of \(4, 3\) does not fit array 'w' f32\[4,2\]"):
        write_block(tmp_path, 1, "w", Block.all((4, 3)), good)
    with pytest.raises(SnapshotError, match=r"block \[2:5,0:2\] of \(4, 2\) does not fit"):
        write_block(tmp_path, 1, "w", Block((2, 0), (5, 2), (4, 2)), good)
    with pytest.raises(SnapshotError, match=r"has shape \(4, 2\), and was given float64\[4, 2\]"):
        write_block(tmp_path, 1, "w", whole, good.astype("f8"))
    with pytest.raises(SnapshotError, match=r"was given float32\[2, 2\]"):
        write_block(tmp_path, 1, "w", whole, good[:2])
    write_block(tmp_path, 1, "w", whole, good)
    commit(tmp_path, 1, {})
    with pytest.raises(SnapshotError, match="the snapshot of step 1 is complete, and is not written any more"):
        write_block(tmp_path, 1, "w", whole, good)
    with pytest.raises(SnapshotError, match="step 1 has a complete snapshot already"):
        begin(tmp_path, 1, {"w": Spec((4, 2))})


@pytest.mark.parametrize("name", ["", "a//b", "/a", "a/"])
def test_names_that_are_refused(tmp_path, name):
    with pytest.raises(SnapshotError, match="cannot name an array: names are words joined by '/'"):
        begin(tmp_path, 1, {name: Spec((1,))})
    with pytest.raises(SnapshotError, match="step -1 must be 0 or more"):
        begin(tmp_path, -1, {})


def test_the_newest_are_kept_and_leftovers_go(tmp_path):
    begin(tmp_path, 2, {"w": Spec((1,))})
    begin(tmp_path, 99, {"w": Spec((1,))})
    (tmp_path / "notes").mkdir()
    with SnapshotWriter(tmp_path, keep=2) as writer:
        for step in (1, 5, 10, 123456789):
            writer.write(step, {"w": np.full(3, step)}, {})
    assert [path.name for path in list_snapshots(tmp_path)] == ["step-00000010", "step-123456789"]
    assert sorted(os.listdir(tmp_path)) == ["notes", "step-00000010", "step-123456789"]
    assert read_snapshot(latest(tmp_path)).arrays["w"].tolist() == [123456789] * 3
    prune(tmp_path, 0)  # the newest complete one always stays
    assert [path.name for path in list_snapshots(tmp_path)] == ["step-123456789"]


def test_nothing_there(tmp_path):
    assert list_snapshots(tmp_path / "none") == ()
    assert latest(tmp_path) is None
    with pytest.raises(SnapshotError, match="step-1: there is no snapshot here"):
        read_snapshot(tmp_path / "step-1")


def test_an_incomplete_one_is_not_listed_and_not_read(tmp_path):
    write(tmp_path, 1)
    begun = begin(tmp_path, 2, {"w": Spec((3,))})
    assert latest(tmp_path).name == "step-00000001"
    with pytest.raises(SnapshotError, match=r"step-00000002: this snapshot is incomplete \(it has no manifest\.json\)"):
        read_snapshot(begun)


def chunk_of(path, name):
    return next(path.glob(f"arrays/{name}/c*"))


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        ("flip", r"array 'conv_1/w' has changed since it was written \(CRC\)\. Use an older snapshot"),
        ("truncate", r"array 'conv_1/w' has 143 of its 144 elements"),
        ("delete", "the bytes of array 'conv_1/w' are missing"),
    ],
)
def test_damage_names_the_array(tmp_path, harm, text):
    write(tmp_path, 1)
    chunk = chunk_of(latest(tmp_path), "conv_1.w")
    whole = bytearray(chunk.read_bytes())
    whole[17] ^= 4
    if harm == "flip":
        chunk.write_bytes(whole)
    elif harm == "truncate":
        chunk.write_bytes(whole[:-2])
    else:
        chunk.unlink()
    with pytest.raises(SnapshotError, match=text):
        read_snapshot(latest(tmp_path))


def test_manifests_that_cannot_be_read(tmp_path):
    write(tmp_path, 1)
    manifest = latest(tmp_path) / "manifest.json"
    good = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**good, "format": 2}))
    with pytest.raises(SnapshotError, match="snapshot format 2, and this version of rapydli_flow reads 1"):
        read_snapshot(latest(tmp_path))
    manifest.write_text("{")
    with pytest.raises(SnapshotError, match=r"its manifest\.json cannot be read"):
        read_snapshot(latest(tmp_path))


def test_what_cannot_be_stored_is_told_at_once(tmp_path):
    with SnapshotWriter(tmp_path) as writer:
        with pytest.raises(DTypeError, match="snapshot: array 'mask' has dtype bool"):
            writer.write(1, {"mask": np.zeros(3, bool)}, {})
        with pytest.raises(SnapshotError, match="snapshot: meta is not JSON: Object of type"):
            writer.write(1, {"w": np.zeros(3)}, {"f": object()})
    with pytest.raises(SnapshotError, match=r"this writer is closed\. Make another one"):
        writer.write(1, {"w": np.zeros(3)}, {})
    writer.close()
    with pytest.raises(SettingError, match="SnapshotWriter: keep=0 must be 1 or more"):
        SnapshotWriter(tmp_path, keep=0)
    assert list_snapshots(tmp_path) == ()


def test_an_error_in_the_background_reaches_the_caller_once(tmp_path):
    writer = SnapshotWriter(tmp_path)
    writer.write(1, {"w": np.zeros(3)}, {})
    writer.write(1, {"w": np.zeros(3)}, {})
    with pytest.raises(SnapshotError, match="step 1 has a complete snapshot already"):
        writer.wait()
    writer.wait()
    writer.write(1, {"w": np.zeros(3)}, {})
    with pytest.raises(SnapshotError, match="step 1 has a complete snapshot already"):
        writer.write(2, {"w": np.zeros(3)}, {})
    writer.write(2, {"w": np.zeros(3)}, {})
    writer.write(2, {"w": np.zeros(3)}, {})
    with pytest.raises(SnapshotError, match="step 2 has a complete snapshot already"):
        writer.close()
    assert not any(thread.name.startswith("rapydli-snapshot") for thread in threading.enumerate())


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(snapshot.os, "pwrite", lambda fd, data, at: real(fd, data[: max(1, len(data) // 2)], at))
    write(tmp_path, 1)
    same_bits(read_snapshot(latest(tmp_path)).arrays, ARRAYS)


def test_many_threads_write_blocks_of_one_array(tmp_path):
    array = RNG.normal(size=(64, 32))
    begin(tmp_path, 1, {"w": Spec((64, 32), "float64")})
    with ThreadPoolExecutor(8) as threads:
        list(
            threads.map(
                lambda block: write_block(tmp_path, 1, "w", block, array[block.slices]),
                Block.along((64, 32), 1, even_bounds(32, 8)),
            )
        )
    commit(tmp_path, 1, {})
    same_bits(read_snapshot(latest(tmp_path)).arrays, {"w": array})


HALF = """
import os, signal, sys
import numpy as np
from rapydli_flow.spec import Block, Spec
from rapydli_flow.data import SnapshotWriter, begin, write_block
with SnapshotWriter(sys.argv[1]) as writer:
    writer.write(100, {"w": np.full(1000, 100.0)}, {})
begin(sys.argv[1], 200, {"w": Spec((1000,), "float64"), "v": Spec((3,))})
write_block(sys.argv[1], 200, "w", Block.all((1000,)), np.full(1000, 200.0))
os.kill(os.getpid(), signal.SIGKILL)
"""

ENDLESS = """
import sys
import numpy as np
from rapydli_flow.data import SnapshotWriter
with SnapshotWriter(sys.argv[1], keep=2) as writer:
    for step in range(1, 10**6):
        writer.write(step, {f"w_{i}": np.full(20000, step * 1.0) for i in range(8)}, {"step": step})
"""


def test_killed_mid_snapshot_the_previous_one_is_the_latest(tmp_path):
    run = subprocess.run([sys.executable, "-c", HALF, str(tmp_path)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert (tmp_path / "step-00000200").is_dir()
    assert latest(tmp_path).name == "step-00000100"
    assert (read_snapshot(latest(tmp_path)).arrays["w"] == 100).all()
    write(tmp_path, 200, {"w": np.zeros(2)})  # the half one is cleared and written again
    assert read_snapshot(latest(tmp_path)).arrays["w"].tolist() == [0, 0]


@pytest.mark.parametrize("delay_s", [0.0, 0.013, 0.031, 0.057])
def test_killed_at_any_moment_the_latest_is_whole(tmp_path, delay_s):
    run = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)])
    while latest(tmp_path) is None and run.poll() is None:
        time.sleep(0.002)
    time.sleep(delay_s)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    found = read_snapshot(latest(tmp_path))
    assert found.meta == {"step": found.step}
    assert len(found.arrays) == 8
    assert all((array == found.step).all() for array in found.arrays.values())
    write(tmp_path, found.step + 10, keep=1)
    assert os.listdir(tmp_path) == [f"step-{found.step + 10:08d}"]
