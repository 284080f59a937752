"""The autotuner, measured.

    python benchmarks/tuner.py spaces        six published spaces, beside Kernel Tuner (make .kernel-tuner first)
    python benchmarks/tuner.py record        walk spaces of our convolutions and keep the times (about half an hour)
    python benchmarks/tuner.py strategies    strategies on what was recorded, no kernel runs
    python benchmarks/tuner.py stability     tune one convolution ten times; is it the same config?
    python benchmarks/tuner.py step          tune a LeNet step in less than two minutes; what is it worth?
    python benchmarks/tuner.py known         tune LeNet, cifar10_quick and the digits of `make demo` for this processor

Each prints a table and writes benchmarks/results/tuner_<name>.json; `known` writes what ships with the package.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from common import RESULTS, table, write
from networks import CASES

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow import nn, optim
from rapydli_flow.cli import main as cli
from rapydli_flow.config import SHIPPED, settings
from rapydli_flow.ops import Conv, ConvFilterGrad, ConvInputGrad
from rapydli_flow.runtime.bench import Bench
from rapydli_flow.space import Space
from rapydli_flow.spec import Spec
from rapydli_flow.tuner import STRATEGIES, Choice, Request, Trial, Tuner, Tuning
from rapydli_flow.tuner.simulate import Recording, compare

HERE = Path(__file__).resolve().parent
SPACES = HERE / "search_spaces.json"
SMALL = CASES[:2]  # the networks whose tuning results ship
CHECKS = 10  # thorough measurements of all winners, beside one another, each in a process of its own
PICTURED = "conv 56x56x32, stride 2"
RECORDED = RESULTS / "recorded_spaces.json"
KERNEL_TUNER = HERE.parent / ".kernel-tuner" / "bin" / "python"
THEIRS = r"""
import json, sys, time, warnings
warnings.simplefilter("ignore")
import kernel_tuner
from kernel_tuner.searchspace import Searchspace
from importlib.metadata import version
for line in sys.stdin:
    space = json.loads(line)
    begin = time.perf_counter()
    made = Searchspace(space["parameters"], list(space["constraints"]), 1024)
    spent = time.perf_counter() - begin
    answer = {"time_s": spent, "count": made.size, "version": version("kernel_tuner")}
    if space["list"]:
        answer["points"] = sorted(map(list, made.list))
    print(json.dumps(answer), flush=True)
