"""What is known of kernels, and RAPYDLI_TUNING: what fit, evaluate, predict and compile make of it."""

from dataclasses import replace

import numpy as np
import pytest

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow import nn, optim
from rapydli_flow.config import settings
from rapydli_flow.errors import SettingError
from rapydli_flow.graph import to_json
from rapydli_flow.runtime import predict
from rapydli_flow.runtime.bodies import Group
from rapydli_flow.runtime.tuning import cache, known, requests_of
from rapydli_flow.tuner import Choice, Trial, Tuning

BATCH = 4
PINNED = Choice("rows", (("grain", 4096),))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def set_to(kernels, monkeypatch):
    """A function that sets RAPYDLI_TUNING; the tuning results are empty, the compiled kernels those of this module."""
    monkeypatch.setenv("RAPYDLI_CACHE_DIR", str(kernels))

    def set_to(how):
        monkeypatch.setenv("RAPYDLI_TUNING", how)
        settings.cache_clear()

    set_to("on")
    cache().path.unlink(missing_ok=True)
    yield set_to
    settings.cache_clear()


@pytest.fixture(scope="module")
def step():
    graph = rf.trace(lambda x: nn.dense(nn.relu(x), 3), rf.Spec((BATCH, 5)))
    return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))


@pytest.fixture(scope="module")
def records():
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(10, 5)).astype(np.float32), "label": rng.integers(0, 3, 10)}


def learn(graphs):
    """Know the default of every kernel, as if it had been tuned, and give the requests."""
    requests = requests_of(graphs, host())
    for request in requests:
        trial = Trial(Tuning(host()).choose(request), 1e-3)
        cache().add(host(), request, trial, trial)
    return requests


def test_what_is_known_is_used_unless_it_is_off(set_to, step):
    (request, *_) = learn(rf.plan(step).rank_graphs(step))
    assert len(known(host())) > 1
    assert not known(host()).strict
    set_to("offline")
    assert known(host()).choices[request.key(host())] == Tuning(host()).choose(request)
    set_to("strict")
    assert known(host()).strict
    set_to("off")
    assert known(host()) == Tuning(host())


@pytest.mark.parametrize("how", ["off", "offline", "strict"])
def test_nothing_is_tuned_where_it_is_forbidden(set_to, step, how):
    set_to(how)
    with pytest.raises(SettingError, match=f"autotune: nothing is tuned with RAPYDLI_TUNING={how}. Set it to 'on'"):
        rf.autotune(step, budget_s=0.0)
    assert not cache().path.exists()


def test_strict_runs_need_tuned_kernels(set_to, step, records):
    set_to("strict")
    for run in (
        lambda: rf.fit(step, records, steps=1),
        lambda: rf.evaluate(step, rf.init(step), records),
        lambda: rf.stepper(step),
        lambda: rf.compile(step),
    ):
        with pytest.raises(
            SettingError, match=r"RAPYDLI_TUNING=strict, and nothing is known for .* Tune it with rf.auto"
        ):
            run()
    learn(rf.plan(step).rank_graphs(step))
    run = rf.fit(step, records, validation=records, steps=2, plan=rf.plan(step))  # validates with remainders
    assert run.metrics["loss"] > 0
    cache().forget()
    with pytest.raises(SettingError, match="nothing is known for"):
        rf.predict(run.graph, run.state, records["x"]).compute(scheduler="sync")
    assert rf.fit(step, records, steps=2, tuning=Tuning(host())).state  # what is given is used, though it is empty


def test_predict_and_compile_use_what_is_known(set_to, step, records):
    network = step.network
    state = {leaf.name: rf.init(step)[leaf.name] for leaf in network.leaves("param", "state")}
    plain = rf.predict(network, state, records["x"])
    (request, *_) = [r for r in requests_of([network], host()) if r.op.family == "pointwise"]
    cache().pin(host(), request.key(host()), PINNED)
    tuned = rf.predict(network, state, records["x"])
    assert tuned.name != plain.name
    assert rf.predict(network, state, records["x"]).name == tuned.name
    np.testing.assert_array_equal(tuned.compute(scheduler="sync"), plain.compute(scheduler="sync"))
    told = [value for key, value in dict(tuned.dask).items() if str(key).startswith("tuning-")]
    assert [node.value for node in told] == [(known(host()), False, None)]

    def kernels(**options):
        """What the tasks of a collection run."""
        arguments = [arg for task in dict(rf.compile(network, **options).dask).values() for arg in task.args]
        return {kernel.choice for arg in arguments if isinstance(arg, Group) for kernel in arg.kernels}

    assert PINNED in kernels()
    assert PINNED not in kernels(tuning=Tuning(host()))


@pytest.mark.parametrize("given", [True, False])
def test_a_worker_of_another_kind_uses_what_is_known_there(set_to, step, records, given):
    network = predict.predicting(step.network)
    network.outputs = {"y": network.outputs["y"]}
    network = predict.only_needed(network)
    state = {leaf.name: rf.init(step)[leaf.name] for leaf in network.leaves("param", "state")}
    cache().pin(host(), "pointwise-elsewhere", PINNED)
    client = Tuning(replace(host(), target="of-the-client"))
    text, token = to_json(network), f"token-{given}"
    feeds = {"x": records["x"][:BATCH]}
    y = predict.predict_batch(text, token, state, feeds, 0, BATCH, "y", (client, given, None))
    assert y.shape == (BATCH, 3)
    assert predict._shared(text, token).predictor.tuning == (client if given else known(host()))
