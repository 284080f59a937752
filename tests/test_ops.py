"""Every operator of the registry, through the one suite. Adding an op adds no test here."""

from typing import Any

import pytest

from rapydli_flow.graph import Fused, parts
from rapydli_flow.ops import Op, Sample
from rapydli_flow.template import templates
from rapydli_flow.testing import kernels
from rapydli_flow.testing import ops as suite

CLASSES = suite.op_classes()
CASES = [pytest.param(sample, id=f"{op.name}-{i}") for op in CLASSES for i, sample in enumerate(op.samples())]
RANDOM_CONFIGS = 4  # for each template, shared out over the samples of its family; check_op tries more


def kernel_cases() -> list[Any]:
    """Samples that templates run, a dtype, and the number of random configs."""
    families: dict[str, list[tuple[str, Sample, str]]] = {}
    for case in CASES:
        (sample,) = case.values
        if kernels.needs_template(type(sample.op)) or isinstance(sample.op, Fused):
            rows = families.setdefault(parts(sample.op, sample.ins)[0].family, [])
            rows += [(f"{case.id}-{dtype}", sample, dtype) for dtype in kernels.dtypes(sample)]
    return [
        pytest.param(sample, dtype, RANDOM_CONFIGS * (j + 1) // len(rows) - RANDOM_CONFIGS * j // len(rows), id=name)
        for rows in families.values()
        for j, (name, sample, dtype) in enumerate(rows)
    ]


def soon_and_slow(cases: list[Any]) -> list[Any]:
    """All float32 and each family's first float64 soon; other float64 is marked slow, for compiling takes long."""
    first = {parts(case.values[0].op, case.values[0].ins)[0].family: case for case in reversed(cases) if wide(case)}
    later = [case for case in cases if wide(case) and case not in first.values()]
    return [pytest.param(*case.values, id=case.id, marks=pytest.mark.slow) if case in later else case for case in cases]


def wide(case: Any) -> bool:
    return bool(case.values[1] == "float64")


each_class = pytest.mark.parametrize("op", CLASSES, ids=lambda op: op.name)
each_sample = pytest.mark.parametrize("sample", CASES)
KERNELS = kernel_cases()
each_kernel = pytest.mark.parametrize(("sample", "dtype", "random_configs"), KERNELS)


@each_sample
@pytest.mark.parametrize("check", suite.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_op(check: Any, sample: Sample) -> None:
    check(sample)


@each_class
def test_has_samples(op: type[Op]) -> None:
    assert op.samples() or not kernels.needs_samples(op)


@each_class
def test_rejects(op: type[Op]) -> None:
    suite.check_rejects(op)


@pytest.mark.parametrize("op", [op for op in CLASSES if op.samples()], ids=lambda op: op.name)
def test_sizes(op: type[Op]) -> None:
    suite.check_sizes(op)


@each_class
def test_has_template(op: type[Op]) -> None:
    kernels.check_has_template(op)


@pytest.mark.parametrize(("sample", "dtype", "random_configs"), soon_and_slow(KERNELS))
def test_templates(sample: Sample, dtype: str, random_configs: int) -> None:
    assert kernels.check_templates(sample, dtype, random_configs=0, corner=False) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sample", "dtype", "random_configs"),
    [case for case in KERNELS if not wide(case) or case.values[2]],
)
def test_other_configs(sample: Sample, dtype: str, random_configs: int) -> None:
    """The corner, and some by chance."""
    kernels.check_templates(sample, dtype, random_configs=random_configs, corner=dtype == "float32")


@pytest.mark.exhaustive
@each_kernel
def test_every_config(sample: Sample, dtype: str, random_configs: int) -> None:
    kernels.check_templates(sample, dtype, every=True)


@pytest.mark.parametrize("family", sorted({op.family for op in CLASSES if kernels.needs_template(op)}))
def test_every_template_fits_a_sample(family: str) -> None:
    """A template that no sample reaches is a template that no test runs."""
    samples = [case.values[0] for case in CASES if parts(case.values[0].op, case.values[0].ins)[0].family == family]
    for template in templates(family, "cpu"):
        asked = (parts(sample.op, sample.ins) for sample in samples)
        assert any(template.default(op, ins, op.out_specs(*ins), kernels.host()) is not None for op, ins, _ in asked)
