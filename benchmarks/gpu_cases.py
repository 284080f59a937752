"""What `gpu_check.py` checks and times: ops on specs, and the configs of their templates."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from gpu_kernels.compile import Request
from rapydli_flow import ops
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Scalar, templates


@dataclass(frozen=True)
class Case:
    """An op on operands; ``fused`` adds bias and ReLU."""

    name: str
    family: str
    op: Any
    ins: tuple[Spec, ...]
    fused: bool = False

    @property
    def outs(self) -> tuple[Spec, ...]:
        return self.op.out_specs(*self.ins)

    @property
    def epilogue(self) -> Epilogue:
        out = self.outs[0]
        if not self.fused:
            return Epilogue.none(out)
        lines = ("t0 = v + e0", "t1 = (t0 if not t0 <= T(0.0) else T(0.0))")
        return Epilogue(Scalar(("v", "e0"), lines, ("t1",)), (Spec(out.shape[-1:]),), out)

    @property
    def size_bytes(self) -> int:
        return sum(spec.size_bytes for spec in (*self.ins, *self.outs))

    def request(self, card: Device, **changes: Any) -> Request | None:
        """The default config with changes; None where that does not fit."""
        template = templates(self.family, "cuda")[0]
        config = template.default(self.op, self.ins, self.outs, card)
        if config is None or set(changes) - set(config):
            return None
        config = {**config, **changes}
        if not template.fits(self.op, self.ins, self.outs, card, **config):
            return None
        return Request(template, self.op, self.ins, self.outs, self.epilogue, config, card.target)


def conv(name: str, x: tuple[int, ...], w: tuple[int, ...], *, stride: int = 1, padding: int = 0) -> Case:
    n = len(x) - 2
    op = ops.Conv(stride=(stride,) * n, padding=((padding, padding),) * n, dilation=(1,) * n)
    return Case(name, "conv", op, (Spec(x), Spec(w)))


def matmul(name: str, m: int, i: int, k: int, *, ta: bool = False, tb: bool = False) -> Case:
    ins = (Spec((i, m) if ta else (m, i)), Spec((k, i) if tb else (i, k)))
    return Case(name, "matmul", ops.Matmul(ta=ta, tb=tb), ins)


def to_check() -> list[Case]:
    """Every sample of the ops, and odd sizes that fill several blocks."""
    cases = []
    for family in ("matmul", "conv", "pointwise"):
        for cls in ops.registry.values():
            if family in (cls.family, cls.name):
                cases += [Case(f"{cls.name} {i}", family, s.op, s.ins) for i, s in enumerate(cls.samples())]
    cases += [matmul(f"matmul odd {ta:d}{tb:d}", 131, 75, 67, ta=ta, tb=tb) for ta in (0, 1) for tb in (0, 1)]
    cases += [
        conv("conv odd", (2, 29, 31, 5), (3, 3, 5, 37), padding=1),
        conv("conv strided", (2, 33, 31, 12), (5, 3, 12, 132), stride=2, padding=2),
        conv("conv 3-D", (1, 9, 8, 7, 4), (3, 3, 3, 4, 20), padding=1),
        matmul("matmul 512", 512, 512, 512),
        Case("add odd", "pointwise", ops.Add(), (Spec((3, 7, 1029)), Spec((7, 1)))),
    ]
    tiled = [case for case in cases if case.family != "pointwise" and not case.name[-1].isdigit()]
    return cases + [replace(case, name=f"{case.name} + bias + relu", fused=True) for case in tiled]


def to_time() -> list[Case]:
    plain = [
        matmul("dense 4096", 4096, 4096, 4096),
        matmul("dense 256x9216x4096", 256, 9216, 4096),
        conv("conv 7x7/2 3-64", (64, 224, 224, 3), (7, 7, 3, 64), stride=2, padding=3),
        conv("conv 3x3 64-64", (64, 56, 56, 64), (3, 3, 64, 64), padding=1),
        conv("conv 3x3 128-128", (64, 28, 28, 128), (3, 3, 128, 128), padding=1),
        conv("conv 3x3 256-256", (64, 14, 14, 256), (3, 3, 256, 256), padding=1),
        conv("conv 1x1 64-256", (64, 56, 56, 64), (1, 1, 64, 256)),
    ]
    image = Spec((64, 56, 56, 256))
    pointwise = [
        Case("add", "pointwise", ops.Add(), (image, image)),
        Case("add channel", "pointwise", ops.Add(), (image, Spec((256,)))),
        Case("relu", "pointwise", ops.Relu(), (image,)),
    ]
    return plain + [replace(case, name=f"{case.name} + bias + relu", fused=True) for case in plain] + pointwise


def variants(case: Case, card: Device, *, count: int) -> list[Request]:
    """The default and ``count`` others at random."""
    default = case.request(card)
    if default is None:
        return []
    draw, found = random.Random(case.name), [default]
    for _ in range(400):
        if len(found) > count:
            break
        changes = {name: draw.choice(values) for name, values in default.template.space.items()}
        made = case.request(card, **changes)
        found += [made] if made else []
    return found
