"""Attention, and the projections around it. Data is ``N, places, features``."""

from __future__ import annotations

from typing import Any

from ..errors import GraphError, SettingError
from ..graph import Tensor
from ..ops import BatchMatmul, Conv, Reshape, Softmax, Transpose
from .initial import Initial
from .layer import constant, layer, weights


@layer("project")
def project(x: Tensor, units: int, *, bias: bool = True, init: Initial | None = None) -> Any:
    """y = x w + b on the last axis of ``N, ..., features``, the same at each of 1 to 3 axes of places.

    It is a convolution with a window of 1: w has the shape ``(1, ..., features, units)``. For ``N, features`` see
    `dense`.
    """
    space = len(x.shape) - 2
    if space not in (1, 2, 3):
        raise GraphError(f"project: x has {space} axes of places ({x.spec}), not 1 to 3. x is N,...,features.")
    one, features = (1,) * space, x.shape[-1]
    w = weights(x.graph, "w", (*one, features, units), x.dtype, fans=(features, units), init=init)
    y = Conv(stride=one, padding=((0, 0),) * space, dilation=one)(x, w)
    return y + constant(x.graph, "param", "b", (units,), 0.0, x.dtype) if bias else y


@layer("attention")
def attention(query: Tensor, key: Tensor, value: Tensor, *, heads: int = 1) -> Any:
    """softmax(query key^T / sqrt(features of a head)) value (Vaswani et al., "Attention is all you need", 2017).

    query is ``N, places, features``, key ``N, others, features``, value ``N, others, units``; the result is ``N,
    places, units``. Features and units are cut into ``heads`` that attend each by itself. There are no weights:
    `project` before and after.
    """
    n, places = query.shape[0], query.shape[1:2]
    given = {"query": query, "key": key, "value": value}
    fits = all(len(x.shape) == 3 and x.shape[0] == n for x in given.values())
    if not fits or query.shape[2] != key.shape[2] or key.shape[1] != value.shape[1]:
        shapes = ", ".join(f"{name} {x.spec}" for name, x in given.items())
        raise GraphError(
            f"attention: operands do not fit ({shapes}). query is N,places,features, key N,others,features and "
            "value N,others,units."
        )
    features, units = query.shape[2], value.shape[2]
    if heads < 1 or features % heads or units % heads:
        raise SettingError(f"attention: {features} features and {units} units are not divisible by heads={heads}.")

    def cut(x: Tensor) -> Any:
        """N, heads, places, features of a head"""
        apart = Reshape(shape=(x.shape[1], heads, x.shape[2] // heads))(x)
        return Transpose(order=(0, 2, 1, 3))(apart)

    scores = BatchMatmul(tb=True)(cut(query), cut(key)) * (features // heads) ** -0.5
    y = BatchMatmul()(Softmax()(scores), cut(value))
    return Reshape(shape=(*places, units))(Transpose(order=(0, 2, 1, 3))(y))
