"""`rapydli time` and `rapydli warm`: where the time of a step goes, and its kernels compiled beforehand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .. import api
from ..config import settings
from ..errors import SettingError
from ..runtime.devices import device_of
from ..runtime.grouped import kernels_of
from ..runtime.remembered import known
from ..runtime.timing import network_of, programs_of
from ..runtime.warm import warm as warm_kernels
from .failing import plain_errors
from .network import resolve


@click.command()
@click.argument("network")
@click.option("--batch", default=None, type=int, help="Records of a step, for a network by name [default: its own].")
@click.option("--iterations", default=10, show_default=True, help="Steps to time, each with and without clocks.")
@click.option("--threads", default=None, type=int, help="Threads [default: all cores].")
@click.option("--inference", is_flag=True, help="Only forward, the network that predicts.")
@click.option("--tune", "tune_s", default=0.0, help="Seconds to tune its kernels first.")
@click.option("--device", default=None, help="cpu, cuda, cuda:1, emulated [default: RAPYDLI_DEVICE, else cpu].")
@click.option("--kernels", is_flag=True, help="A row for each kernel, not for each layer.")
@click.option("--html", default=None, type=click.Path(path_type=Path), help="Write a page with the roofline.")
@click.option("--json", "json_file", default=None, type=click.Path(path_type=Path), help="Write every number.")
def time(
    network: str,
    batch: int | None,
    iterations: int,
    threads: int | None,
    inference: bool,
    tune_s: float,
    device: str | None,
    kernels: bool,
    html: Path | None,
    json_file: Path | None,
) -> None:
    """Time a NETWORK's training step by layer, on random records.

    NETWORK is a recipe or the name of a network of rapydli_flow.zoo. Shows forward, backward and update of each layer,
    how near that is to what this machine can do, and which kernels run.
    """
    with plain_errors():
        chosen = resolve(network, batch)
        timing = api.time(
            chosen.step,
            name=chosen.name,
            iterations=iterations,
            threads=threads,
            inference=inference,
            tune_s=tune_s,
            device=device,
        )
        click.echo(timing.table(kernels=kernels))
        if html is not None:
            click.echo(f"page: {timing.save_html(html)}")
        if json_file is not None:
            click.echo(f"numbers: {timing.save_json(json_file)}")


@click.command()
@click.argument("network")
@click.option("--batch", default=None, type=int, help="Records of a step, for a network by name [default: its own].")
@click.option("--threads", default=None, type=int, help="Processes that compile [default: all cores].")
@click.option("--inference", is_flag=True, help="Only the network that predicts.")
@click.option("--device", default=None, help="cpu, cuda, cuda:1 [default: RAPYDLI_DEVICE, else cpu].")
def warm(network: str, batch: int | None, threads: int | None, inference: bool, device: str | None) -> None:
    """Compile the kernels of a NETWORK before a run needs them, several at once.

    NETWORK is a recipe or the name of a network of rapydli_flow.zoo: its training step is compiled, and the networks
    that validate and predict.
    """
    with plain_errors():
        if threads is not None and threads < 1:
            raise SettingError(f"--threads {threads} is not 1 or more.")
        step = resolve(network, batch).step
        tuning = known(device_of(device, "warm"))
        programs = programs_of(network_of(step) if inference else step, tuning, settings().threads)
        pairs = [pair for program in programs for pair in kernels_of(program)]
        done = warm_kernels(pairs, tuning.device, compilers=threads, watch=_progress())
        if done.compiled and sys.stderr.isatty():
            click.echo("", err=True)
        click.echo(done)
        done.check()


def _progress() -> Callable[[int, int], Any]:
    """A line that counts, where a person looks at it."""

    def told(done: int, count: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\rcompiling: {done} of {count}", nl=False, err=True)

    return told
