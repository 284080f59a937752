"""The networks of `rapydli_flow.zoo` in PyTorch, and our parameters given to them.

Modules stand in the order in which our functions add their layers, so that parameters are matched by order, kind and
shape. ReLUs work in place, as in torchvision. Data is N,C,H,W here, and N,H,W,C on the other side.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np
from pytorch import torch
from torch import nn

from rapydli_flow.graph import Graph
from rapydli_flow.ops import Reshape

FLAT = {
    "lenet": 800,
    "cifar10_quick": 1024,
    "alexnet": 9216,
    "overfeat": 36864,
    "vgg_a": 25088,
}  # what the first dense layer reads


def lenet(flat: int, classes: int, _: float) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(flat, 500),
        nn.ReLU(inplace=True),
        nn.Linear(500, classes),
    )


def cifar10_quick(flat: int, classes: int, _: float) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 32, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(flat, 64),
        nn.Linear(64, classes),
    )


def alexnet(flat: int, classes: int, dropout: float) -> nn.Module:
    layers = [*_conv(3, 64, 11, stride=4, padding=2), nn.MaxPool2d(3, 2)]
    layers += [*_conv(64, 192, 5, padding=2), nn.MaxPool2d(3, 2)]
    layers += [*_conv(192, 384, 3, padding=1), *_conv(384, 256, 3, padding=1), *_conv(256, 256, 3, padding=1)]
    layers += [nn.MaxPool2d(3, 2), nn.Flatten()]
    for features in (flat, 4096):
        layers += [nn.Dropout(dropout), nn.Linear(features, 4096), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(4096, classes))


def overfeat(flat: int, classes: int, dropout: float) -> nn.Module:
    layers = [*_conv(3, 96, 11, stride=4), nn.MaxPool2d(2), *_conv(96, 256, 5), nn.MaxPool2d(2)]
    layers += [*_conv(256, 512, 3, padding=1), *_conv(512, 1024, 3, padding=1), *_conv(1024, 1024, 3, padding=1)]
    layers += [nn.MaxPool2d(2), nn.Flatten()]
    for inputs, features in ((flat, 3072), (3072, 4096)):
        layers += [nn.Linear(inputs, features), nn.ReLU(inplace=True), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(4096, classes))


def vgg_a(flat: int, classes: int, dropout: float) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for group in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for filters in group:
            layers += _conv(channels, filters, 3, padding=1)
            channels = filters
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    for features in (flat, 4096):
        layers += [nn.Linear(features, 4096), nn.ReLU(inplace=True), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(4096, classes))


class Inception(nn.Module):
    """1x1; 1x1 and 3x3; 1x1 and 5x5; pooling and 1x1, one behind the other in the channels."""

    def __init__(self, channels: int, one: int, *filters: int) -> None:
        super().__init__()
        reduce3, three, reduce5, five, pooled = filters
        self.ways = nn.ModuleList(
            nn.Sequential(*layers)
            for layers in (
                _conv(channels, one, 1),
                [*_conv(channels, reduce3, 1), *_conv(reduce3, three, 3, padding=1)],
                [*_conv(channels, reduce5, 1), *_conv(reduce5, five, 5, padding=2)],
                [nn.MaxPool2d(3, 1, padding=1), *_conv(channels, pooled, 1)],
            )
        )
        self.channels = one + three + five + pooled

    def forward(self, x: Any) -> Any:
        return torch.cat([way(x) for way in self.ways], 1)


def googlenet(_: int, classes: int, dropout: float) -> nn.Module:
    layers: list[nn.Module] = [*_conv(3, 64, 7, stride=2, padding=3), nn.MaxPool2d(3, 2, ceil_mode=True)]
    layers += [nn.LocalResponseNorm(5, 1e-4, 0.75), *_conv(64, 64, 1), *_conv(64, 192, 3, padding=1)]
    layers += [nn.LocalResponseNorm(5, 1e-4, 0.75), nn.MaxPool2d(3, 2, ceil_mode=True)]
    modules = """64 96 128 16 32 32, 128 128 192 32 96 64 | 192 96 208 16 48 64, 160 112 224 24 64 64,
        128 128 256 24 64 64, 112 144 288 32 64 64, 256 160 320 32 128 128 | 256 160 320 32 128 128,
        384 192 384 48 128 128"""
    channels = 192
    for group in modules.split("|"):
        for line in group.split(","):
            layers.append(Inception(channels, *map(int, line.split())))
            channels = int(layers[-1].channels)  # type: ignore[arg-type]
        layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
    layers[-1:] = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, classes)]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """relu(f(x) + x): f is 3x3, 3x3, or where ``wide`` 1x1, 3x3 and 1x1 with four times as many filters."""

    def __init__(self, channels: int, filters: int, stride: int, *, wide: bool) -> None:
        super().__init__()
        self.channels = out = 4 * filters if wide else filters
        units = [(channels, filters, 1, 1), (filters, filters, 3, stride), (filters, out, 1, 1)]
        units = units if wide else [(channels, filters, 3, stride), (filters, out, 3, 1)]
        layers = [layer for unit in units for layer in (*_unit(*unit), nn.ReLU(inplace=True))]
        self.body = nn.Sequential(*layers[:-1])
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Sequential(*_unit(channels, out, 1, stride))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Any) -> Any:
        y = self.body(x)
        y += self.shortcut(x)
        return self.relu(y)


def resnet18(_: int, classes: int, __: float) -> nn.Module:
    return _resnet((2, 2, 2, 2), classes, wide=False)


def resnet50(_: int, classes: int, __: float) -> nn.Module:
    return _resnet((3, 4, 6, 3), classes, wide=True)


def _resnet(depths: tuple[int, ...], classes: int, *, wide: bool) -> nn.Module:
    layers: list[nn.Module] = [*_unit(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
    channels = 64
    for stage, depth in enumerate(depths):
        for i in range(depth):
            layers.append(Residual(channels, 64 * 2**stage, 2 if stage and not i else 1, wide=wide))
            channels = int(layers[-1].channels)  # type: ignore[arg-type]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def _conv(channels: int, filters: int, window: int, **how: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, filters, window, **how), nn.ReLU(inplace=True)]


def _unit(channels: int, filters: int, window: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(channels, filters, window, stride=stride, padding=window // 2, bias=False)
    return [conv, nn.BatchNorm2d(filters)]


MAKERS = {f.__name__: f for f in (lenet, cifar10_quick, alexnet, overfeat, vgg_a, googlenet, resnet18, resnet50)}


def published(name: str, classes: int, *, dropout: float) -> nn.Module:
    """The twin for records of the published shape, with PyTorch's own first values."""
    return MAKERS[name](FLAT.get(name, 0), classes, dropout)


