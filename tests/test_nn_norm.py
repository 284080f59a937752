"""Normalisation layers: numbers against plain NumPy, accuracy, what they refuse, and ranks that share a batch."""

from typing import Any

import numpy as np
import pytest
from lockstep import assert_split, collectives
from networks import step_of

from rapydli_flow import nn, optim
from rapydli_flow.errors import GraphError, SettingError, ShapeError
from rapydli_flow.graph import Fused, fuse, predicting, trace, training
from rapydli_flow.ops import LocalResponse, Sample, Standardize, StandardizeGrad
from rapydli_flow.scheduler import data_parallel
from rapydli_flow.spec import Array, Block, Spec
from rapydli_flow.template import templates
from rapydli_flow.testing import kernels
from rapydli_flow.testing.interpret import interpret

IMAGE = Spec((3, 5, 4, 6), "float64")


def run(network: Any, x: Array, **feeds: Array) -> Array:
    graph = training(trace(network, Spec(x.shape, x.dtype.name)))
    return interpret(graph, {"x": x, **feeds}, 1, 2).outputs["y"]


def image() -> Array:
    return np.random.default_rng(0).normal(2.0, 3.0, IMAGE.shape)


def standard(x: Array, axes: tuple[int, ...], eps: float = 1e-5) -> Array:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_layer_norm(axes: int) -> None:
    x, rng = image(), np.random.default_rng(1)
    gain, bias = (rng.normal(size=x.shape[-axes:]) for _ in range(2))
    got = run(
        lambda x: nn.layer_norm(x, axes=axes, eps=0.1),
        x,
        **{"layer_norm_1/gain": gain, "layer_norm_1/bias": bias},
    )
    assert got == pytest.approx(standard(x, tuple(range(4 - axes, 4)), 0.1) * gain + bias, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm(groups: int) -> None:
    x, gain, bias = image(), np.arange(6.0), np.arange(6.0) - 2.0
    got = run(lambda x: nn.group_norm(x, groups), x, **{"group_norm_1/gain": gain, "group_norm_1/bias": bias})
    want = standard(x.reshape(3, 5, 4, groups, 6 // groups), (1, 2, 4)).reshape(x.shape) * gain + bias
    assert got == pytest.approx(want, rel=1e-12, abs=1e-12)


def test_without_gain_and_bias() -> None:
    x = image()
    assert run(lambda x: nn.instance_norm(x, affine=False), x) == pytest.approx(standard(x, (1, 2)))
    assert run(lambda x: nn.layer_norm(x, affine=False), x) == pytest.approx(standard(x, (3,)))
    assert run(lambda x: nn.group_norm(x, 1, affine=False), x) == pytest.approx(standard(x, (1, 2, 3)))
    want = x / np.sqrt((x * x).mean((2, 3), keepdims=True) + 1e-5)
    assert run(lambda x: nn.rms_norm(x, axes=2, affine=False), x) == pytest.approx(want)


def test_parameters() -> None:
    def network(x: Any) -> Any:
        return nn.rms_norm(nn.instance_norm(nn.group_norm(nn.layer_norm(x, axes=2), 3)))

    leaves = trace(network, IMAGE).leaves("param")
    assert [(leaf.name, leaf.shape) for leaf in leaves] == [
        ("layer_norm_1/gain", (4, 6)),
        ("layer_norm_1/bias", (4, 6)),
        ("group_norm_1/gain", (6,)),
        ("group_norm_1/bias", (6,)),
        ("instance_norm_1/gain", (6,)),
        ("instance_norm_1/bias", (6,)),
        ("rms_norm_1/gain", (6,)),
    ]


@pytest.mark.parametrize("size", [1, 4, 5, 20])
def test_local_response_against_loops(size: int) -> None:
    x = image()
    want = np.empty_like(x)
    for c in range(6):
        low, high = max(0, c - size // 2), c + (size - 1) // 2 + 1
        want[..., c] = x[..., c] / (2.0 + 0.3 / size * (x[..., low:high] ** 2).sum(-1)) ** 0.75
    assert run(lambda x: nn.local_response_norm(x, size, alpha=0.3, k=2.0), x) == pytest.approx(want)


def test_a_window_wider_than_the_channels_has_a_kernel() -> None:
    sample = Sample(LocalResponse(size=20, alpha=0.5), (Spec((4, 3)),))
    assert kernels.check_templates(sample, random_configs=0, corner=False) == len(templates("local_response", "cpu"))


def contrast(x: Array, window: tuple[int, int], sigma: float, eps: float) -> Array:
    """One weight for each element of the window inside x, in plain loops."""

    def near(y: Array, h: int, w: int) -> Array:
        total, weights = np.zeros(len(y)), 0.0
        for r in range(max(0, h - window[0] // 2), min(y.shape[1], h + window[0] // 2 + 1)):
            for s in range(max(0, w - window[1] // 2), min(y.shape[2], w + window[1] // 2 + 1)):
                weight = np.exp(-((r - h) ** 2 + (s - w) ** 2) / (2 * sigma**2))
                total += weight * y[:, r, s].sum(-1)
                weights += weight * y.shape[-1]
        return total / weights

    def everywhere(y: Array) -> Array:
        rows = [np.stack([near(y, h, w) for w in range(y.shape[2])], 1) for h in range(y.shape[1])]
        return np.stack(rows, 1)[..., None]

    v = x - everywhere(x)
    d = np.sqrt(everywhere(v * v) + eps**2)
    return v / np.maximum(d, d.mean((1, 2), keepdims=True))


def test_local_contrast_against_loops() -> None:
    x = image()
    got = run(lambda x: nn.local_contrast_norm(x, (5, 3), sigma=1.2, eps=0.01), x)
    assert got == pytest.approx(contrast(x, (5, 3), 1.2, 0.01), rel=1e-10, abs=1e-12)
    got = run(nn.local_contrast_norm, x)
    assert got == pytest.approx(contrast(x, (9, 9), 9 / 4, 1e-4), rel=1e-10, abs=1e-12)


def test_local_contrast_of_a_constant_sample() -> None:
    x = np.ones((2, 4, 5, 2))
    assert np.abs(run(lambda x: nn.local_contrast_norm(x, 3), x)).max() < 1e-10
    graph = trace(lambda x: nn.dense(nn.local_contrast_norm(nn.conv(x, 2, 1), 3), 3), Spec(x.shape, "float64"))
    outputs = interpret(step_of(graph), {"x": x, "label": np.array([0, 2])}, 1, 2).outputs
    assert np.isfinite(outputs["d conv_1/w"]).all()
    assert np.isfinite(outputs["loss"])


# kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "shape"), [({}, (4, 300)), ({"axes": 3, "groups": 4}, (2, 9, 8, 12)), ({"axes": 2, "groups": 3}, (2, 90, 3))]
)
def test_a_large_mean_does_not_cancel(op: Any, shape: tuple[int, ...]) -> None:
    """Kernels in float32 against float64, on values of 10,000 that deviate by 1."""
    x, high = Spec(shape), (1e4 - 1.0, 1e4 + 1.0)
    for sample in (Sample(Standardize(**op), (x,), {0: high}), Sample(StandardizeGrad(**op), (x, x), {1: high})):
        assert kernels.check_templates(sample, random_configs=0, corner=False) == 1


def test_a_constant_record_is_zero() -> None:
    x, same = Spec((3, 70)), (3.3, 3.3)
    for sample in (Sample(Standardize(), (x,), {0: same}), Sample(StandardizeGrad(eps=1.0), (x, x), {1: same})):
        assert kernels.check_templates(sample, random_configs=0, corner=False) == 1
    assert not Standardize()(np.full((3, 70), 3.3, "float32")).any()


def test_a_value_that_is_not_finite_stays_in_its_record() -> None:
    x = np.ones((2, 4, 6))
    x[0, 1, 2] = np.nan
    y = run(lambda x: nn.layer_norm(x, affine=False), x)
    assert np.isnan(y[0, 1]).all()
    assert np.isnan(y).sum() == 6


def test_gain_and_bias_are_fused_for_predicting() -> None:
    graph = fuse(predicting(trace(lambda x: nn.group_norm(x, 2), IMAGE)))
    assert [node.op.title for node in graph if isinstance(node.op, Fused)] == ["standardize+multiply+add"]


# what they refuse --------------------------------------------------------------------------------------


def test_refusals() -> None:
    def refuses(error: type[Exception], message: str, network: Any, spec: Spec = IMAGE) -> None:
        with pytest.raises(error, match=message):
            trace(network, spec)

    refuses(ShapeError, "standardize: 6 channels are not divisible by 4 groups", lambda x: nn.group_norm(x, 4))
    refuses(ShapeError, "standardize: 6 channels are not divisible by 0 groups", lambda x: nn.group_norm(x, 0))
    refuses(ShapeError, "standardize: axes=4 is not 1 to 3", lambda x: nn.layer_norm(x, axes=4))
    refuses(ShapeError, "standardize: axes=0 is not 1 to 3", lambda x: nn.rms_norm(x, axes=0))
    refuses(GraphError, "instance_norm: x has no spatial axes", nn.instance_norm, Spec((3, 4)))
    refuses(ShapeError, "local_response: a window of size=0", lambda x: nn.local_response_norm(x, 0))
    refuses(GraphError, "local_contrast_norm: x has 0 spatial axes", nn.local_contrast_norm, Spec((3, 4)))
    refuses(SettingError, "local_contrast_norm: window=4, .* odd", lambda x: nn.local_contrast_norm(x, 4))
    refuses(SettingError, "local_contrast_norm: .* sigma=0, .* positive", lambda x: nn.local_contrast_norm(x, sigma=0))


# ranks -------------------------------------------------------------------------------------------------


def network(x: Any) -> Any:
    x = nn.local_contrast_norm(x, 3, eps=0.1)
    x = nn.relu(nn.group_norm(nn.conv(x, 6, 3, padding=1), 3))
    x = nn.local_response_norm(nn.instance_norm(x), 3, alpha=0.5)
    return nn.rms_norm(nn.dense(nn.layer_norm(x, axes=2), 5))


def test_ranks_by_samples_give_the_step_of_one() -> None:
    graph = step_of(trace(network, IMAGE), optim.sgd(0.1, momentum=0.9))
    graphs = assert_split(graph, 2, data_parallel(graph, 2).layouts, {"x": image(), "label": np.array([0, 4, 1])}, 1.0)
    assert all(collectives(part) for part in graphs)


@pytest.mark.parametrize("axis", [1, 3])
def test_ranks_by_rows_and_channels(axis: int) -> None:
    graph = trace(network, IMAGE)
    block = IMAGE.shape[axis] // 2
    layout = Block.along(IMAGE.shape, axis, (0, block, IMAGE.shape[axis]))
    assert_split(graph, 2, {"x": layout}, {"x": image()}, 1.0)
