"""`rapydli tune`: tune a recipe, and look at, carry and override what is known.

rapydli tune RECIPE [--budget ...]      rapydli tune show | export | import | pin | unpin | diff ...
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from cpu_kernels.compile import host

from .. import api
from ..errors import SettingError
from ..runtime.tuning import cache
from ..tuner import Choice, Known, Trial, TuningCache
from .failing import plain_errors
from .recipe import Recipe

SHOWN = 8  # candidates in the message of an error


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
@click.argument("recipe")
@click.option("--budget", default=120.0, show_default=True, help="Seconds to spend.")
@click.option("--ranks", default=1, show_default=True, help="Tune for the local shapes of so many ranks.")
@click.option("--threads", default=None, type=int, help="Threads of a rank [default: all cores].")
def tune_recipe(recipe: str, budget: float, ranks: int, threads: int | None) -> None:
    """Tune the kernels of a recipe, a Python file: see examples/digits.py."""
    with plain_errors():
        step = Recipe(recipe).step()
        plan = api.plan(step, ranks=ranks, threads=threads)
        click.echo(api.autotune(step, budget_s=budget, plan=plan, watch=click.echo))


@tune.command()
@click.argument("what", metavar="[KEY-OR-FAMILY]", default="")
@click.option("--top", default=0, help="Show so many of the fastest configs of each kernel too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines instead of a table.")
def show(what: str, top: int, as_json: bool) -> None:
    """Show what is known for this machine: of one kernel, a family of ops, or all."""
    with plain_errors():
        results, device = cache(), host()
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
            times = (_ms(one.default), _ms(one.best))
            rows.append((_short(one.key), one.request[:60], *times, gain, one.state, str(one.best.choice)))
            rows += [("", "", "", _ms(trial), "", "tried", str(trial.choice)) for trial in tried[one.key]]
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
def pin(key: str, template: str, values: Sequence[str]) -> None:
    """Use one TEMPLATE with one config for the kernel KEY from now on, whatever is measured."""
    with plain_errors():
        results, device = cache(), host()
        key = found(key, results.requests(device))
        choice = Choice(template, tuple(sorted(map(_parameter, values))))
        results.pin(device, key, choice)
        click.echo(f"{key} is pinned to {choice}")


@tune.command()
@click.argument("key")
def unpin(key: str) -> None:
    """Let measurements choose for the kernel KEY again."""
    with plain_errors():
        results, device = cache(), host()
        key = found(key, {one.key: one.request for one in _pinned(results)})
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


def _pinned(results: TuningCache) -> list[Known]:
    return [one for one in results.known(host()) if one.state == "pinned"]


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


def _ms(trial: Trial | None) -> str:
    if trial is None or (trial.time_s is None and not trial.error):
        return ""
    return "failed" if trial.time_s is None else f"{trial.time_s * 1e3:.3f} ms"


def _side(choice: Choice | None, time_s: float | None) -> str:
    if choice is None:
        return "nothing"
    return str(choice) if time_s is None else f"{choice} ({time_s * 1e3:.3f} ms)"


def _told(one: Known, tried: Sequence[Trial]) -> dict[str, Any]:
    """What is known, as JSON has it."""
    told = {"key": one.key, "family": one.family, "request": one.request, "state": one.state, **_of(one.best)}
    told |= {"default": one.default and _of(one.default), "gain": one.gain, "at": one.at}
    return told | ({"top": [_of(trial) for trial in tried]} if tried else {})


def _of(trial: Trial) -> dict[str, Any]:
    return {"template": trial.choice.template, "config": dict(trial.choice.config), "time_s": trial.time_s}
