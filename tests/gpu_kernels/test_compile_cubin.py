"""Cubins from numba-cuda and cuda.core, without a GPU: what the machine code takes, and the cache."""

import json

import numpy as np
import pytest

from gpu_kernels import compile as compiling
from gpu_kernels.compile import Request, capability_of, cubins
from rapydli_flow import ops
from rapydli_flow.errors import MissingDependency, TemplateError
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Scalar, templates

needs_compiler = pytest.mark.skipif(compiling.missing() is not None, reason=str(compiling.missing()))
quiet = pytest.mark.filterwarnings("default")  # of numba-cuda's own imports
TARGETS = ("sm_80", "sm_90a")


def conv(n, size, c, k, window, *, stride=1, padding=0):
    op = ops.Conv(stride=(stride,) * 2, padding=((padding, padding),) * 2, dilation=(1, 1))
    return "conv", op, (Spec((n, size, size, c)), Spec((window, window, c, k)))


def matmul(m, i, k, **transposed):
    op = ops.Matmul(**transposed)
    return "matmul", op, (Spec((i, m) if op.ta else (m, i)), Spec((k, i) if op.tb else (i, k)))


CASES = {
    "conv 7x7/2 of 3 channels": conv(32, 224, 3, 64, 7, stride=2, padding=3),
    "conv 3x3 of 64": conv(32, 56, 64, 64, 3, padding=1),
    "conv 3x3 of 128": conv(32, 28, 128, 128, 3, padding=1),
    "conv 3x3 of 256": conv(32, 14, 256, 256, 3, padding=1),
    "conv 1x1": conv(32, 56, 64, 256, 1),
    "conv 5x5 of 1": conv(64, 28, 1, 20, 5),
    "conv 3-D": (
        "conv",
        ops.Conv(stride=(1, 2, 1), padding=((1, 0), (1, 1), (0, 0)), dilation=(1, 1, 1)),
        (Spec((4, 8, 15, 13, 16)), Spec((3, 3, 2, 16, 24))),
    ),
    "matmul": matmul(4096, 4096, 4096),
    "matmul ta": matmul(4096, 4096, 4096, ta=True),
    "matmul tb": matmul(4096, 4096, 4096, tb=True),
    "matmul ta tb": matmul(256, 9216, 4096, ta=True, tb=True),
    "matmul small": matmul(64, 800, 500),
    "matmul odd": matmul(100, 1023, 10),
    "add": ("pointwise", ops.Add(), (Spec((64, 56, 56, 64)), Spec((64, 56, 56, 64)))),
    "add channel": ("pointwise", ops.Add(), (Spec((64, 56, 56, 64)), Spec((64,)))),
    "normalize": ("pointwise", ops.Normalize(eps=1e-5), (Spec((32, 28, 28, 128)), *[Spec((128,))] * 4)),
    "dropout": ("pointwise", ops.Dropout(rate=0.4, stream=9), (Spec((67, 12)), *[Spec((), "int64")] * 2)),
    "adam": ("pointwise", ops.Adam(), (*[Spec((512, 512))] * 4, *[Spec(())] * 3)),
    "cast": ("pointwise", ops.Cast(), (Spec((128, 28, 28, 1), "uint8"),)),
    "add bf16": ("pointwise", ops.Add(), (Spec((64, 56, 56, 64), "bfloat16"), Spec((64,), "bfloat16"))),
    "relu f16": ("pointwise", ops.Relu(), (Spec((64, 56, 56, 64), "float16"),)),
    "cast to bf16": ("pointwise", ops.Cast(to="bfloat16"), (Spec((333,)),)),
    "cosine decay": ("pointwise", ops.CosineDecay(rate=0.1, steps=40, warmup=2), (Spec((), "int64"),)),
}

TILED = [name for name, (family, _, _) in CASES.items() if family != "pointwise"]


def request(family, op, ins, *, target="sm_90a", fused=False):
    template = templates(family, "cuda")[0]
    outs = op.out_specs(*ins)
    card = Device("cuda", "a card that is not here", target=target, cores=132 if "90" in target else 108)
    config = template.default(op, ins, outs, card)
    out = outs[0]
    epilogue = Epilogue.none(out)
    if fused:
        lines = ("t0 = v + e0", "t1 = t0 + e1", "t2 = (t1 if not t1 <= T(0.0) else T(0.0))")
        epilogue = Epilogue(Scalar(("v", "e0", "e1"), lines, ("t2",)), (Spec(out.shape[-1:]), out), out)
    return Request(template, op, ins, outs, epilogue, config, target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cubins")


@quiet
@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "fused"), [*((name, False) for name in CASES), *((name, True) for name in TILED)])
def test_default_config_is_clean(name, fused, target, folder, record_property):
    """Nothing spilled, nothing in local memory; ``fused``: with bias, residual and ReLU before the store."""
    wanted = request(*CASES[name], target=target, fused=fused)
    for made in cubins(wanted, folder):
        record_property("cubin", json.dumps(made.report()))
        title = f"{name:26s} {'fused' if fused else '':5s} {target:7s}"
        print(title, f"{made.registers:3d} regs {made.shared_bytes:6d} B shared", *wanted.config.values())
        assert made.warnings == ()
        assert made.spill_bytes == 0
        assert made.stack_bytes == 0 or "math.cos" in str(wanted.op.scalar().lines)  # its slow path has a table
        assert made.code[:4] == b"\x7fELF"
        assert made.registers * made.block <= 65536


