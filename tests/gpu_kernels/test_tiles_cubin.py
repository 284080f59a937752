"""Machine code of register tiles and depthwise templates for the shapes of usual networks: nothing is spilled."""

import pytest

from gpu_kernels import compile as compiling
from rapydli_flow import ops
from rapydli_flow.spec import Spec
from rapydli_flow.template import templates
from rapydli_flow.testing.gpu import CARD, OLDER, assert_clean, request_of

needs_compiler = pytest.mark.skipif(compiling.missing() is not None, reason=str(compiling.missing()))
quiet = pytest.mark.filterwarnings("default")  # of numba-cuda's own imports


def convolution(n, size, c, k, window, *, stride=1, padding=0, groups=1, dtype="float32", which=0):
    """A convolution, or its input (1) or filter (2) gradient."""
    g = {"stride": (stride,) * 2, "padding": ((padding, padding),) * 2, "dilation": (1, 1), "groups": groups}
    x, w = Spec((n, size, size, c), dtype), Spec((window, window, c // groups, k), dtype)
    y = ops.Conv(**g).infer(x, w)
    return (
        (ops.Conv(**g), (x, w)),
        (ops.ConvInputGrad(size=(size, size), **g), (y, w)),
        (ops.ConvFilterGrad(window=(window, window), **g), (x, y)),
    )[which]


THREE = {"window": 3, "padding": 1}
TILES = {
    "3x3 of bf16": convolution(64, 28, 128, 128, **THREE, dtype="bfloat16"),
    "3x3 of groups": convolution(64, 28, 128, 128, **THREE, groups=32),
    "3x3 input": convolution(64, 56, 64, 64, **THREE, which=1),
    "3x3/2 input": convolution(64, 56, 128, 128, **THREE, stride=2, which=1),
    "3x3 filter": convolution(64, 28, 128, 128, **THREE, which=2),
    "7x7/2 filter of 3 channels": convolution(64, 224, 3, 64, 7, stride=2, padding=3, which=2),
    "11x11/4 filter of 3 channels": convolution(64, 224, 3, 96, 11, stride=4, padding=2, which=2),
    "1x1 filter": convolution(64, 56, 64, 256, 1, which=2),
    "matmul of a long sum": (ops.Matmul(), (Spec((64, 50176)), Spec((50176, 10)))),
    "batch_matmul": (ops.BatchMatmul(tb=True), (Spec((12, 512, 64)), Spec((12, 512, 64)))),
    "matmul of float64": (ops.Matmul(), (Spec((1024, 1024), "float64"), Spec((1024, 1024), "float64"))),
    "local_conv": (
        ops.LocalConv(stride=(1, 1), padding=((1, 1), (1, 1))),
        (Spec((64, 14, 14, 32)), Spec((14, 14, 3, 3, 32, 32))),
    ),
}
DEPTHWISE = {
    f"depthwise {name} {kind}": convolution(
        64, size, c, c, window, stride=stride, padding=window // 2, groups=c, which=which
    )
    for name, size, c, window, stride in (("3x3", 112, 96, 3, 1), ("3x3/2", 112, 96, 3, 2), ("5x5", 14, 480, 5, 1))
    for which, kind in enumerate(("forward", "input", "filter"))
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cubins")


@quiet
@needs_compiler
@pytest.mark.parametrize("name", [*TILES, *DEPTHWISE])
def test_default_config_is_clean(name, folder):
    op, ins = {**TILES, **DEPTHWISE}[name]
    names = ("depthwise",) if name in DEPTHWISE else ("simt", "implicit_gemm", "untied")
    template = next(t for t in templates(op.family, "cuda") if t.name in names)
    card = OLDER if name in ("3x3 input", "3x3 filter", "depthwise 3x3 forward", "depthwise 3x3/2 input") else CARD
    for made in assert_clean(request_of(template, op, ins, card), folder):
        print(f"{name:30s} {made.registers:3d} regs {made.shared_bytes:6d} B shared {made.grid} x {made.block}")
