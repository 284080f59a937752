"""Feed: the batch of each step, from whatever thread, cache size and read-ahead; and labels out of range."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapydli_flow.data import Feed, check_labels, ingest, load
from rapydli_flow.data import feed as feed_module
from rapydli_flow.data.cache import ChunkCache
from rapydli_flow.errors import CorruptChunk, DatasetError, DTypeError, SettingError

X = np.arange(200 * 6, dtype=np.float32).reshape(200, 6)
LABEL = np.arange(200) % 7
TINY = 6 * 10 * 6 * 4  # bytes: a few chunks, so that the cache evicts


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return ingest({"x": X, "label": LABEL}, tmp_path_factory.mktemp("feed") / "s", chunk_records=10)


def test_an_epoch_visits_each_record_once_and_drops_the_remainder(data):
    with Feed(data, 32, seed=4) as feed:
        assert feed.steps_per_epoch == 6
        for epoch in range(2):
            rows = np.concatenate([feed.rows(epoch * 6 + step) for step in range(6)])
            assert len(set(rows.tolist())) == 192
        assert not np.array_equal(feed.rows(0), feed.rows(6))
        with pytest.raises(ValueError, match="read-only"):
            feed.rows(0)[0] = 5


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    ahead=st.integers(0, 3),
    cache_bytes=st.sampled_from([0, TINY, 2**28]),
    window=st.integers(1, 4),
    shuffle=st.booleans(),
)
def test_a_batch_is_the_rows_of_its_step_in_any_order_of_asking(data, steps, ahead, cache_bytes, window, shuffle):
    how = {"seed": 9, "window": window, "shuffle": shuffle}
    with Feed(data, 24, ahead=ahead, cache_bytes=cache_bytes, **how) as feed, Feed(data, 24, **how) as other:
        for step in steps:
            rows = other.rows(step)
            np.testing.assert_array_equal(feed.rows(step), rows)
            lo, hi = step % 5, 24 - step % 3
            got = feed.batch(step, lo, hi)
            np.testing.assert_array_equal(got["x"], X[rows[lo:hi]])
            np.testing.assert_array_equal(got["label"], LABEL[rows[lo:hi]])
            assert feed.cache.held_bytes <= cache_bytes


def test_ranks_see_parts_of_the_same_batch(data):
    with Feed(data, 20) as feed:
        whole = feed.batch(7)["x"]
        parts = [feed.batch(7, lo, hi)["x"] for lo, hi in ((0, 7), (7, 13), (13, 20), (4, 4))]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_subsets_feed_their_own_records(data):
    part = data[50:150]
    with Feed(part, 10, cache_bytes=TINY) as feed:
        rows = feed.rows(3)
        assert rows.max() < 100
        np.testing.assert_array_equal(feed.batch(3)["x"], part.read(rows)["x"])
        np.testing.assert_array_equal(feed.batch(3)["x"], X[50:150][rows])


def test_in_stored_order_without_shuffle(data):
    with Feed(data, 64, shuffle=False) as feed:
        np.testing.assert_array_equal(feed.batch(1)["x"], X[64:128])
        np.testing.assert_array_equal(feed.batch(4)["x"], X[64:128])
        assert "in stored order" in repr(feed)


def test_fields(data):
    with Feed(data, 8, fields=["label"]) as feed:
        assert list(feed.batch(0)) == ["label"]
    with pytest.raises(DatasetError, match="there is no field 'y'"):
        Feed(data, 8, fields=["y"])


def counted_reads(feed):
    """Every (field, chunk) that a feed's cache reads from now on, and the threads that read."""
    reads, threads = [], set()
    for name, reader in feed.cache._readers.items():

        class Counting(type(reader)):
            def read(self, number):
                reads.append((self.name, number))
                threads.add(threading.current_thread().name)
                return super().read(number)

        counting = Counting(reader.array, name, reader.url, reader.every_chunk)
        feed.cache._readers[name] = counting
        if feed.cache._whole:
            feed.cache._whole[name].reader = counting
    return reads, threads


@pytest.mark.parametrize("cache_bytes", [8 * 10 * 6 * 4 + 8 * 10 * 8, 2**28])
def test_an_epoch_decodes_each_chunk_once_on_one_thread(data, cache_bytes):
    with Feed(data, 25, window=4, ahead=2, cache_bytes=cache_bytes) as feed:
        reads, threads = counted_reads(feed)
        for step in range(6):
            feed.batch(step)
        assert len(reads) == len(set(reads))
        assert {name.split("_")[0] for name in threads} == {"rapydli-feed"}
        assert len(threads) == 1


