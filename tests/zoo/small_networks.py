"""Every network of the zoo on records that are small enough for a test, with few classes."""

from functools import partial

import rapydli_flow as rf
from rapydli_flow import zoo
from rapydli_flow.graph import Graph

CLASSES, BATCH = 7, 2
RECORDS = {
    "lenet": (16, 16, 1),
    "cifar10_quick": (13, 13, 3),  # pooled to 6, 3 (rounded up) and 1
    "alexnet": (63, 63, 3),
    "overfeat": (75, 75, 3),
    "vgg_a": (32, 32, 3),
    "googlenet": (33, 33, 3),
    "resnet18": (33, 33, 3),
    "resnet50": (33, 33, 3),
}


def small(name: str, **options: float) -> Graph:
    """The graph of a network of the zoo for small records."""
    function = partial(zoo.find(name).function, classes=CLASSES, **options)
    return rf.trace(function, rf.Spec((BATCH, *RECORDS[name])))
