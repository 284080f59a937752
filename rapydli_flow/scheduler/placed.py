"""Where a value of the whole graph is while it is split: its blocks, and which of them are parts of a sum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..graph import Tensor
from .layout import Layout


@dataclass(frozen=True)
class Placed:
    """For each place a block, the number of the part of a sum that it is (all 0: no sum), and the tensor."""

    layout: Layout
    parts: tuple[int, ...]
    tensors: tuple[Tensor | None, ...]

    @cached_property
    def partial(self) -> bool:
        return any(self.parts)

    @cached_property
    def count(self) -> int:
        """The number of parts of the sum."""
        return len({self.parts[p] for p, block in enumerate(self.layout) if block is not None})

    @property
    def holders(self) -> tuple[int, ...]:
        """Places that have something."""
        return tuple(p for p, tensor in enumerate(self.tensors) if tensor is not None)
