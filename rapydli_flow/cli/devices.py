"""`rapydli devices`: what kernels can run on here, and how fast it is."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ..runtime.inventory import Listed, inventory
from .failing import plain_errors


@click.command()
@click.option("--no-measure", is_flag=True, help="Leave out what each was measured to reach.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def devices(no_measure: bool, as_json: bool) -> None:
    """List the devices of this machine: processor and GPUs, their limits, and measured ceilings."""
    with plain_errors():
        found = inventory(measure=not no_measure)
        if as_json:
            click.echo(json.dumps(found.to_json(), indent=1))
            return
        table = Table()
        table.add_column("")
        rows = [_cells(each) for each in found.devices]
        for each in found.devices:
            table.add_column(each.name, justify="right")
        for key in dict.fromkeys(key for row in rows for key in row):
            table.add_row(key, *(row.get(key, "") for row in rows))
        Console().print(table)
        for each in found.devices:
            if each.trouble:
                click.echo(f"{each.name}: {each.trouble}")
        if found.without:
            click.echo(f"no GPU: {found.without}")


def _cells(listed: Listed) -> dict[str, str]:
    """A device in words, by what is said of it."""
    device, facts, peak = listed.device, listed.facts, listed.peak
    cells: dict[str, Any] = {"name": device.name, "architecture": device.target.partition("-")[0]}
    cells["cores" if device.kind == "cpu" else "multiprocessors"] = f"{device.cores}"
    if "clock_khz" in facts:
        cells["clock"] = f"{facts['clock_khz'] / 1e6:.2f} GHz"
    cells["memory"] = f"{device.memory_bytes / 2**30:.1f} GiB"
    cells["memory free"] = f"{facts['free_bytes'] / 2**30:.1f} GiB"
    if device.kind == "cpu":
        cells["vector"] = f"{8 * device.vector_bytes} bits, {device.vector_registers} registers"
        cells["cache"] = f"L1 {device.l1_bytes >> 10} KiB, L2 {device.l2_bytes >> 10} KiB"
    else:
        cells["cache"] = f"L2 {facts['l2_bytes'] >> 20} MiB"
        cells["shared memory"] = f"{facts['shared_bytes_opt_in'] >> 10} KiB of a block"
        cells["registers"] = f"{device.registers:,} of a multiprocessor"
        cells["threads"] = f"{device.threads} of a block, {facts['threads_per_core']} of a multiprocessor"
        cells["driver"] = f"CUDA {facts['driver_cuda']}"
    if peak is not None:
        cells["multiply-adds, float32"] = f"{peak.flops_s / 1e9:,.0f} GFLOP/s"
        cells |= {f"products, {kind}": f"{rate / 1e9:,.0f} GFLOP/s" for kind, rate in listed.tensor_cores.items()}
        cells["memory, read and written"] = f"{peak.bytes_s / 1e9:,.1f} GB/s"
    return cells
