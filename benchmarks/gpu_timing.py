"""Times on a card: medians by CUDA events, contenders in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

COLD_BYTES = 300e6  # inputs of a timing together: more than any L2 cache


def medians(torch: Any, contenders: dict[str, Callable[[int], Any]], *, rounds: int = 15) -> dict[str, float]:
    """Seconds a call, contenders in turn, so that clocks and neighbours trouble all alike."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def once(call: Callable[[int], Any], calls: int, first: int) -> float:
        events[0].record()
        for i in range(calls):
            call(first + i)
        events[1].record()
        events[1].synchronize()
        return float(events[0].elapsed_time(events[1])) / 1e3 / calls

    calls = {}
    for name, call in contenders.items():
        once(call, 3, 0)
        calls[name] = max(1, min(50, int(2e-3 / max(once(call, 3, 3), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        for name, call in contenders.items():
            times[name].append(once(call, calls[name], i * calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _copy_rate(torch: Any) -> float:
    big = torch.randn(2**28, device="cuda")
    other = torch.empty_like(big)
    return 2 * big.numel() * 4 / medians(torch, {"copy": lambda i: other.copy_(big)}, rounds=7)["copy"]


def ceilings(torch: Any) -> dict[str, float]:
    """Measured rates of this card: copies, and products of large matrices in each arithmetic."""
    out = {"copy_bytes_s": _copy_rate(torch)}
    a, b = (torch.randn(8192, 8192, device="cuda") for _ in range(2))
    flops = 2 * 8192**3
    for name, (x, y) in {"fp32": (a, b), "tf32": (a, b), "bf16": (a.bfloat16(), b.bfloat16())}.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        out[f"{name}_flops_s"] = flops / medians(torch, {"mm": lambda i, x=x, y=y: torch.mm(x, y)}, rounds=7)["mm"]
    torch.backends.cuda.matmul.allow_tf32 = False
    return out
