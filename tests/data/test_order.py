"""The visiting order of an epoch."""

import json
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rapydli_flow.data import epoch_order
from rapydli_flow.errors import SettingError

SEEDS = st.integers(0, 2**64 - 1)


@given(
    size=st.integers(0, 300),
    chunk=st.integers(1, 50),
    seed=SEEDS,
    epoch=st.integers(0, 10**6),
    window=st.integers(1, 9),
)
def test_it_is_a_permutation_that_needs_one_window_at_a_time(size, chunk, seed, epoch, window):
    order = epoch_order(size, chunk, seed=seed, epoch=epoch, window=window)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(size))
    touched = order // chunk
    first = {}
    last = {}
    for at, number in enumerate(touched.tolist()):
        first.setdefault(number, at)
        last[number] = at
    for number in first:  # chunks whose records are still being visited when this one is opened
        open_now = [other for other in first if first[other] <= first[number] <= last[other]]
        assert len(open_now) <= window
    np.testing.assert_array_equal(order, epoch_order(size, chunk, seed=seed, epoch=epoch, window=window))


@given(kept=st.sets(st.integers(0, 199), min_size=1), chunk=st.integers(1, 40), seed=SEEDS)
def test_a_subset_uses_the_chunks_underneath(kept, chunk, seed):
    subset = np.array(sorted(kept))
    order = epoch_order(len(subset), chunk, seed=seed, epoch=1, window=1, subset=subset)
    np.testing.assert_array_equal(np.sort(order), np.arange(len(subset)))
    changes = np.count_nonzero(np.diff(subset[order] // chunk))
    assert changes == len(np.unique(subset // chunk)) - 1  # one visit to each chunk


def test_seed_and_epoch_change_the_order():
    def order(seed, epoch):
        return epoch_order(100, 7, seed=seed, epoch=epoch).tolist()

    orders = [order(seed, epoch) for seed in range(5) for epoch in range(5)]
    assert len({tuple(one) for one in orders}) == 25


def test_without_shuffle_it_is_sequential():
    np.testing.assert_array_equal(epoch_order(9, 2, seed=3, epoch=4, shuffle=False), np.arange(9))


def test_records_of_a_whole_window_are_mixed():
    places = np.zeros(64)
    for seed in range(400):
        places[epoch_order(64, 8, seed=seed, epoch=0)] += np.arange(64)
    assert np.abs(places / 400 - 31.5).max() < 5 * 18.5 / 20  # mean place of each record, 5 sigma


def in_words(size, chunk, *, seed, epoch, window):
    """The same order with Python's own integers and sort, from the description in `order`'s docstring."""

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    def key(stream, index):
        golden = 0x9E3779B97F4A7C15
        field = mix((seed + golden) % 2**64) ^ ((epoch * 0xBF58476D1CE4E5B9 + zlib.crc32(stream)) % 2**64)
        return mix((mix(field) + index * golden) % 2**64)

    chunks = sorted(range(-(-size // chunk)), key=lambda number: key(b"data/order/chunks", number))
    return [
        record
        for lo in range(0, len(chunks), window)
        for record in sorted(
            (record for record in range(size) if record // chunk in chunks[lo : lo + window]),
            key=lambda record: key(b"data/order/records", record),
        )
    ]


@given(size=st.integers(1, 60), chunk=st.integers(1, 9), seed=SEEDS, epoch=st.integers(0, 99), window=st.integers(1, 4))
def test_it_is_what_the_description_says(size, chunk, seed, epoch, window):
    how = {"seed": seed, "epoch": epoch, "window": window}
    assert epoch_order(size, chunk, **how).tolist() == in_words(size, chunk, **how)


def test_the_order_is_frozen_and_the_same_in_another_process():
    code = (
        "from rapydli_flow.data import epoch_order\n"
        "print(epoch_order(20, 4, seed=2**63 + 11, epoch=3, window=2).tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert json.loads(run.stdout) == FROZEN_ORDER
    assert epoch_order(20, 4, seed=2**63 + 11, epoch=3, window=2).tolist() == FROZEN_ORDER


# a run that is resumed by a later version must visit the records in the order it was started with
FROZEN_ORDER = [4, 19, 7, 16, 5, 17, 18, 6, 9, 1, 0, 3, 11, 8, 2, 10, 15, 12, 13, 14]


@pytest.mark.parametrize(("name", "value"), [("chunk", 0), ("window", 0)])
def test_sizes_are_positive(name, value):
    sizes = {"chunk": 3, "window": 2, name: value}
    with pytest.raises(SettingError, match=f"epoch_order: {name}=0 must be 1 or more"):
        epoch_order(10, sizes["chunk"], window=sizes["window"], seed=0, epoch=0)
    with pytest.raises(SettingError, match="seed=-4 is outside"):
        epoch_order(10, 2, seed=-4, epoch=0)
