"""Transports: what all ranks gather, a rank that does not come, and leaving."""

import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from distributed import Client, LocalCluster
from distributed.utils import sync

import rapydli_flow
from rapydli_flow.errors import RunLost, SettingError
from rapydli_flow.runtime.hosts import Hosts
from rapydli_flow.runtime.peers import Peers
from rapydli_flow.runtime.shared import SharedMemory, create, folder
from rapydli_flow.runtime.transport import CHUNK_BYTES, Alone, Threads
from rapydli_flow.runtime.wire import coded, decoded
from rapydli_flow.scheduler import AllReduce, Exchange, Shard
from rapydli_flow.scheduler.collective import halves
from rapydli_flow.scheduler.topology import BY_HOSTS, Topology
from rapydli_flow.spec import Block

ROUNDS = 20


def parts_of(rank, count, target=0):
    """What a rank hands over: two arrays, of a size and dtype of its own, one of them not contiguous."""
    rng = np.random.default_rng([rank, count, target])
    return [rng.normal(size=(rank + 2, 6))[:, ::2], rng.integers(0, 99, 5 + count).astype(np.int32)]


def raw(parts):
    return b"".join(part.tobytes() for part in parts)


def check_rounds(transport):
    """Swap with some ranks, share with all; look at everyone's bytes."""
    me, others = transport.rank, [r for r in range(transport.ranks) if r != transport.rank]
    for count in range(ROUNDS):
        sends = {r: parts_of(me, count, r) for r in others if (me + r + count) % 3}  # not with all every time
        expected = {r: raw(parts_of(r, count, me)) for r in others if (me + r + count) % 3}
        got = transport.swap("a test", sends, {r: len(text) for r, text in expected.items()})
        assert {r: data.tobytes() for r, data in got.items()} == expected
        transport.release()
        assert transport.share("a test", b"x" * (me + count)) == [b"x" * (r + count) for r in range(transport.ranks)]
    return me


def check_ahead(transport):
    """Rank 0 hands over before the others come; they answer once at the end."""
    if transport.rank == 0:
        for count in range(2):
            transport.swap("ahead", {r: [np.full(3, count + r)] for r in range(1, transport.ranks)}, {})
        got = transport.swap("back", {}, {r: 24 for r in range(1, transport.ranks)})
        assert [int(got[r].view(np.int64)[0]) for r in sorted(got)] == [10 * r for r in sorted(got)]
    else:
        for count in range(2):
            got = transport.swap("ahead", {}, {0: 24})
            assert got[0].view(np.int64).tolist() == [count + transport.rank] * 3
            transport.release()
        transport.swap("back", {0: [np.full(3, 10 * transport.rank)]}, {})
    transport.release()
    return transport.rank


def check_sums(transport):
    """Sums of all sizes, of all ranks and of the last two, in place and not: the same bits for everyone."""
    for size in (1, 5, 20_000, 1_200_000):
        for ranks in (tuple(range(transport.ranks)), tuple(range(transport.ranks))[-2:]):
            if transport.rank not in ranks:
                continue
            draw = {r: np.random.default_rng([size, r]).normal(size=(2, size)).astype(np.float32) for r in ranks}
            mine = [draw[transport.rank][0].copy(), draw[transport.rank][1, :3].copy()]
            outs = mine if size % 2 else [np.empty_like(x) for x in mine]
            transport.meet("a sum", AllReduce(ranks=ranks, parts=2), mine, outs)
            want = halves([draw[r] for r in ranks])
            np.testing.assert_array_equal(outs[0], want[0])
            np.testing.assert_array_equal(outs[1], want[1, :3])
    return transport.rank


def nearest(x):
    """The bfloat16 next to numbers: 8 bits of significand."""
    fraction, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.rint(fraction * 256) / 256, exponent).astype(np.float32)


def check_rounded(transport):
    """Sums of bfloat16 of all sizes: the same bits for everyone."""
    ranks = tuple(range(transport.ranks))
    for size in (1, 5, 50_000, 1_200_000):
        draw = [np.random.default_rng([size, r]).normal(size=size).astype(np.float32) for r in ranks]
        mine = [draw[transport.rank].copy(), np.full(3, np.nan, np.float32)]
        transport.meet("a sum", AllReduce(ranks=ranks, parts=2, wire="bfloat16"), mine, mine)
        exact, sizes = sum(x.astype(np.float64) for x in draw), sum(np.abs(x) for x in draw)
        assert (np.abs(mine[0] - exact) <= sizes * 2.0**-8 * (1 + len(ranks))).all()
        assert np.isnan(mine[1]).all()
        digest = sha256(mine[0]).digest()
        assert transport.share("what they got", digest) == [digest] * transport.ranks
    return transport.rank


