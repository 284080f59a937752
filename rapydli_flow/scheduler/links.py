"""What it takes to send bytes from one host to another, or between workers of one host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .cost import Machine


@dataclass(frozen=True)
class Link:
    """The way between two workers: seconds until a message arrives, and bytes a second of large ones."""

    latency_s: float
    bytes_s: float

    def move_s(self, size_bytes: float) -> float:
        """Seconds until so many bytes are there; none take none."""
        return self.latency_s + size_bytes / self.bytes_s if size_bytes else 0.0

    def __str__(self) -> str:
        return f"{self.latency_s * 1e3:.3g} ms, {self.bytes_s / 1e6:,.4g} MB/s"


@dataclass(frozen=True, repr=False)
class Links:
    """Links by pair of hosts, in either order. Where nothing was measured a host is a machine with shared memory
    (`Machine`), and hosts are joined by Gigabit Ethernet."""

    measured: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    within: Link = Link(Machine.latency_s, Machine.link_bytes_s)
    between: Link = Link(1e-3, 1.2e8)

    def link(self, host_a: str, host_b: str) -> Link:
        """The link between workers of two hosts, or of one."""
        known = self.measured.get((host_a, host_b)) or self.measured.get((host_b, host_a))
        return known or (self.within if host_a == host_b else self.between)

    def __repr__(self) -> str:
        return f"<Links: {len(self.measured)} measured>\n{self}"

    def __str__(self) -> str:
        rows = [(f"{a} - {b}", link) for (a, b), link in sorted(self.measured.items())]
        rows += [("within a host", self.within), ("other hosts", self.between)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"  {name:<{width}}  {link}" for name, link in rows)
