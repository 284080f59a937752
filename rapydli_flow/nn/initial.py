"""What parameters start from: functions that give `weights` its source op.

An initialiser is called with shape, dtype, (fan in, fan out) and the stream of its random numbers.
"""

from __future__ import annotations

from collections.abc import Callable

from ..ops import Normal, Op

Initial = Callable[[tuple[int, ...], str, tuple[int, int], int], Op]


def he(gain: float = 2.0) -> Initial:
    """Normal with variance ``gain / fan_in`` (He et al. 2015 for 2, LeCun et al. 1998 for 1)."""
    return lambda shape, dtype, fans, stream: Normal(
        std=(gain / fans[0]) ** 0.5, stream=stream, shape=shape, dtype=dtype
    )
