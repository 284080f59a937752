"""A network and the same in PyTorch, on equal numbers: outputs, and gradients of every input and parameter.

Ours run as compiled kernels, through `rapydli_flow.compile`. Data here is channels-last; `first` turns an
array to PyTorch's channels-first, `last` back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import rapydli_flow as rf
from rapydli_flow.graph import Graph, Tensor, clean, gradients, training
from rapydli_flow.ops import Multiply, Sum

TOLERANCE = {"float32": 1e-4, "float64": 1e-8}


@dataclass(frozen=True)
class Case:
    """``ours(*tensors)`` and ``theirs(*tensors, **parameters)`` on inputs of these shapes.

    An input is drawn from N(0, 1), from a range ``(lo, hi)`` (whole numbers if both are), or given as an array.
    Parameters of ours are drawn too, and given to theirs by label: 'w', 'b', ...
    """

    name: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    shapes: Sequence[tuple[int, ...]]
    draws: Mapping[int, Any] = field(default_factory=dict)
    differentiable: bool = True


def first(x: Any) -> Any:
    """N,*space,C -> N,C,*space"""
    return x.movedim(-1, 1)


def last(x: Any) -> Any:
    """N,C,*space -> N,*space,C"""
    return x.movedim(1, -1)


def filters(w: Any) -> Any:
    """*window,C,K -> K,C,*window"""
    return w.movedim((-1, -2), (0, 1))


def draw(case: Case, dtype: str, rng: np.random.Generator) -> list[np.ndarray]:
    """The inputs."""
    out = []
    for i, shape in enumerate(case.shapes):
        how = case.draws.get(i)
        if isinstance(how, np.ndarray):
            out.append(how)
        elif how is None:
            out.append(rng.normal(size=shape).astype(dtype))
        elif all(isinstance(v, int) for v in how):
            out.append(rng.integers(*how, size=shape))
        else:
            out.append(rng.uniform(*how, size=shape).astype(dtype))
    return out


def traced(case: Case, dtype: str) -> tuple[Graph, dict[str, np.ndarray], list[Tensor]]:
    """The graph of ours with the gradient of ``sum(y * dy)``, what it is fed, and what it is differentiated by."""
    rng = np.random.default_rng(sum(map(ord, case.name)))
    values = draw(case, dtype, rng)
    feeds = {f"x{i}": x for i, x in enumerate(values)}
    specs = {name: rf.Spec(x.shape, x.dtype.name) for name, x in feeds.items()}
    graph = training(rf.trace(_named(case.ours, list(feeds)), **specs))
    if not case.differentiable:
        return graph, feeds, []
    y = graph.tensor(graph.outputs["y"])
    feeds["dy"] = np.asarray(rng.normal(size=y.shape), dtype)
    product = Multiply()(y, graph.leaf("batch", "dy", y.spec))
    loss = Sum(axes=tuple(range(len(y.shape))))(product) if y.shape else product
    wanted = [graph.find(name) for name, spec in specs.items() if spec.floating] + graph.leaves("param")
    found = gradients(graph, loss, wanted)
    graph.outputs |= {f"d{x.name}": g.id for x, g in zip(wanted, found, strict=True)}
    return clean(graph), feeds, wanted


def check(case: Case, dtype: str) -> None:
    """AssertionError where outputs or gradients differ by more than 1e-4 (float32) or 1e-8 (float64), relatively."""
    graph, feeds, wanted = traced(case, dtype)
    rng = np.random.default_rng(7)
    state = {k: np.asarray(rng.normal(size=v.shape), v.dtype) for k, v in rf.init(graph).items()}
    got = rf.compile(graph, feeds, state=state).compute()

    theirs = {name: torch.tensor(x, requires_grad=x.dtype.kind == "f") for name, x in {**feeds, **state}.items()}
    inputs = [theirs[name] for name in feeds if name != "dy"]
    want = case.theirs(*inputs, **{name.rpartition("/")[2]: theirs[name] for name in state})
    compare(case.name, "y", got["y"], want)
    if case.differentiable:
        (want * theirs["dy"].detach()).sum().backward()
        for x in wanted:
            compare(case.name, f"d{x.name}", got[f"d{x.name}"], theirs[x.name].grad)


def compare(name: str, what: str, got: np.ndarray, want: Any) -> None:
    """Equal shapes, and differences small beside the largest element."""
    want = want.detach().numpy()
    assert got.shape == want.shape, f"{name}: {what} has shape {got.shape}, PyTorch's has {want.shape}"
    if got.dtype.kind != "f":
        np.testing.assert_array_equal(got, want, err_msg=f"{name}: {what}")
        return
    worst = float(np.abs(got - want).max(initial=0.0) / max(1.0, float(np.abs(want).max(initial=0.0))))
    assert worst <= TOLERANCE[got.dtype.name], f"{name}: {what} differs by {worst:.3g} of its largest element"


def _named(function: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """The function with parameters of these names, as `trace` reads them."""
    scope: dict[str, Any] = {"function": function}
    exec(f"def network({', '.join(names)}): return function({', '.join(names)})", scope)
    return scope["network"]
