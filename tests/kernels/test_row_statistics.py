"""kernels/row_statistics_triton.py in the interpreter: moments against fp64; how rows are cut into programs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton==3.6.0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows, k", [(1, 128), (3, 200), (2, 3072), (2, 600)])
def test_moments(interpreter, dtype, rows, k):
    from tonfa.kernels.row_statistics_triton import row_moments_triton

    torch.manual_seed(k)
    x = (torch.randn(k, rows) * 2 + 100).to(dtype).t()  # strided, and a mean that must not cancel the variance
    mean, rstd = row_moments_triton(x, 1e-6)
    torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=1e-6, atol=0)
    want = (x.double().var(1, unbiased=False) + 1e-6).rsqrt()
    torch.testing.assert_close(rstd.double(), want, rtol=1e-4, atol=0)


def test_whole_rows_waste_no_lanes_at_flux_sizes():
    from tonfa.kernels.smooth_quantize_triton import quantize_tile

    for k in (128, 384, 640, 3072, 4096, 12288, 15360, 18432):
        width, rest, warps = quantize_tile(k, whole_rows=True)
        assert width + rest >= k and warps >= 1
        assert rest == 0 or width >= rest
    assert quantize_tile(3072, True)[:2] == (2048, 1024) and quantize_tile(12288, True)[:2] == (8192, 4096)
