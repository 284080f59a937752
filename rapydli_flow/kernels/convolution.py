"""Convolution on arrays, of NumPy or of a GPU, with a tail in the same kernel, and its two gradients.

x is ``N,*space,C``, w is ``*window,C/groups,K``, with 1 to 3 spatial axes; what is computed is said in `ops.conv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ShapeError
from ..nn.layer import Padding, Sizes, pairs, sizes
from ..ops import Conv, ConvFilterGrad, ConvInputGrad, Op
from ..ops.conv import LAYOUT
from ..spec import Spec
from .form import Form, Specs, frozen, listed, with_tail
from .prepared import called

GEOMETRY = ("stride", "padding", "dilation", "groups", "exact", "tf32")


def conv(
    x: Any,
    w: Any,
    *,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    exact: bool = False,
    tf32: bool = False,
    bias: Any = None,
    activation: str | Op | None = None,
    residual: Any = None,
    out: Any = None,
    threads: int | None = None,
    stream: Any = None,
) -> Any:
    """``activation(convolution of x with w, + bias + residual)``, of shape ``N,*out,K``, in one kernel.

    x is ``N,*space,C`` and w is ``*window,C/groups,K``, with 1 to 3 spatial axes, all float32 or all float64, on a GPU
    also all bfloat16 or float16; bias has K numbers, residual the shape of the result. ``stride`` and ``dilation`` are
    a number or one for each axis; ``padding`` with zeros a number, one for each axis, or a (low, high) pair for each.
    ``activation`` is a name: elu, gelu, leaky_relu, relu, sigmoid, silu, softplus, swish, tanh; or an operator:
    ``ops.LeakyRelu(slope=0.2)``.
    ``exact``: no faster algorithm with larger rounding errors, such as Winograd's. ``tf32``: products of float32 may be
    rounded to 10 bits of mantissa where that is faster, on GPUs.
    ``out``: a C-contiguous array for the result, which shares no memory with an operand. ``threads``: at most so
    many, by default those of the settings; the result does not depend on it.

    Arrays of CuPy, PyTorch and others that lie on a GPU (``__cuda_array_interface__``) are computed there, and so are
    those of `to_device`; the result is of the same library. They are C-contiguous, and none is copied. Kernels go to
    ``stream``, an object of that library or a handle; by default to that which the operands name, or to CUDA's default
    stream. Nothing is waited for.

    Operands that are not C-contiguous, aligned, or in this machine's byte order are copied first. A call for new shapes
    compiles, a second or so, or loads a kernel; later ones find it prepared. Each Python thread keeps the 256 calls it
    used last, and one workspace, as large as the largest of them needs; `release` lets go of them.

    Raises ShapeError, DTypeError or SettingError for what does not fit together, or what no GPU kernel serves.
    """
    how = (*_geometry(CONV, stride, padding, dilation, groups, exact, tf32), frozen(CONV, "activation", activation))
    return called(CONV, (x, w, bias, residual), how, out, threads, stream)


def conv_input_grad(
    dy: Any,
    w: Any,
    x_shape: Sequence[int],
    *,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    exact: bool = False,
    tf32: bool = False,
    out: Any = None,
    threads: int | None = None,
    stream: Any = None,
) -> Any:
    """The gradient of `conv` with respect to x, of shape ``x_shape``: ``N,*space,C``.

    dy, ``N,*out,K``, is the gradient with respect to the convolution's own result, before bias and activation. The
    other arguments are those of `conv`. Raises ShapeError, DTypeError or SettingError for what does not fit together.
    """
    how = (
        *_geometry(INPUT_GRAD, stride, padding, dilation, groups, exact, tf32),
        frozen(INPUT_GRAD, "x_shape", x_shape),
    )
    return called(INPUT_GRAD, (dy, w), how, out, threads, stream)


def conv_filter_grad(
    x: Any,
    dy: Any,
    w_shape: Sequence[int],
    *,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    exact: bool = False,
    tf32: bool = False,
    out: Any = None,
    threads: int | None = None,
    stream: Any = None,
) -> Any:
    """The gradient of `conv` with respect to w, of shape ``w_shape``: ``*window,C/groups,K``.

    dy, ``N,*out,K``, is the gradient with respect to the convolution's own result, before bias and activation. The
    other arguments are those of `conv`. Raises ShapeError, DTypeError or SettingError for what does not fit together.
    """
    how = (
        *_geometry(FILTER_GRAD, stride, padding, dilation, groups, exact, tf32),
        frozen(FILTER_GRAD, "w_shape", w_shape),
    )
    return called(FILTER_GRAD, (x, dy), how, out, threads, stream)


def _geometry(form: Form, *values: Any) -> tuple[Any, ...]:
    return tuple(v if type(v) is int else frozen(form, name, v) for name, v in zip(GEOMETRY, values, strict=True))


def _forward(
    form: Form, x: Spec, w: Spec, stride: Any, padding: Any, dilation: Any, groups: Any, exact: Any, tf32: Any
) -> tuple[Conv, Spec]:
    """The convolution, and the spec of its result."""
    space = len(x.shape) - 2
    if space not in (1, 2, 3):
        raise ShapeError(f"kernels.{form.name}: x {x} has {space} spatial axes, not 1 to 3. {LAYOUT}")
    title = f"kernels.{form.name}"
    if type(groups) is not int or groups < 1:
        raise ShapeError(f"{title}: groups={groups!r} is not a number of 1 or more.")
    op = Conv(
        stride=sizes(title, "stride", stride, space),
        padding=pairs(title, padding, space),
        dilation=sizes(title, "dilation", dilation, space),
        groups=groups,
        exact=bool(exact),
        tf32=bool(tf32),
    )
    return op, op.infer(x, w)


def _conv(form: Form, specs: Specs, *how: Any) -> Op:
    *geometry, activation = how
    op, _ = _forward(form, specs["x"], specs["w"], *geometry)
    return with_tail(form, op, specs, activation)


def _input_grad(form: Form, specs: Specs, *how: Any) -> Op:
    *geometry, x_shape = how
    dy, w = specs["dy"], specs["w"]
    op = _matching(form, _shaped(form, "x_shape", x_shape, dy.dtype), w, dy, geometry)
    return ConvInputGrad(size=tuple(x_shape[1:-1]), **op.geometry)


def _filter_grad(form: Form, specs: Specs, *how: Any) -> Op:
    *geometry, w_shape = how
    x, dy = specs["x"], specs["dy"]
    op = _matching(form, x, _shaped(form, "w_shape", w_shape, x.dtype), dy, geometry)
    return ConvFilterGrad(window=tuple(w_shape[:-2]), **op.geometry)


def _shaped(form: Form, name: str, shape: Any, dtype: str) -> Spec:
    if not isinstance(shape, tuple):
        raise ShapeError(f"kernels.{form.name}: {name}={shape!r} is not a shape. {LAYOUT}")
    return Spec(shape, dtype)


def _matching(form: Form, x: Spec, w: Spec, dy: Spec, geometry: Sequence[Any]) -> Conv:
    """The convolution of x with w, if dy has the shape of its result."""
    op, y = _forward(form, x, w, *geometry)
    if y != dy:
        raise ShapeError(
            f"kernels.{form.name}: dy is {dy} but this convolution gives {y} ({listed({'x': x, 'w': w})}). "
            "Give the shape, stride, padding, dilation and groups of the convolution that dy belongs to."
        )
    return op


CONV = Form("conv", ("x", "w", "bias", "residual"), (*GEOMETRY, "activation"), _conv)
INPUT_GRAD = Form("conv_input_grad", ("dy", "w"), (*GEOMETRY, "x_shape"), _input_grad)
FILTER_GRAD = Form("conv_filter_grad", ("x", "dy"), (*GEOMETRY, "w_shape"), _filter_grad)
