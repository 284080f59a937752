"""A job: all that the workers of a run need to know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..data import Dataset
from ..graph import Graph
from ..scheduler import Plan, Program
from ..scheduler.topology import NOWHERE, Topology
from ..template import Device
from ..tuner import Tuning


@dataclass(frozen=True)
class Job:
    """What ranks do, on what, and how they reach each other.

    ``transport``: 'shared' (the memory of one host), 'comm', or 'hosts' (memory within each host, comms between them);
    'auto' until ranks are placed.
    """

    run: str
    step: Graph
    programs: tuple[Program, ...]
    plan: Plan
    tunings: tuple[Tuning, ...]  # of each kind of device that ranks are on
    threads: int
    seed: int
    data: Dataset | None
    validation: Dataset | None
    shuffle: bool
    transport: str
    timeout_s: float
    run_dir: Path | None
    keep: int = 3
    keeps_copies: bool = False
    topology: Topology = NOWHERE
    before: str = ""  # the generation before this one, whose chunks in memory are used

    @property
    def ranks(self) -> int:
        return len(self.programs)

    def tuning(self, device: Device) -> Tuning | None:
        """That of a kind of device, if ranks are on it."""
        return next((tuning for tuning in self.tunings if tuning.device.key == device.key), None)
