"""The one suite that every operator passes: walk the registry, or call `rapydli_flow.check` on an op of your own.

    check_attributes   an op is hashable, goes through JSON, counts its FLOPs, and is linear if it says so
    check_infer        `infer` tells the shapes and dtypes that `reference` gives
    check_vjp          `vjp` against central differences, in float64, along random directions
    check_rejects      what `infer` must refuse, and the message
    check_index        the index formula against what `reference` really reads
    check_in_place     what may run in place reads nothing but its own place
    check_local        the op on blocks against the op on the whole
    check_sizes        the same on sizes that Hypothesis draws
    check_templates    every CPU template against `reference`, and that this template is what ran
    check_tails        the same with a pointwise tail behind the op, which a network may fuse into its kernel

A check raises AssertionError with the op, its operands and both values. All draws are seeded by the
sample, so a failure comes back. `check_sizes` needs hypothesis.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np

from ..errors import MissingDependency, RapydliError, ShapeError
from ..graph import Fused
from ..graph.serialise import decode, encode
from ..index import Index, Operand
from ..ops import Op, Sample, registry, spec_of
from ..spec import Array, Block, Spec
from .gradients import check_vjp
from .kernels import (
    check_has_template,
    check_tails,
    check_templates,
    dtypes,
    has_templates,
    needs_samples,
    needs_template,
)
from .report import Report, compare, fail, join, seeded

Element = tuple[int | None, ...]


def op_classes() -> list[type[Op]]:
    """Every op of this package, by name."""
    return [registry[name] for name in sorted(registry) if registry[name].__module__.startswith("rapydli_flow.")]


def check_op(op: type[Op]) -> None:
    """Everything that this module checks, for one op, which must have a CPU template if it runs on workers."""
    check(op)
    check_has_template(op)


def check(op: type[Op]) -> Report:
    """Try an op of your own: all that it defines must be right.

    An op with ``infer``, ``reference`` and ``samples`` is enough; what it could have besides (a gradient, a
    template, an index formula) is named in the report. Raises AssertionError with the operands that show what
    is wrong. The sizes are drawn by hypothesis; without it this check is skipped, and the report says so.
    """
    samples = op.samples()
    if needs_samples(op) and not samples:
        raise AssertionError(
            f"{op.name}: no samples. Give a few small ones; the suite tries nothing else: "
            "@classmethod def samples(cls): return (Sample(cls(), (Spec((3, 5)),)),)"
        )
    lacks = missing(op)
    passed: dict[str, int] = {}
    skipped: dict[str, str] = {}
    if op.rejects():
        check_rejects(op)
        passed["rejects"] = len(op.rejects())
    left_out = {"vjp"} & set(lacks) | ({"index", "in_place", "local"} if "index" in lacks else set())
    for one in CHECKS:
        name = one.__name__.removeprefix("check_")
        if samples and name in left_out:
            skipped[name] = "no vjp" if name == "vjp" else "no index formula"
            continue
        for sample in samples:
            _noted(one, sample)
            passed[name] = passed.get(name, 0) + 1
    if samples and "index" in lacks:
        skipped["sizes"] = "no index formula"
    elif samples:
        try:
            check_sizes(op)
            passed["sizes"] = len(samples)
        except MissingDependency as error:
            skipped["sizes"] = str(error)
    if needs_template(op) and has_templates(op):
        check_has_template(op)
        kernels = sum(check_templates(sample, dtype) for sample in samples for dtype in dtypes(sample))
        passed["kernels"] = kernels + sum(check_tails(sample) for sample in samples)
    return Report(op.name, passed, skipped, lacks)


def missing(op: type[Op]) -> dict[str, str]:
    """What an op does not define, and what that costs."""
    lacks: dict[str, str] = {}
    if not needs_samples(op):
        return lacks
    if op.vjp is Op.vjp and any(spec.floating for sample in op.samples() for spec in sample.ins):
        lacks["vjp"] = "no gradient, so nothing before it can be trained"
    if needs_template(op) and not has_templates(op):
        lacks["template"] = f"runs its reference in NumPy; a CPU template of family {op.family!r} makes it fast"
    if op.index is Op.index:
        lacks["index"] = "every rank computes all of it; with an index formula its work is divided"
    if not op.rejects():
        lacks["rejects"] = "nothing tries what infer must refuse, and its messages"
    return lacks


def _noted(one: Callable[[Sample], None], sample: Sample) -> None:
    """Run a check; an error of the op's own code tells where it came from."""
    try:
        one(sample)
    except Exception as error:
        if not isinstance(error, AssertionError):
            error.add_note(f"in {one.__name__} of {sample.op} on {join(sample.ins)}")
        raise


