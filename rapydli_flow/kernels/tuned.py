"""Tuning one of the functions for the shapes of its operands."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..arguments import nearest
from ..config import settings
from ..errors import ArgumentError
from ..runtime.devices import device_of
from ..space import Rules
from ..spec import Spec
from ..template import Device
from ..tuner import Request, Tuning
from .convolution import CONV, FILTER_GRAD, INPUT_GRAD, conv, conv_filter_grad, conv_input_grad
from .dense import MATMUL, matmul
from .form import FLOATS, Form, frozen
from .on_card import DTYPES, device_with, on_card, seen
from .operands import taken
from .prepared import release

if TYPE_CHECKING:
    from ..runtime.session import Progress
    from ..runtime.tuning_report import TuningReport

FUNCTIONS: dict[str, tuple[Form, Callable[..., Any]]] = {
    "conv": (CONV, conv),
    "conv_filter_grad": (FILTER_GRAD, conv_filter_grad),
    "conv_input_grad": (INPUT_GRAD, conv_input_grad),
    "matmul": (MATMUL, matmul),
}


def tune(
    function: str,
    *operands: Any,
    budget_s: float = 20.0,
    trials: int | None = None,
    strategy: str = "guided",
    soft: Rules = (),
    threads: int | None = None,
    device: str | None = None,
    watch: Callable[[Progress], None] | None = None,
    **how: Any,
) -> TuningReport:
    """Find the fastest config of a function for these operands within ``budget_s`` seconds, and remember it.

    ``function`` is its name: 'conv', 'conv_input_grad', 'conv_filter_grad' or 'matmul'; operands and ``how`` are what
    it is called with. An operand may be an array, a `Spec`, or a tuple that is its shape in float32; only shapes and
    dtypes count, and random numbers are drawn. ``device``: what it is tuned for, 'cpu', 'cuda' and so on; by default
    that on which the operands lie, and the processor for Specs and shapes. ``trials``, ``strategy``, ``soft`` and
    ``watch`` are those of `rapydli_flow.autotune`; results are kept with those of networks, and a network's serve
    here.

    Calls use what was found from now on, in every process of this user on this host that has not prepared them yet.
    Raises what the function would raise, and SettingError where RAPYDLI_TUNING lets nothing be tuned.
    """
    request, on = _request(function, operands, how, device)
    from ..runtime.tuning import tune_one  # here: it loads Dask, which calls do without

    report: TuningReport = tune_one(
        request,
        threads or settings().threads,
        on,
        budget_s=budget_s,
        trials=trials,
        strategy=strategy,
        soft=soft,
        watch=watch,
    )
    release()
    return report


def _request(
    function: str, operands: tuple[Any, ...], how: dict[str, Any], device: str | None
) -> tuple[Request, Device]:
    """The kernel that a call would need, and what it is for."""
    if function not in FUNCTIONS:
        raise ArgumentError(
            f"kernels.tune: there is no function {function!r}.{nearest(str(function), FUNCTIONS)} There are "
            f"{', '.join(FUNCTIONS)}."
        )
    form, call = FUNCTIONS[function]
    try:
        bound = inspect.signature(call).bind(*operands, **how)
    except TypeError as error:
        raise ArgumentError(f"kernels.tune: {function} is not called like this: {error}.") from None
    bound.apply_defaults()
    given = bound.arguments
    there = [given[name] for name in form.operands if on_card(given[name])]
    on = device_with(there[0]) if there and device is None else device_of(device or "cpu", "kernels.tune")
    specs = {name: _spec(form, name, given[name]) for name in form.operands if given[name] is not None}
    settled = [frozen(form, name, given[name]) for name in form.how]
    op, ins = form.of(specs, settled, FLOATS if on.kind == "cpu" else DTYPES)
    return Tuning(on).serve(op, ins)[0], on


def _spec(form: Form, name: str, x: Any) -> Spec:
    if isinstance(x, Spec):
        return x
    if isinstance(x, tuple) and all(type(size) is int for size in x):
        return Spec(x)
    if on_card(x):
        return seen(form, name, x).spec
    array = taken(form, name, x)
    return Spec(array.shape, array.dtype.name)
