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
    "max_pool in pairs": (ops.MaxPool(**G), (Spec(X.shape, "bfloat16"),)),
    "max_pool f16": (ops.MaxPool(**G), (Spec(X.shape, "float16"),)),
    "max_pool_grad": (ops.MaxPoolGrad(size=(55, 55), **G), (Y, Spec(Y.shape, "uint8"))),
    "max_pool_grad f16": (ops.MaxPoolGrad(size=(55, 55), **G), (Spec(Y.shape, "float16"), Spec(Y.shape, "uint8"))),
    "local_response": (ops.LocalResponse(), (Spec((128, 27, 27, 192)),)),
    "local_response_grad": (ops.LocalResponseGrad(), (Spec((128, 27, 27, 192)),) * 2),
    "local_response_grad bf16": (ops.LocalResponseGrad(), (Spec((128, 27, 27, 192), "bfloat16"),) * 2),
    "concatenate": (ops.Concatenate(axis=3), tuple(Spec((128, 28, 28, c)) for c in (64, 128, 32, 32))),
    "slice": (
        ops.Slice(starts=(0, 0, 0, 64), stops=(None, None, None, 192), steps=(1,) * 4),
        (Spec((128, 28, 28, 256)),),
    ),
    "pad": (ops.Pad(low=(0, 3, 3, 0), high=(0, 3, 3, 0)), (X,)),
    "channels first": (ops.Transpose(order=(0, 3, 1, 2)), (X,)),
    "channels last f16": (ops.Transpose(order=(0, 2, 3, 1)), (Spec((64, 3, 224, 224), "float16"),)),
    "heads": (ops.Transpose(order=(0, 2, 1, 3)), (Spec((16, 512, 12, 64)),)),
    "fill": (ops.Fill(value=0.5, shape=(512, 512)), ()),
    "gaussian": (ops.Gaussian(sigma=2.0, center=(7.5, 7.5), shape=(16, 16, 3)), ()),
    "adaptive_avg_pool": (ops.AdaptiveAvgPool(size=(6, 6)), (Spec((64, 13, 13, 256)),)),
    "adaptive_max_pool_grad": (
        ops.AdaptiveMaxPoolGrad(size=(13, 13)),
        (Spec((64, 6, 6, 256)), Spec((64, 6, 6, 256), "int32")),
    ),
    "resize bf16": (ops.Resize(size=(64, 64)), (Spec((16, 32, 32, 64), "bfloat16"),)),
    "resize_grad": (ops.ResizeGrad(size=(32, 32)), (Spec((16, 64, 64, 64)),)),
    "embedding": (ops.Embedding(), (Spec((30000, 512)), Spec((64, 128), "int64"))),
    "embedding_grad f16": (
        ops.EmbeddingGrad(vocabulary=30000),
        (Spec((64, 128, 512), "float16"), Spec((64, 128), "int64")),
    ),
    "sum_pool of all": (ops.SumPool(**GLOBAL), (Spec((64, 7, 7, 1024)),)),
    "sum_pool_grad of all": (ops.SumPoolGrad(size=(7, 7), **GLOBAL), (Spec((64, 1, 1, 1024)),)),
}


@pytest.mark.parametrize("name", CASES)
def test_defaults_are_clean(name, tmp_path):
    op, ins = CASES[name]
    card = OLDER if "16" in name else CARD
    (template,) = (t for t in templates(op.family, "cuda") if t.default(op, ins, op.out_specs(*ins), card))
    assert_clean(request_of(template, op, ins, card), tmp_path)
