"""Datasets: where they are, what they hold, reading them, cutting them, and what is said when they are broken."""

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from rapydli_flow.data import Dataset, ingest, load, open_group
from rapydli_flow.errors import CorruptChunk, DatasetError, DatasetNotFound, DTypeError, MissingDependency, SettingError
from rapydli_flow.spec import Spec

RNG = np.random.default_rng(3)
X = RNG.integers(0, 255, (57, 4, 3), dtype=np.uint8)
LABEL = np.arange(57) % 5


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    url = tmp_path_factory.mktemp("data") / "set.zarr"
    ingest({"x": X, "label": LABEL}, url, chunk_records=10)
    return url


@pytest.fixture
def data(url):
    return load(url)


@pytest.fixture
def group(tmp_path):
    return zarr.open_group(tmp_path / "made.zarr", mode="w", zarr_format=3)


def test_a_dataset_says_what_one_record_is(data):
    assert len(data) == 57
    assert data.fields == ("label", "x")
    assert data.specs == {"x": Spec((4, 3), "uint8"), "label": Spec((), "int64")}
    assert data.chunk_records == 10
    assert data.splits == ()
    assert repr(data) == f"Dataset('{data.url}', 57 records: label int64[], x uint8[4,3])"
    assert ">4\u00d73</td>" in data._repr_html_()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 56), max_size=80))
def test_read_is_numpy_indexing(url, rows):
    got = load(url).read(rows)
    np.testing.assert_array_equal(got["x"], X[np.array(rows, int)])
    np.testing.assert_array_equal(got["label"], LABEL[np.array(rows, int)])
    assert got["x"].dtype == np.uint8
    assert got["x"].shape == (len(rows), 4, 3)


def test_each_chunk_is_read_once(data):
    reads = []
    for name, reader in data.readers.items():
        counted = reader.array

        class Counting:
            def __init__(self, array):
                self.array = array

            def __getattr__(self, attribute):
                return getattr(self.array, attribute)

            def __getitem__(self, part):
                reads.append((part.start, part.stop))
                return self.array[part]

        data.readers[name] = type(reader)(Counting(counted), name, reader.url, reader.every_chunk)
    data.read([56, 0, 11, 1, 12, 0], ["x"])
    assert sorted(reads) == [(0, 10), (10, 20), (50, 57)]


def test_read_of_some_fields_and_none_that_are_not_there(data):
    assert list(data.read([1], ["label"])) == ["label"]
    with pytest.raises(DatasetError, match=r"set\.zarr: there is no field 'y'\. Fields: label, x\."):
        data.read([1], ["y"])


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([57], r"record index 57 is outside 0\.\.56: this dataset has 57 records"),
        ([3, -1], r"record index -1 is outside 0\.\.56"),
        ([0.5], r"record indices are whole numbers on one axis; these have dtype float64 and shape \(1,\)"),
        ([[1, 2]], r"these have dtype int64 and shape \(1, 2\)"),
        ([True], "dtype bool"),
    ],
)
def test_indices_that_are_not_there(data, rows, text):
    with pytest.raises(DatasetError, match=text):
        data.read(rows)


def test_take_and_slices_compose(data):
    part = data[10:30]
    assert len(part) == 20
    assert "20 of 57 records" in repr(part)
    np.testing.assert_array_equal(part.read([0, 5])["label"], LABEL[[10, 15]])
    again = part.take([7, 3])
    np.testing.assert_array_equal(again.records, [13, 17])
    np.testing.assert_array_equal(data[::2].records, np.arange(0, 57, 2))
    np.testing.assert_array_equal(part.take(part.read(range(20))["label"] == 2).records, [12, 17, 22, 27])


def test_selections_that_are_refused(data):
    with pytest.raises(DatasetError, match="a dataset needs a record, and this selection has none"):
        data[50:50]
    with pytest.raises(DatasetError, match="take: record 4 is named twice"):
        data.take([4, 2, 4])
    with pytest.raises(DatasetError, match=r"data\[3\]: use data\.read\(\[3\]\) for records"):
        data[3]


def test_split_is_exact_disjoint_and_the_same_everywhere(data):
    first, second = data.split(0.7, seed=1)
    assert (len(first), len(second)) == (40, 17)
    np.testing.assert_array_equal(np.sort(np.concatenate([first.records, second.records])), np.arange(57))
    np.testing.assert_array_equal(first.records, load(data.url).split(0.7, seed=1)[0].records)
    assert not np.array_equal(first.records, data.split(0.7, seed=2)[0].records)
    # frozen: the same part on every machine and NumPy version
    assert first.records[:12].tolist() == FROZEN_SPLIT


