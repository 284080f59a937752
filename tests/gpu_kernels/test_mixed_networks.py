"""Every op of mixed training steps, with its tail, on every template that takes it: halves beside float32, wide sums.

Operands are what the networks compute, so that labels, marks of poolings and logarithms are in their ranges.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import rapydli_flow as rf
from gpu_kernels import emulate
from rapydli_flow import nn, optim
from rapydli_flow.errors import DTypeError
from rapydli_flow.graph import Graph, fuse, parts
from rapydli_flow.ops import Leaf, Op
from rapydli_flow.spec import HALVES, Array, Block, Spec
from rapydli_flow.template import templates
from rapydli_flow.testing.gpu import CARD, EPSILON, OLDER, assert_close, is_floating
from rapydli_flow.testing.interpret import run_nodes, start

X = Spec((4, 6, 6, 3))


def plain(x: Any) -> Any:
    y = nn.relu(nn.batch_norm(nn.conv(x, 8, 3, padding=1, bias=False)))
    y = nn.relu(y + nn.batch_norm(nn.conv(y, 8, 3, padding=1, bias=False)))
    y = nn.relu(nn.conv(nn.max_pool(y, 2), 8, 3, padding=1))
    y = nn.dropout(nn.avg_pool(y, 2, stride=1), 0.3)
    return nn.dense(nn.relu(nn.dense(y, 16)), 5)


def broad(x: Any) -> Any:
    """Channels enough for tensor cores."""
    y = nn.relu(nn.batch_norm(nn.conv(x, 64, 3, padding=1, bias=False)))
    y = nn.conv(nn.relu(nn.batch_norm(nn.conv(y, 64, 3, stride=2, padding=1, bias=False))), 64, 1)
    y = nn.avg_pool(nn.relu(nn.conv(y, 64, 3, padding=1, groups=64)), 3)
    return nn.dense(nn.relu(nn.dense(y, 128)), 64)


def odd(x: Any) -> Any:
    y = nn.local_response_norm(nn.relu(nn.conv(x * (1 / 255.0), 7, 3, stride=2, padding=1)))
    y = nn.gelu(nn.group_norm(nn.conv(y, 14, 3, padding=1, groups=7), groups=2))
    return nn.dense(nn.global_avg_pool(nn.resize(nn.silu(nn.instance_norm(y)), 2)), 5)


def rows(x: Any) -> Any:
    y = nn.layer_norm(nn.dense(nn.layer_norm(nn.reshape(x, (36, 3))), 32))
    return nn.dense(nn.tanh(nn.rms_norm(y)), 5)


def pools(x: Any) -> Any:
    y = nn.conv(x, 8, 3, padding=1)
    y = nn.concatenate([nn.adaptive_max_pool(y, 2), nn.adaptive_avg_pool(y, 2), nn.l2_pool(y, 3)], axis=-1)
    y = nn.prelu(y)
    y = nn.softmax(nn.sigmoid(y) * nn.softplus(y))
    y = nn.elu(nn.leaky_relu(nn.pad(y, ((1, 0), (0, 1)))))
    return nn.dense(nn.local_conv(y, 4, 2), 5)


def upwards(x: Any) -> Any:
    y = nn.conv_transpose(nn.conv(x, 4, 2, stride=2), 6, 2, stride=2)
    y = nn.maximum(y, nn.clip(y, -1.0, 0.5))
    return nn.dense(nn.log(nn.exp(nn.clip(y, -2.0, 2.0)) + 1.0), 5)


def step_of(network: Any, half: str) -> Graph:
    how: dict[str, Any] = {"loss_scale": rf.LossScale(start=64.0)} if half == "float16" else {}
    how |= {"loss": nn.cross_entropy, "optimizer": optim.sgd(0.05, momentum=0.9)}
    return fuse(rf.train_step(rf.trace(network, X), precision=half, **how))


def calls(graph: Graph, half: str) -> Iterator[tuple[str, Op, list[Spec], list[Array], Block | None]]:
    """The ops of the graph that have to do with halves, each once, with what they are given."""
    rng = np.random.default_rng(0)
    fed = {"x": rng.standard_normal(X.shape).astype(np.float32), "label": rng.integers(0, 5, X.shape[0])}
    every = run_nodes(graph, {**start(graph, 1), **fed}, 1)
    seen = set()
    for node in graph:
        specs = [graph.spec(v) for v in node.inputs]
        key = str(node.op), tuple(specs)
        if isinstance(node.op, Leaf) or node.op.view or key in seen:
            continue
        if half in {spec.dtype for spec in (*specs, *node.specs)}:
            seen.add(key)
            at = (node.at or Block.all(node.specs[0].shape)) if node.op.indexed else None
            yield node.name, node.op, specs, [every[i][k] for i, k in node.inputs], at


def reference(op: Op, values: list[Array], at: Block | None) -> tuple[Array, ...]:
    """In double precision; of a float32 anchor, whatever it is given, as it is."""
    try:
        return op.run(*(np.float64(v) if is_floating(v) else v for v in values), at=at)
    except DTypeError:
        return op.run(*values, at=at)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("network", [plain, broad, odd, rows, pools, upwards], ids=lambda f: f.__name__)
def test_every_op_is_served_and_right(network: Any, half: str) -> None:
    for name, op, specs, values, at in calls(step_of(network, half), half):
        anchor, ins, epilogue = parts(op, specs)
        outs, served = anchor.out_specs(*ins), set()
        stored = (epilogue.out, *outs[1:])
        want = reference(op, values, at)
        near = 1e-5 + max(EPSILON.get(out.dtype, 0.0) for out in stored)
        for template in templates(anchor.family, "cuda"):
            for card in (OLDER, CARD):
                config = template.default(anchor, ins, outs, card)
                if config is None:
                    continue
                served.add(card.target)
                grids = template.build(anchor, ins, outs, epilogue, **config)
                work = template.workspace(anchor, ins, outs, **config)
                n = len(ins)
                got = emulate.run(grids, values[:n], stored, extras=values[n:], work=work, at=at)
                assert [y.dtype.name for y in got] == [out.dtype for out in stored]
                try:
                    assert_close(got, want, near)
                except AssertionError as error:
                    raise AssertionError(f"{name} ({op.title}) with {template.name} {config}") from error
        assert len(served) == 2, f"{name} ({op.title}) has no template"
