"""Every GPU template on the NumPy emulator, against `reference`: no CUDA package, no GPU.

The emulator fills outputs with NaN and refuses accesses out of bounds, elements written twice or never,
and shared memory without barriers; so "equal to the reference" here also says that tails are guarded.
"""

import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpu_kernels
from gpu_kernels import emulate
from gpu_kernels.emulate import KernelFault
from gpu_kernels.grid import Grid
from gpu_kernels.ptx import cuda, float32, hold, load, put, store, take, unroll
from gpu_kernels.specialise import as_compiled, flatten
from rapydli_flow import ops
from rapydli_flow.errors import TemplateError
from rapydli_flow.ops import Sample
from rapydli_flow.spec import HALVES, Block, Spec
from rapydli_flow.template import Epilogue, templates
from rapydli_flow.testing import gpu
from rapydli_flow.testing.gpu import CARD, assert_close, bias_residual_relu, chosen, emulated, tolerance
from rapydli_flow.tuner import Request

FAMILIES = sorted({cls.family for cls in ops.registry.values() if templates(cls.family, "cuda")})


def conv(x, w, *, stride=1, padding=(0, 0), dilation=1):
    """A convolution sample with one stride, padding and dilation for all axes."""
    n = len(x) - 2
    op = ops.Conv(stride=(stride,) * n, padding=(padding,) * n, dilation=(dilation,) * n)
    return Sample(op, (Spec(x), Spec(w)))


def matmul(m, i, k, *, ta=False, tb=False):
    return Sample(ops.Matmul(ta=ta, tb=tb), (Spec((i, m) if ta else (m, i)), Spec((k, i) if tb else (i, k))))


BIGGER = {
    "matmul": [matmul(131, 75, 67), matmul(130, 36, 68, ta=True), matmul(65, 34, 129, tb=True), matmul(257, 1, 1)],
    "conv": [
        conv((2, 13, 11, 5), (3, 3, 5, 37), padding=(1, 1)),
        conv((1, 17, 15, 4), (5, 3, 4, 68), stride=3, padding=(2, 0)),
        conv((2, 12, 11, 3), (3, 2, 3, 7), padding=(-1, -2)),
        conv((1, 9, 10, 8), (3, 3, 8, 33), padding=(4, 5), dilation=2),
        conv((2, 150, 3), (7, 3, 10), stride=2, padding=(3, 3)),
        conv((1, 5, 6, 7, 2), (3, 3, 3, 2, 9), padding=(1, 0)),
    ],
    "pointwise": [
        Sample(ops.Add(), (Spec((5, 1, 7, 12)), Spec((3, 1, 12)))),
        Sample(ops.Multiply(), (Spec((1, 33)), Spec((41, 1)))),
        Sample(ops.Relu(), (Spec((1031,)),)),
        Sample(ops.Add(), (Spec((2, 512, 4)), Spec((4,)))),
        Sample(ops.Dropout(rate=0.4, stream=9), (Spec((67, 12)), Spec((), "int64"), Spec((), "int64"))),
    ],
}


def samples_of(family):
    return gpu.samples_of(family) + BIGGER.get(family, [])


def fitting(template, sample):
    """Has a template a config for a sample?"""
    return template.default(sample.op, sample.ins, sample.op.out_specs(*sample.ins), CARD) is not None


def cases():
    for family in FAMILIES:
        for template in templates(family, "cuda"):
            for i, sample in enumerate(samples_of(family)):
                for dtype in (None, *HALVES):
                    if dtype and not any(spec.floating for spec in sample.ins):
                        continue
                    stored = gpu.as_dtype(sample, dtype) if dtype else sample
                    if fitting(template, stored):
                        name = f"{template.name}-{i}-{sample.op.name}" + (f"-{dtype}" if dtype else "")
                        yield pytest.param(template, stored, id=f"{template.family}-{name}")


@pytest.mark.parametrize(("template", "sample"), list(cases()))
def test_template_equals_reference(template, sample):
    values = sample.draw(np.random.default_rng(7))
    want = gpu.wanted(sample.op, values)
    halves = any(spec.dtype in HALVES for spec in sample.ins)  # only loads and stores differ: two configs will do
    for i, config in enumerate(chosen(template, sample, seed=3)[: 2 if halves else None]):
        got = emulated(template, sample.op, values, config, as_compiled=i == 0)
        assert_close(got, want, tolerance(sample))


def test_every_float32_sample_has_a_template():
    left_out = [
        sample.op
        for family in FAMILIES
        for sample in samples_of(family)
        if not any(fitting(template, sample) for template in templates(family, "cuda"))
    ]
    assert left_out == []


