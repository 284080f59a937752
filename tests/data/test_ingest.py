"""ingest: every kind of source, chunk sizes, and what a refused or broken ingest leaves behind."""

import os
import subprocess
import sys

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from rapydli_flow.data import ingest, load
from rapydli_flow.errors import DatasetError, DTypeError, SettingError

X = np.random.default_rng(5).normal(size=(100, 6)).astype(np.float32)
LABEL = np.arange(100) % 10


def records(count=100):
    for i in range(count):
        yield {"x": X[i % 100], "label": LABEL[i % 100]}


def same(data, x=X, label=LABEL):
    got = data.read(range(len(data)))
    np.testing.assert_array_equal(got["x"], x)
    np.testing.assert_array_equal(got["label"], label)
    assert got["x"].dtype == x.dtype
    assert got["label"].dtype == np.int64


def batched(sizes):
    lo = 0
    for size in sizes:
        yield {"x": X[lo : lo + size], "label": LABEL[lo : lo + size]}
        lo += size


def test_arrays_records_and_batches_store_the_same_files(tmp_path):
    sources = {
        "arrays": ({"x": X, "label": LABEL}, False),
        "lists": ({"x": X, "label": LABEL.tolist()}, False),
        "records": (records(), False),
        "list_of_records": (list(records()), False),
        "batches": (batched([1, 70, 29]), True),
    }
    files = []
    for name, (source, batches) in sources.items():
        same(ingest(source, tmp_path / name, batches=batches))
        files.append(
            {
                str(p.relative_to(tmp_path / name)): p.read_bytes()
                for p in (tmp_path / name).rglob("*/c/*")
                if p.is_file()
            }
        )
    assert len(files[0]) == 8
    assert all(other == files[0] for other in files)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6), chunk=st.integers(1, 40))
def test_rechunking_streams(tmp_path_factory, sizes, chunk):
    total = min(100, sum(sizes))
    source = {"x": X[:total], "label": LABEL[:total]}
    url = tmp_path_factory.mktemp("stream") / "s"
    if total == 0:
        with pytest.raises(DatasetError, match="no records"):
            load(ingest(batched(sizes), url, chunk_records=chunk, batches=True).url)
        return
    data = ingest(batched(sizes), url, chunk_records=chunk, batches=True)
    same(data, **source)
    assert data.chunk_records == chunk


def test_default_chunks_hold_about_two_megabytes_or_an_eighth(tmp_path):
    assert ingest({"x": X}, tmp_path / "small").chunk_records == 13
    big = np.zeros((300, 64, 1024), np.uint8)  # 64 kB a record
    assert ingest({"x": big}, tmp_path / "big").chunk_records == 32
    assert ingest(({"x": record} for record in big), tmp_path / "stream").chunk_records == 32
    assert ingest({"x": big[:3]}, tmp_path / "three").chunk_records == 1
    assert ingest({"x": np.zeros((2, 3 * 2**20), np.uint8)}, tmp_path / "wide").chunk_records == 1


def test_splits_of_arrays_and_of_streams(tmp_path):
    data = ingest({"train": records(30), "test": {"x": X[:5], "label": LABEL[:5]}}, tmp_path / "s", chunk_records=7)
    same(data["train"], X[:30], LABEL[:30])
    same(data["test"], X[:5], LABEL[:5])


def test_other_arrays_are_sliced_and_not_loaded(tmp_path):
    stored = zarr.create_array(tmp_path / "x.zarr", data=X, chunks=(10, 6))
    same(ingest({"x": stored, "label": LABEL}, tmp_path / "s"))


def test_scalar_and_empty_record_shapes(tmp_path):
    data = ingest([{"a": 1, "b": 2.5, "none": np.zeros((0, 2), np.float32)}] * 3, tmp_path / "s")
    got = data.read([2, 0])
    assert got["a"].tolist() == [1, 1]
    assert got["b"].tolist() == [2.5, 2.5]
    assert got["none"].shape == (2, 0, 2)


def test_compression_is_smaller_and_both_round_trip(tmp_path):
    zeros = {"x": np.zeros((100, 600), np.float32), "label": LABEL}

    def size(path):
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

    for compress in (True, False):
        same(ingest(zeros, tmp_path / str(compress), compress=compress), x=zeros["x"])
    assert size(tmp_path / "True") < size(tmp_path / "False") / 10


def test_float_bits_survive(tmp_path):
    bits = np.array([0x7FC00001, 0xFF800000, 0x80000000, 1], np.uint32).view(np.float32)
    got = ingest({"x": bits}, tmp_path / "s").read(range(4))["x"]
    assert got.view(np.uint32).tolist() == bits.view(np.uint32).tolist()


