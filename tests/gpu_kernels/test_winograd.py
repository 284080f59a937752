"""Winograd's algorithm on the emulator: its transforms, its accuracy, slabs, epilogues, and where it runs."""

from dataclasses import replace

import numpy as np
import pytest

from gpu_kernels import emulate, winograd, winograd_filter_grad, winograd_transform
from gpu_kernels.ptx import cuda
from gpu_kernels.specialise import flatten
from gpu_kernels.winograd_transform import LINES, Tiles, square
from rapydli_flow import ops
from rapydli_flow.ops import Sample
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, templates
from rapydli_flow.testing import gpu
from rapydli_flow.testing.gpu import CARD, OLDER, bias_residual_relu, chosen, emulated
from rapydli_flow.tuner import Request
from rapydli_flow.winograd import evaluate

FAMILIES = ("conv", "conv_input_grad", "conv_filter_grad")


def of(family):
    (found,) = (t for t in templates(family, "cuda") if "winograd" in t.name)
    return found


def sample(family, x, w, *, low=(1, 1), high=(1, 1), **how):
    """The op of a family that belongs to a convolution of x by w."""
    geometry = {"stride": (1, 1), "padding": tuple(zip(low, high, strict=True)), "dilation": (1, 1), **how}
    op, x, w = ops.Conv(**geometry), Spec(x), Spec(w)
    y = op.infer(x, w)
    return {
        "conv": Sample(op, (x, w)),
        "conv_input_grad": Sample(ops.ConvInputGrad(size=x.shape[1:-1], **geometry), (y, w)),
        "conv_filter_grad": Sample(ops.ConvFilterGrad(window=w.shape[:-2], **geometry), (x, y)),
    }[family]


def operands(s):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(spec.shape, dtype=np.float32) for spec in s.ins]


def config_of(s, **changes):
    template, outs = of(s.op.family), s.op.out_specs(*s.ins)
    config = template.default(s.op, s.ins, outs, CARD)
    assert config is not None
    config.update(changes)
    assert template.broken(s.op, s.ins, outs, CARD, config) is None
    return config


def error(got, want):
    return float(np.abs(got - want).max() / np.abs(want).max())


def error_of(s, config):
    """The largest error on random numbers, as a part of the largest result."""
    values = operands(s)
    return error(emulated(of(s.op.family), s.op, values, config)[0], gpu.wanted(s.op, values)[0])


@pytest.fixture
def slabs_of(monkeypatch):
    """A function that makes slabs of so many images."""

    def cut(images):
        for module in (winograd, winograd_filter_grad):
            known = module.tiles_of
            monkeypatch.setattr(module, "tiles_of", lambda *args, known=known: replace(known(*args), together=images))

    return cut


# ---- transforms


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize(
    ("kind", "n", "reads", "writes"),
    [
        *(("patch", n, n, n) for n in (6, 4)),
        *(("filter", n, reads, n) for n, reads in ((6, 3), (6, 5), (6, 4), (6, 2), (4, 3), (4, 2))),
        *(("result", n, n, writes) for n, writes in ((6, 4), (6, 2), (6, 3), (6, 5), (4, 2), (4, 3))),
    ],
)
def test_squares_are_transformed_along_both_axes(kind, n, reads, writes, lanes):
    x = np.random.default_rng(0).normal(size=(n, n, lanes, 5)).astype(np.float32)
    registers = x.reshape(n * n * lanes, 5).copy()
    square(kind, n, reads, writes, lanes)(registers)
    lines = LINES[kind](n, reads, writes)
    columns = np.asarray(evaluate(lines, x[:reads, :reads].astype(np.float64)))
    want = np.asarray(evaluate(lines, columns.swapaxes(0, 1))).swapaxes(0, 1)
    found = registers.reshape(x.shape)[:writes, :writes]
    np.testing.assert_allclose(found, want, atol=1e-5)


# ---- what is computed


