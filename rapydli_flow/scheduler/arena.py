"""One block of memory for all buffers of a program: offsets are handed out and taken back while planning."""

from __future__ import annotations

ALIGN = 64


def aligned(size_bytes: int) -> int:
    """Bytes that a buffer takes in the arena; never none, so that buffers have different addresses."""
    return max(ALIGN, -(-size_bytes // ALIGN) * ALIGN)


class Arena:
    """Best fit over a list of gaps; neighbouring gaps are joined."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._gaps: list[tuple[int, int]] = []

    def take(self, size_bytes: int) -> int:
        """The offset of a new buffer."""
        need = aligned(size_bytes)
        best = min(((size, i) for i, (_, size) in enumerate(self._gaps) if size >= need), default=None)
        if best is not None:
            offset, size = self._gaps.pop(best[1])
            if size > need:
                self._insert(offset + need, size - need)
            return offset
        if self._gaps and sum(self._gaps[-1]) == self.size_bytes:  # grow the gap at the end
            offset, _ = self._gaps.pop()
        else:
            offset = self.size_bytes
        self.size_bytes = offset + need
        return offset

    def give(self, offset: int, size_bytes: int) -> None:
        """Take a buffer back."""
        self._insert(offset, aligned(size_bytes))

    def _insert(self, offset: int, size: int) -> None:
        self._gaps.append((offset, size))
        self._gaps.sort()
        joined: list[tuple[int, int]] = []
        for start, length in self._gaps:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((start, length))
        self._gaps = joined
