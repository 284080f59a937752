"""Ranks on devices of several kinds: who computes what several of them hold.

rank 0 on cuda   w <- its gradient's sum     both have the same sum, but their kernels round in other places, and
rank 1 on cpu    w <- its gradient's sum     the two w would drift apart

rank 0 on cuda   first half of w <- ...      each part is computed on one of them, and sent to the other
rank 1 on cpu    second half of w <- ...
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from ..errors import SettingError
from ..graph import Graph
from ..spec import Block


def kind_of(device: str) -> str:
    """Devices of one kind run the same kernels: 'cuda' of 'cuda:1'."""
    return device.partition(":")[0]


def several(devices: Sequence[str]) -> bool:
    """Are they of several kinds?"""
    return len(set(map(kind_of, devices))) > 1


def check_replicas(graph: Graph, parts: Sequence[Graph], devices: Sequence[str]) -> None:
    """SettingError where ranks on devices of two kinds compute the same elements of a parameter or of state; of single
    numbers, as loss scales, all compute the same."""
    if not several(devices):
        return
    computed = [_computed(part) for part in parts]
    for name in graph.updates:
        if not graph.spec(graph.updates[name]).shape:
            continue
        held = [(kind_of(device), own[name]) for device, own in zip(devices, computed, strict=True) if name in own]
        for (kind, mine), (other, theirs) in combinations(held, 2):
            if kind != other and mine.meet(theirs) is not None:
                raise SettingError(
                    f"plan: {name} would be computed on {kind} and on {other}, which round differently: its copies "
                    "would drift apart. Use shard='parameters', or 'state' if its rule has some; "
                    "strategy='pipeline'; or ranks on devices of one kind."
                )


def _computed(part: Graph) -> dict[str, Block]:
    """The blocks of parameters and state that a rank computes, not those that it gets from others."""
    out = {}
    for leaf in part.leaves("param", "state"):
        if leaf.name in part.updates:
            node = part.nodes[part.updates[leaf.name][0]]
            while node.op.view:
                node = part.nodes[node.inputs[0][0]]
            if not node.op.collective:
                out[leaf.name] = part.nodes[leaf.node].at or Block.all(leaf.shape)
    return out