@pytest.mark.parametrize("m", [4, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_errors(family, m):
    s = sample(family, (2, 18, 22, 64), (3, 3, 64, 96))
    assert error_of(s, config_of(s, m=m)) < {4: 2e-6, 2: 1e-6}[m]


@pytest.mark.parametrize(("low", "high"), [((0, 0), (0, 0)), ((2, 0), (1, 2)), ((-1, 3), (0, -1))])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding(family, low, high):
    """None, more than keeps the size, and less than none; images that tiles do not fill."""
    s = sample(family, (2, 11, 14, 8), (3, 3, 8, 12), low=low, high=high)
    for m in (4, 2):
        assert error_of(s, config_of(s, m=m)) < 2e-6


@pytest.mark.parametrize("low", [0, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_windows_of_5(family, low):
    s = sample(family, (2, 11, 14, 24), (5, 5, 24, 40), low=(low, 2), high=(2, low))
    config = config_of(s)
    assert config["m"] == 2
    assert error_of(s, config) < 3e-6
    outs = s.op.out_specs(*s.ins)
    assert "points" in of(family).broken(s.op, s.ins, outs, CARD, {**config, "m": 4})


@pytest.mark.parametrize("channels", [(5, 7), (6, 4), (1, 1), (40, 6)])
@pytest.mark.parametrize("family", FAMILIES)
def test_channels_that_vectors_do_not_divide(family, channels):
    s = sample(family, (2, 9, 7, channels[0]), (3, 3, *channels))
    for config in chosen(of(family), s, seed=3, count=2):
        assert error_of(s, config) < 3e-6


@pytest.mark.parametrize("m", [4, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_slabs(family, m, slabs_of):
    """Of one image each, with words left from one to the next."""
    slabs_of(1)
    s = sample(family, (3, 9, 10, 8), (3, 3, 8, 12))
    (out,), config = s.op.out_specs(*s.ins), config_of(s, m=m)
    grids = of(family).build(s.op, s.ins, (out,), Epilogue.none(out), **config)
    of_slab = 4 if family == "conv_filter_grad" else 3
    assert len(grids) == 2 + 3 * of_slab
    assert len(set(grids)) == 2 + of_slab  # so many are compiled
    assert error_of(s, config) < 2e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_slabs_that_images_do_not_fill(family, slabs_of):
    slabs_of(2)
    s = sample(family, (3, 6, 9, 8), (3, 3, 8, 12))
    assert error_of(s, config_of(s)) < 2e-6


@pytest.mark.parametrize(("splits", "images"), [(2, 6), (3, 6), (2, 3)])
def test_sums_over_tiles_are_split(splits, images, slabs_of):
    """Those of a slab; what is left over is less than a split."""
    slabs_of(images)
    s = sample("conv_filter_grad", (6, 13, 22, 8), (3, 3, 8, 12))
    assert error_of(s, config_of(s, m=4, bk=16, splits=splits)) < 2e-6
    outs = s.op.out_specs(*s.ins)
    config = config_of(s)
    assert "splits" in of(s.op.family).broken(s.op, s.ins, outs, CARD, {**config, "splits": 64})


@pytest.mark.parametrize("slabs", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_epilogue_is_applied_before_the_store(family, slabs, slabs_of):
    slabs_of(2 // slabs)
    s, rng = sample(family, (2, 9, 10, 8), (3, 3, 8, 12)), np.random.default_rng(1)
    (out,) = s.op.out_specs(*s.ins)
    epilogue, values = bias_residual_relu(out, scaled=True), operands(s)
    extras = [np.asarray(rng.normal(size=e.shape), np.float32) for e in epilogue.extras]
    bias, residual, scale = (np.float64(extra) for extra in extras)
    want = np.maximum(gpu.wanted(s.op, values)[0] + bias + residual, 0) * scale
    (got,) = emulated(of(family), s.op, values, config_of(s), epilogue=epilogue, extras=extras)
    assert error(got, want) < 2e-6


@pytest.mark.parametrize("slabs", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_computes_what_the_kernels_do(family, slabs, slabs_of):
    """What is compiled, run by the emulator."""
    slabs_of(2 // slabs)
    s = sample(family, (2, 18, 22, 8), (3, 3, 8, 12))
    template, values, outs = of(family), operands(s), s.op.out_specs(*s.ins)
    config = config_of(s, **({"m": 2, "bk": 16, "splits": 2} if slabs == 1 and family == "conv_filter_grad" else {}))
    work = template.workspace(s.op, s.ins, outs, **config)

    def of_text(grid):
        flat = flatten(grid.kernel, ins=len(values), outs=1, work=len(work), extras=0)
        scope = {**flat.names, "cuda": cuda}
        exec(flat.source, scope)
        kernel = scope["kernel"]
        return replace(grid, kernel=lambda ins, outs, work, extras, at: kernel(*ins, *outs, *work, *extras, at))

    built = template.build(s.op, s.ins, outs, Epilogue.none(outs[0]), **config)
    (got,) = emulate.run(tuple(map(of_text, built)), values, outs, work=work)
    assert error(got, gpu.wanted(s.op, values)[0]) < 2e-6


# ---- where it runs


def default_of(s, card=CARD):
    return of(s.op.family).default(s.op, s.ins, s.op.out_specs(*s.ins), card)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_fit_is_left_out(family):
    x, w = (2, 12, 12, 8), (3, 3, 8, 8)
    plain = sample(family, x, w)
    assert default_of(plain)
    assert default_of(plain, Device("cuda", "an old card", target="sm_75", cores=68)) is None
    for change in ({"stride": (2, 2)}, {"dilation": (2, 2)}, {"exact": True}):
        assert default_of(sample(family, x, w, **change)) is None
    assert default_of(sample(family, x, (3, 3, 4, 8), groups=2)) is None
    for window in ((1, 1), (3, 5), (7, 7)):
        assert default_of(sample(family, x, (*window, 8, 8))) is None
    for dtype in ("bfloat16", "float16", "float64"):
        assert default_of(gpu.as_dtype(plain, dtype)) is None


def served(s, card):
    return Request(s.op, s.ins, Epilogue.none(s.op.out_specs(*s.ins)[0])).default(card).template


@pytest.mark.parametrize("family", FAMILIES)
def test_it_serves_many_channels_of_large_batches(family):
    name = of(family).name
    for size, channels in ((28, 128), (14, 256), (7, 512), (56, 256)):
        assert served(sample(family, (64, size, size, channels), (3, 3, channels, channels)), OLDER) == name
    assert served(sample(family, (64, 56, 56, 256), (3, 3, 256, 256)), CARD) == name
    for card in (CARD, OLDER):
        assert served(sample("conv", (128, 224, 224, 3), (3, 3, 3, 64)), card) != "winograd"
        assert served(sample(family, (1, 14, 14, 256), (3, 3, 256, 256)), card) != name
        assert served(sample(family, (4, 28, 28, 16), (3, 3, 16, 16)), card) != name


@pytest.mark.parametrize("family", FAMILIES)
def test_workspace_is_bounded(family):
    s = sample(family, (128, 112, 112, 128), (3, 3, 128, 128))
    template, outs = of(family), s.op.out_specs(*s.ins)
    for slab_mb in (512, 256):
        config = config_of(s, slab_mb=slab_mb)
        *matrices, counter = template.workspace(s.op, s.ins, outs, **config)
        large = sum(sorted(spec.size_bytes for spec in matrices)[-2:])  # others have the size of filters
        assert 0.8 * slab_mb * 2**20 < large <= slab_mb * 2**20
        assert counter == Spec((2,), "int32")
    assert "slabs" in template.broken(s.op, s.ins, outs, CARD, {**config, "slab_mb": 16})


def test_tiles_cover_all_results():
    t = Tiles(3, (9, 10), (9, 10), (1, 1), 4, 3, 2)
    assert (t.n, t.grid, t.of_image, t.tiles, t.rows, t.slabs) == (6, (3, 3), 9, 27, 18, 2)


def test_blocks_hold_a_square_for_each_thread():
    for n, lanes, more in ((6, 4, 0), (6, 1, 0), (4, 4, 0), (4, 1, 0), (6, 4, 16), (6, 4, 64)):
        resident = winograd_transform.resident_of(n, lanes, more)
        registers = winograd_transform.THREADS * (n * n * lanes + more + 24)
        assert resident * registers <= 65536
        assert resident == 12 or (resident + 1) * registers > 65536
