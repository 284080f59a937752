"""Spans of a step: merged, few, and side by side."""

from itertools import pairwise

from rapydli_flow.runtime.timeline import (
    COMMUNICATION,
    COMPUTE,
    LOADING,
    MOST,
    WAITING,
    Span,
    Took,
    aligned,
    few,
    spans,
)


def test_spans_are_of_one_kind_and_meet():
    took = [
        Took("conv_1", "conv", 11.0, 1.0),
        Took("relu_1", "relu", 12.0, 1.0),
        Took("g/sum", "all_reduce", 13.0, 1.0, 0.75),
        Took("w", "momentum", 14.0, 0.5),
    ]
    found = spans((10.0, 11.0), took)
    assert [span.kind for span in found] == [LOADING, COMPUTE, WAITING, COMMUNICATION, COMPUTE]
    assert [round(span.end_s - span.begin_s, 6) for span in found] == [1.0, 2.0, 0.75, 0.25, 0.5]
    assert all(abs(a.end_s - b.begin_s) < 1e-6 for a, b in pairwise(found))


def test_there_are_never_too_many():
    many = [Span((COMPUTE, WAITING)[i % 2], i * 1e-3, (i + 1) * 1e-3) for i in range(1000)]
    many[500] = Span(WAITING, 0.5, 0.9)
    found = few(many[:501])
    assert len(found) <= MOST
    assert (found[-1].kind, found[-1].end_s) == (WAITING, 0.9)


def test_ranks_are_told_from_the_first_beginning():
    ranks = [[Span(COMPUTE, 5.0, 6.0)], [Span(LOADING, 4.5, 5.0), Span(COMPUTE, 5.0, 6.5)]]
    assert aligned(ranks) == (
        (Span(COMPUTE, 0.5, 1.5),),
        (Span(LOADING, 0.0, 0.5), Span(COMPUTE, 0.5, 2.0)),
    )
    assert aligned([ranks[0], []]) == ()
