"""Triton kernel of norm_modulate; the formula is stated in norm_modulate.py. Row statistics and tiles are those of smooth_quantize."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .norm_modulate import Norm
from .rounding import rounded_finite, storable
from .smooth_quantize_triton import _load_rows, _modulation, _statistics
from .targets import interpreting, launch_device, target_for
from .tiles import quantize_tile


@triton.jit
def _norm_modulate(
    x, shift, scale, out, M, K, x_row, x_col, shift_row, scale_row, rows_per_batch, eps,
    EVEN_K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x.dtype.element_ty
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    mean, rstd = _statistics(x, rows, M, K, x_row, x_col, eps, EVEN_K, BM, BK)
    for k in range(0, K, BK):
        cols = k + tl.arange(0, BK)
        m = _load_rows(x, rows, cols, M, K, x_row, x_col, EVEN_K)
        factor = 1.0 + _modulation(scale, rows, cols, M, K, scale_row, rows_per_batch, False, EVEN_K)
        offset = _modulation(shift, rows, cols, M, K, shift_row, rows_per_batch, False, EVEN_K)
        m = rounded_finite((m - mean[:, None]) * rstd[:, None] * factor + offset, DTYPE, EMULATE)
        at = rows.to(tl.int64)[:, None] * K + cols[None, :]
        tl.store(out + at, storable(m, DTYPE, EMULATE), mask=(rows < M)[:, None] & (cols < K)[None, :])


def norm_modulate_triton(x: Tensor, norm: Norm) -> Tensor:
    """Same arguments and result as norm_modulate_torch."""
    rows, k = x.shape
    out = torch.empty(rows, k, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    tile = quantize_tile(target_for(x.device), x.dtype, k, True)
    shift, scale = (t if t.stride(1) == 1 else t.contiguous() for t in (norm.shift, norm.scale))
    with launch_device(x.device):
        _norm_modulate[(triton.cdiv(rows, tile.bm),)](
            x, shift, scale, out, rows, k, x.stride(0), x.stride(1), shift.stride(0), scale.stride(0),
            min(norm.rows_per_batch, rows), norm.eps,
            EVEN_K=k % tile.bk == 0, BM=tile.bm, BK=tile.bk, EMULATE=interpreting(), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out
