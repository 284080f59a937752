"""Many pointwise ops of a step as one kernel: the same bits, fewer launches, and nothing that must not wait does."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import rapydli_flow as rf
from gpu_kernels.emulated import Emulated
from rapydli_flow import nn, optim
from rapydli_flow.graph import Graph
from rapydli_flow.ops import Relu, Scale
from rapydli_flow.runtime import building, card_rank
from rapydli_flow.runtime.building import MANY, card_request
from rapydli_flow.runtime.card_rank import CardRank
from rapydli_flow.runtime.devices import device_of
from rapydli_flow.runtime.grouped import in_groups, kernels_of, on_host
from rapydli_flow.runtime.warm import warm
from rapydli_flow.scheduler import Buffer, Call, make_plan
from rapydli_flow.scheduler import program as planning
from rapydli_flow.scheduler.collective import Wait
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device
from rapydli_flow.tuner import REFERENCE, Choice, Tuning

pytestmark = pytest.mark.filterwarnings("ignore:no GPU kernel serves")
CARD = device_of("emulated")
HERE = Device("cuda", "A card", target="sm_90a", cores=132, vector_bytes=16, memory_bytes=1 << 30)
BATCH, CLASSES = 4, 3


def network(x):
    """Parameters of odd sizes: 3 x 3 x 2 x 5, 5, 5 of the norm, 45 x 7, 7, 7 x 3, 3."""
    x = nn.relu(nn.batch_norm(nn.conv(x, 5, 3, bias=False)))
    return nn.dense(nn.relu(nn.dense(x, 7)), CLASSES)


def make_step(optimizer=None, dtype="float32", **how):
    graph = rf.trace(network, rf.Spec((BATCH, 5, 5, 2), dtype))
    optimizer = optimizer or optim.sgd(0.1, momentum=0.9)
    return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optimizer, label="label", **how)


def program_of(step, device=CARD):
    (program,) = make_plan(step, 1).programs(step, Tuning(device))
    return program


def batch(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(BATCH, 5, 5, 2)).astype("float32")
    return {"x": x, "label": rng.integers(0, CLASSES, BATCH)}


def alone(program):
    """Each step by itself."""
    return [(i,) for i in range(len(program.steps))]


def trained(step, card=None):
    """Losses and state after three steps; the first kernel by kernel, then graphs of them."""
    rank = CardRank(program_of(step), CARD, poison=True, card=card)
    rank.start(0)
    for i in range(3):
        rank.feed(batch(i))
        rank.advance(0, i)
    found = [values["loss"] for values in rank.taken()], rank.state()
    rank.close()
    return found


def assert_same(found, wanted):
    assert found[0] == wanted[0]
    assert list(found[1]) == list(wanted[1])
    for name, value in wanted[1].items():
        assert found[1][name].dtype == value.dtype
        np.testing.assert_array_equal(found[1][name], value)


@pytest.mark.parametrize(
    ("optimizer", "how", "sizes"),
    [
        (optim.sgd(0.1, momentum=0.9), {}, {"momentum": [7]}),
        (optim.clip_norm(optim.adam(0.01), 0.5), {}, {"adam": [7]}),
        (optim.sgd(0.1, momentum=0.9), {"dtype": "float64"}, {"momentum": [7]}),
        (optim.sgd(0.1, momentum=0.9), {"precision": "bfloat16"}, {"momentum": [7], "cast": [4]}),  # x too
    ],
    ids=["momentum", "adam and clipping", "float64", "bfloat16"],
)
def test_the_bits_are_those_of_separate_kernels(optimizer, how, sizes, monkeypatch):
    step = make_step(optimizer, **how)
    program = program_of(step)
    titles = [[program.steps[i].title for i in numbers] for numbers in in_groups(program)]
    for title, expected in sizes.items():
        assert [len(group) for group in titles if group[0].startswith(title) and len(group) > 1] == expected
    together = trained(step)
    monkeypatch.setattr(card_rank, "in_groups", alone)
    assert_same(trained(step), together)
    monkeypatch.setattr(planning, "side_by_side", lambda graph: graph)  # as they come
    assert_same(trained(step), together)


class Counting(Emulated):
    """A card that counts launches."""

    launches = 0

    def prepare(self, request):
        return self._counted(super().prepare(request))

    def prepare_many(self, many, target):
        return self._counted(super().prepare_many(many, target))

    def _counted(self, kernel):
        bind = kernel.bind

        def counted(*args, **how):
            launch = bind(*args, **how)

            def counting():
                self.launches += 1
                launch()

            return counting

        kernel.bind = counted
        return kernel


def test_launches_are_as_few_as_there_are_groups(monkeypatch):
    """7 updates are one, and two scales of single numbers; with halves so are the casts of 3 weights and of x."""
    for how, fewer in (({}, 6 + 1), ({"precision": "bfloat16"}, 6 + 1 + 3)):
        step, counts = make_step(**how), []
        program = program_of(step)
        with monkeypatch.context() as patch:
            for change in (in_groups, alone):
                patch.setattr(card_rank, "in_groups", change)
                card = Counting()
                trained(step, card)
                counts.append(card.launches)
        assert counts[1] == 3 * sum(not on_host(call) for call in program.steps)
        assert counts[0] == counts[1] - 3 * fewer


def two_relus(apart):
    """x1 -> y1, x2 -> t, t -> y2; without ``apart`` t lies on the second half of x1, which nobody reads any more."""
    graph, shape = Graph(), Spec((40,))
    x1, x2 = (graph.leaf("batch", name, shape) for name in ("x1", "x2"))
    graph.outputs = {"y1": Relu()(x1).id, "y2": Relu()(Scale(by=-2.0)(x2)).id}
    program = planning.compile_program(graph, Tuning(CARD))
    end, middle = program.arena_bytes, program.steps[1].outs[0]
    first = program.leaves["x1"]
    to = {middle: Buffer(end + (512 if apart else 80), shape), first: Buffer(end, shape)}

    def moved(buffers):
        return tuple(to.get(buffer, buffer) for buffer in buffers)

    steps = tuple(replace(step, ins=moved(step.ins), outs=moved(step.outs)) for step in program.steps)
    leaves, outputs = {**program.leaves, "x1": to[first]}, {name: moved([y])[0] for name, y in program.outputs.items()}
    return replace(program, steps=steps, leaves=leaves, outputs=outputs, arena_bytes=end + 1024)


@pytest.mark.parametrize("apart", [True, False])
def test_what_lies_over_each_other_at_different_times_does_not_wait(apart, monkeypatch):
    program = two_relus(apart)
    assert in_groups(program) == ([(1,), (0, 2)] if apart else [(0,), (1,), (2,)])
    x = np.random.default_rng(3).normal(size=(2, 40)).astype("float32")

    def right():
        rank = CardRank(program, CARD, poison=True)
        rank.feed({"x1": x[0], "x2": x[1]})
        rank.advance(0, 0)
        found = [rank.output(name) for name in ("y1", "y2")]
        rank.close()
        return np.array_equal(found, [np.maximum(x[0], 0), np.maximum(-2 * x[1], 0)])

    assert right()
    monkeypatch.setattr(card_rank, "in_groups", lambda program: [(1,), (0, 2)])  # whatever the arena says
    assert right() == apart


def test_weights_that_are_lent_are_cast_together(monkeypatch):
    """They lie behind the arena; nobody writes them."""
    step = make_step()
    network = rf.precision(step.network, "bfloat16")
    (part,) = make_plan(network, 1).rank_graphs(network)
    lent = [leaf.name for leaf in part.leaves("param", "state")]
    program = planning.compile_program(part, Tuning(CARD), lent=lent)
    casts = [numbers for numbers in in_groups(program) if program.steps[numbers[0]].title == "cast"]
    read = [program.steps[i].ins[0].offset for i in casts[0]]
    assert len(casts) == 1
    assert sum(offset < 0 for offset in read) == 3
    found = []
    for change in (in_groups, alone):
        monkeypatch.setattr(card_rank, "in_groups", change)
        rank = CardRank(program, CARD, poison=True)
        rank.load(rf.init(step))
        rank.feed(batch(0))
        rank.advance(0, 0)
        found.append({name: rank.output(name) for name in program.outputs})
        rank.close()
    assert found[0]
    for name, value in found[0].items():
        assert np.isfinite(value.astype("float32")).all()
        np.testing.assert_array_equal(found[1][name], value)


def test_what_the_host_does_is_in_no_group():
    step = make_step()
    program = program_of(step)
    reference = {request.key(CARD): REFERENCE for request, _ in program.requests if request.title == "momentum"}
    (program,) = make_plan(step, 1).programs(step, Tuning(CARD, reference))
    assert all(len(n) == 1 for n in in_groups(program) if program.steps[n[0]].title == "momentum")


def test_what_another_template_does_is_in_no_group():
    """Such as one of a user's own: its bits may be others."""
    program = two_relus(True)
    own = replace(program.steps[2], choice=Choice("own"))
    assert in_groups(replace(program, steps=(*program.steps[:2], own))) == [(0,), (1,), (2,)]