def check_aside(transport):
    """What goes on aside may be late, and does not keep the others' short sums waiting."""
    ranks = tuple(range(transport.ranks))
    draw = [np.random.default_rng(r).integers(-9, 9, 200_000).astype(np.float64) for r in ranks]
    mine, total, late = draw[transport.rank], np.empty(5), np.empty(200_000)
    with ThreadPoolExecutor(1) as pool:

        def begin():
            return pool.submit(transport.aside.meet, "late", AllReduce(ranks=ranks), [mine], [late])

        begun = begin() if transport.rank > 0 else None
        for i in range(4):
            transport.meet("soon", AllReduce(ranks=ranks), [mine[i : i + 5]], [total])
            assert (total == sum(x[i : i + 5] for x in draw)).all()
        assert begun is None or not begun.done()
        transport.share("until all have looked", b"")
        (begun or begin()).result()
    assert (late == sum(draw)).all()
    return transport.rank


def on_all(transports, function=check_rounds):
    with ThreadPoolExecutor(len(transports)) as pool:
        return list(pool.map(function, transports))


def shared(name, ranks, **options):
    """All ranks of a piece of shared memory, in this process."""
    out = [SharedMemory(name, rank, ranks, CHUNK_BYTES, **options) for rank in range(ranks)]
    for transport in out:
        transport.joined()
    return out


CHECKS = [check_rounds, check_ahead, check_sums, check_rounded, check_aside]
MAKES = {"threads": Threads.of, "shared memory": lambda ranks: shared(f"test-{time.monotonic_ns()}", ranks, aside=True)}


def test_one_rank_alone():
    alone, out = Alone(), np.empty(3)
    alone.meet("a sum", AllReduce(ranks=(0,)), [np.arange(3.0)], [out])
    assert out.tolist() == [0, 1, 2]
    assert alone.share("a test", b"text") == [b"text"]
    alone.close()
    with pytest.raises(TypeError, match="not a collective"):
        alone.meet("a word", "shout", [out], [out])


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("way", MAKES)
def test_ranks_tell_each_other(way, ranks, check):
    assert on_all(MAKES[way](ranks), check) == list(range(ranks))


def test_bfloat16_is_the_nearest_one():
    halves = np.array([1.0, 1.00390625, 1.01171875, -3.0e38, 1e-30, 0.0, -0.0, np.inf], np.float32)  # two ties
    given = np.concatenate([halves, np.random.default_rng(0).normal(size=1000).astype(np.float32)])
    got = decoded(coded([given[:10], given[10:]], "bfloat16")[0].view(np.uint8), given.dtype, "bfloat16")
    np.testing.assert_array_equal(got[np.isfinite(given)], nearest(given[np.isfinite(given)]))
    assert got[7] == np.inf
    assert np.isinf(decoded(coded([np.float32([3.4e38])], "bfloat16")[0], np.dtype(np.float32), "bfloat16"))
    quiet = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(decoded(coded([quiet], "bfloat16")[0], quiet.dtype, "bfloat16")).all()


def test_sums_are_taken_by_halves_of_ranks():
    parts = [np.array([v], np.float32) for v in (1e8, 1.0, -1e8, 3.0)]

    def meet(transport, order):
        out = np.empty(1, np.float32)
        transport.meet("a sum", AllReduce(ranks=order), [parts[transport.rank]], [out])
        return float(out[0])

    for order in ((0, 1, 2), (0, 2, 1), (0, 1, 2, 3), (0, 2, 1, 3)):
        a, b, c, *d = (parts[r] for r in order)
        want = float(((a + b) + (c + d[0] if d else c))[0])
        ranks = len(order)
        assert on_all(Threads.of(ranks), lambda t, order=order: meet(t, order)) == [want] * ranks


