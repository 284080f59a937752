"""Who sends how much to whom in a step."""

import numpy as np
import pytest
from networks import perceptron, small, step_of, traced

from rapydli_flow import optim
from rapydli_flow.scheduler import make_plan, traffic
from rapydli_flow.scheduler.program import Collective
from rapydli_flow.spec import Spec
from rapydli_flow.testing.plans import programs

STEP = step_of(traced(small, Spec((8, 12, 12, 2))), optim.sgd(0.1))


def of(graph, ranks, **how):
    return programs(graph, make_plan(graph, ranks, **how))


def test_neighbours_in_a_halo_send_each_other_more() -> None:
    sent = np.array(traffic(of(STEP, 4, strategy="spatial")))
    assert (sent.diagonal() == 0).all()
    near = np.abs(np.subtract.outer(range(4), range(4))) == 1
    assert sent[near].min() > sent[~near].max()


def test_stages_of_a_pipeline_send_to_the_next_and_back() -> None:
    chain = step_of(traced(perceptron, Spec((8, 6))), optim.sgd(0.1))
    sent = np.array(traffic(of(chain, 2, strategy="pipeline", micro_batches=2)))
    assert sent[0, 1] > 0
    assert sent[1, 0] > 0


@pytest.mark.parametrize("how", [{}, {"strategy": "spatial"}, {"strategy": "filters"}, {"shard": "parameters"}])
def test_a_row_is_what_the_rank_sends(how) -> None:
    made = of(STEP, 3, **how)
    for rank, row in enumerate(traffic(made)):
        meetings = [step for step in made[rank].steps if isinstance(step, Collective)]
        total = sum(step.op.sent_bytes(*(b.spec for b in step.ins)) for step in meetings)
        assert total - 3 * len(meetings) < sum(row) <= total  # the pieces of a sum are rounded down


def test_averages_count_by_the_step() -> None:
    made = of(STEP, 2, average_every=4)
    assert traffic(made) == ((0, 0), (0, 0))
    held = sum(made[0].leaves[name].spec.size_bytes for name in made[0].kind("param", "state"))
    assert traffic(made, average_every=4) == ((0, held // 4), (held // 4, 0))
