"""The commands."""

from __future__ import annotations

from pathlib import Path

import click

from .. import api
from ..config import checked_device, settings
from ..data import Dataset
from ..graph import Graph
from ..runtime.devices import device_of
from ..runtime.events import Callback
from ..runtime.feeding import label_classes
from ..version import __version__
from .cluster import cluster
from .devices import devices
from .failing import plain_errors
from .recipe import Recipe
from .time import time, warm
from .tune import tune


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rapydli")
def main() -> None:
    """Deep learning as Dask task graphs of Numba kernels.

    A RECIPE is a Python file with step(), data(url), EPOCHS and CALLBACKS; see examples/digits.py.
    """


main.add_command(tune)
main.add_command(devices)
main.add_command(time)
main.add_command(warm)


@main.command()
@click.argument("recipe")
@click.option(
    "--workers",
    type=int,
    default=None,
    help="Workers of a local Dask cluster; 0: in this process [default: 2; with --device 0].",
)
@click.option("--scheduler", default=None, help="Address of a running Dask scheduler, instead of a local cluster.")
@click.option("--epochs", type=float, default=None, help="Epochs to train [default: what the recipe says].")
@click.option("--steps", type=int, default=None, help="Steps to train, instead of epochs.")
@click.option("--granularity", type=click.Choice(api.GRANULARITIES), default="segment", show_default=True)
@click.option("--run-dir", default=None, help="Where the run is kept [default: runs/<recipe>].")
@click.option("--data", "data_url", default=None, help="Where the dataset is [default: beside the run].")
@click.option("--tune", "tune_s", default=0.0, help="Seconds to tune kernels first of which nothing is known.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default=None, help="cpu, cuda, cuda:1, emulated [default: RAPYDLI_DEVICE, else cpu].")
@click.option("--resume", is_flag=True, help="Go on from the newest snapshot in the run's folder.")
@click.option("--overwrite", is_flag=True, help="Replace a run that is in the folder.")
@click.option("--report/--no-report", default=True, show_default=True, help="Write report.html at the end.")
def train(
    recipe: str,
    workers: int | None,
    scheduler: str | None,
    epochs: float | None,
    steps: int | None,
    granularity: str,
    run_dir: str | None,
    data_url: str | None,
    tune_s: float,
    seed: int,
    device: str | None,
    resume: bool,
    overwrite: bool,
    report: bool,
) -> None:
    """Train a RECIPE; keeps snapshots, metrics.jsonl and report.html in the run's folder."""
    with plain_errors():
        from ..progress import ProgressBar

        if workers is None:
            workers = 2 if device is None else 0
        settings()  # does the environment mean something? Before anything is made
        if device is not None:
            checked_device(device, "train: device=")
        if scheduler is None and workers == 0:
            device_of(device)  # is it there? Before a dataset is made
        chosen = Recipe(recipe)
        folder = Path(run_dir or f"runs/{chosen.name}").absolute()
        step, callbacks = chosen.step(), chosen.callbacks
        data = chosen.data(data_url or str(folder.parent / f"{chosen.name}.zarr"))
        click.echo(step.network)
        click.echo("")
        bar: Callback = ProgressBar()
        with cluster(workers, scheduler, device) as client:
            run = api.fit(
                step,
                data["train"],
                validation=data["test"],
                epochs=chosen.epochs if epochs is None and steps is None else epochs,
                steps=steps,
                client=client,
                granularity=granularity,
                seed=seed,
                device=device,
                tune_s=tune_s,
                run_dir=folder,
                resume=resume,
                overwrite=overwrite,
                callbacks=[bar, *callbacks],
            )
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in run.metrics.items())
            click.echo(f"test: {numbers}")
            if report:
                here = device if client is None else None  # workers predict on what they have
                click.echo(f"report: {_report(run, data['test'], here)}")
        click.echo(f"run: {folder}")


def _report(run: api.Run, test: Dataset, device: str | None) -> Path:
    """Write the report; of a classifier with what it says of the test set."""
    from ..dashboard.report import Predictions, report

    assert run.path is not None
    label, classes = _labels(run.graph)
    if label is None:
        return report(run.path)
    said = api.predict(run.graph, run.state, test, device=device).argmax(-1).compute()
    labels = test.read(fields=[label])[label]
    shown, fields = None, [leaf.name for leaf in run.graph.leaves("batch") if leaf.name != label]
    if labels.ndim == 1 and len(fields) == 1 and len(test.specs[fields[0]].shape) == 3:
        shown = Predictions(test.read(fields=fields)[fields[0]], labels, said)
    return report(run.path, predictions=shown, confusion=api.ConfusionMatrix.of(labels, said, classes))


def _labels(network: Graph) -> tuple[str | None, int]:
    """The field with the labels of the network's scores and the number of classes, if all it does is classify."""
    shapes = {name: network.spec(value).shape for name, value in network.outputs.items()}
    if [name for name, shape in shapes.items() if shape] == ["y"]:  # the others are loss and metrics
        for name, classes in label_classes(network).items():
            if shapes["y"] == (*network.find(name).shape, classes):
                return name, classes
    return None, 0


@main.command()
@click.argument("recipe")
@click.option("--training/--network", default=False, help="The whole training step, or the network only.")
@click.option("--svg", default=None, help="Write a picture to this file.")
def show(recipe: str, training: bool, svg: str | None) -> None:
    """Show the graph of a RECIPE as a table, or as a picture."""
    with plain_errors():
        step = Recipe(recipe).step()
        graph = step if training or step.network is None else step.network
        click.echo(graph)
        if svg:
            graph.save_svg(svg)
            click.echo(f"picture: {svg}")
