"""Stencils of a user's own: called, tuned, traced, refused. Kernels are few, arrays small."""

import importlib.util
import linecache
import math
import pickle
import subprocess
import sys
import types
from pathlib import Path

import cloudpickle
import numba
import numpy as np
import pytest

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow import nn, optim
from rapydli_flow.config import settings
from rapydli_flow.errors import ArgumentError, DTypeError, NotDifferentiable, ShapeError, TemplateError
from rapydli_flow.graph import Fused, from_json, to_json
from rapydli_flow.ops import registry
from rapydli_flow.runtime.own import Defined, defined_outside
from rapydli_flow.runtime.tuning import cache
from rapydli_flow.scheduler import compile_program
from rapydli_flow.template import templates
from rapydli_flow.tuner import Tuning

ROOT = Path(__file__).parents[1]
WEIGHTS = (0.25, 0.5)
U = rf.Spec((7, 9))


def mean(x):
    """What is subtracted from x: half of it, and a quarter of its square root's square."""
    return x * WEIGHTS[1] + math.sqrt(x) ** 2 * WEIGHTS[0]


@numba.njit
def halved(x):
    return x * np.float32(0.5)


def doubled(task, u, v, *, rows, twice):
    """Twice what u is; a quarter of it is added on the way and taken away again."""
    # `rows` lines a task
    for i in range(task * rows, min((task + 1) * rows, u.shape[0])):
        for j in range(u.shape[1]):
            v[i, j] = halved(u[i, j]) * 4 if twice else u[i, j] + u[i, j] + 0 * mean(1.0)


