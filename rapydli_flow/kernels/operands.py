"""Arrays as kernels take them: what is not contiguous, aligned, native is copied; where results go is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import DTypeError, ShapeError
from ..spec import Array, Spec
from .form import FLOATS, Form, refused_dtype


def taken(form: Form, name: str, x: Any) -> Array:
    """An operand as a C-contiguous, aligned array in the byte order of this machine: itself if it is one, else a copy.

    Anything that NumPy takes for an array will do; DTypeError unless it holds float32 or float64.
    """
    if isinstance(x, np.ma.MaskedArray):
        raise DTypeError(
            f"kernels.{form.name}: {name} is a masked array, and kernels know no masks. Give x.filled(value)."
        )
    array = np.asarray(x)
    if array.dtype.name not in FLOATS:
        raise refused_dtype(form, name, array.dtype)
    return np.require(array, array.dtype.newbyteorder("="), ("C", "A"))


def target(form: Form, out: Any, spec: Spec, dtype: Any) -> Array:
    """The array that a result is written to: ``out``, which a kernel must be able to fill as it is."""
    if type(out) is np.ndarray and out.shape == spec.shape and out.dtype == dtype and out.flags.carray:
        return out  # carray: contiguous, aligned, writeable
    way_out = "Leave it out, or give a C-contiguous array of its own."
    if not isinstance(out, np.ndarray):
        raise DTypeError(f"kernels.{form.name}: out is a {type(out).__name__}, not a NumPy array. {way_out}")
    if out.shape != spec.shape or out.dtype != dtype:
        raise ShapeError(
            f"kernels.{form.name}: out is {out.dtype}{list(out.shape)} but the result is {spec.dtype}"
            f"{list(spec.shape)}. {way_out}"
        )
    for kept, fault in (
        (out.flags.writeable, "is read-only"),
        (out.flags.c_contiguous, f"is not C-contiguous (strides {out.strides})"),
        (out.flags.aligned, f"is not aligned to its elements (address {out.ctypes.data})"),
    ):
        if not kept:
            raise ShapeError(f"kernels.{form.name}: out {fault}. {way_out}")
    return out


def check_apart(form: Form, names: Sequence[str], arrays: Sequence[Array], out: Array) -> None:
    """ShapeError if ``out`` shares memory with an operand; all are contiguous, so bounds tell."""
    for name, array in zip(names, arrays, strict=True):
        if np.may_share_memory(array, out):
            raise ShapeError(
                f"kernels.{form.name}: out shares memory with {name}, which is still read while out is written. "
                "Leave it out, or give an array of its own."
            )
