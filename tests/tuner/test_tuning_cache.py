"""Tuning results on disk: what holds, what is pinned, what is exchanged, what is kept aside, and several processes."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest

import rapydli_flow.template as registry
from rapydli_flow.config import SHIPPED
from rapydli_flow.errors import SettingError, TemplateError
from rapydli_flow.ops import Op, Relu, Tanh
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, template
from rapydli_flow.tuner import Choice, Merged, Request, Trial, Tuning, TuningCache
from rapydli_flow.tuner import cache as caches

DEVICE = Device("cpu", "a processor", target="tests-1")
OTHER_DEVICE = replace(DEVICE, target="tests-2")
X = Spec((4, 6))
RELU, TANH = (Request(op, (X,), Epilogue.none(X), op.name) for op in (Relu(), Tanh()))
KEY = RELU.key(DEVICE)
SMALL, MIDDLE, LARGE = (Choice("rows", (("grain", n),)) for n in (4096, 16384, 65536))
DEFAULT = Trial(MIDDLE, 2e-3)


@pytest.fixture
def cache(tmp_path: Path) -> TuningCache:
    return TuningCache(tmp_path / "deep" / "folder" / "tuning.sqlite")


def add(cache: TuningCache, request: Request, choice: Choice, time_s: float = 1e-3, device: Device = DEVICE) -> None:
    cache.add(device, request, Trial(choice, time_s), DEFAULT)


def aside(cache: TuningCache) -> list[str]:
    return sorted(path.name for path in cache.path.parent.glob("*.unreadable*"))


def change(cache: TuningCache, sql: str) -> None:
    with closing(sqlite3.connect(cache.path)) as db, db:
        db.execute(sql)


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a second later than the one before."""
    ticks = iter(range(1_000_000_000, 2_000_000_000))
    monkeypatch.setattr(caches.time, "time", lambda: float(next(ticks)))


# what is known -----------------------------------------------------------------------------------------


def test_results_are_found_again(cache: TuningCache) -> None:
    assert len(cache.tuning(DEVICE)) == 0
    assert not cache.path.parent.exists()  # to look is not to write
    cache.add(DEVICE, RELU, Trial(SMALL, 1e-3, 0.9e-3, 1.1e-3, 7), DEFAULT, [LARGE])
    add(cache, TANH, LARGE, 2e-3)
    tuning = cache.tuning(DEVICE)
    assert (tuning.choose(RELU), tuning.choose(TANH)) == (SMALL, LARGE)
    assert tuning == Tuning(DEVICE, {KEY: SMALL, TANH.key(DEVICE): LARGE})
    known = {one.key: one for one in cache.known(DEVICE)}[KEY]
    assert (known.family, known.request, known.state) == ("pointwise", "relu f32[4,6]", "tuned")
    assert known.best == Trial(SMALL, 1e-3, 0.9e-3, 1.1e-3, 7)
    assert (known.default, known.ties, known.gain) == (DEFAULT, (LARGE,), 2.0)
    assert known.at > 1.7e9


def test_the_newest_choice_counts(cache: TuningCache) -> None:
    for choice in (SMALL, LARGE, SMALL):
        add(cache, RELU, choice)
        assert cache.tuning(DEVICE).choose(RELU) == choice
    assert len(cache.tuning(DEVICE)) == 1


def test_every_trial_is_kept_the_newest_of_a_config(cache: TuningCache) -> None:
    failed = Trial(LARGE, error="deviates from the reference by 1e-1", stage="check")
    cache.record(DEVICE, RELU, [failed, Trial(SMALL, 3e-3), Trial(MIDDLE, 2e-3, 1e-3, 3e-3, 9)])
    assert cache.trials(DEVICE, RELU) == [Trial(MIDDLE, 2e-3, 1e-3, 3e-3, 9), Trial(SMALL, 3e-3), failed]
    cache.record(DEVICE, RELU, [Trial(SMALL, 1e-3)])
    assert [t.choice for t in cache.trials(DEVICE, RELU)] == [SMALL, MIDDLE, LARGE]
    assert cache.top(DEVICE, KEY, 1) == [Trial(SMALL, 1e-3)]
    assert cache.top(DEVICE, KEY, None) == cache.trials(DEVICE, RELU)[:2]
    assert cache.trials(DEVICE, TANH) == cache.trials(OTHER_DEVICE, RELU) == []
    assert len(cache.tuning(DEVICE)) == 0  # nothing was chosen


