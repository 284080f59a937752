"""Optimizers and learning rates: functions that add update rules to a graph. May import floors 0 to 2 and `graph`."""

from ..arguments import spell_check
from .rates import (
    adjustable,
    constant,
    cosine,
    exponential,
    inverse,
    multistep,
    polynomial,
    sigmoid,
    step_decay,
    warmup,
)
from .rules import adadelta, adagrad, adam, adamw, rmsprop, sgd
from .wrappers import accumulate, average, averaged, clip_norm, clip_value, freeze, groups

__all__ = [
    "accumulate",
    "adadelta",
    "adagrad",
    "adam",
    "adamw",
    "adjustable",
    "average",
    "averaged",
    "clip_norm",
    "clip_value",
    "constant",
    "cosine",
    "exponential",
    "freeze",
    "groups",
    "inverse",
    "multistep",
    "polynomial",
    "rmsprop",
    "sgd",
    "sigmoid",
    "step_decay",
    "warmup",
]

spell_check(globals(), __all__)
