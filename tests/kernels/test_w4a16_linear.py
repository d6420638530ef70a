"""w4a16_linear: the oracle against the golden modulation layers and fp64, the kernel (interpreter) against the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tonfa.kernels.layout import LogicalLinear, dense_weight
from tonfa.kernels.w4a16_linear import w4a16_linear
from tonfa.kernels.w4a16_linear_torch import w4a16_linear_torch

from .make_layers import packed_view, random_layer, with_columns

DATA = Path(__file__).parents[1] / "data"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", ["awq_mod3_384x192", "awq_mod6_768x128"])
def test_golden_weight_and_result(interpreter, name):
    """Upstream's converter takes zero = 7: wzeros = -7 * wscales."""
    t = load_file(DATA / f"{name}.safetensors")
    scale = t["logical.scale"]
    layer = LogicalLinear("w4a16", t["logical.codes"], scale, zeros=-7 * scale, bias=t["logical.bias"])
    weight = t["expected.w_dequant"]
    torch.testing.assert_close(dense_weight(layer), weight, rtol=1e-2, atol=1e-3)  # upstream's product is 16-bit
    x = torch.randn(2, layer.k, generator=torch.Generator().manual_seed(0))
    want = x.double() @ dense_weight(layer).double().t() + layer.bias.double()
    assert relative(w4a16_linear(x, packed_view(layer), layer.bias), want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_kernel_oracle_and_formula_agree(interpreter, rows, dtype):
    torch.manual_seed(0)
    layer = random_layer("w4a16", 200, 320, scale_dtype=torch.float16 if rows == 2 else torch.bfloat16)
    view, x = packed_view(layer), torch.randn(rows, 320).to(dtype)
    formula = x.double() @ dense_weight(layer).double().t() + layer.bias.double()
    want = w4a16_linear_torch(x, view, layer.bias)
    got = w4a16_linear(x, view, layer.bias)
    assert got.dtype == want.dtype == dtype and got.shape == (rows, 200)
    limit = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-6}[dtype]
    assert relative(want, formula) < limit and relative(got, formula) < limit
    assert (got == want).double().mean() > (0.95 if dtype != torch.float32 else 0)
    assert relative(w4a16_linear(x, view, None), formula - layer.bias.double()) < 2 * limit


@pytest.mark.parametrize("rank, segments", [(16, (0,)), (48, (0, 128))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_further_columns(interpreter, rank, segments, dtype):
    torch.manual_seed(0)
    view, x = packed_view(random_layer("w4a16", 200, 1088)), torch.randn(3, 1088).to(dtype)
    bare = w4a16_linear_torch(x.float(), view, None)
    extra = with_columns(view, rank, segments, dtype).extra
    downs, ends = extra.down.double().split(rank, 1), (*segments[1:], 200)
    parts = [x.double() @ down[:1088] @ extra.up[a:b].double().t() for down, a, b in zip(downs, segments, ends, strict=True)]
    got, oracle = w4a16_linear(x, view, None), w4a16_linear_torch(x, view, None)
    for y in (got, oracle):
        assert relative(y.float() - bare, torch.cat(parts, 1)) < (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("extra", [False, True])
def test_some_outputs_are_those_of_all(interpreter, extra):
    """Bit for bit: a block makes its modulation in two pieces."""
    torch.manual_seed(0)
    layer = random_layer("w4a16", 384, 320)
    view, x = packed_view(layer), torch.randn(2, 320).bfloat16()
    if extra:
        view = with_columns(view, 32, (0, 128, 256), torch.bfloat16)
    whole = w4a16_linear(x, view, layer.bias)
    for rows in (range(0, 136), range(144, 384), range(112, 112), range(368, 379)):
        got = w4a16_linear(x, view, layer.bias, rows)
        assert got.shape == (2, len(rows)) and torch.equal(got, whole[:, rows.start : rows.stop])
        assert torch.equal(
            w4a16_linear_torch(x, view, layer.bias, rows), w4a16_linear_torch(x, view, layer.bias)[:, rows.start : rows.stop]
        )


def test_kernel_strided_input(interpreter):
    torch.manual_seed(0)
    view = packed_view(random_layer("w4a16", 128, 128))
    wide = torch.randn(128, 6)
    x = wide.t()[::2]
    torch.testing.assert_close(w4a16_linear(x, view, None), w4a16_linear_torch(x.contiguous(), view, None), rtol=1e-5, atol=1e-5)


def test_misfits_are_refused():
    with pytest.raises(ValueError, match=r"expected \[M, 128\]"):
        w4a16_linear(torch.zeros(1, 64), packed_view(random_layer("w4a16", 128, 128)), None)
    with pytest.raises(ValueError, match="expected w4a16"):
        w4a16_linear(torch.zeros(1, 128), packed_view(random_layer("int4", 128, 128)), None)
    for rows in (range(8, 16), range(0, 136), range(0, 128, 2)):
        with pytest.raises(ValueError, match="from a multiple of 16 on"):
            w4a16_linear(torch.zeros(1, 128), packed_view(random_layer("w4a16", 128, 128)), None, rows)
