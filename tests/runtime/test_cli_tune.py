"""`rapydli tune` and its commands: what they print, and one line, or a list, for an error."""

import json
import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from cpu_kernels.compile import host
from rapydli_flow.cli import main
from rapydli_flow.config import settings
from rapydli_flow.ops import Relu, Scale, Tanh
from rapydli_flow.runtime.tuning import cache
from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue
from rapydli_flow.tuner import Choice, Request, Trial

X = Spec((4, 6))
RELU, TANH = (Request(op, (X,), Epilogue.none(X), op.name) for op in (Relu(), Tanh()))
SMALL, LARGE = (Choice("rows", (("grain", n),)) for n in (4096, 65536))


def call(*arguments):
    return CliRunner().invoke(main, ["tune", *(str(a) for a in arguments)])


def said(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def error_of(*arguments):
    result = call(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The results of this user: a folder of their own."""
    monkeypatch.setenv("RAPYDLI_CACHE_DIR", str(tmp_path / "cache"))
    settings.cache_clear()
    yield cache()
    settings.cache_clear()


@pytest.fixture
def filled(results):
    """Two kernels, one of them tuned to twice its default's speed."""
    device = host()
    results.record(device, RELU, [Trial(LARGE, 2e-3), Trial(SMALL, 1e-3)])
    results.add(device, RELU, Trial(SMALL, 1e-3), Trial(LARGE, 2e-3))
    results.add(device, TANH, Trial(LARGE, 3e-3), Trial(LARGE, error="no", stage="check"))
    return results


def test_what_is_known_is_shown(filled):
    lines = said("show").splitlines()
    assert lines[0].split() == ["key", "kernel", "default", "best", "gain", "state", "config"]
    assert re.search(
        r"pointwise-[0-9a-f]{8}  relu f32\[4,6\]  2\.000 ms  1\.000 ms  2\.00x  tuned  rows grain=4096", str(lines)
    )
    assert re.search(r"tanh f32\[4,6\]  failed +3\.000 ms +tuned  rows grain=65536", str(lines))
    assert lines[-1] == f"2 kernels known for {host().key}"
    key = RELU.key(host())
    assert said("show", key[:16]).splitlines()[-1].startswith("1 kernels")
    assert said("show", "pointwise").splitlines()[-1].startswith("2 kernels")
    assert re.findall(r"([0-9.]+) ms +tried  rows grain=(\d+)", said("show", key, "--top", 5)) == [
        ("1.000", "4096"),
        ("2.000", "65536"),
    ]
    (told,) = map(json.loads, said("show", key, "--json", "--top", 1).splitlines())
    assert (told["key"], told["state"], told["config"], told["gain"]) == (key, "tuned", {"grain": 4096}, 2.0)
    assert told["top"] == [{"template": "rows", "config": {"grain": 4096}, "time_s": 1e-3}]


def test_nothing_is_known_yet(results):
    assert said("show").splitlines()[-1] == f"0 kernels known for {host().key}"
    assert said("show", "--json") == ""
    assert "no kernel has a key that begins with 'conv'. There are: none" in error_of("show", "conv")


def test_keys_that_are_none_or_several_list_the_candidates(filled):
    keys = {request.key(host()) for request in (RELU, TANH)}
    for command, wrong, begins in (
        (("show",), "pointwise-", "Error: 2 kernels have keys that begin with 'pointwise-'. Give more of one:"),
        (("show",), "conv", "Error: no kernel has a key that begins with 'conv'. There are:"),
        (("pin",), "pointwise", "Error: 2 kernels have keys that begin with 'pointwise'"),
    ):
        output = error_of(*command, wrong, *(("rows", "grain=1") if command == ("pin",) else ()))
        assert output.startswith(begins)
        assert set(re.findall(r"  (pointwise-[0-9a-f]{20})  ", output)) == keys
    assert "relu f32[4,6]" in error_of("show", "nothing")
    for n in range(8):
        request = Request(Scale(by=float(n)), (X,), Epilogue.none(X), "scale")
        filled.add(host(), request, Trial(SMALL, 1e-3), Trial(SMALL, 1e-3))
    assert "\n  and 2 more" in error_of("show", "nothing")


def test_kernels_are_pinned_and_unpinned(filled):
    key = RELU.key(host())
    assert said("pin", key[:18], "rows", "grain=65536") == f"{key} is pinned to rows grain=65536\n"
    assert filled.tuning(host()).choose(RELU) == LARGE
    assert re.search(r"2\.000 ms  2\.000 ms  1\.00x  pinned  rows grain=65536", said("show", key))
    assert "no kernel has a key that begins with 'conv'" in error_of("unpin", "conv")
    assert said("unpin", "pointwise") == f"{key} is no longer pinned\n"  # the only pin
    assert filled.tuning(host()).choose(RELU) == SMALL
    assert error_of("unpin", key).endswith("There are: none\n")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("lost", "grain=1"), "pointwise has no template 'lost' for cpu devices; it has rows"),
        (("rows", "grian=1"), "has parameters ['grain'] but the config names ['grian']"),
        (("rows",), "has parameters ['grain'] but the config names []"),
        (("rows", "grain"), "'grain' is not NAME=VALUE with a number"),
        (("rows", "grain=os.getcwd()"), "'grain=os.getcwd()' is not NAME=VALUE"),
    ],
)
def test_pins_are_checked(filled, values, message):
    assert message in error_of("pin", RELU.key(host()), *values)
    assert filled.tuning(host()).pinned == frozenset()


