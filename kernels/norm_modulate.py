"""LayerNorm without parameters, then modulation: m = LN(x) * (1 + scale) + shift, in fp32, rounded once.

Or RMSNorm (arXiv 1910.07467): m = x / sqrt(mean(x^2) + eps) * scale, the weight and 1 + the modulation being in scale already.

On the fused path the same arithmetic is the prologue of smooth_quantize; the kernel here (norm_modulate_triton.py) shares it, so that the
plain path has the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .targets import triton_reason


@dataclass(eq=False)
class Norm:
    """What precedes a quantised linear: row m of x is normalised, then modulated by row m // rows_per_batch of shift and scale [B, K].

    rms: RMSNorm in place of LayerNorm; scale is all that multiplies, and shift is None.
    """

    shift: Tensor | None
    scale: Tensor
    rows_per_batch: int
    eps: float = 1e-6
    rms: bool = False


def round_to(value: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 -> dtype, to nearest even; fp16 saturates at its largest number, because an infinity would spoil the whole group's scale."""
    if dtype == torch.float16:
        value = value.clamp(-65504.0, 65504.0)
    return value.to(dtype)


def batch_rows(values: Tensor, rows: int, rows_per_batch: int) -> Tensor:
    """fp32 view-like [rows, K] of per-batch values [B, K]: row m is values[m // rows_per_batch]."""
    values = values.float()
    if values.shape[0] == 1 or rows <= rows_per_batch:
        return values[:1]  # broadcasts
    return values.repeat_interleave(rows_per_batch, dim=0)[:rows]


def norm_modulate(x: Tensor, norm: Norm) -> Tensor:
    """x [M, K] of any strides, bf16, fp16 or fp32 -> [M, K] of the same type."""
    if triton_reason(x.device) is not None:
        return norm_modulate_torch(x, norm)
    from .norm_modulate_triton import norm_modulate_triton

    return norm_modulate_triton(x, norm)


def norm_modulate_torch(x: Tensor, norm: Norm) -> Tensor:
    """x [M, K] of any strides, bf16, fp16 or fp32 -> [M, K] of the same type. Biased variance, eps inside the root."""
    v, rows = x.float(), x.shape[0]
    scale = batch_rows(norm.scale, rows, norm.rows_per_batch)
    if norm.rms:
        return round_to(v * torch.rsqrt(v.square().mean(dim=1, keepdim=True) + norm.eps) * scale, x.dtype)
    centred = v - v.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1, keepdim=True)
    normed = centred * torch.rsqrt(variance + norm.eps)
    shift = batch_rows(norm.shift, rows, norm.rows_per_batch)
    return round_to(normed * (1.0 + scale) + shift, x.dtype)
