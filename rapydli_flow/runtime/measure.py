"""Measuring kernels on this host: checked against the reference, then timed in interleaved rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from cpu_kernels.driver import run_kernel

from ..errors import RapydliError
from ..ops import Sample
from ..spec import Array, Block, Spec
from ..template import Device
from ..tuner import Choice, Request, Trial, Tuning
from .rank import at_array, kernel_of

TOLERANCE = {"float32": 1e-4, "float64": 1e-10}
ROUNDS = 7
ROUND_S = 0.004


class Measure:
    """The `measure` callable of the tuner for the CPU of this process.

    ``operands``: arrays to measure on, in place of random numbers. Results of more than ``checked`` elements are
    not compared with the reference, which may be slow.
    """

    def __init__(
        self,
        device: Device,
        *,
        threads: int,
        seed: int = 0,
        operands: Sequence[Array] | None = None,
        checked: float = 2_000_000,
    ) -> None:
        self.device, self.threads, self.seed = device, threads, seed
        self.operands, self.checked = operands, checked

    def __call__(self, request: Request, choices: Sequence[Choice]) -> list[Trial]:
        """Seconds of one call for each choice, or why there are none."""
        rng = np.random.default_rng(self.seed)
        ins = self.operands or Sample(request.op, request.ins, _ranges(request)).draw(rng)
        channels = {i: (0.5, 2.0) for i, s in enumerate(request.epilogue.extras) if s.floating and len(s.shape) == 1}
        extras = Sample(request.op, request.epilogue.extras, channels).draw(rng)
        whole = request.whole or (request.op if request.epilogue.identity else None)
        small = max(s.size for s in request.outs) < self.checked
        wanted = whole.run(*ins, *extras) if whole and small else None
        trials: dict[int, Trial] = {}
        ready = {}
        for i, choice in enumerate(choices):
            try:
                run, outs = self._prepare(request, choice, ins, extras)
                run()
                if wanted is not None:
                    _compare(outs, wanted)
                ready[i] = run
            except Exception as failure:  # templates are open to all: whatever one does, the others are tried
                trials[i] = Trial(choice, error=f"{type(failure).__name__}: {failure}")
        times: dict[int, list[float]] = {i: [] for i in ready}
        for _ in range(ROUNDS):
            for i, run in ready.items():
                times[i].append(_time(run))
        trials |= {i: Trial(choices[i], median(values)) for i, values in times.items()}
        return [trials[i] for i in range(len(choices))]

    def _prepare(
        self, request: Request, choice: Choice, ins: Sequence[Array], extras: Sequence[Array]
    ) -> tuple[Callable[[], None], list[Array]]:
        kernel = kernel_of(request, choice, self.device)
        outs = [_unwritten(s) for s in request.outs]
        work = [np.empty(s.shape, s.dtype) for s in Tuning(self.device).workspace(request, choice)]
        at = at_array(Block.all(request.outs[0].shape))

        def run() -> None:
            run_kernel(kernel, ins, outs, work=work, extras=extras, at=at, threads=self.threads)

        return run, outs


def _ranges(request: Request) -> dict[int, tuple[float, float]]:
    """Bounds of values drawn for integer operands: taps of a window, classes."""
    window = getattr(request.op, "window", ())
    most = int(np.prod(window)) if window else min((s.shape[-1] for s in request.ins if len(s.shape) > 1), default=2)
    out = {i: (0.0, float(max(1, most))) for i, s in enumerate(request.ins) if not s.floating}
    return out | {i: (0.5, 2.0) for i, s in enumerate(request.ins) if s.floating and len(s.shape) == 1}


def _unwritten(spec: Spec) -> Array:
    """Floats are NaN, so that an element that no kernel writes is found out."""
    return np.full(spec.size_bytes, 0xFF, np.uint8).view(spec.dtype).reshape(spec.shape)


def _compare(outs: Sequence[Array], wanted: Sequence[Array]) -> None:
    """Raise RapydliError unless outputs are what the reference gives, up to a tolerance times its largest value."""
    for k, (out, want) in enumerate(zip(outs, wanted, strict=True)):
        scale = float(np.abs(want).max(initial=0.0)) or 1.0
        off = np.abs(out.astype(np.float64) - want) / scale
        worst = float(off.max(initial=0.0))  # NaN if there is one
        tolerance = TOLERANCE.get(out.dtype.name, 0.0)
        if not worst <= tolerance:
            wrong = ~(off <= tolerance)
            first = tuple(map(int, np.argwhere(wrong)[0]))
            what = f"{out[first]:.6g}, not {want[first]:.6g}"
            if np.isnan(off[first]):
                what = "not written, or not a number"
            which = f" of output {k}" if len(outs) > 1 else ""
            raise RapydliError(
                f"deviates from the reference by {worst:.1e}: {wrong.sum():,} of {off.size:,} elements{which} are "
                f"wrong, the first at {first} is {what}"
            )


def _time(run: Callable[[], None]) -> float:
    """Seconds of one call: as many calls as fit in a round."""
    begin, calls = time.perf_counter(), 0
    while True:
        run()
        calls += 1
        spent = time.perf_counter() - begin
        if spent > ROUND_S:
            return spent / calls


def distinct(requests: Sequence[Request], device: Device) -> list[Request]:
    """One request for each key, those with a template only."""
    found: dict[str, Request] = {}
    for request in requests:
        if request.templates(device):
            found.setdefault(request.key(device), request)
    return list(found.values())