def test_results_are_carried(filled, tmp_path):
    file = tmp_path / "results.jsonl"
    assert said("export", file, "--device", "cuda-other") == f"0 results written to {file}\n"
    assert said("export", file) == f"2 results written to {file}\n"
    assert said("export", file, "--trials") == f"4 results written to {file}\n"
    assert said("diff", file) == "no differences\n"
    filled.forget()
    rows = said("diff", file).splitlines()
    assert rows[0].split() == ["key", "kernel", "here", "there"]
    assert re.search(r"relu f32\[4,6\]  nothing  rows grain=4096 \(1\.000 ms\)", str(rows))
    assert said("import", file) == "4 results new, 0 replaced by newer ones, 0 kept\n"
    assert said("import", file) == "0 results new, 0 replaced by newer ones, 4 kept\n"
    assert filled.tuning(host()).choose(RELU) == SMALL
    assert "cannot be read" in error_of("import", tmp_path / "nothing.jsonl")


def test_recipes_come_first(results, tmp_path):
    for arguments in (("nothing.py",), ("--budget", 1, "nothing.py"), ("nothing.py", "--budget", 1)):
        assert (
            error_of(*arguments) == "Error: nothing.py is not a file. Give a recipe, for example examples/digits.py.\n"
        )
    for arguments in (("--help",), ("show", "-h"), ("some.py", "--help")):
        assert "Usage:" in said(*arguments)
    usage = said("some.py", "--help")
    assert "--budget" in usage
    assert "tune RECIPE [OPTIONS]\n" in usage
    assert call("export").exit_code == 2


@pytest.mark.parametrize("how", ["off", "offline", "strict"])
def test_tuning_can_be_forbidden(results, monkeypatch, tmp_path, how):
    monkeypatch.setenv("RAPYDLI_TUNING", how)
    settings.cache_clear()
    recipe = tmp_path / "tiny.py"
    recipe.write_text(
        "import rapydli_flow as rf\nfrom rapydli_flow import nn, optim\n"
        "def step():\n"
        "    graph = rf.trace(lambda x: nn.dense(x, 3), rf.Spec((4, 5)))\n"
        "    return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))\n"
        "def data(url): ...\n"
    )
    assert f"autotune: nothing is tuned with RAPYDLI_TUNING={how}. Set it to 'on'" in error_of(recipe)


# searching ---------------------------------------------------------------------------------------------

SPACES = {
    "small": {"parameters": {"a": [1, 2, 4], "b": [1, 2, 3]}, "constraints": ["a % b == 0"]},
    "large": {"parameters": {f"p{i}": list(range(10)) for i in range(6)}, "constraints": ["p0 + p1 <= 9"]},
}


