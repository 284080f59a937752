"""Generated modules and their cache: across processes, damaged, read-only, raced for; threads; lanes."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from numba.core.codegen import JITCodeLibrary

import rapydli_flow.config
from cpu_kernels import compile as compiler
from cpu_kernels.driver import CallList, address_of
from rapydli_flow.errors import SettingError, TemplateError
from rapydli_flow.ops import Add, Conv, MaxPool, Moments, Relu, Sum
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, Template, templates

SCRIPT = """
import json, sys
import numpy as np
import rapydli_flow
from cpu_kernels.compile import compile_kernel, host, run_kernel
from rapydli_flow.ops import Multiply
from rapydli_flow.spec import Spec
from rapydli_flow.template import templates

x, w = np.arange(12, dtype=np.float32).reshape(3, 4), np.arange(4, dtype=np.float32)
y = np.full((3, 4), np.nan, np.float32)
kernel = compile_kernel(templates("pointwise", "cpu")[0], Multiply(), (Spec((3, 4)), Spec((4,))), (Spec((3, 4)),))
run_kernel(kernel, [x, w], [y])
print(json.dumps({
    "module": kernel.module, "reloaded": kernel.reloaded, "right": bool((y == x * w).all()),
    "vector_bytes": host().vector_bytes, "key": host().key,
}))
"""


def start(folder, **environ):
    environ = {**os.environ, "RAPYDLI_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path), **environ}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", SCRIPT], env=environ, stdout=pipe, stderr=pipe, text=True)


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A cache folder with one kernel, and what the process that made it said."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, finish(start(folder))


def kernel_of(op, *ins, **config):
    outs = op.out_specs(*ins)
    template = (templates(op.name, "cpu") or templates(op.family, "cpu"))[0]
    chosen = {**template.default(op, ins, outs, compiler.host()), **config}
    return compiler.compile_kernel(template, op, ins, outs, compiler.host(), chosen)


def calls(kernel, *arrays):
    at = np.zeros(kernel.buffers[-1].size, np.int64)
    return CallList([(kernel, [address_of(a) for a in (*arrays, at)])]), (*arrays, at)


def test_a_second_process_loads_what_the_first_compiled(first):
    folder, made = first
    assert made["right"]
    assert not made["reloaded"]
    again = finish(start(folder))
    assert again["right"]
    assert again["reloaded"]
    assert again["module"] == made["module"]


def test_generated_text_is_readable(first):
    folder, made = first
    text = (folder / "kernels" / f"{made['module']}.py").read_text()
    assert text.startswith('"""pointwise/rows(grain=16384)')
    assert "def multiply_loop(task, in_0, in_1, out_0, extras, at):" in text
    assert "in_1 = flat(buffers, 1, numpy.float32)" in text
    assert text.splitlines()[-1].startswith("# end ")


@pytest.mark.parametrize("damage", ["text", "code", "index"])
def test_a_damaged_cache_is_made_again(first, tmp_path, damage):
    folder = tmp_path / "cache"
    made = finish(start(folder))
    kernels = folder / "kernels"
    suffix = {"text": ".py", "code": ".nbc", "index": ".nbi"}[damage]
    found = [p for p in kernels.rglob(f"{made['module']}*") if p.suffix == suffix]
    assert found
    for path in found:
        path.write_bytes(path.read_bytes()[:60])
    again = finish(start(folder))
    assert again["right"]
    assert again["reloaded"] == (damage == "text")  # the same text again: its machine code is still good
    assert finish(start(folder))["reloaded"]


def test_two_processes_may_compile_the_same_kernel_at_once(tmp_path):
    said = [finish(process) for process in [start(tmp_path), start(tmp_path)]]
    assert all(s["right"] for s in said)
    assert len(list((tmp_path / "kernels").glob("*.py"))) == 1
    assert not list((tmp_path / "kernels").glob("*.tmp"))
    assert finish(start(tmp_path))["reloaded"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, cache_dir):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RAPYDLI_CACHE_DIR", str(tmp_path / "file"))
    rapydli_flow.config.settings.cache_clear()
    with pytest.raises(SettingError, match=r"kernels cannot be written to .*file.kernels \(.*Set RAPYDLI_CACHE_DIR"):
        kernel_of(Relu(), Spec((5,)))


def test_a_whole_cache_may_be_read_only(first, tmp_path, monkeypatch):
    folder, made = first
    monkeypatch.setattr(compiler, "_store", lambda *args: pytest.fail("wrote"))
    path = folder / "kernels" / f"{made['module']}.py"
    assert compiler._whole(path)
    monkeypatch.setenv("RAPYDLI_CACHE_DIR", str(folder))
    rapydli_flow.config.settings.cache_clear()
    try:
        module = compiler._module(made["module"], lambda: pytest.fail("generated"))
    finally:
        rapydli_flow.config.settings.cache_clear()
    assert module.entry.cache_hits == 1