# what an op says about itself --------------------------------------------------------------------------


def check_attributes(sample: Sample) -> None:
    """An op is a value: hashable, written as JSON and read again; FLOPs are counted; linear ops are linear."""
    op = sample.op
    again = decode(encode(op))
    if again != op or hash(again) != hash(op):
        fail(sample, f"JSON gives another op: {again}")
    if op.flops(*sample.ins) < 0:
        fail(sample, f"flops gives {op.flops(*sample.ins)}")
    if op.linear:
        rng = seeded(sample, "linear")
        a, b = sample.draw(rng, "float64"), sample.draw(rng, "float64")
        both = op.run(*(x + y for x, y in zip(a, b, strict=True)))
        for whole, one, other in zip(both, op.run(*a), op.run(*b), strict=True):
            compare(sample, "op is not linear: f(a + b) against f(a) + f(b)", whole, one + other, 1e-11)


def check_infer(sample: Sample) -> None:
    """`infer` tells the shapes and dtypes that `reference` gives, for every floating dtype."""
    for dtype in dtypes(sample):
        ins = sample.draw(seeded(sample, "infer"), dtype)
        said = sample.op.out_specs(*map(spec_of, ins))
        got = tuple(spec_of(y) for y in sample.op.run(*ins))
        if said != got:
            fail(sample, f"infer says {join(said)} but reference gives {join(got)}")
        if len(said) != len(sample.op.outputs):
            fail(sample, f"outputs are called {sample.op.outputs} but there are {len(said)}")


def check_rejects(op: type[Op]) -> None:
    """`infer` refuses what `rejects` lists, with its message and one of this package's errors."""
    for case in op.rejects():
        try:
            out = case.op.out_specs(*case.ins)
        except RapydliError as error:
            if not re.search(case.message, str(error)):
                raise AssertionError(f"{case.op}: the message {str(error)!r} does not match {case.message!r}") from None
        else:
            raise AssertionError(f"{case.op}: {join(case.ins)} must be refused but infer gives {join(out)}")


# index formulas ----------------------------------------------------------------------------------------


def check_index(sample: Sample, *, positions: int = 6, draws: int = 400) -> None:
    """Change one input element: what moves must be told by the formula, and what it tells must move.

    The second, for floating inputs: at each place that the formula names, some output moves in one
    of up to ``draws`` draws (a maximum, a mask or a ReLU hides an element in most of them).
    """
    op, rng = sample.op, seeded(sample, "index")
    specs, outs, index = _formula(sample)
    told: dict[tuple[int, Element], set[tuple[int, Element]]] = {}
    for i, a, k, b in index.reads(specs, outs):
        told.setdefault((i, a), set()).add((k, b))
    watched: list[tuple[int, tuple[int, ...], set[tuple[int, Element]]]] = []
    unseen: list[set[Element]] = []
    for i, spec in enumerate(specs):
        for place in _places(spec.shape, positions, rng):
            reads = told.get((i, _masked(index.inputs[i], place)), set())
            watched.append((i, place, reads))
            unseen.append({b for _, b in reads} if spec.floating else set())
    for n in range(draws):
        if n >= 3 and not any(unseen):
            return
        ins = sample.draw(rng, "float64")
        before = op.run(*ins)
        for (i, place, reads), missing in zip(watched, unseen, strict=True):
            if n >= 3 and not missing:
                continue
            dots = index.inputs[i]  # any element along '.' may be the one that is read
            place = (
                place
                if n < 3
                else tuple(
                    int(rng.integers(size)) if axis is None else p
                    for p, axis, size in zip(place, dots, specs[i].shape, strict=True)
                )
            )
            changed = list(ins)
            changed[i] = ins[i].copy()
            changed[i][place] = _another(sample, i, ins[i][place], n, rng)
            moved: set[tuple[int, Element]] = set()
            for k, (y0, y1) in enumerate(zip(before, op.run(*changed), strict=True)):
                where = np.argwhere(y0 != y1).tolist()
                moved |= {(k, _masked(index.outputs[k], p)) for p in where}
            if moved - reads:
                k, b = min(moved - reads, key=str)
                fail(sample, f"input {i} at {place} moves output {k} at {b}, but {index.formula!r} does not tell")
            missing -= {b for _, b in moved}
    for (i, place, _), missing in zip(watched, unseen, strict=True):
        if missing:
            fail(
                sample,
                f"{index.formula!r} tells that input {i} at {place} is read at {min(missing, key=str)}; it is not",
            )


