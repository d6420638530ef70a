"""RMSNorm and RoPE of q and k: the oracle against a straight fp64 formula, the kernel (interpreter) against the oracle."""

import pytest
import torch
from tonfa.kernels.qk_norm_rope import qk_norm_rope_
from tonfa.kernels.qk_norm_rope_torch import qk_norm_rope_torch


def inputs(batch, length, heads, dim, dtype, extra=0, pe_batch=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, length, 3 * heads * dim + extra, generator=g).to(dtype)
    angle = torch.rand(pe_batch, 1, length, dim // 2, generator=g) * 6
    pe = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1).unflatten(-1, (2, 2))
    return qkv, torch.rand(dim, generator=g) + 0.5, torch.rand(dim, generator=g) + 0.5, pe


def formula(qkv, scales, pe, heads, eps=1e-6):
    """fp64, head by head, no rounding."""
    out, dim = qkv.double().clone(), scales[0].shape[0]
    for i, scale in enumerate(scales):
        for h in range(heads):
            at = slice((i * heads + h) * dim, (i * heads + h + 1) * dim)
            x = out[..., at]
            x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * scale.double()
            c, s = pe[:, 0, :, :, 0, 0].double(), pe[:, 0, :, :, 1, 0].double()
            even, odd = x[..., 0::2], x[..., 1::2]
            out[..., at] = torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2)
    return out


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)])
def test_oracle_is_the_formula(dtype, tolerance):
    qkv, q, k, pe = inputs(2, 5, 3, 64, dtype, extra=7)
    want = formula(qkv, (q, k), pe, 3)
    got = qk_norm_rope_torch(qkv.clone(), q, k, pe, 3)
    assert (got.double() - want).norm() / want.norm() < tolerance
    assert torch.equal(got[..., 2 * 3 * 64 :], qkv[..., 2 * 3 * 64 :]), "v and what follows it stay as they were"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch, pe_batch, heads, dim", [(1, 1, 2, 64), (2, 1, 3, 128), (2, 2, 1, 32)])
def test_kernel_equals_oracle(interpreter, dtype, batch, pe_batch, heads, dim):
    qkv, q, k, pe = inputs(batch, 5, heads, dim, dtype, extra=16, pe_batch=pe_batch)
    want = qk_norm_rope_torch(qkv.clone(), q, k, pe, heads)
    whole = qkv.clone()
    got = qk_norm_rope_(whole[..., : 3 * heads * dim], q, k, pe, heads)
    assert got.data_ptr() == whole.data_ptr(), "in place"
    difference = (whole.float() - want.float()).norm() / want.float().norm()
    assert difference < (1e-6 if dtype == torch.float32 else 2e-3)
    assert torch.equal(whole[..., 2 * heads * dim :], qkv[..., 2 * heads * dim :])


@pytest.mark.parametrize("pe_batch", [1, 2])
@pytest.mark.parametrize("change", [lambda t: t, lambda t: t.double(), lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2)])
def test_kernel_takes_any_table_and_scales(interpreter, change, pe_batch):
    """Tokens cut out of a longer table (as the image's are out of the block's), other types, other strides."""
    qkv, q, k, pe = inputs(2, 9, 2, 64, torch.float32, pe_batch=pe_batch)
    qkv, part = qkv[:, 3:8], pe[:, :, 3:8]
    want = qk_norm_rope_torch(qkv.clone(), q, k, part, 2)
    got = qk_norm_rope_(qkv.clone(), q.repeat_interleave(2)[::2], k.double(), change(pe)[:, :, 3:8], 2)
    assert (got - want).norm() / want.norm() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table", [torch.bfloat16, torch.float16])
def test_tables_and_scales_in_16_bit_are_widened_and_nothing_is_cast(interpreter, monkeypatch, table, dtype):
    """The same bits as from the same numbers in fp32; host tables come in the compute type."""
    qkv, q, k, pe = inputs(2, 9, 3, 64, dtype, pe_batch=2)
    (q, k, pe), qkv = (t.to(table) for t in (q, k, pe)), qkv[:, 3:8]
    part = pe[:, :, 3:8]
    assert not part.is_contiguous()
    want = qk_norm_rope_(qkv.clone(), q.float(), k.float(), part.float(), 3)
    given = qkv.clone()
    with monkeypatch.context() as patch:
        for name in ("float", "to", "contiguous"):
            real = getattr(torch.Tensor, name)

            def same(t, *arguments, real=real):
                assert real(t, *arguments) is t, "a launch that copies"
                return t

            patch.setattr(torch.Tensor, name, same)
        got = qk_norm_rope_(given, q, k, part, 3)
    assert torch.equal(got, want)
    oracle = qk_norm_rope_torch(qkv.clone(), q, k, part, 3)
    assert (got.float() - oracle.float()).norm() / oracle.float().norm() < (1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("eps", [1.19e-7, 1e-5])
def test_any_eps(interpreter, eps):
    """On heads so small that it is most of what is under the root."""
    qkv, q, k, pe = inputs(1, 5, 3, 64, torch.float32)
    qkv = qkv * eps**0.5 * 0.5
    want = formula(qkv, (q, k), pe, 3, eps)
    for got in (qk_norm_rope_(qkv.clone(), q, k, pe, 3, eps), qk_norm_rope_torch(qkv.clone(), q, k, pe, 3, eps)):
        assert (got.double() - want).norm() / want.norm() < 1e-6


def test_a_head_size_that_is_no_power_of_two_takes_the_torch_path():
    qkv, q, k, pe = inputs(1, 3, 2, 48, torch.float32)
    want = formula(qkv, (q, k), pe, 2)
    got = qk_norm_rope_(qkv.clone(), q, k, pe, 2)
    assert (got.double() - want).norm() / want.norm() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_positions_it_is_the_norm_alone(interpreter, dtype):
    qkv, q, k, pe = inputs(2, 5, 3, 64, dtype)
    still = torch.zeros_like(pe)
    still[..., 0, 0] = still[..., 1, 1] = 1
    want = qk_norm_rope_torch(qkv.clone(), q, k, still, 3)
    assert torch.equal(qk_norm_rope_torch(qkv.clone(), q, k, None, 3), want)
    got = qk_norm_rope_(qkv.clone(), q, k, None, 3)
    assert (got.float() - want.float()).norm() / want.float().norm() < 1e-3


def test_shapes_that_do_not_fit_are_named():
    qkv, q, k, pe = inputs(2, 5, 3, 64, torch.float32)
    with pytest.raises(ValueError, match="qkv has shape"):
        qk_norm_rope_(qkv, q, k, pe, 6)
    with pytest.raises(ValueError, match="pe has shape"):
        qk_norm_rope_(qkv, q, k, pe[:, :, :4], 3)
