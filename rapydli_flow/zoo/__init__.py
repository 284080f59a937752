"""Networks of well-known papers, as plain functions of ``x: N, *space, C``, and a table of them.

May import `nn`, `graph` and floor 0, nothing else: what is here is written as a user would write it. Parameters start
by He's rule (`nn.he`), biases at 0. Counts of parameters are the published ones; tests hold the functions to them.
"""

from ..arguments import spell_check
from .caffe import cifar10_quick, lenet
from .catalogue import Network, find, networks
from .inception import googlenet
from .plain import alexnet, overfeat, vgg_a
from .residual import resnet18, resnet50

__all__ = [
    "Network",
    "alexnet",
    "cifar10_quick",
    "find",
    "googlenet",
    "lenet",
    "networks",
    "overfeat",
    "resnet18",
    "resnet50",
    "vgg_a",
]

spell_check(globals(), __all__)
