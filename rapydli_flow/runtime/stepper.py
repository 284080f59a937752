"""A training loop of one's own: one training step at a time, on batches that the caller makes.

Ranks keep parameters and state where they run. A `State` is a value that stands for what they hold after a
step; its arrays come to the caller when they are looked at. Before a step each rank sets the present state
aside (it is also what a step that fails goes back to), so two states are at hand without a transfer:

    ranks     aside: state 6        now: state 7
    step(state 7, batch)            is state 6 still held by anyone? then it is fetched, once
              aside: state 7        now: state 8
    step(state 5, batch)            not at hand: states 7 and 8 are fetched if held, then state 5 is loaded
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
from distributed import Client

from ..errors import NonFinite, RunLost, SettingError
from ..graph import Graph
from ..scheduler import Plan
from ..spec import Array, Block
from ..tuner import Tuning
from . import stepping
from .backend import holding, whole_state
from .cluster import Cluster
from .evaluate import complete_state
from .feeding import fed_arrays
from .job import Job
from .kinds import devices_for, names_of, tunings_for
from .links import known_links
from .local import Local
from .own import bring, defined_outside
from .placing import placed
from .segment import KEPT
from .stepping import Advance, Here, Ranks, There
from .transport import TIMEOUT_S
from .workers import Usual, workers_for

TRANSPORTS = ("auto", "shared", "comm")


class State(Mapping[str, Array]):
    """Parameters and state by name after ``step`` training steps: whole arrays, read-only.

    What a `Stepper` gives is fetched from the ranks when an array is first looked at.
    """

    def __init__(self, arrays: Mapping[str, Array], step: int = 0) -> None:
        self._arrays: dict[str, Array] | None = None
        self._source: Stepper | None = None
        self._names = tuple(arrays)
        self.step = step
        self._set(arrays)

    @classmethod
    def _at(cls, source: Stepper, step: int) -> State:
        """A state that the ranks of a stepper hold."""
        state = cls({}, step)
        state._names, state._arrays, state._source = source.names, None, source
        return state

    def _set(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        made = {name: np.asarray(array).view() for name, array in arrays.items()}
        for array in made.values():
            array.flags.writeable = False
        self._arrays, self._source = made, None
        return made

    def __getitem__(self, name: str) -> Array:
        arrays = self._arrays
        if arrays is None:
            source = self._source
            arrays = self._arrays if source is None else source._fetch(self)
        assert arrays is not None
        return arrays[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __reduce__(self) -> tuple[Any, ...]:
        return State, (dict(self), self.step)

    def __repr__(self) -> str:
        where = "on its ranks" if self._arrays is None else f"{sum(a.nbytes for a in self._arrays.values()):,} bytes"
        return f"<State: step {self.step}, {len(self)} arrays, {where}>"


def stepper(
    graph: Graph,
    client: Client | None = None,
    *,
    plan: Plan | None = None,
    seed: int = 0,
    tuning: Tuning | None = None,
    transport: str = "auto",
    timeout_s: float = TIMEOUT_S,
    device: str | None = None,
) -> Stepper:
    """A training step that is called batch by batch, in this process or on the workers of a client.

    ``device``: 'cpu', 'cuda', 'cuda:1' or 'emulated', by default that of this process or of most workers.
    ``graph``: from `train_step`. ``plan``: how ranks divide the work; by default samples, one rank a worker.
    The programs are those of `fit`: the same batches give the same bits. Close it when done, or use ``with``:

        with rf.stepper(graph) as step:
            state = step.init()
            for batch in batches:
                state, metrics = step(state, batch)

    Raises SettingError for a graph, a plan, a device or a tuning that does not fit, MissingDependency for a device that
    is not there; with a client NoWorkers, DeviceMismatch and VersionMismatch as `fit` does.
    """
    if graph.network is None:
        raise SettingError("stepper: this graph is not a training step; make one with rf.train_step.")
    if plan is not None and plan.apart:
        raise SettingError(
            "stepper: a plan with average_every or staleness is for rf.fit: here every step is one of all ranks."
        )
    if transport not in TRANSPORTS:
        raise SettingError(f"stepper: transport={transport!r} is not one of {', '.join(TRANSPORTS)}.")
    names = names_of("stepper", device, plan)
    asked = (plan.ranks if plan else None, timeout_s, names, "stepper")
    workers = workers_for(client, *asked) if client is not None else {}
    plan = plan or Usual.of(workers).plan(graph)
    if names is None and not workers and tuning is not None:
        tunings: tuple[Tuning, ...] = (tuning,)
    else:
        tunings = tunings_for("stepper", devices_for("stepper", names, workers), tuning)
    programs = plan.programs(graph, *tunings)
    ranks: Ranks
    if client is None:
        ranks = Here(Local(graph, plan, programs, tunings[0], None, None, seed=seed, timeout_s=timeout_s), timeout_s)
    else:
        bring(client, tuple(workers), defined_outside(graph, programs))
        job = Job(
            run="stepper",
            step=graph,
            programs=programs,
            plan=replace(plan, graph=None, recipe=None),
            tunings=tunings,
            threads=plan.threads,
            seed=seed,
            data=None,
            validation=None,
            shuffle=False,
            transport=transport,
            timeout_s=timeout_s,
            run_dir=None,
        )
        links = known_links(client, workers, plan.ranks, timeout_s)
        where = placed(client, programs, plan, workers, links=links)
        ranks = There(Cluster(client, job, where.addresses, workers, links))
    return Stepper(graph, plan, ranks, [program.layout for program in programs], seed=seed)


class Stepper:
    """Training steps, one a call: ``state, metrics = step(state, batch)``. Made by `stepper`."""

    def __init__(
        self, graph: Graph, plan: Plan, ranks: Ranks, held: Sequence[Mapping[str, Block]], *, seed: int
    ) -> None:
        self.graph, self.plan, self.seed = graph, plan, seed
        self.names = tuple(leaf.name for leaf in graph.leaves("param", "state"))
        self._ranks, self._held = ranks, held
        self._now: Callable[[], State | None] = _nobody
        self._aside: Callable[[], State | None] = _nobody
        self._lock = threading.RLock()  # a state may be looked at by another thread than the one that trains
        self._over = ""

    def init(self, arrays: Mapping[str, Array] | None = None, *, step: int | None = None) -> State:
        """The state to begin with: the initial one for the seed, or that of a model or run, at this ``step`` (0).

        ``arrays`` must have all that the network has; optimizer state that is missing starts anew.
        """
        if arrays is not None:
            known = arrays.step if isinstance(arrays, State) else 0
            return State(complete_state(self.graph, arrays, self.seed), known if step is None else step)
        with self._lock:
            self._usable()
            self._forget()
            self._ranks.each(stepping.start, [self.seed] * self.plan.ranks)
            state = State._at(self, step or 0)
            self._now = weakref.ref(state)
            return state

    def __call__(
        self, state: Mapping[str, Array], batch: Mapping[str, Array], *, rate_factor: float = 1.0
    ) -> tuple[State, dict[str, float]]:
        """One training step: the next state, and loss and metrics of this batch before the update.

        ``state``: what the last call gave, which costs nothing; or an older one, or a dict of arrays (step 0),
        which is loaded. ``batch``: the whole batch, an array for each input. ``rate_factor`` multiplies the
        learning rate of this step, where the optimizer has one. Raises, with the state as it was: SettingError,
        ShapeError, DTypeError and DatasetError for a batch that does not fit, NonFinite for a loss that is none, unless
        a loss scale that moves has skipped it: then the step gives the same parameters, and the loss as it is.
        """
        if not isinstance(state, Mapping):
            raise SettingError(
                f"step: the state is {type(state).__name__}, not a state or a dict of arrays. Begin with step.init(); "
                "a step gives a pair: state, metrics = step(state, batch)."
            )
        if rate_factor != 1.0 and "rate_factor" not in self.graph:
            raise SettingError(f"step: rate_factor={rate_factor}, but no optimizer of this training step reads it.")
        arrays = fed_arrays("step", self.graph, batch)
        with self._lock:
            self._usable()
            number = state.step if isinstance(state, State) else 0
            if state is not self._now():
                self._load(state)
            self._keep(self._aside)
            self._aside = _nobody
            clocks = {"rate_factor": rate_factor}
            orders = [
                Advance(number, clocks, {name: x[held[name].slices] for name, x in arrays.items() if name in held})
                for held in self._held
            ]
            try:
                results = self._ranks.advance(orders)
            except BaseException as error:
                if not self._ranks.mended:
                    self._over = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                raise
            if isinstance(results[0], NonFinite):
                raise NonFinite(str(results[0]).replace(KEPT, "The step was undone: its state is as it was."))
            new = State._at(self, number + 1)
            self._aside, self._now = self._now, weakref.ref(new)
        return new, {name: values[0] for name, values in results[0].scalars.items()}

    def close(self) -> None:
        """Let go of the ranks. States that are still held keep their arrays."""
        with self._lock:
            if self._ranks.closed:
                return
            try:
                if not self._over:
                    self._keep(self._now, self._aside)
            finally:
                self._ranks.close(failed=bool(self._over))

    def __enter__(self) -> Stepper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._ranks.closed else "over" if self._over else "ready"
        return f"<Stepper: {self.plan.ranks} ranks {self._ranks.place}, {state}>"

    # states -----------------------------------------------------------------------------------------

    def _usable(self) -> None:
        if self._over:
            raise RunLost(
                f"step: the ranks stopped in the middle of a step ({self._over}). Make another stepper, and begin "
                "with a state whose arrays you have: step.init(arrays, step=...)."
            )
        if self._ranks.closed:
            raise SettingError("step: this stepper is closed. Make another with rf.stepper.")

    def _fetch(self, state: State) -> dict[str, Array]:
        """The arrays of a state that the ranks hold."""
        with self._lock:
            if state._arrays is not None:
                return state._arrays
            self._usable()
            count = holding(self.graph, self._held)
            aside = state is not self._now()
            assert not aside or state is self._aside()
            parts = self._ranks.each(stepping.held, [aside] * count)
            return state._set(whole_state(self.graph, self._held, parts))

    def _keep(self, *held: Callable[[], State | None]) -> None:
        """Fetch states that are about to be overwritten, if someone still holds them."""
        for state in (get() for get in held):
            if state is not None:
                self._fetch(state)

    def _forget(self) -> None:
        """What the ranks hold is about to change; if that is broken off, it is no state."""
        self._keep(self._now, self._aside)
        self._now = self._aside = _nobody

    def _load(self, state: Mapping[str, Array]) -> None:
        """Make another state the present one."""
        if state is self._aside():
            self._forget()
            self._ranks.each(stepping.back, [None] * self.plan.ranks)
        else:
            arrays = complete_state(self.graph, state, self.seed)
            self._forget()
            self._ranks.load(arrays)
        self._now = weakref.ref(state) if isinstance(state, State) else _nobody


def _nobody() -> None:
    return None
