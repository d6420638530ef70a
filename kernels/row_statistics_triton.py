"""What the kernels on a quantised linear's input share: statistics of a row, modulation, division by smooth.

    mean = sum(x) / K
    rstd = 1 / sqrt(sum((x - mean)^2) / K + eps)
    m    = (x - mean) * rstd * (1 + scale) + shift, rounded to x's type; RMS: x * rstd * scale, the mean being 0
    v    = (m [+ SHIFT]) / smooth, rounded to x's type
    amax = max(|v|)

Mean and 1/std come from one kernel, because a sum's bits depend on how its terms lie over the threads, and the fused and the plain path
of a block must have the same bits. amax is found with a product in place of a division: it may be one ulp of x's type off where a quotient
lies on a tie, the same everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import SHIFT
from .norm_modulate import Norm
from .rounding import divided, has_pairs, inverse_of, rounded, rounded_pairs
from .targets import interpreting, launch_device, target_for

_SHIFT = tl.constexpr(SHIFT)


@triton.jit
def load_rows(x, rows, cols, M, K, x_row, x_col):
    """x in its own type, zeros outside."""
    at = rows.to(tl.int64)[:, None] * x_row + cols[None, :] * x_col
    return tl.load(x + at, mask=(rows < M)[:, None] & (cols < K)[None, :], other=0.0)


@triton.jit
def _modulation(values, rows, cols, M, K, row_stride, rows_per_batch, outside, ONE_BATCH: tl.constexpr):
    """fp32 [1, BK] or [BM, BK] of shift or scale."""
    if ONE_BATCH:
        batch = tl.min(rows, axis=0) // rows_per_batch
        at = batch.to(tl.int64) * row_stride + cols[None, :]
        mask = (cols < K)[None, :]
    else:
        at = (rows // rows_per_batch).to(tl.int64)[:, None] * row_stride + cols[None, :]
        mask = (cols < K)[None, :] & (rows < M)[:, None]
    return tl.load(values + at, mask=mask, other=outside).to(tl.float32)


@triton.jit
def load_moments(moments, rows, M, RMS: tl.constexpr):
    """(mean, rstd) of rows."""
    mean = tl.zeros(rows.shape, tl.float32)
    if not RMS:
        mean = tl.load(moments + rows, mask=rows < M, other=0.0)
    return mean, tl.load(moments + M + rows, mask=rows < M, other=0.0)


@triton.jit
def modulated(
    x, mean, rstd, shift, scale, rows, cols, M, K, shift_row, scale_row, rows_per_batch,
    RMS: tl.constexpr, ONE_BATCH: tl.constexpr, PTX: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """m of a tile of x, fp32 that holds numbers of x's type. The fma is explicit: every kernel must contract alike."""
    if RMS:
        factor = _modulation(scale, rows, cols, M, K, scale_row, rows_per_batch, 0.0, ONE_BATCH)
        offset = tl.zeros(factor.shape, tl.float32)
    else:
        factor = 1.0 + _modulation(scale, rows, cols, M, K, scale_row, rows_per_batch, -1.0, ONE_BATCH)  # 0 times whatever, behind K
        offset = _modulation(shift, rows, cols, M, K, shift_row, rows_per_batch, 0.0, ONE_BATCH)
    normed = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
    m = tl.fma(normed, tl.broadcast_to(factor, normed.shape), tl.broadcast_to(offset, normed.shape))
    if tl.float16 == x.dtype:  # saturates: an infinity would spoil the scale of its whole group
        m = tl.minimum(tl.maximum(m, -65504.0), 65504.0)
    return rounded_pairs(m, x.dtype, PTX, EMULATE)


@triton.jit
def smoothed(m, smooth, cols, K, DTYPE: tl.constexpr, UNSIGNED: tl.constexpr, PTX: tl.constexpr, EMULATE: tl.constexpr):
    """v rounded to the compute type (what fp16 cannot hold stays as it is: it becomes a code and a scale, which can)."""
    divisor = tl.load(smooth + cols[None, :], mask=(cols < K)[None, :], other=1.0)  # two axes: one row then has x's layout
    v = divided(m + _SHIFT if UNSIGNED else m, divisor, inverse_of(divisor, PTX), PTX, EMULATE)
    if UNSIGNED:
        v = tl.where((cols < K)[None, :], v, 0.0)
    y = rounded_pairs(v, DTYPE, PTX, EMULATE)
    if tl.float16 == DTYPE:
        y = tl.where(tl.abs(v) > 65504.0, v, y)
    return y


def one_batch(rows: int, rows_per_batch: int, block: int) -> bool:
    """True when every block of rows lies inside one batch."""
    return rows_per_batch >= rows or rows_per_batch % block == 0


def norm_arguments(norm: Norm | None, unused: Tensor, rows: int) -> tuple[Tensor, Tensor, int, int, int]:
    """(shift, scale, their row strides, rows per batch) as the kernels take them; `unused` stands in where there is no norm."""
    if norm is None:
        return unused, unused, 1, 1, 1
    scale = norm.scale if norm.scale.stride(1) == 1 else norm.scale.contiguous()
    if norm.rms:
        return unused, scale, 1, scale.stride(0), min(norm.rows_per_batch, rows)
    shift = norm.shift if norm.shift.stride(1) == 1 else norm.shift.contiguous()
    return shift, scale, shift.stride(0), scale.stride(0), min(norm.rows_per_batch, rows)


