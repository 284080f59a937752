"""Tuning spaces against brute force: the same points, however they are counted, indexed, sampled or listed."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rapydli_flow.errors import SpaceError
from rapydli_flow.space import Space, parse, read_spaces, table

NAMES = "abcdef"


@pytest.fixture(params=["tables", "diagrams"], scope="module", autouse=True)
def parts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small parts are tables; everything holds for diagrams of them as well."""
    most = table.MOST
    table.MOST = most if request.param == "tables" else -1
    yield
    table.MOST = most


def brute(parameters: dict[str, Any], texts: list[str]) -> set[tuple[Any, ...]]:
    """Every combination that Python itself finds true; a constraint that fails ends the example."""
    found = set()
    for values in product(*parameters.values()):
        point = dict(zip(parameters, values, strict=True))
        if all(eval(text, {}, dict(point)) for text in texts):
            found.add(values)
    return found


def agrees(space: Space, wanted: set[tuple[Any, ...]]) -> None:
    """Count, list, index and its inverse, membership, columns."""
    assert space.count() == len(wanted)
    rows = space.rows()
    assert len(rows) == len(wanted)
    assert set(rows) == wanted
    points = space.points(range(len(wanted)))
    assert [tuple(p.values()) for p in points] == rows
    assert list(space) == points
    assert space.numbers(points) == list(range(len(wanted)))
    if points:
        assert space.point(len(points) - 1) == points[-1]
        assert points[0] in space


number = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32])
values = st.one_of(
    st.lists(number, min_size=1, max_size=4, unique=True),
    st.lists(st.sampled_from([-4, -1, 0, 2]), min_size=1, max_size=3, unique=True),
    st.lists(st.sampled_from([0.5, 1.5, 2.0, 8.0]), min_size=1, max_size=3, unique=True),
    st.just([False, True]),
)


def terms(names: str) -> st.SearchStrategy[str]:
    leaf = st.one_of(st.sampled_from(list(names)), number.map(str))

    def extend(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        pair = st.tuples(inner, inner)
        return st.one_of(
            pair.map(lambda p: f"({p[0]} + {p[1]})"),
            pair.map(lambda p: f"({p[0]} - {p[1]})"),
            pair.map(lambda p: f"({p[0]} * {p[1]})"),
            pair.map(lambda p: f"min({p[0]}, {p[1]})"),
            pair.map(lambda p: f"({p[0]} % ({p[1]} or 3))"),
            pair.map(lambda p: f"({p[0]} / (abs({p[1]}) + 1))"),
            pair.map(lambda p: f"({p[0]} // (abs({p[1]}) + 1))"),
            st.tuples(inner, inner, inner).map(lambda p: f"({p[0]} if {p[1]} else {p[2]})"),
            inner.map(lambda t: f"(-{t})"),
        )

    return st.recursive(leaf, extend, max_leaves=5)


def constraints(names: str) -> st.SearchStrategy[str]:
    term = terms(names)
    compare = st.one_of(
        st.tuples(term, st.sampled_from(["<=", "<", ">=", "!=", "=="]), term).map(" ".join),
        st.tuples(number, term, number).map(lambda p: f"{p[0]} <= {p[1]} <= {p[2]}"),
        term.map(lambda t: f"{t} in (0, 1, 2, 4, 8)"),
        st.tuples(term, term).map(lambda p: f"{p[0]} == 0 or {p[1]} % {p[0]} == 0"),  # guards itself
        st.tuples(term, term).map(lambda p: f"{p[0]} and {p[1]} // {p[0]} < 3"),
    )
    return st.one_of(
        compare,
        st.tuples(compare, st.sampled_from(["and", "or"]), compare).map(lambda p: f"({p[0]}) {p[1]} not ({p[2]})"),
    )


@st.composite
def spaces(draw: Any) -> tuple[dict[str, Any], list[str]]:
    n = draw(st.integers(1, 5))
    parameters = {name: draw(values) for name in NAMES[:n]}
    count = draw(st.integers(0, 4))
    scopes = [draw(st.sets(st.sampled_from(NAMES[:n]), min_size=1, max_size=3)) for _ in range(count)]
    return parameters, [draw(constraints("".join(sorted(scope)))) for scope in scopes]


@settings(max_examples=150, deadline=None)
@given(spaces())
def test_any_space_is_what_brute_force_finds(case: tuple[dict[str, Any], list[str]]) -> None:
    parameters, texts = case
    agrees(Space(parameters, hard=texts), brute(parameters, texts))


@settings(max_examples=60, deadline=None)
@given(spaces(), st.data())
def test_functions_mean_what_expressions_mean(case: tuple[dict[str, Any], list[str]], data: Any) -> None:
    parameters, texts = case
    assume(texts)
    rules: dict[str, Any] = {}
    for i, text in enumerate(texts):
        names = sorted(parse(text).names)
        rules[f"rule {i}"] = eval(f"lambda {', '.join(names)}: {text}") if data.draw(st.booleans()) else text
    agrees(Space(parameters, hard=rules), brute(parameters, texts))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(2, 6), st.integers(1, 12))
