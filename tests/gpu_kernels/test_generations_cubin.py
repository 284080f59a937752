"""Every generation of cards from Ampere to Blackwell: main kernels compile for it, clean, and fit its shared memory."""

import pytest

from gpu_kernels import compile as compiling
from gpu_kernels.mma_rules import shared_limit
from rapydli_flow import ops
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, templates
from rapydli_flow.testing.gpu import assert_clean, instructions, request_of

pytestmark = [
    pytest.mark.skipif(compiling.missing() is not None, reason=str(compiling.missing())),
    pytest.mark.filterwarnings("default"),  # of numba-cuda's own imports
]

HMMA = 0x23C
CARDS = {"sm_86": 82, "sm_89": 142, "sm_100": 148, "sm_120": 170}  # those beside sm_80 and sm_90a
X, W = (32, 28, 28, 128), (3, 3, 128, 128)
CONV = ops.Conv(stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1), groups=1)
CASES = {
    "implicit_gemm float32": ("conv", "implicit_gemm", CONV, (Spec(X), Spec(W)), False),
    "winograd float32": ("conv", "winograd", CONV, (Spec(X), Spec(W)), True),
    "tensor_cores float32": ("conv", "tensor_cores", CONV, (Spec(X), Spec(W)), True),
    "tensor_cores bfloat16": ("conv", "tensor_cores", CONV, (Spec(X, "bfloat16"), Spec(W, "bfloat16")), True),
    "tensor_cores float16, dense": (
        "matmul",
        "tensor_cores",
        ops.Matmul(),
        (Spec((2048, 1024), "float16"), Spec((1024, 512), "float16")),
        True,
    ),
    "softmax": ("softmax", "of_rows", ops.Softmax(), (Spec((256, 1000)),), False),
}


@pytest.mark.parametrize("target", CARDS)
@pytest.mark.parametrize("name", CASES)
def test_a_generation(name, target, tmp_path):
    family, template, op, ins, tensor = CASES[name]
    card = Device("cuda", "a card that is not here", target=target, cores=CARDS[target], vector_bytes=16)
    of = next(t for t in templates(family, "cuda") if t.name == template)
    made = assert_clean(request_of(of, op, ins, card), tmp_path)
    for each in made:
        assert each.target == target
        assert each.shared_bytes + each.dynamic_bytes <= shared_limit(card)
    assert any(instructions(each.code)[HMMA] for each in made) == tensor