def twin(name: str, graph: Graph, state: Mapping[str, Any], *, dropout: float = 0.0) -> nn.Module:
    """The twin of a traced network of whatever size, with this state (parameters and running statistics)."""
    dense = [leaf.shape for leaf in graph.leaves("param") if leaf.name.endswith("/w") and len(leaf.shape) == 2]
    module = MAKERS[name](dense[0][0], dense[-1][1], dropout)
    copy_state(graph, state, module)
    return module


def copy_state(graph: Graph, state: Mapping[str, Any], module: nn.Module) -> None:
    """Give a twin our state: filters *window,C,K become K,C,*window; dense I,K becomes K,I.

    A dense layer that flattens a map reads H,W,C here and C,H,W there. ValueError where the two do not correspond.
    """
    leaves = [leaf.name for leaf in graph.leaves("param", "state")]
    ours = {scope: list(names) for scope, names in groupby(leaves, lambda name: name.rpartition("/")[0])}
    theirs = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d)]
    maps = {
        node.name.rpartition("/")[0]: graph.spec(node.inputs[0]).shape[1:]
        for node in graph
        if isinstance(node.op, Reshape) and "dense" in node.name
    }
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} layers here, {len(theirs)} there")
    with torch.no_grad():
        for (scope, names), m in zip(ours.items(), theirs, strict=True):
            values = {name.rpartition("/")[2]: np.asarray(state[name]) for name in names}
            for label, target in _targets(m).items():
                value = values.pop(label)
                if label == "w":
                    value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else _dense(value, maps.get(scope))
                if value.shape != tuple(target.shape):
                    raise ValueError(f"{scope}/{label} is {value.shape} here and {tuple(target.shape)} there")
                target.copy_(torch.from_numpy(np.ascontiguousarray(value)))
            if values:
                raise ValueError(f"{scope} has {', '.join(values)} here, which {type(m).__name__} has not")


def _targets(module: Any) -> dict[str, Any]:
    """What a module keeps, by our labels."""
    if isinstance(module, nn.BatchNorm2d):
        found = {"gain": module.weight, "bias": module.bias, "mean": module.running_mean, "var": module.running_var}
    else:
        found = {"w": module.weight, "b": module.bias}
    return {label: tensor for label, tensor in found.items() if tensor is not None}


def _dense(w: Any, shape: tuple[int, ...] | None) -> Any:
    """H*W*C,K or I,K -> K,C*H*W or K,I"""
    if shape is not None and len(shape) == 3:
        w = w.reshape(*shape, -1).transpose(2, 0, 1, 3).reshape(w.shape)
    return w.T
