"""An operator of a user's own, in a module outside of the package: from NumPy to a trained network with a kernel."""

import importlib
import linecache
import sys
import types

import numpy as np
import pytest

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow import nn, optim
from rapydli_flow.errors import MissingDependency, NotDifferentiable
from rapydli_flow.ops import Sample, registry
from rapydli_flow.scheduler import Call, compile_program
from rapydli_flow.spec import Spec
from rapydli_flow.template import templates
from rapydli_flow.testing.gradients import check_vjp
from rapydli_flow.testing.ops import check_sizes
from rapydli_flow.tuner import Tuning

HEAD = """
import numpy as np
from rapydli_flow import Spec
from rapydli_flow.ops import Op, Sample
"""

REFERENCE = """
class {name}(Op):
    def infer(self, x):
        return x

    def reference(self, x):
        return x * np.abs(x).mean(1, keepdims=True)

    @classmethod
    def samples(cls):
        return (Sample(cls(), (Spec((3, 5)),)),)
"""

GRADIENT = """
    def vjp(self, dy, y, x):
        return ({name}Grad()(dy, x),)

class {name}Grad(Op):
    def infer(self, dy, x):
        return x

    def reference(self, dy, x):
        return dy * np.abs(x).mean(1, keepdims=True) + np.sign(x) * (dy * x).mean(1, keepdims=True)

    @classmethod
    def samples(cls):
        return (Sample(cls(), (Spec((3, 5)), Spec((3, 5)))),)
"""

INDEX = """
    def index(self, x):
        return "n . -> n ."
"""

KERNEL = """
from rapydli_flow.template import Loop, template

@template("{family}", "cpu", space={{"tasks": (4, 1)}})
def rows(op, ins, outs, epilogue, *, tasks):
    N, C = ins[0].shape
    count = min(tasks, N)

    def body(task, x, y, extras, at):
        for n in range(task * N // count, (task + 1) * N // count):
            total = 0.0
            for c in range(C):
                total += abs(x[n * C + c])
            for c in range(C):
                y[n * C + c] = {store}

    return Loop(body, count)
"""
STORE = "epilogue(x[n * C + c] * (total / C), extras, n * C + c, c, at)"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write a module of this text where Python finds it, and import it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(module, *parts, **names):
        (tmp_path / f"{module}.py").write_text(HEAD + "".join(parts).format(**names))
        importlib.invalidate_caches()
        return importlib.import_module(module)

    return write


def training_step(op):
    graph = rf.trace(lambda x: nn.dense(nn.relu(op()(nn.dense(x, 7))), 3), rf.Spec((6, 4)))
    return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))


def trained(step, ranks=1):
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(30, 4)).astype("float32"), "label": rng.integers(0, 3, 30)}
    return rf.fit(step, data, steps=8, plan=rf.plan(step, ranks=ranks, threads=1))


def test_a_reference_alone_is_an_operator(written):
    op = written("own_reference", REFERENCE, name="OwnReference").OwnReference
    report = rf.check(op)
    assert report.passed == {"attributes": 1, "infer": 1}
    assert report.skipped == {
        "vjp": "no vjp",
        "index": "no index formula",
        "in_place": "no index formula",
        "local": "no index formula",
        "sizes": "no index formula",
    }
    assert set(report.lacks) == {"vjp", "template", "index", "rejects"}
    assert repr(report).startswith("own_reference: passed\n  tried    attributes 1, infer 1\n  skipped  vjp: no vjp\n")
    assert "  lacks    vjp: no gradient, so nothing before it can be trained\n           template: runs its" in repr(
        report
    )
    graph = rf.trace(lambda x: nn.relu(op()(x)), rf.Spec((2, 3)))
    x = np.array([[1, -2, 3], [0, 0, 3]], "float32")
    got = rf.compile(graph, {"x": x}).compute(scheduler="sync")["y"]
    np.testing.assert_allclose(got, [[2, 0, 6], [0, 0, 3]])
    assert graph["own_reference_1"].op.flops(Spec((2, 3))) == 12
    with pytest.raises(NotDifferentiable, match="own_reference_1: own_reference has no gradient"):
        training_step(op)