def test_the_next_steps_are_read_ahead(data):
    with Feed(data, 10, ahead=2, shuffle=False, cache_bytes=0) as feed:
        reads, _ = counted_reads(feed)
        feed.batch(0)
        feed._thread.submit(int).result()  # the thread has done what was asked of it
        assert [number for name, number in reads if name == "x"] == [0, 1, 2]
        feed.batch(1)
        feed._thread.submit(int).result()
        assert [number for name, number in reads if name == "x"] == [0, 1, 2, 3]


def test_batches_in_memory_are_the_callers_own(data):
    with Feed(data, 10) as feed:
        before = feed.batch(0)["x"].copy()
        for step in range(20):
            feed.batch(step)["x"][:] = -1
        assert feed.cache.complete
        np.testing.assert_array_equal(feed.batch(0)["x"], before)


def test_large_batches_in_memory_still_come_from_the_thread(data, monkeypatch):
    monkeypatch.setattr(feed_module, "COPY_BYTES", 0)
    with Feed(data, 100, shuffle=False) as feed:
        for step in range(4):
            np.testing.assert_array_equal(feed.batch(step)["label"], LABEL[step % 2 * 100 : step % 2 * 100 + 100])
        assert feed.cache.complete


@pytest.mark.parametrize("cache_bytes", [TINY, 2**28])
def test_the_share_that_is_in_memory(data, cache_bytes):
    part = data.take(np.arange(100, 200))
    with Feed(part, 10, shuffle=False, ahead=0, cache_bytes=cache_bytes) as feed:
        assert feed.cache.share(part.records) == 0.0
        feed.batch(0)
        feed.batch(1)
        assert feed.cache.share(part.records) == pytest.approx(0.2)  # 20 of 100 records, in two chunks
        assert feed.cache.share(part.records[:10]) == 1.0
        assert feed.cache.share(data.records[:100]) == 0.0
        for step in range(2, 10):
            feed.batch(step)
        share = feed.cache.share(part.records)
        assert share == 1.0 if cache_bytes > TINY else 0.3 < share < 0.7  # six chunks or fewer


def test_a_feed_after_another_uses_its_chunks(data):
    with Feed(data, 10, ahead=0) as feed:
        for step in range(20):
            feed.batch(step)
        with Feed(data, 20, seed=1, ahead=0, like=feed) as heir, Feed(data, 20, seed=1, ahead=0) as fresh:
            assert heir.cache.complete
            assert fresh.cache.held_bytes
            assert not fresh.cache.complete
            for name, array in fresh.batch(3).items():
                np.testing.assert_array_equal(heir.batch(3)[name], array)
            feed.close()
            assert heir.batch(4)["x"].shape == (20, 6)
            with Feed(data, 10, like=feed) as late, Feed(data, 10, fields=["x"], like=heir) as other:
                assert not late.cache.complete  # that one is closed
                assert list(other.batch(0)) == ["x"]


def test_many_threads_share_a_feed(data, monkeypatch):
    monkeypatch.setattr(feed_module, "STREAMS", 2)
    with Feed(data, 40, seed=1, cache_bytes=TINY) as feed:
        rows = [feed.rows(step) for step in range(15)]

        def rank(lo):
            for step in range(15):
                np.testing.assert_array_equal(feed.batch(step, lo, lo + 10)["x"], X[rows[step][lo : lo + 10]])
            return True

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(rank, (0, 10, 20, 30)))


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("cache_bytes", [0, 2**28])
def test_a_corrupt_chunk_is_told_to_the_step_that_needs_it(tmp_path, ahead, cache_bytes):
    made = ingest({"x": X}, tmp_path / "s", chunk_records=10)
    chunk = tmp_path / "s" / "x" / "c" / "3" / "0"
    good = chunk.read_bytes()
    chunk.write_bytes(good[:-1] + bytes([good[-1] ^ 255]))
    with Feed(made, 10, shuffle=False, ahead=ahead, cache_bytes=cache_bytes) as feed:
        for step in (0, 1, 2, 4, 5):
            np.testing.assert_array_equal(feed.batch(step)["x"], X[step * 10 : step * 10 + 10])
        for step in (2, 3, 3):
            if step == 3:
                with pytest.raises(CorruptChunk, match=r"chunk c/3/0 of array 'x' \(records 30\.\.39\)"):
                    feed.batch(step)
            else:
                feed.batch(step)
        chunk.write_bytes(good)
        np.testing.assert_array_equal(feed.batch(3)["x"], X[30:40])


