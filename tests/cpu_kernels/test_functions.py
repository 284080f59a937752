"""Elementary functions of kernels: how near to float64 they are, special values, vectors and single elements."""

import math
import re
import sys
from math import exp as from_math

import numpy as np
import pytest
from numba import njit

from cpu_kernels import functions
from cpu_kernels.compile import compile_kernel, module_text, run_kernel
from cpu_kernels.inlined import OPTIONS
from rapydli_flow import ops
from rapydli_flow.spec import Spec
from rapydli_flow.template import Loop, templates

ULP = {"exp": 2, "expm1": 2, "log": 2, "log1p": 2, "tanh": 2, "erf": 3}
TRUE = {name: getattr(np, name, None) or np.vectorize(getattr(math, name), otypes=[np.float64]) for name in ULP}
names = pytest.mark.parametrize("name", ULP)


def over(function):
    """``function`` of every element, in a loop as of a kernel."""

    def loop(x, y):
        for i in range(x.size):
            y[i] = function(x[i])

    return njit(**OPTIONS)(loop)


@pytest.fixture(scope="module")
def loops():
    return {name: over(getattr(functions, name)) for name in ULP}


def applied(loop, x):
    y = np.full_like(x, 7)
    loop(x, y)
    return y


def true(name, x):
    """In float64."""
    with np.errstate(all="ignore"):
        return TRUE[name](x.astype(np.float64))


def off(y, exact):
    """How far from the true results, in units in the last place; infinity is what comes after the largest float32."""
    after = 2.0**128
    unit = np.spacing(np.minimum(np.abs(exact), after / 2).astype(np.float32))
    return np.abs(np.clip(y.astype(np.float64), -after, after) - np.clip(exact, -after, after)) / unit


def numbers():
    """All kinds of float32, and more of those that functions are not constant on."""
    random = np.random.default_rng(0)
    every = random.integers(0, 1 << 32, 500_000, np.uint64).astype(np.uint32).view(np.float32)
    ranges = ((-1.5, 1.5), (-20.0, 20.0), (-110.0, 95.0))
    usual = [random.uniform(low, high, 150_000).astype(np.float32) for low, high in ranges]
    near = np.exp(random.uniform(-30.0, 3.0, 100_000)).astype(np.float32)
    return np.concatenate([every, *usual, near, -near])


@names
def test_every_result_is_near_the_true_one(name, loops):
    x = numbers()
    y, exact = applied(loops[name], x), true(name, x)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(exact))
    assert np.nanmax(off(y, exact)) <= ULP[name]


@names
def test_special_values_are_those_of_float64(name, loops):
    tiny, inf, largest = 2.0**-149, math.inf, np.finfo(np.float32).max
    x = np.array([0.0, inf, math.nan, tiny, 3 * tiny, 2.0**-126, 1.0, 2.0, largest, 1000.0], np.float32)
    x = np.concatenate([x, -x])
    y, exact = applied(loops[name], x), true(name, x)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(exact))
    known = ~np.isnan(exact)
    assert off(y, exact)[known].max() <= ULP[name]
    np.testing.assert_array_equal(np.signbit(y[known]), np.signbit(exact[known]))


def test_exponentials_underflow_gradually(loops):
    x = np.linspace(-104.5, -87.0, 4001, dtype=np.float32)
    y, exact = applied(loops["exp"], x), true("exp", x)
    assert (np.abs(y - exact) <= 2.0**-149).all()
    assert ((y > 0) & (y < 2.0**-126)).sum() > 3000
    assert y[0] == 0


def test_logarithms_of_subnormal_numbers_are_right(loops):
    x = np.arange(1, 1 << 23, 1237, dtype=np.uint32).view(np.float32)
    np.testing.assert_allclose(applied(loops["log"], x), true("log", x), rtol=2**-23)


BORDERS = (2**-25, math.log(2) / 2, 0.625, math.sqrt(0.5), 1.34375, math.sqrt(2), 4.0, 88.72284)