@pytest.mark.parametrize("family", FAMILIES)
def test_untuned_ops_are_served_by_the_template_that_foretells_the_least_time(family):
    for sample in samples_of(family):
        choices = {}
        for template in templates(family, "cuda"):
            if fitting(template, sample):
                outs = sample.op.out_specs(*sample.ins)
                config = template.default(sample.op, sample.ins, outs, CARD)
                told = template.cost(sample.op, sample.ins, outs, CARD, config) if template.cost else np.inf
                assert told > 0
                choices.setdefault(told, template.name)
        request = Request(sample.op, sample.ins, Epilogue.none(sample.op.out_specs(*sample.ins)[0]))
        assert request.default(CARD).template == (choices[min(choices)] if choices else "reference")


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("family", BIGGER)
def test_epilogue_is_applied_before_the_store(family, scaled):
    rng = np.random.default_rng(1)
    template = templates(family, "cuda")[0]
    for sample in (BIGGER[family][0], BIGGER[family][1]):
        outs = sample.op.out_specs(*sample.ins)
        epilogue = bias_residual_relu(outs[0], scaled=scaled)
        extras = [np.asarray(rng.normal(size=e.shape), np.float32) for e in epilogue.extras]
        values = sample.draw(rng)
        want = np.maximum(sample.op.run(*values)[0] + extras[0] + extras[1], 0) * (extras[2] if scaled else 1)
        for config in chosen(template, sample, seed=5, count=3)[:4]:
            got = emulated(template, sample.op, values, config, epilogue=epilogue, extras=extras)
            assert_close(got, (want,), tolerance(sample))


@pytest.mark.parametrize("family", ["matmul", "pointwise"])
def test_indices_count_in_the_whole_array(family):
    """A dropout, as op or as epilogue, drops on a block what it drops there in the whole array."""
    rng = np.random.default_rng(2)
    dropout = ops.Dropout(rate=0.5, stream=4)
    clock = (np.asarray(1 << 35), np.asarray(11))
    at = Block((6, 8), (6 + 30, 8 + 20), (100, 64))
    x = rng.uniform(1, 2, (30, 20)).astype(np.float32)
    want = dropout.run(x, *clock, at=at)
    if family == "pointwise":
        specs, values, epilogue = (Spec(x.shape), Spec((), "int64"), Spec((), "int64")), (x, *clock), None
        op, extras = dropout, ()
    else:
        specs, values = (Spec(x.shape), Spec((20, 20))), (x, np.eye(20, dtype=np.float32))
        scalar = dropout.scalar(("v", "e0", "e1"))
        epilogue = Epilogue(scalar, (Spec((), "int64"), Spec((), "int64")), Spec(x.shape))
        op, extras = ops.Matmul(), clock
    outs = op.out_specs(*specs)
    template = templates(family, "cuda")[0]
    config = template.default(op, specs, outs, CARD)
    grid = template.build(op, specs, outs, epilogue or Epilogue.none(outs[0]), **config)
    assert_close(emulate.run(grid, values, outs, extras=extras, at=at), want, 1e-6)
    assert 0.3 < np.mean(want[0] == 0) < 0.7


def test_loads_that_cross_groups_do_not_fit():
    op = ops.Conv(stride=(1,), padding=((0, 0),), dilation=(1,), groups=2)
    ins = (Spec((1, 8, 4)), Spec((3, 2, 4)))
    template = next(t for t in templates("conv", "cuda") if t.name == "implicit_gemm")
    outs = op.out_specs(*ins)
    config = template.default(op, ins, outs, CARD)
    assert max(config["vector_a"], config["vector_b"]) == 2
    with pytest.raises(TemplateError, match=r"conv/implicit_gemm does not fit .* 'loads divide channels'"):
        template.check(op, ins, outs, CARD, {**config, "vector_a": 4})


@pytest.mark.parametrize("family", BIGGER)
def test_the_space_has_what_fits(family):
    sample = BIGGER[family][0]
    outs, draw = sample.op.out_specs(*sample.ins), random.Random(5)
    for template in templates(family, "cuda"):
        if template.default(sample.op, sample.ins, outs, CARD) is None:
            continue  # of other dtypes
        space = template.space_of(sample.op, sample.ins, outs, CARD)
        assert 0 < len(space) <= space.cartesian
        for _ in range(200):
            config = {name: draw.choice(values) for name, values in template.values(CARD).items()}
            assert (config in space) == template.fits(sample.op, sample.ins, outs, CARD, **config)


@pytest.mark.parametrize("family", BIGGER)
def test_what_does_not_fit_is_left_out(family):
    """Too many elements for 32-bit indices."""
    template = templates(family, "cuda")[0]
    huge = {
        "matmul": matmul(2**16, 8, 2**16),
        "conv": conv((2**12, 512, 512, 4), (1, 1, 4, 8)),
        "pointwise": Sample(ops.Relu(), (Spec((2**31,)),)),
    }[family]
    assert template.default(huge.op, huge.ins, huge.op.out_specs(*huge.ins), CARD) is None


# ---- the emulator refuses what a GPU would not notice


def through_shared(*, barrier):
    """Reverses 32 numbers through shared memory."""

    def kernel(ins, outs, work, extras, at):
        shared = cuda.shared.array(32, float32)
        held = cuda.local.array(1, float32)
        thread = cuda.threadIdx.x
        hold(1)(held, 0, load("float32", 1)(thread < 32, ins[0], thread))
        put(1)(shared, thread, held, 0)
        if barrier:
            cuda.syncthreads()
        store("float32", 1)(thread < 32, outs[0], thread, (shared.read(31 - thread),))

    return Grid(kernel, 1, 32)