def test_spaces_of_a_file_are_counted(tmp_path):
    file = tmp_path / "spaces.json"
    file.write_text(json.dumps(SPACES))
    lines = said("space", file).splitlines()
    assert lines[0].split() == ["space", "Cartesian", "valid", "construct", "s", "count", "s"]
    assert lines[1].split()[:3] == ["small", "9", "5"]
    assert lines[2].split()[:3] == ["large", "1,000,000", "550,000"]
    rows = json.loads(said("space", file, "--json"))
    assert [(r["space"], r["cartesian"], r["valid"]) for r in rows] == [("small", 9, 5), ("large", 10**6, 550_000)]
    assert all(r["construct_s"] > 0 and r["count_s"] > 0 for r in rows)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"parameters": {"a": [1]}, "constraints": ["b > 0"]}, "the hard constraint 'b > 0' names 'b'"),
        ({"parameters": {"a": [1]}, "constraints": ["open('x')"]}, "is not allowed"),
        ({"parameters": {"a": [1, 2]}, "constraints": ["a > 1", "a < 2"]}, "no point keeps hard 'a > 1'; hard 'a < 2'"),
    ],
)
def test_spaces_that_are_wrong(tmp_path, form, message):
    file = tmp_path / "spaces.json"
    file.write_text(json.dumps({"s": form}))
    assert message in error_of("space", file)


def test_strategies_are_compared_on_what_was_recorded(tmp_path):
    rows = [[a, b, 1.0 + abs(a - 5) + abs(b - 3)] for a in range(8) for b in range(8)]
    file, picture = tmp_path / "recorded.json", tmp_path / "picture.svg"
    file.write_text(json.dumps({"name": "toy", "parameters": ["a", "b"], "rows": rows}))
    text = said("simulate", file, "--strategy", "greedy", "--strategy", "random", "--repeats", 3, "--svg", picture)
    assert text.splitlines()[0] == "toy: 64 points"
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["strategy", "greedy", "random"]
    assert picture.read_text().startswith("<svg")
    (form,) = json.loads(said("simulate", file, "--strategy", "greedy", "--repeats", 2, "--json"))
    assert form["strategies"]["greedy"]["repeats"] == 2
    assert "holds no recorded spaces" in error_of("simulate", picture)


RECIPE = """
import rapydli_flow as rf
from rapydli_flow import nn, optim
EPOCHS = 1
def step():
    graph = rf.trace(lambda x: nn.dense(nn.relu(nn.dense(x, 4)), 3), rf.Spec((20, 6)))
    return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))
def data(url):
    raise AssertionError("tuning reads no data")
"""


@pytest.mark.slow
def test_a_recipe_is_tuned_as_asked(results, tmp_path):
    recipe, report = tmp_path / "recipe.py", tmp_path / "report.json"
    recipe.write_text(RECIPE)
    options = ["--budget", 60, "--trials", 2, "--strategy", "random", "--soft", "lanes == 8", "--threads", 1]
    text = said(recipe, *options, "--report", report)
    assert "Cartesian" in text
    assert f"report: {report}" in text
    (session,) = json.loads(report.read_text())["sessions"]
    tried = [t for kernel in session["kernels"] for t in kernel["trials"]]
    assert {len(kernel["trials"]) for kernel in session["kernels"]} <= {1, 2}
    assert 8 in {t["config"].get("lanes") for t in tried}
    chosen = {kernel["best"]["config"].get("lanes") for kernel in session["kernels"]}
    assert chosen <= {None, 8}
    assert len(results.known(host())) > 3
    assert "is neither .html nor .json" in error_of(recipe, "--report", tmp_path / "report.pdf")
    assert "names height, but no template of this step" in error_of(recipe, "--soft", "height > 3")
    assert "is not 'cpu', 'cuda'" in error_of(recipe, "--device", "tpu")


@pytest.mark.slow
def test_two_processes_tune_the_same_kernels_at_once(results, tmp_path):
    """They take turns to time, write into one cache, and agree on what is fastest, up to ties."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    command = [sys.executable, "-m", "rapydli_flow", "tune", "recipe.py", "--trials", "2", "--threads", "1"]
    both = [
        subprocess.Popen(command, cwd=tmp_path, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    for process in both:
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text.decode()
        assert "configs" in text.decode()
    known = results.known(host())
    assert len(known) > 3
    assert all(one.best.time_s for one in known)
    assert not list((tmp_path / "cache").glob("*.unreadable*"))