def check_in_place(sample: Sample) -> None:
    """An output that may lie on an input has its shape, and reads that input only at its own place."""
    specs, outs, index = _formula(sample)
    donors = [(i, k) for i in range(len(specs)) for k in range(len(outs)) if index.in_place(i, k)]
    for i, k in donors:
        if specs[i].shape != outs[k].shape:
            fail(sample, f"output {k} ({outs[k]}) may run in place of input {i} ({specs[i]}), of another shape")
    if donors:
        for i, a, k, b in index.reads(specs, outs):
            if (i, k) in donors and a != b:
                fail(sample, f"output {k} may run in place of input {i} but at {b} it reads {a}")


def _formula(sample: Sample) -> tuple[tuple[Spec, ...], tuple[Spec, ...], Index]:
    specs = tuple(Spec(s.shape, "float64") if s.floating else s for s in sample.ins)
    return specs, sample.op.out_specs(*specs), sample.op.indexing(*specs)


def _masked(operand: Operand, place: Sequence[int]) -> Element:
    """A place as the formula writes it: None on axes written '.'."""
    return tuple(None if axis is None else int(p) for axis, p in zip(operand, place, strict=True))


def _places(shape: tuple[int, ...], count: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Some places of an array: both corners, and random ones."""
    found = [(0,) * len(shape), tuple(size - 1 for size in shape)]
    found += [tuple(int(rng.integers(size)) for size in shape) for _ in range(count - 2)]
    return list(dict.fromkeys(found))


def _another(sample: Sample, i: int, value: Any, n: int, rng: np.random.Generator) -> Any:
    """Another value that the operand may have: an end of its range, or one inside."""
    if sample.ins[i].floating:
        lo, hi = sample.ranges.get(i, (-2.0, 2.0))
        return (hi, lo, rng.uniform(lo, hi))[n % 3]
    lo, hi = sample.ranges.get(i, (0, 8))
    return int(lo) + (int(value) - int(lo) + int(rng.integers(1, max(2, int(hi) - int(lo))))) % int(hi - lo)


# blocks ------------------------------------------------------------------------------------------------


def check_local(sample: Sample, *, cuttings: int = 2) -> None:
    """The op on blocks against the op on the whole, for every letter along which work can be divided, and every two.

    Outputs that hold the letters are parts of the whole; the others are parts of a sum. A sum of parts
    is no business of fused ops, whose tails must not run before the sum: split first, then fuse.
    """
    op, rng = sample.op, seeded(sample, "local")
    specs, outs, index = _formula(sample)
    sizes = index.sizes(specs, outs)
    ins = sample.draw(rng, "float64")
    whole = op.run(*ins)
    alone = index.splittable()
    for letters in (*((letter,) for letter in alone), *combinations(alone, 2)):
        if isinstance(op, Fused) and any(any(index.partial(letter)) for letter in letters):
            continue
        done = 0
        for _ in range(4 * cuttings):
            bounds = {letter: _cut(sizes[letter], rng) for letter in letters}
            cells = [dict(zip(letters, cell, strict=True)) for cell in product(*map(pairwise, bounds.values()))]
            blocks = [index.blocks(specs, outs, cell) for cell in cells]
            if min(map(len, bounds.values())) < 3 or any(b.empty for pair in blocks for side in pair for b in side):
                continue
            _check_parts(sample, bounds, blocks, ins, whole)
            done += 1
            if done == cuttings:
                break


def _check_parts(
    sample: Sample,
    bounds: Mapping[str, Sequence[int]],
    blocks: Sequence[tuple[tuple[Block, ...], tuple[Block, ...]]],
    ins: Sequence[Array],
    whole: Sequence[Array],
) -> None:
    _, _, index = _formula(sample)
    partial = [any(index.partial(letter)[k] for letter in bounds) for k in range(len(whole))]
    words = ", ".join(f"{letter} cut at {tuple(at)}" for letter, at in bounds.items())
    sums = [np.zeros_like(y) for y in whole]
    for need, give in blocks:
        cut = [x[block.slices] for x, block in zip(ins, need, strict=True)]
        local = sample.op.local(need, give)
        title = f"{words}, block {give[0]} as {local}"
        said = local.out_specs(*map(spec_of, cut))
        if [s.shape for s in said] != [block.shape for block in give]:
            fail(sample, f"{title}: infer says {join(said)}, not the shapes of {join(give)}")
        for k, (y, block) in enumerate(zip(local.run(*cut, at=give[0]), give, strict=True)):
            sums[k][block.slices] += y
            if not partial[k]:
                compare(sample, f"{title}: output {k}", y, whole[k][block.slices], 1e-11)
    for k, y in enumerate(whole):
        if partial[k] and y.dtype.kind == "f":
            compare(sample, f"{words}: sum of output {k}", sums[k], y, 1e-11)


def _cut(size: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Boundaries of two or three random parts."""
    inner = rng.permutation(np.arange(1, size))[: int(rng.integers(1, 3))]
    return (0, *sorted(int(b) for b in inner), size)


# other sizes -------------------------------------------------------------------------------------------


def resized(sample: Sample, pick: Any) -> Sample | None:
    """The sample with other sizes, None where `infer` refuses them.

    ``pick(original)`` gives a size. Axes of one letter or one expression change together; an axis
    written '.' keeps its size, on which the range of other operands may depend.
    """
    index = sample.op.indexing(*sample.ins)
    chosen: dict[Any, int] = {}

    def size(axis: Any, original: int) -> int:
        if axis is None or not axis.terms or (axis.letter and dict(index.given).get(axis.letter)):
            return original
        if axis not in chosen:
            chosen[axis] = pick(original)
        return chosen[axis]

    ins = tuple(
        Spec(tuple(size(axis, n) for axis, n in zip(operand, spec.shape, strict=True)), spec.dtype)
        for operand, spec in zip(index.inputs, sample.ins, strict=True)
    )
    try:
        sample.op.out_specs(*ins)
    except ShapeError:
        return None
    return Sample(sample.op, ins, sample.ranges)


def check_sizes(op: type[Op], *, examples: int = 12) -> None:
    """`check_infer` and `check_local` on sizes that Hypothesis draws."""
    try:
        from hypothesis import given, settings
        from hypothesis import strategies as st
    except ModuleNotFoundError as error:
        raise MissingDependency("other sizes are drawn by hypothesis: pip install hypothesis.") from error

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def run(data: Any) -> None:
        sample = data.draw(st.sampled_from(op.samples()))
        other = resized(sample, lambda n: data.draw(st.one_of(st.just(n), st.integers(1, 7))))
        if other is not None:
            check_infer(other)
            check_local(other, cuttings=1)

    run()


CHECKS = (check_attributes, check_infer, check_vjp, check_index, check_in_place, check_local)
