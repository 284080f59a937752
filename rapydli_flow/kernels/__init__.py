"""Kernels on their own: convolution, its gradients and the matrix product on plain NumPy arrays, and on those of a GPU.

May import `runtime` and all below it. Each function is compiled for the shapes of its operands, runs with the best
config that the tuner knows for them, and needs no graph: what another framework takes in place of its own.
"""

from ..arguments import spell_check
from .convolution import conv, conv_filter_grad, conv_input_grad
from .dense import matmul
from .on_card import to_device
from .prepared import release
from .tuned import tune

__all__ = ["conv", "conv_filter_grad", "conv_input_grad", "matmul", "release", "to_device", "tune"]

spell_check(globals(), __all__)
