"""Pictures of graphs: what is drawn, where, and that it is XML, the same each time, with no line through a box."""

import random
import re
from itertools import combinations
from typing import Any
from xml.etree import ElementTree

import pytest
from networks import perceptron, small, step_of, traced

from rapydli_flow import nn, optim
from rapydli_flow.graph import Graph, fuse, predicting, trace, training
from rapydli_flow.graph.draw import COMPACT, html, sheet, svg
from rapydli_flow.graph.layout import BOX_H, Box, arrange
from rapydli_flow.ops import Add, Leaf, Relu
from rapydli_flow.scheduler import data_parallel
from rapydli_flow.spec import Spec

NS = "{http://www.w3.org/2000/svg}"
IMAGES = Spec((8, 64, 64, 3))


@nn.block
def residual(x: Any, filters: int, stride: int = 1) -> Any:
    y = nn.relu(nn.batch_norm(nn.conv(x, filters, 3, stride=stride, padding=1)))
    y = nn.batch_norm(nn.conv(y, filters, 3, padding=1))
    if x.shape != y.shape:
        x = nn.batch_norm(nn.conv(x, filters, 1, stride=stride))
    return nn.relu(x + y)


def resnet(x: Any, depth: int = 2) -> Any:
    x = nn.max_pool(nn.relu(nn.batch_norm(nn.conv(x, 8, 7, stride=2, padding=3))), 3, stride=2, padding=1)
    for stage in range(4):
        for i in range(depth):
            x = residual(x, 8 * 2**stage, stride=2 if stage and not i else 1)
    return nn.dense(nn.mean(x, axes=(1, 2)), 10)


def shortcut(x: Any) -> Any:
    """A network whose skips are not in a block of their own."""
    for _ in range(3):
        y = nn.relu(nn.conv(x, 3, 3, padding=1))
        x = x + nn.conv(y, 3, 3, padding=1)
    return x


def step(network: Any, x: Spec, optimizer: Any = None) -> Graph:
    rate = optim.cosine(0.1, steps=100)
    return step_of(traced(network, x), optimizer or optim.sgd(rate, momentum=0.9), metrics={"accuracy": nn.accuracy})


def ranked() -> Graph:
    graph = step(perceptron, Spec((8, 20)))
    return data_parallel(graph, 2).rank_graphs(graph)[0]


GRAPHS = {
    "perceptron": lambda: traced(perceptron, Spec((64, 50))),
    "small": lambda: traced(small),
    "shortcut": lambda: traced(shortcut, IMAGES),
    "resnet": lambda: predicting(traced(resnet, IMAGES)),
    "resnet, compact": lambda: traced(resnet, IMAGES),
    "small step": lambda: step(small, Spec((4, 6, 6, 2))),
    "adam": lambda: step(perceptron, Spec((4, 3)), optim.adam(0.1)),
    "clipped": lambda: step(perceptron, Spec((4, 3)), optim.clip_norm(optim.accumulate(optim.adam(0.1), 2), 1.0)),
    "gradients shown": lambda: step_of(traced(perceptron, Spec((4, 3)))),
    "fused": lambda: fuse(training(step(small, Spec((4, 6, 6, 2))))),
    "rank": ranked,
    "resnet step": lambda: step(resnet, IMAGES),
    "empty": Graph,
}


def texts(picture: str) -> list[str]:
    return [x.text or "" for x in ElementTree.fromstring(picture).iter(f"{NS}text")]


def rectangles(picture: str) -> list[tuple[str, float, float, float, float]]:
    """Title, left, top, right and bottom of every box."""
    out = []
    for box in ElementTree.fromstring(picture).iter(f"{NS}g"):
        rect, text = box.find(f"{NS}rect"), box.find(f"{NS}text")
        if box.find(f"{NS}title") is not None:
            assert rect is not None
            assert text is not None
            x, y, w, h = (float(rect.attrib[k]) for k in ("x", "y", "width", "height"))
            out.append((text.text or "", x, y, x + w, y + h))
    return out


