"""Benchmarks say what they need where it is not there."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
IMPORTS = (ast.Import, ast.ImportFrom)
BESIDE = sorted(p.stem for p in FOLDER.glob("*.py") if "from pytorch import torch" in p.read_text())


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "pytorch"))
def test_pytorch_is_imported_by_the_module_that_says_where_to_get_it(name):
    statements = sorted(
        (node for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())) if isinstance(node, IMPORTS)),
        key=lambda node: node.lineno,
    )
    plain = [alias.name for node in statements if isinstance(node, ast.Import) for alias in node.names]
    assert "torch" not in {name.partition(".")[0] for name in plain}
    origins = [node.module.partition(".")[0] for node in statements if isinstance(node, ast.ImportFrom)]
    assert "torch" not in origins or origins.index("pytorch") < origins.index("torch")


@pytest.mark.parametrize("name", ["dense", "train_cuda"])
def test_a_benchmark_without_pytorch_says_so_in_a_line(name):
    assert name in BESIDE
    hidden = f"import runpy, sys; sys.modules['torch'] = None; sys.path.insert(0, {str(FOLDER)!r}); "
    code = hidden + f"runpy.run_path({str(FOLDER / name)!r} + '.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "measures beside PyTorch, which" in line
    assert "`make .peers/.installed` makes an environment with it" in line
    assert line.endswith("on a machine with a GPU, install torch there.")


def emulated(name, folder):
    """What a script of `make gpu-check` finds on a card that NumPy plays."""
    command = [sys.executable, "-W", "ignore", FOLDER / f"{name}.py", "--device", "emulated", "--results", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / f"{name}.json").read_text())


def test_runs_of_every_kind_are_those_of_the_processor(tmp_path):
    rows = emulated("gpu_runs", tmp_path)["rows"]
    assert len(rows) == 20
    assert {row[""] for row in rows} == {"right"}


def test_what_cards_tell_each_other_is_checked_on_cards_that_numpy_plays(tmp_path):
    """All that `make gpu-check` does of it on a machine with several GPUs."""
    found = emulated("meetings_cuda", tmp_path)
    assert found["right"] == {"copies": True, "NCCL with one rank": True}
    assert [row["same bits"] for row in found["rows"]] == [True] * 6
    assert [row["MB"] for row in found["sums"]] == [1]