FROZEN_SPLIT = [0, 1, 2, 6, 9, 10, 12, 13, 14, 15, 16, 17]


@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=60),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**64 - 1),
)
def test_stratified_split_keeps_the_proportions(labels, fraction, seed):
    from rapydli_flow.data.split import split_positions

    labels = np.array(labels)
    size = round(fraction * len(labels))
    if not 0 < size < len(labels):
        with pytest.raises(DatasetError, match="both need a record"):
            split_positions(np.arange(len(labels)), fraction, seed=seed, labels=labels)
        return
    first, second = split_positions(np.arange(len(labels)), fraction, seed=seed, labels=labels)
    assert len(first) == size
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(len(labels)))
    for label in set(labels.tolist()):
        assert abs((labels[first] == label).sum() - fraction * (labels == label).sum()) < 1 + 1e-9


def test_split_of_a_dataset_by_label(data):
    first, _ = data[:50].split(0.5, stratify="label")
    assert np.bincount(first.read(range(25))["label"]).tolist() == [5, 5, 5, 5, 5]
    with pytest.raises(DatasetError, match=r"split: 'x' has records of shape \(4, 3\); a label is a scalar"):
        data.split(0.5, stratify="x")
    with pytest.raises(DatasetError, match=r"split\(1\) of 57 records gives parts of 57 and 0: both need a record"):
        data.split(1.0)
    with pytest.raises(SettingError, match=r"seed=-1 is outside 0\.\.2\*\*64-1"):
        data.split(0.5, seed=-1)


def test_pickled_datasets_are_addresses_and_open_elsewhere(data):
    part = data[3:9]
    part.read([0])
    assert len(pickle.dumps(data)) < 400
    copy = pickle.loads(pickle.dumps(part))
    assert "contents" not in vars(copy)
    np.testing.assert_array_equal(copy.read([1])["x"], X[[4]])
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).read([0, 5])['label'].tolist())"
    run = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(part), capture_output=True, check=True)
    assert run.stdout.decode().strip() == str(LABEL[[3, 8]].tolist())


def test_relative_paths_mean_the_same_in_every_process(url, monkeypatch):
    monkeypatch.chdir(url.parent)
    assert load("set.zarr").url == str(url)
    assert load(f"file://{url}").url == str(url)


def test_reads_from_many_threads_agree(data):
    rows = [RNG.permutation(57)[:20] for _ in range(16)]
    with ThreadPoolExecutor(8) as threads:
        for wanted, got in zip(rows, threads.map(data.read, rows), strict=True):
            np.testing.assert_array_equal(got["x"], X[wanted])


def test_fsspec_urls():
    data = ingest({"train": {"x": X}}, "memory://sets/a.zarr")
    np.testing.assert_array_equal(load("memory://sets/a.zarr")["train"].read([5])["x"], X[[5]])
    assert data["train"].address == "memory://sets/a.zarr/train"
    with pytest.raises(DatasetNotFound, match="memory://sets/b: there is nothing at this address"):
        load("memory://sets/b")
    with pytest.raises(SettingError, match="Protocol not known: bogus"):
        load("bogus://a")
    with pytest.raises(
        MissingDependency, match=r"libarchive://a: .* fsspec needs this package for such URLs: install it"
    ):
        load("libarchive://a")


def test_nothing_there(tmp_path):
    with pytest.raises(DatasetNotFound, match=r"none: there is nothing at this address.*data\.ingest"):
        load(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        open_group(tmp_path)


def test_something_else_there(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DatasetError, match="this is not a Zarr v3 group"):
        load(tmp_path)
    with pytest.raises(DatasetError, match=r"notes\.txt: this is a file, and a dataset is a directory"):
        load(tmp_path / "notes.txt")


def test_splits(tmp_path):
    data = ingest({"train": {"x": X}, "test": {"x": X[:9]}}, tmp_path / "s")
    assert data.splits == ("test", "train")
    assert len(data["test"]) == 9
    assert repr(data) == f"Dataset('{tmp_path}/s', splits: test, train)"
    assert ">train</td>" in data._repr_html_()
    with pytest.raises(DatasetError, match=r'splits \(test, train\) and no records of its own.*data\["test"\]'):
        len(data)
    with pytest.raises(DatasetError, match=r"there is no split 'val'\. Splits here: test, train; fields: none"):
        data["val"]
    with pytest.raises(DatasetError, match="'x' is a field, not a split"):
        data["train"]["x"]
    with pytest.raises(DatasetError, match="there is no group 'gone' inside"):
        len(Dataset(data.url, "gone"))
    with pytest.raises(DatasetError, match="'train/x' is an array, and a dataset is a group"):
        len(Dataset(data.url, "train/x"))


def test_groups_in_groups(tmp_path, group):
    group.create_array("a/b/x", data=X)
    np.testing.assert_array_equal(load(tmp_path / "made.zarr")["a"]["b"].read([2])["x"], X[[2]])


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({}, r"made\.zarr: this group holds no arrays"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(4)}, "different numbers of records: x has 3, y has 4"),
        ({"x": np.zeros((0, 2))}, r"this dataset is empty: its arrays \(x\) have no records"),
        ({"x": np.zeros(())}, "array 'x' is a scalar; records are on axis 0"),
    ],
)
def test_groups_that_are_no_datasets(tmp_path, group, arrays, text):
    for name, array in arrays.items():
        group.create_array(name, data=array)
    with pytest.raises(DatasetError, match=text):
        load(tmp_path / "made.zarr")


