"""Halves beside float32: every template that takes an op of mixed precision gives what the reference gives."""

from __future__ import annotations

import numpy as np
import pytest

from rapydli_flow.ops import Add, ConvFilterGrad, Matmul, Moments, Normalize, Op, Sum
from rapydli_flow.spec import Spec
from rapydli_flow.template import templates
from rapydli_flow.testing.gpu import CARD, assert_close, emulated, wanted

X, C = Spec((2, 4, 4, 16), "bfloat16"), Spec((16,))
WINDOW = ConvFilterGrad(window=(3, 3), stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1), wide=True)
CASES: tuple[tuple[Op, tuple[Spec, ...]], ...] = (
    (Add(), (X, C)),
    (Normalize(), (X, C, C, C, C)),
    (Moments(), (X, C)),
    (Sum(axes=(0, 1, 2), wide=True), (X,)),
    (Matmul(ta=True, wide=True), (Spec((32, 16), "bfloat16"), Spec((32, 16), "bfloat16"))),
    (WINDOW, (X, X)),
    (WINDOW, (Spec((2, 4, 4, 3), "bfloat16"), X)),  # a first layer
)


@pytest.mark.parametrize(("op", "ins"), CASES, ids=lambda value: value.name if isinstance(value, Op) else "")
def test_mixed_operands_and_wide_results(op: Op, ins: tuple[Spec, ...]) -> None:
    rng = np.random.default_rng(0)
    values = [rng.uniform(0.5, 2.0, spec.shape).astype(spec.dtype) for spec in ins]
    outs, tried = op.out_specs(*ins), 0
    for template in templates(op.family, "cuda"):
        config = template.default(op, ins, outs, CARD)
        if config is not None:
            got = emulated(template, op, values, config)
            assert [y.dtype.name for y in got] == [spec.dtype for spec in outs]
            assert_close(got, wanted(op, values), 1e-5 if outs[0].dtype == "float32" else 1e-2)
            tried += 1
    assert tried
