"""Stencils: loop nests of a user's own, with what they mean and what can be tuned about them.

May import `runtime` and all below it. `stencil` makes an operator with one CPU template of a function; the tuner,
the measuring harness and the caches know nothing of it.
"""

from .tunable import Stencil, stencil

__all__ = ["Stencil", "stencil"]