SPACE = {"rows": (2, 3, 99), "twice": (True, False)}
GIVEN = {
    "reference": lambda u: 2 * u,
    "out": lambda u: u,
    "space": SPACE,
    "rules": {"no more rows than there are": lambda u, rows: rows <= u.shape[0]},
    "tasks": lambda u, rows: -(-u.shape[0] // rows),
}
double = rf.stencil(**GIVEN)(doubled)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache of this user."""
    monkeypatch.setenv("RAPYDLI_CACHE_DIR", str(tmp_path))
    settings.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    settings.cache_clear()
    double._ready.clear()


def refused(body=doubled, **changed):
    """The stencil of a body, some of what belongs to it changed."""
    return rf.stencil(**{**GIVEN, **changed})(body)


def random(spec=U):
    return np.random.default_rng(0).random(spec.shape).astype(spec.dtype)


# what is right ------------------------------------------------------------------------------------------


def test_a_call_gives_what_the_reference_gives_and_takes_what_numpy_has():
    u = random(rf.Spec((18, 7)))
    want = 2 * u[::2].T.copy()
    np.testing.assert_array_equal(double(u[::2].T), want)  # not contiguous: copied
    np.testing.assert_array_equal(double(u[::2].T.astype(">f4"), threads=1), want)
    np.testing.assert_array_equal(double.reference(u[::2].T), want)
    v = np.empty((7, 9), np.float32)
    assert double(u[::2].T, out=v) is v
    np.testing.assert_array_equal(v, want)
    assert double.__doc__.startswith("Twice what u is")
    assert repr(double) == "<stencil doubled(u): rows in (2, 3, 99), twice in (True, False)>"


def test_the_source_has_parameters_and_extents_as_constants():
    text = double.source(U, config={"rows": 3, "twice": False})
    assert text.startswith('"""doubled/doubled(rows=3, twice=False)')
    body = text[text.index("def doubled(") : text.index("\n\n\n@part\ndef parts")]
    lines = body.splitlines()
    assert lines[0] == "def doubled(task, u, v):"
    assert lines[2:6] == [
        "    rows = 3",
        "    twice = False",
        "    # `rows` lines a task",
        "    for i in range(task * rows, min((task + 1) * rows, (7, 9,)[0])):",
    ]
    assert "WEIGHTS = (0.25, 0.5,)\n" in text
    assert "def halved(x):" in text  # written out: a module that is imported later could hold another
    assert "import cpu_kernels.functions as math\n" in text


@pytest.mark.slow
def test_it_is_tuned_and_remembered(folder):
    u = random()
    assert double.configs(u) == double.configs(U)
    assert double.configs(U) == [{"rows": r, "twice": t} for r in (2, 3) for t in (True, False)]
    assert double.config(u) == {"rows": 2, "twice": True}
    told = []
    report = double.tune(u, budget_s=60.0, watch=told.append)
    (found,) = report.found
    request, best, default = found.request, found.best, found.default
    assert dict(default.choice.config) == {"rows": 2, "twice": True}
    assert report.failed == ()
    assert report.requests == len(report.tuning) == 1
    assert "after 4 trials (nothing left to try)" in str(told[-1])
    assert "1 of 1 kernels, 4 configs" in str(report).splitlines()[-1]
    assert double.config(U) == dict(best.choice.config)
    assert len(cache().trials(host(), request)) == 4
    np.testing.assert_array_equal(double(u), 2 * u)
    # the same through the tuner of networks: nothing there knows of stencils
    graph = rf.trace(lambda u: {"v": double(u)}, U)
    assert rf.autotune(graph, budget_s=0.0).tuning.choose(request) == best.choice


def test_numbers_several_outputs_and_workspaces():
    @rf.stencil(
        reference=lambda x, by: (x * by, x.sum(1)),
        out=lambda x, by: (x, rf.Spec(x.shape[:1], x.dtype)),
        space={},
        tasks=lambda x: x.shape[0],
        workspace=lambda x: rf.Spec(x.shape, "float64"),
    )
    def scaled_with_sums(task, x, by, y, total, sums):
        for j in range(x.shape[1]):
            sums[task, j] = x[task, j] + (sums[task, j - 1] if j else 0)
        for j in range(x.shape[1]):
            y[task, j] = x[task, j] * by
        total[task] = sums[task, x.shape[1] - 1]

    x = random()
    y, total = scaled_with_sums(x, 3.0)
    np.testing.assert_allclose(y, 3 * x, rtol=1e-6)  # a Python float does not make float64 of it
    np.testing.assert_allclose(total, x.sum(1), rtol=1e-6)
    report = scaled_with_sums.tune(U, rf.Spec(()), budget_s=60.0)
    assert (len(report.found), report.failed) == (1, ())


def test_in_a_network_it_runs_compiled_and_nothing_is_fused_into_it(folder):
    graph = rf.trace(lambda u: nn.relu(double.op()(u) - 1.0), U)
    assert from_json(to_json(graph))["doubled_1"].op == double.op()
    (fused,) = rf.plan(graph, threads=1).rank_graphs(graph)
    assert [n.op.title for n in fused if isinstance(n.op, Fused)] == ["subtract+relu"]
    u = random()
    got = rf.predict(graph, {}, u).compute(scheduler="threads")  # whatever client another test left
    np.testing.assert_allclose(got, np.maximum(2 * u - 1, 0), rtol=1e-6)
    assert "doubled" in [c.template for _, c in compile_program(fused, Tuning(host())).requests]
    trained = rf.trace(lambda x: double(nn.dense(x, 3)), rf.Spec((4, 2)))
    with pytest.raises(NotDifferentiable, match="doubled has no gradient"):
        rf.train_step(trained, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))


def test_with_a_gradient_it_is_trained():
    @rf.stencil(**{**GIVEN, "vjp": lambda dy, y, u: dy * 2.0, "space": {}, "rules": {}, "tasks": lambda: 1})
    def trained_double(task, u, v):
        for i in range(u.shape[0]):
            for j in range(u.shape[1]):
                v[i, j] = 2 * u[i, j]

    graph = rf.trace(lambda x: trained_double(nn.dense(x, 3)), rf.Spec((6, 4)))
    step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(30, 4)).astype("float32"), "label": rng.integers(0, 3, 30)}
    run = rf.fit(step, data, steps=8, plan=rf.plan(step, threads=1))
    assert run.scalars["loss"][-1] < run.scalars["loss"][0]
    assert any("trained_double" in op for op in run.segments[-1].ops)