@quiet
@needs_compiler
def test_cache_answers_without_compiling(tmp_path, monkeypatch):
    wanted = request(*CASES["matmul small"])
    first = cubins(wanted, tmp_path)
    monkeypatch.setattr(compiling, "compile_grid", lambda *args, **kwargs: pytest.fail("compiled twice"))
    assert cubins(wanted, tmp_path) == first
    assert len(list(tmp_path.glob("*.cubin"))) == 1


@quiet
@needs_compiler
def test_a_kernel_whose_report_is_empty_is_found_by_its_section(tmp_path):
    for made in cubins(request(*CASES["matmul small"]), tmp_path):
        assert compiling.entry_of(made.code, "") == made.entry


def test_code_without_a_kernel():
    with pytest.raises(TemplateError, match="the assembler names no kernel"):
        compiling.entry_of(b"\x7fELF", "")


def test_key_tells_op_epilogue_config_and_target_apart():
    base = request(*CASES["matmul small"])
    others = [
        request(*CASES["matmul small"], target="sm_80"),
        request(*CASES["matmul small"], fused=True),
        request(*matmul(64, 800, 504)),
        Request(base.template, base.op, base.ins, base.outs, base.epilogue, {**base.config, "order": "rows"}, "sm_90a"),
    ]
    keys = [base.key, *(other.key for other in others)]
    assert len(set(keys)) == len(keys)
    assert base.key == request(*CASES["matmul small"]).key


def test_a_kernel_depends_on_all_that_its_module_imports():
    reached = dict(compiling.sources("gpu_kernels.conv_filter_grad"))
    assert {"conv_filter_grad", "conv", "tiles", "ptx", "pair", "specialise", "scalar", "tail"} <= set(reached)
    assert not {"softmax", "pool", "launch", "emulated"} & set(reached)
    assert "rapydli_flow.winograd" not in reached
    assert "rapydli_flow.winograd" in dict(compiling.sources("gpu_kernels.winograd"))  # its points
    assert {"softmax", "pool", "conv"} <= set(dict(compiling.sources("gpu_kernels.rows")))  # makes templates of others
    assert {"conv", "ptx"} <= set(dict(compiling.sources("somebody.elses")))


def test_a_carried_cubin_of_another_compiler_will_do(tmp_path, monkeypatch):
    wanted = request(*CASES["matmul small"])
    monkeypatch.setattr(compiling, "missing", lambda: None)
    monkeypatch.setattr(compiling, "compiler", lambda: "another one")
    carried = compiling.Cubin(b"\x7fELF", "sm_90a", "kernel", 8, 64, 0, 4)
    compiling._write(tmp_path / f"{wanted.key}-01234567.json", [carried])
    assert cubins(wanted, tmp_path) == (carried,)


def test_without_a_compiler_carried_cubins_are_used(tmp_path, monkeypatch):
    wanted = request(*CASES["matmul small"])
    monkeypatch.setattr(compiling, "missing", lambda: "compiling GPU kernels needs the package numba-cuda.")
    with pytest.raises(MissingDependency, match=r"needs the package numba-cuda\. Or carry .* is in"):
        cubins(wanted, tmp_path)
    carried = compiling.Cubin(b"\x7fELF", "sm_90a", "kernel", 8, 64, 0, 4, warnings=("a",))
    compiling._write(tmp_path / f"{wanted.key}-01234567.json", [carried])
    assert cubins(wanted, tmp_path) == (carried,)


@pytest.mark.skipif(compiling.missing() is None, reason="a compiler is installed")
def test_a_missing_compiler_names_what_to_install(tmp_path):
    match = r"pip install 'rapydli-flow\[cuda12\]' \(or cuda13"
    with pytest.raises(MissingDependency, match=match):
        cubins(request(*CASES["matmul small"]), tmp_path)
    with pytest.raises(MissingDependency, match=match):
        compiling.compile_grid(request(*CASES["add"]).grids()[0], ins=[], outs=[])


@pytest.mark.parametrize(("target", "capability"), [("sm_80", (8, 0)), ("sm_90a", (9, 0, "a")), ("sm_120", (12, 0))])
def test_targets(target, capability):
    assert capability_of(target) == capability


def test_a_target_that_is_none():
    with pytest.raises(TemplateError, match="'ampere' is not the name of a GPU architecture"):
        capability_of("ampere")


def test_report_leaves_out_the_code():
    made = compiling.Cubin(np.zeros(7, np.uint8).tobytes(), "sm_80", "kernel", 1, 32, 0, 2)
    assert made.report()["size_bytes"] == 7
    assert made.clean
