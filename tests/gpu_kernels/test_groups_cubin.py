"""Machine code of group and instance norm at the sizes of networks: of what serves untuned."""

import pytest

from gpu_kernels import compile as compiling
from rapydli_flow import ops
from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, templates
from rapydli_flow.testing.gpu import CARD, OLDER, assert_clean, request_of
from rapydli_flow.tuner import Request

pytestmark = [
    pytest.mark.skipif(compiling.missing() is not None, reason=str(compiling.missing())),
    pytest.mark.filterwarnings("default"),  # of numba-cuda's own imports
]
CASES = {
    "instance, held": (ops.Standardize(axes=3, groups=64), Spec((32, 56, 56, 64))),
    "instance, gradient, held": (ops.StandardizeGrad(axes=3, groups=512), *[Spec((64, 28, 28, 512), "float16")] * 2),
    "group of two, streamed": (ops.Standardize(axes=3, groups=32), Spec((32, 112, 112, 64), "bfloat16")),
    "group of eight, gradient": (ops.StandardizeGrad(axes=3, groups=32), *[Spec((64, 56, 56, 256))] * 2),
    "instance, gradient, in parts": (ops.StandardizeGrad(axes=3, groups=64), *[Spec((1, 512, 512, 64))] * 2),
}


@pytest.mark.parametrize("card", [CARD, OLDER], ids=lambda card: card.target)
@pytest.mark.parametrize("name", CASES)
def test_defaults_are_clean(name, card, tmp_path):
    op, *ins = CASES[name]
    choice = Request(op, tuple(ins), Epilogue.none(ins[0])).default(card)
    (template,) = (t for t in templates(op.family, "cuda") if t.name == choice.template)
    assert_clean(request_of(template, op, ins, card, fused=True), tmp_path)
