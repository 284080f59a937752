"""The matrix product on arrays, with bias, residual and activation in the same kernel."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import SettingError
from ..ops import Matmul, Op
from .form import Form, Specs, frozen, with_tail
from .on_card import on_card, turned
from .prepared import called


def matmul(
    a: Any,
    b: Any,
    *,
    ta: bool = False,
    tb: bool = False,
    tf32: bool = False,
    bias: Any = None,
    activation: str | Op | None = None,
    residual: Any = None,
    out: Any = None,
    threads: int | None = None,
    stream: Any = None,
) -> Any:
    """``activation(a b + bias + residual)``, of shape M,K, in one kernel; a dense layer and its gradients.

    a is M,I, or I,M with ``ta``; b is I,K, or K,I with ``tb``; bias has K numbers, residual the shape of the result;
    all are float32, or all float64, on a GPU also bfloat16 or float16. The transposed view ``w.T`` of a matrix is taken
    as it lies in memory, not copied. The other arguments, and what is kept between calls, are those of `conv`.

    Raises ShapeError, DTypeError or SettingError for what does not fit together.
    """
    if type(ta) is not bool or type(tb) is not bool:
        raise SettingError(f"kernels.matmul: ta={ta!r} and tb={tb!r} must be True or False.")
    (a, turned_a), (b, turned_b) = _as_it_lies(a), _as_it_lies(b)
    how = (ta ^ turned_a, tb ^ turned_b, bool(tf32), frozen(MATMUL, "activation", activation))
    return called(MATMUL, (a, b, bias, residual), how, out, threads, stream)


def _as_it_lies(x: Any) -> tuple[Any, bool]:
    """A matrix whose columns lie one behind the other, as its transpose."""
    if type(x) is np.ndarray:
        columns = x.ndim == 2 and x.flags.f_contiguous and not x.flags.c_contiguous
    else:
        columns = on_card(x) and turned(x)
    return (x.T, True) if columns else (x, False)


def _matmul(form: Form, specs: Specs, ta: bool, tb: bool, tf32: bool, activation: Any) -> Op:
    return with_tail(form, Matmul(ta=ta, tb=tb, tf32=tf32), specs, activation)


MATMUL = Form("matmul", ("a", "b", "bias", "residual"), ("ta", "tb", "tf32", "activation"), _matmul)
