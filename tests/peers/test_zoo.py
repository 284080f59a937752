"""Networks of the zoo beside the same in PyTorch, on small records: scores when predicting, and a training step.

What is compared is how networks are put together, so ours run as the reference; kernels have tests of their own, and
compiled steps are compared with the reference in tests/zoo.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from agree import compare
from small_networks import BATCH, CLASSES, RECORDS, small

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.graph import Graph, predicting
from rapydli_flow.testing.interpret import interpret

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # the twins that are measured

from twins import MAKERS, twin


def drawn(graph: Graph, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A state in which also gains, biases and running statistics are of no particular value."""
    state = rf.init(graph)
    for name, value in state.items():
        label = name.rpartition("/")[2]
        if label in ("gain", "var"):
            state[name] = rng.uniform(0.5, 1.5, value.shape).astype(value.dtype)
        elif label != "w":
            state[name] = rng.normal(0.0, 0.1, value.shape).astype(value.dtype)
    return state


@pytest.mark.parametrize("name", RECORDS)
def test_scores_agree_with_pytorch(name: str) -> None:
    rng = np.random.default_rng(3)
    graph = small(name, **({"dropout": 0.25} if name in ("alexnet", "overfeat", "vgg_a", "googlenet") else {}))
    state, x = drawn(graph, rng), rng.normal(size=(BATCH, *RECORDS[name])).astype(np.float32)
    theirs = twin(name, graph, state, dropout=0.25).eval()
    with torch.inference_mode():
        want = theirs(torch.from_numpy(x).movedim(-1, 1))
    compare(name, "scores", interpret(predicting(graph), {"x": x, **state}).outputs["y"], want)


@pytest.mark.parametrize("name", ["lenet", "cifar10_quick", "googlenet", "resnet18"])
def test_a_training_step_agrees_with_pytorch(name: str) -> None:
    rng = np.random.default_rng(4)
    graph = small(name, **({"dropout": 0.0} if name == "googlenet" else {}))
    state, x = drawn(graph, rng), rng.normal(size=(BATCH, *RECORDS[name])).astype(np.float32)
    label = rng.integers(0, CLASSES, BATCH)
    theirs = twin(name, graph, state).train()
    loss = torch.nn.functional.cross_entropy(theirs(torch.from_numpy(x).movedim(-1, 1)), torch.from_numpy(label))
    loss.backward()
    step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))
    after = interpret(step, {"x": x, "label": label, **state})
    assert after.outputs["loss"] == pytest.approx(loss.item(), rel=1e-4)
    biases = [leaf.name for leaf in graph.leaves("param") if leaf.name.endswith("/b")]
    last, first = list(theirs.parameters())[-1].grad, next(iter(theirs.parameters())).grad.movedim((0, 1), (-1, -2))
    for label, want in ((biases[-1], last), ("conv_1/w", first)):
        compare(name, f"the gradient of {label}", (state[label] - after.updates[label]) / np.float32(0.1), want)


def test_every_network_has_a_twin() -> None:
    assert set(MAKERS) == set(rf.zoo.networks) == set(RECORDS)
