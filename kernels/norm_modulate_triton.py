"""Triton kernel of norm_modulate; the formula is stated in norm_modulate.py. Statistics and arithmetic are those of smooth_quantize."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .norm_modulate import Norm
from .rounding import has_pairs, storable
from .row_statistics_triton import load_moments, load_rows, modulated, norm_arguments, one_batch, row_statistics_triton
from .targets import interpreting, launch_device, target_for

_BM, _BK = 4, 1024


@triton.jit(do_not_specialize=["M", "rows_per_batch"])
def _norm_modulate(
    x, shift, scale, moments, out, M, K, x_row, x_col, shift_row, scale_row, rows_per_batch,
    RMS: tl.constexpr, ONE_BATCH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PTX: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BK + tl.arange(0, BK)
    mean, rstd = load_moments(moments, rows, M, RMS)
    m = load_rows(x, rows, cols, M, K, x_row, x_col)
    m = modulated(m, mean, rstd, shift, scale, rows, cols, M, K, shift_row, scale_row, rows_per_batch, RMS, ONE_BATCH, PTX, EMULATE)
    at = rows.to(tl.int64)[:, None] * K + cols[None, :]
    tl.store(out + at, storable(m, x.dtype.element_ty, EMULATE), mask=(rows < M)[:, None] & (cols < K)[None, :])


def norm_modulate_triton(x: Tensor, norm: Norm, moments: Tensor | None = None) -> Tensor:
    """Same arguments and result as norm_modulate_torch. moments: those that row_statistics_triton found, where it was asked already."""
    rows, k = x.shape
    out = torch.empty(rows, k, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    if moments is None:
        moments, _ = row_statistics_triton(x, norm, None)
    shift, scale, shift_row, scale_row, rows_per_batch = norm_arguments(norm, out, rows)
    with launch_device(x.device):
        _norm_modulate[(triton.cdiv(rows, _BM), triton.cdiv(k, _BK))](
            x, shift, scale, moments, out, rows, k, x.stride(0), x.stride(1), shift_row, scale_row, rows_per_batch,
            RMS=norm.rms, ONE_BATCH=one_batch(rows, rows_per_batch, _BM), BM=_BM, BK=_BK, PTX=has_pairs(target_for(x.device)),
            EMULATE=interpreting(), num_warps=4,
        )  # fmt: skip
    return out
