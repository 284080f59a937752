"""Ways to take a sum: which are possible, and which is chosen for what."""

import pytest

from rapydli_flow.scheduler.links import Link
from rapydli_flow.scheduler.topology import BY_HOSTS, DOUBLING, EVERYONE, PIECES, Topology

NEAR, FAR = Link(2e-5, 2e9), Link(1e-3, 1.2e8)


def topology(*hosts: int) -> Topology:
    return Topology(hosts, NEAR, FAR)


@pytest.mark.parametrize(
    ("hosts", "size_bytes", "way"),
    [
        ((0, 0), 4_000, EVERYONE),
        ((0, 0), 25_000_000, PIECES),
        ((0, 0, 0, 0), 25_000_000, PIECES),
        ((0, 1), 4_000, EVERYONE),
        ((0, 1), 25_000_000, EVERYONE),  # as many bytes in one round
        (tuple(range(64)), 4_000, DOUBLING),
        (tuple(range(64)), 100_000_000, PIECES),
        (tuple(range(63)), 4_000, EVERYONE),  # no power of two
        ((0, 0, 0, 0, 1, 1, 1, 1), 25_000_000, BY_HOSTS),
        ((0, 0, 0, 1, 1, 1), 25_000_000, BY_HOSTS),
        ((0, 0, 0, 0, 1, 1, 1, 1), 4_000, DOUBLING),
        ((0, 1, 0, 1), 25_000_000, PIECES),  # neighbours are apart
        ((0, 0, 1, 1, 2, 2), 25_000_000, PIECES),  # 3 hosts: the middle one would be cut in half
    ],
)
def test_the_way_of_a_sum(hosts: tuple[int, ...], size_bytes: int, way: str) -> None:
    assert topology(*hosts).choose(tuple(range(len(hosts))), size_bytes) == way


def test_a_sum_of_some_ranks_is_one_of_their_hosts() -> None:
    whole = topology(0, 0, 1, 1)
    assert whole.choose((0, 2), 25_000_000) == EVERYONE
    assert BY_HOSTS not in whole.seconds((0, 1), 25_000_000)
    assert BY_HOSTS in whole.seconds((0, 1, 2, 3), 25_000_000)
    assert BY_HOSTS not in whole.seconds((0, 1, 2), 25_000_000)


def test_by_hosts_the_link_between_them_carries_a_part_only() -> None:
    far = Link(0.0, 1.0)  # nothing else counts
    ranks = tuple(range(8))
    found = Topology((0,) * 4 + (1,) * 4, Link(0.0, 1e30), far).seconds(ranks, 1)
    assert found[BY_HOSTS] == pytest.approx(1.0)
    assert found[PIECES] == pytest.approx(4.0)
    assert found[EVERYONE] == pytest.approx(16.0)
    assert found[DOUBLING] == pytest.approx(4.0)
