"""Network in Network: perceptrons that slide over a picture, and no dense layer (Lin, Chen, Yan 2013).

A linear filter is replaced by a small perceptron: a convolution followed by two of window 1, an *mlpconv* block. The
last block has a feature map for each class, and its mean over the picture is the score, so that nothing is left that
could overfit like a dense layer.

Paper: M. Lin, Q. Chen, S. Yan, "Network In Network", arXiv:1312.4400, the network for CIFAR-10.
Scaled down: 8x8 digits of scikit-learn in place of 32x32 photographs, windows of 3 in place of 5, 32 feature maps in
place of 96 to 192, dropout of 0.25 in place of 0.5, and Adam for 6 epochs in place of SGD for hundreds. The second pool
has stride 1, because 4x4 is small already, and no ReLU follows the last convolution: in a run this short, class maps
that are 0 everywhere would stay so. About 0.92 of the test digits are right after 264 steps.
Run: `rapydli train examples/papers/network_in_network.py --workers 0`, or `python` and this file, which looks inside.
"""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import rapydli_flow as rf
from rapydli_flow import nn, optim

BATCH, EPOCHS, WIDTH = 32, 6, 32


@nn.block
def mlpconv(x, window, filters):
    """A convolution, and two of window 1: the perceptron that sees each place of what the first gives."""
    x = nn.relu(nn.conv(x, WIDTH, window, padding=window // 2))
    x = nn.relu(nn.conv(x, WIDTH, 1, init=nn.orthogonal(2**0.5)))
    return nn.conv(x, filters, 1, init=nn.orthogonal())


def network(x):
    """Three mlpconv blocks, pooling and dropout between them, and the mean of each feature map at the end."""
    x = nn.max_pool(nn.relu(mlpconv(x, 3, WIDTH)), 3, stride=2, padding=1)  # 8x8 to 4x4
    x = nn.relu(mlpconv(nn.dropout(x, 0.25), 3, WIDTH))
    x = nn.avg_pool(x, 3, stride=1, padding=1)
    return nn.global_avg_pool(mlpconv(nn.dropout(x, 0.25), 3, 10))


def data(url):
    """The scans at ``url``, written there the first time: 80 % to train, 20 % to test, stratified."""
    try:
        return rf.load(url)
    except rf.errors.DatasetNotFound:
        scans = load_digits()
        x = (scans.images[..., None] / 8.0 - 1.0).astype(np.float32)
        train, test = train_test_split(np.arange(len(x)), test_size=0.2, random_state=0, stratify=scans.target)
        return rf.ingest(
            {name: {"x": x[i], "label": scans.target[i]} for name, i in (("train", train), ("test", test))}, url
        )


def step():
    """Cross entropy, Adam under a cosine that rises for 20 steps first."""
    graph = rf.trace(network, rf.Spec((BATCH, 8, 8, 1)))
    rate = optim.cosine(5e-3, steps=EPOCHS * (1437 // BATCH), warmup=20)
    return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.adam(rate), metrics={"accuracy": nn.accuracy})


def main():
    """Train in this process, and look at what the class maps (before their mean is taken) say of one digit."""
    digits = data("runs/digits.zarr")
    run = rf.fit(step(), digits["train"], validation=digits["test"], epochs=EPOCHS)
    print(run.metrics)
    batch = digits["test"].read(np.arange(BATCH))
    maps = rf.probe(run.graph, "mlpconv_3", {"x": batch["x"]}, state=run.state)["mlpconv_3"]
    print("digit", batch["label"][0], "- mean of each class map:", maps[0].mean((0, 1)).round(1))


if __name__ == "__main__":
    main()
