"""Nothing is left out: every operator is met by a comparison with PyTorch, itself or in a gradient."""

from __future__ import annotations

import test_elementwise
import test_layers
from agree import traced

from rapydli_flow.ops import registry

#: what PyTorch has no counterpart of, or what is compared elsewhere
ELSEWHERE = {
    "leaf": "an input",
    "phase": "resolved before anything runs",
    "dropout": "random: another stream of random numbers",
    "fused": "made by a pass; see the op suite",
    "again": "made by a pass; computes what another node did",
    "normalize_scale": "made by a pass, of batch norm; networks of test_zoo have it",
    "normalize_by": "made by a pass, of batch norm; networks of test_zoo have it",
    "all_reduce": "between ranks",
    "exchange": "between ranks",
    "wait": "between ranks",
}


def test_every_op_is_compared() -> None:
    met = {
        node.op.name for case in (*test_layers.CASES, *test_elementwise.CASES) for node in traced(case, "float32")[0]
    }
    updates = {name for name, op in registry.items() if op.__module__.endswith((".update", ".rate"))}  # test_optimizers
    sources = {name for name, op in registry.items() if op.__module__.endswith(".source")}  # first values of parameters
    ours = {name for name, op in registry.items() if op.__module__.startswith("rapydli_flow.")}
    left_out = sorted(ours - met - updates - sources - set(ELSEWHERE))
    assert not left_out, ", ".join(left_out)
