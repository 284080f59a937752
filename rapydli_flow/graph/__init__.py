"""Graphs: building, gradients, passes, JSON, tables and pictures.

May import floors 0 to 2 only. A pass is a function Graph -> Graph, printable and testable alone.
"""

from .fuse import Fused, fuse, parts
from .gradients import gradients
from .graph import Graph, Node, Tensor, Value
from .mixed import precision, precision_of
from .remat import remat
from .rewrite import clean, exact, hoist, merge_equal, predicting, rewrite, tf32, training, with_batch
from .scaling import LossScale, broken, finds_scale
from .serialise import from_json, to_json
from .tracing import trace, train_step
from .verify import checked, verify
from .where import located

__all__ = [
    "Fused",
    "Graph",
    "LossScale",
    "Node",
    "Tensor",
    "Value",
    "broken",
    "checked",
    "clean",
    "exact",
    "finds_scale",
    "from_json",
    "fuse",
    "gradients",
    "hoist",
    "located",
    "merge_equal",
    "parts",
    "precision",
    "precision_of",
    "predicting",
    "remat",
    "rewrite",
    "tf32",
    "to_json",
    "trace",
    "train_step",
    "training",
    "verify",
    "with_batch",
]
