"""The kernels that the benchmarks of a GPU run: convolutions, products, memory-bound operators, training steps.

Needs neither PyTorch nor a card, so that all of them can be compiled beforehand.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from conv_shape import DIRECTIONS, SHAPES, Shape
from networks import MOMENTUM, RATE, traced

import rapydli_flow as rf
from gpu_kernels.compile import Request, compiler, cubins, missing
from rapydli_flow import nn, ops, optim
from rapydli_flow.graph import Graph
from rapydli_flow.ops import Matmul
from rapydli_flow.runtime.building import card_request
from rapydli_flow.runtime.remembered import known
from rapydli_flow.scheduler import make_plan
from rapydli_flow.spec import HALVES, Spec
from rapydli_flow.template import Device, Epilogue, templates
from rapydli_flow.testing.gpu import bias_residual_relu
from rapydli_flow.zoo import Network, find

STORED = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16"}  # arithmetic, and what operands are stored as
PRECISION = {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16"}  # as training steps call it
FUSED = "fused"  # forward with a tail
BATCHES, MOST = 8, 128  # times the CPU table's batch, at most
NETWORKS = {"alexnet": 128, "overfeat": 128, "vgg_a": 64, "googlenet": 128, "resnet50": 64}  # and their batches


# ---- convolutions


@dataclass(frozen=True)
class Row:
    """One convolution in one direction and arithmetic."""

    shape: Shape
    direction: str
    arithmetic: str

    @property
    def fused(self) -> bool:
        return self.direction == FUSED

    def op(self) -> tuple[Any, tuple[Spec, ...], Spec]:
        """The op, its operands and its result."""
        op, ins, out = self.shape.op("forward" if self.fused else self.direction)
        dtype = STORED[self.arithmetic]
        specs = tuple(Spec(s.shape, dtype) for s in (*ins, out))
        return replace(op, tf32=self.arithmetic == "tf32"), specs[:-1], specs[-1]

    def requests(self, card: Device) -> list[Request]:
        """The default of each template that fits, that which runs untuned first."""
        op, ins, out = self.op()
        epilogue = bias_residual_relu(out) if self.fused else Epilogue.none(out)
        found: list[tuple[float, Request]] = []
        for template in templates(op.family, "cuda"):
            config = template.default(op, ins, (out,), card)
            if config is not None:
                cost = template.cost(op, ins, (out,), card, config) if template.cost else float("inf")
                found.append((cost, Request(template, op, ins, (out,), epilogue, config, card.target)))
        return [request for _, request in sorted(found, key=lambda pair: pair[0])]


def chosen(only: str, directions: Sequence[str], arithmetic: Sequence[str], shapes: Path) -> list[Row]:
    """The rows of the table that are asked for; ``only``: parts of names, parted by commas."""
    found = [Shape.read(row) for row in json.loads(shapes.read_text())]
    parts = [part for part in only.split(",") if part]
    found = [replace(s, n=min(MOST, s.n * BATCHES)) for s in found if not parts or any(p in s.name for p in parts)]
    return [Row(s, d, a) for a in arithmetic for s in found for d in directions]


# ---- products


LAYERS = [  # name, batch, inputs, outputs
    ("alexnet fc6", 128, 9216, 4096),
    ("alexnet fc7", 128, 4096, 4096),
    ("alexnet fc8", 128, 4096, 1000),
    ("vgg-a fc6", 64, 25088, 4096),
    ("resnet fc", 256, 2048, 1000),
    ("transformer", 8192, 1024, 4096),
    ("square 4096", 4096, 4096, 4096),
    ("square 8192", 8192, 8192, 8192),
]


def products(batch: int, inputs: int, outputs: int) -> dict[str, tuple[Matmul, tuple[int, int], tuple[int, int]]]:
    """The op and its operands' shapes, by direction."""
    x, w, y = (batch, inputs), (inputs, outputs), (batch, outputs)
    return {"forward": (Matmul(), x, w), "input": (Matmul(tb=True), y, w), "filter": (Matmul(ta=True), x, y)}


def requests(op: Any, ins: tuple[Spec, ...], card: Device) -> list[tuple[float, Request]]:
    """The default of each template that fits, with what its time is guessed to be."""
    outs = op.out_specs(*ins)
    found = []
    for template in templates("matmul", "cuda"):
        config = template.default(op, ins, outs, card)
        if config is not None:
            cost = template.cost(op, ins, outs, card, config) if template.cost else float("inf")
            found.append((cost, Request(template, op, ins, outs, Epilogue.none(outs[0]), config, card.target)))
    return sorted(found, key=lambda pair: pair[0])


# ---- memory-bound operators


FLOAT32 = ("cast", "momentum")  # what is never stored as halves
Case = tuple[str, Any, tuple[Spec, ...]]


