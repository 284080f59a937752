"""Tuning spaces: parameters, derived values and constraints; counted, indexed, sampled and listed by propagation.

May import errors only. Knows nothing of kernels: any space of any program can be written down here.
"""

from .expression import Node, calling, parse
from .files import read_spaces
from .space import Point, Rule, Rules, Space, as_rules

__all__ = ["Node", "Point", "Rule", "Rules", "Space", "as_rules", "calling", "parse", "read_spaces"]
