"""In float32 the gradients of one step lie within 1e-5 of their norm of those of one worker, under every plan.

With kernels of this machine. After the first step of SGD with momentum, momentum is the gradient.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest
from matrix import FLAT, NETWORKS, PLANS, RANKS, SHAPE, STOPS
from networks import step_of

from cpu_kernels.compile import host
from rapydli_flow import optim
from rapydli_flow.graph import Graph, trace
from rapydli_flow.scheduler import Plan, make_plan
from rapydli_flow.spec import Array, Spec
from rapydli_flow.testing.plans import batches, programs, train
from rapydli_flow.tuner import Tuning

LIMIT = 1e-5
QUICK = {("data", "chain"), ("rows", "dropped"), ("sharded parameters", "chain")}


def combinations() -> list[Any]:
    """Each strategy with each network, on the fewest ranks that it is for: kernels of each take seconds to compile."""
    both = [(name, network) for name in PLANS for network in NETWORKS if (name, network) not in STOPS | FLAT]
    return [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in both]


@cache
def step(network: str) -> Graph:
    return step_of(trace(NETWORKS[network], Spec(SHAPE)), optim.sgd(0.05, momentum=0.9))


def gradients(network: str, plan: Plan) -> dict[str, Array]:
    graph = step(network)
    made = programs(graph, plan, Tuning(host()))
    state = train(made, batches(graph, 1, 5), 1, device=host()).state
    return {name: value for name, value in state.items() if name.endswith("/momentum")}


@cache
def alone(network: str) -> dict[str, Array]:
    return gradients(network, Plan())


def norm(arrays: dict[str, Array]) -> float:
    return float(np.sqrt(sum(np.square(value, dtype=np.float64).sum() for value in arrays.values())))


@pytest.mark.parametrize(("name", "network"), combinations())
def test_gradients_of_one_step(name: str, network: str) -> None:
    plan = make_plan(step(network), RANKS.get(name, (2,))[0], **PLANS[name])
    found, want = gradients(network, plan), alone(network)
    assert len(want) == len(step(network).leaves("param"))
    off = norm({key: found[key].astype(np.float64) - value for key, value in want.items()})
    assert 0 <= off <= LIMIT * norm(want)
