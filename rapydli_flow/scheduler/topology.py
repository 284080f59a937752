"""Where ranks are, seen from a sum over them: which hosts, which links; and which way to take the sum is quickest.

    everyone   each rank hands all that it has to every other one, and all of them add              1 round
    doubling   in pairs, then pairs of pairs: each hands over the sum that it has so far            log2 ranks rounds
    pieces     each adds one piece of all, and hands the sum of it to the others                    2 rounds
    by hosts   pieces within each host; each is then summed between hosts, and handed on within     2 rounds and a sum

All of them add by halves of the ranks, ``((0 + 1) + (2 + 3))``, so a run has the same bits whichever is taken, and
wherever its ranks are. A ring sends as few bytes as pieces do, in more rounds: it is of use where links are shared, and
left out. Sources: Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH", 2005;
Jia et al., "Highly scalable deep learning training system with mixed-precision", 2018 (by hosts).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import log2

from .cost import Machine
from .links import Link, Links

LOOPBACK = Link(5e-4, 1e9)  # comms between processes of a host
MEANT_BYTES = 1 << 20  # of the message by which links are compared
EVERYONE, DOUBLING, PIECES, BY_HOSTS = "everyone", "doubling", "pieces", "by hosts"


@dataclass(frozen=True)
class Topology:
    """The host of each rank, by number; links within a host, and between hosts."""

    hosts: tuple[int, ...]
    near: Link = Links().within
    far: Link = Links().between

    @classmethod
    def of(cls, hosts: Sequence[str], links: Links) -> Topology:
        """Of ranks on these hosts, by name; of several links the slowest counts."""
        names = list(dict.fromkeys(hosts))
        near = [links.link(host, host) for host in names]
        far = [links.link(*pair) for pair in combinations(names, 2)] or [links.between]
        slowest = (max(each, key=lambda link: link.move_s(MEANT_BYTES)) for each in (near, far))
        return cls(tuple(names.index(host) for host in hosts), *slowest)

    def beside(self, rank: int) -> list[int]:
        """The ranks of a rank's host, itself among them."""
        return [other for other, host in enumerate(self.hosts) if host == self.hosts[rank]]

    def choose(self, ranks: tuple[int, ...], size_bytes: int) -> str:
        """The way that takes least time for a sum of so many bytes over some ranks."""
        return _chosen(self, ranks, size_bytes)

    def seconds(self, ranks: tuple[int, ...], size_bytes: int) -> dict[str, float]:
        """What each way takes that these ranks can go: within a host by rounds and what a rank sends, between hosts
        by messages of a rank and what its host sends."""
        n, hosts = len(ranks), Counter(self.hosts[rank] for rank in ranks)
        k, g = max(hosts.values()), len(hosts)  # ranks of a host, hosts
        add_s = size_bytes / Machine.memory_bytes_s
        some = k > 1

        def ways(near_rounds: float, near_sizes: float, far_messages: float, far_sizes: float) -> float:
            near_s = near_rounds * self.near.latency_s + near_sizes * size_bytes / self.near.bytes_s
            return near_s + far_messages * self.far.latency_s + far_sizes * size_bytes / self.far.bytes_s

        found = {
            EVERYONE: ways(some, k - 1, n - k, k * (n - k)) + (n - 1) * add_s * (g == 1),  # else behind the link
            PIECES: ways(2 * some, 2 * (k - 1) / n, 2 * (n - k), 2 * k * (n - k) / n) + (n - 1) / n * add_s,
        }
        if n > 2 and not n & (n - 1):
            inside = log2(k) if self.even(ranks) else 0.0
            outside = log2(n) - inside
            found[DOUBLING] = ways(inside, inside, outside, k * outside) + log2(n) * add_s
        if 1 < k < n and self.even(ranks):
            found[BY_HOSTS] = ways(2, 2 * (k - 1) / k, 2 * (g - 1), 2 * (g - 1) / g) + add_s
        return found

    def even(self, ranks: tuple[int, ...]) -> bool:
        """Do neighbours share hosts, as many on each, so that each host's sum is a branch of the whole one?"""
        hosts = [self.hosts[rank] for rank in ranks]
        g = len(set(hosts))
        k = len(hosts) // g
        return not g & (g - 1) and hosts == [host for host in dict.fromkeys(hosts) for _ in range(k)]


NOWHERE = Topology(())  # no rank is placed yet


@lru_cache(maxsize=4096)
def _chosen(topology: Topology, ranks: tuple[int, ...], size_bytes: int) -> str:
    found = topology.seconds(ranks, size_bytes)
    return min(found, key=found.__getitem__)
