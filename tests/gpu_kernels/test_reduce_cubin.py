"""Machine code of reductions at the sizes of networks."""

import pytest

from gpu_kernels import compile as compiling
from rapydli_flow import ops
from rapydli_flow.spec import Spec
from rapydli_flow.template import templates
from rapydli_flow.testing.gpu import CARD, OLDER, assert_clean, request_of

pytestmark = [
    pytest.mark.skipif(compiling.missing() is not None, reason=str(compiling.missing())),
    pytest.mark.filterwarnings("default"),  # of numba-cuda's own imports
]
CASES = {
    "bias gradient": (ops.Sum(axes=(0, 1, 2)), Spec((64, 56, 56, 256))),
    "moments": (ops.Moments(), Spec((64, 56, 56, 64), "bfloat16"), Spec((64,), "bfloat16")),
    "softmax": (ops.Softmax(), Spec((8192, 1000))),
    "long rows": (ops.CrossEntropy(), Spec((8192, 50257)), Spec((8192,), "int64")),
    "layer norm": (ops.Standardize(), Spec((8192, 1024), "float16")),
    "argmax": (ops.ArgMax(axes=(1,)), Spec((128, 1000))),
}


@pytest.mark.parametrize("card", [CARD, OLDER], ids=lambda card: card.target)
@pytest.mark.parametrize("name", CASES)
def test_defaults_are_clean(name, card, tmp_path):
    op, *ins = CASES[name]
    for template in templates(op.family, "cuda"):
        if template.default(op, ins, op.out_specs(*ins), card):
            assert_clean(request_of(template, op, ins, card), tmp_path)
