"""The matrix of the promise: networks of every kind of layer, and plans of every kind."""

from typing import Any

from rapydli_flow import nn
from rapydli_flow.scheduler import Split

SHAPE = (8, 9, 7, 4)


@nn.block
def inception(x: Any) -> Any:
    narrow = nn.conv(x, 3, 1)
    wide = nn.conv(nn.relu(nn.conv(x, 4, 1)), 5, 3, padding=1)
    pooled = nn.conv(nn.max_pool(x, 3, stride=1, padding=1), 4, 1)
    return nn.relu(nn.concatenate([narrow, wide, pooled]))


def chain(x: Any) -> Any:
    x = nn.relu(nn.conv(x, 5, 3, stride=2, padding=((1, 0), 1)))
    x = nn.relu(nn.conv(x, 6, (2, 3), padding=1, dilation=(2, 1)))
    return nn.dense(nn.max_pool(nn.conv(x, 4, 2), 2, stride=1), 5)


def residual(x: Any) -> Any:
    for _ in range(2):
        x = nn.relu(x + nn.conv(nn.relu(nn.conv(x, 4, 3, padding=1)), 4, 3, padding=1, groups=2))
    return nn.dense(nn.mean(x, (1, 2)), 5)


def branches(x: Any) -> Any:
    return nn.dense(nn.avg_pool(inception(inception(x)), 3, stride=2), 5)


def normal(x: Any, group: int | None = None) -> Any:
    x = nn.relu(nn.batch_norm(nn.conv(x, 4, 3, padding=1), group=group))
    x = nn.relu(x + nn.batch_norm(nn.conv(x, 4, 3, padding=1), group=group))
    return nn.dense(nn.max_pool(x, 2), 5)


def grouped(x: Any) -> Any:
    return normal(x, 2)


def dropped(x: Any) -> Any:
    x = nn.dropout(nn.relu(nn.conv(x, 5, 3, padding=1)), 0.3)
    return nn.dense(nn.dropout(nn.tanh(nn.dense(nn.max_pool(x, 2), 6)), 0.5), 5)


NETWORKS = {f.__name__: f for f in (chain, residual, branches, normal, grouped, dropped)}

PLANS: dict[str, dict[str, Any]] = {
    "data": {},
    "rows": {"strategy": "spatial"},
    "rows and columns": {"strategy": "spatial", "grid": (2, 2)},
    "filters": {"strategy": "filters"},
    "channels": {"strategy": "channels"},
    "hybrid": {"strategy": "hybrid"},
    "pipeline": {"strategy": "pipeline", "micro_batches": 4},
    "data and pipeline": {"strategy": "pipeline", "stages": 2, "micro_batches": 2},
    "sharded state": {"shard": "state"},
    "sharded parameters": {"shard": "parameters"},
    "rows, sharded state": {"strategy": "spatial", "shard": "state"},
    "samples and filters": {"splits": {"*": Split(samples=2), "conv_*": Split(samples=2, filters=2)}},
    "rows and filters of one layer": {"splits": {"conv_1": Split(height=2, filters=2)}},
    "micro-batches": {"splits": {"*": Split()}, "micro_batches": 4},
    "data, sums behind kernels": {"overlap": True},
    "data and pipeline, sums behind": {"strategy": "pipeline", "stages": 2, "micro_batches": 2, "overlap": True},
}
RANKS = {"rows and columns": (4,), "data and pipeline": (4,), "samples and filters": (4,), "micro-batches": (1,)}
RANKS["pipeline"], RANKS["rows and filters of one layer"] = (2, 3), (4,)
RANKS["data and pipeline, sums behind"] = (4,)
STOPS = {  # batch norm needs all micro-batches
    (name, "normal") for name in PLANS if "pipeline" in name or name == "micro-batches"
}
FLAT = {("rows and filters of one layer", network) for network in ("branches", "residual")}  # no conv_1 at the top
