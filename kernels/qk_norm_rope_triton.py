"""Triton kernel of qk_norm_rope_. One read and one write of q and k, nothing else allocated.

A program owns one token's q heads, or its k heads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .rounding import rounded, storable
from .targets import interpreting, launch_device


@triton.jit
def qk_norm_rope_kernel(
    qkv, query_scale, key_scale, pe, length, stride_b, stride_l, pe_stride_b, eps,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    row = tl.program_id(0)
    which = tl.program_id(1)
    batch = (row // length).to(tl.int64)
    token = (row % length).to(tl.int64)
    pair = tl.arange(0, D // 2)
    head = tl.arange(0, BLOCK_H)
    live = (head < HEADS)[:, None] & (pair >= 0)[None, :]
    at = qkv + batch * stride_b + token * stride_l + which * HEADS * D + head[:, None] * D + 2 * pair[None, :]
    x0 = tl.load(at, live, other=0.0).to(tl.float32)
    x1 = tl.load(at + 1, live, other=0.0).to(tl.float32)
    rstd = tl.rsqrt((tl.sum(x0 * x0, 1) + tl.sum(x1 * x1, 1)) / D + eps)[:, None]
    scale = query_scale + 2 * pair
    if which == 1:
        scale = key_scale + 2 * pair
    x0 = rounded(x0 * rstd * tl.load(scale)[None, :], DTYPE, EMULATE)
    x1 = rounded(x1 * rstd * tl.load(scale + 1)[None, :], DTYPE, EMULATE)
    if ROPE:
        table = pe + batch * pe_stride_b + token * (2 * D) + 4 * pair
        y0 = tl.load(table)[None, :] * x0 + tl.load(table + 1)[None, :] * x1
        y1 = tl.load(table + 2)[None, :] * x0 + tl.load(table + 3)[None, :] * x1
        x0 = y0
        x1 = y1
    tl.store(at, storable(x0, DTYPE, EMULATE), live)
    tl.store(at + 1, storable(x1, DTYPE, EMULATE), live)


def qk_norm_rope_triton(qkv: Tensor, query_scale: Tensor, key_scale: Tensor, pe: Tensor | None, heads: int, eps: float) -> Tensor:
    """In place on qkv; arguments as `qk_norm_rope_`, already checked."""
    batch, length = qkv.shape[:2]
    rope = pe is not None
    pe = pe.float().contiguous() if rope else query_scale  # a stand-in that is never read
    with launch_device(qkv.device):
        qk_norm_rope_kernel[(batch * length, 2)](
            qkv, query_scale.float().contiguous(), key_scale.float().contiguous(), pe, length, qkv.stride(0), qkv.stride(1),
            pe.stride(0) if rope and pe.shape[0] > 1 else 0, eps,
            HEADS=heads, BLOCK_H=triton.next_power_of_2(heads), D=query_scale.shape[0], ROPE=rope, EMULATE=interpreting(),
            num_warps=4, enable_fp_fusion=False,  # products rounded before they are added, as in the plain path: the same bits
        )  # fmt: skip
    return qkv