@pytest.mark.parametrize("way", MAKES)
def test_ranks_exchange_blocks(way):
    whole = np.arange(10 * 3, dtype=np.float64).reshape(10, 3)
    have = Block.along((10, 3), 0, (0, 4, 7, 10))
    want = tuple(Block((lo, 0), (hi, 3), (10, 3)) for lo, hi in ((0, 5), (3, 8), (6, 10)))  # a halo of one
    shards = tuple(Shard(rank, block) for rank, block in enumerate(have))

    def meet(transport):
        out = np.empty(want[transport.rank].shape)
        op = Exchange(rank=transport.rank, have=shards, want=tuple(enumerate(want)), dtype="float64")
        transport.meet("a halo", op, [np.ascontiguousarray(whole[have[transport.rank].slices])], [out])
        return out

    for got, block in zip(on_all(MAKES[way](3), meet), want, strict=True):
        np.testing.assert_array_equal(got, whole[block.slices])


@pytest.mark.parametrize("way", MAKES)
def test_parts_of_a_sum_are_scattered(way):
    """Two ranks hold a part of a sum each; each of two others wants half of it, the first one all of it as well."""
    parts, whole = [np.random.default_rng(r).normal(size=(6, 4)) for r in range(2)], Block.all((6, 4))
    upper, lower = Block.along((6, 4), 0, (0, 3, 6))
    shards, want = (Shard(0, whole), Shard(1, whole, 1)), ((0, whole), (2, lower), (2, upper))

    def meet(transport):
        rank = transport.rank
        op = Exchange(rank=rank, have=shards, want=want, dtype="float64")
        outs = [np.full(want[i][1].shape, np.nan) for i in op.wanted] or [np.empty(0)]
        transport.meet("a scatter", op, [parts[rank]] if rank < 2 else [], outs)
        return outs

    first, second, third = on_all(MAKES[way](3), meet)
    np.testing.assert_array_equal(first[0], parts[0] + parts[1])
    assert second[0].size == 0
    np.testing.assert_array_equal(np.concatenate(third[::-1]), parts[0] + parts[1])


@pytest.mark.parametrize("chunk_bytes", [8, 40, 1000, 1 << 20])
@pytest.mark.parametrize("way", MAKES)
def test_exchanges_of_several_arrays_go_together_in_messages_of_any_length(way, chunk_bytes, monkeypatch):
    """One is scattered along rows, one gathered along columns, and a sum of all three ranks divided unevenly."""
    monkeypatch.setattr(Threads if way == "threads" else SharedMemory, "chunk_bytes", chunk_bytes)
    rng = np.random.default_rng(0)
    rows, sums = rng.normal(size=(9, 5)), [rng.normal(size=(7, 3)) for _ in range(3)]
    thirds = Block.along((9, 5), 0, (0, 2, 3, 9))
    columns = Block.along((9, 5), 1, (0, 1, 4, 5))
    uneven = Block.along((7, 3), 0, (0, 1, 5, 7))
    whole = Block.all((7, 3))
    wants = (tuple(enumerate(thirds)), tuple((r, Block.all((9, 5))) for r in range(3)), tuple(enumerate(uneven)))
    haves = (
        (Shard(0, Block.all((9, 5))),),
        tuple(Shard(r, block) for r, block in enumerate(columns)),
        tuple(Shard(r, whole, r) for r in range(3)),
    )

    def meet(transport):
        rank = transport.rank
        each = [Exchange(rank=rank, have=h, want=w, dtype="float64") for h, w in zip(haves, wants, strict=True)]
        op = Exchange.together(each)
        assert [op.sent_bytes(), len(op.held), len(op.wanted)] == [sum(e.sent_bytes() for e in each), 3 - (rank > 0), 3]
        xs = [rows] * (rank == 0) + [np.ascontiguousarray(rows[columns[rank].slices]), sums[rank]]
        outs = [np.full(op.want[i][1].shape, np.nan) for i in op.wanted]
        for _ in range(2):
            transport.meet("all of them", op, xs, outs)
        return outs

    for rank, (scattered, gathered, added) in enumerate(on_all(MAKES[way](3), meet)):
        np.testing.assert_array_equal(scattered, rows[thirds[rank].slices])
        np.testing.assert_array_equal(gathered, rows)
        np.testing.assert_array_equal(added, sum(sums)[uneven[rank].slices])


def test_a_thread_that_does_not_come():
    first, _ = Threads.of(2, timeout_s=0.2)
    with pytest.raises(RunLost, match=r"rank 0: rank 1 did not come to a test in 0\.2 s"):
        first.share("a test", b"")


