"""Index formulas: reading them, blocks, partial sums, in place, multiply-adds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapydli_flow.errors import FormulaError
from rapydli_flow.index import Axis, parse
from rapydli_flow.spec import Block, Spec

CONV = "n h*2+r-1 w*2+s-1 c, r s c k -> n h w k"
CONV_INS, CONV_OUTS = (Spec((4, 8, 8, 3)), Spec((3, 3, 3, 6))), (Spec((4, 4, 4, 6)),)
BACK = "n (h-r+1)/2 (w-s+1)/2 k, r s c k -> n h w c"


def test_parse_reads_every_kind_of_axis() -> None:
    index = parse("n . h*2-r+3 0, () -> n (h-1)/2 | r=3 h=4")
    assert index.inputs[0] == (
        Axis((("n", 1),)),
        None,
        Axis((("h", 2), ("r", -1)), 3),
        Axis((), 0),
    )
    assert index.inputs[1] == ()
    assert index.outputs == ((Axis((("n", 1),)), Axis((("h", 1),), -1, 2)),)
    assert index.given == (("r", 3), ("h", 4))
    assert parse("-> ()").inputs == ()


def test_axis_knows_its_letters() -> None:
    axis = parse("h*2+r-1 -> h | r=3").inputs[0][0]
    assert axis is not None
    assert (axis.letter, axis.letters) == (None, ("h", "r"))
    assert parse("h -> h").inputs[0][0].letter == "h"  # type: ignore[union-attr]


def test_repeated_letters_add_up() -> None:
    assert parse("h+h -> h").inputs[0][0] == Axis((("h", 2),))


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("n h", "index formula 'n h' has no '->'. Write 'inputs -> outputs'."),
        ("n H -> n", "cannot read axis 'H'. Write '.', a letter,"),
        ("n h**2 -> n", r"cannot read axis 'h\*\*2'"),
        ("n (h)/0 -> n", r"cannot read axis '\(h\)/0'"),
        ("n -> n | r", "cannot read 'r'. Write 'r=3' behind the bar."),
        ("n -> n | rs=3", "cannot read 'rs=3'"),
    ],
)
def test_parse_refuses(formula: str, message: str) -> None:
    with pytest.raises(FormulaError, match=message):
        parse(formula)


def test_sizes_come_from_plain_axes_and_the_bar() -> None:
    assert parse(CONV).sizes(CONV_INS, CONV_OUTS) == dict(n=4, c=3, r=3, s=3, k=6, h=4, w=4)
    assert parse("h+r -> h | r=2").sizes((Spec((6,)),), (Spec((5,)),)) == dict(h=5, r=2)


@pytest.mark.parametrize(
    ("formula", "ins", "outs", "message"),
    [
        ("n c -> n", (Spec((2,)),), (Spec((2,)),), r"gives an operand 2 axes but its spec is f32\[2\]"),
        ("n -> n", (Spec((2,)),), (Spec((3,)),), r"letter n is 2 in one operand and 3 in another \(f32\[2\], f32\[3\]"),
        ("h+r -> h", (Spec((4,)),), (Spec((3,)),), r"no operand tells the size of r. Give it behind a bar: .* \| r=3'"),
    ],
)
def test_sizes_refuse(formula: str, ins: tuple[Spec, ...], outs: tuple[Spec, ...], message: str) -> None:
    with pytest.raises(FormulaError, match=message):
        parse(formula).sizes(ins, outs)


def test_splitting_rows_of_a_convolution_needs_a_halo() -> None:
    need, give = parse(CONV).blocks(CONV_INS, CONV_OUTS, {"h": (1, 3)})
    assert give == (Block((0, 1, 0, 0), (4, 3, 4, 6), (4, 4, 4, 6)),)
    assert need[0] == Block((0, 1, 0, 0), (4, 6, 8, 3), (4, 8, 8, 3))  # rows 2*1-1 to 2*2+2-1
    assert need[1] == Block.all((3, 3, 3, 6))


def test_padding_is_cut_off() -> None:
    need, _ = parse(CONV).blocks(CONV_INS, CONV_OUTS, {"h": (0, 1)})
    assert (need[0].lo[1], need[0].hi[1]) == (0, 2)


def test_only_exact_quotients_count() -> None:
    ins, outs = (Spec((4, 4, 4, 6)), Spec((3, 3, 3, 6))), (Spec((4, 8, 8, 3)),)
    need, _ = parse(BACK).blocks(ins, outs, {"h": (3, 5)})
    assert (need[0].lo[1], need[0].hi[1]) == (1, 3)  # (3-2+1)/2 to (4-0+1)/2, whole ones


def test_no_letter_gives_whole_operands() -> None:
    need, give = parse(CONV).blocks(CONV_INS, CONV_OUTS, {})
    assert need == tuple(Block.all(s.shape) for s in CONV_INS)
    assert give == tuple(Block.all(s.shape) for s in CONV_OUTS)


def test_a_block_outside_is_empty_not_negative() -> None:
    need, _ = parse("h-5 -> h").blocks((Spec((4,)),), (Spec((9,)),), {"h": (0, 2)})
    assert need[0].empty


@pytest.mark.parametrize(
    ("formula", "letters"),
    [
        (CONV, ("n", "h", "w", "k", "c", "r", "s")),
        ("n h g*2+c, r . g*3+k -> n h g*3+k | g=2 c=2 k=3", ("n", "h", "r")),
        ("n ., n -> n", ("n",)),
        ("() -> ()", ()),
    ],
)
def test_splittable(formula: str, letters: tuple[str, ...]) -> None:
    assert parse(formula).splittable() == letters


def test_partial_sums() -> None:
    assert parse(CONV).partial("c") == (True,)
    assert parse(CONV).partial("h") == (False,)
    assert parse("n c, c -> c, n c").partial("n") == (True, False)


def test_in_place() -> None:
    index = parse("a b, b, 0 b, a . -> a b, b")
    assert [index.in_place(i, 0) for i in range(4)] == [True, False, False, False]
    assert index.in_place(1, 1)
    assert not parse("a . -> a .").in_place(0)
    assert not parse("a a -> a a").in_place(0)


def test_multiply_adds() -> None:
    assert parse(CONV).multiply_adds(CONV_INS, CONV_OUTS) == 4 * 4 * 4 * 6 * 3 * 3 * 3
    assert parse("n ., n -> n").multiply_adds((Spec((4, 8)), Spec((4,), "int64")), (Spec((4,)),)) == 32


def test_reads_enumerates_pairs_and_leaves_padding_out() -> None:
    pairs = sorted(parse("h+r-1, r -> h").reads((Spec((2,)), Spec((2,))), (Spec((2,)),)))
    assert pairs == [  # at h=0, r=0 the first operand is padding, so the second is not read there
        (0, (0,), 0, (0,)),
        (0, (0,), 0, (1,)),
        (0, (1,), 0, (1,)),
        (1, (0,), 0, (1,)),
        (1, (1,), 0, (0,)),
        (1, (1,), 0, (1,)),
    ]
    assert list(parse("n . -> n").reads((Spec((1, 3)),), (Spec((1,)),))) == [(0, (0, None), 0, (0,))]
    assert list(parse("(h)/2 -> h").reads((Spec((2,)),), (Spec((3,)),))) == [(0, (0,), 0, (0,)), (0, (1,), 0, (2,))]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_blocks_are_the_hull_of_what_is_read(data: st.DataObject) -> None:
    number = lambda lo, hi: data.draw(st.integers(lo, hi))  # noqa: E731
    stride, dilation, low, size, window, out = (
        number(1, 3),
        number(1, 2),
        number(-1, 2),
        number(4, 9),
        number(1, 3),
        4,
    )
    formula = data.draw(st.sampled_from((f"h*{stride}+r*{dilation}{-low:+d}", f"(h-r*{dilation}{low:+d})/{stride}")))
    index, ins, outs = parse(f"{formula} -> h | r={window}"), (Spec((size,)),), (Spec((out,)),)
    lo = number(0, out - 1)
    hi = number(lo + 1, out)
    need, _ = index.blocks(ins, outs, {"h": (lo, hi)})
    read = sorted({a[0] for _, a, _, b in index.reads(ins, outs) if lo <= b[0] < hi})  # type: ignore[operator,type-var]
    if read:
        assert need[0].lo[0] <= read[0]  # type: ignore[operator]
        assert need[0].hi[0] > read[-1]  # type: ignore[operator]
    if "/" not in formula:
        touched = [h * stride + r * dilation - low for h in range(lo, hi) for r in range(window)]
        hull = max(0, min(touched)), max(min(size, max(touched) + 1), max(0, min(touched)))
        assert (need[0].lo[0], need[0].hi[0]) == hull