def test_lanes_are_forced_by_the_environment(first):
    folder, made = first
    forced = finish(start(folder, RAPYDLI_LANES="4"))
    assert forced["vector_bytes"] == 16
    assert forced["right"]
    assert forced["key"].endswith("-v16")
    if made["vector_bytes"] != 16:
        assert forced["module"] != made["module"]


def test_a_kernel_is_compiled_once_in_a_process(cache_dir):
    assert kernel_of(Relu(), Spec((6,))) is kernel_of(Relu(), Spec((6,)))
    assert kernel_of(Relu(), Spec((6,))) is not kernel_of(Relu(), Spec((6,)), grain=4096)


@pytest.mark.parametrize(
    ("op", "ins"),
    [
        (Moments(), (Spec((50, 9, 7)), Spec((7,)))),
        (Sum(axes=(0, 1)), (Spec((300, 40, 3)),)),
        (Sum(axes=(0, 1, 2)), (Spec((300, 40, 3)),)),
    ],
    ids=str,
)
def test_results_do_not_depend_on_threads(cache_dir, op, ins):
    kernel = kernel_of(op, *ins)
    assert max(kernel.tasks) > 1
    rng = np.random.default_rng(1)
    xs = [rng.standard_normal(s.shape).astype(s.dtype) for s in ins]
    seen = set()
    for threads in (1, 2, 3, 5):
        outs = [np.full(s.size, np.nan, s.dtype) for s in kernel.buffers[len(ins) : -1]]
        run, _ = calls(kernel, *xs, *outs)
        run.run(threads=threads)
        seen.add(b"".join(out.tobytes() for out in outs))
    assert len(seen) == 1


def test_two_threads_run_at_once(cache_dir):
    """Many short parallel lists from two Python threads, each with helpers of its own."""
    x = np.linspace(-1, 1, 40000, dtype=np.float32)
    kernel = kernel_of(Relu(), Spec((40000,)), grain=4096)
    wrong = []

    def work():
        y, z = np.empty_like(x), np.empty_like(x)
        at = np.zeros(2, np.int64)
        two = CallList([(kernel, [address_of(a) for a in (*pair, at)]) for pair in ((x, y), (y, z))])
        for _ in range(300):
            y[:] = z[:] = np.nan
            two.run(threads=3)
            if not (z == np.maximum(x, 0)).all():
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not wrong


def test_calls_run_in_order_and_are_timed(cache_dir):
    n = 1000
    x = np.ones(n, np.float32)
    kernel = kernel_of(Add(), Spec((n,)), Spec((n,)))
    at = np.zeros(2, np.int64)
    doubling = CallList([(kernel, [address_of(x), address_of(x), address_of(x), address_of(at)])] * 5)
    ends = np.zeros(5, np.int64)
    begin = doubling.run_timed(1, 4, ends)
    assert x[0] == 8
    assert begin < ends[1] <= ends[2] <= ends[3]
    assert ends[0] == ends[4] == 0
    y = np.zeros(n, np.float32)
    doubling.point(0, 2, address_of(y))
    doubling.run(0, 1)
    assert (x[0], y[0]) == (8, 16)


def test_a_call_needs_all_its_buffers(cache_dir):
    kernel = kernel_of(Relu(), Spec((6,)))
    with pytest.raises(TemplateError, match=r"takes 3 buffers \(f32\[6\], f32\[6\], i64\[2\]\) but got 1"):
        CallList([(kernel, [0])])
    x = np.zeros(6, np.float64)
    with pytest.raises(TemplateError, match=r"expected f32\[6\] but got float64"):
        compiler.run_kernel(kernel, [x], [x])
    with pytest.raises(TemplateError, match="C-contiguous"):
        address_of(np.zeros((3, 4))[:, :2])


def test_another_formula_is_another_kernel(cache_dir, monkeypatch):
    """Of an op whose class was edited between two processes: the same name and attributes."""
    x, y, z = np.full(6, -3, np.float32), np.empty(6, np.float32), np.empty(6, np.float32)
    compiler.run_kernel(kernel_of(Relu(), Spec(x.shape)), [x], [y])
    monkeypatch.setattr(Relu, "formula", lambda self, x: x * 2.0)
    compiler.run_kernel(kernel_of(Relu(), Spec(x.shape)), [x], [z])
    assert (y[0], z[0]) == (0, -6)


def test_not_finite_values_stay(cache_dir):
    x = np.array([np.nan, np.inf, -np.inf, 1.0] * 20, np.float32)
    y, z = np.empty_like(x), np.empty_like(x)
    compiler.run_kernel(kernel_of(Relu(), Spec(x.shape)), [x], [y])
    assert np.array_equal(y, np.maximum(x, 0), equal_nan=True)
    with np.errstate(invalid="ignore"):
        want = x + x[::-1]
    compiler.run_kernel(kernel_of(Add(), Spec(x.shape), Spec(x.shape)), [x, x[::-1].copy()], [z])
    assert np.array_equal(z, want, equal_nan=True)


