"""A rank that does not fit: which, by how much, what takes the memory, and what would help."""

import re
from typing import Any

import pytest
from networks import small, step_of, traced

from cpu_kernels.compile import host
from rapydli_flow import nn, optim
from rapydli_flow.errors import TooLittleMemory
from rapydli_flow.graph import trace
from rapydli_flow.scheduler import Plan, compile_program, make_plan
from rapydli_flow.spec import Spec
from rapydli_flow.testing.plans import programs
from rapydli_flow.tuner import Tuning

TUNING = Tuning(host())
X = Spec((5, 8, 6, 4), "float64")


def test_too_little_memory() -> None:
    graph = step_of(traced(small, X), optim.sgd(0.1, momentum=0.9))
    program = compile_program(Plan().rank_graphs(graph)[0], TUNING)
    program.check_memory(program.arena_bytes)
    name, size = program.largest[0]
    first = re.escape(f"  {name:<48} {size:>16,}")
    message = (
        rf"rank 3 needs {program.arena_bytes:,} bytes for its arena but 4,096 are free on worker a: "
        rf"{program.arena_bytes - 4096:,} are missing\. .*; or give it more memory\. The largest buffers, in bytes:"
        rf"\n{first}\n"
    )
    with pytest.raises(TooLittleMemory, match=message) as error:
        program.check_memory(4096, rank=3, where="on worker a")
    assert len(str(error.value).splitlines()) == 13
    sizes = [size for _, size in program.largest]
    assert sizes == sorted(sizes, reverse=True)
    assert isinstance(error.value, MemoryError)


def test_what_helps_where_activations_take_the_memory() -> None:
    def network(x: Any) -> Any:
        return nn.dense(nn.mean(nn.relu(nn.conv(x, 8, 3, padding=1)), (1, 2)), 3)

    graph, half = (step_of(trace(network, Spec((records, 16, 16, 2)))) for records in (32, 16))
    limit = compile_program(graph, TUNING).arena_bytes * 4 // 5
    with pytest.raises(TooLittleMemory, match=r"Use a smaller batch, or more workers: .* strategy='spatial' for"):
        compile_program(graph, TUNING).check_memory(limit)
    two = [program for s in ("data", "spatial") for program in programs(graph, make_plan(graph, 2, strategy=s))]
    for program in (*programs(half, Plan()), *two):
        program.check_memory(limit)


def test_what_helps_where_parameters_take_the_memory() -> None:
    def deep(x: Any) -> Any:
        for _ in range(4):
            x = nn.relu(nn.dense(x, 512))
        return x

    graph = step_of(trace(deep, Spec((4, 512))), optim.adam(0.1))
    limit = sum(leaf.spec.size_bytes for leaf in graph.leaves("param", "state")) - 1
    with pytest.raises(TooLittleMemory, match=r"Parameters and optimizer state alone take .* or 'pipeline', or shard="):
        compile_program(graph, TUNING).check_memory(limit)
    for how in ({"strategy": "filters"}, {"strategy": "pipeline"}, {"shard": "parameters"}):
        for program in programs(graph, make_plan(graph, 2, **how)):
            program.check_memory(limit)
