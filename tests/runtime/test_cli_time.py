"""`rapydli time` and `rapydli warm`: recipes and networks by name."""

import json
import re
import sys
import types
from dataclasses import dataclass

import pytest
from click.testing import CliRunner

from rapydli_flow import nn
from rapydli_flow.cli import main
from rapydli_flow.errors import SettingError

RECIPE = """
import rapydli_flow as rf
from rapydli_flow import nn, optim
def step():
    graph = rf.trace(lambda x: nn.dense(nn.relu(nn.dense(x, 4)), 3), rf.Spec((20, 6)))
    return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))
def data(url):
    raise AssertionError("timing reads no data")
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(RECIPE)
    return path


def call(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def said(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_recipe_is_timed(recipe, tmp_path):
    page, numbers = tmp_path / "t.html", tmp_path / "t.json"
    text = said("time", recipe, "--iterations", 2, "--threads", 1, "--html", page, "--json", numbers)
    assert text.startswith("small: training step, batch 20, 1 thread")
    assert re.search(r"^dense_1 .*(GFLOP|GB)/s +\d+%", text, re.MULTILINE)
    assert f"page: {page}" in text
    assert "<svg" in page.read_text()
    assert json.loads(numbers.read_text())["batch"] == 20
    forward = said("time", recipe, "--iterations", 1, "--inference", "--kernels")
    assert forward.startswith("small: prediction")
    assert "backward" not in forward


def test_kernels_are_tuned_first(recipe, monkeypatch):
    asked = {}
    monkeypatch.setattr("rapydli_flow.api.autotune", lambda graph, **options: asked.update(options))
    said("time", recipe, "--iterations", 1, "--threads", 1, "--tune", 2.5)
    assert (asked["budget_s"], asked["plan"].threads) == (2.5, 1)


def test_a_recipe_is_warmed(recipe):
    said("warm", recipe, "--threads", 1)
    assert re.match(r"0 kernels compiled, \d+ found, 0\.\d s\n", said("warm", recipe))
    assert re.match(r"0 kernels compiled, \d found", said("warm", recipe, "--inference"))
    assert "--threads 0 is not 1 or more" in call("warm", recipe, "--threads", 0).output


@dataclass(frozen=True)
class Entry:
    name: str = "tiny"
    function: object = staticmethod(lambda x: nn.dense(x, 3))
    record: tuple = (6,)
    classes: int = 3
    batch: int = 20


@pytest.mark.slow
def test_networks_by_name(monkeypatch, recipe):
    zoo = types.ModuleType("rapydli_flow.zoo")

    def find(name):
        if name != "tiny":
            raise SettingError(f"no network is named {name!r}. Nearest: tiny.")
        return Entry()

    zoo.find = find
    monkeypatch.setitem(sys.modules, "rapydli_flow.zoo", zoo)
    assert said("time", "tiny", "--iterations", 1).startswith("tiny: training step, batch 20,")
    assert said("time", "tiny", "--iterations", 1, "--batch", 7).startswith("tiny: training step, batch 7,")
    for arguments, message in (
        (("tinny",), "no network is named 'tinny'. Nearest: tiny."),
        (("tiny", "--batch", 0), "--batch 0 is not 1 or more records"),
        ((recipe, "--batch", 3), "is a recipe, which says its batch itself"),
        (("nothing.py",), "nothing.py is not a file"),
    ):
        for command in ("time", "warm"):
            result = call(command, *arguments)
            assert result.exit_code == 1
            assert message in result.output
