"""Residual networks: blocks add to what they read, so that gradients reach the first layers of deep networks.

Paper: K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image recognition" (2015), arXiv:1512.03385, table
1; shortcuts are the paper's option B (a convolution of window 1 where sizes differ). In the bottleneck blocks the 3x3
convolution has the stride, as in torchvision, not the first 1x1 as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import nn
from ..graph import Tensor


@nn.block
def basic(x: Tensor, filters: int, stride: int) -> Any:
    """relu(f(x) + x), where f is two convolutions of window 3."""
    y = _unit(nn.relu(_unit(x, filters, 3, stride)), filters, 3)
    return nn.relu(y + _shortcut(x, filters, stride))


@nn.block
def bottleneck(x: Tensor, filters: int, stride: int) -> Any:
    """relu(f(x) + x), where f is convolutions of window 1, 3 and 1, the last with four times as many filters."""
    y = nn.relu(_unit(nn.relu(_unit(x, filters, 1)), filters, 3, stride))
    y = _unit(y, 4 * filters, 1)
    return nn.relu(y + _shortcut(x, 4 * filters, stride))


def resnet18(x: Tensor, *, classes: int = 1000) -> Any:
    """ResNet-18: 11,689,512 parameters for images ``x: N,H,W,3``, of 224x224 in the paper."""
    return _resnet(x, basic, (2, 2, 2, 2), classes)


def resnet50(x: Tensor, *, classes: int = 1000) -> Any:
    """ResNet-50: 25,557,032 parameters for images ``x: N,H,W,3``, of 224x224 in the paper."""
    return _resnet(x, bottleneck, (3, 4, 6, 3), classes)


def _resnet(x: Tensor, block: Callable[..., Any], depths: Sequence[int], classes: int) -> Any:
    """Stages of ``depths`` blocks; each stage has twice as many filters, and from the second on half the size."""
    x = nn.max_pool(nn.relu(_unit(x, 64, 7, 2)), 3, stride=2, padding=1)
    for stage, depth in enumerate(depths):
        for i in range(depth):
            x = block(x, 64 * 2**stage, 2 if stage and not i else 1)
    return nn.dense(nn.global_avg_pool(x), classes)


def _unit(x: Tensor, filters: int, window: int, stride: int = 1) -> Any:
    """A convolution, whose bias batch norm would take away again, and batch norm."""
    return nn.batch_norm(nn.conv(x, filters, window, stride=stride, padding=window // 2, bias=False))


def _shortcut(x: Tensor, filters: int, stride: int) -> Any:
    return x if stride == 1 and x.shape[-1] == filters else _unit(x, filters, 1, stride)
