"""Transports: what all ranks gather, a rank that does not come, and leaving."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from distributed import Client, LocalCluster

import rapydli_flow
from rapydli_flow.errors import RunLost, SettingError
from rapydli_flow.runtime.peers import Peers
from rapydli_flow.runtime.shared import SharedMemory, create, folder
from rapydli_flow.runtime.transport import Alone, Threads
from rapydli_flow.scheduler import AllReduce, Exchange
from rapydli_flow.spec import Block

ROUNDS = 20


def parts_of(rank, count):
    """What a rank gives to a gather: two arrays, of a size and dtype of its own."""
    rng = np.random.default_rng([rank, count])
    return [rng.normal(size=(rank + 2, 3)), rng.integers(0, 99, 5 + count).astype(np.int32)]


def check_rounds(transport):
    """Gather some rounds, and look at everyone's bytes."""
    for count in range(ROUNDS):
        everyone = transport.gather(parts_of(transport.rank, count))
        for rank in range(transport.ranks):
            expected = b"".join(part.tobytes() for part in parts_of(rank, count))
            assert everyone[rank][: len(expected)].tobytes() == expected
    return transport.rank


def on_all(transports, function=check_rounds):
    with ThreadPoolExecutor(len(transports)) as pool:
        return list(pool.map(function, transports))


def shared(name, ranks, **options):
    """All ranks of a piece of shared memory, in this process."""
    out = [SharedMemory(name, rank, ranks, 4096, **options) for rank in range(ranks)]
    for transport in out:
        transport.joined()
    return out


def test_one_rank_alone():
    assert check_rounds(Alone()) == 0
    Alone().close()


@pytest.mark.parametrize("ranks", [2, 3])
def test_threads_gather(ranks):
    assert on_all(Threads.of(ranks)) == list(range(ranks))


@pytest.mark.parametrize("ranks", [2, 3])
def test_shared_memory_gathers(ranks):
    assert on_all(shared(f"test-{time.monotonic_ns()}", ranks)) == list(range(ranks))


def test_sums_are_taken_in_rank_order():
    parts = [np.array([v], np.float32) for v in (1e8, 1.0, -1e8)]

    def meet(transport):
        out = np.empty(1, np.float32)
        transport.meet(AllReduce(parts=1), [parts[transport.rank]], [out])
        return float(out[0])

    assert on_all(Threads.of(3), meet) == [float((parts[0] + parts[1] + parts[2])[0])] * 3
    with pytest.raises(TypeError, match="not a collective"):
        Alone().meet("shout", [parts[0]], [np.empty(1, np.float32)])


@pytest.mark.parametrize("make", [Threads.of, lambda ranks: shared(f"test-{time.monotonic_ns()}", ranks)])
def test_ranks_exchange_blocks(make):
    whole = np.arange(10 * 3, dtype=np.float64).reshape(10, 3)
    have = Block.along((10, 3), 0, (0, 4, 7, 10))
    want = tuple(Block((lo, 0), (hi, 3), (10, 3)) for lo, hi in ((0, 5), (3, 8), (6, 10)))  # a halo of one

    def meet(transport):
        out = np.empty(want[transport.rank].shape)
        op = Exchange(rank=transport.rank, have=have, want=want)
        transport.meet(op, [np.ascontiguousarray(whole[have[transport.rank].slices])], [out])
        return out

    for got, block in zip(on_all(make(3), meet), want, strict=True):
        np.testing.assert_array_equal(got, whole[block.slices])


def test_a_thread_that_does_not_come():
    first, _ = Threads.of(2, timeout_s=0.2)
    with pytest.raises(RunLost, match="rank 0: another rank of this process stopped, or did not come in time"):
        first.gather([np.zeros(1)])


def test_a_rank_that_does_not_come_to_shared_memory():
    first, second = shared(f"test-{time.monotonic_ns()}", 2, timeout_s=0.2)
    first._count = second._count = 0
    with pytest.raises(RunLost, match=r"rank 0: rank 1 did not come to collective 1 in 0\.2 s. Its worker may be dead"):
        first.gather([np.zeros(1)])


def test_closing_wakes_a_rank_that_waits():
    first, second = shared(f"test-{time.monotonic_ns()}", 2)
    threading.Timer(0.2, first.close).start()
    with pytest.raises(RunLost, match="rank 0: the run was given up while it waited for rank 1"):
        first.gather([np.zeros(1)])
    second.close()


def test_shared_memory_that_is_not_to_be_had():
    name = f"test-{time.monotonic_ns()}"
    with pytest.raises(SettingError, match=r"bytes of shared memory for collectives are not to be had in /dev/shm"):
        SharedMemory(name, 0, 2, 2**52)
    assert not (folder() / f"rapydli-{name}").exists()
    create(folder() / f"rapydli-{name}", 4096)
    with pytest.raises(SettingError, match="is there already: two runs have the same name"):
        SharedMemory(name, 0, 2, 64)
    (folder() / f"rapydli-{name}").unlink()


def test_processes_gather_through_shared_memory(tmp_path):
    name = f"test-{time.monotonic_ns()}"
    first = SharedMemory(name, 0, 2, 4096, timeout_s=60)
    program = (
        "from rapydli_flow.runtime.shared import SharedMemory\n"
        "from test_transport import check_rounds\n"
        f"check_rounds(SharedMemory({name!r}, 1, 2, 4096, timeout_s=60))\n"
    )
    path = f"{Path(__file__).parent}:{Path(rapydli_flow.__file__).parents[1]}"
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={"PYTHONPATH": path, "PATH": "/usr/bin"}, stderr=subprocess.PIPE, text=True
    )
    try:
        check_rounds(first)
    finally:
        first.joined()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


# over comms ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workers():
    with (
        LocalCluster(
            n_workers=3, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=":0"
        ) as cluster,
        Client(cluster),
    ):
        yield list(cluster.workers.values())


def connected(workers, **options):
    peers = [Peers(worker, rank, len(workers), **options) for rank, worker in enumerate(workers)]
    addresses = [peer.open() for peer in peers]
    for peer in peers:
        peer.connect(addresses)
    return peers


def test_peers_gather(workers):
    peers = connected(workers)
    assert on_all(peers) == [0, 1, 2]
    for peer in peers:
        peer.close()


def test_a_peer_that_does_not_come(workers):
    peers = connected(workers[:2], timeout_s=0.3)
    with pytest.raises(RunLost, match=r"rank 0: rank 1 did not come to collective 1 in 0\.3 s"):
        peers[0].gather([np.zeros(1)])
    for peer in peers:
        peer.close()


def test_a_peer_that_leaves(workers):
    peers = connected(workers)
    threading.Timer(0.2, peers[1].close).start()
    with pytest.raises(RunLost, match="rank 0: another rank closed its connection"):
        peers[0].gather([np.zeros(1)])
    with pytest.raises(RunLost, match="rank 2: "):
        peers[2].gather([np.zeros(1)])
    for peer in peers:
        peer.close()


def test_giving_up_wakes_a_peer_that_waits(workers):
    peers = connected(workers[:2])
    threading.Timer(0.2, peers[0].close).start()
    with pytest.raises(RunLost, match="rank 0: the run was given up"):
        peers[0].gather([np.zeros(1)])
    peers[1].close()
