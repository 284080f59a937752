"""PyTorch's side of the benchmarks: the same training step and prediction, in both layouts, or by torch.compile."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from memory import peak
from networks import MOMENTUM, RATE, dropout_of
from pytorch import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from twins import published, twin

from rapydli_flow.graph import Graph
from rapydli_flow.zoo import Network

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
COMPILED = "compile"  # on channels_last


class _Side:
    """A module in a layout, and batches as it takes them."""

    def __init__(self, module: nn.Module, layout: str) -> None:
        self.layout = LAYOUTS["channels_last" if layout == COMPILED else layout]
        self.module = module.to(memory_format=self.layout)  # type: ignore[call-overload]
        # one shape: a second network in a process would else be compiled for any, which is slower and takes far longer
        compiled = layout == COMPILED
        self.call: Callable[..., Any] = torch.compile(self.module, dynamic=False) if compiled else self.module

    def tensors(self, x: Any, label: Any) -> tuple[Any, Any]:
        """Our batch N,H,W,C as N,C,H,W in this layout."""
        x = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        return x.contiguous(memory_format=self.layout), torch.from_numpy(label)


class Step(_Side):
    """Forward, loss, backward, SGD with momentum; eager but for the network itself under torch.compile."""

    def __init__(self, module: nn.Module, layout: str) -> None:
        super().__init__(module.train(), layout)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=RATE, momentum=MOMENTUM)
        self.loss = nn.CrossEntropyLoss()

    def __call__(self, x: Any, label: Any) -> float:
        """The loss of a batch, before the update."""
        self.optimizer.zero_grad()
        loss = self.loss(self.call(x), label)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


class DistributedStep(Step):
    """A step of one of several processes, each with records of its own: DistributedDataParallel averages gradients.

    Gradients lie in the buckets that are summed, which saves it a copy.
    """

    def __init__(self, module: nn.Module, layout: str) -> None:
        super().__init__(module, layout)
        self.call = DistributedDataParallel(self.module, gradient_as_bucket_view=True)


class Prediction(_Side):
    """Scores of a batch under eval() and inference_mode."""

    def __init__(self, module: nn.Module, layout: str) -> None:
        super().__init__(module.eval(), layout)

    def __call__(self, x: Any, _: Any = None) -> Any:
        """The scores, N,classes, as an array."""
        with torch.inference_mode():
            return self.call(x).numpy()


def with_state(case: Network, graph: Graph, state: Mapping[str, Any], *, dropout: bool = False) -> nn.Module:
    """The twin with our state."""
    return twin(case.name, graph, state, dropout=dropout_of(case) if dropout else 0.0)


def alone(case: Network) -> nn.Module:
    """The twin as a process has it that knows nothing of our side."""
    return published(case.name, case.classes, dropout=dropout_of(case))


def without_compile(what: str, case: Network, batch: int, given: Namespace) -> str:
    """Why a network is measured without torch.compile, '' if it is measured with it.

    A process of its own tries first, which can be stopped, and leaves what it compiled in the compiler's cache.
    """
    if not given.compile:
        return "not asked for (--compile)"
    tried = peak(what, COMPILED, case.name, batch=batch, threads=given.threads, limit_s=given.compile_limit)
    return str(tried.get("error", ""))


def sides(
    make: type[Step] | type[Prediction], module: Callable[[], nn.Module], data: list[tuple[Any, Any]], *, without: str
) -> tuple[dict[str, Any], str]:
    """Each layout as a side, from modules that are made anew; and why there is none of torch.compile ('' if there is).

    ``without``: why none is wanted. A compiled side has run once: its compiler may not get through this network.
    """
    made: dict[str, Any] = {layout: make(module(), layout) for layout in LAYOUTS}
    if without:
        return made, without
    try:
        side = make(module(), COMPILED)
        fed = side.tensors(*data[0])
        kept = {name: value.clone() for name, value in side.module.state_dict().items()}
        side(*fed)
        side.module.load_state_dict(kept)  # the step that compiled is no step of the comparison
        if isinstance(side, Step):
            side.optimizer.state.clear()
    except Exception as error:  # whatever a compiler does: the reason is kept in the results
        return made, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return {**made, COMPILED: side}, ""