def local_stencil():
    def inner(task, u, v, *, rows, twice):
        v[task] = u[task]

    return refused(inner)


def test_a_stencil_and_its_op_are_pickled_by_name(monkeypatch):
    module = types.ModuleType("stencil_home")
    monkeypatch.setitem(sys.modules, "stencil_home", module)
    body = types.FunctionType(doubled.__code__, globals(), "pickled_double")
    body.__kwdefaults__, body.__module__, body.__qualname__ = None, "stencil_home", "pickled_double"
    module.pickled_double = refused(body)
    for each in (module.pickled_double, module.pickled_double.Op):
        assert pickle.loads(pickle.dumps(each)) is each
    op = module.pickled_double.op()
    assert cloudpickle.loads(cloudpickle.dumps(op)) == op
    graph = rf.trace(module.pickled_double, U)
    outside = defined_outside(graph, [compile_program(graph, Tuning(host()))])
    assert outside == {"stencil_home": Defined("the op 'pickled_double'", "pickled_double.Op")}
    with pytest.raises(
        TemplateError, match=r"inner: it is defined in a function \(local_stencil.*Define it at the top"
    ):
        pickle.dumps(local_stencil().op())


# where it is defined ------------------------------------------------------------------------------------

SCRIPT = """
import numpy as np, rapydli_flow as rf
BY = 3
def by(x): return x * BY
@rf.stencil(reference=lambda x: x * BY, out=lambda x: x, space={"parts": (1, 2)}, tasks=lambda parts: parts)
def in_script(task, x, y, *, parts):
    n = x.shape[0]
    for i in range(task * n // parts, (task + 1) * n // parts): y[i] = by(x[i])
if __name__ == "__main__":
    x = np.arange(5.0)
    assert (in_script(x) == 3 * x).all()
    print(len(in_script.tune(x, budget_s=20.0).found), in_script.configs(x))
"""