def test_deferred_parameters_and_derived_values(most: int, width: int, bound: int) -> None:
    space = Space(
        {
            "a": range(1, most + 1),
            "b": lambda a: [d for d in range(1, a + 1) if a % d == 0],
            "c": range(width),
            "d": lambda b, c: (b, b + c),
        },
        derived={"e": "a * b", "f": lambda e, c: e + c},
        hard={"enough": "f >= 3"},
        soft={"not too many": lambda e, d: e + d <= bound * 3},
    )
    wanted = {
        (a, b, c, d)
        for a in range(1, most + 1)
        for b in range(1, a + 1)
        if a % b == 0
        for c in range(width)
        for d in {b, b + c}
        if a * b + c >= 3 and a * b + d <= bound * 3
    }
    agrees(space, wanted)
    assert space.cartesian == sum(
        len({b, b + c}) for a in range(1, most + 1) for b in range(1, a + 1) if a % b == 0 for c in range(width)
    )


def test_values_of_every_kind() -> None:
    space = Space(
        {
            "order": ["nhwc", "nchw"],
            "tile": [(8, 4), [4, 8], None],
            "fast": (True, False),
            "n": np.arange(3),
            "one": [7],
        },
        hard=["order == 'nhwc' or not fast", "n < one"],
        soft={"square": lambda tile, fast: tile is None or (tile[0] > tile[1]) == fast},
    )
    wanted = {
        (order, tile, fast, n, 7)
        for order, tile, fast, n in product(["nhwc", "nchw"], [(8, 4), (4, 8), None], [True, False], range(3))
        if (order == "nhwc" or not fast) and (tile is None or (tile[0] > tile[1]) == fast)
    }
    agrees(space, wanted)
    assert {type(p["n"]) for p in space} == {int}
    assert {type(p["fast"]) for p in space} == {bool}


def test_integers_of_any_size_are_exact() -> None:
    large = [2**53, 2**53 + 1, 10**30]
    texts = ["a * b != 81129638414606699710187514626049", "a % 2 == 1 or b ** 70 > 3", "a // 7 * 7 != a"]
    agrees(Space({"a": large, "b": [1, 2, 2**53 + 1]}, hard=texts), brute({"a": large, "b": [1, 2, 2**53 + 1]}, texts))


def test_ten_to_the_twelve_points_and_more() -> None:
    space = Space({f"p{i}": range(10) for i in range(12)}, hard=[f"p{i} + p{i + 1} <= 9" for i in range(0, 12, 2)])
    assert space.cartesian == 10**12
    assert space.count() == 55**6
    last = space.point(55**6 - 1)
    assert space.number(last) == 55**6 - 1
    huge = Space({f"p{i}": range(10) for i in range(40)}, hard=[f"p{i} != p{i + 1}" for i in range(0, 40, 2)])
    assert huge.count() == 90**20
    drawn = huge.sample(50, np.random.default_rng(0))
    assert len({tuple(p.values()) for p in drawn}) == 50
    numbers = huge.numbers(drawn)
    assert huge.points(numbers) == drawn
    assert min(numbers) >= 0


def test_a_chain_that_does_not_fall_apart_is_still_counted() -> None:
    """Fibonacci: words of zeros and ones without two ones in a row."""
    space = Space({f"b{i}": (0, 1) for i in range(60)}, hard=[f"b{i} * b{i + 1} == 0" for i in range(59)])
    assert space.count() == 4052739537881
    assert all(p[f"b{i}"] * p[f"b{i + 1}"] == 0 for p in space.sample(20, np.random.default_rng(1)) for i in range(59))


def test_samples_are_uniform() -> None:
    space = Space({"a": range(1, 7), "b": range(1, 7), "c": (0, 1)}, hard=["a * b <= 9", "a >= b or c"])
    counts: Counter[int] = Counter()
    rng = np.random.default_rng(0)
    for _ in range(4000):
        (point,) = space.sample(1, rng)
        counts[space.number(point)] += 1
    expected = 4000 / space.count()
    statistic = sum((counts[i] - expected) ** 2 / expected for i in range(space.count()))
    assert len(counts) == space.count()
    assert statistic < space.count() + 5 * np.sqrt(2 * space.count())


