"""Where commands run: a scheduler that is there, a local cluster, or this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click


@contextmanager
def cluster(workers: int, scheduler: str | None, device: str | None = None) -> Iterator[Any]:
    """A Dask client: of a running scheduler, of a local cluster whose workers have a ``device``, or none."""
    from distributed import Client

    from ..runtime.local_cluster import LocalCluster

    if scheduler is not None:
        with Client(scheduler) as client:
            yield client
    elif workers > 0:
        with LocalCluster(workers, threads=_threads(workers), device=device) as local:
            click.echo(f"dashboard: {local.dashboard_link}")
            with Client(local) as client:
                yield client
    else:
        yield None


def _threads(workers: int) -> int:
    """The cores of this machine, divided."""
    from ..config import settings

    return max(1, settings().threads // workers)
