"""kernels/row_statistics_triton.py in the interpreter: moments against fp64, maxima against the oracle; how rows are cut into programs."""

from __future__ import annotations

import pytest
import torch
from tonfa.kernels.norm_modulate import Norm, norm_modulate_torch
from tonfa.kernels.smooth_quantize_torch import smoothed_torch

from .make_layers import packed_view, random_layer

pytest.importorskip("triton", reason="Triton is not installed: pip install triton==3.6.0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows, k", [(1, 128), (3, 200), (2, 3072), (2, 600), (70, 130)])
def test_moments(interpreter, dtype, rows, k):
    from tonfa.kernels.row_statistics_triton import row_statistics_triton

    torch.manual_seed(k)
    x = (torch.randn(k, rows) * 2 + 100).to(dtype).t()  # strided, and a mean that must not cancel the variance
    (mean, rstd), _ = row_statistics_triton(x, Norm(torch.zeros(1, k), torch.zeros(1, k), rows, 1e-6), None)
    torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=1e-6, atol=0)
    want = (x.double().var(1, unbiased=False) + 1e-6).rsqrt()
    torch.testing.assert_close(rstd.double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows, k", [(1, 128), (3, 200), (2, 3840), (70, 130)])
def test_rms_moments(interpreter, dtype, rows, k):
    """1/rms in place of 1/std; a row of zeros has a finite one."""
    from tonfa.kernels.row_statistics_triton import row_statistics_triton

    torch.manual_seed(k)
    x = (torch.randn(k, rows) * 2 + 3).to(dtype).t()
    x[0] = 0
    (_, rstd), _ = row_statistics_triton(x, Norm(None, torch.zeros(1, k), rows, 1e-5, rms=True), None)
    torch.testing.assert_close(rstd.double(), (x.double().square().mean(1) + 1e-5).rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("normed", ["", "layer", "rms"])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("rows, k", [(3, 192), (2, 640), (70, 192), (2, 3840)])
def test_maxima(interpreter, dtype, normed, unsigned, rows, k):
    """Of what the codes are made of; a norm's last bits may tip a rounding."""
    from tonfa.kernels.row_statistics_triton import row_statistics_triton

    torch.manual_seed(k)
    part = packed_view(random_layer("int4", 128, k))
    x = torch.randn(rows, k).to(dtype)
    shift, scale = torch.randn(2, k).to(dtype), torch.randn(2, k).to(dtype)
    norm = Norm(None if normed == "rms" else shift, scale, (rows + 1) // 2, rms=normed == "rms") if normed else None
    part.smooth[::2] *= -1  # no file's smooth is negative, but none is refused for it
    _, found = row_statistics_triton(x, norm, part.smooth, unsigned)
    v = smoothed_torch(x if norm is None else norm_modulate_torch(x, norm), part, unsigned, None)[1]
    torch.testing.assert_close(found, v.abs().amax(1), rtol=2**-7 if normed else 0, atol=0)


def test_whole_rows_waste_few_lanes():
    from tonfa.kernels.row_statistics_triton import row_tile

    for k in (128, 384, 640, 3072, 3840, 4096, 10240, 12288, 15360, 18432):
        width, rest, warps = row_tile(k)
        assert k <= width + rest <= max(2 * k, 512) and warps >= 1
        assert (width + rest) // (32 * warps) <= 128, "more numbers a thread would spill"
    assert row_tile(3072)[:2] == (2048, 1024) and row_tile(12288)[:2] == (8192, 4096)