"""


# spaces --------------------------------------------------------------------------------------------------


class KernelTuner:
    """Kernel Tuner in a process of its own environment, that constructs spaces when asked."""

    def __init__(self) -> None:
        if not KERNEL_TUNER.exists():
            raise SystemExit("there is no .kernel-tuner: python benchmarks/peers.py --kernel-tuner")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([str(KERNEL_TUNER), "-c", THEIRS], text=True, **pipes)  # type: ignore[call-overload]

    def construct(self, form: dict[str, Any], *, points: bool = False) -> dict[str, Any]:
        self.process.stdin.write(json.dumps({**form, "list": points}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def construct(form: dict[str, Any]) -> tuple[float, list[tuple[Any, ...]]]:
    """Seconds to construct a space as a list of tuples, which is what Kernel Tuner makes."""
    begin = time.perf_counter()
    rows = Space(form["parameters"], hard=form["constraints"]).rows()
    return time.perf_counter() - begin, rows


def without_listing(form: dict[str, Any], what: Callable[[Space], Any]) -> float:
    begin = time.perf_counter()
    what(Space(form["parameters"], hard=form["constraints"]))
    return time.perf_counter() - begin


def spaces(rounds: int) -> None:
    """Construction in turns with Kernel Tuner; counting and sampling from nothing, without listing."""
    peer, forms, rows = KernelTuner(), json.loads(SPACES.read_text()), []
    for name, form in forms.items():
        theirs = peer.construct(form, points=True)
        ours = sorted(map(list, construct(form)[1]))
        same = ours == theirs["points"]
        times: dict[str, list[float]] = {"ours": [], "theirs": [], "count": [], "sample": []}
        for _ in range(rounds):
            times["theirs"].append(peer.construct(form)["time_s"])
            times["ours"].append(construct(form)[0])
            times["count"].append(without_listing(form, Space.count))
            times["sample"].append(without_listing(form, lambda s: s.sample(100, np.random.default_rng(0))))
        middle = {k: median(v) * 1e3 for k, v in times.items()}
        rows.append(
            {
                "space": name,
                "cartesian": form["cartesian"],
                "valid": len(ours),
                "same set": same,
                "ours_ms": middle["ours"],
                "kernel_tuner_ms": middle["theirs"],
                "speedup": middle["theirs"] / middle["ours"],
                "count_ms": middle["count"],
                "sample_100_ms": middle["sample"],
            }
        )
        if not same or len(ours) != form["valid"]:
            raise SystemExit(f"{name}: the valid sets differ")
    total = {k: sum(row[k] for row in rows) for k in ("ours_ms", "kernel_tuner_ms")}
    print(table(rows))
    print(f"total {total['ours_ms']:.0f} ms, Kernel Tuner {total['kernel_tuner_ms']:.0f} ms")
    write("tuner_spaces", rows, total=total, rounds=rounds, kernel_tuner=theirs["version"])


# recorded spaces -----------------------------------------------------------------------------------------


def requests() -> dict[str, Request]:
    """Convolutions of different character: wide and deep, strided, of many channels, gradients."""
    same = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}
    wide = {"stride": (1, 1), "padding": ((2, 2), (2, 2)), "dilation": (1, 1)}
    cases = {
        "conv 28x28x64": (Conv(**same), Spec((8, 28, 28, 64)), Spec((3, 3, 64, 64))),
        "conv 56x56x32, stride 2": (
            Conv(**{**same, "stride": (2, 2)}),
            Spec((8, 56, 56, 32)),
            Spec((3, 3, 32, 64)),
        ),
        "conv 5x5, 32x32x32": (Conv(**wide), Spec((16, 32, 32, 32)), Spec((5, 5, 32, 32))),
        "input gradient 28x28x64": (
            ConvInputGrad(size=(28, 28), **same),
            Spec((8, 28, 28, 64)),
            Spec((3, 3, 64, 64)),
        ),
        "filter gradient 14x14x128": (
            ConvFilterGrad(window=(3, 3), **same),
            Spec((32, 14, 14, 128)),
            Spec((32, 14, 14, 128)),
        ),
    }
    return {name: Tuning(host()).serve(op, ins)[0] for name, (op, *ins) in cases.items()}


def record(threads: int, passes: int) -> None:
    """Every config of each space, compiled, checked and timed beside the default; medians of a few passes."""
    recordings: list[dict[str, Any]] = []
    for name, request in requests().items():
        begin, found = time.monotonic(), []
        for _ in range(passes):
            with Bench(host(), threads=threads) as bench:
                found.append(Tuner(request, host(), bench, strategy="exhaustive", batch=16).run())
        default_s = median(_time(one.default) for one in found)
        ratios: dict[Choice, list[float]] = {}
        for one in found:
            for trial in one.trials:
                ratios.setdefault(trial.choice, []).append(trial.seconds / _time(one.default))
        first = found[0].default.choice
        order = [first, *(choice for choice in ratios if choice != first)]
        trials = [Trial.timed(choice, [median(ratios[choice]) * default_s]) for choice in order]
        recording = Recording.of(name, trials)
        recordings.append(recording.to_json())
        spent, gain = time.monotonic() - begin, default_s / recording.best_s
        print(f"{name}: {len(trials)} configs in {spent:.0f} s; best {gain:.2f}x the default", flush=True)
        RECORDED.write_text(json.dumps(recordings) + "\n")


def strategies(repeats: int) -> None:
    """How much of all configs each strategy needs, and what it has found after some of them."""
    rows = []
    for form in json.loads(RECORDED.read_text()):
        recording = Recording.from_json(form)
        for start, chosen in (("default", tuple(STRATEGIES)), ("chance", ("guided", "greedy", "random"))):
            report = compare(recording, chosen, repeats=repeats, cold=start == "chance")
            print(f"from {start}: {report}\n", flush=True)
            told = report.to_json()
            for name, numbers in told["strategies"].items():
                rows.append(
                    {
                        "space": told["recording"],
                        "points": told["points"],
                        "strategy": name,
                        "start": start,
                        "default": told["default_fraction"],
                        "share of evaluations to 98 %": numbers["share_of_evaluations_to_98"],
                        "fraction of optimum after 15 %": numbers["fraction_of_optimum_after"]["0.15"],
                    }
                )
            if recording.name == PICTURED and start == "default":
                (HERE.parent / "docs" / "images" / "strategies.svg").write_text(report.svg())
    write("tuner_strategies", rows, repeats=repeats)


# stability and a step ------------------------------------------------------------------------------------


def stability(threads: int, repeats: int) -> None:
    """Tune the same convolutions again and again, from nothing, until the search itself ends.

    As a user who repeats it, with the same seed; and with another seed each time, which is harder. Winners are
    compared with one another and with the default at the end, in the same rounds. The default's time in each repeat
    shows what the machine was doing: shared with others, it is not the same machine all the time.
    """
    rows = []
    for name, other in product(("input gradient 28x28x64", PICTURED), (False, True)):
        request, winners, tried, paces = requests()[name], [], [], []
        for i in range(repeats):
            with Bench(host(), threads=threads) as bench:  # processes and memory of its own
                found = Tuner(request, host(), bench, seed=i if other else 0).run()
            winners.append(found.best.choice)
            tried.append(len(found.trials))
            paces.append(_time(found.default))
            told = f"{found.best.choice} {found.gain:.3f}x {paces[-1] * 1e3:.3f} ms {len(found.trials)} trials"
            print(f"{name} {i}: {told}", flush=True)
        default = found.default.choice
        different = [default, *sorted({*winners} - {default}, key=str)]
        calls = []
        for _ in range(CHECKS):
            with Bench(host(), threads=threads) as bench:
                calls.append(bench(request, different, thorough=True))
        paces += [_time(trials[0]) for trials in calls]
        times = {c: fmean(_time(trials[i]) for trials in calls) for i, c in enumerate(different)}
        best, slowest = (pick(times[c] for c in winners) for pick in (min, max))
        rows.append(
            {
                "kernel": name,
                "chance": "another each time" if other else "the same",
                "repeats": repeats,
                "trials": median(tried),
                "different winners": len(set(winners)),
                "chose the one most chosen": max(map(winners.count, winners)),
                "slowest winner / best winner": slowest / best,
                "slowest winner / default": slowest / times[default],
                "default, slowest / fastest": max(paces) / min(paces),
            }
        )
    print(table(rows))
    write("tuner_stability", rows, threads=threads)


def _time(trial: Trial) -> float:
    assert trial.time_s is not None
    return trial.time_s


def step(threads: int, budget_s: float) -> None:
    """Tune LeNet's training step from an empty cache of results and kernels."""
    rows = []
    for case in SMALL[:1]:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["RAPYDLI_CACHE_DIR"] = folder
            settings.cache_clear()
            graph = case.trace()
            training = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.01, momentum=0.9))
            begin = time.monotonic()
            report = rf.autotune(training, budget_s=budget_s, plan=rf.Plan(1, threads))
            spent = time.monotonic() - begin
        print(report, report.funnel, sep="\n", flush=True)
        (HERE.parent / "docs" / "images" / "funnel.svg").write_text(report.funnel.svg())
        (session,) = report.sessions
        assert session.step is not None
        rows.append(
            {
                "network": case.name,
                "batch": case.batch,
                "seconds": spent,
                "kernels": len(report.found),
                "configs tried": sum(len(found.trials) for found in report.found),
                "default_ms": session.step.default_s * 1e3,
                "tuned_ms": session.step.tuned_s * 1e3,
                "gain": session.step.gain,
            }
        )
    print(table(rows))
    write("tuner_step", rows, threads=threads, budget_s=budget_s)


