"""Tuning results on disk: what counts, what is ignored, what is kept aside, and several processes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rapydli_flow.errors import SettingError
from rapydli_flow.ops import Relu, Tanh
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Template, templates
from rapydli_flow.tuner import Choice, Request, TuningCache

DEVICE = Device("cpu", "a processor", target="tests-1")
X = Spec((4, 6))
RELU, TANH = (Request(op, (X,), Epilogue.none(X), op.name) for op in (Relu(), Tanh()))
SMALL, LARGE = (Choice("rows", (("grain", n),)) for n in (4096, 65536))


@pytest.fixture
def cache(tmp_path: Path) -> TuningCache:
    return TuningCache(tmp_path / "deep" / "folder" / "tuning.jsonl")


def lines(cache: TuningCache) -> list[dict[str, Any]]:
    return [json.loads(line) for line in cache.path.read_text().splitlines()]


def change(cache: TuningCache, **fields: Any) -> None:
    cache.path.write_text("".join(json.dumps(line | fields) + "\n" for line in lines(cache)))


def aside(cache: TuningCache) -> list[str]:
    return sorted(path.name for path in cache.path.parent.glob("*.unreadable*"))


def test_results_are_found_again(cache: TuningCache) -> None:
    assert len(cache.tuning(DEVICE)) == 0
    cache.add(DEVICE, [(RELU, SMALL, 1e-3), (TANH, LARGE, 2e-3)])
    tuning = cache.tuning(DEVICE)
    assert (tuning.choose(RELU), tuning.choose(TANH)) == (SMALL, LARGE)
    assert set(tuning) == {RELU.key(DEVICE), TANH.key(DEVICE)}
    assert tuning.device == DEVICE
    (first, _) = lines(cache)
    assert (first["request"], first["time_s"], first["family"]) == ("relu f32[4,6]", 1e-3, "pointwise")


def test_the_newest_counts_and_nothing_is_lost(cache: TuningCache) -> None:
    for choice in (SMALL, LARGE):
        cache.add(DEVICE, [(RELU, choice, 1e-3)])
    assert cache.tuning(DEVICE).choose(RELU) == LARGE
    assert len(lines(cache)) == 2
    cache.add(DEVICE, [])
    cache.path.write_text(cache.path.read_text() + "\n\n")
    assert cache.tuning(DEVICE).choose(RELU) == LARGE


def test_results_of_another_device_do_not_count(cache: TuningCache) -> None:
    cache.add(DEVICE, [(RELU, SMALL, 1e-3)])
    assert len(cache.tuning(replace(DEVICE, target="tests-2"))) == 0
    assert len(cache.tuning(replace(DEVICE, name="renamed"))) == 1


def test_results_of_a_changed_template_do_not_count(cache: TuningCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.add(DEVICE, [(RELU, SMALL, 1e-3)])
    source = Template.source
    monkeypatch.setattr(Template, "source", lambda self: source(self) + "\n# faster")
    assert len(cache.tuning(DEVICE)) == 0
    cache.add(DEVICE, [(RELU, LARGE, 1e-3)])
    assert cache.tuning(DEVICE).choose(RELU) == LARGE
    monkeypatch.undo()
    assert cache.tuning(DEVICE).choose(RELU) == SMALL


@pytest.mark.parametrize("field", ["template", "family"])
def test_results_of_a_template_that_is_gone_do_not_count(cache: TuningCache, field: str) -> None:
    cache.add(DEVICE, [(RELU, SMALL, 1e-3)])
    change(cache, **{field: "lost"})
    assert len(cache.tuning(DEVICE)) == 0
    assert aside(cache) == []


def test_configs_of_tuples_come_back_as_tuples(cache: TuningCache) -> None:
    tiles = Choice("rows", (("tile", ((4, 8), "rows")),))
    cache.add(DEVICE, [(RELU, tiles, 1e-3)])
    assert cache.tuning(DEVICE).choose(RELU) == tiles
    hash(cache.tuning(DEVICE).choose(RELU))


@pytest.mark.parametrize(
    "text",
    [
        b"{not json\n",
        b"[1, 2]\n",
        b"\xff\xfe\x00binary\n",
        b'{"version": 1}\n',
        b'{"version": "one"}\n',
        b"null\n",
    ],
)
def test_an_unreadable_file_is_kept_aside(cache: TuningCache, text: bytes) -> None:
    cache.add(DEVICE, [(RELU, SMALL, 1e-3)])
    whole = cache.path.read_bytes() + text
    cache.path.write_bytes(whole)
    assert len(cache.tuning(DEVICE)) == 0
    assert not cache.path.exists()
    assert aside(cache) == ["tuning.unreadable"]
    assert cache.path.with_suffix(".unreadable").read_bytes() == whole
    cache.add(DEVICE, [(RELU, LARGE, 1e-3)])
    assert cache.tuning(DEVICE).choose(RELU) == LARGE
    assert aside(cache) == ["tuning.unreadable"]


def test_a_file_of_a_newer_version_is_kept_aside(cache: TuningCache) -> None:
    cache.add(DEVICE, [(RELU, SMALL, 1e-3)])
    change(cache, version=2)
    assert len(cache.tuning(DEVICE)) == 0
    assert aside(cache) == ["tuning.unreadable"]
    assert '"version": 2' in cache.path.with_suffix(".unreadable").read_text()


def test_what_is_kept_aside_is_never_overwritten(cache: TuningCache) -> None:
    cache.path.parent.mkdir(parents=True)
    for n in range(3):
        cache.path.write_text(f"broken {n}")
        cache.tuning(DEVICE)
    assert aside(cache) == ["tuning.unreadable", "tuning.unreadable-2", "tuning.unreadable-3"]
    texts = [(cache.path.parent / name).read_text() for name in aside(cache)]
    assert texts == ["broken 0", "broken 1", "broken 2"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = TuningCache(tmp_path / "file" / "tuning.jsonl")
    assert len(cache.tuning(DEVICE)) == 0
    message = r"tuning results cannot be written to .*file/tuning\.jsonl .*Set RAPYDLI_CACHE_DIR to another folder"
    with pytest.raises(SettingError, match=message):
        cache.add(DEVICE, [(RELU, SMALL, 1e-3)])


SCRIPT = """
import sys
from pathlib import Path
from rapydli_flow.ops import Scale
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue
from rapydli_flow.tuner import Choice, Request, TuningCache

name, path = sys.argv[1:]
cache, device = TuningCache(Path(path)), Device("cpu", "a processor", target="tests-1")
x = Spec((4, 6))
for n in range(20):
    results = [
        (Request(Scale(by=1000.0 * n + i), (x,), Epilogue.none(x), name), Choice("rows", (("grain", 4096),)), 1e-3)
        for i in range(40)  # more than a file's buffer holds
    ]
    cache.add(device, results)
    assert len(cache.tuning(device)) >= 40 * (n + 1)
"""


def test_several_processes_write_and_read_at_once(cache: TuningCache) -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, name, str(cache.path)], env=environ, stderr=subprocess.PIPE)
        for name in ("one", "two", "three")
    ]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()
    assert aside(cache) == []
    names = [line["request"].split()[0] for line in lines(cache)]
    assert {name: names.count(name) for name in set(names)} == {"one": 800, "two": 800, "three": 800}
    assert len(cache.tuning(DEVICE)) == 800


def test_the_template_of_the_results_is_there() -> None:
    assert "rows" in [t.name for t in templates("pointwise", "cpu")]
