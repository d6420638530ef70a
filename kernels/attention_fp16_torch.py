"""Oracle of attention_fp16: exact attention through fp16 products that cannot overflow.

    unit(x)  a power of two for every head of x: the largest magnitude over it lies in 128..256, 1 where that is below it already
    s = (q / unit(q)) (k / unit(k))^T * unit(q) unit(k) / sqrt(D)                operands rounded to fp16, sums fp32
    p = exp(s - max_row(s))                                                      fp32; fp16 as an operand, fp32 in the sum below
    o = p (v / unit(v)) / sum_row(p) * unit(v)                                   sums fp32, rounded once

Powers of two change no significant bit, so bf16 inputs are held exactly unless they are 2^-22 of a head's largest. The softmax in tiles is
that of FlashAttention-2 (arXiv 2307.08691); this oracle does it at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

HEAD_DIMS = (32, 64, 128)
TOP = 8  # a head's largest magnitude is brought below 2^TOP: 128 products of two such are far from fp32's end, and one is exact in it


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless q is [B, H, L, D], k and v [B, H, S, D], all of one float type, D 32, 64 or 128."""
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, expected [B, H, L, D], [B, H, S, D] and the same")
    if not k.shape[2]:
        raise ValueError("there are no keys to attend to")
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"heads have {q.shape[3]} channels, expected 32, 64 or 128")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}, expected one of float16, bfloat16 and float32 for all")


def units(x: Tensor) -> Tensor:
    """fp32 [B, H, 1, 1]: powers of two, at least 1. Not finite values are left to the products."""
    largest = x.abs().amax((2, 3), keepdim=True).float() if x.shape[2] else x.new_zeros(*x.shape[:2], 1, 1, dtype=torch.float32)
    _, exponent = torch.frexp(torch.nan_to_num(largest, nan=0.0, posinf=1.0))  # largest < 2^exponent
    return torch.ldexp(torch.ones_like(largest), (exponent - TOP).clamp_min(0))


def attention_fp16_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H, L, D], k and v [B, H, S, D] -> [B, L, H * D] in q.dtype. Raises ValueError as check_attention."""
    check_attention(q, k, v)
    uq, uk, uv = units(q), units(k), units(v)
    a, b, c = ((x.float() / u).half().float() for x, u in ((q, uq), (k, uk), (v, uv)))
    s = a @ b.transpose(2, 3) * (uq * uk * q.shape[3] ** -0.5)
    p = torch.exp(s - s.amax(3, keepdim=True))
    o = p.half().float() @ c / p.sum(3, keepdim=True) * uv
    return o.to(q.dtype).transpose(1, 2).reshape(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])
