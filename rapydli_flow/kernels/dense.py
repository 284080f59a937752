"""The matrix product on arrays, with bias, residual and activation in the same kernel."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import SettingError
from ..ops import Matmul, Op
from ..spec import Array
from .form import Form, Specs, frozen, with_tail
from .prepared import called


def matmul(
    a: Any,
    b: Any,
    *,
    ta: bool = False,
    tb: bool = False,
    bias: Any = None,
    activation: str | Op | None = None,
    residual: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """``activation(a b + bias + residual)``, of shape M,K, in one kernel; a dense layer and its gradients.

    a is M,I, or I,M with ``ta``; b is I,K, or K,I with ``tb``; bias has K numbers, residual the shape of the result;
    all are float32, or all float64. The transposed view ``w.T`` of a matrix is taken as it lies in memory, not copied.
    The other arguments, and what is kept between calls, are those of `conv`.

    Raises ShapeError, DTypeError or SettingError for what does not fit together.
    """
    if type(ta) is not bool or type(tb) is not bool:
        raise SettingError(f"kernels.matmul: ta={ta!r} and tb={tb!r} must be True or False.")
    (a, turned_a), (b, turned_b) = _as_it_lies(a), _as_it_lies(b)
    how = (ta ^ turned_a, tb ^ turned_b, frozen(MATMUL, "activation", activation))
    return called(MATMUL, (a, b, bias, residual), how, out, threads)


def _as_it_lies(x: Any) -> tuple[Any, bool]:
    """A matrix whose columns lie one behind the other, as its transpose."""
    if type(x) is np.ndarray and x.ndim == 2 and x.flags.f_contiguous and not x.flags.c_contiguous:
        return x.T, True
    return x, False


def _matmul(form: Form, specs: Specs, ta: bool, tb: bool, activation: Any) -> Op:
    return with_tail(form, Matmul(ta=ta, tb=tb), specs, activation)


MATMUL = Form("matmul", ("a", "b", "bias", "residual"), ("ta", "tb", "activation"), _matmul)