@triton.jit
def largest_smoothed(m, smooth, cols, K, DTYPE: tl.constexpr, UNSIGNED: tl.constexpr, PTX: tl.constexpr, EMULATE: tl.constexpr):
    """The largest |v| of every row of m, as `smoothed` makes v: rounding keeps an order, so one number of a row is rounded, not all."""
    divisor = tl.abs(tl.load(smooth + cols[None, :], mask=(cols < K)[None, :], other=1.0))
    m = tl.abs(m + _SHIFT if UNSIGNED else m)
    if EMULATE:
        v = tl.div_rn(m, tl.broadcast_to(divisor, m.shape))
    else:
        v = m * inverse_of(divisor, PTX)  # 2^-22 off, where a bf16 has 2^-9
    largest = tl.max(tl.where((cols < K)[None, :], v, 0.0) if UNSIGNED else v, axis=1)
    y = rounded(largest, DTYPE, EMULATE)
    if tl.float16 == DTYPE:
        y = tl.where(largest > 65504.0, largest, y)
    return y


@triton.jit(do_not_specialize=["M", "rows_per_batch"])
def _row_statistics(
    x, smooth, shift, scale, moments, amax, M, K, x_row, x_col, shift_row, scale_row, rows_per_batch, eps,
    NORM: tl.constexpr, RMS: tl.constexpr, AMAX: tl.constexpr, UNSIGNED: tl.constexpr, ONE_BATCH: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, REST: tl.constexpr, PTX: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Rows in registers, as BK and REST columns: the mean is taken off before anything is squared."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    live = rows < M
    cols = tl.arange(0, BK)
    more = BK + tl.arange(0, REST)
    a = load_rows(x, rows, cols, M, K, x_row, x_col)
    b = load_rows(x, rows, more, M, K, x_row, x_col)
    if NORM:
        if RMS:
            mean = tl.zeros((BM,), tl.float32)
        else:
            mean = (tl.sum(a.to(tl.float32), axis=1) + tl.sum(b.to(tl.float32), axis=1)) / K
        variance = (_squares(a, mean, cols, K) + _squares(b, mean, more, K)) / K
        rstd = tl.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(variance + eps))
        if not RMS:
            tl.store(moments + rows, mean, mask=live)
        tl.store(moments + M + rows, rstd, mask=live)
    if AMAX:
        if NORM:
            a = modulated(a, mean, rstd, shift, scale, rows, cols, M, K, shift_row, scale_row, rows_per_batch, RMS, ONE_BATCH, PTX, EMULATE)
            b = modulated(b, mean, rstd, shift, scale, rows, more, M, K, shift_row, scale_row, rows_per_batch, RMS, ONE_BATCH, PTX, EMULATE)
        first = largest_smoothed(a.to(tl.float32), smooth, cols, K, x.dtype.element_ty, UNSIGNED, PTX, EMULATE)
        second = largest_smoothed(b.to(tl.float32), smooth, more, K, x.dtype.element_ty, UNSIGNED, PTX, EMULATE)
        tl.store(amax + rows, tl.maximum(first, second), mask=live)


@triton.jit
def _squares(x, mean, cols, K):
    """Sum of (x - mean)^2 over the columns below K."""
    centred = tl.where((cols < K)[None, :], x.to(tl.float32) - mean[:, None], 0.0)
    return tl.sum(centred * centred, axis=1)


def row_tile(k: int) -> tuple[int, int, int]:
    """(BK, REST, warps) of a program that holds whole rows of k numbers: 48 a thread at FLUX's sizes, up to 72 at others."""
    width = max(triton.next_power_of_2(k), 512)
    rest = max(triton.next_power_of_2(max(k - width // 2, 1)), 128)
    return width // 2, rest, min(max(width // 2048, 1), 8)


def row_statistics_triton(x: Tensor, norm: Norm | None, smooth: Tensor | None, unsigned: bool = False) -> tuple[Tensor, Tensor]:
    """(moments fp32 [2, M], amax fp32 [M]) of x [M, K], M > 0.

    moments: mean (not for an RMS norm) and rstd of every row, undefined without a norm. amax: the largest |v|, undefined without smooth.
    """
    rows, k = x.shape
    moments = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    amax = torch.empty(rows, dtype=torch.float32, device=x.device)
    width, rest, warps = row_tile(k)
    block = 16 if interpreting() and rows > 64 else 1  # the interpreter's time is programs
    shift, scale, shift_row, scale_row, rows_per_batch = norm_arguments(norm, moments, rows)
    with launch_device(x.device):
        _row_statistics[(triton.cdiv(rows, block),)](
            x, moments if smooth is None else smooth, shift, scale, moments, amax,
            rows, k, x.stride(0), x.stride(1), shift_row, scale_row, rows_per_batch, 0.0 if norm is None else norm.eps,
            NORM=norm is not None, RMS=norm is not None and norm.rms, AMAX=smooth is not None, UNSIGNED=unsigned,
            ONE_BATCH=one_batch(rows, rows_per_batch, block), BM=block, BK=width, REST=rest,
            PTX=has_pairs(target_for(x.device)), EMULATE=interpreting(), num_warps=warps,
        )  # fmt: skip
    return moments, amax
