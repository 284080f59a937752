"""What layers are made of: names of what they add, leaves with a first value, and sizes of windows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..arguments import is_whole, spelled
from ..errors import GraphError, RapydliError, SettingError
from ..graph import Graph, Tensor, located
from ..ops import Fill
from ..random import stream_of
from ..spec import Spec
from .initial import Initial, he

Sizes = int | Sequence[int]
Padding = int | Sequence[int | tuple[int, int]]
F = TypeVar("F", bound=Callable[..., Any])


def layer(kind: str) -> Callable[[F], F]:
    """Name what a function adds: 'conv_1/w', 'conv_2/w', ... for ``kind`` 'conv'."""

    def wrap(function: F) -> F:
        inner = spelled(function, kind)

        @functools.wraps(function)
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(x, Tensor):
                raise GraphError(f"{kind}: x is {type(x).__name__}, not a tensor. Layers are called inside rf.trace.")
            graph = x.graph
            graph.scope = [*graph.scope, graph.unique(kind).rsplit("/", 1)[-1]]
            try:
                return inner(x, *args, **kwargs)
            except RapydliError as error:
                raise located(error, [x]) from None
            finally:
                graph.scope = graph.scope[:-1]

        return call  # type: ignore[return-value]

    return wrap


def block(function: F) -> F:
    """A part of a network that is used several times: its parameters are called 'name_1/conv_1/w', ..."""
    return layer(function.__name__)(function)


def weights(
    graph: Graph, label: str, shape: Sequence[int], dtype: str, *, fans: tuple[int, int], init: Initial | None = None
) -> Tensor:
    """Parameters with ``fans`` = (inputs of an output element, outputs of an input element); `he` unless told."""
    name = "/".join([*graph.scope, label])
    start = (init or he())(tuple(shape), dtype, fans, stream_of(name))
    return graph.leaf("param", label, Spec(tuple(shape), dtype), start)


def constant(graph: Graph, kind: str, label: str, shape: Sequence[int], value: float, dtype: str) -> Tensor:
    """A leaf ('param' or 'state') that starts with one value everywhere."""
    return graph.leaf(kind, label, Spec(tuple(shape), dtype), Fill(value=value, shape=tuple(shape), dtype=dtype))


def sizes(layer: str, what: str, value: Sizes, space: int) -> tuple[int, ...]:
    """One number for each spatial axis."""
    out = tuple(value) if isinstance(value, Sequence) else (value,) * space
    if len(out) != space or any(not is_whole(v) or v < 1 for v in out):
        raise SettingError(f"{layer}: {what}={value} is not a positive number, or one for each of {space} axes.")
    return out


def pairs(layer: str, value: Padding, space: int) -> tuple[tuple[int, int], ...]:
    """A (low, high) pair for each spatial axis; along one axis a pair may stand alone."""
    each: tuple[Any, ...] = tuple(value) if isinstance(value, Sequence) else (value,) * space
    if space == 1 and len(each) == 2 and all(map(is_whole, each)):
        each = (each,)
    out = tuple((v[0], v[1]) if isinstance(v, Sequence) and len(v) == 2 else (v, v) for v in each)
    if len(out) != space or any(not is_whole(v) or v < 0 for pair in out for v in pair):
        raise SettingError(
            f"{layer}: padding={value} is not 0 or more, or a (low, high) pair for each of {space} axes, such as "
            f"{((1, 2),) * space}."
        )
    return out
