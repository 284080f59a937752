"""What a result depends on: the code that a build function reaches, and nothing else of its module."""

import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import rapydli_flow.template as registry
from rapydli_flow.template import Template, templates
from rapydli_flow.tuner import compilers, source_key

MODULE = '''
"""A module of templates."""
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from rapydli_flow.template import Loop, template

WIDTH = 4
TABLE = np.arange(5000)
NAMED = {"twice": lambda x: 2 * x, "kinds": {"b", "a", "c"}}
SPACE = {"rows": (4, 2)}
LIMIT = 10
memory = {}


@dataclass(frozen=True)
class Base:
    n: int

    def size(self):
        return self.n + 1


class Tiles(Base):
    """How it is cut."""

    def count(self):
        return by_method(self.n)


def by_method(n):
    return n + 2


@cache
def cached(n):
    memory[n] = n
    return indirect(n)


def indirect(n):
    return n + 3  # deep down


def given(x=WIDTH):
    return x


def at_end(x):
    return x + 5


closed = partial(at_end, 1)


def enclosing(step):
    def inner(x):
        return x + step + 6

    return inner


enclosed = enclosing(7)


def fits(op, ins, outs, device, *, rows):
    return rows < LIMIT


@template("test_source", "cpu", space={"rows": (4, 2)}, fits=fits)
def first(op, ins, outs, epilogue, *, rows):
    """What it does."""
    tiles = Tiles(rows)

    def body(task, x, y, extras, at):
        y[task] = enclosed(x[task]) + NAMED["twice"](given())

    return Loop(body, cached(tiles.count()) + TABLE[0] + closed())
'''

numbers = itertools.count()


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Template]]:
    """A function that imports a text as a module of its own, and gives its template ``first``."""
    monkeypatch.syspath_prepend(tmp_path)

    def load(text: str, name: str = "first") -> Template:
        folder = tmp_path / f"made_{next(numbers)}"  # packages, so that equal modules have equal names
        folder.mkdir()
        (folder / "made.py").write_text(text)
        sys.modules.pop("made", None)
        monkeypatch.syspath_prepend(folder)
        module: ModuleType = importlib.import_module("made")
        assert module.__file__ == str(folder / "made.py")
        return next(t for t in templates("test_source", "cpu") if t.name == name)

    yield load
    sys.modules.pop("made", None)
    registry._templates.pop(("test_source", "cpu"), None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tiles = Tiles(rows)", "tiles = Tiles(rows + 1)"),
        ("cached(tiles.count())", "2 * cached(tiles.count())"),
        ("y[task] = enclosed", "y[task] = 1 + enclosed"),
        ("WIDTH = 4", "WIDTH = 8"),
        ("arange(5000)", "arange(5000) % 4321"),
        ("2 * x", "3 * x"),
        ('"a", "c"', '"a", "d"'),
        ("n + 1", "n + 10"),
        ("n + 2", "n + 20"),
        ("n + 3", "n + 30"),
        ("x + 5", "x + 50"),
        ("partial(at_end, 1)", "partial(at_end, 2)"),
        ("step + 6", "step + 60"),
        ("enclosing(7)", "enclosing(70)"),
        ("class Base:\n    n: int", "class Base:\n    n: float"),
    ],
)
def test_what_build_reaches_counts(load: Callable[[str], Template], old: str, new: str) -> None:
    assert MODULE.count(old) == 1
    assert source_key(load(MODULE)) != source_key(load(MODULE.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('space={"rows": (4, 2)}', 'space={"rows": (4, 2, 1), "lanes": (8,)}'),
        ('SPACE = {"rows": (4, 2)}', 'SPACE = {"rows": (4, 2, 1)}'),
        ("rows < LIMIT", "rows < LIMIT + 1"),
        ("LIMIT = 10", "LIMIT = 11"),
        ("memory = {}", "memory = {1: 2}"),
        ("  # deep down", "  # far down"),
        ('"""A module of templates."""', '"""A module."""\n\n'),
        ('"""How it is cut."""', '"""How it is cut into pieces."""'),
        ('    """What it does."""\n', ""),
        ("def first(op, ins, outs, epilogue, *, rows):", "def first(\n    op, ins, outs, epilogue, *, rows\n):"),
        ("at_end(x):", "at_end(x):  # last\n"),
    ],
)
def test_what_only_the_tuner_or_people_read_does_not(load: Callable[[str], Template], old: str, new: str) -> None:
    assert MODULE.count(old) == 1
    assert source_key(load(MODULE)) == source_key(load(MODULE.replace(old, new)))


def test_another_template_in_the_module_changes_nothing(load: Callable[..., Template]) -> None:
    other = '\n\n@template("test_source", "cpu")\ndef second(op, ins, outs, epilogue):\n    return Loop(indirect, 1)\n'
    plain = source_key(load(MODULE))
    assert source_key(load(MODULE + other)) == plain
    assert source_key(load(MODULE + other, "second")) != plain


def test_a_module_that_works_keeps_its_key(load: Callable[[str], Template]) -> None:
    one = load(MODULE)
    before = source_key(one)
    sys.modules["made"].cached(5)
    again = Template(one.family, one.kind, one.build)
    assert source_key(again) == before


NOTEBOOK = """
WIDTH = {width}
class Tiles:
    SIZE = {size}
    def count(self): return WIDTH
def helper(n): return n + {step}
def build(op, ins, outs, epilogue, *, rows):
    def body(task): return helper(task)
    return body, Tiles().count()
"""


def test_builds_without_a_file() -> None:
    def key(**values: int) -> str:
        scope = {"__name__": "no_such_module"}
        exec(NOTEBOOK.format(**{"width": 1, "size": 2, "step": 3} | values), scope)
        scope["build"].__module__ = "no_such_module"  # type: ignore[attr-defined]
        return source_key(Template("test_source", "cpu", scope["build"]))  # type: ignore[arg-type]

    assert key() == key()
    assert len({key(), key(width=4), key(size=4), key(step=4)}) == 4


SHOW = """
from rapydli_flow.template import templates
from rapydli_flow.tuner import source_key
print([source_key(templates(family, "cpu")[0]) for family in ("conv", "matmul", "pointwise", "max_pool")])
"""


def test_keys_are_the_same_in_every_process() -> None:
    printed = set()
    for seed in ("1", "2"):
        environ = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", SHOW], env=environ, capture_output=True, text=True, check=True)
        printed.add(done.stdout)
    assert len(printed) == 1
    assert len(set(eval(printed.pop()))) == 4


def test_a_space_of_ours_can_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    import cpu_kernels.conv_filter_grad as module
    from cpu_kernels import filter_blocking

    (one,) = (t for t in templates("conv_filter_grad", "cpu") if t.name == "tiles")
    before = source_key(one)
    monkeypatch.setitem(module.SPACE, "rows", (99,))
    source_key.__globals__["_key"].cache_clear()
    assert source_key(one) == before
    monkeypatch.setattr(filter_blocking, "COPY_BYTES", 65)
    source_key.__globals__["_key"].cache_clear()
    assert source_key(one) != before
    monkeypatch.undo()
    source_key.__globals__["_key"].cache_clear()
    assert source_key(one) == before


def test_compilers() -> None:
    assert compilers("cpu").startswith("numba ")
    assert ", llvmlite " in compilers("cpu")
    assert compilers("cpu").endswith(f"python {sys.version_info.major}.{sys.version_info.minor}")
    assert "numba-cuda" in compilers("cuda")
