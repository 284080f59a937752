"""NETWORK on the command line: a recipe file, or the name of a network of `rapydli_flow.zoo`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import nn, optim
from ..errors import SettingError
from ..graph import Graph, trace, train_step
from ..spec import Spec
from .recipe import Recipe


@dataclass(frozen=True)
class Network:
    """A network by name, with its training step."""

    name: str
    step: Graph


def resolve(network: str, batch: int | None) -> Network:
    """The training step that NETWORK means. ``batch``: of a network of the zoo; a recipe says it itself."""
    if Path(network).is_file() or network.endswith(".py"):
        recipe = Recipe(network)
        if batch is not None:
            raise SettingError(f"--batch {batch}: {network} is a recipe, which says its batch itself, in step().")
        return Network(recipe.name, recipe.step())
    if batch is not None and batch < 1:
        raise SettingError(f"--batch {batch} is not 1 or more records.")
    found = _zoo(network).find(network)
    graph = trace(found.function, Spec((batch or found.batch, *found.record)))
    optimizer = optim.sgd(0.01, momentum=0.9)
    return Network(found.name, train_step(graph, loss=nn.cross_entropy, optimizer=optimizer))


def _zoo(network: str) -> Any:
    try:
        return importlib.import_module("rapydli_flow.zoo")
    except ModuleNotFoundError as error:
        if error.name != "rapydli_flow.zoo":
            raise
        raise SettingError(f"{network} is not a file. Give a recipe, for example examples/digits.py.") from None
