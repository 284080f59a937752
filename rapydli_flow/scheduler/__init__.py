"""Decisions as pure values: splits, passes on rank graphs, the arena, programs, plans. Nothing here talks to workers.

May import floors 0 to 4. `runtime` carries the decisions out.
"""

from .bucket import bucket
from .collective import AllReduce, Exchange
from .early import update_early
from .plan import Plan, data_parallel
from .program import Buffer, Call, Collective, Program, compile_program
from .split import split

__all__ = [
    "AllReduce",
    "Buffer",
    "Call",
    "Collective",
    "Exchange",
    "Plan",
    "Program",
    "bucket",
    "compile_program",
    "data_parallel",
    "split",
    "update_early",
]
