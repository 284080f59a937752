"""Machine code of tensor-core templates: nothing spilled, and the instructions that they are about."""

from collections import Counter

import pytest

from gpu_kernels import compile as compiling
from rapydli_flow import ops
from rapydli_flow.spec import Spec
from rapydli_flow.template import templates
from rapydli_flow.testing.gpu import CARD, OLDER, assert_clean, instructions, request_of

pytestmark = [
    pytest.mark.skipif(compiling.missing() is not None, reason=str(compiling.missing())),
    pytest.mark.filterwarnings("default"),  # of numba-cuda's own imports
]
OPCODES = {0x23C: "HMMA", 0x83B: "LDSM", 0xFAE: "LDGSTS", 0x984: "LDS"}  # the low 12 bits of an instruction


def opcodes(code):
    """How often a cubin has these instructions."""
    return Counter({name: instructions(code)[word] for word, name in OPCODES.items()})


def matmul(dtype="float32", **how):
    op = ops.Matmul(**how)
    return op, (Spec((4096, 4096), dtype), Spec((4096, 4096), dtype))


def conv(x, w, *, stride=1, padding=0, dtype="float32", grad=None, **how):
    n = len(x) - 2
    geometry = {"stride": (stride,) * n, "padding": ((padding,) * 2,) * n, "dilation": (1,) * n, **how}
    op, x, w = ops.Conv(**geometry), Spec(x, dtype), Spec(w, dtype)
    if grad == "input":
        return ops.ConvInputGrad(size=x.shape[1:-1], **geometry), (op.infer(x, w), w)
    if grad == "filter":
        return ops.ConvFilterGrad(window=w.shape[:-2], **geometry), (x, op.infer(x, w))
    return op, (x, w)


IMAGES = ((64, 28, 28, 128), (3, 3, 128, 128))
# HMMA of a step of a warp: 3 products x 16 x 8 x 8 or one x 16 x 8 x 16; reads: matrices by LDSM, lines by LDS
CASES = {
    "matmul": (matmul(), {}, {"LDSM", "LDS"}),
    "matmul tb": (matmul(tb=True), {}, {"LDSM"}),
    "matmul ta": (matmul(ta=True), {}, {"LDS"}),
    "matmul tf32": (matmul(tf32=True), {}, {"LDSM", "LDS"}),
    "matmul bf16": (matmul("bfloat16"), {}, {"LDSM"}),
    "matmul ta tb f16": (matmul("float16", ta=True, tb=True), {}, {"LDSM"}),
    "conv": (conv(*IMAGES, padding=1), {}, {"LDSM", "LDS"}),
    "conv bf16": (conv(*IMAGES, padding=1, dtype="bfloat16"), {}, {"LDSM"}),
    "conv 7x7/2 of 3 channels": (conv((64, 224, 224, 3), (7, 7, 3, 64), stride=2, padding=3), {}, {"LDSM", "LDS"}),
    "conv input": (conv(*IMAGES, padding=1, grad="input"), {}, {"LDSM"}),
    "conv filter": (conv(*IMAGES, padding=1, grad="filter"), {}, {"LDS"}),
    "conv filter bf16": (conv(*IMAGES, padding=1, grad="filter", dtype="bfloat16"), {}, {"LDSM"}),
    "conv in eight warps": (
        conv(*IMAGES, padding=1),
        {"bm": 128, "bn": 128, "wm": 64, "wn": 32, "stages": 4, "resident": 1},
        {"LDSM", "LDS"},
    ),
}


OF_OLDER = ("matmul bf16", "conv")


@pytest.mark.parametrize(("name", "card"), [*((name, CARD) for name in CASES), *((name, OLDER) for name in OF_OLDER)])
def test_default_config_is_clean(name, card, tmp_path):
    (op, ins), changes, reads = CASES[name]
    template = next(t for t in templates(op.family, "cuda") if t.name == "tensor_cores")
    request = request_of(template, op, ins, card, fused=card is CARD, **changes)
    made, config = assert_clean(request, tmp_path), request.config
    found = opcodes(made[0].code)
    half = ins[0].dtype != "float32"
    products = config["wm"] // 16 * (config["wn"] // 8) * (config["bk"] // (16 if half else 8))
    assert found["HMMA"] == products * (1 if half or op.tf32 else 3)
    assert found["LDGSTS"] >= 2 * config["stages"]  # in front of the loop, and in it
    for read in ("LDSM", "LDS"):
        assert (found[read] >= 8) == (read in reads)
