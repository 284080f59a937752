"""`rapydli tune`: tune a recipe, and look at, carry and override what is known.

rapydli tune RECIPE [--budget ...]      rapydli tune show | export | import | pin | unpin | diff ...
"""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from .. import api
from ..errors import SettingError
from ..runtime.devices import device_of
from ..runtime.remembered import cache
from ..space import Space, read_spaces
from ..template import Device
from ..tuner import STRATEGIES, Choice, Known, Trial, TuningCache, time_text
from ..tuner.simulate import compare, read_recordings
from .cluster import cluster
from .failing import plain_errors
from .recipe import Recipe

SHOWN = 8  # candidates in the message of an error


of_device = click.option(
    "--device", "named", default=None, help="cpu, cuda, cuda:1, emulated [default: RAPYDLI_DEVICE, else cpu]."
)


class RecipeFirst(click.Group):
    """A group whose first argument may be a recipe: then it is tuned."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = ["RECIPE", *args]
        return super().parse_args(ctx, args)


@click.group(cls=RecipeFirst, subcommand_metavar="RECIPE [OPTIONS] | COMMAND ...")
def tune() -> None:
    """Find the fastest kernels for a RECIPE on this machine, and remember them; or look at what is known.

    A KEY is a kernel's in the first column of `rapydli tune show`, or as much of its beginning as no other has.
    """


@tune.command("RECIPE")
@click.argument("recipe", metavar="")  # the name of the command stands for it
@click.option("--budget", default=100.0, show_default=True, help="Seconds to spend.")
@click.option("--trials", default=None, type=int, help="Configs of each kernel to try, at most.")
@click.option("--strategy", type=click.Choice(list(STRATEGIES)), default="guided", show_default=True)
@click.option("--soft", multiple=True, metavar="EXPRESSION", help="Only configs that keep to this: 'rows >= 6'.")
@click.option("--device", default=None, help="cpu, cuda, cuda:1 [default: RAPYDLI_DEVICE, else cpu].")
@click.option("--scheduler", default=None, help="Tune on the workers of a running Dask scheduler.")
@click.option("--ranks", default=1, show_default=True, help="Tune for the local shapes of so many ranks.")
@click.option("--threads", default=None, type=int, help="Threads of a rank [default: all cores].")
@click.option("--seed", default=0, show_default=True)
@click.option("--report", default=None, type=click.Path(path_type=Path), help="Write a report, .html or .json.")
def tune_recipe(
    recipe: str,
    budget: float,
    trials: int | None,
    strategy: str,
    soft: Sequence[str],
    device: str | None,
    scheduler: str | None,
    ranks: int,
    threads: int | None,
    seed: int,
    report: Path | None,
) -> None:
    """Tune the kernels of a recipe, a Python file: see examples/digits.py. Ctrl-C keeps what was learnt."""
    with plain_errors():
        from ..progress import TuningBar

        check_report(report)
        step = Recipe(recipe).step()
        with cluster(0, scheduler) as client, TuningBar() as bar:
            found = api.autotune(
                step,
                client,
                budget_s=budget,
                trials=trials,
                plan=api.plan(step, ranks=ranks, threads=threads),
                strategy=strategy,
                soft=list(soft),
                seed=seed,
                watch=bar,
                device=device,
            )
        click.echo(found)
        click.echo(f"\n{found.funnel}")
        if report is not None:
            click.echo(f"report: {found.save(report)}")


@tune.command("space")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def space(file: Path, as_json: bool) -> None:
    """Construct the search spaces in FILE: how many points are valid, and how long it takes to know.

    FILE is JSON: {name: {"parameters": {name: [values]}, "constraints": ["expression", ...]}}, or one such space.
    Prints for each the valid points, the seconds to construct them all, and the seconds to count without listing.
    """
    with plain_errors():
        rows: list[dict[str, Any]] = []
        for name, one in read_spaces(file).items():
            count_s, construct_s = (_seconds(one, how) for how in (Space.count, Space.rows))
            valid = one.check().count()
            rows.append(
                {
                    "space": name,
                    "cartesian": one.cartesian,
                    "valid": valid,
                    "construct_s": construct_s,
                    "count_s": count_s,
                }
            )
        if as_json:
            click.echo(json.dumps(rows, indent=1))
            return
        head = ("space", "Cartesian", "valid", "construct s", "count s")
        cells = [(r["space"], f"{r['cartesian']:,}", f"{r['valid']:,}", *_times(r)) for r in rows]
        click.echo(table([head, *cells]))


@tune.command("simulate")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--strategy", "chosen", multiple=True, type=click.Choice(list(STRATEGIES)), help="[default: all]")
@click.option("--repeats", default=20, show_default=True, help="Seeds of each strategy.")
@click.option("--svg", default=None, type=click.Path(path_type=Path), help="Write a picture of the first recording.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def simulate(file: Path, chosen: Sequence[str], repeats: int, svg: Path | None, as_json: bool) -> None:
    """Compare search strategies on the recorded times in FILE; no kernel runs."""
    with plain_errors():
        reports = [compare(one, chosen or tuple(STRATEGIES), repeats=repeats) for one in read_recordings(file)]
        if svg is not None:
            svg.write_text(reports[0].svg(), encoding="utf-8")
        click.echo(json.dumps([r.to_json() for r in reports], indent=1) if as_json else "\n\n".join(map(str, reports)))


@tune.command()
@click.argument("what", metavar="[KEY-OR-FAMILY]", default="")
@click.option("--top", default=0, help="Show so many of the fastest configs of each kernel too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines instead of a table.")
@of_device
def show(what: str, top: int, as_json: bool, named: str | None) -> None:
    """Show what is known for this machine: of one kernel, a family of ops, or all."""
    with plain_errors():
        results, device = cache(), device_of(named, "tune")
        known = results.known(device)
        if what and not any(one.family == what for one in known):
            what = found(what, {one.key: one.request for one in known})
        known = [one for one in known if what in ("", one.family, one.key)]
        tried = {one.key: results.top(device, one.key, top) if top > 0 else [] for one in known}
        if as_json:
            for one in known:
                click.echo(json.dumps(_told(one, tried[one.key])))
            return
        rows = [("key", "kernel", "default", "best", "gain", "state", "config")]
        for one in known:
            gain = "" if one.gain is None else f"{one.gain:.2f}x"
            times = (_time(one.default), _time(one.best))
            rows.append((_short(one.key), one.request[:60], *times, gain, one.state, str(one.best.choice)))
            rows += [("", "", "", _time(trial), "", "tried", str(trial.choice)) for trial in tried[one.key]]
        click.echo(table(rows))
        click.echo(f"{len(known)} kernels known for {device.key}")


@tune.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--trials", is_flag=True, help="Write every trial too, not choices and pins only.")
@click.option("--device", default=None, help="Of one kind of device only, by its key [default: all].")
def export(file: Path, trials: bool, device: str | None) -> None:
    """Write what is known to FILE as JSON lines, for another machine or for people to read."""
    with plain_errors():
        click.echo(f"{cache().export(file, device, trials=trials)} results written to {file}")


@tune.command("import")
@click.argument("file", type=click.Path(path_type=Path))
def import_(file: Path) -> None:
    """Take in a FILE of `rapydli tune export`, or another tuning.sqlite; newer results win."""
    with plain_errors():
        done = cache().merge(file)
        click.echo(f"{done.new} results new, {done.replaced} replaced by newer ones, {done.kept} kept")


@tune.command()
@click.argument("key")
@click.argument("template")
@click.argument("values", metavar="NAME=VALUE...", nargs=-1)
@of_device
def pin(key: str, template: str, values: Sequence[str], named: str | None) -> None:
    """Use one TEMPLATE with one config for the kernel KEY from now on, whatever is measured."""
    with plain_errors():
        results, device = cache(), device_of(named, "tune")
        key = found(key, results.requests(device))
        choice = Choice(template, tuple(sorted(map(_parameter, values))))
        results.pin(device, key, choice)
        click.echo(f"{key} is pinned to {choice}")


@tune.command()
@click.argument("key")
@of_device
def unpin(key: str, named: str | None) -> None:
    """Let measurements choose for the kernel KEY again."""
    with plain_errors():
        results, device = cache(), device_of(named, "tune")
        key = found(key, {one.key: one.request for one in _pinned(results, device)})
        results.unpin(device, key)
        click.echo(f"{key} is no longer pinned")


@tune.command()
@click.argument("file", type=click.Path(path_type=Path))
def diff(file: Path) -> None:
    """Show the kernels for which FILE has other choices than this machine."""
    with plain_errors():
        rows = [("key", "kernel", "here", "there")]
        for row in cache().diff(file):
            here, there = _side(row.here, row.here_s), _side(row.there, row.there_s)
            rows.append((_short(row.key), row.request[:60], here, there))
        click.echo(table(rows) if len(rows) > 1 else "no differences")


def check_report(report: Path | None) -> None:
    """Refuse a report's name before anything is tuned for it."""
    if report is not None and report.suffix not in (".html", ".htm", ".json"):
        raise SettingError(f"--report {report} is neither .html nor .json; name the report by one of them.")


