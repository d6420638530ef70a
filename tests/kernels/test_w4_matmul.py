"""w4_matmul: the oracle against fp64 formulas and the golden files, the kernel (interpreter) against the oracle."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tonfa.kernels.layout import SHIFT, LogicalLinear, dense_bias, dense_weight, dense_weight4
from tonfa.kernels.norm_modulate import Norm
from tonfa.kernels.smooth_quantize import smooth_quantize
from tonfa.kernels.smooth_quantize_torch import smooth_quantize_torch
from tonfa.kernels.w4_matmul import w4_matmul
from tonfa.kernels.w4_matmul_torch import dequantized_input, dequantized_weight, w4_matmul_torch

from .make_layers import packed_view, random_layer

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DATA = Path(__file__).parents[1] / "data"
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


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("form", ["int8", "e4m3"])
@pytest.mark.parametrize("name", GOLDENS)
def test_golden_through_both_ops(interpreter, name, form, mode):
    """Both kernels on the golden input: only activation rounding may stand between them and upstream's result."""
    layer, t = golden_layer(name)
    view = packed_view(layer, form)
    out = torch.full((8, layer.n), float("nan"))
    w4_matmul(smooth_quantize(t["x"], view, mode), view, layer.bias, out)
    error = relative(out, t["expected.y_weight_only"])
    limit = {"exact": 0.18, "fast": 0.04}[mode]  # the golden smooth vectors are random, so exact is worse than on calibrated ones
    if mode == "fast" and layer.precision == "nvfp4":
        limit = 1e-5  # x is fp32 and nothing is rounded
    assert error < limit
    if mode == "exact":
        assert error > 1e-3, "codes cannot be this good: the activations were not quantised"


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("kind", ["int8", "int8 unsigned", "e4m3", "e4m3 unsigned", "nvfp4"])
def test_oracle_is_the_formula(kind, mode):
    torch.manual_seed(0)
    form, unsigned = kind.split()[0], "unsigned" in kind
    layer = random_layer(
        "nvfp4" if form == "nvfp4" else "int4", 384, 256, 16, act_unsigned=unsigned, segments=(0, 128), channel_scale=form == "nvfp4"
    )
    view = packed_view(layer, "e4m3" if form == "nvfp4" else form)
    x = torch.randn(6, 256)
    q = smooth_quantize_torch(x, view, mode)
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


def operands(kind: str, mode: str, dtype, rows: int, *, n=200, k=192, rank=32, segments=(0,), seed=0):
    torch.manual_seed(seed)
    form, unsigned = kind.split()[0], "unsigned" in kind
    nvfp4 = form == "nvfp4"
    layer = random_layer("nvfp4" if nvfp4 else "int4", n, k, rank, act_unsigned=unsigned, segments=segments, channel_scale=nvfp4)
    view = packed_view(layer, "e4m3" if nvfp4 else form)
    return layer, view, smooth_quantize_torch(torch.randn(rows, k).to(dtype), view, mode)


def compare(q, view, bias, out, **options):
    """Kernel against oracle, each on its own copy of out. Returns the kernel's result."""
    want = out.clone()
    w4_matmul_torch(q, view, bias, want, **options)
    w4_matmul(q, view, bias, out, **options)
    limit = {FP32: 2e-5, FP16: 3e-4, BF16: 2e-3}[out.dtype]
    assert torch.isfinite(out).all()
    assert relative(out, want) < limit
    if out.dtype != FP32:  # the same number almost everywhere, never more than a rounding away
        same = (out == want) | ((out - want).abs() < 1e-5)  # far left of a GELU torch's own formula cancels to 0
        assert same.double().mean() > 0.97
    return out


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("kind", ["int8", "int8 unsigned", "e4m3", "e4m3 unsigned", "nvfp4"])
def test_kernel_equals_oracle(interpreter, kind, mode, dtype):
    layer, view, q = operands(kind, mode, dtype, 17)
    compare(q, view, layer.bias, torch.full((17, 200), float("nan"), dtype=dtype))


@pytest.mark.parametrize("kind", ["int8", "e4m3", "nvfp4"])
@pytest.mark.parametrize("rows", [1, 5, 33, 70])
def test_kernel_any_number_of_rows(interpreter, kind, rows):
    layer, view, q = operands(kind, "exact", BF16, rows, n=128, k=128, rank=16)
    compare(q, view, layer.bias.float(), torch.full((rows, 128), float("nan"), dtype=BF16))


@pytest.mark.parametrize("rank", [0, 10, 48, 128, 1024])
def test_kernel_ranks_and_segments(interpreter, rank):
    layer, view, q = operands("e4m3", "fast", BF16, 5, n=384, rank=rank, segments=(0, 128))
    compare(q, view, None, torch.full((5, 384), float("nan"), dtype=BF16))
    if rank == 10:
        layer, view, q = operands("int8", "exact", BF16, 5, n=512, rank=rank, segments=(0, 128, 256, 384))
        compare(q, view, layer.bias, torch.full((5, 512), float("nan"), dtype=BF16))


def test_kernel_refuses_five_segments(interpreter):
    layer, view, q = operands("e4m3", "fast", BF16, 2, n=640, k=128, segments=(0, 128, 256, 384, 512))
    with pytest.raises(ValueError, match="at most 4"):
        w4_matmul(q, view, None, torch.zeros(2, 640))


@pytest.mark.parametrize("form", ["int8", "e4m3"])
def test_kernel_minus_eight_codes_only(interpreter, form):
    layer = random_layer("int4", 128, 128, 0)
    layer = dataclasses.replace(layer, codes=torch.full_like(layer.codes, 8), scales=torch.ones_like(layer.scales))
    view = packed_view(layer, form)
    x = torch.full((2, 128), 7.0) * layer.smooth.float()
    out = w4_matmul(smooth_quantize(x, view, "exact"), view, None, torch.zeros(2, 128))
    torch.testing.assert_close(out, torch.full((2, 128), -8.0 * 7 * 128), rtol=1e-5, atol=0)


def test_kernel_endings(interpreter):
    layer, view, q = operands("e4m3", "fast", BF16, 34, n=256, rank=16)
    nan = torch.full((34, 256), float("nan"), dtype=BF16)
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
    want = w4_matmul(q, view, layer.bias, torch.empty_like(x), gate=gate, residual=x, rows_per_batch=5)
    assert torch.equal(w4_matmul(q, view, layer.bias, x, gate=gate, residual=x, rows_per_batch=5), want)


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


def test_kernel_gives_the_same_bits_twice(interpreter):
    layer, view, q = operands("e4m3", "exact", BF16, 17, n=128, k=256)
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


def test_misfits_are_refused():
    layer, view, q = operands("e4m3", "fast", BF16, 5)
    out = torch.zeros(5, 200, dtype=BF16)
    with pytest.raises(ValueError, match=r"out has shape \[5, 128\], expected \[5, 200\]"):
        w4_matmul(q, view, None, out[:, :128])
    with pytest.raises(ValueError, match="both or neither"):
        w4_matmul(q, view, None, out, gate=torch.zeros(1, 200))
    with pytest.raises(ValueError, match=r"gate has shape \[1, 200\], expected \[2, 200\]"):
        w4_matmul(q, view, None, out, gate=torch.zeros(1, 200), residual=out, rows_per_batch=3)
    with pytest.raises(ValueError, match="takes int4 or int8"):
        w4_matmul(q, packed_view(layer, "int8"), None, out)
    with pytest.raises(ValueError, match="256 columns, the layer has 384"):
        w4_matmul(q, packed_view(random_layer("int4", 200, 384)), None, out)
