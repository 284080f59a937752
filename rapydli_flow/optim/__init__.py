"""Optimizers and learning rates: functions that add update rules to a graph. May import floors 0 to 2 and `graph`."""

from .rules import adam, constant, cosine, sgd, step_decay

__all__ = ["adam", "constant", "cosine", "sgd", "step_decay"]
