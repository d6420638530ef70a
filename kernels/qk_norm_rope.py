"""RMSNorm of every q and k head and RoPE behind it, in place on a fused qkv.

    x   = round(x / sqrt(mean(x^2) + eps) * scale)          per head of D, fp32 inside
    x'  = [pe00 x0 + pe01 x1, pe10 x0 + pe11 x1], rounded   per pair (x0, x1) = (x[2i], x[2i+1])

RMSNorm: arXiv 1910.07467. RoPE: arXiv 2104.09864, tables as FLUX makes them (a 2x2 matrix a pair). One read and one write of q and k;
nothing else is allocated. A program owns one token and all heads of q, or of k.
"""

from __future__ import annotations

from torch import Tensor

from . import qk_norm_rope_torch
from .rounding import INTERPRETED, round_to, tl, triton
from .targets import triton_reason

if triton is not None:

    @triton.jit
    def _qk_norm_rope_kernel(
        qkv, query_scale, key_scale, pe, length, stride_b, stride_l, pe_stride_b, eps,
        HEADS: tl.constexpr, BLOCK_H: tl.constexpr, D: tl.constexpr, INTERPRET: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0)
        which = tl.program_id(1)
        batch = (row // length).to(tl.int64)
        token = (row % length).to(tl.int64)
        pair = tl.arange(0, D // 2)
        head = tl.arange(0, BLOCK_H)
        live = (head < HEADS)[:, None] & (pair >= 0)[None, :]
        base = qkv + batch * stride_b + token * stride_l + which * HEADS * D
        at = base + head[:, None] * D + 2 * pair[None, :]
        x0 = tl.load(at, live, other=0.0).to(tl.float32)
        x1 = tl.load(at + 1, live, other=0.0).to(tl.float32)
        rstd = tl.rsqrt((tl.sum(x0 * x0, 1) + tl.sum(x1 * x1, 1)) / D + eps)[:, None]
        scale = query_scale if which == 0 else key_scale
        x0 = round_to(x0 * rstd * tl.load(scale + 2 * pair)[None, :], qkv.dtype.element_ty, INTERPRET)
        x1 = round_to(x1 * rstd * tl.load(scale + 2 * pair + 1)[None, :], qkv.dtype.element_ty, INTERPRET)
        table = pe + batch * pe_stride_b + token * (2 * D) + 4 * pair
        y0 = tl.load(table)[None, :] * x0 + tl.load(table + 1)[None, :] * x1
        y1 = tl.load(table + 2)[None, :] * x0 + tl.load(table + 3)[None, :] * x1
        tl.store(at, round_to(y0, qkv.dtype.element_ty, INTERPRET).to(qkv.dtype.element_ty), live)
        tl.store(at + 1, round_to(y1, qkv.dtype.element_ty, INTERPRET).to(qkv.dtype.element_ty), live)


def qk_norm_rope_(qkv: Tensor, query_scale: Tensor, key_scale: Tensor, pe: Tensor, heads: int, eps: float = 1e-6) -> Tensor:
    """In place on qkv [B, L, >= 2 * heads * D] (last dimension contiguous; q heads first, then k heads); returns it.

    query_scale, key_scale [D] fp32; pe [B|1, 1, L, D/2, 2, 2] fp32. D a power of two for the kernel; other sizes take the torch path.
    """
    dim = query_scale.shape[0]
    if triton_reason(qkv.device) is not None or dim & (dim - 1):
        return qk_norm_rope_torch.qk_norm_rope_(qkv, query_scale, key_scale, pe, heads, eps)
    batch, length = qkv.shape[:2]
    pe = pe.contiguous()
    _qk_norm_rope_kernel[(batch * length, 2)](
        qkv, query_scale.float().contiguous(), key_scale.float().contiguous(), pe, length, qkv.stride(0), qkv.stride(1),
        0 if pe.shape[0] == 1 else pe.stride(0), eps,
        HEADS=heads, BLOCK_H=triton.next_power_of_2(heads), D=dim, INTERPRET=INTERPRETED, num_warps=4,
    )  # fmt: skip
    return qkv
