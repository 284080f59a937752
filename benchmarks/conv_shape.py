"""The table of convolutions: what `conv.py` and `conv_cuda.py` measure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapydli_flow.ops import Conv, ConvFilterGrad, ConvInputGrad, Op
from rapydli_flow.spec import Spec

SHAPES = Path(__file__).with_name("conv_shapes.json")
DIRECTIONS = ("forward", "input", "filter")


@dataclass(frozen=True)
class Shape:
    """One convolution of the table."""

    name: str
    n: int
    channels: int
    size: tuple[int, ...]
    filters: int
    window: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int
    dilation: int

    @classmethod
    def read(cls, row: list[Any]) -> Shape:
        try:
            name, n, c, size, k, window, stride, padding, groups, dilation = row
            shape = cls(name, n, c, *map(tuple, (size,)), k, *map(tuple, (window, stride, padding)), groups, dilation)
        except (TypeError, ValueError) as error:
            raise SystemExit(
                f"{row}: a shape is [name, N, C, [spatial], K, [window], [stride], [padding], groups, dilation]"
            ) from error
        if not 1 <= len(shape.size) <= 3 or {len(shape.window), len(shape.stride), len(shape.padding)} != {len(size)}:
            raise SystemExit(f"{row}: window, stride and padding need one number for each of 1 to 3 spatial axes.")
        return shape

    @property
    def conv(self) -> Conv:
        n = len(self.size)
        pairs = tuple((p, p) for p in self.padding)
        return Conv(stride=self.stride, padding=pairs, dilation=(self.dilation,) * n, groups=self.groups)

    @property
    def specs(self) -> tuple[Spec, Spec, Spec]:
        """x, w and y."""
        x = Spec((self.n, *self.size, self.channels))
        w = Spec((*self.window, self.channels // self.groups, self.filters))
        return x, w, self.conv.infer(x, w)

    def op(self, direction: str) -> tuple[Op, tuple[Spec, ...], Spec]:
        x, w, y = self.specs
        if direction == "forward":
            return self.conv, (x, w), y
        if direction == "input":
            return ConvInputGrad(size=self.size, **self.conv.geometry), (y, w), x
        return ConvFilterGrad(window=self.window, **self.conv.geometry), (x, y), w
