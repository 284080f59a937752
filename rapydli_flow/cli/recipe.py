"""Recipes: a Python file that says what to train.

step()       the training step: rf.train_step(rf.trace(network, spec), loss=..., optimizer=...)
data(url)    a dataset with splits 'train' and 'test', written to url if it is not there yet
EPOCHS       how long to train
CALLBACKS    what watches the run or decides how it goes on, if anything does: [rf.EarlyStopping(...), ...]
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ..data import Dataset
from ..errors import SettingError
from ..graph import Graph
from ..runtime.events import Callback


class Recipe:
    """The functions of a recipe file."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.module = _import(self.path)
        self.name = self.path.stem
        missing = [name for name in ("step", "data") if not callable(getattr(self.module, name, None))]
        if missing:
            raise SettingError(
                f"{path} has no function {' and '.join(f'{name}()' for name in missing)}. A recipe defines step() and "
                "data(url), and may set EPOCHS and CALLBACKS; see examples/digits.py."
            )

    @property
    def epochs(self) -> float:
        return float(getattr(self.module, "EPOCHS", 10))

    @property
    def callbacks(self) -> list[Callback]:
        given = list(getattr(self.module, "CALLBACKS", ()))
        for callback in given:
            if not isinstance(callback, Callback):
                raise SettingError(f"{self.path}: CALLBACKS holds {callback!r}, which is no rf.Callback.")
        return given

    def step(self) -> Graph:
        made: Any = self.module.step()
        if not isinstance(made, Graph) or made.network is None:
            raise SettingError(f"{self.path}: step() gave {type(made).__name__}, not a graph of rf.train_step.")
        return made

    def data(self, url: str) -> Dataset:
        made: Any = self.module.data(url)
        if not isinstance(made, Dataset) or not {"train", "test"} <= set(made.splits):
            raise SettingError(f"{self.path}: data(url) gave {made!r}, not a dataset with splits 'train' and 'test'.")
        return made


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise SettingError(f"{path} is not a file. Give a recipe, for example examples/digits.py.")
    name = f"rapydli_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SettingError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
