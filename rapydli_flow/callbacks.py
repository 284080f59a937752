"""Callbacks that act on a run: stop it early, keep its best state, lower its learning rate on a plateau.

All three look at one metric of each validation. A value is better when it is by more than ``min_delta``
below (mode 'min') or above ('max') the best so far; one that is not a number never is. ``mode='auto'``
knows losses and errors from accuracies by their names. Their decisions are the same in process and on a
cluster, and go on when a run is resumed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import isnan

from .arguments import is_whole
from .errors import SettingError
from .runtime.events import (
    RATE_FACTOR,
    Action,
    Callback,
    Event,
    Save,
    SetFactor,
    Started,
    Stop,
    Validated,
    direction,
    needs_factor,
    needs_folder,
    needs_metric,
)

__all__ = ["BestSnapshot", "EarlyStopping", "PlateauRate"]

MODES = ("min", "max")


class _Best(Callback, ABC):
    """The best value of a metric so far, and for how many validations there was none better."""

    decides = True

    def __init__(self, metric: str, mode: str, min_delta: float = 0.0) -> None:
        name = type(self).__name__
        way = direction(metric) if mode == "auto" else mode
        if way is None:
            raise SettingError(f"{name}: is a smaller or a larger {metric!r} better? Give mode='min' or mode='max'.")
        if way not in MODES:
            raise SettingError(f"{name}: mode={mode!r} is not one of auto, min, max.")
        if not min_delta >= 0.0:
            raise SettingError(f"{name}: min_delta={min_delta} is not 0 or more.")
        self.metric, self.mode, self.min_delta = metric, way, min_delta
        self._begin()

    def _begin(self) -> None:
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0

    def check(self, started: Started) -> None:
        needs_metric(type(self).__name__, self.metric, started)

    def on_event(self, event: Event) -> Action | None:
        if isinstance(event, Started):
            self._begin()
            self._started(event)
        elif isinstance(event, Validated):
            return self._decide(event, self._better(event))
        return None

    def _better(self, event: Validated) -> bool:
        value = event.metrics[self.metric]
        if not isnan(value) and (self.best is None or self._gain(value, self.best) > self.min_delta):
            self.best, self.best_step, self.waited = value, event.step, 0
            return True
        self.waited += 1
        return False

    def _gain(self, value: float, best: float) -> float:
        return best - value if self.mode == "min" else value - best

    def _started(self, event: Started) -> None:
        """A run begins, or goes on."""

    @abstractmethod
    def _decide(self, event: Validated, better: bool) -> Action | None:
        """What is to be done after this validation."""


class EarlyStopping(_Best):
    """Stops a run when a metric got no better in ``patience`` validations, one after the other.

    ``best``, ``best_step``: the best value and after how many steps it was. `BestSnapshot` keeps the state.
    """

    def __init__(self, metric: str = "loss", *, patience: int, min_delta: float = 0.0, mode: str = "auto") -> None:
        super().__init__(metric, mode, min_delta)
        self.patience = _patience(self, patience)

    def _decide(self, event: Validated, better: bool) -> Action | None:
        if self.waited < self.patience:
            return None
        if self.best is None:
            return Stop(f"{self.metric} was not a number in {self.waited} validations")
        return Stop(f"{self.metric} got no better than {self.best:.6g} (step {self.best_step:,})")


class BestSnapshot(_Best):
    """Keeps the state with the best metric in ``run_dir/<name>``: ``rf.load_model(run_dir / "best")``."""

    def __init__(self, metric: str = "loss", *, name: str = "best", mode: str = "auto") -> None:
        super().__init__(metric, mode)
        self.action = Save(name)

    def check(self, started: Started) -> None:
        super().check(started)
        needs_folder(type(self).__name__, started)

    def _decide(self, event: Validated, better: bool) -> Action | None:
        return self.action if better else None


class PlateauRate(_Best):
    """Multiplies the learning rate by ``factor`` when a metric got no better in ``patience`` validations.

    Then it waits for as many again; never below ``min_factor`` of the rate that the optimizer was given. The
    rate is one made by ``optim.adjustable``.
    """

    def __init__(
        self,
        metric: str = "loss",
        *,
        factor: float = 0.1,
        patience: int,
        min_factor: float = 1e-4,
        min_delta: float = 0.0,
        mode: str = "auto",
    ) -> None:
        super().__init__(metric, mode, min_delta)
        if not 0.0 < factor < 1.0:
            raise SettingError(f"PlateauRate: factor={factor} is not between 0 and 1.")
        if not 0.0 <= min_factor < 1.0:
            raise SettingError(f"PlateauRate: min_factor={min_factor} is not in [0, 1).")
        self.factor, self.min_factor, self.patience = factor, min_factor, _patience(self, patience)
        self.in_force, self.first = 1.0, 0

    def check(self, started: Started) -> None:
        super().check(started)
        needs_factor(type(self).__name__, started)

    def _started(self, event: Started) -> None:
        self.in_force, self.first = event.clocks[RATE_FACTOR], event.step

    def _decide(self, event: Validated, better: bool) -> Action | None:
        if self.waited < self.patience:
            return None
        self.waited = 0
        lower = max(self.in_force * self.factor, self.min_factor)
        if event.step <= self.first or lower >= self.in_force:  # the factor that a run was resumed with says it already
            return None
        self.in_force = lower
        return SetFactor(lower)


def _patience(callback: Callback, patience: int) -> int:
    if not is_whole(patience) or patience < 1:
        raise SettingError(f"{type(callback).__name__}: patience={patience!r} is not 1 or more validations.")
    return patience
