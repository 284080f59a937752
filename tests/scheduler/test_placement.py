"""Which worker each rank is placed on, beside all placements that there are."""

from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import small, step_of, traced

from rapydli_flow import optim
from rapydli_flow.errors import NoWorkers, TooLittleMemory
from rapydli_flow.scheduler import Link, Links, Slot, check_room, make_plan, place, traffic
from rapydli_flow.spec import Spec
from rapydli_flow.testing.plans import programs

STEP = step_of(traced(small, Spec((8, 12, 12, 2))), optim.sgd(0.1))


def slots_on(*hosts, **how):
    """A worker on each of these hosts; addresses are in their order."""
    return [Slot(f"tcp://{i:03}", host, **how) for i, host in enumerate(hosts)]


def chain(order, size_bytes=1_000_000):
    """Ranks in a row that tell each other something."""
    sent = np.zeros((len(order), len(order)), int)
    for a, b in pairwise(order):
        sent[a, b] = sent[b, a] = size_bytes
    return sent.tolist()


def seconds(sent, slots, links, reads):
    """What `place` minimises, written down."""
    pairs = permutations(range(len(slots)), 2)
    told = sum(links.link(slots[a].host, slots[b].host).move_s(sent[a][b]) for a, b in pairs)
    return told + sum(r * (1 - slot.held) / links.between.bytes_s for r, slot in zip(reads, slots, strict=True))


def fit(slots, needs, reads):
    room = (slot.free_bytes is None or need <= slot.free_bytes for need, slot in zip(needs, slots, strict=True))
    return all(room) and all(slot.reaches or not r for r, slot in zip(reads, slots, strict=True))


def cluster(pick, ranks):
    """Some ranks on up to three hosts, not all of which have memory for all, or see the data: traffic, slots, links,
    needs, reads. ``pick`` takes one of several values."""
    sent = [[0 if a == b else pick([0, 0, 1, 10_000, 3_000_000]) for b in range(ranks)] for a in range(ranks)]
    slots = [
        Slot(f"tcp://{i}", pick("abc"), pick([None, 3, 5]), held=pick([0, 0, 0.5, 1]), reaches=pick([True, False]))
        for i in range(ranks + pick([0, 1]))
    ]
    links = Links({pair: Link(pick([1e-4, 1e-2]), pick([1e7, 1e8, 1e9])) for pair in combinations("abc", 2)})
    return sent, slots, links, [pick([1, 4]) for _ in range(ranks)], [pick([0, 0, 50_000]) for _ in range(ranks)]


def every(sent, slots, links, needs, reads):
    """Seconds of all placements that fit."""
    return [seconds(sent, p, links, reads) for p in permutations(slots, len(sent)) if fit(p, needs, reads)]


@given(st.data(), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_a_placement_fits_and_is_found_if_there_is_one(data, ranks):
    sent, slots, links, needs, reads = made = cluster(lambda values: data.draw(st.sampled_from(values)), ranks)
    if not every(*made):
        with pytest.raises(NoWorkers, match=r"no worker is left for rank \d"):
            place(sent, slots, links, needs=needs, reads=reads)
        return
    found = place(sent, slots, links, needs=needs, reads=reads)
    assert len(set(found.addresses)) == ranks
    assert fit(found.slots, needs, reads)
    assert found.moved.seconds == pytest.approx(seconds(sent, found.slots, links, reads))
    assert all(other is None or found.moved.seconds <= other.seconds * (1 + 1e-9) for _, other in found.others)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 6])
def test_small_clusters_are_placed_as_well_as_can_be(ranks):
    rng = np.random.default_rng(ranks)
    for _ in range(80):
        sent, slots, links, needs, reads = made = cluster(lambda values: values[rng.integers(len(values))], ranks)
        if times := every(*made):
            found = place(sent, slots, links, needs=needs, reads=reads)
            assert found.moved.seconds <= min(times) * (1 + 1e-9)


def test_an_even_cluster_is_filled_host_by_host():
    slots = slots_on("b", "a", "b", "a", "a")
    for strategy in ({}, {"strategy": "spatial"}, {"shard": "state"}):
        sent = traffic(programs(STEP, make_plan(STEP, 3, **strategy)))
        assert place(sent, slots, Links()).addresses == ("tcp://001", "tcp://003", "tcp://004")
    assert place([[0] * 4] * 4, slots, Links()).addresses == ("tcp://001", "tcp://003", "tcp://004", "tcp://000")


def test_neighbours_share_a_host():
    found = place(chain([0, 3, 1, 4, 2, 5]), slots_on(*"ababab"), Links())
    assert found.moved.between_bytes == 2_000_000  # one border
    assert sorted(zip(found.hosts, range(6), strict=True)) in (
        [("a", 0), ("a", 1), ("a", 3), ("b", 2), ("b", 4), ("b", 5)],
        [("a", 2), ("a", 4), ("a", 5), ("b", 0), ("b", 1), ("b", 3)],
    )
    assert [name for name, _ in found.others] == ["host after host", "in turn over hosts"]
    assert found.others[0][1].between_bytes == 10_000_000


def test_a_switch_before_the_slow_line():
    slots = slots_on("a", "b", "far")
    links = Links({("a", "b"): Link(1e-4, 1e9), ("b", "far"): Link(1e-2, 1e7), ("far", "a"): Link(1e-2, 1e7)})
    sent = chain([0, 2, 1])
    sent[0][2] = sent[2][0] = 9_000_000
    found = place(sent, slots, links)
    assert found.hosts == ("a", "far", "b")
    assert links.link("a", "far") == links.link("far", "a") != links.link("a", "b")


