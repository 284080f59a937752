"""What parameters start from: the moments of each initialiser, and that blocks do not depend on how they are cut."""

from typing import Any

import numpy as np
import pytest

import rapydli_flow as rf
from rapydli_flow import nn
from rapydli_flow.errors import SettingError
from rapydli_flow.nn import initial
from rapydli_flow.ops import Leaf, Op
from rapydli_flow.spec import Block

SHAPE, FANS = (40, 50), (40, 50)


def drawn(init: Any, shape: tuple[int, ...] = SHAPE, fans: tuple[int, int] = FANS, seed: int = 3) -> Any:
    op: Op = init(shape, "float64", fans, 17)
    leaf = Leaf(kind="param", label="w", shape=shape, dtype="float64", init=op)
    whole = leaf.start(seed, Block.all(shape))
    for axis, size in enumerate(shape):
        parts = [leaf.start(seed, block) for block in Block.along(shape, axis, (0, size // 3, size))]
        np.testing.assert_array_equal(np.concatenate(parts, axis), whole)
    return whole


@pytest.mark.parametrize(
    ("init", "variance"),
    [
        (initial.he(), 2 / 40),
        (initial.he(1.0, fan="out", distribution="uniform"), 1 / 50),
        (initial.lecun(), 1 / 40),
        (initial.xavier(), 1 / 45),
        (initial.xavier(fan="in"), 1 / 40),
        (initial.xavier(distribution="normal"), 1 / 45),
        (initial.normal(0.3), 0.09),
        (initial.uniform(0.3), 0.09 / 3),
    ],
)
def test_variance(init: Any, variance: float) -> None:
    w = drawn(init)
    assert w.var() == pytest.approx(variance, rel=0.12)  # 2000 numbers: 3 sigma are 0.1
    assert abs(w.mean()) < 4 * (variance / w.size) ** 0.5


def test_uniform_numbers_fill_their_interval() -> None:
    w = drawn(initial.xavier())
    limit = (6 / 90) ** 0.5
    assert 0.99 * limit < np.abs(w).max() <= limit


def test_truncated_normal() -> None:
    w = drawn(initial.truncated_normal(0.5))
    assert 0.95 < np.abs(w).max() <= 1.0
    assert w.std() == pytest.approx(0.5 * 0.8796, rel=0.05)
    plain = drawn(initial.normal(0.5))
    same = np.abs(plain) <= 1.0
    np.testing.assert_array_equal(w[same], plain[same])  # only what was outside is drawn again


@pytest.mark.parametrize("shape", [(12, 5), (3, 2, 9), (7, 7)])
def test_orthogonal(shape: tuple[int, ...]) -> None:
    w = drawn(initial.orthogonal(1.5), shape).reshape(-1, shape[-1])
    small = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
    np.testing.assert_allclose(small, 2.25 * np.eye(len(small)), atol=1e-12)
    other = drawn(initial.orthogonal(1.5), shape, seed=4).reshape(w.shape)
    assert np.abs(other - w).max() > 0.1


def test_constant() -> None:
    assert (drawn(initial.constant(0.25)) == 0.25).all()


def test_layers_take_initialisers() -> None:
    def network(x: Any) -> Any:
        return nn.dense(nn.conv(x, 8, 3, init=nn.orthogonal()), 3, init=initial.constant(0.5))

    state = rf.init(rf.trace(network, rf.Spec((2, 6, 6, 1), "float64")))
    w = state["conv_1/w"].reshape(9, 8)
    np.testing.assert_allclose(w.T @ w, np.eye(8), atol=1e-12)
    assert (state["dense_1/w"] == 0.5).all()


def test_what_is_refused() -> None:
    with pytest.raises(SettingError, match="xavier: fan='both' is not one of in, out, average"):
        nn.xavier(fan="both")
    with pytest.raises(SettingError, match="he: distribution='cauchy' is not one of normal, uniform"):
        nn.he(distribution="cauchy")
    with pytest.raises(SettingError, match="normal: std=0 is not a positive"):
        nn.normal(0)