@pytest.mark.parametrize("wrong", [-1.0, 0.0, nan, float("inf")])
def test_what_is_no_time_is_kept_as_a_failure(cache: TuningCache, wrong: float) -> None:
    cache.record(DEVICE, RELU, [Trial(SMALL, wrong), Trial(LARGE, 1e-3)])
    fast, failed = cache.trials(DEVICE, RELU)
    assert (fast.choice, failed) == (LARGE, Trial(SMALL, error=f"measured {wrong} s, which is no time", stage="time"))
    with pytest.raises(TemplateError, match=r"relu f32.4,6.: rows grain=4096 measured .* s, which is no time"):
        add(cache, RELU, SMALL, wrong)
    assert len(cache.tuning(DEVICE)) == 0


def test_results_of_another_device_do_not_count(cache: TuningCache) -> None:
    add(cache, RELU, SMALL)
    assert len(cache.tuning(OTHER_DEVICE)) == 0
    assert len(cache.tuning(replace(DEVICE, name="renamed"))) == 1


def test_configs_of_tuples_come_back_as_tuples(cache: TuningCache) -> None:
    tiles = Choice("rows", (("tile", ((4, 8), "rows")), ("wide", True)))
    add(cache, RELU, tiles)
    assert cache.known(DEVICE)[0].best.choice == tiles
    hash(cache.known(DEVICE)[0].best.choice)


def test_results_of_other_compilers_do_not_count(cache: TuningCache, monkeypatch: pytest.MonkeyPatch) -> None:
    add(cache, RELU, SMALL)
    cache.record(DEVICE, RELU, [Trial(SMALL, 1e-3)])
    monkeypatch.setattr(caches, "compilers", lambda kind: "numba 99.0")
    assert len(cache.tuning(DEVICE)) == len(cache.trials(DEVICE, RELU)) == 0
    add(cache, RELU, LARGE)
    assert cache.tuning(DEVICE).choose(RELU) == LARGE
    monkeypatch.undo()
    assert cache.tuning(DEVICE).choose(RELU) == SMALL


def test_winners_are_what_similar_requests_can_learn_from(cache: TuningCache) -> None:
    add(cache, RELU, SMALL)
    add(cache, TANH, LARGE)
    add(cache, RELU, LARGE, device=OTHER_DEVICE)
    shapes, op, choice, time_s = min(cache.winners(DEVICE, "pointwise"), key=lambda winner: winner.op)
    assert (shapes, op, choice, time_s) == ([(4, 6)], str(Relu()), SMALL, 1e-3)
    assert len(cache.winners(DEVICE, "pointwise")) == 2
    assert cache.winners(DEVICE, "conv") == []


def test_forgetting(cache: TuningCache) -> None:
    for device in (DEVICE, OTHER_DEVICE):
        cache.record(device, RELU, [Trial(SMALL, 1e-3), Trial(LARGE, 2e-3)])
        add(cache, RELU, SMALL, device=device)
    cache.pin(DEVICE, KEY, LARGE)
    assert cache.forget(DEVICE, "conv") == 0
    assert cache.forget(DEVICE, "pointwise") == 3
    assert cache.trials(DEVICE, RELU) == []
    assert cache.tuning(DEVICE).choices == {KEY: LARGE}
    assert cache.tuning(OTHER_DEVICE).choices == {RELU.key(OTHER_DEVICE): SMALL}
    assert cache.forget() == 3
    assert cache.requests(OTHER_DEVICE) == {}
    assert cache.requests(DEVICE) == {KEY: "relu f32[4,6]"}


