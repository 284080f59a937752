"""The command line: what it prints, what it keeps, and one line for an error."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import rapydli_flow as rf
from rapydli_flow.cli import main
from rapydli_flow.cli.cluster import cluster
from rapydli_flow.config import settings
from rapydli_flow.data import latest
from rapydli_flow.runtime.events import read_log
from rapydli_flow.runtime.workers import ready_workers

HERE = Path(__file__).parent

RECIPE = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import rapydli_flow as rf
from small_runs import make_step, records

EPOCHS = 1

def step():
    return make_step()

def data(url):
    try:
        return rf.load(url)
    except rf.errors.DatasetNotFound:
        return rf.ingest({{"train": records(), "test": records(13, seed=1)}}, url)
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(RECIPE)
    return path


def call(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def error_of(*arguments):
    """The one line of an error that was raised on purpose."""
    result = call(*arguments)
    assert result.exit_code == 1
    lines = [line for line in result.output.splitlines() if line]
    assert lines[-1].startswith("Error: ")
    assert "Traceback" not in result.output
    return lines[-1]


def test_help():
    for arguments in ((), ("train",), ("show",), ("tune",)):
        result = call(*arguments, "--help")
        assert result.exit_code == 0
        assert "Usage:" in result.output
    assert "train" in call("-h").output
    assert rf.__version__ in call("--version").output


def test_train_in_this_process(recipe, tmp_path):
    how = ("--workers", 0, "--no-report", "--run-dir", tmp_path / "run", "--data", tmp_path / "d.zarr")
    result = call("train", recipe, *how)
    assert result.exit_code == 0, result.output
    assert "dense_1" in result.output
    assert re.search(r"test: loss \d\.\d{4}, accuracy \d\.\d{4}", result.output)
    assert f"run: {tmp_path / 'run'}" in result.output
    assert latest(tmp_path / "run" / "snapshots").name == "step-00000007"
    assert "holds a run already" in error_of("train", recipe, *how)
    assert call("train", recipe, *how, "--resume", "--epochs", 2).exit_code == 0
    assert len([x for x in read_log(tmp_path / "run" / "metrics.jsonl") if x["kind"] == "step"]) == 14
    assert call("train", recipe, *how, "--overwrite", "--seed", 2, "--granularity", "stage").exit_code == 0
    assert "is at step 7 already" in error_of("train", recipe, *how, "--resume", "--seed", 2)


@pytest.mark.slow
def test_train_on_a_running_scheduler(client, recipe, tmp_path):
    result = call(
        "train", recipe, "--scheduler", client.scheduler.address, "--no-report", "--run-dir", tmp_path / "run"
    )
    assert result.exit_code == 0, result.output
    assert "test: loss" in result.output
    assert read_log(tmp_path / "run" / "metrics.jsonl")[0]["ranks"] == 3
    assert rf.load(tmp_path / "tiny.zarr").splits == ("test", "train")


def test_train_on_a_cluster_of_its_own(recipe, tmp_path):
    result = call("train", recipe, "--workers", 1, "--no-report", "--run-dir", tmp_path / "run", "--epochs", 0.5)
    assert result.exit_code == 0, result.output
    assert "dashboard: http://" in result.output


def test_workers_of_a_device_and_devices_that_are_not_there(recipe, tmp_path, monkeypatch):
    how = ("train", recipe, "--no-report", "--run-dir", tmp_path / "run", "--data", tmp_path / "d.zarr", "--steps", 1)
    for device, text in (("gpu", "device='gpu' is not 'cpu', 'cuda'"), ("cuda:99", "no CUDA driver|no such device")):
        assert re.search(text, error_of(*how, "--device", device))
        assert not (tmp_path / "d.zarr").exists()  # it was said before a dataset was made
    monkeypatch.setenv("RAPYDLI_DEVICE", "gpu")
    settings.cache_clear()
    assert call(*how).output.startswith("Error: RAPYDLI_DEVICE='gpu' is not 'cpu', 'cuda'")  # before anything is shown
    monkeypatch.undo()
    settings.cache_clear()
    with cluster(2, None, "emulated") as client:
        kinds = [worker["device"].emulated for worker in ready_workers(client, 2, 60.0).values()]
    assert kinds == [True, True]


AUTOENCODER = """
import numpy as np
import rapydli_flow as rf
from rapydli_flow import nn, optim

def step():
    graph = rf.trace(lambda signal: nn.project(signal, 4), rf.Spec((8, 5, 4)))
    return rf.train_step(graph, loss=nn.mean_squared_error, optimizer=optim.sgd(0.1), label="signal")