def meet(some, others):
    return any(a < d and c < b for a, b in some for c, d in others)


def touched(program):
    """Of each step, the bytes that it reads, and those that it writes; of what runs behind others all, at both ends."""
    found, begun = [], {}
    for step in program.steps:
        kinds = [step.ins, step.outs]
        if isinstance(step, Call):
            kinds = [(*step.ins, *step.extras, *step.work), (*step.outs, *step.work)]
        elif step.op.behind:
            begun[step.name] = kinds
        elif isinstance(step.op, Wait):
            kinds = begun[step.name]
        found.append([[(b.offset, b.offset + b.spec.size_bytes) for b in buffers] for buffers in kinds])
    return found


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"overlap": True},
        {"shard": "state"},
        {"shard": "parameters"},
        {"strategy": "spatial"},
        {"strategy": "pipeline", "micro_batches": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_two_steps_that_share_a_byte_change_their_order(plan, precision):
    """Unless both read it: looked at pair by pair, in programs of all kinds."""
    step = make_step(optim.clip_norm(optim.adam(0.01), 1.0) if plan else None, precision=precision)
    for program in rf.plan(step, ranks=2, threads=1, **plan).programs(step, Tuning(HERE)):
        groups, bytes_of = in_groups(program), touched(program)
        at = {i: place for place, numbers in enumerate(groups) for i in numbers}
        assert sorted(at) == list(range(len(program.steps)))
        assert any(len(numbers) > 2 for numbers in groups)
        for j, (reads, writes) in enumerate(bytes_of):
            for i in range(j):
                if at[i] >= at[j]:
                    before_reads, before_writes = bytes_of[i]
                    assert not meet(before_writes, [*reads, *writes])
                    assert not meet(before_reads, writes)
        in_order = [i for i, call in enumerate(program.steps) if not isinstance(call, Call) or on_host(call)]
        assert sorted(in_order, key=at.__getitem__) == in_order


def test_arrays_that_are_not_aligned_are_in_no_group():
    program = two_relus(True)
    (first, *_), (*_, last) = program.steps, program.steps
    for moved in (first, last):
        buffers = tuple(Buffer(b.offset + 8, b.spec) for b in moved.outs)
        steps = tuple(replace(step, outs=buffers) if step is moved else step for step in program.steps)
        assert in_groups(replace(program, steps=steps)) == [(0,), (1,), (2,)]


def test_an_operand_that_is_partly_overwritten_is_in_no_group():
    program = two_relus(True)
    first = program.steps[0]
    over = replace(first, outs=(Buffer(first.ins[0].offset + 64, first.outs[0].spec),))
    assert in_groups(replace(program, steps=(over, *program.steps[1:]))) == [(0,), (1,), (2,)]


def test_clocks_tell_of_each_call_of_a_group():
    step = make_step()
    rank = CardRank(program_of(step), CARD)
    rank.start(0)
    rank.feed(batch(0))
    times = rank.advance_timed(0, 0)
    rank.close()
    assert sorted(took.name for took in times) == sorted(call.name for call in rank.program.steps)
    group = [took for took in times if took.title == "momentum"]
    assert all(b.begin_s == pytest.approx(a.begin_s + a.time_s, abs=1e-9) for a, b in pairwise(group))
    updates = {took.name: took.time_s for took in group}
    moved = {call.name: 5 * call.outs[0].spec.size_bytes + 4 for call in rank.program.steps if call.name in updates}
    total = sum(updates.values())
    assert len(updates) == 7
    for name, time_s in updates.items():
        assert time_s == pytest.approx(total * moved[name] / sum(moved.values()))


def test_a_timing_says_what_did_each_call():
    timing = rf.time(make_step(), iterations=1, device="emulated")
    updates = [kernel for kernel in timing.kernels if kernel.title == "momentum"]
    assert len(updates) == 7
    assert {(kernel.choice, kernel.state) for kernel in updates} == {("many", "default")}
    assert any(kernel.choice.startswith("elementwise") for kernel in timing.kernels)
    assert [kernel.name for kernel in timing.kernels] == [call.name for call in program_of(make_step()).steps]


def test_the_first_number_that_is_not_finite_is_found_call_by_call():
    """In the order of the program, of which a step in groups has another one; what it computes is the same."""
    step, found = make_step(), []
    for poisoned in ("dense_1/w", "dense_2/b/momentum"):
        rank = CardRank(program_of(step), CARD)
        rank.start(0)
        names = {name: rank.get([name])[name] for name in rank.program.kind("param", "state")}
        name = next(known for known in names if known.startswith(poisoned))
        names[name].ravel()[-1] = np.inf
        rank.put({name: names[name]})
        rank.feed(batch(0))
        found.append(rank.program.steps[rank.first_nonfinite(0, 0)])
        rank.close()
    assert found[0].title.startswith("matmul")
    assert (found[1].title, found[1].outs[0].spec.shape) == ("momentum", (CLASSES,))
    ranks = [CardRank(program_of(step), CARD) for _ in range(2)]
    for rank in ranks:
        rank.start(0)
        rank.feed(batch(0))
    ranks[0].advance(0, 0)
    assert ranks[1].first_nonfinite(0, 0) is None
    assert_same(([], ranks[1].state()), ([], ranks[0].state()))
    for rank in ranks:
        rank.close()


def test_one_kernel_is_compiled_for_all_groups_of_a_kind(monkeypatch):
    program = program_of(make_step(), HERE)
    needed = kernels_of(program)
    single = [(s.request, s.choice) for n in in_groups(program) if len(n) == 1 for s in [program.steps[n[0]]]]
    assert [pair for pair in needed if pair[1] != MANY] == list(dict.fromkeys(single))
    assert [r.title for r, choice in needed if choice == MANY].count("momentum") == 1
    here = program_of(make_step(), device_of("cpu"))
    assert kernels_of(here) == here.requests
    other = program_of(make_step(optim.sgd(0.3, momentum=0.9)), HERE)  # the rate is an operand
    keys = [
        {card_request(*pair, HERE).key for pair in kernels_of(each) if pair[1] == MANY} for each in (program, other)
    ]
    assert keys[0] == keys[1]
    compiled = []
    monkeypatch.setattr(building, "kept_cubins", lambda request: False)
    monkeypatch.setattr(building, "cubins", lambda request: compiled.append(request.key))
    pairs = [pair for pair in needed if pair[1] == MANY]
    assert not warm(pairs, HERE, compilers=1).failed
    assert sorted(compiled) == sorted(keys[0])
