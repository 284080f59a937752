"""Decisions as pure values: splits, passes on rank graphs, the arena, programs, plans. Nothing here talks to workers.

May import floors 0 to 4. `runtime` carries the decisions out.
"""

from .bucket import bucket
from .collective import AllReduce, Exchange, Shard, Wait
from .early import update_early
from .layout import Layout, Split
from .links import Link, Links
from .meetings import side_by_side
from .placement import Placement, Slot, check_room, place
from .plan import Plan
from .program import Buffer, Call, Collective, Program, compile_program
from .split import split
from .strategy import data_parallel, hybrid, make_plan, model_parallel, pipeline, remade, sharded, spatial
from .traffic import traffic

__all__ = [
    "AllReduce",
    "Buffer",
    "Call",
    "Collective",
    "Exchange",
    "Layout",
    "Link",
    "Links",
    "Placement",
    "Plan",
    "Program",
    "Shard",
    "Slot",
    "Split",
    "Wait",
    "bucket",
    "check_room",
    "compile_program",
    "data_parallel",
    "hybrid",
    "make_plan",
    "model_parallel",
    "pipeline",
    "place",
    "remade",
    "sharded",
    "side_by_side",
    "spatial",
    "split",
    "traffic",
    "update_early",
]