def test_a_newer_format_is_refused(tmp_path, group):
    group.create_array("x", data=X)
    group.update_attributes({"rapydli_flow": {"format": 9, "complete": True}})
    with pytest.raises(DatasetError, match=r"written in dataset format 9, and this version .* reads format 1"):
        load(tmp_path / "made.zarr")


def test_foreign_groups_missing_chunks_are_the_fill_value(tmp_path, group):
    group.create_array("x", shape=(6, 5), chunks=(2, 2), dtype="float32", fill_value=7)[2:4] = 1
    wanted = np.full((6, 5), 7, np.float32)
    wanted[2:4] = 1
    np.testing.assert_array_equal(load(tmp_path / "made.zarr").read(range(6))["x"], wanted)


def test_foreign_chunks_byte_order_and_shards(tmp_path, group):
    big = np.arange(24, dtype=">f4").reshape(6, 4)
    group.create_array("big", data=big, chunks=(4, 3))
    group.create_array("sharded", data=big.astype("f8"), chunks=(1, 2), shards=(3, 4))
    data = load(tmp_path / "made.zarr")
    got = data.read([5, 0])
    assert got["big"].dtype == np.dtype("float32")
    np.testing.assert_array_equal(got["big"], big[[5, 0]])
    np.testing.assert_array_equal(got["sharded"], big[[5, 0]])
    assert data.chunk_records == 1


def test_dtypes_that_no_network_takes_are_named(tmp_path, group):
    group.create_array("mask", data=np.zeros(4, bool))
    with pytest.raises(DTypeError, match=r"field 'mask' cannot be fed to a network. Spec: dtype bool is not one of"):
        _ = load(tmp_path / "made.zarr").specs


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "delete"])
def test_a_corrupt_chunk_is_named(tmp_path, compress, harm):
    data = ingest({"x": X, "label": LABEL}, tmp_path / "s", chunk_records=10, compress=compress)
    chunk = tmp_path / "s" / "x" / "c" / "2" / "0" / "0"
    whole = chunk.read_bytes()
    if harm == "flip":
        chunk.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    elif harm == "truncate":
        chunk.write_bytes(whole[:-7])
    elif harm == "empty":
        chunk.write_bytes(b"")
    else:
        chunk.unlink()
    np.testing.assert_array_equal(data.read([0, 19, 30])["x"], X[[0, 19, 30]])
    np.testing.assert_array_equal(data.read([25], ["label"])["label"], LABEL[[25]])
    text = "is missing" if harm == "delete" else r"\(records 20\.\.29\) cannot be decoded"
    with pytest.raises(CorruptChunk, match=rf"s: chunk c/2/0/0 of array 'x' {text}"):
        data.read([25])
    with pytest.raises(OSError, match="ingest it again"):
        data.read([25])


def test_a_chunk_of_zeros_that_is_lost_is_found(tmp_path):
    data = ingest({"x": np.zeros((20, 3), np.float32)}, tmp_path / "s", chunk_records=10)
    (tmp_path / "s" / "x" / "c" / "1" / "0").unlink()
    with pytest.raises(CorruptChunk, match="chunk c/1/0 of array 'x' is missing, although every chunk was written"):
        data.read([10])


def test_of_several_keys_the_corrupt_one_is_named(tmp_path, group):
    group.create_array("x", data=np.arange(48.0).reshape(6, 8), chunks=(2, 4), compressors=[zarr.codecs.Crc32cCodec()])
    chunk = tmp_path / "made.zarr" / "x" / "c" / "1" / "1"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(CorruptChunk, match=r"chunk c/1/1 of array 'x' \(records 2\.\.3\) cannot be decoded"):
        load(tmp_path / "made.zarr").read([3])
