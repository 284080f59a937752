"""rapydli_flow: deep learning as Dask task graphs of Numba and Numba-CUDA kernels, specialised by an autotuner.

Networks are drawn in Python (`trace`), differentiated (`train_step`), divided over the workers of a Dask
cluster (`plan`), tuned (`autotune`) and trained (`fit`) on chunked arrays. See the README for a first run.

Names are imported when they are first used: `import rapydli_flow` loads neither Dask nor Numba.
"""

from __future__ import annotations

import importlib
from types import FunctionType
from typing import TYPE_CHECKING, Any

from .arguments import spelled
from .version import __version__

if TYPE_CHECKING:
    from . import errors as errors
    from . import kernels as kernels
    from . import nn as nn
    from . import optim as optim
    from . import zoo as zoo
    from .api import Compiled as Compiled
    from .api import ConfusionMatrix as ConfusionMatrix
    from .api import Model as Model
    from .api import Run as Run
    from .api import autotune as autotune
    from .api import compile as compile
    from .api import confusion_matrix as confusion_matrix
    from .api import evaluate as evaluate
    from .api import fit as fit
    from .api import gradients as gradients
    from .api import init as init
    from .api import load_model as load_model
    from .api import measure_links as measure_links
    from .api import placement as placement
    from .api import plan as plan
    from .api import predict as predict
    from .api import probe as probe
    from .api import save_model as save_model
    from .api import stepper as stepper
    from .api import time as time
    from .callbacks import BestSnapshot as BestSnapshot
    from .callbacks import EarlyStopping as EarlyStopping
    from .callbacks import PlateauRate as PlateauRate
    from .config import settings as settings
    from .data import load as load
    from .data.ingest import ingest as ingest
    from .graph import LossScale as LossScale
    from .graph import exact as exact
    from .graph import precision as precision
    from .graph import tf32 as tf32
    from .graph import trace as trace
    from .graph import train_step as train_step
    from .graph.remat import remat as remat
    from .logbook import runs as runs
    from .progress import ProgressBar as ProgressBar
    from .progress import TuningBar as TuningBar
    from .runtime.events import Callback as Callback
    from .runtime.events import Save as Save
    from .runtime.events import SetFactor as SetFactor
    from .runtime.events import Stop as Stop
    from .runtime.local_cluster import LocalCluster as LocalCluster
    from .scheduler import Plan as Plan
    from .scheduler import Split as Split
    from .space import Space as Space
    from .spec import Block as Block
    from .spec import Spec as Spec
    from .stencils import stencil as stencil
    from .testing.ops import check as check

_HOMES = {
    "api": (
        "Compiled",
        "ConfusionMatrix",
        "Model",
        "Run",
        "autotune",
        "compile",
        "confusion_matrix",
        "evaluate",
        "fit",
        "gradients",
        "init",
        "load_model",
        "measure_links",
        "placement",
        "plan",
        "predict",
        "probe",
        "save_model",
        "stepper",
        "time",
    ),
    "callbacks": ("BestSnapshot", "EarlyStopping", "PlateauRate"),
    "config": ("settings",),
    "data": ("ingest", "load"),
    "graph": ("LossScale", "exact", "precision", "remat", "tf32", "trace", "train_step"),
    "logbook": ("runs",),
    "progress": ("ProgressBar", "TuningBar"),
    "runtime.events": ("Callback", "Save", "SetFactor", "Stop"),
    "runtime.local_cluster": ("LocalCluster",),
    "scheduler": ("Plan", "Split"),
    "space": ("Space",),
    "spec": ("Block", "Spec"),
    "stencils": ("stencil",),
    "testing.ops": ("check",),
}
_MODULES = ("errors", "kernels", "nn", "optim", "zoo")
_WHERE = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_MODULES, *_WHERE]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _WHERE:
        value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
        value = spelled(value, name) if isinstance(value, FunctionType) else value
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