@pytest.mark.parametrize("border", BORDERS)
@names
def test_where_one_formula_ends_the_next_goes_on(name, border, loops):
    at = np.array([border], np.float32).view(np.int32)
    x = (at + np.arange(-500, 501, dtype=np.int32)).view(np.float32)
    x = np.concatenate([x, x - np.float32(1)] if name in ("log", "log1p") else [x, -x])
    x = x[x > -1] if name == "log1p" else x[x > 0] if name == "log" else x
    assert off(applied(loops[name], x), true(name, x)).max() <= ULP[name]


@names
def test_an_element_has_the_same_bits_in_a_vector_and_alone(name, loops):
    x = np.random.default_rng(1).uniform(-3.0, 3.0, 1003).astype(np.float32)
    whole = applied(loops[name], x)
    alone = np.concatenate([applied(loops[name], x[i : i + 1]) for i in range(x.size)])
    np.testing.assert_array_equal(whole.view(np.int32), alone.view(np.int32))


@names
def test_float64_is_that_of_the_c_library(name, loops):
    x = np.random.default_rng(2).uniform(-0.9, 3.0, 10_000)
    x = np.abs(x) if name == "log" else x
    usual = over(getattr(math, name))
    np.testing.assert_array_equal(applied(loops[name], x), applied(usual, x))
    np.testing.assert_allclose(applied(loops[name], x), TRUE[name](x), rtol=1e-15)


@names
def test_whole_numbers_and_truth_values_become_float64(name, loops):
    y = np.zeros(2)
    for x in (np.array([1, 2]), np.array([1, 2], np.uint8), np.array([True, True])):
        loops[name](x, y)
        np.testing.assert_allclose(y, TRUE[name](x.astype(np.float64)), rtol=1e-15)


def test_all_else_is_that_of_math():
    assert set(functions.WRITTEN) == set(ULP)
    others = {name for name in vars(math) if not name.startswith("_")} - set(ULP)
    assert all(getattr(functions, name) is getattr(math, name) for name in others)


def text_of(body):
    return module_text(Loop(body, 1), ((Spec((4,)),), (Spec((4,)),), (), (), (Spec((2,), "int64"),)), "t", "title")


def test_kernels_import_them_for_those_of_math():
    def by_module(task, x, y, extras, at):
        y[0] = math.exp(x[0]) + math.sqrt(x[1])

    def by_name(task, x, y, extras, at):
        y[0] = from_math(x[0])

    assert "\nimport cpu_kernels.functions as math\n" in text_of(by_module)
    assert "\nfrom cpu_kernels.functions import exp as from_math\n" in text_of(by_name)


OPS = (ops.Exp, ops.Log, ops.Tanh, ops.Sigmoid, ops.Gelu, ops.GeluGrad, ops.Softplus, ops.Elu, ops.Swish)
OPS += (ops.Softmax, ops.LogSoftmaxGrad, ops.CrossEntropy)


def kernel_of(op, *ins):
    (template, *_) = templates(op.name, "cpu") or templates(op.family, "cpu")
    return compile_kernel(template, op, ins, (op.infer(*ins),))


@pytest.mark.parametrize("made", OPS, ids=lambda made: made.__name__)
def test_kernels_of_float32_call_nothing_and_have_vectors(made, cache_dir):
    rows, op = Spec((16, 64)), made()
    ins = {"cross_entropy": (rows, Spec((16,), "int64"))}.get(op.name, (rows,) * (1 + made.__name__.endswith("Grad")))
    code = sys.modules[kernel_of(op, *ins).module].entry.inspect_llvm()
    assert not re.search(r"@(exp|expm1|log|log1p|tanh|erf)f?\(", code)
    assert re.search(r"@llvm\.fmuladd\.v\d+f32", code)


@pytest.mark.parametrize(("op", "shapes"), [(ops.Gelu(), [(7, 1003)]), (ops.GeluGrad(), [(7, 1003)] * 2)], ids=str)
def test_results_in_place_have_the_same_bits(op, shapes):
    random = np.random.default_rng(3)
    ins = [random.standard_normal(shape, np.float32) for shape in shapes]
    kernel, want = kernel_of(op, *map(Spec, shapes)), np.empty(shapes[0], np.float32)
    run_kernel(kernel, ins, [want])
    for i in range(len(ins)):
        taken = [x.copy() for x in ins]
        run_kernel(kernel, taken, [taken[i]])
        np.testing.assert_array_equal(taken[i].view(np.int32), want.view(np.int32))
