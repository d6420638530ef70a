"""norm_gate: the oracle against the formula in fp64, the kernel (interpreter) against the oracle."""

from __future__ import annotations

import pytest
import torch
from tonfa.kernels.norm_gate import norm_gate, norm_gate_torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ULP = {BF16: 2**-8, FP16: 2**-11, FP32: 2e-6}
EPS = 1e-5


def operands(rows, k, batches, dtype, gate_dtype=FP32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, k, generator=g).to(dtype) for _ in range(2))
    return x, y * 3, torch.randn(batches, k, generator=g).to(gate_dtype)


def formula(x, y, gate, rows_per_batch, eps=EPS):
    v = y.double()
    gate = gate.double()[torch.arange(x.shape[0]) // rows_per_batch]
    return x.double() + gate * v / (v.square().mean(1, keepdim=True) + eps).sqrt()


def assert_close(got, want, dtype):
    torch.testing.assert_close(got.double(), want, rtol=ULP[dtype] * 1.01, atol=1e-5)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_formula(dtype):
    x, y, gate = operands(12, 192, 3, dtype)
    got = norm_gate(x, y, gate, 4, EPS)
    assert got.dtype == dtype
    assert_close(got, formula(x, y, gate, 4), dtype)


@pytest.mark.parametrize("gate_dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("rows, k, per_batch", [(1, 128, 1), (5, 3840, 3), (7, 200, 7), (6, 1280, 2)])
def test_kernel_equals_oracle(interpreter, rows, k, per_batch, dtype, gate_dtype):
    """K and rows a batch of any size; a fp32 ulp may tip a rounding."""
    x, y, gate = operands(rows, k, -(-rows // per_batch), dtype, gate_dtype, seed=k)
    got, want = norm_gate(x, y, gate, per_batch, EPS), norm_gate_torch(x, y, gate, per_batch, EPS)
    assert got.dtype == dtype
    assert_close(got, formula(x, y, gate, per_batch), dtype)
    assert (got.float() - want.float()).norm() / want.float().norm() < (1e-6 if dtype == FP32 else 5e-4)


@pytest.mark.parametrize("kernel", [True, False])
def test_in_place_into_a_slice_and_types_that_differ(request, kernel):
    if kernel:
        request.getfixturevalue("interpreter")
    x, y, gate = operands(5, 200, 2, FP32)
    want = norm_gate(x, y.to(BF16), gate, 3, EPS)
    assert_close(want, formula(x, y.to(BF16), gate, 3), FP32)
    whole = torch.full((5, 260), 7.0)
    assert norm_gate(x, y.to(BF16), gate, 3, EPS, whole[:, 30:230]).data_ptr() == whole[:, 30:].data_ptr()
    assert torch.equal(whole[:, 30:230], want) and (whole[:, :30] == 7).all() and (whole[:, 230:] == 7).all()
    assert norm_gate(x, y.to(BF16), gate, 3, EPS, x) is x and torch.equal(x, want)


def test_windows_of_wider_tensors(interpreter):
    """Rows that lie apart, a gate cut out of a modulation; columns that lie apart take the torch path."""
    x, y, _ = operands(6, 320, 1, BF16)
    modulation = torch.randn(2, 4, 256, generator=torch.Generator().manual_seed(1))
    for shaped in (lambda t: t[:, 8:264], lambda t: t[:, 8:264].t().contiguous().t()):
        got = norm_gate(shaped(x), shaped(y), modulation[:, 2], 3, EPS)
        assert_close(got, formula(shaped(x), shaped(y), modulation[:, 2], 3), BF16)


@pytest.mark.parametrize("kernel", [True, False])
def test_rows_of_zeros_leave_x_and_fp16_saturates(request, kernel):
    if kernel:
        request.getfixturevalue("interpreter")
    for dtype in (BF16, FP16, FP32):
        x, y, gate = operands(3, 128, 1, dtype)
        y[1] = 0
        got = norm_gate(x, y, gate, 3, EPS)
        assert torch.equal(got[1], x[1]) and not torch.equal(got[0], x[0])
    x, y, gate = torch.full((1, 128), 6e4, dtype=FP16), torch.ones(1, 128, dtype=FP16), torch.full((1, 128), 6e4)
    assert (norm_gate(x, y, gate, 1, EPS) == 65504).all() and (norm_gate(-x, -y, gate, 1, EPS) == -65504).all()


def test_no_rows(interpreter):
    x, y, gate = operands(0, 128, 1, BF16)
    assert norm_gate(x, y, gate, 1, EPS).shape == (0, 128)


def test_misfits_are_named():
    x, y, gate = operands(4, 128, 2, BF16)
    with pytest.raises(ValueError, match="x has shape"):
        norm_gate(x, y[:3], gate, 2, EPS)
    with pytest.raises(ValueError, match=r"gate has shape \[2, 128\], expected \[4, 128\]"):
        norm_gate(x, y, gate, 1, EPS)
    with pytest.raises(ValueError, match="y is torch.int32"):
        norm_gate(x, y.int(), gate, 2, EPS)
    with pytest.raises(ValueError, match="out is"):
        norm_gate(x, y, gate, 2, EPS, torch.empty(4, 128))


def test_rows_fit_into_registers():
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton==3.6.0")
    from tonfa.kernels.norm_gate_triton import row_block

    for k in (1, 128, 640, 2048, 3840, 10240, 12288):
        block, warps = row_block(k)
        assert k <= block and block // (32 * warps) <= 32
    assert row_block(3840) == (4096, 4)
