"""The layer of examples/kernels/torch_layer.py beside PyTorch's own: numbers, shared memory, training."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

PATH = Path(__file__).parents[2] / "examples" / "kernels" / "torch_layer.py"
spec = importlib.util.spec_from_file_location("torch_layer", PATH)
layers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layers)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("args", "how"),
    [
        ((6, 5, 3), {"padding": 1}),
        ((6, 4, (3, 2)), {"padding": (1, 0), "stride": (2, 1), "dilation": (1, 2), "bias": False}),
        ((6, 9, 3), {"groups": 3}),
    ],
)
@pytest.mark.parametrize("layout", [channels_last, lambda x: x.contiguous()], ids=["channels_last", "channels first"])
def test_numbers_are_those_of_pytorch(args, how, layout):
    torch.manual_seed(0)
    ours, theirs = layers.pair(*args, **how)
    x = layout(torch.randn(2, 6, 8, 7))
    dy = torch.randn(theirs(x).shape)
    for a, b in zip(layers.step(ours, x, dy), layers.step(theirs, x, dy), strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * max(1.0, float(b.abs().max()))


def test_nothing_is_copied():
    ours, _ = layers.pair(6, 5, 3, padding=1)
    x = channels_last(torch.randn(2, 6, 8, 7))
    assert np.shares_memory(layers.last(x), x.permute(0, 2, 3, 1).numpy())
    assert np.shares_memory(layers.filters(ours.weight), ours.weight.detach().permute(2, 3, 1, 0).numpy())
    assert ours(x).is_contiguous(memory_format=torch.channels_last)


def test_gradients_in_double_precision():
    layer = layers.Conv2d(2, 3, 3, padding=1, stride=2).double()
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_it_learns_as_pytorchs_does():
    torch.manual_seed(1)
    ours, theirs = layers.pair(6, 5, 3, padding=1)
    x, wanted = channels_last(torch.randn(2, 6, 8, 7)), torch.randn(2, 5, 8, 7)
    for layer in (ours, theirs):
        rule = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            rule.zero_grad()
            ((layer(x) - wanted) ** 2).mean().backward()
            rule.step()
    assert ours.weight.permute(2, 3, 1, 0).is_contiguous()  # optimizers keep how it lies
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert float((a - b).detach().abs().max()) < 1e-5


def test_what_it_does_not_pad():
    with pytest.raises(ValueError, match="padding='same' of 'zeros' is not a number of zeros"):
        layers.Conv2d(2, 3, 3, padding="same")