def test_samples_are_different_points() -> None:
    space = Space({"a": range(20), "b": range(20)}, hard=["a < b"])
    for n in (3, 100, 190, 500):
        drawn = space.sample(n, np.random.default_rng(n))
        assert len({tuple(p.values()) for p in drawn}) == min(n, 190)
        assert all(p in space for p in drawn)


def test_what_is_not_a_point() -> None:
    space = Space({"a": (1, 2), "b": (1, 2)}, hard=["a <= b"])
    assert {"a": 2, "b": 1} not in space
    assert {"a": 3, "b": 3} not in space
    assert {"a": 1} not in space
    assert {"a": 1, "b": 1, "c": 1} not in space
    assert "a" not in space
    assert space.numbers([{"a": 1, "b": 2}, {"a": 2, "b": 1}])[1] == -1
    assert [r.name for r in space.broken({"a": 2, "b": 1})] == ["a <= b"]
    for number in (-1, 3):
        with pytest.raises(IndexError, match="of a space of 3"):
            space.point(number)


def test_neighbours_differ_in_one_parameter_and_the_nearest_come_first() -> None:
    space = Space({"a": (1, 2, 4, 8), "b": (1, 2, 4, 8)}, hard=["a * b <= 16"])
    found = space.neighbours({"a": 4, "b": 2})
    assert found == [
        {"a": 2, "b": 2}, {"a": 8, "b": 2}, {"a": 4, "b": 1}, {"a": 4, "b": 4}, {"a": 1, "b": 2},
    ]  # fmt: skip
    assert space.neighbours({"a": 4, "b": 2}, reach=1) == found[:4]


def test_a_space_without_parameters_has_one_point() -> None:
    agrees(Space({}), {()})
    assert Space({}).number({}) == 0
    agrees(Space({}, hard=["x > 2"], given={"x": 1}), set())


# constraints -------------------------------------------------------------------------------------------


def test_given_names_are_constants() -> None:
    space = Space(
        {"rows": (4, 8, 16), "vectors": (1, 2, 4)},
        derived={"tile": "rows * vectors"},
        hard={"registers": "tile + vectors + 2 <= vector_registers"},
        given={"vector_registers": 32},
    )
    agrees(space, {(r, v) for r, v in product((4, 8, 16), (1, 2, 4)) if r * v + v + 2 <= 32})


def test_restricted_adds_soft_constraints() -> None:
    space = Space({"a": range(10)}, hard={"even": "a % 2 == 0"})
    fewer = space.restricted({"small": "a < 5"}).restricted(["a > 0"])
    assert [p["a"] for p in fewer] == [2, 4]
    assert [(r.name, r.kind) for r in fewer.rules] == [("even", "hard"), ("small", "soft"), ("a > 0", "soft")]
    assert space.count() == 5
    with pytest.raises(SpaceError, match="has a soft constraint 'small' already"):
        fewer.restricted({"small": "a < 3"})


def test_contradictory_constraints_are_named_and_only_they() -> None:
    space = Space(
        {"a": range(1, 9), "b": range(1, 9), "c": range(5)},
        hard={"large": "a * b >= 40", "even": "a % 2 == 0", "some c": "c > 0"},
        soft={"small": "a + b <= 8", "odd c": "c % 2 == 1"},
    )
    assert space.count() == 0
    assert not space
    assert [r.name for r in space.contradiction()] == ["large", "small"]
    with pytest.raises(SpaceError, match=r"empty: no point keeps hard 'large'; soft 'small'\. Relax one of them"):
        space.check()
    assert space.restricted(["c == 9"]).contradiction()[0].name in ("c == 9", "large")
    with pytest.raises(SpaceError, match="parameter 'a' has no values"):
        Space({"a": ()}).check()
    assert list(space) == []
    assert space.sample(3, np.random.default_rng(0)) == []
    assert space.columns()["a"].size == 0


