"""w4_matmul's SwiGLU and the parts stored in pairs for it: oracle against formulas, kernels (interpreter) against the oracle."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tonfa.kernels.layout import in_pairs
from tonfa.kernels.smooth_quantize import smooth_quantize
from tonfa.kernels.smooth_quantize_torch import smooth_quantize_torch
from tonfa.kernels.targets import cuda_target, target_for
from tonfa.kernels.tiles import Tile
from tonfa.kernels.w4_matmul import Finish, Peak, w4_matmul
from tonfa.kernels.w4_matmul_torch import swiglu_torch, w4_matmul_torch

from .make_layers import packed_view, random_layer, with_columns
from .test_w4_matmul import BF16, FP16, FP32, compare, poisoned, relative

KINDS = [("int8", "exact"), ("int8", "fast"), ("e4m3", "exact"), ("e4m3", "fast"), ("half", "exact"), ("nvfp4", "exact"), ("nvfp4", "fast")]


def operands(kind: str, mode: str, dtype, rows: int, *, n=208, k=192, rank=32, pair=BF16, paired=True):
    """A layer, its view (in pairs) and a quantised input. n is no multiple of 128: pairs end inside a tile."""
    torch.manual_seed(0)
    precision = "nvfp4" if kind == "nvfp4" else "int4"
    layer = random_layer(precision, n, k, rank, channel_scale=kind == "nvfp4", scale_dtype=pair)
    view = packed_view(layer, "int8" if kind == "int8" else "e4m3", paired)
    return layer, view, smooth_quantize_torch(torch.randn(rows, k).to(dtype), view, mode, wide=kind == "half")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("kind, mode", KINDS)
def test_oracle_is_the_formula(kind, mode, dtype):
    """On the same quantised input as a part that is not stored in pairs: its result in its order, and SwiGLU of that, rounded."""
    layer, view, q = operands(kind, mode, dtype, 6)
    flat = operands(kind, mode, dtype, 6, paired=False)[1]
    want = w4_matmul_torch(q, flat, layer.bias, poisoned(6, 208, dtype=dtype))
    assert relative(w4_matmul_torch(q, view, layer.bias, poisoned(6, 208, dtype=dtype)), want) < 1e-6
    h = w4_matmul_torch(q, view, layer.bias, poisoned(6, 104, dtype=dtype), Finish(swiglu=True))
    values, gates = want[:, :104].double(), want[:, 104:].double()
    assert relative(h, values * gates / (1 + (-gates).exp())) < {BF16: 4e-3, FP16: 5e-4, FP32: 1e-6}[dtype]
    exact = (values * gates / (1 + (-gates).exp())).to(dtype)
    assert (h == exact).double().mean() > (0.99 if dtype != FP32 else 0)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("kind, mode", KINDS)
def test_kernel_equals_oracle(interpreter, kind, mode, dtype):
    layer, view, q = operands(kind, mode, dtype, 17)
    compare(q, view, layer.bias, poisoned(17, 104, dtype=dtype), swiglu=True)
    compare(q, view, None, poisoned(17, 104, dtype=dtype), swiglu=True)


@pytest.mark.parametrize("kind, mode", [("int8", "exact"), ("e4m3", "exact"), ("e4m3", "fast"), ("half", "exact"), ("nvfp4", "exact")])
@pytest.mark.parametrize("rows", [1, 33, 150, 257])
def test_kernel_any_number_of_rows(interpreter, kind, mode, rows):
    layer, view, q = operands(kind, mode, BF16, rows, n=256, k=128, rank=16)
    compare(q, view, None, poisoned(rows, 128), swiglu=True)


@pytest.mark.parametrize("kind, mode", [("int8", "fast"), ("e4m3", "exact"), ("e4m3", "fast"), ("half", "exact"), ("nvfp4", "fast")])
def test_without_an_ending_outputs_are_in_order(interpreter, kind, mode):
    """Every other ending, bit for bit as of a part that is not stored in pairs."""
    rows = 257 if kind == "nvfp4" else 17
    layer, view, q = operands(kind, mode, BF16, rows)
    flat = operands(kind, mode, BF16, rows, paired=False)[1]
    gate, residual, old = torch.randn(1, 208).to(BF16), torch.randn(rows, 208).to(BF16), torch.randn(rows, 208).to(BF16)
    for options in ({"gelu_from": 104}, {"accumulate": True, "gate": gate, "residual": residual, "rows_per_batch": rows}):
        got, want = (w4_matmul(q, v, layer.bias, old.clone(), Finish(**options)) for v in (view, flat))
        assert torch.equal(got, want), options
    compare(q, view, layer.bias, poisoned(rows, 208))


@pytest.mark.parametrize("rank, extra, dtype, half", [(32, 32, BF16, "values"), (0, 48, FP16, "gates"), (48, 160, FP32, "both")])
@pytest.mark.parametrize("kind, mode", [("int8", "exact"), ("e4m3", "exact"), ("e4m3", "fast"), ("half", "exact"), ("nvfp4", "fast")])
def test_further_columns_on_a_half(interpreter, kind, mode, rank, extra, dtype, half):
    """Columns for one half change nothing of the other, with and without the ending."""
    torch.manual_seed(1)
    layer, view, _ = operands(kind, mode, dtype, 0, rank=rank)
    x, up = torch.randn(17, 192).to(dtype), torch.randn(208, extra).to(dtype)
    up[104:] *= half != "values"
    up[:104] *= half != "gates"
    with_columns(view, extra, (0,), dtype).extra.up[:208] = in_pairs(up)
    q = smooth_quantize_torch(x, view, mode, wide=kind == "half")
    y, rest = (w4_matmul_torch(each, view, None, torch.empty(17, 208)) for each in (q, dataclasses.replace(q, extra=None)))
    assert relative(y - rest, x.double() @ view.extra.down[:192].double() @ up.double().t()) < 5e-3
    untouched = {"values": slice(104, 208), "gates": slice(0, 104), "both": slice(0, 0)}[half]
    assert torch.equal(y[:, untouched], rest[:, untouched])
    compare(q, view, layer.bias, poisoned(17, 208, dtype=dtype))
    compare(q, view, layer.bias, poisoned(17, 104, dtype=dtype), swiglu=True)


@pytest.fixture
def wide(interpreter):
    import tonfa.kernels.w4_matmul_wide as module

    return module


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("kind, mode", [("e4m3", "fast"), ("half", "exact")])
def test_kernel_leaves_the_row_maxima_of_the_next_layer(wide, kind, mode, dtype):
    """What smooth_quantize finds in the result is what the product left, bit for bit."""
    layer, view, q = operands(kind, mode, dtype, 70, n=384, k=128, rank=16)
    following = packed_view(random_layer("int4", 128, 192, 16))
    out, peak = poisoned(70, 192, dtype=dtype), Peak(torch.zeros(70), following.smooth)
    w4_matmul(q, view, layer.bias, out, Finish(swiglu=True, peak=peak))
    found = smooth_quantize(out, following, mode, wide=True)
    given = smooth_quantize(out, following, mode, row_amax=peak.amax, wide=True)
    assert torch.equal(found.scales, given.scales) and torch.equal(found.codes, given.codes)
    assert torch.equal(out, w4_matmul(q, view, layer.bias, poisoned(70, 192, dtype=dtype), Finish(swiglu=True)))
    oracle = Peak(torch.zeros(70), following.smooth)
    w4_matmul_torch(q, view, layer.bias, poisoned(70, 192, dtype=dtype), Finish(swiglu=True, peak=oracle))
    torch.testing.assert_close(peak.amax, oracle.amax, rtol=2**-7 if dtype == BF16 else 2**-9, atol=0)
    before = Peak(torch.full((70,), 1e6), following.smooth)
    w4_matmul(q, view, layer.bias, out, Finish(swiglu=True, peak=before))
    assert (before.amax == 1e6).all(), "a larger maximum from elsewhere stays"


@pytest.mark.parametrize("kind, mode", [("e4m3", "fast"), ("half", "exact"), ("nvfp4", "fast")])
def test_wide_kernel_through_descriptors_in_pieces_and_bands(wide, monkeypatch, kind, mode):
    rows = 261 if kind == "nvfp4" else 150
    layer, view, q = operands(kind, mode, BF16, rows, n=384, rank=48)
    without = compare(q, view, layer.bias, poisoned(rows, 192), swiglu=True)
    monkeypatch.setattr(wide, "target_for", lambda device: dataclasses.replace(target_for(device), copy_engine=True))
    bk = 128 if kind == "e4m3" else 64
    large, last = (Tile(128, bm, bk, 8, 3, pieces) for bm, pieces in ((128, 4), (32, 2)))
    monkeypatch.setattr(wide, "wide_bands", lambda *arguments: [(0, 128, large), (128, rows, last)])
    assert torch.equal(compare(q, view, layer.bias, poisoned(rows, 192), swiglu=True), without)


def test_as_a_small_hopper_runs_it(wide, monkeypatch):
    """Four multiprocessors: tiles of 256 tokens for two full rounds, then one band of smaller ones, all through descriptors."""
    layer, view, q = operands("half", "exact", BF16, 1100, n=256, k=128, rank=16)
    monkeypatch.setattr(wide, "target_for", lambda device: dataclasses.replace(cuda_target(90), multiprocessors=4))
    compare(q, view, layer.bias, poisoned(1100, 128), swiglu=True)


@pytest.mark.parametrize("kind, mode", [("int8", "exact"), ("e4m3", "fast"), ("half", "exact")])
def test_inputs_that_are_no_multiple_of_a_block_of_scales(interpreter, kind, mode):
    """Z-Image's 3840 inputs: three blocks that share a scale, and one of twelve groups."""
    layer, view, q = operands(kind, mode, BF16, 17, n=128, k=3840)
    assert view.block_scale is None or view.block_scale.shape[0] == 4
    compare(q, view, layer.bias, poisoned(17, 64), swiglu=True)