def test_ranks_go_where_the_data_is():
    slots = [*slots_on("a", "a"), Slot("tcp://9", "b", held=1.0)]
    assert place([[0, 0], [0, 0]], slots, Links(), reads=[0, 1_000_000]).addresses == ("tcp://000", "tcp://9")
    blind = [*slots_on("a", "a", reaches=False), Slot("tcp://9", "b")]
    found = place(chain([0, 1]), blind, Links(), reads=[0, 8])
    assert found.hosts == ("a", "b")
    with pytest.raises(NoWorkers, match=r"no worker is left for rank 1: of 3, 3 have .* and 1 see the dataset"):
        place(chain([0, 1]), blind, Links(), reads=[8, 8])


def test_ranks_go_where_they_fit():
    slots = [Slot("tcp://0", "a", 10), Slot("tcp://1", "a", 10), Slot("tcp://2", "b", 100), Slot("tcp://3", "b")]
    assert place(chain([0, 1]), slots, Links(), needs=[50, 5]).hosts == ("b", "b")
    with pytest.raises(NoWorkers, match=r"left for rank 2: of 4, 2 have the 50 bytes free that it needs\. Use"):
        place(chain([0, 1, 2]), slots, Links(), needs=[50, 50, 50])


def test_too_little_memory_names_the_rank_and_its_arrays():
    made = programs(STEP, make_plan(STEP, 3))
    most, least = (pick(range(3), key=lambda rank: made[rank].arena_bytes) for pick in (max, min))
    need = made[most].arena_bytes
    check_room(made, [Slot("tcp://0", "a", need), Slot("tcp://1", "b"), Slot("tcp://2", "b", need)])
    with pytest.raises(TooLittleMemory, match=rf"rank {most} needs {need:,} bytes for its arena but {need - 1:,} are"):
        check_room(made, slots_on("a", "b", "b", free_bytes=need - 1))
    room = [Slot("tcp://0", "a"), Slot("tcp://1", "b"), Slot("tcp://2", "b", 64)]
    with pytest.raises(TooLittleMemory, match=rf"rank {least} needs .* but 64 are free on worker tcp://2: "):
        check_room(made, room)


def test_fewer_threads_come_last():
    slots = [Slot("tcp://0", "a"), Slot("tcp://1", "a", threads=1), Slot("tcp://2", "b", threads=4)]
    assert place([[0]], slots, Links(), threads=2).addresses == ("tcp://2",)
    assert place([[0, 0], [0, 0]], slots, Links(), threads=2).addresses == ("tcp://0", "tcp://1")


def test_ranks_go_where_their_device_is():
    slots = [Slot("tcp://0", "a", device="cpu-x"), Slot("tcp://1", "a", device="cuda-y"), Slot("tcp://2", "b")]
    assert place([[0]], slots, Links(), devices=["cuda-y"]).addresses == ("tcp://1",)
    both = place([[0, 0], [0, 0]], slots[:2], Links(), devices=["cuda-y", "cpu-x"])
    assert both.addresses == ("tcp://1", "tcp://0")
    with pytest.raises(NoWorkers, match=r"of 2, 2 have the 0 bytes free that it needs, and 1 have its device \(cuda-y"):
        place([[0, 0], [0, 0]], slots[:2], Links(), devices=["cuda-y", "cuda-y"])


def test_many_ranks():
    rng = np.random.default_rng(0)
    slots = slots_on(*(f"host-{i % 32:02}" for i in range(256)))
    found = place(chain(rng.permutation(256).tolist()), slots, Links())
    assert found.moved.between_bytes < 0.25 * found.others[0][1].between_bytes
    assert place(chain(range(256)), sorted(slots, key=lambda s: s.host), Links()).moved.between_bytes == 31 * 2_000_000


def test_too_few_workers():
    with pytest.raises(NoWorkers, match="the plan needs 2 workers but the cluster has 1"):
        place([[0, 0], [0, 0]], slots_on("a"), Links())


def test_what_it_says():
    found = place(chain([0, 1]), [Slot("tcp://0", "a", 1), Slot("tcp://1", "b")], Links(), needs=[9, 1], reads=[40, 0])
    assert repr(found) == "<Placement: 2 ranks on 2 hosts; 2,000,000 bytes between hosts a step>"
    assert found.explain() == "\n".join(
        [
            "Placement: 2 ranks on 2 hosts; 2,000,000 bytes between hosts a step",
            "  rank 0: tcp://1 on b, sends 1,000,000 bytes to other hosts a step",
            "  rank 1: tcp://0 on a, sends 1,000,000 bytes to other hosts a step",
            "  placed so           2,000,000 bytes between hosts, 40 read, 18.67 ms",
            "  host after host     does not fit",
            "  in turn over hosts  does not fit",
        ]
    )
    links = Links({("a", "b"): Link(2e-4, 1.1e9)})
    assert repr(links).splitlines() == [
        "<Links: 1 measured>",
        "  a - b          0.2 ms, 1,100 MB/s",
        "  within a host  0.02 ms, 2,000 MB/s",
        "  other hosts    1 ms, 120 MB/s",
    ]
