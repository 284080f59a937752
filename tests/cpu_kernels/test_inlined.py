"""What kernels are compiled of: functions that several of them share, and buffers."""

import os
import subprocess
import sys
import types

import numpy as np
import pytest
from numba import njit

from cpu_kernels.buffer import Buffer, local
from cpu_kernels.compile import compile_kernel
from cpu_kernels.inlined import part
from rapydli_flow.ops import Conv
from rapydli_flow.spec import Spec
from rapydli_flow.template import templates


def made(text, **names):
    space = dict(names)
    exec(text, space)
    (function,) = (f for name, f in space.items() if name not in names and isinstance(f, types.FunctionType))
    return part(function)


def called(function, *args):
    """What a kernel that calls a part gets; parts are not for Python."""

    @njit
    def kernel(*args):
        return function(*args)

    return kernel(*args)


def test_functions_that_mean_the_same_are_one():
    once = made("def f(x):\n    return x + size\n", size=3)
    again = made("def f(x):\n    return x + size\n", size=3)
    assert once is again
    outer = [made("def g(x):\n    return f(x) * 2\n", f=f) for f in (once, again)]
    assert outer[0] is outer[1]
    assert called(outer[0], 4) == 14


@pytest.mark.parametrize("other", [4, 3.0, True, np.float32(3), (3,)])
def test_functions_with_other_constants_are_others(other):
    text = "def f(x):\n    return size\n"
    assert made(text, size=3) is not made(text, size=other)


def test_functions_that_call_others_are_others():
    inner = [made(f"def f(x):\n    return x + {i}\n") for i in (1, 2)]
    outer = [made("def g(x):\n    return f(x)\n", f=f) for f in inner]
    assert [called(g, 1) for g in outer] == [2, 3]
    constants = [made(f"def f(x):\n    return x * {text}\n") for text in ("1", "1.0")]
    assert constants[0] is not constants[1]


def test_a_function_is_compiled_once_for_all_constants_it_is_called_with():
    inner = made("def inner(x, n):\n    return x + n\n")
    outer = made("def outer(x):\n    return inner(x, 3) + inner(x, 5)\n", inner=inner)
    assert called(outer, 1) == 10
    assert len(inner.signatures) == 1


def test_a_function_that_needs_a_constant_gets_it():
    text = "def fresh(y, n):\n    a = local(n, y)\n    a[0] = 1\n    return a[0] + n\n"
    fresh = made(text, local=local)
    outer = made("def outer(y):\n    return fresh(y, 4) + fresh(y, 8)\n", fresh=fresh)
    assert called(outer, np.zeros(2, np.float32)) == 14


def test_kernels_of_one_template_share_functions(cache_dir, compiled_parts):
    op = Conv(stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
    (winograd,) = (t for t in templates("conv", "cpu") if t.name == "winograd")
    counts = []
    for channels in (32, 48):  # whole vectors, of 4 to 16 lanes
        x, w = Spec((2, 9, 9, channels)), Spec((3, 3, channels, 16))
        compile_kernel(winograd, op, (x, w), (op.infer(x, w),))
        counts.append(len(compiled_parts))
    assert sum(name.startswith("transform") for name in compiled_parts[: counts[0]]) >= 3
    assert not any(name.startswith(("transform", "window")) for name in compiled_parts[counts[0] :])
    assert len(compiled_parts) > counts[0]


ALONE = """
import sys
from cpu_kernels.compile import compile_kernel
from rapydli_flow.ops import Conv
from rapydli_flow.spec import Spec
from rapydli_flow.template import templates

op = Conv(stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
(winograd,) = (t for t in templates("conv", "cpu") if t.name == "winograd")
for channels in map(int, sys.argv[1:]):
    x, w = Spec((2, 9, 9, channels)), Spec((3, 3, channels, 16))
    kernel = compile_kernel(winograd, op, (x, w), (op.infer(x, w),))
    print(kernel.module, kernel.reloaded)
"""


def test_a_kernel_is_loaded_without_those_that_it_shared_functions_with(tmp_path):
    def loaded(*channels):
        environ = {**os.environ, "RAPYDLI_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", ALONE, *map(str, channels)]
        lines = subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout.splitlines()
        return [tuple(line.split()) for line in lines]

    (first, _), (second, _) = loaded(16, 24)
    for file in (tmp_path / "kernels").rglob(f"{first}.*"):
        file.unlink()
    assert loaded(24) == [(second, "True")]


@pytest.fixture
def compiled_parts(monkeypatch):
    """Names of the parts of kernels that go through Numba, as they do; none is there before."""
    from cpu_kernels import inlined

    names, compile_one = [], inlined.Inlined.compile_extra

    def watched(self, function):
        names.append(function.__name__)
        return compile_one(self, function)

    monkeypatch.setattr(inlined, "_parts", {})
    monkeypatch.setattr(inlined.Inlined, "compile_extra", watched)
    return names


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8", "bool"])
def test_buffers_hold_every_dtype(dtype):
    values = np.array([0, 1, 1, 0, 1]).astype(dtype)

    @njit
    def copied(x, y):
        b = local(5, x)
        for i in range(5):
            b[i] = x[i]
        b[np.uint64(1)] = b[0]
        for i in range(5):
            y[i] = b[i]

    out = np.zeros_like(values)
    copied(values, out)
    assert out.tolist() == [values[0], values[0], *values[2:]]


def test_a_buffer_converts_what_is_written_to_it():
    @njit
    def rounded(x, value):
        b = local(1, x)
        b[0] = value
        return b[0]

    assert rounded(np.zeros(1, np.float32), 0.1) == np.float32(0.1)
    assert rounded(np.zeros(1, np.int64), 2.9) == 2


def test_a_buffer_is_an_address():
    from numba.core.registry import cpu_target
    from numba.core.types import float32

    assert str(cpu_target.target_context.get_value_type(Buffer(float32))) == "float*"