# templates that change ---------------------------------------------------------------------------------


class Kept(Op, abstract=True):
    family = "test_kept"

    def infer(self, x: Spec) -> Spec:
        return x

    def index(self, x: Spec) -> str:
        return "a b -> a b"

    def reference(self, x: Any) -> Any:
        return x


KEPT = Request(Kept(), (X,), Epilogue.none(X), "kept")  # type: ignore[call-arg]


def first(space: tuple[int, ...] = (1, 2)) -> None:
    @template("test_kept", "cpu", space={"n": space}, fits=lambda op, ins, outs, device, n: n < 3)
    def plain(op: Any, ins: Any, outs: Any, epilogue: Any, *, n: int) -> Loop:
        raise NotImplementedError


def edited() -> None:
    @template("test_kept", "cpu", space={"n": (1, 2)})
    def plain(op: Any, ins: Any, outs: Any, epilogue: Any, *, n: int) -> Loop:
        raise NotImplementedError("edited")


def second() -> None:
    @template("test_kept", "cpu")
    def other(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
        raise NotImplementedError


@pytest.fixture
def kept(cache: TuningCache) -> Iterator[TuningCache]:
    """A cache with a choice of a template of this file."""
    first()
    add(cache, KEPT, Choice("plain", (("n", 2),)))
    cache.record(DEVICE, KEPT, [Trial(Choice("plain", (("n", 2),)), 1e-3)])
    yield cache
    registry._templates.pop(("test_kept", "cpu"), None)


def test_an_edited_template_loses_its_results_until_it_is_back(kept: TuningCache) -> None:
    edited()
    assert len(kept.tuning(DEVICE)) == len(kept.trials(DEVICE, KEPT)) == len(kept.winners(DEVICE, "test_kept")) == 0
    assert kept.tuning(DEVICE).choose(KEPT) == Choice("plain", (("n", 1),))
    first()
    assert kept.tuning(DEVICE).choose(KEPT) == Choice("plain", (("n", 2),))


def test_another_value_and_another_template_lose_nothing(kept: TuningCache) -> None:
    first((5, 4, 2, 1))
    second()
    assert kept.tuning(DEVICE).choose(KEPT) == Choice("plain", (("n", 2),))
    assert len(kept.trials(DEVICE, KEPT)) == 1


def test_a_template_that_is_gone(kept: TuningCache) -> None:
    registry._templates[("test_kept", "cpu")].clear()
    second()
    assert len(kept.tuning(DEVICE)) == 0
    assert kept.tuning(DEVICE).choose(KEPT) == Choice("other")


# choosing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [Choice("lost"), Choice("plain", (("n", 7),)), Choice("plain", (("m", 1),))])
def test_a_choice_that_does_not_fit_any_more_counts_as_unknown(kept: TuningCache, gone: Choice) -> None:
    key = KEPT.key(DEVICE)
    assert Tuning(DEVICE, {key: gone}).choose(KEPT) == Choice("plain", (("n", 1),))
    pinned = Tuning(DEVICE, {key: gone}, pinned=frozenset({key}))
    with pytest.warns(RuntimeWarning, match=rf"kept f32.4,6. \({key}\) is pinned to {gone}, and the default runs"):
        assert pinned.choose(KEPT) == Choice("plain", (("n", 1),))
    with pytest.raises(SettingError, match="RAPYDLI_TUNING=strict, and nothing is known for kept"):
        Tuning(DEVICE, {key: gone}, strict=True).choose(KEPT)


def test_strict_tunings_want_to_know(kept: TuningCache) -> None:
    strict = replace(kept.tuning(DEVICE), strict=True)
    assert strict.choose(KEPT) == Choice("plain", (("n", 2),))
    wide = Request(Kept(), (Spec((9, 9)),), Epilogue.none(X), "kept")  # type: ignore[call-arg]
    said = rf"nothing is known for kept f32.9,9. \({wide.key(DEVICE)}\) on cpu-tests-1-v32. Tune it with rf.autotune"
    with pytest.raises(SettingError, match=said):
        strict.choose(wide)
    first((1, 4, 5))  # only one fits
    assert strict.choose(wide) == Choice("plain", (("n", 1),))
    second()
    with pytest.raises(SettingError, match="nothing is known"):
        strict.choose(wide)


# pins --------------------------------------------------------------------------------------------------


def test_pins_count_more_than_tuning(cache: TuningCache) -> None:
    add(cache, RELU, SMALL)
    cache.record(DEVICE, RELU, [Trial(LARGE, 5e-3)])
    cache.pin(DEVICE, KEY, LARGE)
    add(cache, RELU, MIDDLE)
    tuning = cache.tuning(DEVICE)
    assert (tuning.choose(RELU), tuning.pinned) == (LARGE, {KEY})
    (known,) = cache.known(DEVICE)
    assert (known.state, known.best, known.default, known.gain) == ("pinned", Trial(LARGE, 5e-3), DEFAULT, 0.4)
    assert cache.unpin(DEVICE, KEY)
    assert not cache.unpin(DEVICE, KEY)
    assert cache.tuning(DEVICE).choose(RELU) == MIDDLE


def test_a_pin_needs_no_measurement(cache: TuningCache) -> None:
    cache.pin(DEVICE, KEY, LARGE)
    assert cache.tuning(DEVICE).choose(RELU) == LARGE
    assert [(one.request, one.gain) for one in cache.known(DEVICE)] == [(KEY, None)]
    assert len(cache.tuning(OTHER_DEVICE)) == 0


def test_pins_of_what_does_not_exist_are_refused(cache: TuningCache) -> None:
    with pytest.raises(TemplateError, match="pointwise has no template 'lost' for cpu devices; it has rows"):
        cache.pin(DEVICE, KEY, Choice("lost"))
    message = r"template pointwise/rows has parameters \['grain'\] but the config names \['grain', 'size'\]"
    with pytest.raises(TemplateError, match=message):
        cache.pin(DEVICE, KEY, Choice("rows", (("grain", 1), ("size", 2))))
    assert len(cache.tuning(DEVICE)) == 0


# between machines --------------------------------------------------------------------------------------


@pytest.fixture
def filled(cache: TuningCache) -> TuningCache:
    cache.record(DEVICE, RELU, [Trial(SMALL, 1e-3), Trial(LARGE, error="no", stage="compile")])
    cache.add(DEVICE, RELU, Trial(SMALL, 1e-3, 0.5e-3, 2e-3, 9), DEFAULT, [LARGE])
    add(cache, TANH, SMALL, device=OTHER_DEVICE)
    cache.pin(DEVICE, TANH.key(DEVICE), LARGE)
    return cache


def test_what_is_exported_is_imported(filled: TuningCache, tmp_path: Path) -> None:
    file, other = tmp_path / "results.jsonl", TuningCache(tmp_path / "other.sqlite")
    assert filled.export(file) == 3
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"choice", "pin"}
    line = next(line for line in lines if line["kind"] == "choice" and line["device"] == DEVICE.key)
    assert (line["version"], line["request"], line["config"]) == (1, "relu f32[4,6]", {"grain": 4096})
    assert (line["inputs"], line["time_s"]) == ([["float32", [4, 6]]], 1e-3)
    assert other.merge(file) == Merged(3, 0, 0)
    assert other.merge(file) == Merged(0, 0, 3)
    for device in (DEVICE, OTHER_DEVICE):
        assert other.tuning(device) == filled.tuning(device)
        assert other.known(device)[0].default == DEFAULT
    assert other.trials(DEVICE, RELU) == []
    assert filled.export(file, OTHER_DEVICE) == 1
    assert filled.export(file, DEVICE.key, trials=True) == 4
    assert other.merge(file) == Merged(2, 0, 2)
    assert other.trials(DEVICE, RELU) == filled.trials(DEVICE, RELU)
    assert [row.key for row in other.diff(file)] == [TANH.key(OTHER_DEVICE)]


