"""Convolutions, one behind the other, and three dense layers that hold most parameters: AlexNet, OverFeat and VGG."""

from __future__ import annotations

from typing import Any

from .. import nn
from ..graph import Tensor

VGG_A = ((64,), (128,), (256, 256), (512, 512), (512, 512))  # filters of each convolution, pooling after each group


def alexnet(x: Tensor, *, classes: int = 1000, dropout: float = 0.5) -> Any:
    """AlexNet for one device, without groups and normalisation: 61,100,840 parameters for ``x: N,224,224,3``.

    Paper: A. Krizhevsky, "One weird trick for parallelizing convolutional neural networks" (2014), arXiv:1404.5997.
    Sizes and counts are those of torchvision's alexnet, whose last map, 6x6x256, is what the first dense layer reads.
    ``dropout``: the share that is dropped before each of the first two dense layers; 0 leaves the ops out.
    """
    x = nn.max_pool(nn.relu(nn.conv(x, 64, 11, stride=4, padding=2)), 3, stride=2)
    x = nn.max_pool(nn.relu(nn.conv(x, 192, 5, padding=2)), 3, stride=2)
    for filters in (384, 256, 256):
        x = nn.relu(nn.conv(x, filters, 3, padding=1))
    x = nn.max_pool(x, 3, stride=2)
    for _ in range(2):
        x = nn.relu(nn.dense(_dropped(x, dropout), 4096))
    return nn.dense(x, classes)


def overfeat(x: Tensor, *, classes: int = 1000, dropout: float = 0.5) -> Any:
    """OverFeat, the fast model: 145,920,872 parameters for ``x: N,231,231,3``.

    Paper: P. Sermanet et al., "OverFeat: integrated recognition, localization and detection using convolutional
    networks" (2013), arXiv:1312.6229, table 1. ``dropout``: the share that is dropped after each of the first two dense
    layers, the paper's sixth and seventh; 0 leaves the ops out.
    """
    x = nn.max_pool(nn.relu(nn.conv(x, 96, 11, stride=4)), 2)
    x = nn.max_pool(nn.relu(nn.conv(x, 256, 5)), 2)
    for filters in (512, 1024, 1024):
        x = nn.relu(nn.conv(x, filters, 3, padding=1))
    x = nn.max_pool(x, 2)
    for units in (3072, 4096):
        x = _dropped(nn.relu(nn.dense(x, units)), dropout)
    return nn.dense(x, classes)


def vgg_a(x: Tensor, *, classes: int = 1000, dropout: float = 0.5) -> Any:
    """VGG-A, also called VGG-11: 132,863,336 parameters for ``x: N,224,224,3``.

    Paper: K. Simonyan, A. Zisserman, "Very deep convolutional networks for large-scale image recognition" (2014),
    arXiv:1409.1556, table 1, column A: eight convolutions of window 3, pooling after the first, second, fourth, sixth
    and eighth. ``dropout``: the share that is dropped after each of the first two dense layers; 0 leaves the ops out.
    """
    for group in VGG_A:
        for filters in group:
            x = nn.relu(nn.conv(x, filters, 3, padding=1))
        x = nn.max_pool(x, 2)
    for _ in range(2):
        x = _dropped(nn.relu(nn.dense(x, 4096)), dropout)
    return nn.dense(x, classes)


def _dropped(x: Tensor, rate: float) -> Any:
    return nn.dropout(x, rate) if rate else x