def test_an_existing_target_is_not_touched(tmp_path):
    ingest({"x": X}, tmp_path / "s")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}
    with pytest.raises(
        DatasetError, match=r"s: there is something at this address, and nothing was touched.*overwrite=True"
    ):
        ingest({"x": X[:5]}, tmp_path / "s")
    with pytest.raises(DatasetError, match="different numbers of records"):
        ingest({"x": X, "y": X[1:]}, tmp_path / "s", overwrite=True)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}
    assert len(ingest({"y": X[:5]}, tmp_path / "s", overwrite=True)) == 5
    assert load(tmp_path / "s").fields == ("y",)


def test_overwrite_never_deletes_what_is_not_a_dataset(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(DatasetError, match="this is not a Zarr v3 group"):
        ingest({"x": X}, tmp_path, overwrite=True)
    with pytest.raises(DatasetError, match="this is a file"):
        ingest({"x": X}, tmp_path / "thesis.txt", overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"


def test_an_empty_directory_may_be_filled(tmp_path):
    assert len(ingest({"x": X}, tmp_path)) == 100


def test_an_ingest_that_fails_midway_is_incomplete(tmp_path):
    def source():
        yield from records(50)
        raise RuntimeError("disk unplugged")

    with pytest.raises(RuntimeError, match="disk unplugged"):
        ingest(source(), tmp_path / "s", chunk_records=5)
    with pytest.raises(DatasetError, match=r"incomplete: its ingest did not finish.*overwrite=True"):
        load(tmp_path / "s")
    same(ingest({"x": X, "label": LABEL}, tmp_path / "s", overwrite=True))


def test_a_killed_ingest_is_incomplete(tmp_path):
    code = """
import os, signal, sys
import numpy as np
from rapydli_flow.data import ingest
def source():
    for i in range(10):
        yield {"x": np.full(4, i)}
    os.kill(os.getpid(), signal.SIGKILL)
ingest(source(), sys.argv[1], chunk_records=2)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], check=False)
    assert run.returncode == -9
    assert os.listdir(tmp_path / "s" / "x" / "c")
    with pytest.raises(DatasetError, match="incomplete"):
        load(tmp_path / "s")


def with_record(number, **changes):
    found = list(records(20))
    found[number] = {**found[number], **changes}
    return found


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({"x": X, "label": LABEL[:99]}, "arrays have different numbers of records: x has 100, label has 99"),
        ({"train": {"x": X, "y": X[1:]}}, "split 'train': arrays have different numbers"),
        ({"x": X[:0]}, "the source has no records"),
        ({"x": np.float32(3)}, "the source has no records"),
        ({}, "the source has no records"),
        (iter(()), "the source has no records"),
        ([{}], "records have no fields"),
        (7, "a source is a dict of arrays, .* not int"),
        ("digits.csv", "not str"),
        ({"train": {"x": X}, "x": X}, "'train' is a split and 'x' is not"),
        ([1, 2], r"record 0 is a int; a record is a dict of arrays"),
        ({"a/b": X}, "'a/b' cannot name a field or a split"),
        ([{3: 1}], "3 cannot name a field"),
        ([{"": 1}], "'' cannot name"),
        (with_record(9, x=X[9, :5]), r"field 'x' of record 9 is float32\[5\], and of the first record float32\[6\]"),
        (with_record(9, x=X[9].astype("f8")), r"field 'x' of record 9 is float64\[6\], and of the first"),
        (with_record(9, more=1), "record 9 has fields x, label, more, and the first one x, label"),
        (with_record(9, x=[[1], [1, 2]]), "field 'x' of record 9 is not an array: "),
    ],
)
def test_sources_that_are_refused(tmp_path, source, text):
    with pytest.raises(DatasetError, match=text):
        ingest(source, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_ragged_batches_and_wrong_dtypes(tmp_path):
    with pytest.raises(DatasetError, match=r"fields of batch 0 have different numbers of records: x \(3,\), y \(4,\)"):
        ingest([{"x": np.zeros(3), "y": np.zeros(4)}], tmp_path / "s", batches=True)
    with pytest.raises(DatasetError, match=r"of batch 0 have different numbers of records: x \(\)"):
        ingest([{"x": 3.0}], tmp_path / "s", batches=True)
    with pytest.raises(
        DTypeError, match=r"field 'x' has dtype bool; a dataset holds float32, .* Convert it with astype"
    ):
        ingest({"x": np.zeros(3, bool)}, tmp_path / "s")
    with pytest.raises(SettingError, match="chunk_records=0 must be 1 or more"):
        ingest({"x": X}, tmp_path / "s", chunk_records=0)
    assert not (tmp_path / "s").exists()


def test_streaming_holds_little_memory(tmp_path):
    code = """
import resource, sys
import numpy as np
from rapydli_flow.data import ingest
ingest([{"x": np.zeros(2**20, np.uint8)}], sys.argv[1] + "warm")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = ingest(({"x": np.full(2**20, i % 251, np.uint8)} for i in range(300)), sys.argv[1])
print(len(data), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], check=True, capture_output=True, text=True)
    count, grown_mb = map(int, run.stdout.split())
    assert count == 300
    assert grown_mb < 120  # of 300 MB
