"""An op of a user's own on a cluster: its module must be there, or the error says so before anything runs."""

import importlib
import re
import subprocess
import sys

import numpy as np
import pytest
from small_runs import many, same_bits

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.errors import MissingDependency

MODULE = """
from rapydli_flow.ops import Op
from rapydli_flow.template import Loop, template

class Twice(Op):
    family = "{name}"

    def infer(self, x):
        return x

    def reference(self, x):
        return 2 * x

    def vjp(self, dy, y, x):
        return (Twice()(dy),)

@template("{name}", "cpu")
def plain(op, ins, outs, epilogue):
    n = ins[0].size

    def body(task, x, y, extras, at):
        for i in range(n):
            y[i] = epilogue(2 * x[i], extras, i, i % n, at)

    return Loop(body, 1)
"""
SCRIPT = """
import rapydli_flow as rf
from rapydli_flow import nn, optim
import numpy as np

if __name__ == "__main__":
    from distributed import Client, LocalCluster
    net = rf.trace(lambda x: nn.dense(Twice()(nn.dense(x, 3)), 2), rf.Spec((4, 3)))
    step = rf.train_step(net, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))
    batch = {"x": np.ones((4, 3), "float32"), "label": np.arange(4) % 2}
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        run = rf.fit(step, batch, steps=2, client=client)
        print("trained", np.isfinite(run.metrics["loss"]))
"""


def test_a_module_that_workers_do_not_have(client, tmp_path, monkeypatch):
    path = tmp_path / "own_on_workers.py"
    path.write_text(MODULE.format(name="own_on_workers"))
    monkeypatch.syspath_prepend(str(tmp_path))  # here; the workers were started before
    own = importlib.import_module("own_on_workers")
    net = rf.trace(lambda x: nn.dense(nn.relu(own.Twice()(nn.dense(x, 3))), 2), rf.Spec((4, 3)))
    step = rf.train_step(net, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))
    data = {"x": np.ones((8, 3), "float32"), "label": np.arange(8) % 2}
    text = (
        r"the op 'twice' is defined in module 'own_on_workers', but worker tcp://.* does not have it there "
        r"\(ModuleNotFoundError: .*\). Put it into a module that workers can import: install it, or use "
        r"client.upload_file\('own_on_workers.py'\)"
    )
    how = {"client": client, "plan": many(step, 2)}
    with pytest.raises(MissingDependency, match=text):
        rf.fit(step, data, steps=2, **how)
    with pytest.raises(MissingDependency, match=text):
        rf.fit(step, data, steps=2, granularity="op", **how)
    with pytest.raises(MissingDependency, match=text):
        rf.stepper(step, **how)
    client.upload_file(str(path))
    here = rf.fit(step, data, steps=2, plan=many(step, 2))
    assert same_bits(rf.fit(step, data, steps=2, **how).state, here.state)
    assert same_bits(rf.fit(step, data, steps=2, granularity="op", **how).state, here.state)


@pytest.mark.slow
def test_an_op_and_a_template_of_a_script(tmp_path):
    """The processes that a script starts have it as another module."""
    script = tmp_path / "script.py"
    script.write_text(MODULE.format(name="own_script") + SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert re.search("^trained True$", done.stdout, re.MULTILINE), done.stderr