def data(url):
    x = np.random.default_rng(0).normal(size=(24, 5, 4)).astype(np.float32)
    return rf.ingest({"train": {"signal": x}, "test": {"signal": x}}, url)
"""


@pytest.mark.parametrize("label", ["label", "kind"])
def test_the_report_of_a_classifier_shows_what_it_confuses(recipe, tmp_path, label):
    text = RECIPE.replace("return make_step()", f"return make_step(label={label!r})")
    for call_ in ("records()", "records(13, seed=1)"):
        text = text.replace(call_, f"{{{label!r}: {call_}['label'], 'x': {call_}['x']}}")
    recipe.write_text(text)
    result = call("train", recipe, "--workers", 0, "--run-dir", tmp_path / "run", "--data", tmp_path / "d.zarr")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "run" / "report.html").read_text()
    assert re.search(r"% of 13 labels right; labels by row", page)
    assert "of 13 right" in page  # the images


def test_the_report_of_what_is_no_classifier(tmp_path):
    path = tmp_path / "folded.py"
    path.write_text(AUTOENCODER)
    result = call(
        "train", path, "--workers", 0, "--epochs", 1, "--run-dir", tmp_path / "run", "--data", tmp_path / "d.zarr"
    )
    assert result.exit_code == 0, result.output
    assert "labels right" not in (tmp_path / "run" / "report.html").read_text()


def test_show(recipe):
    network = call("show", recipe)
    assert network.exit_code == 0
    assert "conv_1" in network.output
    training = call("show", recipe, "--training")
    assert training.exit_code == 0
    assert len(training.output) > len(network.output)


def test_errors_are_one_line(tmp_path, recipe):
    assert "nothing.py is not a file. Give a recipe" in error_of("show", tmp_path / "nothing.py")
    bare = tmp_path / "bare.py"
    bare.write_text("EPOCHS = 3\n")
    assert "has no function step() and data(). A recipe defines" in error_of("train", bare, "--workers", 0)
    bare.write_text("def step(): return 3\ndef data(url): return 4\n")
    assert "step() gave int, not a graph of rf.train_step" in error_of("show", bare)
    bare.write_text(RECIPE + "\ndef data(url): return rf.ingest(records(), url)\n")
    how = ("--workers", 0, "--run-dir", tmp_path / "run", "--data", tmp_path / "other.zarr")
    assert "not a dataset with splits 'train' and 'test'" in error_of("train", bare, *how)
    text = tmp_path / "recipe.txt"
    text.write_text("")
    assert "is not a Python file" in error_of("show", text)
    assert "0 steps are nothing to train" in error_of("train", recipe, "--workers", 0, "--epochs", 0)


def test_wrong_options_are_told_by_click(recipe):
    assert call("train", recipe, "--granularity", "atom").exit_code == 2
    assert call("train").exit_code == 2
    assert call("fly").exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("digits", [Path(rf.__file__).parents[1] / "examples" / "digits.py"])
def test_the_example_in_a_process_of_its_own(digits, tmp_path):
    where = ["--run-dir", str(tmp_path / "run"), "--data", str(tmp_path / "digits.zarr")]
    options = ["--workers", "0", "--epochs", "0.2", "--no-report", *where]
    program = [
        sys.executable,
        "-W",
        "error",
        "-c",
        "from rapydli_flow.cli import main; main()",
        "train",
        str(digits),
        *options,
    ]
    env = {**os.environ, "PYTHONPATH": str(Path(rf.__file__).parents[1])}
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test: loss" in done.stdout
    assert latest(tmp_path / "run" / "snapshots").name == "step-00000004"
    failed = subprocess.run(program, env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.startswith("Error: fit: ")
    assert len(failed.stderr.strip().splitlines()) == 1


def test_callbacks_and_steps_of_a_recipe(recipe, tmp_path):
    recipe.write_text(f'{RECIPE}\nCALLBACKS = [rf.BestSnapshot("accuracy")]\n')
    how = ("--workers", 0, "--no-report", "--run-dir", tmp_path / "run", "--data", tmp_path / "d.zarr")
    result = call("train", recipe, *how, "--steps", 9)
    assert result.exit_code == 0, result.output
    assert latest(tmp_path / "run" / "snapshots").name == "step-00000009"
    assert rf.load_model(tmp_path / "run" / "best").graph.parameters
    assert "give either epochs or steps" in error_of("train", recipe, *how, "--overwrite", "--steps", 9, "--epochs", 1)
    recipe.write_text(f"{RECIPE}\nCALLBACKS = [print]\n")
    assert "CALLBACKS holds <built-in function print>, which is no rf.Callback" in error_of("train", recipe, *how)
