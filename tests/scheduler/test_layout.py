"""Layouts of one operand, and what they say of a node that reads it."""

from rapydli_flow.ops import Slice
from rapydli_flow.scheduler.layout import cells_along
from rapydli_flow.spec import Block, Spec


def test_a_node_is_divided_where_its_operand_is_cut() -> None:
    x, op = Spec((2, 8)), Slice(starts=(0, 4), stops=(None, None), steps=(1, 1))
    index = op.indexing(x)
    sizes = index.sizes((x,), op.out_specs(x))
    halves = Block.along((2, 8), 1, (0, 4, 8))
    assert cells_along(halves, index.inputs[0], index, sizes) == ({"b": (0, 2)}, {"b": (2, 4)})
    rest = tuple(Block((0, lo), (2, lo + 2), (2, 8)) for lo in (4, 6))  # the first half of it is nowhere
    assert cells_along(rest, index.inputs[0], index, sizes) is None
