"""Where in the user's code a node was made, and the nodes that led to an error.

conv: x has 3 channels but w expects 6 (x f32[32,28,28,3], w f32[5,5,6,16]). x is N,*space,C and ...
  at net.py:14: y = nn.conv(y, 16, 5)
  after  x f32[32,28,28,1] -> conv_1 f32[32,24,24,3] (net.py:12) -> relu_1 f32[32,24,24,3] (net.py:12)
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from ..errors import RapydliError

if TYPE_CHECKING:
    from .graph import Graph, Tensor

PACKAGE = str(Path(__file__).resolve().parent.parent)
SHOWN = 6  # nodes of a path
E = TypeVar("E", bound=RapydliError)


def caller() -> str:
    """``file:line`` of the innermost frame outside of this package; '' where there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def short(where: str) -> str:
    """``net.py:14``"""
    return Path(where).name


def located(error: E, operands: Sequence[Tensor]) -> E:
    """The error with the user's line and the path of nodes behind each operand; once."""
    if getattr(error, "located", False):
        return error
    where, lines = caller(), [str(error)]
    if where:
        name, _, number = where.rpartition(":")
        code = linecache.getline(name, int(number)).strip()
        lines.append(f"  at {short(where)}{f': {code}' if code else ''}")
    data = [x for x in operands if _computed(x.graph, x.id[0])]
    lines += [f"  after  {line}" for line in dict.fromkeys(path(x.graph, x) for x in data)]
    made = type(error)("\n".join(lines))
    made.located = True  # type: ignore[attr-defined]
    return made.with_traceback(error.__traceback__)


def path(graph: Graph, last: Tensor) -> str:
    """The nodes that led to a value, each with its spec and the line that made it."""
    steps: list[str] = []
    i, out = last.id
    while True:
        node = graph.nodes[i]
        line = f" ({short(node.where)})" if node.where and node.inputs else ""
        steps.append(f"{graph.value_name((i, out))} {node.specs[out]}{line}")
        data = [v for v in node.inputs if _computed(graph, v[0])]
        if not data or len(steps) == SHOWN:
            more = ["..."] if data else []
            return " -> ".join([*more, *reversed(steps)])
        i, out = data[0]


def _computed(graph: Graph, i: int) -> bool:
    """Is this fed, or made of something else? Parameters and constants lead nowhere."""
    return bool(graph.nodes[i].inputs) or getattr(graph.nodes[i].op, "kind", "") == "batch"
