"""A mixed-precision step gives the same numbers under every plan, up to the rounding of halves."""

from __future__ import annotations

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
