"""Making 1 to 3 spatial axes longer or shorter, without weights. Data is ``N, *space, C``."""

from __future__ import annotations

from typing import Any

from ..errors import GraphError, SettingError
from ..graph import Tensor
from ..ops import Resize, SumPoolGrad
from .layer import Sizes, sizes

MODES = ("nearest", "bilinear")


def upsample(x: Tensor, factor: Sizes, mode: str = "nearest") -> Any:
    """Each spatial axis a whole number of times as long.

    ``nearest`` repeats elements; ``bilinear`` interpolates between their centres, linearly over one axis,
    bilinearly over two, trilinearly over three (see `resize`).
    """
    space = _space("upsample", x)
    by = sizes("upsample", "factor", factor, space)
    size = tuple(n * f for n, f in zip(x.shape[1:-1], by, strict=True))
    if mode not in MODES:
        raise SettingError(f"upsample: mode={mode!r} is not one of {', '.join(MODES)}.")
    if mode == "bilinear":
        return Resize(size=size)(x)
    # repeating is the transpose of adding up windows that do not overlap
    return SumPoolGrad(size=size, window=by, stride=by, padding=((0, 0),) * space)(x)


def resize(x: Tensor, size: Sizes) -> Any:
    """x interpolated linearly to other spatial sizes, a number or one for each axis.

    Centres of elements lie at half positions, as in torch.nn.functional.interpolate with align_corners=False.
    """
    return Resize(size=sizes("resize", "size", size, _space("resize", x)))(x)


def _space(function: str, x: Tensor) -> int:
    space = len(x.shape) - 2
    if space not in (1, 2, 3):
        raise GraphError(f"{function}: x has {space} spatial axes ({x.spec}), not 1 to 3. x is N,*space,C.")
    return space
