"""w4_matmul: the oracle against fp64 formulas and the golden files, the kernel (interpreter) against the oracle."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tonfa.kernels.block_scale import BLOCK
from tonfa.kernels.layout import SHIFT, LogicalLinear, dense_bias, dense_weight, dense_weight4
from tonfa.kernels.norm_modulate import Norm
from tonfa.kernels.smooth_quantize import smooth_quantize
from tonfa.kernels.smooth_quantize_torch import smooth_quantize_torch
from tonfa.kernels.targets import cuda_target, hip_target, target_for
from tonfa.kernels.tiles import Tile, wide_bands
from tonfa.kernels.w4_matmul import Finish, Peak, quantize_for, takes_wide, unpack_for, w4_matmul
from tonfa.kernels.w4_matmul_torch import dequantized_input, dequantized_weight, w4_matmul_torch

from .make_layers import packed_view, random_layer, with_columns

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DATA = Path(__file__).parents[1] / "data"
KINDS = [(kind, mode) for kind in ("int8", "int8 unsigned", "e4m3", "e4m3 unsigned", "nvfp4") for mode in ("exact", "fast")]
KINDS += [("half", "exact"), ("half unsigned", "exact")]
GOLDENS = [p.stem for p in sorted(DATA.glob("int4_*")) + sorted(DATA.glob("nvfp4_*"))]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def golden_layer(name: str) -> tuple[LogicalLinear, dict]:
    t = load_file(DATA / f"{name}.safetensors")
    nvfp4 = name.startswith("nvfp4")
    channel = None
    if nvfp4:
        n = t["logical.codes"].shape[0]
        channel = t.get("logical.wtscale", torch.ones(1)).float() * t.get("logical.wcscales", torch.ones(n)).float()
    layer = LogicalLinear(
        "nvfp4" if nvfp4 else "int4",
        t["logical.codes"].view(torch.uint8) & 15,
        t["logical.wscales"],
        smooth=t["logical.smooth"],
        down=t["logical.lora_down"],
        up=t["logical.lora_up"],
        channel_scale=channel,
        bias=t["logical.bias"],
        act_unsigned="shift" in name,
    )
    return layer, t


def test_goldens_are_there():
    assert len(GOLDENS) >= 7


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_weights_and_results(name):
    """Upstream's dequantised weight bit for bit, and its result without activation rounding from our dense twin."""
    layer, t = golden_layer(name)
    torch.testing.assert_close(dense_weight4(layer), t["expected.w_dequant"], rtol=1e-6, atol=1e-8)
    y = t["x"].double() @ dense_weight(layer).double().t() + dense_bias(layer).double()
    assert relative(y, t["expected.y_weight_only"]) < 1e-5
    for form in ("int8", "e4m3"):
        weight = dequantized_weight(packed_view(layer, form))[:, : layer.k]
        weight = weight if layer.channel_scale is None else weight * layer.channel_scale[:, None]
        torch.testing.assert_close(weight, dense_weight4(layer), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode, wide", [("exact", False), ("exact", True), ("fast", False)])
@pytest.mark.parametrize("form", ["int8", "e4m3"])
@pytest.mark.parametrize("name", GOLDENS)
def test_golden_through_both_ops(interpreter, name, form, mode, wide):
    """Both kernels on the golden input: only activation rounding may stand between them and upstream's result."""
    layer, t = golden_layer(name)
    view = packed_view(layer, form)
    out = torch.full((8, layer.n), float("nan"))
    w4_matmul(smooth_quantize(t["x"], view, mode, wide=wide), view, layer.bias, out)
    error = relative(out, t["expected.y_weight_only"])
    limit = {"exact": 0.18, "fast": 0.04}[mode]  # the golden smooth vectors are random, so exact is worse than on calibrated ones
    if mode == "fast" and layer.precision == "nvfp4":
        limit = 1e-5  # x is fp32 and nothing is rounded
    assert error < limit
    if mode == "exact":
        assert error > 1e-3, "codes cannot be this good: the activations were not quantised"


def layer_and_view(kind: str, n: int, k: int, rank: int, segments, pair=BF16):
    nvfp4 = kind == "nvfp4"
    layer = random_layer(
        "nvfp4" if nvfp4 else "int4", n, k, rank, act_unsigned="unsigned" in kind, segments=segments, channel_scale=nvfp4, scale_dtype=pair
    )
    return layer, packed_view(layer, "int8" if kind.startswith("int8") else "e4m3")


@pytest.mark.parametrize("kind, mode", KINDS)
def test_oracle_is_the_formula(kind, mode):
    torch.manual_seed(0)
    unsigned = "unsigned" in kind
    layer, view = layer_and_view(kind, 384, 256, 16, (0, 128))
    x = torch.randn(6, 256)
    q = smooth_quantize_torch(x, view, mode, wide="half" in kind)
    quantised = dequantized_input(q, view.spec.code_form).double()
    weight = dense_weight4(layer).double()
    if q.kind == "e4m3":  # rounded once more: test_expand_weight.py holds by how much
        weight = dequantized_weight(view, "e4m3")[:, : layer.k].double()
    want = quantised @ weight.t() + layer.bias.double()
    if unsigned and mode == "fast":
        want += SHIFT * (dense_weight4(layer).double() / layer.smooth.double()).sum(1)
    for n0, n1, i in ((0, 128, 0), (128, 384, 1)):
        want[:, n0:n1] += x.double() @ layer.down[16 * i : 16 * i + 16].double().t() @ layer.up[n0:n1].double().t()
    got = w4_matmul_torch(q, view, layer.bias, torch.empty(6, 384))
    assert relative(got, want) < 1e-5
    dense = x.double() @ dense_weight(layer).double().t() + dense_bias(layer).double()
    assert relative(got, dense) < {"exact": 0.22, "fast": 0.05}[mode]


def operands(kind: str, mode: str, dtype, rows: int, *, n=200, k=192, rank=32, segments=(0,), pair=BF16):
    torch.manual_seed(0)
    layer, view = layer_and_view(kind, n, k, rank, segments, pair)
    return layer, view, smooth_quantize_torch(torch.randn(rows, k).to(dtype), view, mode, wide="half" in kind)


def poisoned(*shape: int, dtype=BF16) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def compare(q, view, bias, out, **options):
    """Kernel against oracle, each on its own copy of out. Returns the kernel's result."""
    want = out.clone()
    w4_matmul_torch(q, view, bias, want, Finish(**options))
    w4_matmul(q, view, bias, out, Finish(**options))
    limit = {FP32: 2e-5, FP16: 3e-4, BF16: 2e-3}[out.dtype]
    assert torch.isfinite(out).all()
    assert relative(out, want) < limit
    if out.dtype != FP32:  # the same number almost everywhere, never more than a rounding away
        same = (out == want) | ((out - want).abs() < 1e-5)  # far left of a GELU torch's own formula cancels to 0
        assert same.double().mean() > 0.97
    return out


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("kind, mode", KINDS)
def test_kernel_equals_oracle(interpreter, kind, mode, dtype):
    layer, view, q = operands(kind, mode, dtype, 17)
    assert q.kind == ("half" if "half" in kind else q.kind)
    compare(q, view, layer.bias, poisoned(17, 200, dtype=dtype))


@pytest.mark.parametrize("kind, mode", [("int8", "exact"), ("e4m3", "exact"), ("e4m3", "fast"), ("half", "exact"), ("nvfp4", "exact")])
@pytest.mark.parametrize("rows", [1, 5, 33, 70, 256])
def test_kernel_any_number_of_rows(interpreter, kind, mode, rows):
    layer, view, q = operands(kind, mode, BF16, rows, n=128, k=128, rank=16)
    compare(q, view, layer.bias.float(), poisoned(rows, 128))


@pytest.mark.parametrize("kind, mode", [("e4m3", "fast"), ("half", "exact"), ("nvfp4", "fast")])
@pytest.mark.parametrize("rank", [0, 10, 48, 128, 1024])
def test_kernel_ranks_and_segments(interpreter, rank, kind, mode):
    layer, view, q = operands(kind, mode, BF16, 5, n=384, rank=rank, segments=(0, 128))
    compare(q, view, None, poisoned(5, 384))
    if rank == 10:
        layer, view, q = operands("int8", "exact", BF16, 5, n=512, rank=rank, segments=(0, 128, 256, 384))
        compare(q, view, layer.bias, poisoned(5, 512))


@pytest.mark.parametrize("rank, extra, segments", [(16, 16, (0,)), (32, 48, (0, 128)), (0, 32, (0, 128, 256)), (48, 160, (0, 256))])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("kind, mode", [("int8", "exact"), ("e4m3", "exact"), ("e4m3", "fast"), ("half", "exact"), ("nvfp4", "fast")])
def test_further_columns(interpreter, kind, mode, dtype, rank, extra, segments):
    """Through both ops: kernel against oracle, and the oracle's difference against the product of the columns in fp64."""
    torch.manual_seed(0)
    layer, view = layer_and_view(kind, 384, 192, rank, (0, 128), BF16)
    x, wide = torch.randn(17, 192).to(dtype), "half" in kind
    bare = w4_matmul_torch(smooth_quantize_torch(x, view, mode, wide=wide), view, None, torch.empty(17, 384, dtype=dtype))
    with_columns(view, extra, segments, dtype)
    q = smooth_quantize(x, view, mode, wide=wide)
    out = compare(q, view, layer.bias, poisoned(17, 384, dtype=dtype))
    oracle = smooth_quantize_torch(x, view, mode, wide=wide)
    limit = 1e-5 if oracle.extra.dtype == FP32 and dtype != FP16 else 3e-3
    assert q.extra.dtype == oracle.extra.dtype and relative(q.extra, oracle.extra) < limit
    if dtype == FP32:
        ends = (*segments[1:], 384)
        downs = view.extra.down.double().split(extra, 1)
        parts = zip(downs, segments, ends, strict=True)
        want = torch.cat([x.double() @ down[:192] @ view.extra.up[a:b].double().t() for down, a, b in parts], 1)
        plain = w4_matmul_torch(oracle, view, None, torch.empty(17, 384))
        assert relative(plain - bare, want) < 1e-4
        assert relative(out, plain + layer.bias.float()) < 1e-4


def test_columns_that_do_not_fit_are_refused():
    view = with_columns(layer_and_view("e4m3", 200, 192, 16, (0,))[1], 16, (0,), BF16)
    view.extra = dataclasses.replace(view.extra, segments=(0, 128))
    with pytest.raises(ValueError, match=r"further columns are \[256, 16\] and \[256, 16\] in 2 segments"):
        smooth_quantize(torch.randn(3, 192), view, "fast")


@pytest.mark.parametrize("dtype, pair, lowrank", [(BF16, BF16, BF16), (FP16, BF16, FP32), (BF16, FP16, FP32), (FP32, BF16, FP32)])
def test_wide_kernel_low_rank_types(interpreter, dtype, pair, lowrank):
    """Without a bias, and with a low-rank branch ten times the rest, so that nothing hides an error of it."""
    layer, view, q = operands("e4m3", "fast", dtype, 17, n=256, rank=48, segments=(0, 128), pair=pair)
    assert q.lowrank.dtype == lowrank and view.up.dtype == pair
    q.lowrank *= 10
    out = compare(q, view, None, poisoned(17, 256, dtype=FP32))
    ups = layer.up.double().split(128)
    ours = torch.cat([h.double() @ up.t() for h, up in zip(q.lowrank.split(48, dim=1), ups, strict=True)], 1)
    rest = dequantized_input(q, "e4m3").double() @ dequantized_weight(view, "e4m3").double().t()
    assert relative(out - rest, ours) < 1e-5


@pytest.fixture
def wide(interpreter):
    import tonfa.kernels.w4_matmul_wide as module

    return module


@pytest.mark.parametrize("kind, mode", [("e4m3", "fast"), ("half", "exact"), ("nvfp4", "fast")])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_wide_kernel_through_tensor_descriptors(wide, monkeypatch, kind, mode, dtype):
    """The copy engine's form, rows that end inside a tile; NVFP4 takes this kernel from 256 rows on."""
    rows = 261 if kind == "nvfp4" else 17
    layer, view, q = operands(kind, mode, dtype, rows, n=384, rank=48, segments=(0, 128))
    without = compare(q, view, layer.bias, poisoned(rows, 384, dtype=dtype))
    made, from_tensor = [], wide.TensorDescriptor.from_tensor
    monkeypatch.setattr(wide, "target_for", lambda device: dataclasses.replace(target_for(device), copy_engine=True))
    monkeypatch.setattr(wide.TensorDescriptor, "from_tensor", lambda t, block: made.append(t) or from_tensor(t, block))
    found = compare(q, view, layer.bias, poisoned(rows, 384, dtype=dtype))
    assert len(made) == 4 and made[2] is view.up and made[3] is q.lowrank
    assert torch.equal(found, without)
    made.clear()
    q = smooth_quantize_torch(torch.randn(rows, 192).to(dtype), with_columns(view, 48, (0, 256), dtype), mode, wide="half" in kind)
    compare(q, view, layer.bias, poisoned(rows, 384, dtype=dtype))
    assert len(made) == 6 and made[4] is view.extra.up and made[5] is q.extra


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("kind, mode, shifted", [("e4m3", "fast", False), ("half", "exact", True), ("half", "exact", False)])
def test_wide_kernel_leaves_the_row_maxima_of_the_next_layer(wide, kind, mode, shifted, dtype):
    """What smooth_quantize finds in the result is what the product left, bit for bit, from output 8 on."""
    layer, view, q = operands(kind, mode, dtype, 150, n=200, k=128, rank=16)
    following = packed_view(random_layer("int4", 128, 192, 16, act_unsigned=shifted))
    out, peak = poisoned(150, 200, dtype=dtype), Peak(torch.zeros(150), following.smooth, shifted, 8)
    w4_matmul(q, view, layer.bias, out, Finish(gelu_from=0, peak=peak))
    found = smooth_quantize(out[:, 8:], following, mode, wide=True)
    given = smooth_quantize(out[:, 8:], following, mode, row_amax=peak.amax, wide=True)
    assert torch.equal(found.scales, given.scales) and torch.equal(found.codes, given.codes)
    oracle = Peak(torch.zeros(150), following.smooth, shifted, 8)
    w4_matmul_torch(q, view, layer.bias, poisoned(150, 200, dtype=dtype), Finish(gelu_from=0, peak=oracle))
    torch.testing.assert_close(peak.amax, oracle.amax, rtol=2**-7 if dtype == BF16 else 2**-9, atol=0)
    before = Peak(torch.full((150,), 1e6), following.smooth, shifted, 8)
    w4_matmul(q, view, layer.bias, out, Finish(peak=before))
    assert (before.amax == 1e6).all(), "a larger maximum from elsewhere stays"


@pytest.mark.parametrize("kind, mode, bk", [("e4m3", "fast", 128), ("half", "exact", 64)])
def test_wide_kernel_in_two_bands(wide, monkeypatch, kind, mode, bk):
    """The second band starts inside a batch and inside no tile of the first; every ending is told its rows."""
    layer, view, q = operands(kind, mode, BF16, 150, n=256, k=128, rank=16, segments=(0, 128))
    gate, residual, old = torch.randn(2, 256), torch.randn(150, 256), torch.randn(150, 256)
    options = {"gate": gate, "residual": residual, "rows_per_batch": 110, "accumulate": True}
    small, large, last = (Tile(128, bm, bk, 8, 3, pieces) for bm, pieces in ((64, 1), (128, 4), (32, 2)))
    bands = [[(0, 150, small)], [(0, 128, large), (128, 150, last)]]
    results = []
    for chosen in bands:
        asked = []
        monkeypatch.setattr(wide, "wide_bands", lambda *a, chosen=chosen, asked=asked: asked.append(a) or chosen)
        results.append(compare(q, view, layer.bias, old.clone(), **options))
        assert asked == [(target_for("cpu"), "row" if kind == "e4m3" else "half", 150, 256, 128)]
    assert relative(*results) < 1e-6


def test_wide_kernel_as_a_small_hopper_runs_it(wide, monkeypatch):
    """Four multiprocessors: tiles of 256 rows for two full rounds, then one band of smaller ones, all through descriptors."""
    target = dataclasses.replace(cuda_target(90), multiprocessors=4)
    assert [band[:2] for band in wide_bands(target, "half", 1100, 256, 256)] == [(0, 1024), (1024, 1100)]
    layer, view, q = operands("half", "exact", BF16, 1100, n=256, k=128, rank=16)
    monkeypatch.setattr(wide, "target_for", lambda device: target)
    compare(q, view, layer.bias, poisoned(1100, 256), gelu_from=128)


def test_hopper_gives_back_what_its_e4m3_sums_lose(wide, monkeypatch):
    layer, view, q = operands("e4m3", "fast", BF16, 5, n=128, k=2 * BLOCK, rank=0)
    want = torch.zeros(5, 128, dtype=torch.float64)
    for block in range(2):  # a block has lost something with every scaling since, its own included
        codes = torch.zeros_like(q.codes)
        codes[:, BLOCK * block : BLOCK * (block + 1)] = q.codes[:, BLOCK * block : BLOCK * (block + 1)]
        alone = w4_matmul(dataclasses.replace(q, codes=codes), view, None, poisoned(5, 128, dtype=FP32))
        want += alone.double() * wide.e4m3_gain(cuda_target(90), False) ** (2 - block)
    monkeypatch.setattr(wide, "target_for", lambda device: cuda_target(90))
    hopper = w4_matmul(q, view, None, poisoned(5, 128, dtype=FP32))
    torch.testing.assert_close(hopper.double(), want, rtol=2e-6, atol=1e-5)
    layer, view, q = operands("half", "exact", BF16, 5, n=128, k=512, rank=0)
    sums = [w4_matmul(q, view, None, poisoned(5, 128, dtype=FP32))]
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert relative(sums[0], w4_matmul(q, view, None, poisoned(5, 128, dtype=FP32))) < 1e-6


def test_kernel_refuses_five_segments(interpreter):
    layer, view, q = operands("e4m3", "fast", BF16, 2, n=640, k=128, segments=(0, 128, 256, 384, 512))
    with pytest.raises(ValueError, match="at most 4"):
        w4_matmul(q, view, None, torch.zeros(2, 640))


@pytest.mark.parametrize("form, wide", [("int8", False), ("e4m3", False), ("e4m3", True)])
def test_kernel_minus_eight_codes_only(interpreter, form, wide):
    layer = random_layer("int4", 128, 128, 0)
    layer = dataclasses.replace(layer, codes=torch.full_like(layer.codes, 8), scales=torch.ones_like(layer.scales))
    view = packed_view(layer, form)
    x = torch.full((2, 128), 7.0) * layer.smooth.float()
    out = w4_matmul(smooth_quantize(x, view, "exact", wide=wide), view, None, torch.zeros(2, 128))
    torch.testing.assert_close(out, torch.full((2, 128), -8.0 * 7 * 128), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind, mode", [("e4m3", "fast"), ("half", "exact"), ("int8", "fast")])
def test_kernel_endings(interpreter, kind, mode):
    layer, view, q = operands(kind, mode, BF16, 34, n=256, rank=16)
    nan = poisoned(34, 256)
    compare(q, view, layer.bias, nan.clone(), gelu_from=0)
    mixed = compare(q, view, layer.bias, nan.clone(), gelu_from=128)
    plain = compare(q, view, layer.bias, nan.clone())
    assert torch.equal(mixed[:, :128], plain[:, :128])
    gelu = F.gelu(plain[:, 128:].float(), approximate="tanh").bfloat16()
    assert relative(mixed[:, 128:], gelu) < 1e-3
    gate, residual = torch.randn(2, 256).to(BF16), torch.randn(34, 256).to(BF16)
    gated = compare(q, view, layer.bias, nan.clone(), gate=gate, residual=residual, rows_per_batch=17)
    batch = torch.arange(34) // 17
    assert torch.equal(gated, (residual.float() + gate.float()[batch] * plain.float()).bfloat16())
    old = torch.randn(34, 256).to(BF16)
    compare(q, view, layer.bias, old.clone(), accumulate=True)
    compare(q, view, None, old.clone(), accumulate=True, gate=gate, residual=residual, rows_per_batch=17)


def test_kernel_residual_may_be_out(interpreter):
    layer, view, q = operands("int8", "fast", BF16, 5, n=128, k=128)
    gate, x = torch.randn(1, 128).to(BF16), torch.randn(5, 128).to(BF16)
    want = w4_matmul(q, view, layer.bias, torch.empty_like(x), Finish(gate=gate, residual=x, rows_per_batch=5))
    assert torch.equal(w4_matmul(q, view, layer.bias, x, Finish(gate=gate, residual=x, rows_per_batch=5)), want)


def test_kernel_writes_a_slice_and_nothing_else(interpreter):
    layer, view, q = operands("nvfp4", "fast", FP16, 5)
    wide = torch.full((5, 3, 300), 7.0, dtype=FP16)
    compare(q, view, layer.bias, wide[:, 1, 50:250])
    assert (wide[:, ::2] == 7).all() and (wide[:, 1, :50] == 7).all() and (wide[:, 1, 250:] == 7).all()
    columns = torch.full((200, 5), float("nan"), dtype=FP16)
    compare(q, view, layer.bias, columns.t())
    modulation = torch.randn(2, 200, 3).to(FP16)
    residual = torch.randn(200, 5).to(FP16).t()
    compare(q, view, layer.bias, columns.t(), gate=modulation[:, :, 1], residual=residual, rows_per_batch=3)


@pytest.mark.parametrize("kind", ["e4m3", "half"])
def test_kernel_gives_the_same_bits_twice(interpreter, kind):
    layer, view, q = operands(kind, "exact", BF16, 17, n=128, k=256)
    a, b = (w4_matmul(q, view, layer.bias, torch.empty(17, 128, dtype=BF16)) for _ in range(2))
    assert torch.equal(a, b)


def test_norm_to_output_end_to_end(interpreter):
    """A modulated input through both kernels against both oracles."""
    torch.manual_seed(0)
    layer = random_layer("int4", 256, 256, 32, segments=(0, 128))
    view = packed_view(layer)
    x, norm = torch.randn(34, 256).to(BF16), Norm(torch.randn(2, 256).to(BF16), torch.randn(2, 256).to(BF16), 17)
    for mode in ("exact", "fast"):
        got = w4_matmul(smooth_quantize(x, view, mode, norm), view, layer.bias, torch.empty(34, 256, dtype=BF16))
        want = w4_matmul_torch(smooth_quantize_torch(x, view, mode, norm), view, layer.bias, torch.empty(34, 256, dtype=BF16))
        assert relative(got, want) < 3e-3


def test_a_block_of_inputs_may_be_short(wide):
    """1216 inputs: a whole block that shares a scale, and one of three groups."""
    layer, view, q = operands("e4m3", "fast", FP32, 5, k=1216)
    assert view.block_scale.shape[0] == 2
    compare(q, view, layer.bias, poisoned(5, 200, dtype=FP32))


def test_misfits_are_refused():
    layer, view, q = operands("e4m3", "fast", BF16, 5)
    out = torch.zeros(5, 200, dtype=BF16)
    for amax, first in ((torch.zeros(4), 0), (torch.zeros(5, dtype=BF16), 0), (torch.zeros(5), -1), (torch.zeros(5), 300)):
        with pytest.raises(ValueError, match="peak has"):
            w4_matmul(q, view, None, out, Finish(peak=Peak(amax, torch.ones(256), first=first)))
    with pytest.raises(ValueError, match=r"out has shape \[5, 128\], expected \[5, 200\]"):
        w4_matmul(q, view, None, out[:, :128])
    with pytest.raises(ValueError, match="both or neither"):
        w4_matmul(q, view, None, out, Finish(gate=torch.zeros(1, 200)))
    with pytest.raises(ValueError, match=r"gate has shape \[1, 200\], expected \[2, 200\]"):
        w4_matmul(q, view, None, out, Finish(gate=torch.zeros(1, 200), residual=out, rows_per_batch=3))
    with pytest.raises(ValueError, match="takes int4 or int8"):
        w4_matmul(q, packed_view(layer, "int8"), None, out)
    half = operands("half", "exact", BF16, 5)[2]
    assert torch.isfinite(w4_matmul(half, view, None, out)).all()
    with pytest.raises(ValueError, match="of kind 'half', a int4 layer in int8 form takes int4 or int8"):
        w4_matmul(half, packed_view(layer, "int8"), None, out)
    with pytest.raises(ValueError, match="of kind 'half', a nvfp4 layer in e2m1 form takes plain"):
        w4_matmul(half, packed_view(random_layer("nvfp4", 200, 192)), None, out)
    with pytest.raises(ValueError, match="256 columns, the layer has 384"):
        w4_matmul(q, packed_view(random_layer("int4", 200, 384)), None, out)


TARGETS = {"sm_86": cuda_target(86), "sm_89": cuda_target(89), "sm_90": cuda_target(90), "sm_120": cuda_target(120)}
TARGETS |= {"gfx942": hip_target("gfx942"), "gfx1201": hip_target("gfx1201")}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("rows", [1, 255, 256])
def test_quantize_for_takes_the_form_that_is_multiplied_fastest(monkeypatch, name, rows):
    import tonfa.kernels.w4_matmul as module

    monkeypatch.setattr(module, "target_for", lambda device: TARGETS[name])
    many = rows >= 256 and name.startswith("sm_")
    x, bf16 = torch.randn(rows, 128), random_layer("int4", 128, 128, 16)
    for form in ("int8", "e4m3"):
        view = packed_view(bf16, form)
        exact, fast = quantize_for(x, view, "exact"), quantize_for(x, view, "fast")
        assert (exact.kind, fast.kind) == ("half" if many and form == "e4m3" else "int4", form)
        assert takes_wide(exact.kind, view.spec, exact.codes.shape[0], TARGETS[name]) == (many and form == "e4m3")
        assert takes_wide(fast.kind, view.spec, fast.codes.shape[0], TARGETS[name]) == (form == "e4m3")
    view = packed_view(random_layer("nvfp4", 128, 128, 16))
    q = quantize_for(x, view, "exact")
    assert q.kind == "plain" and takes_wide(q.kind, view.spec, q.codes.shape[0], TARGETS[name]) == many


@pytest.mark.parametrize("form", ["int8", "e4m3"])
@pytest.mark.parametrize("outlier", [1, 50, 100])
def test_fast_is_at_most_half_as_wrong_as_exact(form, outlier):
    """Rounding of activations and of the unpacked weight together, against the fp64 product of the 4-bit weight; one channel larger."""
    layer = random_layer("int4", 256, 3072, 0)
    layer = dataclasses.replace(layer, smooth=torch.ones(3072, dtype=BF16))
    view = packed_view(layer, form)
    x = torch.randn(64, 3072, generator=torch.Generator().manual_seed(1))
    x[:, 1000] *= outlier
    x = x.to(BF16)
    want = x.double() @ dense_weight4(layer).double().t()
    errors = {}
    for name, mode, wide in (("exact", "exact", False), ("exact in 16 bit", "exact", True), ("fast", "fast", False)):
        q = smooth_quantize_torch(x, view, mode, wide=wide)
        errors[name] = relative(w4_matmul_torch(q, view, None, torch.empty(64, 256)), want)
    message = f"{form}, one channel x{outlier}: " + ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
    assert errors["fast"] <= 0.5 * errors["exact"], message
    assert abs(errors["exact in 16 bit"] - errors["exact"]) < 0.01 * errors["exact"], message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("precision", "mode", "many", "kind"),
    [("int4", "fast", False, "ratio"), ("int4", "exact", True, "scale"), ("nvfp4", "fast", True, "values")],
)
def test_a_weight_unpacked_before_gives_the_same_bits(interpreter, monkeypatch, precision, mode, many, kind, dtype):
    import tonfa.kernels.w4_matmul as module

    monkeypatch.setattr(module, "_many_rows", lambda rows, target: many)
    torch.manual_seed(0)
    layer = random_layer(precision, 200, 192, 16)
    view, x = packed_view(layer, "e4m3"), torch.randn(17, 192).to(dtype)
    q = quantize_for(x, view, mode)
    want = w4_matmul(q, view, layer.bias, torch.empty(17, 200, dtype=dtype))
    weight = unpack_for(view, mode, 17, dtype)
    assert getattr(weight, kind) is not None
    assert torch.equal(w4_matmul(q, view, layer.bias, torch.empty(17, 200, dtype=dtype), weight=weight), want)
    weight.values = torch.zeros_like(weight.values.view(torch.uint8)).view(weight.values.dtype)
    assert not torch.equal(w4_matmul(q, view, layer.bias, torch.empty(17, 200, dtype=dtype), weight=weight), want), "it is not used"


def test_nothing_is_unpacked_before_where_programs_unpack(interpreter):
    int4, nvfp4 = random_layer("int4", 128, 128, 16), random_layer("nvfp4", 128, 128, 16)
    assert unpack_for(packed_view(int4, "int8"), "fast", 17, torch.bfloat16) is None
    assert unpack_for(packed_view(int4, "e4m3"), "exact", 17, torch.bfloat16) is None
    assert unpack_for(packed_view(nvfp4), "fast", 17, torch.bfloat16) is None


def test_nothing_is_unpacked_before_on_the_cpu():
    assert unpack_for(packed_view(random_layer("int4", 128, 128, 16), "e4m3"), "fast", 512, torch.bfloat16) is None
