"""Triton kernel of qk_norm_rope_. One read and one write of q and k, nothing else allocated.

A program owns one token's q heads, or its k heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rounding import rounded, storable
from .targets import interpreting, launch_device


@triton.jit(do_not_specialize=["length"])
def qk_norm_rope_kernel(
    qkv, query_scale, key_scale, pe, length, stride_b, stride_l, pe_stride_b, eps,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    row = tl.program_id(0)
    which = tl.program_id(1)
    batch = (row // length).to(tl.int64)
    token = (row % length).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    dim = tl.arange(0, D)
    live = (head < HEADS)[:, None] & (dim >= 0)[None, :]
    at = qkv + batch * stride_b + token * stride_l + which * HEADS * D + head[:, None] * D + dim[None, :]
    x = tl.load(at, live, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    scale = query_scale + dim
    if which == 1:
        scale = key_scale + dim
    x = rounded(x * rstd * tl.load(scale).to(tl.float32)[None, :], DTYPE, EMULATE)
    if ROPE:
        # Whole rows are loaded and stored; pairs are taken apart and the table's 2x2 matrices in registers.
        table = tl.load(pe + batch * pe_stride_b + token * (2 * D) + tl.arange(0, 2 * D)).to(tl.float32)
        left, right = tl.split(tl.reshape(table, (D // 2, 2, 2)))
        pe00, pe10 = tl.split(left)
        pe01, pe11 = tl.split(right)
        x0, x1 = tl.split(tl.reshape(x, (BLOCK_H, D // 2, 2)))
        y0 = pe00[None, :] * x0 + pe01[None, :] * x1
        y1 = pe10[None, :] * x0 + pe11[None, :] * x1
        x = tl.reshape(tl.join(y0, y1), (BLOCK_H, D))
    tl.store(at, storable(x, DTYPE, EMULATE), live)


_WIDENED = (torch.float32, torch.bfloat16, torch.float16)  # in registers, without a launch for it


def _scales(query_scale: Tensor, key_scale: Tensor) -> list[Tensor]:
    """Both contiguous and of one type that the kernel widens."""
    alike = query_scale.dtype == key_scale.dtype and query_scale.dtype in _WIDENED
    return [(scale if alike else scale.float()).contiguous() for scale in (query_scale, key_scale)]


def _table(pe: Tensor) -> tuple[Tensor, int]:
    """pe [B|1, 1, L, D/2, 2, 2] with the tokens' matrices one after another, and its stride from batch to batch."""
    pe = pe if pe.dtype in _WIDENED else pe.float()
    if not pe[0].is_contiguous():
        pe = pe.contiguous()
    return pe, pe.stride(0) if pe.shape[0] > 1 else 0


def qk_norm_rope_triton(qkv: Tensor, query_scale: Tensor, key_scale: Tensor, pe: Tensor | None, heads: int, eps: float) -> Tensor:
    """In place on qkv; arguments as `qk_norm_rope_`, already checked."""
    batch, length = qkv.shape[:2]
    table, table_stride = (query_scale, 0) if pe is None else _table(pe)  # without RoPE a stand-in that is never read
    with launch_device(qkv.device):
        qk_norm_rope_kernel[(batch * length, 2)](
            qkv, *_scales(query_scale, key_scale), table, length, qkv.stride(0), qkv.stride(1), table_stride, eps,
            HEADS=heads, BLOCK_H=triton.next_power_of_2(heads), D=query_scale.shape[0], ROPE=pe is not None, EMULATE=interpreting(),
            num_warps=4, enable_fp_fusion=False,  # products rounded before they are added, as in the plain path: the same bits
        )  # fmt: skip
    return qkv
