"""The two small networks that come with Caffe: LeNet for MNIST, and cifar10_quick. Pooling rounds sizes up.

Source: Jia et al., "Caffe: convolutional architecture for fast feature embedding" (2014), arXiv:1408.5093;
`examples/mnist/lenet_train_test.prototxt` and `examples/cifar10/cifar10_quick_train_test.prototxt` in its repository.
"""

from __future__ import annotations

from typing import Any

from .. import nn
from ..graph import Tensor
from .rounding import up


def lenet(x: Tensor, *, classes: int = 10) -> Any:
    """LeNet as Caffe has it: 431,080 parameters for ``x: N,28,28,1``.

    Convolution and pooling twice, a dense layer with the only ReLU, and one for the scores: the network of LeCun,
    Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition" (1998), wider, without its
    sigmoids and its radial basis functions.
    """
    x = nn.max_pool(nn.conv(x, 20, 5), 2)
    x = nn.max_pool(nn.conv(x, 50, 5), 2)
    return nn.dense(nn.relu(nn.dense(x, 500)), classes)


def cifar10_quick(x: Tensor, *, classes: int = 10) -> Any:
    """Three convolutions with pooling (maximum, average, average), two dense layers: 145,578 for ``x: N,32,32,3``.

    The layout is that of Krizhevsky's cuda-convnet (2011) for CIFAR-10. The first pooling comes before its ReLU.
    """
    x = nn.conv(x, 32, 5, padding=2)
    x = nn.relu(nn.max_pool(x, 3, stride=2, padding=up(x, 3, 2)))
    for filters in (32, 64):
        x = nn.relu(nn.conv(x, filters, 5, padding=2))
        x = nn.avg_pool(x, 3, stride=2, padding=up(x, 3, 2))
    return nn.dense(nn.dense(x, 64), classes)
