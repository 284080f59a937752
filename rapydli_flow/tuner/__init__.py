"""The autotuner: what can be asked for, what was chosen, how choices are searched, measured and kept.

May import floors 0 to 3. It is given a `Measure` and never runs a kernel itself.
"""

from .cache import Known, Merged, TuningCache, Winner
from .choice import ANY_CARD, ANY_CPU, REFERENCE, Choice, Request, Tuning
from .exchange import Difference
from .funnel import Funnel
from .search import Budget, Found, Measure, Tuner
from .similar import nearest
from .source import compilers, source_key
from .strategies import STRATEGIES
from .trial import Trial, time_text

__all__ = [
    "ANY_CARD",
    "ANY_CPU",
    "REFERENCE",
    "STRATEGIES",
    "Budget",
    "Choice",
    "Difference",
    "Found",
    "Funnel",
    "Known",
    "Measure",
    "Merged",
    "Request",
    "Trial",
    "Tuner",
    "Tuning",
    "TuningCache",
    "Winner",
    "compilers",
    "nearest",
    "source_key",
    "time_text",
]