def test_a_missing_barrier_is_a_fault():
    x = np.arange(32, dtype=np.float32)
    (y,) = emulate.run(through_shared(barrier=True), (x,), (Spec((32,)),))
    np.testing.assert_array_equal(y, x[::-1])
    with pytest.raises(KernelFault, match="read before the barrier"):
        emulate.run(through_shared(barrier=False), (x,), (Spec((32,)),))


def copying(*, shift=0, guard=32, width=1, step=1):
    read, write = load("float32", width), store("float32", width)

    def kernel(ins, outs, work, extras, at):
        element = cuda.threadIdx.x * step
        write(element < guard, outs[0], element, read(element < guard, ins[0], element + shift))

    return Grid(kernel, 1, 32)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (copying(shift=1), "input 0 has 32 elements but 1..32 are touched"),
        (copying(guard=31), "element 31 is written 0 times"),
        (copying(step=0), "element 0 is written 32 times"),
        (copying(width=2, guard=31), "2 elements are touched at once from 1"),
    ],
)
def test_faults(grid, message):
    with pytest.raises(KernelFault, match=message):
        emulate.run(grid, (np.zeros(32, np.float32),), (Spec((32,)),))


# ---- the text that is compiled


def test_generated_text_has_constants_and_no_helpers():
    sample = BIGGER["conv"][0]
    outs = sample.op.out_specs(*sample.ins)
    template = templates("conv", "cuda")[0]
    config = template.default(sample.op, sample.ins, outs, CARD)
    (grid,) = template.build(sample.op, sample.ins, outs, bias_residual_relu(outs[0]), **config)
    flat = flatten(grid.kernel, ins=2, outs=1, extras=2)
    assert flat.parameters == ("i0", "i1", "o0", "e0", "e1", "at")
    names = set(compile(flat.source, "<kernel>", "exec").co_consts[0].co_names)
    assert names - {"range", "float32", "int32", "cuda", "shared", "local", "array", "threadIdx", "blockIdx", "x"} - {
        "syncthreads"
    } <= set(flat.names)
    assert " + " not in flat.source  # every sum is 32-bit


def test_a_kernel_that_computes_outside_intrinsics_is_refused():
    helper = np.ones(3)

    def kernel(ins, outs, work, extras, at):
        take(1)(helper.sum(), 0)

    with pytest.raises(TemplateError, match="inside an expression"):
        flatten(kernel, ins=1, outs=1, extras=0)


def calling(body):
    """A kernel that copies 4 numbers by a procedure."""
    read, write = load("float32", 1), store("float32", 1)

    def fetched(pointer, element):
        found = read(element < 4, pointer, element)
        return found

    def nothing(pointer, element):
        write(element < 4, pointer, element, (0.0,))

    def early(pointer, element):
        for _ in unroll(2):
            return element

    def taken(ins, outs, work, extras, at):
        thread = cuda.threadIdx.x
        found = fetched(ins[0], thread)
        write(thread < 4, outs[0], thread, found)

    def wasted(ins, outs, work, extras, at):
        fetched(ins[0], cuda.threadIdx.x)

    def empty(ins, outs, work, extras, at):
        found = nothing(outs[0], cuda.threadIdx.x)
        write(True, outs[0], 0, found)

    def hasty(ins, outs, work, extras, at):
        found = early(outs[0], cuda.threadIdx.x)
        write(True, outs[0], found, (0.0,))

    return {"taken": taken, "wasted": wasted, "empty": empty, "hasty": hasty}[body]


def test_a_procedure_may_return_what_it_found():
    x, grid = np.arange(4, dtype=np.float32), Grid(calling("taken"), 1, 32)
    for one in (grid, as_compiled(grid)):
        np.testing.assert_array_equal(emulate.run(one, (x,), (Spec((4,)),))[0], x)
    assert "fetched" not in flatten(grid.kernel, ins=1, outs=1, extras=0).source


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("wasted", "nobody takes what fetched"),
        ("empty", r"nothing\(outs\[0\], cuda.threadIdx.x\) returns nothing"),
        ("hasty", "early returns before its end"),
    ],
)
def test_returns_that_are_refused(body, message):
    with pytest.raises(TemplateError, match=message):
        flatten(calling(body), ins=1, outs=1, extras=0)


def test_importing_kernels_imports_no_cuda_package():
    code = "import gpu_kernels.compile, gpu_kernels.launch, sys; from rapydli_flow.template import templates; "
    code += "templates('conv', 'cuda'); print([m for m in sys.modules if m.split('.')[0] in "
    code += "('numba_cuda', 'cuda', 'cupy', 'torch') or m.startswith('numba.cuda')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_map_of_the_package_names_every_module():
    named = set(re.findall(r"\w+", gpu_kernels.__doc__))
    folder = Path(gpu_kernels.__file__).parent
    assert [path.stem for path in sorted(folder.glob("[!_]*.py")) if path.stem not in named] == []