def _seconds(one: Space, how: Callable[[Space], object]) -> float:
    """From the expressions on: nothing is worked out before."""
    begin = time.perf_counter()
    how(one.copy())
    return time.perf_counter() - begin


def _times(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['construct_s']:.4f}", f"{row['count_s']:.4f}"


def found(key: str, keys: dict[str, str]) -> str:
    """The one key that begins so. Raises SettingError with the candidates where it is none, or several."""
    matches = [name for name in keys if name.startswith(key)]
    if key in matches or len(matches) == 1:
        return key if key in matches else matches[0]
    listed = "".join(f"\n  {name}  {keys[name]}" for name in sorted(matches or keys)[:SHOWN])
    more = len(matches or keys) - SHOWN
    listed += f"\n  and {more} more" if more > 0 else ""
    if matches:
        raise SettingError(f"{len(matches)} kernels have keys that begin with {key!r}. Give more of one:{listed}")
    raise SettingError(f"no kernel has a key that begins with {key!r}. There are:{listed or ' none'}")


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _pinned(results: TuningCache, device: Device) -> list[Known]:
    return [one for one in results.known(device) if one.state == "pinned"]


def _parameter(text: str) -> tuple[str, Any]:
    name, mark, value = text.partition("=")
    try:
        if mark:
            return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        pass
    raise SettingError(f"{text!r} is not NAME=VALUE with a number, text in quotes, True, False, None or a tuple.")


def _short(key: str) -> str:
    """Enough of a key to tell it from others."""
    family, _, digest = key.rpartition("-")
    return f"{family}-{digest[:8]}"


def _time(trial: Trial | None) -> str:
    if trial is None or (trial.time_s is None and not trial.error):
        return ""
    return time_text(trial.time_s)


def _side(choice: Choice | None, time_s: float | None) -> str:
    if choice is None:
        return "nothing"
    return str(choice) if time_s is None else f"{choice} ({time_text(time_s)})"


def _told(one: Known, tried: Sequence[Trial]) -> dict[str, Any]:
    """What is known, as JSON has it."""
    told = {"key": one.key, "family": one.family, "request": one.request, "state": one.state, **_of(one.best)}
    told |= {"default": one.default and _of(one.default), "gain": one.gain, "at": one.at}
    return told | ({"top": [_of(trial) for trial in tried]} if tried else {})


def _of(trial: Trial) -> dict[str, Any]:
    return {"template": trial.choice.template, "config": dict(trial.choice.config), "time_s": trial.time_s}
