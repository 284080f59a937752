"""Spec, Block and even_bounds."""

from itertools import pairwise

import numpy as np
import pytest

from rapydli_flow.errors import DTypeError, RapydliError, ShapeError, UnknownOp
from rapydli_flow.spec import Block, Spec, even_bounds


def test_spec_counts_elements_and_bytes() -> None:
    spec = Spec((2, 3, 4), "float64")
    assert (spec.size, spec.size_bytes, spec.floating) == (24, 192, True)
    assert str(spec) == "f64[2,3,4]"
    assert str(Spec((), "uint8")) == "u8[]"
    assert not Spec((2,), "int64").floating


def test_spec_normalises_sizes_and_dtypes() -> None:
    assert Spec((np.int64(2), 3), np.dtype("float32")) == Spec((2, 3))
    assert hash(Spec((2,), np.float64)) == hash(Spec((2,), "float64"))


def test_spec_refuses_negative_sizes() -> None:
    with pytest.raises(ShapeError, match=r"Spec: shape \(2, -1\) has a negative size. Sizes are 0 or more."):
        Spec((2, -1))


def test_spec_refuses_unknown_dtypes() -> None:
    with pytest.raises(
        DTypeError, match="Spec: dtype complex64 is not one of float32, float64, bfloat16, float16, int64, int32, uint8"
    ):
        Spec((2,), "complex64")


def test_block_of_a_whole_array() -> None:
    block = Block.all((4, 5))
    assert block == Block((0, 0), (4, 5), (4, 5))
    assert block.shape == (4, 5)
    assert not block.empty
    assert str(block) == "[0:4,0:5]"


def test_blocks_along_an_axis_cover_the_array() -> None:
    array = np.arange(20).reshape(4, 5)
    parts = Block.along(array.shape, 1, (0, 2, 5))
    assert [part.shape for part in parts] == [(4, 2), (4, 3)]
    assert np.array_equal(np.concatenate([array[part.slices] for part in parts], 1), array)


@pytest.mark.parametrize("most", [1, 2, 5, 7, 12, 30, 1000])
def test_a_block_is_cut_into_smaller_ones(most: int) -> None:
    block = Block((1, 0, 2), (4, 1, 12), (5, 2, 20))
    array = np.arange(200).reshape(block.whole)
    parts = list(block.cut(most))
    assert all(0 < part.size <= most for part in parts)
    assert (
        np.concatenate([array[part.slices].ravel() for part in parts]).tolist() == array[block.slices].ravel().tolist()
    )
    assert list(Block.all(()).cut(1)) == [Block.all(())]


def test_an_empty_block() -> None:
    assert Block((2, 1), (2, 3), (4, 4)).empty


@pytest.mark.parametrize(("size", "parts"), [(10, 3), (7, 7), (3, 4), (0, 2)])
def test_even_bounds(size: int, parts: int) -> None:
    bounds = even_bounds(size, parts)
    widths = [b - a for a, b in pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(widths)) == (0, size, parts)
    assert max(widths) - min(widths) <= 1
    assert widths == sorted(widths, reverse=True)


def test_errors_are_also_builtins_and_print_plainly() -> None:
    assert issubclass(ShapeError, ValueError)
    assert issubclass(ShapeError, RapydliError)
    assert str(UnknownOp("no op is named 'x'")) == "no op is named 'x'"
    assert str(UnknownOp()) == ""
