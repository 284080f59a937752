"""Learning rates as functions of the step, numbered from 0.

A rate is any function of (step, dtype) that gives a scalar tensor of that dtype: one of these, a wrapper of
one, or your own, built of ops. Caffe's policies: fixed is `constant`, step `step_decay`, exp `exponential`,
inv `inverse`, poly `polynomial`; multistep and sigmoid have their names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..arguments import is_number, is_whole
from ..errors import GraphError, SettingError
from ..graph import Tensor
from ..ops import (
    Cast,
    ConstantRate,
    CosineDecay,
    ExponentialDecay,
    Fill,
    InverseDecay,
    LinearRise,
    MultistepDecay,
    OfStep,
    PolynomialDecay,
    SigmoidDecay,
    StepDecay,
)
from ..spec import Spec

Rate = Callable[[Tensor, str], Any]
FACTOR = "rate_factor"


def constant(rate: float) -> Rate:
    """The same rate at every step."""
    return _rule(ConstantRate, rate=positive("rate", rate))


def step_decay(rate: float, *, factor: float = 0.1, every: int) -> Rate:
    """``rate * factor ** floor(step / every)``"""
    rate, factor = positive("rate", rate), positive("factor", factor)
    return _rule(StepDecay, rate=rate, factor=factor, every=_count("every", every))


def multistep(rate: float, *, steps: Sequence[int], factor: float = 0.1) -> Rate:
    """``rate * factor ** (how many of steps are reached)``: at step 10 that of ``steps=[10, 20]`` is 1."""
    at = tuple(_count("steps", step) for step in steps)
    if not at or list(at) != sorted(set(at)):
        raise SettingError(f"learning rate: steps={list(steps)} are not one or more rising whole numbers.")
    return _rule(MultistepDecay, rate=positive("rate", rate), factor=positive("factor", factor), steps=at)


def exponential(rate: float, *, factor: float) -> Rate:
    """``rate * factor ** step``"""
    return _rule(ExponentialDecay, rate=positive("rate", rate), factor=positive("factor", factor))


def inverse(rate: float, *, gamma: float, power: float = 1.0) -> Rate:
    """``rate * (1 + gamma * step) ** -power``"""
    return _rule(InverseDecay, rate=positive("rate", rate), gamma=positive("gamma", gamma), power=float(power))


def polynomial(rate: float, *, steps: int, power: float = 1.0) -> Rate:
    """``rate * (1 - step / steps) ** power``, and 0 from step ``steps`` on."""
    power = positive("power", power)
    return _rule(PolynomialDecay, rate=positive("rate", rate), steps=_count("steps", steps), power=power)


def sigmoid(rate: float, *, gamma: float, middle: int) -> Rate:
    """``rate / (1 + exp(-gamma * (step - middle)))``: half of the rate at ``middle``; it falls where gamma < 0."""
    if not is_number(gamma) or gamma == 0.0 or not abs(gamma) < float("inf"):
        raise SettingError(f"learning rate: gamma={gamma!r} is not a finite number other than 0.")
    return _rule(SigmoidDecay, rate=positive("rate", rate), gamma=float(gamma), middle=_count("middle", middle))


def cosine(rate: float, *, steps: int, warmup: int = 0) -> Rate:
    """Rise over ``warmup`` steps, then half a cosine down to 0 at ``steps``."""
    if not is_whole(warmup) or warmup < 0:
        raise SettingError(f"learning rate: warmup={warmup!r} is not a whole number of steps, 0 or more.")
    return _rule(CosineDecay, rate=positive("rate", rate), steps=_count("steps", steps), warmup=warmup)


def warmup(rate: float | Rate, steps: int, start: float = 0.0) -> Rate:
    """Any rate, times a factor that rises from ``start`` at step 0 to 1 at ``steps`` in a line (Goyal et al. 2017)."""
    rule, steps = rate_of(rate), _count("steps", steps)
    if not is_number(start) or not 0.0 <= start < 1.0:
        raise SettingError(f"warmup: start={start!r} is not a number in [0, 1). It is the share of the rate at step 0.")

    def risen(step: Tensor, dtype: str) -> Any:
        return LinearRise(steps=steps, start=float(start), to=dtype)(step) * rule(step, dtype)

    return risen


def adjustable(rate: float | Rate) -> Rate:
    """Any rate, times the clock 'rate_factor': a number that can be set while a run goes on, 1 unless it is."""
    rule = rate_of(rate)

    def adjusted(step: Tensor, dtype: str) -> Any:
        return rule(step, dtype) * Cast(to=dtype)(_factor(step))

    return adjusted


def _factor(step: Tensor) -> Tensor:
    """The clock 'rate_factor' of the graph of ``step``; made when it is asked for first."""
    graph = step.graph
    if FACTOR in graph:
        return graph.find(FACTOR)
    spec = Spec((), "float64")
    return graph.leaf("clock", FACTOR, spec, Fill(value=1.0, shape=(), dtype=spec.dtype))


def rate_of(rate: float | Rate) -> Rate:
    """A number or a rule, as a rule whose result is checked."""
    if is_number(rate):
        return constant(rate)
    if not callable(rate):
        raise SettingError(f"learning rate: {rate!r} is not a number, or a rule such as optim.cosine(0.1, steps=1000).")

    def checked(step: Tensor, dtype: str) -> Any:
        made = rate(step, dtype)
        if not isinstance(made, Tensor):
            raise GraphError(
                f"learning rate: {rate!r} gave {type(made).__name__}, not a tensor. Build it of ops on the step, "
                "as in lambda step, dtype: 0.1 / (1.0 + ops.Cast(to=dtype)(step))."
            )
        if made.spec != Spec((), dtype):
            raise GraphError(
                f"learning rate: {rate!r} gave {made.spec} but the parameters need {Spec((), dtype)}. "
                "Cast the step to the dtype that the rule is given."
            )
        return made

    return checked


def positive(name: str, value: float) -> float:
    """The value, or SettingError where it is not a positive, finite number."""
    if not is_number(value) or not 0.0 < value < float("inf"):
        raise SettingError(f"learning rate: {name}={value!r} is not a positive, finite number.")
    return float(value)


def _count(name: str, value: int) -> int:
    return int(positive(name, value))


def _rule(op: type[OfStep], **attributes: Any) -> Rate:
    return lambda step, dtype: op(to=dtype, **attributes)(step)
