"""Pictures of graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .graph import Graph


def svg(graph: Graph) -> str:
    return ""


def html(graph: Graph) -> str:
    return ""
