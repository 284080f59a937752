"""Group and instance norm on the emulator: bands and rows at sizes that fill several blocks, epilogues, large means."""

import numpy as np
import pytest

from rapydli_flow import ops
from rapydli_flow.ops import Sample
from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, templates
from rapydli_flow.testing.gpu import (
    CARD,
    as_dtype,
    assert_close,
    bias_residual_relu,
    chosen,
    emulated,
    tolerance,
    wanted,
)
from rapydli_flow.tuner import Request

SHAPES = {  # shape, axes, groups, and what else
    "two channels a group": ((2, 19, 17, 32), 3, 16, {}),
    "three channels a group": ((2, 23, 11, 12), 3, 4, {}),
    "vectors in a group": ((2, 9, 31, 64), 3, 4, {"centered": False}),
    "a group of odd width": ((2, 40, 35), 2, 5, {"eps": 0.1}),
    "instance": ((3, 33, 9, 64), 3, 64, {}),
    "instance of three": ((2, 41, 40, 3), 3, 3, {}),
    "instance of samples": ((2, 3, 150, 8), 2, 8, {}),
    "rows": ((37, 24), 1, 3, {}),
    "single elements": ((5, 16), 1, 16, {"eps": 0.5}),
    "steps without a rest": ((1, 4096, 4), 2, 4, {}),
}


def sample_of(name, grad=False):
    shape, axes, groups, more = SHAPES[name]
    op = (ops.StandardizeGrad if grad else ops.Standardize)(axes=axes, groups=groups, **more)
    return Sample(op, (Spec(shape),) * (1 + grad))


def fitting(sample):
    outs = sample.op.out_specs(*sample.ins)
    return [t for t in templates(sample.op.family, "cuda") if t.default(sample.op, sample.ins, outs, CARD)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
@pytest.mark.parametrize("name", SHAPES)
def test_bigger(name, grad, dtype):
    sample = as_dtype(sample_of(name, grad), dtype)
    values = sample.draw(np.random.default_rng(5))
    want = wanted(sample.op, values)
    served = fitting(sample)
    assert {t.name for t in served} == {"of_bands", "of_rows"}
    for template in served:
        for i, config in enumerate(chosen(template, sample, seed=1, count=3)[:5]):
            got = emulated(template, sample.op, values, config, as_compiled=i == 0)
            assert_close(got, want, 2 * tolerance(sample))


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
@pytest.mark.parametrize("name", ["two channels a group", "three channels a group", "instance"])
def test_a_large_mean_does_not_cancel(name, grad, held):
    sample = sample_of(name, grad)
    rng = np.random.default_rng(3)
    values = sample.draw(rng)
    *dy, x = values
    x = (rng.normal(size=x.shape) + 1e4 * rng.integers(1, 9, x.shape[-1] // 2).repeat(2)).astype(np.float32)
    if name != "instance":  # the channels of a group have one mean
        x = (rng.normal(size=x.shape) - 3e4).astype(np.float32)
    want, tried = wanted(sample.op, [*dy, x]), []
    for template in fitting(sample):
        for config in chosen(template, sample, seed=4, count=40):
            if config["held"] == held and template.name not in tried:
                tried.append(template.name)
                assert_close(emulated(template, sample.op, [*dy, x], config), want, 1e-5)
    assert "of_bands" in tried


@pytest.mark.parametrize("name", ["two channels a group", "three channels a group", "instance of three", "rows"])
def test_epilogue_is_applied_before_the_store(name):
    sample, rng = sample_of(name), np.random.default_rng(6)
    epilogue = bias_residual_relu(sample.op.out_specs(*sample.ins)[0])
    extras = [np.asarray(rng.normal(size=extra.shape), np.float32) for extra in epilogue.extras]
    values = sample.draw(rng)
    want = np.maximum(wanted(sample.op, values)[0] + extras[0] + extras[1], 0)
    for template in fitting(sample):
        for config in chosen(template, sample, seed=2, count=2):
            got = emulated(template, sample.op, values, config, epilogue=epilogue, extras=extras)
            assert_close(got, (want,), 2 * tolerance(sample))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
@pytest.mark.parametrize("name", ["two channels a group", "three channels a group", "instance", "steps without a rest"])
def test_samples_in_parts(name, grad, dtype):
    sample = as_dtype(sample_of(name, grad), dtype)
    values = sample.draw(np.random.default_rng(8))
    (bands,) = (t for t in fitting(sample) if t.name == "of_bands")
    want, tried = wanted(sample.op, values), set()
    for config in chosen(bands, sample, seed=9, count=200):
        if config["parts"] > 1 and config["parts"] not in tried and len(tried) < 3:
            tried.add(config["parts"])
            assert_close(emulated(bands, sample.op, values, config, as_compiled=True), want, 2 * tolerance(sample))
    assert len(tried) > 1


def test_few_large_samples_fill_a_card_untuned():
    op, x = ops.Standardize(axes=3, groups=64), Spec((1, 512, 512, 64))
    (bands,) = (t for t in templates("standardize", "cuda") if t.name == "of_bands")
    grids = bands.build(op, (x,), (x,), Epilogue.none(x), **bands.default(op, (x,), (x,), CARD))
    assert len(grids) == 3
    assert all(grid.grid >= CARD.cores for grid in grids)


@pytest.mark.parametrize(
    ("shape", "groups", "name"),
    [
        ((32, 56, 56, 64), 64, "of_bands"),
        ((32, 56, 56, 64), 32, "of_bands"),
        ((1, 512, 512, 64), 64, "of_bands"),
        ((2, 200, 304, 256), 32, "of_bands"),
        ((32, 14, 14, 512), 32, "of_rows"),
        ((32, 28, 28, 2048), 2, "of_rows"),
    ],
)
def test_groups_of_few_channels_are_served_by_bands_untuned(shape, groups, name):
    op, x = ops.Standardize(axes=3, groups=groups), Spec(shape)
    request = Request(op, (x,), Epilogue.none(x))
    assert request.default(CARD).template == name


def test_what_bands_do_not_take():
    (bands,) = (t for t in templates("standardize", "cuda") if t.name == "of_bands")
    for op, x in (
        (ops.Standardize(axes=3), Spec((2, 8, 8, 16))),  # one group: rows
        (ops.Standardize(axes=3, groups=2), Spec((2, 8, 8, 2048))),  # too many channels to merge in order
        (ops.Standardize(axes=3, groups=4), Spec((2, 8, 8, 16), "float64")),
        (ops.Standardize(axes=3, groups=4), Spec((2, 2**13, 2**13, 16))),
    ):
        assert bands.default(op, (x,), (x,), CARD) is None
