"""A whole training step (forward, loss, backward, SGD with momentum) beside PyTorch's, on CPU.

    python benchmarks/train_step.py [--networks lenet,resnet18] [--threads 2] [--seconds 60] [--tune 60] [--compile]
    python benchmarks/train_step.py --device cuda ...    see train_cuda.py

All sides start from the same parameters and see the same batches; before anything is timed, their losses are compared
over a few steps, without dropout, whose random numbers differ. What is timed has dropout where the network has it.
PyTorch runs eagerly in both of its layouts, and by torch.compile if asked; the ratio is to the fastest. Memory is the
most that a process has which runs one side only.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from common import RESULTS, beside_torch, geometric_mean, interleaved, shown, table, write
from memory import peaks
from networks import MOMENTUM, RATE, batches, chosen, has_dropout, options
from ours import Step
from pytorch import torch
from theirs import Step as TorchStep
from theirs import sides as torch_sides
from theirs import with_state, without_compile

from rapydli_flow.zoo import Network

APART = 1e-3  # how far losses may be apart, relatively, or three times as far as PyTorch's layouts


class Sides:
    """Ours and PyTorch's, from the same state, each fed with the same batches in turn.

    ``reason``: why there is no side of torch.compile, '' if there is.
    """

    def __init__(self, case: Network, mine: Step, data: list[tuple[Any, Any]], *, dropout: bool, without: str) -> None:
        state = mine.state()
        made, self.reason = torch_sides(
            TorchStep, lambda: with_state(case, mine.network, state, dropout=dropout), data, without=without
        )
        self.steps: dict[str, Any] = {"ours": mine, **made}
        self._data = {name: [side.tensors(*each) for each in data] for name, side in made.items()} | {"ours": data}
        self._count = dict.fromkeys(self.steps, 0)

    def turn(self, name: str) -> float:
        """One step of a side on its next batch."""
        self._count[name] += 1
        return self.steps[name](*self._data[name][self._count[name] % len(self._data[name])])

    def apart(self, steps: int) -> tuple[float, float]:
        """How far our losses are from PyTorch's nearer layout, relatively, at most, over so many steps; and how far
        its two layouts are from each other."""
        worst = own = 0.0
        for _ in range(steps):
            mine, *others = [self.turn(name) for name in self.steps]
            worst = max(worst, min(abs(mine / other - 1.0) for other in others))
            own = max(own, max(others) / min(others) - 1.0)
        return worst, own


def apart(case: Network, data: list[tuple[Any, Any]], given: argparse.Namespace) -> tuple[float | None, float | None]:
    """How far losses are apart without dropout; None where no step was asked for.

    Training amplifies rounding errors: large networks with large first losses depart from themselves in another layout.
    """
    if not given.agree_steps:
        return None, None
    mine = Step(case, case.batch, given.threads, dropout=False)
    proof = Sides(case, mine, data, dropout=False, without="not the same bits")
    found, own = proof.apart(given.agree_steps)
    if not found < max(APART, 3 * own):
        raise SystemExit(
            f"{case.name}: losses are apart by {found:.1e}, those of PyTorch's layouts by {own:.1e}: not the same work"
        )
    return found, own


def timed(case: Network, data: list[tuple[Any, Any]], given: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Columns with the milliseconds of a step, and the names of the sides."""
    mine = Step(case, case.batch, given.threads, tune_s=given.tune)
    sides = Sides(case, mine, data, dropout=True, without=without_compile("train", case, case.batch, given))
    times = interleaved(
        {name: partial(sides.turn, name) for name in sides.steps},
        rounds=given.rounds,
        seconds=given.seconds,
    )
    profile = mine.profile(data, steps=min(9, len(times["ours"])))
    return beside_torch(times) | {"without_compile": sides.reason, "ops_ms": profile}, list(sides.steps)


def measure(case: Network, given: argparse.Namespace) -> dict[str, Any]:
    """One row. What a part needs is gone when the next begins: networks are large."""
    data = batches(case, case.batch)
    row = {"network": case.name, "batch": case.batch, "threads": given.threads, "dropout": has_dropout(case)}
    row["loss_apart"], row["torch_apart"] = apart(case, data, given)
    columns, names = timed(case, data, given)
    return row | columns | peaks("train", names, case.name, batch=case.batch, threads=given.threads)


def main() -> None:
    """Measure every network, print a table, write JSON after each."""
    if "cuda" in sys.argv:
        from train_cuda import main as on_a_gpu

        on_a_gpu()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser, rounds=30)
    parser.add_argument("--agree-steps", type=int, default=20, help="steps over which losses are compared first")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows: list[dict[str, Any]] = []
    for case in chosen(given.networks):
        rows.append(measure(case, given))
        print(f"{case.name} {rows[-1]['ops_ms']}", flush=True)
        path = write("train_step", rows, folder=Path(given.results or RESULTS), rate=RATE, momentum=MOMENTUM)
    print(table([shown(row) for row in rows]))
    print(f"geometric mean of speedups: {geometric_mean([row['speedup'] for row in rows]):.3f}")
    print(path)


if __name__ == "__main__":
    main()
