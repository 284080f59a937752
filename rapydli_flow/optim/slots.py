"""What rules and wrappers are written with: optimizer state beside parameters, and what replaces it after a step."""

from __future__ import annotations

from collections.abc import Sequence

from ..arguments import is_number
from ..errors import SettingError
from ..graph import Graph, Tensor
from ..ops import Fill, Leaf
from .rates import Rate


def slot(graph: Graph, w: Tensor, label: str, *, as_parameter: bool = False) -> Tensor:
    """A leaf of state beside a parameter: ``<w>/<label>``, zero at first, or as the parameter is at first."""
    op = graph.nodes[w.node].op
    start = op.init if as_parameter and isinstance(op, Leaf) else Fill(value=0.0, shape=w.shape, dtype=w.dtype)
    return graph.leaf("state", f"{w.name}/{label}", w.spec, start)


def replace(graph: Graph, leaves: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Let each leaf be its value after the step; a split makes the value where the leaf lies."""
    for leaf, value in zip(leaves, values, strict=True):
        graph.updates[leaf.name] = value.id
        graph.like[value.id] = leaf.id


def rates_now(rate: Rate, pairs: Sequence[tuple[Tensor, Tensor]], step: Tensor) -> dict[str, Tensor]:
    """The rate at this step in the dtype of each parameter."""
    return {dtype: rate(step, dtype) for dtype in dict.fromkeys(w.dtype for w, _ in pairs)}


def share(rule: str, **values: float) -> None:
    """Raise SettingError unless each value is in [0, 1)."""
    for name, value in values.items():
        if not is_number(value) or not 0.0 <= value < 1.0:
            raise SettingError(f"{rule}: {name}={value!r} is not a number in [0, 1).")


def size(rule: str, **values: float) -> None:
    """Raise SettingError unless each value is 0 or more, and finite."""
    for name, value in values.items():
        if not is_number(value) or not 0.0 <= value < float("inf"):
            raise SettingError(f"{rule}: {name}={value!r} is not a finite number, 0 or more.")
