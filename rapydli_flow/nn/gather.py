"""Choosing elements by whole numbers: along an axis, or rows of a trained table."""

from __future__ import annotations

from typing import Any

from ..arguments import is_whole
from ..errors import SettingError
from ..graph import Tensor
from ..ops import Embedding, Gather
from .initial import Initial, normal
from .layer import layer, weights
from .shape import axes_of


def gather(x: Tensor, indices: Tensor, axis: int = -1) -> Any:
    """The elements of x at whole numbers ``indices`` along an axis (np.take_along_axis); the other axes are equal.

    An index outside of the axis, negative ones too, gives NaN.
    """
    return Gather(axis=axes_of("gather", x, axis)[0])(x, indices)


@layer("embedding")
def embedding(
    ids: Tensor, vocabulary: int, features: int, *, dtype: str = "float32", init: Initial | None = None
) -> Any:
    """A trained row of ``features`` for each of the whole numbers ``ids``: ``N, ...`` becomes ``N, ..., features``.

    Ids are 0 to ``vocabulary - 1``; others give NaN. Rows start from a normal distribution of deviation 1.
    """
    for what, given in (("vocabulary", vocabulary), ("features", features)):
        if not is_whole(given) or given < 1:
            raise SettingError(f"embedding: {what}={given!r} is not a whole number of 1 or more.")
    shape = (vocabulary, features)
    return Embedding()(weights(ids.graph, "w", shape, dtype, fans=shape, init=init or normal(1.0)), ids)