def known(threads: int, budget_s: float) -> None:
    """Tune what the package's own examples and benchmarks run, and write it where it ships."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"RAPYDLI_CACHE_DIR": folder, "RAPYDLI_KNOWN_DIR": folder}  # nothing is known at first
        settings.cache_clear()
        for case in SMALL:
            graph = case.trace()
            training = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.01, momentum=0.9))
            print(rf.autotune(training, budget_s=budget_s, plan=rf.Plan(1, threads)), flush=True)
        digits = str(HERE.parent / "examples" / "digits.py")
        demo = ["--ranks", "2", "--threads", "1", "--budget", str(budget_s)]  # as in `make demo` on two cores
        cli(["tune", digits, *demo], standalone_mode=False)
        cli(["tune", "export", str(SHIPPED / f"{host().key}.jsonl")], standalone_mode=False)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("spaces", "record", "strategies", "stability", "step", "known"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--budget", type=float, default=100.0)
    given = parser.parse_args(arguments)
    if given.what == "spaces":
        spaces(given.rounds)
    elif given.what == "record":
        record(given.threads, given.rounds)
    elif given.what == "strategies":
        strategies(given.repeats or 20)
    elif given.what == "stability":
        stability(given.threads, given.repeats or 10)
    elif given.what == "known":
        known(given.threads, given.budget)
    else:
        step(given.threads, given.budget)


if __name__ == "__main__":
    main(sys.argv[1:])
