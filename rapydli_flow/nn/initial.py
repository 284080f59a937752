"""What parameters start from: functions that give `weights` its source op.

An initialiser is called with shape, dtype, (fan in, fan out) and the stream of its random numbers. Fan in is
how many inputs an output element reads, fan out how many outputs read an input element. Random numbers are
keyed by the seed, the parameter's name and the element: the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable

from ..arguments import is_number
from ..errors import SettingError
from ..ops import Fill, Normal, Op, Orthogonal, TruncatedNormal, Uniform

Initial = Callable[[tuple[int, ...], str, tuple[int, int], int], Op]

FANS = ("in", "out", "average")
DISTRIBUTIONS = ("normal", "uniform")


def he(gain: float = 2.0, *, fan: str = "in", distribution: str = "normal") -> Initial:
    """Variance ``gain / fan`` (He et al. 2015, Caffe's 'msra'): keeps the size of values through ReLUs."""
    return _scaled("he", gain, fan, distribution)


def lecun(*, fan: str = "in", distribution: str = "normal") -> Initial:
    """Variance ``1 / fan`` (LeCun et al. 1998)."""
    return _scaled("lecun", 1.0, fan, distribution)


def xavier(*, fan: str = "average", distribution: str = "uniform") -> Initial:
    """Variance ``1 / fan``, uniform in +-sqrt(3 / fan); the average is (in + out) / 2 (Glorot, Bengio 2010).

    Caffe's 'xavier' is ``fan="in"`` unless its ``variance_norm`` says otherwise.
    """
    return _scaled("xavier", 1.0, fan, distribution)


def normal(std: float) -> Initial:
    """Normal with mean 0."""
    std = _positive("normal", "std", std)
    return lambda shape, dtype, fans, stream: Normal(std=std, stream=stream, shape=shape, dtype=dtype)


def truncated_normal(std: float, *, bound: float = 2.0) -> Initial:
    """Normal with mean 0; what lies beyond ``bound * std`` is drawn again. ``std`` is that before truncation."""
    std, bound = _positive("truncated_normal", "std", std), _positive("truncated_normal", "bound", bound)
    return lambda shape, dtype, fans, stream: TruncatedNormal(
        std=std, bound=bound, stream=stream, shape=shape, dtype=dtype
    )


def uniform(limit: float) -> Initial:
    """Uniform in [-limit, limit)."""
    limit = _positive("uniform", "limit", limit)
    return lambda shape, dtype, fans, stream: Uniform(limit=limit, stream=stream, shape=shape, dtype=dtype)


def orthogonal(gain: float = 1.0) -> Initial:
    """``gain`` times orthonormal columns, or rows where there are fewer (Saxe et al. 2013).

    The columns are the last axis, the units or filters. Each rank makes the whole matrix.
    """
    gain = _positive("orthogonal", "gain", gain)
    return lambda shape, dtype, fans, stream: Orthogonal(gain=gain, stream=stream, shape=shape, dtype=dtype)


def constant(value: float) -> Initial:
    """The same value everywhere."""
    return lambda shape, dtype, fans, stream: Fill(value=float(value), shape=shape, dtype=dtype)


def _scaled(name: str, gain: float, fan: str, distribution: str) -> Initial:
    gain = _positive(name, "gain", gain)
    for what, given, known in (("fan", fan, FANS), ("distribution", distribution, DISTRIBUTIONS)):
        if given not in known:
            raise SettingError(f"{name}: {what}={given!r} is not one of {', '.join(known)}.")

    def start(shape: tuple[int, ...], dtype: str, fans: tuple[int, int], stream: int) -> Op:
        variance = gain / {"in": fans[0], "out": fans[1], "average": sum(fans) / 2}[fan]
        if distribution == "normal":
            return Normal(std=variance**0.5, stream=stream, shape=shape, dtype=dtype)
        return Uniform(limit=(3.0 * variance) ** 0.5, stream=stream, shape=shape, dtype=dtype)

    return start


def _positive(name: str, what: str, value: float) -> float:
    if not is_number(value) or not 0.0 < value < float("inf"):
        raise SettingError(f"{name}: {what}={value!r} is not a positive, finite number.")
    return float(value)