def test_in_a_script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-W", "error", "script.py"]
    env = {"PYTHONPATH": str(ROOT), "RAPYDLI_CACHE_DIR": str(tmp_path), "RAPYDLI_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout == "1 [{'parts': 1}, {'parts': 2}]\n", done.stderr


def test_a_cell_that_is_run_again_replaces_the_stencil(monkeypatch):
    notebook = types.ModuleType("stencil_notebook")
    monkeypatch.setitem(sys.modules, "stencil_notebook", notebook)

    def run(number, text):
        name = f"<stencil cell {number}>"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        exec(compile(text, name, "exec"), vars(notebook))
        return notebook.in_script

    x = np.arange(5.0)
    one = run(1, SCRIPT)
    assert (one(x) == 3 * x).all()
    two = run(2, SCRIPT.replace("BY = 3", "BY = 5"))  # the body is as it was: a constant is not
    assert (two(x) == 5 * x).all()
    assert two.op() == registry["in_script"]()
    assert len(templates("in_script", "cpu")) == 1
    three = run(3, SCRIPT.replace("tasks=lambda parts: parts", "tasks=lambda parts: 1"))  # nor is the number of tasks
    assert "TASKS = (1,)" in three.source(x, config={"parts": 2})
    ((_, half),) = three.tune(x, budget_s=60.0).failed
    assert half.choice.config == (("parts", 2),)
    with pytest.raises(TemplateError, match="stencil in_script: a stencil of this name was defined after this one"):
        one(np.arange(6.0))


# what is wrong ------------------------------------------------------------------------------------------


def test_a_wrong_body_is_refused_with_the_reason():
    def forgets(task, u, v, *, rows, twice):
        for i in range(task * rows, min((task + 1) * rows, u.shape[0])):
            for j in range(u.shape[1] - 1):
                v[i, j] = 2 * u[i, j]
            if twice:
                v[i, u.shape[1] - 1] = 3 * u[i, u.shape[1] - 1]

    wrong = refused(forgets, space={"rows": (7,), "twice": (True, False)})
    report = wrong.tune(random(), budget_s=60.0)
    assert (report.requests, len(report.failed), report.found[0].best.time_s) == (1, 2, None)
    lines = str(report).splitlines()
    assert lines[-3] == "2 configs failed:"
    head = "  forgets f32[7,9], forgets rows=7 twice="
    assert lines[-2].startswith(f"{head}True: RapydliError: deviates from the reference by 5.0e-01: 7 of 63 elements ")
    assert lines[-1].startswith(f"{head}False: RapydliError: deviates from the reference by nan: 7 of 63 elements are")
    assert lines[-1].endswith("wrong, the first at (0, 8) is not written, or not a number")
    assert "not written, or not a number" in report._repr_html_()


def test_what_numba_cannot_compile_is_told_with_its_line():
    def matrix_only(task, u, v, *, rows, twice):
        H, W = u.shape
        v[0, 0] = H * W

    wrong = refused(matrix_only, rules={})
    with pytest.raises(
        TemplateError, match=r"(?s)Numba cannot compile it: .*expected 2, got 3.* in `H, W = \(2, 3, 4,\)`"
    ):
        wrong(np.zeros((2, 3, 4)))
    assert "H, W = (2, 3, 4,)" in wrong.source(np.zeros((2, 3, 4)))


def test_a_reference_that_is_not_what_out_says():
    wrong = refused(reference=lambda u: (2 * u)[1:].astype(np.float64))
    text = r"stencil doubled\(u f32\[7,9\]\): the reference gives float64 \[6, 9\] but out says f32\[7,9\]"
    with pytest.raises(TemplateError, match=text):
        wrong.tune(U, budget_s=60.0)
    refused()  # the right one again


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"tasks": lambda u: 0}, TemplateError, r"tasks gives 0. There is 1 task or more"),
        ({"tasks": lambda u: u.shape[0] / 2}, TemplateError, r"tasks gives 3.5, a float, not a whole number. .*//"),
        ({"tasks": lambda u: u.shape[5]}, TemplateError, r"\(u f32\[7,9\], rows=2, .*tasks raises IndexError"),
        ({"rules": {"small": lambda u: u.size < 9}}, TemplateError, "no config is allowed. Of 6, 'small' refuses 6"),
        ({"rules": {"odd": lambda rows: rows.x}}, TemplateError, "rule 'odd' raises AttributeError"),
        ({"out": lambda u: 3}, TemplateError, r"out gives 3, not a Spec or a tuple of them. Write rf.Spec\(shape"),
        ({"out": lambda u: rf.Spec(u.shape[3:9][0])}, ShapeError, r"\(u f32\[7,9\]\): out raises IndexError"),
        ({"out": lambda u: (u, u)}, TemplateError, r"takes 2 arrays \(u, v\) but there are 1 operands, 2 outputs"),
        ({"workspace": lambda u: 3}, TemplateError, "workspace gives 3, not a Spec"),
    ],
)
def test_what_does_not_fit_an_operand_is_refused(changed, error, text):
    wrong = refused(**changed)
    with pytest.raises(error, match=f"stencil doubled.*{text}"):
        wrong(random())
    refused()


def test_operands_and_outputs_of_a_call():
    stencil = refused()
    u = random()
    for operands, out, error, text in [
        ((u, u), None, ShapeError, r"doubled\(u f32\[7,9\], operand 2 f32\[7,9\]\): 2 operands .* takes 1: u"),
        ((u.astype("f2"),), None, DTypeError, r"u has dtype float16, which .* one of float32, float64, int64"),
        ((u,), np.empty((7, 8), "f"), ShapeError, r"out is f32\[7,8\] but the result is f32\[7,9\]"),
        ((u,), u, ShapeError, "out overlaps with an operand. Give an array of its own"),
        ((u,), np.empty((9, 7), "f").T, ShapeError, "out is not contiguous"),
    ]:
        with pytest.raises(error, match=text):
            stencil(*operands, out=out)
    with pytest.raises(
        ArgumentError, match=r"there is no argument 'thread', .* Nearest: 'threads'. Its .* u, out, threads"
    ):
        stencil(u, thread=1)
    np.testing.assert_array_equal(stencil(u=u), 2 * u)
    with pytest.raises(TemplateError, match=r"template doubled/doubled does not fit f32\[7,9\] with .*'rows': 99"):
        stencil.source(u, config={"rows": 99, "twice": True})


