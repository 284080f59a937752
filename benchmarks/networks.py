"""The networks that are measured, for both sides: Caffe's LeNet and cifar10_quick.

Layers, sizes and order are those of Caffe's `lenet_train_test.prototxt` and
`cifar10_quick_train_test.prototxt` (pooling sizes round up, as Caffe's do).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rapydli_flow import nn


def lenet(x: Any) -> Any:
    """convolution 20, pooling, convolution 50, pooling, dense 500, relu, dense 10"""
    x = nn.max_pool(nn.conv(x, 20, 5), 2)
    x = nn.max_pool(nn.conv(x, 50, 5), 2)
    return nn.dense(nn.relu(nn.dense(x, 500)), 10)


def cifar10_quick(x: Any) -> Any:
    """three convolutions with pooling (maximum, average, average), two dense layers"""
    x = nn.relu(nn.max_pool(nn.conv(x, 32, 5, padding=2), 3, stride=2, padding=((0, 1), (0, 1))))
    x = nn.avg_pool(nn.relu(nn.conv(x, 32, 5, padding=2)), 3, stride=2, padding=((0, 1), (0, 1)))
    x = nn.avg_pool(nn.relu(nn.conv(x, 64, 5, padding=2)), 3, stride=2, padding=((0, 1), (0, 1)))
    return nn.dense(nn.dense(x, 64), 10)


@dataclass(frozen=True)
class Case:
    """A network, its batch, and how its parts are called on the other side."""

    name: str
    network: Callable[..., Any]
    batch: int
    record: tuple[int, ...]


CASES = (Case("lenet", lenet, 64, (28, 28, 1)), Case("cifar10_quick", cifar10_quick, 100, (32, 32, 3)))


def torch_twin(name: str) -> Any:
    """The same network in PyTorch."""
    import torch.nn as tn

    if name == "lenet":
        return tn.Sequential(
            tn.Conv2d(1, 20, 5),
            tn.MaxPool2d(2),
            tn.Conv2d(20, 50, 5),
            tn.MaxPool2d(2),
            tn.Flatten(),
            tn.Linear(800, 500),
            tn.ReLU(),
            tn.Linear(500, 10),
        )
    return tn.Sequential(
        tn.Conv2d(3, 32, 5, padding=2),
        tn.MaxPool2d(3, 2, ceil_mode=True),
        tn.ReLU(),
        tn.Conv2d(32, 32, 5, padding=2),
        tn.ReLU(),
        tn.AvgPool2d(3, 2, ceil_mode=True),
        tn.Conv2d(32, 64, 5, padding=2),
        tn.ReLU(),
        tn.AvgPool2d(3, 2, ceil_mode=True),
        tn.Flatten(),
        tn.Linear(1024, 64),
        tn.Linear(64, 10),
    )


def copy_state(state: dict[str, Any], twin: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Give the twin our parameters: filters *window,C,K become K,C,*window; dense I,K becomes K,I.

    The first dense layer reads C,H,W there and H,W,C here: ``shapes`` says what it flattens.
    """
    import numpy as np
    import torch

    layers = [m for m in twin if hasattr(m, "weight")]
    kinds = {"Conv2d": 0, "Linear": 0}
    with torch.no_grad():
        for m in layers:
            kind = type(m).__name__
            kinds[kind] += 1
            ours = f"{'conv' if kind == 'Conv2d' else 'dense'}_{kinds[kind]}"
            w = state[f"{ours}/w"]
            if kind == "Conv2d":
                w = w.transpose(3, 2, 0, 1)
            else:
                if ours in shapes:
                    h, wd, c = shapes[ours]
                    w = w.reshape(h, wd, c, -1).transpose(2, 0, 1, 3).reshape(h * wd * c, -1)
                w = w.T
            m.weight.copy_(torch.from_numpy(np.ascontiguousarray(w)))
            m.bias.copy_(torch.from_numpy(state[f"{ours}/b"]))


FLATTENED = {"lenet": {"dense_1": (4, 4, 50)}, "cifar10_quick": {"dense_1": (4, 4, 64)}}
