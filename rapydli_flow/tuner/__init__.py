"""The autotuner: what can be asked for, what was chosen, how choices are searched, measured and kept.

May import floors 0 to 3. It is given a `measure` callable and never runs a kernel itself.
"""

from .cache import Known, Merged, TuningCache, Winner
from .choice import REFERENCE, Choice, Request, Tuning
from .exchange import Difference
from .search import exhaustive, tune
from .source import compilers, source_key
from .trial import Trial

__all__ = [
    "REFERENCE",
    "Choice",
    "Difference",
    "Known",
    "Merged",
    "Request",
    "Trial",
    "Tuning",
    "TuningCache",
    "Winner",
    "compilers",
    "exhaustive",
    "source_key",
    "tune",
]