def test_caches_are_merged_as_they_are(filled: TuningCache, tmp_path: Path) -> None:
    other = TuningCache(tmp_path / "other.sqlite")
    assert other.merge(filled.path) == Merged(5, 0, 0)
    assert other.known(DEVICE) == filled.known(DEVICE)
    assert other.trials(DEVICE, RELU) == filled.trials(DEVICE, RELU)


def test_the_newer_measurement_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later(monkeypatch)
    old, new = (TuningCache(tmp_path / f"{name}.sqlite") for name in ("old", "new"))
    for cache, time_s in ((old, 3e-3), (new, 1e-3)):
        cache.record(DEVICE, RELU, [Trial(SMALL, time_s)])
        add(cache, RELU, SMALL, time_s)
        cache.pin(DEVICE, KEY, SMALL)
    assert new.merge(old.path) == Merged(0, 0, 3)
    assert new.trials(DEVICE, RELU) == [Trial(SMALL, 1e-3)]
    assert old.merge(new.path) == Merged(0, 3, 0)
    assert old.trials(DEVICE, RELU) == [Trial(SMALL, 1e-3)]


def test_differences(filled: TuningCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, other = tmp_path / "results.jsonl", TuningCache(tmp_path / "other.sqlite")
    add(other, RELU, LARGE, 5e-3)
    other.export(file)
    rows = {row.key: row for row in filled.diff(file)}
    assert rows == {row.key: row for row in filled.diff(other.path)}
    assert set(rows) == {KEY, TANH.key(DEVICE), TANH.key(OTHER_DEVICE)}
    assert rows[KEY] == (KEY, "relu f32[4,6]", SMALL, 1e-3, LARGE, 5e-3)
    assert rows[TANH.key(DEVICE)][2:] == (LARGE, None, None, None)
    assert filled.diff(filled.path) == []


def line_of(**fields: Any) -> str:
    told = {"version": 1, "kind": "choice", "device": DEVICE.key, "key": KEY, "family": "pointwise"}
    told |= {"request": "relu", "op": "relu()", "inputs": [["float32", [4, 6]]], "template": "rows", "source": "s"}
    told |= {
        "config": {"grain": 4096},
        "compilers": "c",
        "time_s": 1.0,
        "low_s": None,
        "high_s": None,
        "rounds": 1,
        "threads": 2,
    }
    told |= {"untuned": {"template": "rows", "config": {}, "time_s": None, "error": "no"}, "ties": [], "at": 1.0}
    return json.dumps(told | {"error": "", "stage": ""} | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", "line 2: Expecting property name"),
        ("[1, 2]", "line 2: this is no tuning result"),
        (line_of(version=2), "line 2: it has version 2, this package reads up to version 1"),
        (line_of(kind="request"), "line 2: kind 'request' is not choice, trial or pin"),
        (line_of(time_s=-1.0), "line 2: measured -1.0 s, which is no time"),
        (line_of(time_s=None), "line 2: a choice without a time"),
        (line_of(time_s="fast"), "line 2: time_s is 'fast', no number"),
        (line_of(at=None), "line 2: at is None, no number"),
        (line_of(at=nan), "line 2: at is nan, no time of day"),
        (line_of(key=7), "line 2: key is 7, no text"),
        (line_of(config=[4096]), r"line 2: config is \[4096\], no parameters by name"),
        (line_of(inputs=[["float99", [4]]]), "line 2: "),
        (line_of(untuned={}), "line 2: 'template'"),
        ('{"version": 1, "kind": "pin", "device": "d"}', "line 2: a pin without 'key'"),
    ],
)
def test_files_that_are_wrong_are_refused_whole(cache: TuningCache, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(f"{line_of()}\n{text}\n")
    with pytest.raises(SettingError, match=message):
        cache.merge(file)
    assert not cache.path.exists()


def test_a_trial_in_a_file_whose_time_is_none_is_a_failure(cache: TuningCache, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(line_of(kind="trial", time_s=-1.0))
    assert cache.merge(file) == Merged(1, 0, 0)
    with closing(sqlite3.connect(cache.path)) as db:
        found = db.execute("SELECT time_s, error, stage FROM trial").fetchall()
    assert found == [(None, "measured -1.0 s, which is no time", "time")]


def test_other_files_are_refused_and_left_alone(cache: TuningCache, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"nothing.jsonl cannot be read .* Give a file of `rapydli tune export`"):
        cache.merge(tmp_path / "nothing.jsonl")
    other = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(other)) as db, db:
        db.execute("CREATE TABLE things (name)")
    with pytest.raises(SettingError, match="is a database of something else"):
        cache.diff(other)
    other.write_bytes(b"SQLite format 3\0 and then not")
    with pytest.raises(SettingError, match=r"other.sqlite cannot be read"):
        cache.merge(other)
    assert other.exists()
    with pytest.raises(SettingError, match=r"cannot be written"):
        cache.export(tmp_path / "no" / "folder.jsonl")


def test_shipped_results_count_least(filled: TuningCache, tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    filled.export(shipped / "some.jsonl")
    cache = TuningCache(tmp_path / "user" / "tuning.sqlite", shipped)
    tuning = cache.tuning(DEVICE)
    assert tuning == Tuning(DEVICE, {KEY: SMALL})  # a pin is of its user
    assert [one.state for one in cache.known(DEVICE)] == ["shipped"]
    assert [winner.choice for winner in cache.winners(DEVICE, "pointwise")] == [SMALL]
    assert cache.requests(DEVICE) == {KEY: "relu f32[4,6]"}
    add(cache, RELU, LARGE)
    assert cache.tuning(DEVICE).choose(RELU) == LARGE
    assert [one.state for one in cache.known(DEVICE)] == ["tuned"]


def test_what_ships_with_the_package_can_be_read() -> None:
    rows = caches._shipped(SHIPPED)
    assert rows
    assert {row["device"] for row in rows} == {path.stem for path in SHIPPED.glob("*.jsonl")}


# files that cannot be used -----------------------------------------------------------------------------


def damage_text(path: Path) -> None:
    path.write_bytes(b"not a database, but longer than the header of one\n" * 20)


def damage_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(bytes(data))


def damage_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def damage_schema(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DROP TABLE choice")


def damage_version(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA user_version = 2")


DAMAGES = [damage_text, damage_middle, damage_end, damage_schema, damage_version]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("reads", [True, False])
def test_a_file_that_cannot_be_used_is_kept_aside(cache: TuningCache, damage: Any, reads: bool) -> None:
    add(cache, RELU, SMALL)
    damage(cache.path)
    whole = cache.path.read_bytes()
    (journal := cache.path.with_name("tuning.sqlite-journal")).write_bytes(b"")
    with pytest.warns(RuntimeWarning, match=r"cannot be used: .* is kept as .*tuning\.unreadable; a new one begins"):
        cache.tuning(DEVICE) if reads else add(cache, TANH, LARGE)
    assert cache.tuning(DEVICE).choices == ({} if reads else {TANH.key(DEVICE): LARGE})
    assert cache.path.exists() == (not reads)
    assert (cache.path.parent / "tuning.unreadable").read_bytes() == whole
    assert not journal.exists()
    add(cache, RELU, LARGE)
    assert cache.tuning(DEVICE).choose(RELU) == LARGE


def test_a_newer_file_says_so(cache: TuningCache) -> None:
    add(cache, RELU, SMALL)
    change(cache, "PRAGMA user_version = 2")
    with pytest.warns(RuntimeWarning, match="it has version 2, this package reads up to version 1"):
        cache.tuning(DEVICE)
    with pytest.raises(SettingError, match="it has version 2"):
        cache.merge(cache.path.with_name("tuning.unreadable"))
    assert aside(cache) == ["tuning.unreadable"]


def test_what_is_kept_aside_is_never_overwritten(cache: TuningCache) -> None:
    cache.path.parent.mkdir(parents=True)
    for n in range(3):
        cache.path.write_text(f"broken {n}")
        with pytest.warns(RuntimeWarning, match="file is not a database"):
            cache.tuning(DEVICE)
    assert aside(cache) == ["tuning.unreadable", "tuning.unreadable-2", "tuning.unreadable-3"]
    texts = [(cache.path.parent / name).read_text() for name in aside(cache)]
    assert texts == ["broken 0", "broken 1", "broken 2"]


def test_an_empty_file_is_a_cache_that_was_just_begun(cache: TuningCache) -> None:
    cache.path.parent.mkdir(parents=True)
    cache.path.touch()
    assert len(cache.tuning(DEVICE)) == 0
    add(cache, RELU, SMALL)
    assert cache.tuning(DEVICE).choose(RELU) == SMALL
    assert aside(cache) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = TuningCache(tmp_path / "file" / "tuning.sqlite")
    assert len(cache.tuning(DEVICE)) == 0
    message = r"tuning results cannot be written to .*file/tuning\.sqlite .*Set RAPYDLI_CACHE_DIR to another folder"
    for write in (lambda: add(cache, RELU, SMALL), lambda: cache.record(DEVICE, RELU, []), cache.forget):
        with pytest.raises(SettingError, match=message):
            write()


# at once -----------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import warnings
from pathlib import Path
from rapydli_flow.ops import Scale
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue
from rapydli_flow.tuner import Choice, Request, Trial, TuningCache

warnings.simplefilter("ignore", RuntimeWarning)
name, path = sys.argv[1:]
cache, device = TuningCache(Path(path)), Device("cpu", "a processor", target="tests-1")
x, trial = Spec((4, 6)), Trial(Choice("rows", (("grain", 4096),)), 1e-3)
print('ready', flush=True)
sys.stdin.readline()
for n in range(15):
    request = Request(Scale(by=100.0 * int(name) + n), (x,), Epilogue.none(x), name)
    cache.record(device, request, [trial, Trial(Choice("rows", (("grain", 65536),)), 2e-3)])
    cache.add(device, request, trial, trial)
    assert request.key(device) in cache.tuning(device)
"""


@pytest.mark.parametrize("broken", [False, True])
def test_several_processes_write_and_read_at_once(cache: TuningCache, broken: bool) -> None:
    if broken:
        cache.path.parent.mkdir(parents=True)
        damage_text(cache.path)
    command, environ = [sys.executable, "-c", SCRIPT], {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    started = [subprocess.Popen([*command, str(n), str(cache.path)], env=environ, **pipes) for n in range(3)]
    for process in started:
        assert process.stdout.readline() == b"ready\n"
    for process in started:
        process.stdin.write(b"\n")
    for process in started:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()
    assert aside(cache) == (["tuning.unreadable"] if broken else [])
    assert len(cache.tuning(DEVICE)) == 45
    assert all(len(cache.top(DEVICE, key, None)) == 2 for key in list(cache.tuning(DEVICE))[:5])


def test_threads_share_a_cache(cache: TuningCache) -> None:
    requests = [Request(Relu(), (Spec((n, 6)),), Epilogue.none(Spec((n, 6)))) for n in range(1, 21)]

    def work(part: list[Request]) -> None:
        for request in part:
            add(cache, request, SMALL)

    threads = [threading.Thread(target=work, args=(requests[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cache.tuning(DEVICE)) == 20