@pytest.mark.parametrize("kind, mode", [("int8", "fast"), ("e4m3", "exact"), ("e4m3", "fast"), ("half", "exact"), ("nvfp4", "fast")])
def test_float16_saturates(interpreter, kind, mode):
    """Values, gates and products beyond 65504 are 65504; nothing is NaN, also where a gate is far below 0."""
    layer, view, q = operands(kind, mode, FP16, 17)
    bias = torch.zeros(208)
    bias[:4] = torch.tensor([1e5, -1e5, 1000.0, 1e5])
    bias[104:108] = torch.tensor([500.0, 500.0, 1e5, -1e5])
    for multiply in (w4_matmul, w4_matmul_torch):
        h = multiply(q, view, bias, poisoned(17, 104, dtype=FP16), Finish(swiglu=True))
        assert torch.isfinite(h).all()
        assert (h[:, [0, 2]] == 65504).all() and (h[:, 1] == -65504).all() and (h[:, 3] == 0).all()
    assert torch.equal(
        swiglu_torch(torch.tensor([[torch.inf, 2.0, torch.inf, -torch.inf]], dtype=FP16)), torch.tensor([[65504.0, 0.0]]).half()
    )


@pytest.mark.parametrize("kind", ["e4m3", "half"])
def test_the_same_bits_twice(interpreter, kind):
    layer, view, q = operands(kind, "exact", BF16, 17)
    a, b = (w4_matmul(q, view, layer.bias, torch.empty(17, 104, dtype=BF16), Finish(swiglu=True)) for _ in range(2))
    assert torch.equal(a, b)


