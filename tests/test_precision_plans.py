"""A mixed-precision step gives the same numbers under every plan, up to the rounding of halves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.spec import Spec
from rapydli_flow.testing.plans import batches, deviation, programs, train

from .test_precision import network

pytestmark = pytest.mark.filterwarnings("ignore:NumPy computes with")


@pytest.mark.parametrize("strategy", ["data", "filters"])
@pytest.mark.parametrize(("half", "near"), [("bfloat16", 0.02), ("float16", 0.003)])
def test_a_split_changes_rounding_only(half: str, near: float, strategy: str) -> None:
    graph = rf.trace(network, Spec((4, 6, 6, 3)))
    how = {"loss": nn.cross_entropy, "optimizer": optim.sgd(0.05), "precision": half, "loss_scale": 64.0}
    step = rf.train_step(graph, **how)
    fed = batches(step, 2, 5)
    want = train(programs(step, rf.plan(step, ranks=1)), fed, 2)
    found = train(programs(step, rf.plan(step, ranks=2, strategy=strategy)), fed, 2)
    assert np.isfinite(want.losses).all()
    assert deviation(found, want) < near


STRATEGIES = (
    {"strategy": "data"},
    {"strategy": "filters"},
    {"strategy": "spatial"},
    {"strategy": "pipeline", "micro_batches": 2},
    {"strategy": "data", "shard": "parameters"},
    {"strategy": "data", "shard": "state"},
)


@pytest.mark.parametrize("how", STRATEGIES, ids=lambda how: "-".join(map(str, how.values())))
def test_a_scale_that_moves_is_the_same_on_all_ranks(how: dict[str, Any]) -> None:
    """The second batch is too large for halves, and is passed over by all."""
    graph = rf.trace(network, Spec((4, 6, 6, 3)))
    scale = rf.LossScale(start=64.0, every=2)
    step = rf.train_step(
        graph, loss=nn.cross_entropy, optimizer=optim.adam(0.01), precision="float16", loss_scale=scale
    )
    fed = batches(step, 4, 5)
    fed[1]["x"] = np.full_like(fed[1]["x"], 1e30)
    with np.errstate(invalid="ignore", over="ignore"):
        want = train(programs(step, rf.plan(step, ranks=1)), fed, 4)
        found = train(programs(step, rf.plan(step, ranks=2, **how)), fed, 4)
    assert np.isfinite(want.losses).tolist() == np.isfinite(found.losses).tolist() == [True, False, True, True]
    for name, wanted in (("scale", 64.0), ("row", 0.0), ("updates", 3)):
        assert found.state[f"loss_scale/{name}"] == want.state[f"loss_scale/{name}"] == wanted
    np.testing.assert_allclose(found.losses, want.losses, rtol=0.01)
    for name, value in want.state.items():
        np.testing.assert_allclose(found.state[name], value, atol=0.03, err_msg=name)
