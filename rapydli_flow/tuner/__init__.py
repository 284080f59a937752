"""The autotuner: what can be asked for, what was chosen, how choices are searched, measured and kept.

May import floors 0 to 3. It is given a `measure` callable and never runs a kernel itself.
"""

from .cache import TuningCache
from .choice import REFERENCE, Choice, Request, Tuning
from .search import Trial, exhaustive, tune

__all__ = ["REFERENCE", "Choice", "Request", "Trial", "Tuning", "TuningCache", "exhaustive", "tune"]