def defaulted(task, u, v, *, rows=2, twice):
    v[task] = u[task]


@pytest.mark.parametrize(
    ("body", "changed", "text"),
    [
        (lambda task, u, v, rows, twice: None, {}, "the body is <function .*lambda.*, not a plain function"),
        (numba.njit(defaulted), {}, "Leave @njit out"),
        (defaulted, {}, "defaulted: the body takes rows by .* or with a default"),
        (doubled, {"space": {"rows": (1,)}}, r"parameters \['rows', 'twice'\] .* but the space has \['rows'\]"),
        (doubled, {"space": [1]}, r"space is \[1\], not a dict"),
        (doubled, {"space": {**SPACE, "rows": ()}}, "space has no value for 'rows'"),
        (doubled, {"space": {**SPACE, "rows": ([1],)}}, r"rows=\[1\] is a list, which cannot become a constant"),
        (doubled, {"out": lambda: U}, r"out takes 0 operands \(\) but the body takes a task and the arrays u, v"),
        (doubled, {"out": lambda u, v: U}, r"out takes 2 operands .* 1 operand or more, and then the outputs"),
        (doubled, {"tasks": lambda row: 1}, r"tasks asks for 'row', .* Nearest: 'rows'. There are u, rows, twice"),
        (doubled, {"rules": {"r": lambda uu, device: 1}}, "rule 'r' asks for 'uu'.* and device"),
        (doubled, {"space": {**SPACE, "twice": (object,)}}, "twice=<class 'object'> is a type, which cannot become"),
        (doubled, {"reference": None}, "reference is None, not a function"),
    ],
)
def test_what_does_not_belong_together_is_refused(body, changed, text):
    with pytest.raises(TemplateError, match=f"stencil.*{text}"):
        refused(body, **changed)


def reserved(task, device, v):
    v[task] = device[task]


def test_names_and_texts_of_functions():
    def conv(task, u, v, *, rows, twice):
        v[task] = u[task]

    def pointwise(task, u, v, *, rows, twice):
        v[task] = u[task]

    with pytest.raises(TemplateError, match=r"reserved: 'device' has a meaning of its own. Give the operand another n"):
        refused(reserved, space={}, out=lambda device: device)
    with pytest.raises(TemplateError, match=r"there is an op of this name already, rapydli_flow.ops.conv.Conv. Rename"):
        refused(conv)
    with pytest.raises(TemplateError, match="ops of family 'pointwise' have templates already, of module cpu_kernels"):
        refused(pointwise)
    space = {"__name__": "nowhere"}
    exec("def unknown_text(task, u, v, *, rows, twice):\n    v[task] = u[task]\n", space)
    with pytest.raises(
        TemplateError, match=r"unknown_text: Python does not know the text of its body. Write it in a f"
    ):
        refused(space["unknown_text"])


# the examples -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("jacobi2d", 40), ("heat3d", 12), ("convolution", 10)])
def test_examples(name, size, folder, capsys, monkeypatch):
    path = ROOT / "examples" / "stencils" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    (stencil,) = (v for v in vars(module).values() if type(v).__name__ == "Stencil")
    definition = stencil.definition
    space = {k: v[: 2 if k == min(definition.space) else 1] for k, v in definition.space.items()}  # two kernels
    few = rf.stencil(reference=definition.reference, out=definition.out, space=space, tasks=definition.tasks)
    monkeypatch.setattr(module, stencil.__name__, few(definition.body))
    report = module.main(size=size, budget_s=60.0)
    assert (len(report.found), report.failed) == (1, ())
    printed = capsys.readouterr().out
    assert "agrees with its reference" in printed
    assert "tuned " in printed
    assert " GFLOP/s" in printed if name == "convolution" else " GB/s" in printed