def test_max_pool_keeps_the_first_nan(cache_dir):
    op = MaxPool(window=(2, 2), stride=(2, 2), padding=((1, 0), (0, 1)))
    x = np.random.default_rng(0).standard_normal((2, 5, 5, 3)).astype(np.float32)
    x[0, 1:3, 1, :] = np.nan
    x[1] = -np.inf
    y, argmax = op.run(x)
    kernel = kernel_of(op, Spec(x.shape))
    got = np.empty_like(y), np.empty_like(argmax)
    compiler.run_kernel(kernel, [x], got)
    assert np.array_equal(got[0], y, equal_nan=True)
    assert np.array_equal(got[1], argmax)


class Text:
    """What `module_text` makes of closures."""

    @staticmethod
    def of(body, tasks=1, **more):
        x = Spec((4,))
        buffers = ((x,), (x,), (), (), (Spec((2,), "int64"),))
        return compiler.module_text(Loop(body, tasks, **more), buffers, "family/name", "title")


def test_closures_of_the_same_name_keep_their_meaning(cache_dir):
    def adding(amount):
        def change(v):
            return v + amount  # a comment stays

        return change

    one, two = adding(1), adding(20)
    table = np.array([[1.0, 2.0]], np.float32)
    shape = (2, (3.5, float("inf")))

    def body(task, x, y, extras, at):
        for i in range(4):
            y[i] = one(x[i]) + two(x[i]) + table[0, 1] + shape[0]

    text = Text.of(body)
    assert "amount = 1\n" in text
    assert "amount_2 = 20\n" in text
    assert "return v + amount_2  # a comment stays" in text
    assert "y[i] = change(x[i]) + change_2(x[i]) + table[0, 1] + shape[0]" in text
    assert "table = numpy.array([[1.0, 2.0]], numpy.float32)" in text
    assert "shape = (2, (3.5, float('inf'),),)" in text
    compile(text, "module", "exec")


def test_a_phase_before_comes_first_in_the_count_of_tasks(cache_dir):
    def pack(task, x, y, extras, at):
        y[task] = x[task]

    def body(task, x, y, extras, at):
        y[3] = y[task] + x[3]

    text = Text.of(body, 1, before=pack, before_tasks=3)
    assert "TASKS = (3, 1,)" in text
    assert "if task < 3:\n        return pack(task - 0, in_0, out_0, extras, at)\n    body(task - 3" in text


def test_what_cannot_become_a_constant_is_refused(cache_dir):
    spec = Spec((3,))

    def body(task, x, y, extras, at):
        y[0] = x[0] + spec.size

    with pytest.raises(TemplateError, match=r"template family/name: spec is a Spec, which cannot become a constant"):
        Text.of(body)
    double = lambda v: v * 2  # noqa: E731

    def other(task, x, y, extras, at):
        y[0] = double(x[0])

    with pytest.raises(TemplateError, match="a lambda cannot become a kernel function"):
        Text.of(other)
    with pytest.raises(TemplateError, match="the body of a Loop is a plain function"):
        Text.of(3)


def test_a_config_must_fit(cache_dir):
    template = templates("pointwise", "cpu")[0]
    with pytest.raises(TemplateError, match=r"has parameters \['grain'\] but the config names \['size'\]"):
        compiler.compile_kernel(template, Relu(), (Spec((3,)),), (Spec((3,)),), None, {"size": 1})
    never = Template("conv", "cpu", lambda *args: None, {"a": (1,)}, {"never": lambda *args, **config: False})
    op = Conv(stride=(1,), padding=((0, 0),), dilation=(1,))
    with pytest.raises(TemplateError, match="does not fit f32"):
        compiler.compile_kernel(never, op, (Spec((1, 4, 1)),), (Spec((1, 4, 1)),))


def test_the_host_says_what_kernels_are_specialised_for():
    device = compiler.host()
    assert isinstance(device, Device)
    assert device.kind == "cpu"
    assert device.name
    assert device.cores >= 1
    assert device.vector_bytes in (16, 32, 64)
    assert device.memory_bytes > 1 << 28
    assert Path(compiler.__file__).exists()
    assert Epilogue.none(Spec((3,))).identity


def test_what_is_inlined_is_optimised_as_part_of_the_kernel_alone(cache_dir, monkeypatch):
    optimised, full = [], JITCodeLibrary._optimize_final_module

    def watched(library):
        optimised.append(library.name)
        full(library)

    monkeypatch.setattr(JITCodeLibrary, "_optimize_final_module", watched)
    x, w = Spec((2, 6, 6, 3)), Spec((3, 3, 3, 8))
    op = Conv(stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1))
    (tiles,) = (template for template in templates("conv", "cpu") if template.name == "tiles")
    kernel = compiler.compile_kernel(tiles, op, (x, w), (op.infer(x, w),))
    assert optimised
    assert not {"part", "slide", "body"} & set(optimised), optimised
    defined = [line for line in kernel.entry.inspect_llvm().splitlines() if line.startswith("define")]
    assert all("entry" in line for line in defined), defined