def cases() -> list[Case]:
    """What networks of the zoo contain, at their batches."""
    map56, map28, map14 = Spec((64, 56, 56, 256)), Spec((128, 28, 28, 256)), Spec((64, 14, 14, 1024))
    wide, channel = Spec((64, 112, 112, 64)), Spec((256,))
    flat, scalar = Spec((64_000_000,)), Spec(())
    labels, rows = Spec((8192,), "int64"), Spec((8192, 1000))
    window = {"window": (3, 3), "stride": (2, 2), "padding": ((1, 1), (1, 1))}
    pool = ops.MaxPool(**window)
    pooled = pool.out_specs(wide)
    two = {"window": (2, 2), "stride": (2, 2), "padding": ((0, 0), (0, 0))}
    lrn = ops.LocalResponse.samples()[0].op
    found: list[Case] = [
        ("relu", ops.Relu(), (map56,)),
        ("add", ops.Add(), (map56, map56)),
        ("add a channel's bias", ops.Add(), (map56, channel)),
        ("relu gradient", ops.ReluGrad(), (map56, map56)),
        ("normalize", ops.NormalizeBy(), (map56, *[channel] * 3)),  # as plans have it: roots once a channel
        ("momentum", ops.Momentum(beta=0.9), (*[flat] * 3, scalar)),
        ("dropout", ops.Dropout(rate=0.5, stream=1), (map28, Spec((), "int64"), Spec((), "int64"))),
        ("cast to bf16", ops.Cast(to="bfloat16"), (flat,)),
        ("cast from uint8", ops.Cast(), (Spec((128, 224, 224, 3), "uint8"),)),
        ("max pool 3x3/2", pool, (wide,)),
        ("max pool gradient", ops.MaxPoolGrad(size=(112, 112), **window), (pooled[0], pooled[1])),
        ("sum pool 2x2", ops.SumPool(**two), (wide,)),
        ("sum over records and pixels", ops.Sum(axes=(0, 1, 2)), (map56,)),
        ("sum of 64 M", ops.Sum(axes=(0,)), (flat,)),
        ("moments", ops.Moments(), (map56, channel)),
        ("moments 14", ops.Moments(), (map14, Spec((1024,)))),
        ("sums of batch norm's gradient", ops.NormalizeSums(eps=1e-5), (map56, map56, channel, channel)),
        ("softmax", ops.Softmax(), (rows,)),
        ("cross entropy", ops.CrossEntropy(), (rows, labels)),
        ("cross entropy gradient", ops.CrossEntropyGrad(), (Spec((8192,)), rows, labels)),
        ("layer norm", ops.Standardize.samples()[0].op, (Spec((8192, 1024)),)),
        ("local response", lrn, (Spec((128, 27, 27, 192)),)),
        ("concatenate", ops.Concatenate(axis=3), tuple(Spec((128, 28, 28, c)) for c in (64, 128, 32, 32))),
        ("transpose", ops.Transpose(order=(0, 2, 1)), (Spec((64, 1024, 1024)),)),
    ]
    return [case for case in found if _possible(case)]


def _possible(case: Case) -> bool:
    try:
        case[1].out_specs(*case[2])
    except Exception as error:  # a case that is written wrongly is told, the others are measured
        print(f"{case[0]}: {error}")
        return False
    return True


def stored(specs: tuple[Spec, ...], dtype: str) -> tuple[Spec, ...]:
    return tuple(Spec(s.shape, dtype) if s.dtype == "float32" and s.shape else s for s in specs)


def request_of(case: Case, card: Device) -> Request | None:
    """The cheapest default of the templates that fit."""
    _, op, ins = case
    outs = op.out_specs(*ins)
    found: list[tuple[float, Request]] = []
    for template in templates(op.family, "cuda"):
        config = template.default(op, ins, outs, card)
        if config is not None:
            cost = template.cost(op, ins, outs, card, config) if template.cost else float("inf")
            found.append((cost, Request(template, op, ins, outs, Epilogue.none(outs[0]), config, card.target)))
    return min(found, key=lambda pair: pair[0])[1] if found else None


# ---- training steps


def networks(names: str = "") -> list[Network]:
    """Networks at the batches of convnet-benchmarks."""
    return [replace(find(name), batch=NETWORKS[name]) for name in (names.split(",") if names else NETWORKS)]


def training(network: Graph, arithmetic: str) -> Graph:
    """The step that is measured."""
    how = {"loss": nn.cross_entropy, "optimizer": optim.sgd(RATE, momentum=MOMENTUM)}
    return rf.train_step(network, **how, precision=PRECISION[arithmetic])


# ---- all of it


def asked(device: Device) -> Iterator[Request]:
    """Everything that the benchmarks run on a card of this kind."""
    for row in chosen("", (*DIRECTIONS, FUSED), tuple(STORED), SHAPES):
        yield from row.requests(device)
    for arithmetic, dtype in STORED.items():
        for _, *sizes in LAYERS:
            for op, a, b in products(*sizes).values():
                specs = (Spec(a, dtype), Spec(b, dtype))
                yield from (r for _, r in requests(replace(op, tf32=arithmetic == "tf32"), specs, device))
    for dtype in ("float32", "bfloat16"):
        for name, op, ins in cases():
            if not (dtype in HALVES and name.startswith(FLOAT32)):
                found = request_of((name, op, stored(ins, dtype)), device)
                yield from [found] if found else []
    for network in networks():
        for arithmetic in STORED:
            step = training(traced(network, network.batch), arithmetic)
            (program,) = make_plan(step, 1).programs(step, known(device))
            pairs = (pair for pair in program.requests if not pair[1].reference)
            yield from (card_request(*pair, device) for pair in pairs)


_asked: list[Request] = []


def _compile(number: int) -> str:
    try:
        cubins(_asked[number])
    except Exception as problem:  # whatever a compiler does: the kernel is left out, and told
        return f"{type(problem).__name__}: {problem}"
    return ""


def compile_all(requests: Sequence[Request]) -> dict[str, str]:
    """Compile in parallel what is not kept yet; by key, why something cannot be compiled."""
    if missing() is None:
        compiler()
    _asked[:] = requests  # templates are closures: processes that are forked have them
    workers = max(1, (os.cpu_count() or 2) - 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        found = pool.map(_compile, range(len(requests)), chunksize=2)
        return {request.key: why for request, why in zip(requests, found, strict=True) if why}
