"""What serves untuned on a card, for every sample of every op: templates foretell their time as they are asked to."""

import pytest

from rapydli_flow.ops import registry
from rapydli_flow.template import Epilogue, templates
from rapydli_flow.testing.gpu import CARD, OLDER, as_dtype
from rapydli_flow.tuner import Request


@pytest.mark.parametrize("name", sorted(registry))
def test_a_default_is_found_and_its_time_foretold(name):
    for sample in registry[name].samples():
        for dtype in ("float32", "bfloat16"):
            op, ins = sample.op, as_dtype(sample, dtype).ins
            try:
                outs = op.out_specs(*ins)
            except (TypeError, ValueError):  # an op that takes no halves
                continue
            for card in (CARD, OLDER):
                request = Request(op, ins, Epilogue.none(outs[0]))
                choice = request.default(card)
                assert choice.reference or choice.find(request, card)
                for template in templates(op.family, card.kind):
                    config = template.default(op, ins, outs, card)
                    if config is not None and template.cost is not None:
                        assert template.cost(op, ins, outs, card, config) > 0