def test_with_a_gradient_it_is_trained_and_with_a_formula_divided(written):
    parts = REFERENCE, GRADIENT.replace("class", INDEX + "\nclass", 1)
    own = written("own_gradient", *parts, name="OwnGradient")
    report = rf.check(own.OwnGradient)
    assert set(report.passed) == {"attributes", "infer", "vjp", "index", "in_place", "local", "sizes"}
    assert set(report.lacks) == {"template", "rejects"}
    assert not report.skipped
    rf.check(own.OwnGradientGrad)
    step = training_step(own.OwnGradient)
    one = trained(step)
    assert one.scalars["loss"][-1] < one.scalars["loss"][0]
    two = trained(step, ranks=2)
    np.testing.assert_allclose(two.scalars["loss"], one.scalars["loss"], rtol=1e-5)
    whole, parts = (rf.plan(step, ranks=n).rank_graphs(step)[0] for n in (1, 2))
    rows = lambda graph, name: next(n for n in graph if n.name.endswith(name)).specs[0].shape[0]  # noqa: E731
    assert (rows(whole, "relu_1"), rows(parts, "relu_1")) == (6, 3)
    grads = [next(n for n in g if "own_gradient_grad" in n.op.title) for g in (whole, parts)]
    assert [node.specs[0].shape[0] for node in grads] == [6, 6]  # its gradient has no formula: it is not divided


def test_with_a_template_it_is_compiled(written):
    kernel = KERNEL.replace("{store}", STORE)
    own = written("own_kernel", REFERENCE, GRADIENT, kernel, name="OwnKernel", family="own_kernel")
    report = rf.check(own.OwnKernel)
    assert report.passed["kernels"] >= 3  # two dtypes, and one with a tail
    assert "template" not in report.lacks
    step = training_step(own.OwnKernel)
    (graph,) = rf.plan(step).rank_graphs(step)
    program = compile_program(graph, Tuning(host()))
    calls = {call.title: call.choice.template for call in program.steps if isinstance(call, Call)}
    assert calls["own_kernel+relu"] == "rows"
    run = trained(step)
    assert run.scalars["loss"][-1] < run.scalars["loss"][0]


# what is wrong is shown ---------------------------------------------------------------------------------


def test_a_wrong_gradient_is_shown_with_the_input(written):
    wrong = GRADIENT.replace("np.sign(x)", "0.5 * np.sign(x)")
    op = written("own_wrong", REFERENCE, wrong, name="OwnWrong").OwnWrong
    with pytest.raises(AssertionError) as caught:
        rf.check(op)
    head, worst, *rest = str(caught.value).splitlines()
    assert head.startswith("own_wrong() on f32[3,5]: vjp of input 0 gives slope ")
    assert " but differences give " in head
    place = worst.partition("worst at (")[2].partition(")")[0]
    at = tuple(map(int, place.split(",")))
    told, right = (
        float(worst.partition(f"{word} ")[2].split(",")[0].split(";")[0]) for word in ("vjp gives", "differences give")
    )
    blocks = {line.strip(): i for i, line in enumerate(rest) if line.endswith("=")}
    assert list(blocks) == ["input 0 f64[3,5] =", "cotangent of y f64[3,5] =", "vjp of input 0 f64[3,5] ="]
    x, dy, dx = (np.array(eval("".join(rest[i + 1 : i + 4]))) for i in blocks.values())
    mean = np.abs(x).mean(1, keepdims=True)
    gradient = dy * mean + np.sign(x) * (dy * x).mean(1, keepdims=True)
    assert right == pytest.approx(gradient[at], rel=1e-4)  # the message has six digits of the operands
    assert told == pytest.approx(dx[at], abs=1e-5)
    assert abs(dx - gradient)[at] == pytest.approx(abs(dx - gradient).max(), abs=1e-5)
    large = Sample(op(), (Spec((30, 50)),))
    with pytest.raises(
        AssertionError, match=r"(?s)256 elements tried.*\n  input 0 f64\[30,50\] from -\S+ to \S+, \S+ at \("
    ):
        check_vjp(large)


