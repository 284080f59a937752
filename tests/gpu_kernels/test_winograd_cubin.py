"""Machine code of Winograd's grids: nothing spilled, squares in registers, 16 bytes at a time."""

import struct
from collections import Counter

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
OPCODES = {0x23C: "HMMA", 0xFAE: "LDGSTS", 0x981: "LDG", 0x986: "STG"}  # the low 12 bits of an instruction


def opcodes(code):
    """How often a cubin has these instructions: those of its .text sections, 16 bytes each."""
    (sections,), (count,) = struct.unpack_from("<Q", code, 0x28), struct.unpack_from("<H", code, 0x3C)
    headers = [struct.unpack_from("<IIQQQQIIQQ", code, sections + 64 * i) for i in range(count)]
    strings, found = headers[struct.unpack_from("<H", code, 0x3E)[0]][4], Counter()
    for header in headers:
        first, size = header[4], header[5]
        if code[strings + header[0] :].startswith(b".text."):
            words = (struct.unpack_from("<Q", code, at)[0] & 0xFFF for at in range(first, first + size, 16))
            found.update(OPCODES.get(word, "other") for word in words)
    return found


def conv(n, size, c, k, *, window=3, grad=None):
    geometry = {"stride": (1, 1), "padding": ((window // 2,) * 2,) * 2, "dilation": (1, 1)}
    op, x, w = ops.Conv(**geometry), Spec((n, size, size, c)), Spec((window, window, c, k))
    if grad == "input":
        return ops.ConvInputGrad(size=(size, size), **geometry), (op.infer(x, w), w)
    if grad == "filter":
        return ops.ConvFilterGrad(window=(window, window), **geometry), (x, op.infer(x, w))
    return op, (x, w)


CASES = {
    "forward": (conv(128, 28, 128, 128), {}),
    "in slabs": (conv(128, 28, 128, 128), {"slab_mb": 32}),
    "small tiles": (conv(128, 14, 256, 256), {"m": 2}),
    "windows of 5": (conv(128, 27, 64, 192, window=5), {}),
    "input": (conv(128, 14, 256, 256, grad="input"), {}),
    "filter": (conv(128, 28, 128, 128, grad="filter"), {}),
    "filter in slabs": (conv(64, 56, 256, 256, grad="filter"), {}),
}


@pytest.mark.parametrize(
    ("name", "card"), [*((name, CARD) for name in CASES), *((name, OLDER) for name in ("forward", "filter"))]
)
def test_grids_are_clean(name, card, tmp_path):
    (op, ins), changes = CASES[name]
    template = next(t for t in templates(op.family, "cuda") if "winograd" in t.name)
    request = request_of(template, op, ins, card, fused=card is CARD, **changes)
    made, config = dict.fromkeys(assert_clean(request, tmp_path)), request.config
    assert len(made) <= 6  # grids of slabs are compiled once
    found = [opcodes(one.code) for one in made]
    (product,) = (codes for codes in found if codes["HMMA"])
    assert product["HMMA"] == 3 * config["wm"] // 16 * (config["wn"] // 8) * (config["bk"] // 8)
    taps = ins[1].shape[0] if op.family != "conv_filter_grad" else op.window[0]
    m, area = config["m"], (config["m"] + taps - 1) ** 2
    accesses = [(codes["LDG"], codes["STG"]) for codes in found]
    counter = 1 if len(request.work) > 3 else 0  # a thread of a slab reads its number, one leaves the next
    assert (area + counter, area + counter) in accesses  # patches
    if op.family == "conv_filter_grad":
        assert (m * m + counter, area + counter) in accesses  # tiles of dy
        assert any(stores == taps * taps for _, stores in accesses)
    else:
        assert (taps * taps, area) in accesses  # filters
        assert any(stores == m * m + counter for _, stores in accesses)