def test_a_dataset_smaller_than_a_batch(data):
    with pytest.raises(DatasetError, match=r"200 records are fewer than one batch of 201\. Choose a smaller batch"):
        Feed(data, 201)
    with Feed(data, 200) as feed:
        assert feed.steps_per_epoch == 1


@pytest.mark.parametrize(("name", "value", "least"), [("batch", 0, 1), ("window", 0, 1), ("ahead", -1, 0)])
def test_settings_out_of_range(data, name, value, least):
    with pytest.raises(SettingError, match=f"Feed: {name}={value} must be {least} or more"):
        Feed(data, **{"batch": 5, name: value})


def test_steps_and_rows_out_of_range(data):
    with Feed(data, 5) as feed:
        with pytest.raises(SettingError, match="Feed: step=-1 must be 0 or more"):
            feed.batch(-1)
        for lo, hi in ((0, 6), (-1, 3), (4, 2)):
            with pytest.raises(SettingError, match=rf"rows \[{lo}, {hi}\) are not inside a batch of 5"):
                feed.batch(0, lo, hi)


def test_a_closed_feed_says_so_and_ends_its_thread(data):
    feed = Feed(data, 5)
    feed.batch(0)
    name = feed._thread._thread_name_prefix
    assert any(thread.name.startswith(name) for thread in threading.enumerate())
    feed.close()
    feed.close()
    assert not any(thread.name.startswith(name) for thread in threading.enumerate())
    with pytest.raises(SettingError, match=r"this feed is closed\. Make another one"):
        feed.batch(1)
    with pytest.raises(SettingError, match="this feed is closed"):
        feed._reading_ahead(1, (0, 5))


def test_closing_while_another_thread_waits(tmp_path):
    made = ingest({"x": X}, tmp_path / "s", chunk_records=10)
    feed = Feed(made, 10, ahead=1, cache_bytes=0)
    gate, waiting = threading.Event(), threading.Event()
    feed._reading_ahead(0, (0, 10)).result()
    feed._thread.submit(lambda: (waiting.set(), gate.wait()))
    assert waiting.wait(30)
    with ThreadPoolExecutor(2) as threads:
        asked = threads.submit(feed.batch, 9)
        while (0, 10) not in feed._coming or 10 not in feed._coming[0, 10]:
            pass
        closing = threads.submit(feed.close)
        while not feed._closed or feed._coming:
            pass
        with pytest.raises(SettingError, match="this feed is closed"):
            asked.result(30)
        gate.set()
        closing.result(30)


def test_a_pickled_feed_feeds_the_same(data):
    with Feed(data[20:120], 9, seed=5, window=2, ahead=1, fields=["x"], cache_bytes=TINY) as feed:
        feed.batch(3)
        with pickle.loads(pickle.dumps(feed)) as copy:
            assert repr(copy) == repr(feed)
            assert "batch=9, 11 steps an epoch, shuffled by seed 5 in windows of 2 chunks" in repr(copy)
            np.testing.assert_array_equal(copy.batch(17)["x"], feed.batch(17)["x"])


def test_a_chunk_larger_than_the_cache_is_not_kept(data):
    cache = ChunkCache(load(data.url).readers, 16)
    np.testing.assert_array_equal(cache.gather(np.array([199, 0]))["x"], X[[199, 0]])
    assert cache.held_bytes == 0
    assert not cache.complete
    assert cache.gather(np.array([], np.int64))["x"].shape == (0, 6)


def test_labels_in_range_pass():
    check_labels(LABEL, 7, "label")
    check_labels(np.array([], np.int64), 7, "label")
    check_labels(np.array([0, 9], np.uint8), 10, "label")


@pytest.mark.parametrize(
    ("values", "first", "text"),
    [
        (np.array([1, 12]), 344, r"label 12 at record 345 of 'label' is outside 0\.\.9 \(10 classes\)"),
        (np.array([-1, 12]), 0, r"label -1 at record 0 of 'label'"),
        (np.array([3, 10]), np.array([71, 5]), r"label 10 at record 5 of 'label'"),
        (np.array([[1, 2], [3, 200]], np.uint8), 0, r"label 200 at record 1 of 'label'"),
    ],
)
def test_labels_out_of_range_name_the_record(values, first, text):
    with pytest.raises(DatasetError, match=text):
        check_labels(values, 10, "label", first)


def test_labels_are_integers():
    with pytest.raises(DTypeError, match="labels of 'y' are float32: class numbers are integers"):
        check_labels(np.zeros(3, np.float32), 10, "y")
