"""What brings operands of products on tensor cores into shared memory: ``prepare`` once, ``copy`` for each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .async_tiles import Layout, copy_async, place_of
from .ptx import unroll
from .tiles import Share


@dataclass(frozen=True)
class Loader:
    """How one operand gets into shared memory; ``state``: registers that it keeps."""

    prepare: Callable[..., None]
    copy: Callable[..., None]
    state: int = 1


def nothing(state: Any, first: Any, thread: Any) -> None:
    """A loader that has nothing to prepare."""


def moves(layout: Layout, s: Share) -> tuple[tuple[int, int], ...]:
    """How far each of a thread's lines is from its first."""
    return tuple(layout.move(part * s.step, 0) for part in range(s.each))


def rows_loader(dtype: str, layout: Layout, s: Share, extent: int, inner: int) -> Loader:
    """An operand stored as ``[extent, inner]``: k runs along memory."""
    begin, place, move = copy_async(dtype, s.vector), place_of(layout), moves(layout, s)

    def copy(pointer: Any, shared: Any, to: Any, state: Any, base: Any, first: Any, k: Any, thread: Any) -> None:
        column = thread % s.across * s.vector
        row = first + thread // s.across
        own = place(thread // s.across, column)
        element = base + (row * inner + (k + column))
        for part in unroll(s.each):
            active = (row + part * s.step < extent) & (k + column < inner)
            begin(
                active, pointer, element + part * s.step * inner, shared, (own ^ move[part][0]) + (to + move[part][1])
            )

    return Loader(nothing, copy)


def lines_loader(dtype: str, layout: Layout, s: Share, extent: int, inner: int, pitch: int = 0) -> Loader:
    """An operand stored as ``[inner, extent]``, or as a part of longer rows: rows or columns run along memory."""
    begin, place, move = copy_async(dtype, s.vector), place_of(layout), moves(layout, s)
    far = pitch or extent

    def copy(pointer: Any, shared: Any, to: Any, state: Any, base: Any, first: Any, k: Any, thread: Any) -> None:
        column = thread % s.across * s.vector
        line = k + thread // s.across
        own = place(thread // s.across, column)
        element = base + (line * far + (first + column))
        for part in unroll(s.each):
            active = (line + part * s.step < inner) & (first + column < extent)
            target = (own ^ move[part][0]) + (to + move[part][1])
            begin(active, pointer, element + part * s.step * far, shared, target)

    return Loader(nothing, copy)
