"""kernels/norm_modulate.py against the formula in fp64."""

from __future__ import annotations

import pytest
import torch
from tonfa.kernels.norm_modulate import Norm, norm_modulate, norm_modulate_torch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_formula(dtype):
    torch.manual_seed(0)
    x = (torch.randn(12, 192) * 3 + 5).to(dtype)
    norm = Norm(torch.randn(3, 192).to(dtype), torch.randn(3, 192).to(dtype), rows_per_batch=4)
    v = x.double()
    want = (v - v.mean(1, keepdim=True)) / (v.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    batch = torch.arange(12) // 4
    want = want * (1 + norm.scale.double()[batch]) + norm.shift.double()[batch]
    got = norm_modulate(x, norm)
    assert got.dtype == dtype
    ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2e-6}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=ulp * 1.01, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_formula(dtype):
    """scale is all that multiplies: no 1 +, no mean, no shift."""
    torch.manual_seed(0)
    x = (torch.randn(12, 192) * 3 + 5).to(dtype)
    norm = Norm(None, torch.randn(3, 192), rows_per_batch=4, eps=1e-5, rms=True)
    v = x.double()
    want = v / (v.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.scale.double()[torch.arange(12) // 4]
    got = norm_modulate(x, norm)
    assert got.dtype == dtype
    ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2e-6}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=ulp * 1.01, atol=2e-5)


def test_one_batch_broadcasts_and_strides_do_not_matter():
    torch.manual_seed(0)
    wide = torch.randn(64, 10, 2)
    x = wide[:, :, 0].t()
    norm = Norm(torch.randn(1, 64), torch.randn(1, 64), rows_per_batch=10)
    assert not x.is_contiguous()
    torch.testing.assert_close(norm_modulate(x, norm), norm_modulate(x.contiguous(), norm), rtol=1e-5, atol=1e-5)


def test_fp16_saturates():
    x = torch.tensor([[0.0, 0.0, 0.0, 8.0]], dtype=torch.float16)
    norm = Norm(torch.zeros(1, 4), torch.full((1, 4), 6e4), rows_per_batch=1)
    assert norm_modulate(x, norm).abs().max() == 65504
    assert norm_modulate(x, Norm(None, norm.scale, 1, rms=True)).abs().max() == 65504


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows, k, per_batch", [(1, 128, 1), (37, 128, 37), (34, 200, 17), (4, 3840, 2)])
@pytest.mark.parametrize("rms", [False, True])
def test_kernel_equals_oracle(interpreter, rms, dtype, rows, k, per_batch):
    torch.manual_seed(rows)
    x = (torch.randn(rows, k + 8) * 2 + 1).to(dtype)[:, :k]
    shift, scale = torch.randn(2, rows // per_batch, k)
    norm = Norm(None, scale, per_batch, 1e-5, rms=True) if rms else Norm(shift.to(dtype), scale.to(dtype), per_batch)
    got, want = norm_modulate(x, norm), norm_modulate_torch(x, norm)
    assert got.dtype == dtype
    assert (got.float() - want.float()).norm() / want.float().norm() < (1e-6 if dtype == torch.float32 else 5e-4)