def test_guards_keep_what_would_fail_from_being_computed() -> None:
    space = Space(
        {"a": range(4), "b": range(4)}, hard={"divides": "b == 0 or a % b == 0", "log": "a == 0 or log2(a) >= b - 1"}
    )
    agrees(
        space,
        brute(
            {"a": range(4), "b": range(4)}, ["b == 0 or a % b == 0", "a == 0 or __import__('math').log2(a) >= b - 1"]
        ),
    )
    with pytest.raises(SpaceError, match=r"\(a % b\) fails for a=0, b=0: ZeroDivisionError"):
        Space({"a": range(4), "b": range(4)}, hard=["a % b == 0"]).count()
    with pytest.raises(SpaceError, match="fails for a=3: ValueError: three"):
        Space({"a": range(4)}, hard={"f": _no_three}).count()


def _no_three(a: int) -> bool:
    if a == 3:
        raise ValueError("three")
    return True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hard": ["rows * colums <= 4"]},
            "hard constraint 'rows \\* colums <= 4' names 'colums', but the space has rows, columns",
        ),
        ({"soft": {"s": lambda row: row}}, "soft constraint 's' names 'row'"),
        ({"derived": {"t": "rows * x"}}, "derived value 't' names 'x'"),
        ({"derived": {"t": "u + 1", "u": "t + 1"}}, "'t' is made of itself: t -> u -> t"),
        ({"derived": {"rows": "1"}}, "'rows' is a parameter and a derived value"),
        ({"given": {"columns": 1}}, "'columns' is a parameter and given"),
        ({"hard": ["rows <="]}, "cannot be read"),
        ({"hard": ["__import__('os').system('true')"]}, "is not allowed"),
        ({"hard": ["rows.real > 0"]}, "'rows.real' is not allowed"),
        ({"hard": ["[r for r in (1, 2)] == rows"]}, "is not allowed"),
        ({"hard": ["(lambda: 1)()"]}, "is not allowed"),
        ({"hard": ["max(rows, key=abs) > 0"]}, "is not allowed"),
        ({"hard": ["rows[0] > 0"]}, "is not allowed"),
        ({"hard": {"f": lambda *rows: True}}, "name every parameter that it needs"),
        ({"hard": {"f": 7}}, "is 7, not an expression or a function"),
    ],
)
def test_what_a_space_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        Space({"rows": (1, 2), "columns": (1, 2)}, **options)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"a": 3}, "parameter 'a' has 3, not a list of values"),
        ({"a": "abc"}, "parameter 'a' has 'abc', not a list"),
        ({"a b": (1,)}, "'a b' is not a name for a parameter"),
        ({"a": lambda b: b, "b": lambda a: a}, "'a', 'b' wait for one another"),
        ({"a": (1, 2), "b": lambda a: a}, "the deferred parameter 'b' gave 1, not a list"),
        ({"a": (1, 2), "b": lambda c: c}, "the deferred parameter 'b' names 'c'"),
    ],
)
def test_parameters_that_are_none(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        Space(parameters).count()


def test_a_space_that_does_not_factor_is_refused_before_memory_is_gone() -> None:
    wide = {f"p{i}": range(1000) for i in range(4)}
    with pytest.raises(SpaceError, match="does not factor"):
        Space(wide, hard={"all": lambda p0, p1, p2, p3: p0 + p1 + p2 + p3 > 5}).count()


# files -------------------------------------------------------------------------------------------------


def test_spaces_are_read_from_files(tmp_path: Path) -> None:
    one = {"parameters": {"a": [1, 2, 4], "b": [1, 2]}, "constraints": ["a % b == 0"], "soft": ["a < 4"]}
    (tmp_path / "all.json").write_text(json.dumps({"first": one, "second": {"parameters": {"x": [1, 2]}}}))
    (tmp_path / "alone.json").write_text(json.dumps({**one, "derived": {"c": "a * b"}, "constraints": ["c < 4"]}))
    found = read_spaces(tmp_path / "all.json")
    assert {name: space.count() for name, space in found.items()} == {"first": 3, "second": 2}
    assert read_spaces(tmp_path / "alone.json")["alone"].count() == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has no spaces"),
        ('{"a": {"constraints": []}}', '.json: a has no "parameters"'),
        (
            '{"a": {"parameters": {"x": [1]}, "constraints": "x > 0"}}',
            "'constraints' is 'x > 0', not a list of expressions",
        ),
        ('{"a": {"parameters": {"x": [1]}, "constraints": ["y > 0"]}}', "a: the hard constraint 'y > 0' names 'y'"),
        ('{"a": {"parameters": {"x": [1]}, "constraints": ["exec(1)"]}}', "not allowed"),
    ],
)
def test_files_that_hold_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(SpaceError, match=message):
        read_spaces(tmp_path / "s.json")
    with pytest.raises(SpaceError, match="cannot be read"):
        read_spaces(tmp_path / "lost.json")