def test_it_writes_a_slice_and_nothing_else(interpreter):
    for kind, mode in (("e4m3", "fast"), ("int8", "fast")):
        layer, view, q = operands(kind, mode, FP16, 5)
        whole = torch.full((5, 3, 200), 7.0, dtype=FP16)
        compare(q, view, layer.bias, whole[:, 1, 50:154], swiglu=True)
        assert (whole[:, ::2] == 7).all() and (whole[:, 1, :50] == 7).all() and (whole[:, 1, 154:] == 7).all()
        compare(q, view, layer.bias, torch.full((104, 5), float("nan"), dtype=FP16).t(), swiglu=True)


def test_misfits_are_refused():
    layer, view, q = operands("e4m3", "fast", BF16, 5)
    out = torch.zeros(5, 104, dtype=BF16)
    with pytest.raises(ValueError, match=r"out has shape \[5, 208\], expected \[5, 104\]"):
        w4_matmul(q, view, None, torch.zeros(5, 208), Finish(swiglu=True))
    with pytest.raises(ValueError, match="whose rows are stored in pairs"):
        w4_matmul(q, packed_view(layer), None, out, Finish(swiglu=True))
    for other in ({"gelu_from": 0}, {"accumulate": True}, {"gate": torch.zeros(1, 104), "residual": out}):
        with pytest.raises(ValueError, match="no other ending goes with it"):
            w4_matmul(q, view, None, out, Finish(swiglu=True, **other))
    with pytest.raises(ValueError, match="peak has"):
        w4_matmul(q, view, None, out, Finish(swiglu=True, peak=Peak(torch.zeros(5), torch.ones(100))))
