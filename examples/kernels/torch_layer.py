"""A convolution of PyTorch that computes with `rf.kernels`: forward, and the gradients of input, filters and bias.

    layer = Conv2d(64, 64, 3, padding=1)      in place of torch.nn.Conv2d; state_dict and optimizers see no difference
    y = layer(x)                              x: N,C,H,W, best in memory_format=torch.channels_last

A tensor of N,C,H,W in channels_last lies in memory as N,H,W,C, and filters K,C,R,S can lie as R,S,C,K: permuted views
of both are the contiguous arrays that kernels take, so nothing is copied on the way in or out. Tensors on a GPU are
taken as they are, and computed there, on PyTorch's current stream.

Run, with PyTorch: `python examples/kernels/torch_layer.py [seconds of tuning for each kernel] [cuda]`
"""

import sys
import time
from statistics import median

import torch

from rapydli_flow import kernels


def array(x):
    """A tensor as kernels take it: an array of NumPy in the same memory, or itself on a GPU."""
    x = x.detach().contiguous()
    return x if x.is_cuda else x.numpy()


def tensor(y):
    """What a kernel gave as a tensor: the same memory."""
    return y if isinstance(y, torch.Tensor) else torch.from_numpy(y)


def last(x):
    """N,C,H,W as an array N,H,W,C: the same memory where that is channels_last, else a copy."""
    return array(x.permute(0, 2, 3, 1))


def filters(w):
    """K,C,R,S as an array R,S,C,K: the same memory for the parameter of `Conv2d`."""
    return array(w.permute(2, 3, 1, 0))


def first(y):
    """An array N,H,W,C as a tensor N,C,H,W in channels_last: the same memory."""
    return tensor(y).permute(0, 3, 1, 2)


class Convolution(torch.autograd.Function):
    """``conv(x, w) + bias``; ``how``: stride, padding, dilation and groups as `rf.kernels.conv` takes them."""

    @staticmethod
    def forward(ctx, x, w, bias, how):
        ctx.save_for_backward(x, w)
        ctx.how = how
        bias = None if bias is None else array(bias)
        return first(kernels.conv(last(x), filters(w), bias=bias, **how))

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        n, c, *space = x.shape
        k, each, *window = w.shape
        g, dx, dw, db = last(dy), None, None, None
        if ctx.needs_input_grad[0]:
            dx = first(kernels.conv_input_grad(g, filters(w), (n, *space, c), **ctx.how))
        if ctx.needs_input_grad[1]:
            dw = tensor(kernels.conv_filter_grad(last(x), g, (*window, each, k), **ctx.how)).permute(3, 2, 0, 1)
        if ctx.needs_input_grad[2]:
            db = dy.sum((0, 2, 3))
        return dx, dw, db, None


class Conv2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d` with zero padding, in float32 or float64 on the CPU, in float32 or halves on a GPU."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            raise ValueError(f"Conv2d: padding={self.padding!r} of {self.padding_mode!r} is not a number of zeros.")
        laid = self.weight.detach().permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)  # R,S,C,K in memory
        self.weight = torch.nn.Parameter(laid)

    def forward(self, x):
        how = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        return Convolution.apply(x, self.weight, self.bias, how)


def tune(layer, shape, budget_s):
    """Tune the three kernels of a layer for inputs N,C,H,W of this shape."""
    how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    n, c, *space = shape
    k, each, *window = layer.weight.shape
    x, w = (n, *space, c), (*window, each, k)
    on = layer.weight.device
    like = torch.zeros(shape, device=on).contiguous(memory_format=torch.channels_last)
    y = tuple(layer(like).permute(0, 2, 3, 1).shape)
    bias = None if layer.bias is None else (k,)
    for name, operands, more in (
        ("conv", (x, w), {"bias": bias}),
        ("conv_input_grad", (y, w, x), {}),
        ("conv_filter_grad", (x, y, w), {}),
    ):
        device = str(on) if on.type == "cuda" else None
        print(kernels.tune(name, *operands, **more, **how, budget_s=budget_s, device=device))


def pair(*args, device="cpu", **how):
    """Our layer and PyTorch's, with the same parameters."""
    ours, theirs = (layer(*args, **how).to(device) for layer in (Conv2d, torch.nn.Conv2d))
    theirs = theirs.to(memory_format=torch.channels_last)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def step(layer, x, dy):
    """Output, and gradients of input and parameters."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def main(budget_s=0.0, device="cpu"):
    """Compare numbers and times of a few layers, forward and backward, in turns."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # float32 beside float32
    print(f"{'layer':34} {'ours':>9} {'torch':>9} {'torch / ours':>13} {'difference':>11}")
    for shape, args, how in (
        ((8, 64, 56, 56), (64, 64, 3), {"padding": 1}),
        ((8, 64, 28, 28), (64, 64, 3), {"padding": 1}),
        ((8, 64, 56, 56), (64, 64, 3), {"padding": 1, "stride": 2}),
        ((8, 256, 14, 14), (256, 64, 1), {}),
    ):
        ours, theirs = pair(*args, device=device, **how)
        if budget_s:
            tune(ours, shape, budget_s)
        x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        dy = torch.randn(ours(x).shape, device=device).contiguous(memory_format=torch.channels_last)
        results = zip(step(ours, x, dy), step(theirs, x, dy), strict=True)
        difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in results)
        times = {layer: [] for layer in (ours, theirs)}
        for _ in range(3):
            for layer, taken in times.items():
                for timed in (False, True, True, True):  # the other side's threads may still spin at first
                    begin = time.perf_counter()
                    step(layer, x, dy)
                    if x.is_cuda:
                        torch.cuda.synchronize()
                    if timed:
                        taken.append(time.perf_counter() - begin)
        a, b = (median(taken) * 1e3 for taken in times.values())
        title = f"{list(shape)} {args} {how.get('stride', '')}"
        print(f"{title:34} {a:6.1f} ms {b:6.1f} ms {b / a:13.2f} {difference:11.1e}")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]), *sys.argv[2:3])
