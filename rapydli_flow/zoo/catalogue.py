"""The networks by name, with what is known of each: record shape, classes, published parameters, source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..arguments import nearest
from ..errors import SettingError
from ..graph import Graph, trace
from ..spec import Spec
from .caffe import cifar10_quick, lenet
from .inception import googlenet
from .plain import alexnet, overfeat, vgg_a
from .residual import resnet18, resnet50


@dataclass(frozen=True)
class Network:
    """A network and what its source says about it.

    ``function`` takes ``x: N, *record`` and gives scores ``N, classes``. ``batch`` is how many records a step has in
    this project's benchmarks; ``parameters`` is the published count, for records of this shape.
    """

    name: str
    function: Callable[..., Any]
    record: tuple[int, ...]
    classes: int
    batch: int
    parameters: int
    source: str

    def trace(self, batch: int | None = None) -> Graph:
        """The graph for batches of so many records, by default ``batch``."""
        return trace(self.function, Spec((self.batch if batch is None else batch, *self.record)))


_IMAGENET = ((224, 224, 3), 1000)
_ALL = (
    Network("lenet", lenet, (28, 28, 1), 10, 64, 431_080, "Caffe, lenet_train_test.prototxt"),
    Network("cifar10_quick", cifar10_quick, (32, 32, 3), 10, 100, 145_578, "Caffe, cifar10_quick_train_test.prototxt"),
    Network("alexnet", alexnet, *_IMAGENET, 32, 61_100_840, "Krizhevsky 2014, arXiv:1404.5997"),
    Network("overfeat", overfeat, (231, 231, 3), 1000, 16, 145_920_872, "Sermanet et al. 2013, arXiv:1312.6229"),
    Network("vgg_a", vgg_a, *_IMAGENET, 8, 132_863_336, "Simonyan, Zisserman 2014, arXiv:1409.1556"),
    Network("googlenet", googlenet, *_IMAGENET, 16, 6_998_552, "Szegedy et al. 2014, arXiv:1409.4842"),
    Network("resnet18", resnet18, *_IMAGENET, 16, 11_689_512, "He et al. 2015, arXiv:1512.03385"),
    Network("resnet50", resnet50, *_IMAGENET, 8, 25_557_032, "He et al. 2015, arXiv:1512.03385"),
)
networks: Mapping[str, Network] = MappingProxyType({network.name: network for network in _ALL})


def find(name: str) -> Network:
    """The network of this name. Raises SettingError for another name, with the nearest and all that there are."""
    if name not in networks:
        raise SettingError(
            f"zoo: there is no network {name!r}.{nearest(str(name), networks)} There are {', '.join(networks)}."
        )
    return networks[name]
