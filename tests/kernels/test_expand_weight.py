"""expand_weight: the oracle against the layer's own codes and scales, the kernel (interpreter) against the oracle, bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tonfa.kernels.block_scale import BLOCK, block_scale
from tonfa.kernels.expand_weight_torch import expand_weight_torch
from tonfa.kernels.layout import code_values

from .make_layers import packed_view, random_layer

SHAPES = [(128, 128), (200, 320), (256, 1280)]


def int4(n: int, k: int, spread: float = 1.0):
    """A layer whose group scales differ by up to `spread` powers of e, with a row and a group of zero scale; its view; its weight."""
    torch.manual_seed(n)
    layer = random_layer("int4", n, k)
    scales = torch.exp((torch.rand(n, k // 64) - 0.5) * spread).mul(0.01).to(torch.bfloat16)
    scales[3], scales[5, 1] = 0, 0
    layer = dataclasses.replace(layer, scales=scales)
    return packed_view(layer, "e4m3"), code_values(layer.codes, "int4") * scales.float().repeat_interleave(64, 1)


def block_scales(ratio: torch.Tensor) -> torch.Tensor:
    """[Np, Kp or more]: what a value of each block is multiplied by in all."""
    return ratio.double().flip(0).cumprod(0).flip(0).t().repeat_interleave(BLOCK, 1)


@pytest.mark.parametrize("spread", [1.0, 8.0])
@pytest.mark.parametrize("n, k", SHAPES)
def test_e4m3_keeps_a_group_of_every_block_exact(interpreter, n, k, spread):
    from tonfa.kernels.expand_weight_triton import expand_weight_triton

    view, want = int4(n, k, spread)
    found, kernel = expand_weight_torch(view, "e4m3"), expand_weight_triton(view, "e4m3")
    assert torch.equal(kernel.values.float(), found.values.float())
    assert torch.equal(kernel.ratio, found.ratio)
    weight = (found.values.double() * block_scales(found.ratio)[:, : found.values.shape[1]])[:n, :k]
    assert torch.isfinite(weight).all()
    groups, wanted, scale = weight.view(n, -1, 64), want.double().view(n, -1, 64), view.scales.t().float()[:n, : k // 64]
    kept = scale == block_scale(scale).repeat_interleave(BLOCK // 64, 1)[:, : k // 64]
    blocks = torch.nn.functional.pad(kept, (0, -kept.shape[1] % (BLOCK // 64))).view(n, -1, BLOCK // 64)
    assert (blocks.any(2) | (torch.arange(n)[:, None] == 3)).all(), "row 3 is all zeros"
    torch.testing.assert_close(groups[kept], wanted[kept], rtol=1e-6, atol=0)
    error = float((weight - want).norm() / want.norm())
    assert 1e-3 < error < 0.025


def test_block_scales_lose_less_than_the_largest_would():
    torch.manual_seed(5)
    groups = torch.randn(400, 3072).view(400, -1, 64)
    scale = (groups.abs().amax(2) / 7).bfloat16().float()
    codes = (groups / scale[:, :, None]).round()

    def lost(e):
        f = 4 * scale / e.repeat_interleave(BLOCK // 64, 1)
        error = ((codes * f[:, :, None]).to(torch.float8_e4m3fn).float() / f[:, :, None] - codes) * scale[:, :, None]
        return float(error.norm() / (codes * scale[:, :, None]).norm())

    largest = scale.view(400, -1, BLOCK // 64).amax(2)
    assert lost(block_scale(scale)) < 0.0235 < 0.025 < lost(largest)
    wide = torch.tensor([[1e-6, 3.0, 1.0, 0.0] * 5])
    assert block_scale(wide).min() >= 3 / 8 and (block_scale(torch.zeros(2, 3)) == 1).all()


@pytest.mark.parametrize("spread", [1.0, 16.0])
@pytest.mark.parametrize("n, k", SHAPES)
def test_half_is_the_weight_to_eleven_bits(interpreter, n, k, spread):
    from tonfa.kernels.expand_weight_triton import expand_weight_triton

    view, want = int4(n, k, spread)
    found, kernel = expand_weight_torch(view, "half"), expand_weight_triton(view, "half")
    assert torch.equal(kernel.values, found.values) and torch.equal(kernel.scale, found.scale)
    assert found.values.dtype == torch.float16 and found.values.abs().max() <= 16
    weight = (found.values.double() * found.scale.double()[:, None])[:n, :k]
    assert float((weight - want).norm() / want.norm()) < 2**-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n, k", [(128, 128), (200, 192)])
def test_nvfp4_values_are_exact(interpreter, n, k, dtype):
    from tonfa.kernels.expand_weight_triton import expand_weight_triton

    layer = random_layer("nvfp4", n, k)
    view = packed_view(layer)
    want = code_values(layer.codes, "nvfp4") * layer.scales.float().repeat_interleave(16, 1)
    oracle = expand_weight_torch(view, "plain", dtype).values
    assert torch.equal(oracle[:n, :k].float(), want)
    assert torch.equal(expand_weight_triton(view, "plain", dtype).values, oracle)
