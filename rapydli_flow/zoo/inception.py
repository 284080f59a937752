"""GoogLeNet: modules in which convolutions of several windows see the same map, side by side."""

from __future__ import annotations

from typing import Any

from .. import nn
from ..graph import Tensor
from .rounding import up

# filters of a module: 1x1; 3x3 reduce, 3x3; 5x5 reduce, 5x5; after pooling. Groups are parted by pooling (table 1)
MODULES = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


@nn.block
def inception(x: Tensor, filters: tuple[int, ...]) -> Any:
    """Four ways, one behind the other in the channels: 1x1; 1x1 and 3x3; 1x1 and 5x5; pooling 3x3 and 1x1."""
    one, reduce3, three, reduce5, five, pooled = filters
    ways = [
        _unit(x, one, 1),
        _unit(_unit(x, reduce3, 1), three, 3),
        _unit(_unit(x, reduce5, 1), five, 5),
        _unit(nn.max_pool(x, 3, stride=1, padding=1), pooled, 1),
    ]
    return nn.concatenate(ways)


def googlenet(x: Tensor, *, classes: int = 1000, dropout: float = 0.4) -> Any:
    """GoogLeNet, Inception v1, without its auxiliary classifiers: 6,998,552 parameters for ``x: N,224,224,3``.

    Paper: C. Szegedy et al., "Going deeper with convolutions" (2014), arXiv:1409.4842, with local response
    normalisation and poolings that round up as in Caffe's bvlc_googlenet. ``dropout``: the share of the averages that
    is dropped before the dense layer; 0 leaves the op out.
    """
    x = _unit(x, 64, 7, stride=2)
    x = nn.local_response_norm(_halved(x), 5, alpha=1e-4, beta=0.75)
    x = _unit(_unit(x, 64, 1), 192, 3)
    x = nn.local_response_norm(x, 5, alpha=1e-4, beta=0.75)
    for group in MODULES:
        x = _halved(x)
        for filters in group:
            x = inception(x, filters)
    x = nn.global_avg_pool(x)
    return nn.dense(nn.dropout(x, dropout) if dropout else x, classes)


def _unit(x: Tensor, filters: int, window: int, *, stride: int = 1) -> Any:
    return nn.relu(nn.conv(x, filters, window, stride=stride, padding=window // 2))


def _halved(x: Tensor) -> Any:
    return nn.max_pool(x, 3, stride=2, padding=up(x, 3, 2))
