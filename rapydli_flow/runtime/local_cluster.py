"""A cluster of convenience: workers on this machine, set up as training needs them. Nothing else makes a cluster."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import psutil
from distributed import Nanny, Scheduler, SpecCluster

from ..config import checked_device, settings
from ..errors import SettingError

MEMORY = {  # parameters and arenas stay in a worker, and are no task results that it could write to disk
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.95,
}


class LocalCluster(SpecCluster):
    """Worker processes on this machine, each with its share of cores, memory and GPUs; a context manager.

    ``workers``: one unless given. ``threads`` of each: the cores that there are (RAPYDLI_THREADS), divided among them.
    ``memory_bytes`` of each: the machine's memory divided among them; a worker is stopped when it takes 95 % of it, and
    never pauses before, as Dask's own would. Kernels have threads of their own, so NumPy's are turned off. Where there
    are GPUs, each worker sees one, in turn. ``device``: what workers run kernels on, 'cpu', 'cuda' or 'emulated' (by
    default what RAPYDLI_DEVICE says). ``dashboard``: its port, 0 for any that is free.

    Raises SettingError for more workers than cores, or numbers below one.
    """

    def __init__(
        self,
        workers: int = 1,
        *,
        threads: int | None = None,
        memory_bytes: int | None = None,
        dashboard: int = 0,
        device: str | None = None,
        **options: Any,
    ) -> None:
        cores = settings().threads
        if workers < 1 or (threads is not None and threads < 1):
            raise SettingError(f"LocalCluster: workers={workers}, threads={threads} are not 1 or more.")
        if threads is None and workers > cores:
            raise SettingError(
                f"LocalCluster: {workers} workers on {cores} cores. Use fewer, or say threads=1 if they may share."
            )
        threads = threads or cores // workers
        if device is not None:
            checked_device(device, "LocalCluster: device=")
        memory = memory_bytes or int(psutil.virtual_memory().total // workers)
        gpus = sorted(path.name[len("nvidia") :] for path in Path("/dev").glob("nvidia[0-9]*"))
        super().__init__(  # type: ignore[no-untyped-call]
            workers={
                i: {
                    "cls": Nanny,
                    "options": {
                        "nthreads": threads,
                        "memory_limit": memory,
                        "dashboard_address": None,
                        "silence_logs": logging.WARNING,
                        "config": MEMORY,
                        "env": _environment(threads, gpus[i % len(gpus)] if gpus else None, device),
                    },
                }
                for i in range(workers)
            },
            scheduler={
                "cls": Scheduler,
                "options": {"host": "127.0.0.1", "port": 0, "dashboard_address": f"127.0.0.1:{dashboard}"},
            },
            **{"silence_logs": logging.WARNING, **options},
        )


def _environment(threads: int, gpu: str | None, device: str | None) -> dict[str, str]:
    """What a worker's process is started with."""
    env = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    env["RAPYDLI_THREADS"] = str(threads)
    if device is not None:
        env["RAPYDLI_DEVICE"] = device
    if gpu is not None and "CUDA_VISIBLE_DEVICES" not in os.environ:
        env["CUDA_VISIBLE_DEVICES"] = gpu
    return env