def points(path: str) -> list[tuple[float, float]]:
    """Points along a line of absolute M, V and C commands; curves are sampled."""
    out: list[tuple[float, float]] = []
    for command, numbers in re.findall(r"([MVC])([-\d. ]+)", path):
        n = [float(v) for v in numbers.split()]
        if command == "M":
            out.append((n[0], n[1]))
            continue
        (x, y), steps = out[-1], [k / 24 for k in range(1, 25)]
        if command == "V":
            out += [(x, y + (n[0] - y) * t) for t in steps]
            continue
        xs, ys = (x, *n[::2]), (y, *n[1::2])
        weights = [((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3) for t in steps]
        out += [
            (sum(a * b for a, b in zip(w, xs, strict=True)), sum(a * b for a, b in zip(w, ys, strict=True)))
            for w in weights
        ]
    return out


@pytest.mark.parametrize("name", GRAPHS)
def test_pictures_are_xml_and_the_same_each_time(name: str) -> None:
    graph = GRAPHS[name]()
    picture = svg(graph)
    root = ElementTree.fromstring(picture)
    assert root.tag == f"{NS}svg"
    assert picture == svg(GRAPHS[name]())
    w, h = float(root.attrib["width"]), float(root.attrib["height"])
    for _, x0, y0, x1, y1 in rectangles(picture):
        assert x0 > -1
        assert x1 < w
        assert -30 < y0 < y1 < h


@pytest.mark.parametrize("name", GRAPHS)
def test_boxes_do_not_overlap(name: str) -> None:
    for a, b in combinations(rectangles(svg(GRAPHS[name]())), 2):
        assert a[3] <= b[1] or b[3] <= a[1] or a[4] <= b[2] or b[4] <= a[2], (a, b)


@pytest.mark.parametrize("name", GRAPHS)
def test_no_line_of_a_column_crosses_a_box(name: str) -> None:
    picture = svg(GRAPHS[name]())
    boxes = rectangles(picture)
    for path in ElementTree.fromstring(picture).iter(f"{NS}path"):
        if path.attrib["class"] != "e" or re.search("[Hq]", path.attrib["d"]):
            continue
        for x, y in points(path.attrib["d"]):
            inside = [b for b in boxes if b[1] + 1 < x < b[3] - 1 and b[2] + 1 < y < b[4] - 1]
            assert not inside, (path.attrib["d"], inside)


def test_every_op_is_a_box_with_title_spec_and_parameters() -> None:
    graph = traced(small)
    picture = svg(graph)
    drawn = [
        node for node in graph if not (isinstance(node.op, Leaf) and node.op.kind != "batch") and node.op.name != "fill"
    ]
    assert len(rectangles(picture)) == len(drawn) + len(graph.outputs)
    written = texts(picture)
    for word in ("conv", "moments", "f64[4,3,3,4]", "conv_1", "residual_2", "batch_norm_1", "144", "288", "y"):
        assert word in written
    assert "f64[4] \u00d74" in written  # statistics
    assert "seed" not in written  # clocks are no boxes
    assert {"convolution, dense", "pooling", "normalisation", "pointwise"} <= set(written)
    assert "update" not in written  # the legend has only what is there


def test_large_graphs_have_a_box_for_each_layer() -> None:
    graph = traced(resnet, IMAGES)
    assert len(graph) - len(graph.leaves()) > COMPACT
    written = texts(svg(graph))
    assert "batch_norm_1" in written
    assert "moments" not in written
    assert f"{graph['residual_1/conv_1/w'].specs[0].size + 8:,}" in written  # w and b of the layer


def test_tall_networks_are_set_in_columns() -> None:
    graph = predicting(traced(resnet, IMAGES))
    root = ElementTree.fromstring(svg(graph))
    assert float(root.attrib["width"]) > float(root.attrib["height"])
    assert len({round(b[1]) for b in rectangles(svg(graph)) if b[0] == "conv"}) >= 3


def test_a_network_without_a_place_to_cut_stays_in_one_column() -> None:
    def ladder(x: Any) -> Any:
        ends = [x]
        for _ in range(40):
            ends.append(nn.relu(ends[-1]))
        return sum(ends[1:], ends[0])

    root = ElementTree.fromstring(svg(traced(ladder, Spec((2, 3)))))
    assert float(root.attrib["height"]) > 2500


def test_training_steps_have_three_columns_with_shared_rows() -> None:
    picture = svg(step(perceptron, Spec((8, 20))))
    assert {"network", "gradients", "updates", "dense_1", "dense_2"} <= set(texts(picture))
    at: dict[str, list[tuple[float, float]]] = {}
    for title, x0, y0, _, y1 in rectangles(picture):
        at.setdefault(title, []).append((x0, (y0 + y1) / 2))
    (relu,), (grad,) = at["relu"], at["relu_grad"]
    assert relu[1] == grad[1]
    assert relu[0] < grad[0] < at["momentum"][0][0]
    assert at["cross_entropy"][0][1] == at["cross_entropy_grad"][0][1]
    assert 'class="k"' in picture  # values kept from the way down


def test_collectives_are_drawn_beside_what_they_sum() -> None:
    picture = svg(ranked())
    assert "collective" in texts(picture)
    assert "all_reduce" in texts(picture)


def test_names_are_escaped() -> None:
    graph = Graph()
    x = graph.leaf("batch", "a<b>&\x00\"'", Spec((2, 3)))
    graph.scope = ["<script>"]
    y = Relu()(Add()(x, x))
    graph.outputs["&y"] = y.id
    assert "a<b>&\ufffd\"'" in texts(svg(graph))
    assert "<script>" in texts(svg(graph))
    assert "<script>" not in html(graph)


def test_html_is_the_table_and_the_picture_under_a_fold() -> None:
    graph = traced(perceptron, Spec((64, 50)))
    page = html(graph)
    assert page == graph._repr_html_()
    root = ElementTree.fromstring(page)
    cells = [[x.text for x in row] for row in root.iter("tr")]
    assert cells[0] == ["node", "op", "output", "parameters", "GFLOP", "bytes"]
    assert cells[-1][:4] == ["total", "12 nodes", None, "381"]
    assert root.find(f"details/{NS}svg") is not None
    assert "<details>" not in sheet(graph)


def test_a_gradient_that_goes_down_is_drawn_at_the_side() -> None:
    """An accumulation in the scope of a node below what it reads."""

    def network(x: Any) -> Any:
        return nn.relu(x) + nn.dense(nn.dense(x, 3), 3)

    graph = step(network, Spec((4, 3)))
    assert "q0" in svg(graph)


def test_lines_that_would_go_up_are_left_out() -> None:
    a, b = Box((0,), "a", w=80.0), Box((1,), "b", w=80.0)
    frame = arrange("", [a, b], {1: [0]}, layers=[1, 0])
    assert frame.routes == []
    assert frame.h == 2 * BOX_H + 24.0


def test_the_line_that_goes_on_is_straight() -> None:
    """0 enters; 1 -> 2 ends in the frame, 3 is read outside."""
    boxes = [Box((i,), str(i), w=50.0) for i in (1, 2, 3)]
    frame = arrange("scope", list(boxes), {1: [0], 2: [1], 3: [0], 4: [3]})
    assert frame.ports[0, False] == frame.ports[3, True] == frame.x[2] + 25.0
    assert frame.x[0] == frame.x[1] != frame.x[2]


def test_order_avoids_crossings() -> None:
    """Two chains that start in the wrong order: 0 -> 3 and 1 -> 2."""
    boxes = [Box((i,), str(i), w=50.0) for i in range(4)]
    frame = arrange("", list(boxes), {2: [1], 3: [0]})
    assert (frame.x[0] < frame.x[1]) == (frame.x[3] < frame.x[2])
    assert frame.x[0] == frame.x[3]


@pytest.mark.parametrize("seed", range(30))
def test_any_graph_is_laid_out_without_overlap(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(2, 40)
    boxes = [Box((i,), str(i), w=rng.choice([30.0, 90.0, 200.0])) for i in range(count)]
    reads = {i: rng.sample(range(-2, i), rng.randint(0, min(3, i))) for i in range(count)} | {count: [count - 1]}
    frame = arrange("scope", list(boxes), reads)
    places = list(zip(frame.x, frame.y, boxes, strict=True))
    for (xa, ya, a), (xb, yb, b) in combinations(places, 2):
        assert xa + a.w <= xb or xb + b.w <= xa or ya + a.h <= yb or yb + b.h <= ya
    for x, y, box in places:
        assert x >= 0
        assert y >= 0
        assert x + box.w <= frame.w
        assert y + box.h <= frame.h
    assert len(frame.routes) == sum(len(sources) for sources in reads.values())


def test_scalars_of_a_traced_function() -> None:
    graph = trace(lambda x: {"a": x + 1.0, "b": x}, Spec((2, 3)))
    assert {"a", "b", "x", "add"} <= set(texts(svg(graph)))


def test_what_reads_a_gradient_outside_of_the_gradients() -> None:
    """A line from the gradients back to the network, and a gradient of a layer that is not there."""
    graph = Graph()
    x = graph.leaf("batch", "x", Spec((2, 3)))
    y = graph.add(Relu(), (x,), name="relu_1")
    back = graph.add(Relu(), (y,), name="grad/elsewhere/part_1/relu_1")
    graph.outputs["y"] = graph.add(Add(), (y, back), name="add_1").id
    picture = svg(graph)
    at = {title: x0 for title, x0, *_ in rectangles(picture) if title in ("add", "y")}
    assert at["add"] < 20.0
    ends = [float(d.rsplit("H", 1)[1]) for d in re.findall('class="e" d="(M[^"]*C[^"]*H[^"]*)"', picture)]
    assert any(end < 300.0 for end in ends)  # at the right side of the network
