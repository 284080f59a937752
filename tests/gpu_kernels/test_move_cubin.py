"""Machine code of templates that slide windows or move data: nothing spilled, wide accesses."""

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

G = {"window": (3, 3), "stride": (2, 2), "padding": ((0, 0), (0, 0))}
GLOBAL = {"window": (7, 7), "stride": (7, 7), "padding": ((0, 0), (0, 0))}
X, Y = Spec((128, 55, 55, 64)), Spec((128, 27, 27, 64))
CASES = {
    "max_pool": (ops.MaxPool(**G), (X,)),
    "max_pool bf16": (ops.MaxPool(**G), (Spec(X.shape, "bfloat16"),)),
    "max_pool_grad": (ops.MaxPoolGrad(size=(55, 55), **G), (Y, Spec(Y.shape, "uint8"))),
    "max_pool_grad f16": (ops.MaxPoolGrad(size=(55, 55), **G), (Spec(Y.shape, "float16"), Spec(Y.shape, "uint8"))),
    "sum_pool of all": (ops.SumPool(**GLOBAL), (Spec((64, 7, 7, 1024)),)),
    "sum_pool_grad of all": (ops.SumPoolGrad(size=(7, 7), **GLOBAL), (Spec((64, 1, 1, 1024)),)),
}


@pytest.mark.parametrize("name", CASES)
def test_defaults_are_clean(name, tmp_path):
    op, ins = CASES[name]
    card = OLDER if "16" in name else CARD
    for template in templates(op.family, "cuda"):
        assert_clean(request_of(template, op, ins, card), tmp_path)
