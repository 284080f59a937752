"""SqueezeNet: few parameters, by fire modules (Iandola et al. 2016).

A *fire module* squeezes its input to few channels by a convolution of window 1, and expands these by two convolutions
beside each other, of windows 1 and 3, whose outputs are concatenated. Pooling comes late, and the last layer is a
convolution with a filter for each class, averaged over the picture: there is no dense layer.

Paper: F. N. Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters", arXiv:1602.07360.
Scaled down: scikit-learn's digits, enlarged to 32x32 in the network, in place of ImageNet; four fire modules with 8 and
16 squeezing filters in place of eight with 16 to 64; a first convolution of 3x3; batches of 32. The squeeze ratio of
1/8, dropout of 0.5 and a rate that falls in a line are those of the paper; the ReLU after the last convolution is left
out, and Adam is used: SGD with momentum needs about 150 steps here before it begins to learn.
About 0.96 of the test digits are right after 352 steps, 0.99 are among the first two.
Run: `rapydli train examples/papers/squeezenet.py --workers 0`, or `python` and this file: a training loop of its own.
"""

import numpy as np
from sklearn.datasets import load_digits

import rapydli_flow as rf
from rapydli_flow import nn, optim

BATCH, EPOCHS = 32, 8


@nn.block
def fire(x, squeeze):
    """``squeeze`` filters of window 1, then 4 times as many of window 1 and of window 3, one behind the other."""
    x = nn.relu(nn.conv(x, squeeze, 1))
    narrow = nn.conv(x, 4 * squeeze, 1)
    wide = nn.conv(x, 4 * squeeze, 3, padding=1)
    return nn.relu(nn.concatenate([narrow, wide]))


def network(x):
    """A convolution, four fire modules with pooling in between, dropout, and a feature map for each class."""
    x = nn.upsample(x, 4, "bilinear")  # 8x8 to 32x32
    x = nn.relu(nn.conv(x, 64, 3, stride=2, padding=1))
    x = nn.max_pool(x, 3, stride=2, padding=1)  # to 8x8
    x = fire(fire(x, 8), 8)
    x = nn.max_pool(x, 3, stride=2, padding=1)  # to 4x4
    x = fire(fire(x, 16), 16)
    return nn.global_avg_pool(nn.conv(nn.dropout(x, 0.5), 10, 1))


def data(url):
    """The scans at ``url``, written there the first time; a fifth of them tests."""
    try:
        return rf.load(url)
    except rf.errors.DatasetNotFound:
        scans = load_digits()
        x = (scans.images[..., None] / 16.0).astype(np.float32)
        order = np.random.default_rng(0).permutation(len(x))
        parts = {"train": order[:1437], "test": order[1437:]}
        return rf.ingest({name: {"x": x[i], "label": scans.target[i]} for name, i in parts.items()}, url)


def step():
    """Cross entropy, Adam under a rate that rises and falls in lines; is the digit first, is it among the first two?"""
    graph = rf.trace(network, rf.Spec((BATCH, 8, 8, 1)))
    optimizer = optim.adam(optim.warmup(optim.polynomial(0.004, steps=EPOCHS * (1437 // BATCH)), 20))
    metrics = {"accuracy": nn.accuracy, "top_2": nn.top_k(2)}
    return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optimizer, metrics=metrics)


def main():
    """The same training, as a loop that you can change."""
    digits, graph, rng = data("runs/squeezenet.zarr"), step(), np.random.default_rng(0)
    train, test = (digits[name].read(np.arange(len(digits[name]))) for name in ("train", "test"))
    with rf.stepper(graph) as update:
        state = update.init()
        for epoch in range(EPOCHS):
            order = rng.permutation(len(train["label"]))
            for i in range(0, len(order) - BATCH + 1, BATCH):
                state, _ = update(state, {name: array[order[i : i + BATCH]] for name, array in train.items()})
            print(epoch + 1, rf.evaluate(graph, state, test))


if __name__ == "__main__":
    main()