def test_a_vjp_that_is_no_tuple(written):
    op = written("own_bare", REFERENCE, "\n    def vjp(self, dy, y, x):\n        return dy\n", name="OwnBare").OwnBare
    with pytest.raises(
        AssertionError, match=r"vjp gives ndarray, not a tuple of one cotangent for each input: \(dx,\)"
    ):
        rf.check(op)


@pytest.mark.parametrize(
    ("name", "store", "text"),
    [
        (
            "Scaled",
            STORE.replace("total / C", "total / (C + 1)"),
            r"rows {'tasks': 4} float32: output 0: at \(\d, \d\) .*the first at \(0, 0\): \S+, not",
        ),
        (
            "Tailless",
            "x[n * C + c] * (total / C)",
            r"own_tailless\+scale\+add\(\) on|own_tailless.*rows .* float32: output 0: at",
        ),
    ],
)
def test_a_wrong_template_is_shown_with_its_config(written, name, store, text):
    own = written(
        f"own_{name.lower()}",
        REFERENCE,
        KERNEL.replace("{store}", store),
        name=f"Own{name}",
        family=f"own_{name.lower()}",
    )
    with pytest.raises(AssertionError, match=text):
        rf.check(getattr(own, f"Own{name}"))


def test_errors_of_the_op_itself_tell_where_they_came_from(written):
    text = REFERENCE.replace("np.abs(x)", "np.absolutely(x)")
    op = written("own_typo", text, name="OwnTypo").OwnTypo
    with pytest.raises(AttributeError, match="absolutely") as caught:
        rf.check(op)
    assert caught.value.__notes__ == ["in check_infer of own_typo() on f32[3,5]"]
    bare = REFERENCE[: REFERENCE.index("    @classmethod")]
    with pytest.raises(
        AssertionError, match=r"own_empty: no samples. .*return \(Sample\(cls\(\), \(Spec\(\(3, 5\)\),\)\),\)"
    ):
        rf.check(written("own_empty", bare, name="OwnEmpty").OwnEmpty)


# where it is defined ------------------------------------------------------------------------------------


def test_without_hypothesis_sizes_are_skipped(written, monkeypatch):
    op = written("own_sizes", REFERENCE, INDEX, name="OwnSizes").OwnSizes
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    report = rf.check(op)
    assert report.skipped["sizes"] == "other sizes are drawn by hypothesis: pip install hypothesis."
    assert "sizes" not in report.passed
    with pytest.raises(MissingDependency, match="pip install hypothesis"):
        check_sizes(op)


@pytest.fixture
def cell(monkeypatch):
    """Run text as a cell of a notebook: a module without a file, whose lines Python knows all the same."""
    notebook = types.ModuleType("own_notebook")
    monkeypatch.setitem(sys.modules, "own_notebook", notebook)

    def run(number, text):
        name = f"<cell {number}>"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        exec(compile(text, name, "exec"), vars(notebook))
        return notebook

    return run


def test_a_cell_that_is_run_again_replaces_the_op_and_its_template(cell):
    text = (HEAD + REFERENCE + KERNEL.replace("{store}", STORE)).format(name="OwnCell", family="own_cell")
    one = cell(1, text).OwnCell
    assert rf.check(one).passed["kernels"] >= 3
    two = cell(2, text.replace("np.abs(x)", "np.abs(2 * x)").replace("+= abs(", "+= 2 * abs(")).OwnCell
    assert two is not one
    assert registry["own_cell"] is two
    assert len(templates("own_cell", "cpu")) == 1
    rf.check(two)  # with the new kernel: the old one gives half of it
    with pytest.raises(AssertionError, match="JSON gives another op"):  # the class of the first run is no longer it
        rf.check(one)