def test_a_rank_that_does_not_come_to_shared_memory():
    first, _ = shared(f"test-{time.monotonic_ns()}", 2, timeout_s=0.2)
    with pytest.raises(RunLost, match=r"rank 0: rank 1 did not come to a test in 0\.2 s. Its worker may be dead"):
        first.share("a test", b"")


def test_closing_wakes_a_rank_that_waits():
    first, second = shared(f"test-{time.monotonic_ns()}", 2)
    threading.Timer(0.2, first.close).start()
    with pytest.raises(RunLost, match="rank 0: the run was given up while it waited for rank 1"):
        first.share("a test", b"")
    second.close()


def test_shared_memory_that_is_not_to_be_had():
    name = f"test-{time.monotonic_ns()}"
    with pytest.raises(SettingError, match=r"bytes of shared memory for collectives are not to be had in /dev/shm"):
        SharedMemory(name, 0, 2, 2**52)
    assert not (folder() / f"rapydli-{name}").exists()
    create(folder() / f"rapydli-{name}-aside", 4096)
    with pytest.raises(SettingError, match="is there already"):
        SharedMemory(name, 0, 2, 64, aside=True)
    (folder() / f"rapydli-{name}-aside").unlink()
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
            n_workers=4, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=":0"
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


@pytest.mark.parametrize("check", CHECKS)
def test_peers_tell_each_other(workers, check):
    peers = connected(workers[:3], aside=True)
    assert on_all(peers, check) == [0, 1, 2]
    for peer in peers:
        peer.close()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("hosts", [(0, 0, 1, 1), (0, 0, 0, 1)])
def test_ranks_of_two_hosts_tell_each_other(workers, hosts, check):
    """Shared memory for those of a host, comms between hosts; sums by hosts where these have as many."""
    topology = Topology(hosts)
    assert (topology.choose((0, 1, 2, 3), 4_800_000) == BY_HOSTS) == (hosts == (0, 0, 1, 1))
    peers = connected(workers, aside=True)
    ends = []
    for rank, peer in enumerate(peers):
        peer.topology = peer.aside.topology = topology
        here = topology.beside(rank)
        name = f"test-{id(peers)}-{hosts[rank]}"
        size = here.index(rank), len(here), Hosts.chunk_bytes
        ends.append(Hosts(peer, here, SharedMemory(name, *size, aside=True) if len(here) > 1 else None))
    for end in ends:
        end.joined()
    assert on_all(ends, check) == [0, 1, 2, 3]
    for end in ends:
        end.close()


def test_a_peer_that_does_not_come(workers):
    peers = connected(workers[:2], timeout_s=0.3)
    with pytest.raises(RunLost, match=r"rank 0: rank 1 did not come to a test in 0\.3 s"):
        peers[0].share("a test", b"")
    for peer in peers:
        peer.close()


def test_a_peer_that_cannot_be_reached(workers):
    """Its listener is gone; or something takes connections there that never says a word, as behind a firewall."""
    first, second = (Peers(worker, rank, 2, timeout_s=0.5) for rank, worker in enumerate(workers[:2]))
    here, gone = first.open(), second.open()
    sync(workers[1].loop, second._close)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for address, why in (
            (gone, "(refused|no answer)"),
            (f"tcp://127.0.0.1:{silent.getsockname()[1]}", "no answer"),
        ):
            text = (
                rf"rank 0 on worker {workers[0].address} cannot reach rank 1 at {address} in 0\.5 s \(.*{why}.*\)\. Is "
                "its worker there, and does a firewall between them let this port through.* RAPYDLI_PEER_PORTS"
            )
            with pytest.raises(RunLost, match=text):
                first.connect([here, address])
    first.close()


def test_a_peer_that_leaves(workers):
    peers = connected(workers[:3])
    threading.Timer(0.2, peers[1].close).start()
    with pytest.raises(RunLost, match="rank 0: another rank closed its connection"):
        peers[0].share("a test", b"")
    with pytest.raises(RunLost, match="rank 2: "):
        peers[2].share("a test", b"")
    for peer in peers:
        peer.close()


def test_giving_up_wakes_a_peer_that_waits(workers):
    peers = connected(workers[:2])
    threading.Timer(0.2, peers[0].close).start()
    with pytest.raises(RunLost, match="rank 0: the run was given up"):
        peers[0].share("a test", b"")
    peers[1].close()
