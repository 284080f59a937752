"""The funnel: counted without listing, added up, shown."""

from rapydli_flow.space import Space
from rapydli_flow.tuner import Choice, Funnel, Trial

SPACE = Space(
    {"a": range(1, 11), "b": range(1, 11), "c": (0, 1)},
    hard={"small": "a * b <= 20", "even": "a % 2 == 0"},
    soft={"wide": "b > 1", "nothing": "c >= 0"},
)


def trials() -> list[Trial]:
    made = [Choice("t", (("a", i),)) for i in range(5)]
    return [
        Trial.timed(made[0], [1e-3] * 7),
        Trial.failed(made[1], "compile", "TypingError: no 17"),
        Trial.failed(made[2], "check", "deviates from the reference by 1.2e-01"),
        Trial.failed(made[3], "check", "deviates from the reference by 3.4e+05"),
        Trial.timed(made[4], [1e-3, -1.0]),
    ]


def test_stages_and_what_each_rule_took() -> None:
    funnel = Funnel.of(SPACE, trials())
    left = {stage.name: stage.left for stage in funnel.stages}
    pairs = [(a, b) for a in range(1, 11) for b in range(1, 11)]
    small = [p for p in pairs if p[0] * p[1] <= 20]
    even = [p for p in small if p[0] % 2 == 0]
    wide = [p for p in even if p[1] > 1]
    assert left == {
        "Cartesian": 200, "hard": 2 * len(even), "soft": 2 * len(wide),
        "tried": 5, "compiled": 4, "correct": 2, "timed": 1,
    }  # fmt: skip
    lost = {stage.name: dict(stage.lost) for stage in funnel.stages}
    assert lost["hard"] == {"small": 2 * (100 - len(small)), "even": 2 * (len(small) - len(even))}
    assert lost["soft"] == {"wide": 2 * (len(even) - len(wide))}
    assert lost["compiled"] == {"TypingError: no #": 1}
    assert lost["correct"] == {"deviates from the reference by #": 2}
    assert lost["timed"] == {"measured # s, which is no time": 1}


def test_funnels_add_up_and_are_shown() -> None:
    one = Funnel.of(SPACE, trials())
    two = one + one + Funnel.empty()
    assert [s.left for s in two.stages] == [2 * s.left for s in one.stages]
    assert two.stages[5].lost["deviates from the reference by #"] == 4
    assert two.to_json()[0] == {"stage": "Cartesian", "left": 400, "lost": {}}
    assert "correct" in str(one)
    assert "deviates from the reference by # -2" in str(one)
    assert one.svg().count("<rect") == 7
    assert "&lt;" in Funnel.of(SPACE, [Trial.failed(Choice("t"), "check", "<b>")]).svg()
