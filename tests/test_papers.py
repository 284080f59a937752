"""The networks of examples/papers learn, each on its own data, as long as its recipe says. Run by ``make papers``."""

import importlib.util
from pathlib import Path

import pytest

import rapydli_flow as rf

pytestmark = pytest.mark.papers
PAPERS = Path(__file__).parents[1] / "examples" / "papers"


def recipe(name):
    """The module of a recipe, which is no package."""
    spec = importlib.util.spec_from_file_location(f"papers_{name}", PAPERS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "steps", "least"), [("network_in_network", 264, 0.85), ("squeezenet", 352, 0.9), ("resnet_1d", 200, 0.9)]
)
def test_a_network_from_a_paper_learns(name, steps, least, tmp_path):
    module = recipe(name)
    data = module.data(tmp_path / "data.zarr")
    run = rf.fit(module.step(), data["train"], steps=steps, validation=data["test"])
    assert run.steps == steps
    assert run.metrics["accuracy"] > least, run.metrics
