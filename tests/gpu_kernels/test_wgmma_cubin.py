"""Machine code of Hopper's templates: nothing spilled, no warning (serialised products, ignored setmaxnreg)."""

import numpy as np
import pytest

from gpu_kernels import compile as compiling
from gpu_kernels import wgmma
from rapydli_flow import ops
from rapydli_flow.spec import Spec
from rapydli_flow.template import templates
from rapydli_flow.testing import gpu

pytestmark = [
    pytest.mark.skipif(compiling.missing() is not None, reason=str(compiling.missing())),
    pytest.mark.filterwarnings("default"),  # of numba-cuda's own imports
]
OPCODES = {  # low 12 bits, as nvdisasm of CUDA 13 names them
    0x9F0: "HGMMA",
    0xDF0: "HGMMA of registers",
    0x5B4: "UTMALDG",
    0x3B4: "UTMALDG.IM2COL",
    0x9C8: "USETMAXREG",
    0x983: "LDL",
    0x387: "STL",
}
GEOMETRY = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}
X, W = (64, 28, 28, 128), (3, 3, 128, 128)


def floats(dtype, *shapes):
    return tuple(Spec(shape, dtype) for shape in shapes)


CASES = {
    "matmul bf16": (ops.Matmul(), floats("bfloat16", (8192, 8192), (8192, 8192)), {}),
    "matmul bf16 ta tb": (ops.Matmul(ta=True, tb=True), floats("bfloat16", (8192, 8192), (8192, 8192)), {"ahead": 0}),
    "matmul f16 small": (ops.Matmul(), floats("float16", (64, 800), (800, 504)), {}),
    "matmul fp32": (ops.Matmul(), floats("float32", (4096, 4096), (4096, 4096)), {}),
    "matmul tf32": (ops.Matmul(tf32=True, tb=True), floats("float32", (4096, 4096), (4096, 4096)), {}),
    "conv bf16": (ops.Conv(**GEOMETRY), floats("bfloat16", X, W), {}),
    "conv fp32": (ops.Conv(**GEOMETRY), floats("float32", X, W), {}),
    "dx bf16": (ops.ConvInputGrad(size=(28, 28), **GEOMETRY), floats("bfloat16", X, W), {}),
    "dw bf16": (ops.ConvFilterGrad(window=(3, 3), **GEOMETRY), floats("bfloat16", X, X), {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cubins")


@pytest.mark.parametrize("name", CASES)
def test_code_is_clean(name, folder):
    op, ins, changes = CASES[name]
    template = next(t for t in templates(op.family, "cuda") if t.name.startswith("wgmma"))
    made = gpu.assert_clean(gpu.request_of(template, op, ins, fused=True, **changes), folder)
    main = max(made, key=lambda cubin: len(cubin.maps))
    assert len(main.maps) == 2
    assert main.registers * main.block <= 65536
    assert made == gpu.assert_clean(gpu.request_of(template, op, ins, fused=True, **changes), folder)  # from the disk


def test_registers_are_traded(folder):
    """Without setmaxnreg the 168 registers of 384 threads would not hold 128 sums and the rest."""
    op, ins, _ = CASES["matmul bf16"]
    template = next(t for t in templates("matmul", "cuda") if t.name == "wgmma")
    (made,) = gpu.assert_clean(gpu.request_of(template, op, ins), folder)
    assert (made.block, made.registers) == (384, 168)
    assert 3 * made.registers >= wgmma.FEWER + 2 * wgmma.MORE
    assert np.frombuffer(made.code[:4], np.uint8).tolist() == [0x7F, *b"ELF"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("matmul bf16", {"HGMMA", "UTMALDG"}),
        ("matmul fp32", {"HGMMA of registers", "UTMALDG"}),
        ("conv bf16", {"HGMMA", "UTMALDG", "UTMALDG.IM2COL"}),
        ("dw bf16", {"HGMMA", "UTMALDG", "UTMALDG.IM2COL"}),
    ],
)
def test_instructions(name, wanted, folder):
    """Products of a warpgroup, tiles that the card copies by itself, traded registers; nothing in local memory."""
    op, ins, changes = CASES[name]
    template = next(t for t in templates(op.family, "cuda") if t.name.startswith("wgmma"))
    made = gpu.assert_clean(gpu.request_of(template, op, ins, fused=True, **changes), folder)
    code = gpu.instructions(max(made, key=lambda cubin: len(cubin.maps)).code)
    found = {title: code[word] for word, title in OPCODES.items() if code[word]}
    assert found.keys() == {*wanted, "USETMAXREG"}
    assert found["USETMAXREG"] == 2  # one role gives away what the others take
