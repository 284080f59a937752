"""Handwritten digits: 1,797 real scans of 8x8 pixels, and a small convolutional network.

`rapydli train examples/digits.py` trains it on a Dask cluster and writes `runs/digits/`; so does
`make demo`. The scans ship with scikit-learn (E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten
Digits, UCI Machine Learning Repository, 1998).
"""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import rapydli_flow as rf
from rapydli_flow import nn, optim

BATCH = 64
EPOCHS = 30


def network(x):
    """Two convolutions with batch norm, pooling, dropout, and two dense layers."""
    x = nn.relu(nn.batch_norm(nn.conv(x, 32, 3, padding=1, bias=False)))
    x = nn.relu(nn.batch_norm(nn.conv(x, 64, 3, padding=1, bias=False)))
    x = nn.dropout(nn.max_pool(x, 2), 0.25)
    x = nn.relu(nn.dense(x, 128))
    return nn.dense(nn.dropout(x, 0.5), 10)


def data(url):
    """Write the scans to a Zarr group at ``url``, once: 80 % to train, 20 % to test, stratified."""
    try:
        return rf.load(url)
    except rf.errors.DatasetNotFound:
        scans = load_digits()
        x = (scans.images[..., None] / 16.0).astype(np.float32)
        train, test = train_test_split(np.arange(len(x)), test_size=0.2, random_state=0, stratify=scans.target)
        parts = {"train": train, "test": test}
        return rf.ingest({name: {"x": x[i], "label": scans.target[i]} for name, i in parts.items()}, url)


def step():
    """The training step: cross entropy, SGD with momentum under a cosine."""
    graph = rf.trace(network, rf.Spec((BATCH, 8, 8, 1)))
    rate = optim.cosine(0.05, steps=EPOCHS * (1437 // BATCH), warmup=20)
    optimizer = optim.sgd(rate, momentum=0.9, weight_decay=5e-4)
    return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optimizer, metrics={"accuracy": nn.accuracy})
