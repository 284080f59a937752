"""How samples are cut for group norm: bands of some whole groups, and which positions of a band a thread has."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm, prod
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config

from .grid import blocks_of


@dataclass(frozen=True)
class Band:
    """How samples are cut."""

    samples: int
    space: int  # positions
    channels: int
    size: int  # channels of a group
    lanes: int
    across: int
    down: int
    each: int  # positions of a part

    @classmethod
    def of(cls, op: Any, x: Spec, config: Config) -> Band:
        lead, lanes, channels = len(x.shape) - op.axes, config["vector"], x.shape[-1]
        samples, space, size = prod(x.shape[:lead]), prod(x.shape[lead:-1]), channels // op.groups
        least = lcm(size, lanes)
        most = max(1, config["across"] * lanes // least)
        across = least // lanes * max(n for n in range(1, most + 1) if channels // least % n == 0)
        down = max(1, min(config["threads"] // across, 1 << (space - 1).bit_length()))
        step = down * config["items"]
        each = blocks_of(blocks_of(space, config["parts"]), step) * step if config["parts"] > 1 else space
        return cls(samples, space, channels, size, lanes, across, down, each)

    @property
    def width(self) -> int:
        return self.across * self.lanes

    @property
    def bands(self) -> int:
        """Bands of a sample."""
        return self.channels // self.width

    @property
    def block(self) -> int:
        return self.across * self.down

    @property
    def parts(self) -> int:
        return blocks_of(self.space, self.each)

    @property
    def blocks(self) -> int:
        return self.samples * self.bands * self.parts

    @property
    def steps(self) -> int:
        """Positions of a thread."""
        return blocks_of(self.each, self.down)

    @property
    def folded(self) -> bool:
        """Are all lanes of one group?"""
        return self.size % self.lanes == 0

    @property
    def alike(self) -> tuple[bool, ...]:
        """Of each lane: has it what lane 0 has?"""
        return tuple(self.folded and i > 0 for i in range(self.lanes))

    @property
    def passed(self) -> int:
        """Lanes of a state that is passed on."""
        return 1 if self.folded else self.lanes

    @property
    def units(self) -> int:
        """States of a group that are left when those of all positions are one."""
        return self.size // self.lanes if self.folded else self.size

    @property
    def left(self) -> int:
        """States of a band that are left then."""
        return self.across if self.folded else self.width


@dataclass(frozen=True)
class Walk:
    """How a thread walks over its positions; ``split``: over those of a part."""

    b: Band
    items: int
    held: bool
    split: bool

    @property
    def full(self) -> int:
        """Positions that all threads have."""
        return self.b.space // self.b.down

    @property
    def steps(self) -> int:
        """Of the loop over positions that are streamed, where it is not a part's."""
        return 0 if self.held else self.full // self.items

    @property
    def stride(self) -> int:
        return self.b.down * self.items

    @property
    def rest(self) -> int:
        """Positions after the loop."""
        if self.split:
            return self.items if self.b.space % self.b.each else 0
        return self.b.steps - self.steps * self.items

    @property
    def free(self) -> tuple[bool, ...]:
        """Of these, whether all threads have one."""
        return tuple(not self.split and self.steps * self.items + i < self.full for i in range(self.rest))

    @property
    def pitch(self) -> int:
        """Positions that a thread has at once."""
        return max(1, self.b.steps if self.held else max(self.items, self.rest))
