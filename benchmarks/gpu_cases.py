"""What `gpu_check.py` checks: every GPU template on the samples of its ops and on larger, odd sizes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpu_kernels.compile import Request
from rapydli_flow import ops
from rapydli_flow.ops import Sample
from rapydli_flow.spec import HALVES, Spec
from rapydli_flow.template import Device, Epilogue, Template, templates
from rapydli_flow.testing.gpu import as_dtype, bias_residual_relu, samples_of


@dataclass(frozen=True)
class Case:
    """A template on a sample; ``fused``: with bias, residual and ReLU before the store."""

    name: str
    template: Template
    sample: Sample
    fused: bool = False

    @property
    def outs(self) -> tuple[Spec, ...]:
        return self.sample.op.out_specs(*self.sample.ins)

    @property
    def epilogue(self) -> Epilogue:
        return bias_residual_relu(self.outs[0]) if self.fused else Epilogue.none(self.outs[0])

    def request(self, card: Device, config: dict[str, Any]) -> Request:
        return Request(self.template, self.sample.op, self.sample.ins, self.outs, self.epilogue, config, card.target)

    def requests(self, card: Device, *, others: int) -> list[Request]:
        """The default config and ``others`` more by chance."""
        op, ins, outs, template = self.sample.op, self.sample.ins, self.outs, self.template
        default = template.default(op, ins, outs, card)
        if default is None:
            return []
        draw, found = random.Random(self.name), [default]
        for _ in range(300 if others else 0):
            if len(found) > others:
                break
            config = {name: draw.choice(values) for name, values in template.values(card).items()}
            if config not in found and template.fits(op, ins, outs, card, **config):
                found.append(config)
        return [self.request(card, config) for config in found]


def conv(x: tuple[int, ...], w: tuple[int, ...], **how: Any) -> tuple[Any, tuple[Spec, Spec]]:
    """A convolution with one stride, padding and dilation for all axes."""
    n = len(x) - 2
    stride, padding, dilation, groups = (
        how.get(k, d) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
    )
    pairs = ((padding, padding),) * n
    return ops.Conv(stride=(stride,) * n, padding=pairs, dilation=(dilation,) * n, groups=groups), (Spec(x), Spec(w))


def three(op: Any, ins: tuple[Spec, Spec]) -> list[Sample]:
    """A convolution and its gradients."""
    x, w = ins
    y = op.infer(x, w)
    return [
        Sample(op, (x, w)),
        Sample(ops.ConvInputGrad(size=x.shape[1:-1], **op.geometry), (y, w)),
        Sample(ops.ConvFilterGrad(window=w.shape[:-2], **op.geometry), (x, y)),
    ]


def matmul(m: int, i: int, k: int, *, ta: bool = False, tb: bool = False) -> Sample:
    return Sample(ops.Matmul(ta=ta, tb=tb), (Spec((i, m) if ta else (m, i)), Spec((k, i) if tb else (i, k))))


def larger() -> list[Sample]:
    """Odd sizes that fill several blocks."""
    convolutions = [
        conv((2, 29, 31, 5), (3, 3, 5, 37), padding=1),
        conv((2, 33, 31, 12), (5, 3, 12, 132), stride=2, padding=2),
        conv((1, 9, 8, 7, 4), (3, 3, 3, 4, 20), padding=1),
        conv((3, 14, 14, 64), (3, 3, 64, 128), padding=1),
        conv((3, 28, 28, 128), (1, 1, 128, 256)),
        conv((2, 56, 56, 64), (3, 3, 64, 64), padding=1, stride=2),
        conv((2, 65, 65, 3), (7, 7, 3, 64), stride=2, padding=3),
        conv((2, 15, 15, 64), (3, 3, 32, 64), padding=1, groups=2),
        conv((2, 20, 21, 32), (3, 3, 1, 32), padding=1, groups=32),
        conv((2, 24, 24, 64), (3, 3, 64, 64), padding=2, dilation=2),
    ]
    products = [matmul(131, 75, 67, ta=ta, tb=tb) for ta in (False, True) for tb in (False, True)]
    products += [matmul(512, 512, 512), matmul(384, 1024, 256, ta=True), matmul(256, 512, 384, tb=True)]
    batched = [Sample(ops.BatchMatmul(), (Spec((3, 2, 77, 64)), Spec((3, 2, 64, 77))))]
    return [
        *(sample for each in convolutions for sample in three(*each)),
        *products,
        *batched,
        Sample(ops.Add(), (Spec((3, 7, 1029)), Spec((7, 1)))),
    ]


def to_check(families: str = "", names: str = "") -> Iterator[tuple[Case, int]]:
    """Cases, and how many other configs of each to try; ``families``, ``names`` of templates: parted by commas
    (default: all)."""
    wanted = set(families.split(",")) if families else None
    found = sorted({cls.family for cls in ops.registry.values() if templates(cls.family, "cuda")})
    bigger: dict[str, list[Sample]] = {}
    for sample in larger():
        bigger.setdefault(type(sample.op).family, []).append(sample)
    for family in found:
        if wanted is not None and family not in wanted:
            continue
        samples = samples_of(family)
        for template in (t for t in templates(family, "cuda") if not names or t.name in names.split(",")):
            for i, sample in enumerate([*samples, *bigger.get(family, [])]):
                large = i >= len(samples)
                for dtype in ("float32", *HALVES):
                    if dtype != "float32" and not any(spec.floating for spec in sample.ins):
                        continue
                    name = f"{family}/{template.name} {type(sample.op).name} {i} {dtype}"
                    case = Case(name, template, as_dtype(sample, dtype) if dtype != "float32" else sample)
                    yield case, 2 if large else int(dtype == "float32")
                    if large and family in ("conv", "matmul", "pointwise"):
                        yield Case(f"{name} fused", template, case.sample, fused=True), 0
