"""Layers with windows, weights and statistics, beside PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agree import TOLERANCE, Case, check, filters, first, last

from rapydli_flow import nn

X1, X2, X3 = (3, 9, 4), (2, 8, 7, 6), (1, 4, 5, 6, 3)


def conv(name, shape, filters_, window, torch_conv, groups=1, **how):
    """A convolution in both."""

    def theirs(x, w, b=None):
        return last(torch_conv(first(x), filters(w), b, groups=groups, **how))

    return Case(name, lambda x: nn.conv(x, filters_, window, groups=groups, **how), theirs, [shape])


def conv_transpose(name, shape, filters_, window, torch_conv, **how):
    """A transposed convolution in both; its filters are those of the convolution that it is the gradient of."""

    def theirs(x, w, b=None):
        return last(torch_conv(first(x), filters(w), b, **how))

    return Case(name, lambda x: nn.conv_transpose(x, filters_, window, **how), theirs, [shape])


def pooled(name, ours, theirs, shape=X2):
    return Case(name, ours, lambda x: last(theirs(first(x))), [shape])


def local_conv(x, w, b):
    """Untied convolution: one filter for each place."""
    views = first(x).unfold(2, 3, 1).unfold(3, 2, 1)  # n c h w r s
    return (views.permute(0, 2, 3, 4, 5, 1)[..., None] * w).sum((3, 4, 5)) + b


def attention(q, k, v):
    """Scaled dot-product attention with two heads."""
    q, k, v = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def batch_norm(x, gain, bias, mean, var):
    return last(F.batch_norm(first(x), mean.detach().clone(), var.detach().abs(), gain, bias, training=True))


def grouped_batch_norm(x, gain, bias, mean, var):
    return torch.cat([batch_norm(part, gain, bias, mean, var) for part in x.split(2)])


CASES = [
    conv("conv 1d, stride 2", X1, 5, 3, F.conv1d, stride=2, padding=1),
    conv("conv 2d", X2, 5, 3, F.conv2d),
    conv("conv 2d, dilation 2, groups 3", X2, 6, 3, F.conv2d, dilation=2, padding=2, groups=3),
    conv("conv 2d, stride 3, window 5", X2, 17, 5, F.conv2d, stride=3, padding=2),
    conv("conv 3d", X3, 4, 2, F.conv3d, stride=2, padding=1),
    conv_transpose("conv_transpose 1d", X1, 5, 3, F.conv_transpose1d, stride=2, padding=1, output_padding=1),
    conv_transpose("conv_transpose 2d", X2, 5, 4, F.conv_transpose2d, stride=2, padding=1),
    conv_transpose("conv_transpose 2d, dilation", X2, 3, 3, F.conv_transpose2d, dilation=2),
    conv_transpose("conv_transpose 3d", X3, 2, 2, F.conv_transpose3d, stride=2),
    Case("local_conv", lambda x: nn.local_conv(x, 5, (3, 2)), local_conv, [X2]),
    Case("dense", lambda x: nn.dense(x, 7), lambda x, w, b: x @ w + b, [(5, 9)]),
    Case("dense, flattening", lambda x: nn.dense(x, 7), lambda x, w, b: x.flatten(1) @ w + b, [(5, 3, 4)]),
    Case(
        "embedding",
        lambda i: nn.embedding(i, 11, 5),
        lambda i, w: F.embedding(i, w),
        [(4, 6)],
        {0: (0, 11)},
    ),
    pooled("max_pool", lambda x: nn.max_pool(x, 2), lambda x: F.max_pool2d(x, 2)),
    pooled(
        "max_pool, overlapping",
        lambda x: nn.max_pool(x, 3, stride=2, padding=1),
        lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
    ),
    pooled("max_pool 1d", lambda x: nn.max_pool(x, 3, stride=1), lambda x: F.max_pool1d(x, 3, stride=1), X1),
    pooled("max_pool 3d", lambda x: nn.max_pool(x, 2), lambda x: F.max_pool3d(x, 2), X3),
    pooled(
        "avg_pool",
        lambda x: nn.avg_pool(x, 3, stride=2, padding=1),
        lambda x: F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False),
    ),
    pooled(
        "avg_pool, padding counts",
        lambda x: nn.avg_pool(x, 3, stride=2, padding=1, count_padding=True),
        lambda x: F.avg_pool2d(x, 3, stride=2, padding=1),
    ),
    Case("global_avg_pool", nn.global_avg_pool, lambda x: x.mean((1, 2)), [X2]),
    Case("global_max_pool", nn.global_max_pool, lambda x: x.amax((1, 2)), [X2]),
    pooled("adaptive_avg_pool", lambda x: nn.adaptive_avg_pool(x, (3, 4)), lambda x: F.adaptive_avg_pool2d(x, (3, 4))),
    pooled("adaptive_max_pool", lambda x: nn.adaptive_max_pool(x, (3, 4)), lambda x: F.adaptive_max_pool2d(x, (3, 4))),
    pooled(
        "adaptive_avg_pool, dividing", lambda x: nn.adaptive_avg_pool(x, 3), lambda x: F.adaptive_avg_pool1d(x, 3), X1
    ),
    pooled("l2_pool", lambda x: nn.l2_pool(x, 2), lambda x: F.lp_pool2d(x, 2.0, 2)),
    Case("batch_norm", nn.batch_norm, batch_norm, [X2]),
    Case("batch_norm, groups", lambda x: nn.batch_norm(x, group=2), grouped_batch_norm, [(4, *X2[1:])]),
    Case("layer_norm", nn.layer_norm, lambda x, gain, bias: F.layer_norm(x, x.shape[-1:], gain, bias), [(3, 5, 16)]),
    Case(
        "group_norm",
        lambda x: nn.group_norm(x, 3),
        lambda x, gain, bias: last(F.group_norm(first(x), 3, gain, bias)),
        [X2],
    ),
    Case(
        "instance_norm",
        nn.instance_norm,
        lambda x, gain, bias: last(F.instance_norm(first(x), weight=gain, bias=bias)),
        [X2],
    ),
    Case("rms_norm", nn.rms_norm, lambda x, gain: F.rms_norm(x, x.shape[-1:], gain, 1e-5), [(3, 5, 16)]),
    pooled(
        "local_response_norm",
        lambda x: nn.local_response_norm(x, 5, alpha=0.5, beta=0.75, k=2.0),
        lambda x: F.local_response_norm(x, 5, 0.5, 0.75, 2.0),
        (2, 4, 4, 9),
    ),
    pooled("resize", lambda x: nn.resize(x, (5, 11)), lambda x: F.interpolate(x, size=(5, 11), mode="bilinear")),
    Case("project", lambda x: nn.project(x, 7), lambda x, w, b: x @ w.reshape(9, 7) + b, [(3, 5, 9)]),
    Case(
        "attention",
        lambda q, k, v: nn.attention(q, k, v, heads=2),
        attention,
        [(2, 5, 8), (2, 4, 8), (2, 4, 6)],
    ),
    pooled(
        "upsample, nearest", lambda x: nn.upsample(x, 2), lambda x: F.interpolate(x, scale_factor=2, mode="nearest")
    ),
    pooled(
        "upsample, bilinear",
        lambda x: nn.upsample(x, 2, mode="bilinear"),
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    ),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_pytorch(case: Case, dtype: str) -> None:
    check(case, dtype)
