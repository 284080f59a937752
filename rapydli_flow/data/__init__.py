"""Records in and snapshots out: datasets in Zarr v3 groups, the order that training visits them in, the
feed of batches, and snapshots of named arrays. All of it decides and reads in this process: nothing here
knows Dask, a cluster or a graph, and nothing prints. Modules here may import `rapydli_flow`'s floors 0-3
(errors, spec, random, config ...), NumPy, zarr, fsspec and the standard library.
"""

from .check import check_labels
from .dataset import Dataset, load
from .feed import Feed
from .ingest import ingest
from .order import epoch_order
from .snapshot import (
    Snapshot,
    begin,
    commit,
    has_snapshot,
    latest,
    list_snapshots,
    prune,
    read_snapshot,
    write_block,
)
from .snapshot_writer import SnapshotWriter
from .store import EVERYWHERE, open_group

__all__ = [
    "EVERYWHERE",
    "Dataset",
    "Feed",
    "Snapshot",
    "SnapshotWriter",
    "begin",
    "check_labels",
    "commit",
    "epoch_order",
    "has_snapshot",
    "ingest",
    "latest",
    "list_snapshots",
    "load",
    "open_group",
    "prune",
    "read_snapshot",
    "write_block",
]
