"""A residual network for time series (Wang, Yan, Oates 2016).

Three residual blocks, each of three convolutions along time with windows 8, 5 and 3 and batch norm, go round a
shortcut; the mean over time and one dense layer give the scores. Nothing is pooled before.

Paper: "Time series classification from scratch with deep neural networks: a strong baseline", arXiv:1611.06455.
Scaled down: 16 filters in place of 64, 128 and 128; made-up series in place of the UCR archive: sines, squares,
sawtooths and triangles with random period, phase and noise. About 0.98 of the test series are right after 200 steps.
Run: `rapydli train examples/papers/resnet_1d.py --workers 0`, or `python` and this file, which stops early.
"""

from functools import partial

import numpy as np

import rapydli_flow as rf
from rapydli_flow import nn, optim

BATCH, EPOCHS, LENGTH, WIDTHS = 32, 4, 64, (16, 16, 16)


def unit(x, filters, window):
    """Convolution and batch norm; padding keeps the length, also for an even window."""
    same = [((window - 1) // 2, window // 2)]
    return nn.batch_norm(nn.conv(x, filters, window, padding=same, bias=False, init=nn.xavier()))


@nn.block
def residual(x, filters):
    """relu(f(x) + x), where x goes through a unit of window 1 if it has another number of channels."""
    y = unit(nn.relu(unit(nn.relu(unit(x, filters, 8)), filters, 5)), filters, 3)
    shortcut = nn.batch_norm(x) if x.shape[-1] == filters else unit(x, filters, 1)
    return nn.relu(y + shortcut)


def network(x):
    """Three residual blocks, the mean over time, and a dense layer."""
    for filters in WIDTHS:
        x = residual(x, filters)
    return nn.dense(nn.global_avg_pool(x), 4)


def series(count, seed):
    rng = np.random.default_rng(seed)
    label, period = rng.integers(0, 4, count), rng.uniform(12, 32, (count, 1))
    t = (np.arange(LENGTH) / period + rng.uniform(size=(count, 1))) % 1.0
    shapes = np.stack([np.sin(2 * np.pi * t), np.sign(t - 0.5), 2 * t - 1, 4 * abs(t - 0.5) - 1])
    x = shapes[label, np.arange(count)] + rng.normal(0.0, 0.3, t.shape)
    return {"x": x[..., None].astype(np.float32), "label": label}


def data(url):
    """The series at ``url``, written there the first time."""
    try:
        return rf.load(url)
    except rf.errors.DatasetNotFound:
        return rf.ingest({"train": series(1600, seed=0), "test": series(400, seed=1)}, url)


def step():
    """Cross entropy with smoothed labels, AdamW under a rate that rises and is then halved every 80 steps."""
    graph = rf.trace(network, rf.Spec((BATCH, LENGTH, 1)))
    rate = optim.warmup(optim.step_decay(4e-3, factor=0.5, every=80), 20)
    loss = partial(nn.cross_entropy, smoothing=0.1)
    return rf.train_step(graph, loss=loss, optimizer=optim.adamw(rate), metrics={"accuracy": nn.accuracy})


def main():
    """Train until accuracy gets no better, and open the best state that there was."""
    waves, folder = data("runs/waves.zarr"), "runs/resnet_1d_best"
    callbacks = [rf.EarlyStopping("accuracy", patience=2), rf.BestSnapshot("accuracy")]
    options = {"run_dir": folder, "overwrite": True, "callbacks": callbacks}
    run = rf.fit(step(), waves["train"], validation=waves["test"], epochs=12, **options)
    print(f"{run.outcome}; best: {callbacks[0].best:.3f} at step {callbacks[0].best_step}")
    print(rf.load_model(f"{folder}/best"))


if __name__ == "__main__":
    main()
