"""Triton kernel of smooth_quantize; every formula and output layout is stated in smooth_quantize_torch.py.

A program takes BM rows and walks along K in steps of BK. With a norm it first walks once for mean and variance (Chan's pairwise update,
which does not cancel); for e4m3 codes, whose scale belongs to the whole row, once more for the maximum: those re-reads come from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import SHIFT, PartView
from .norm_modulate import Norm
from .rounding import dot_split, e4m3_byte, e4m3_value, quotient, reciprocal, rne, rounded_finite, rounded_or_kept, storable
from .smooth_quantize_torch import QuantizedInput, plain_dtype
from .targets import interpreting, launch_device, target_for
from .tiles import quantize_tile

_SHIFT = tl.constexpr(SHIFT)


@triton.jit
def _load_rows(x, rows, cols, M, K, x_row, x_col, EVEN_K: tl.constexpr):
    mask = (rows < M)[:, None]
    if not EVEN_K:
        mask = mask & (cols < K)[None, :]
    at = rows.to(tl.int64)[:, None] * x_row + cols[None, :] * x_col
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _statistics(x, rows, M, K, x_row, x_col, eps, EVEN_K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Mean and 1/sqrt(variance + eps) of every row, fp32 [BM]."""
    mean = tl.zeros((BM,), tl.float32)
    squares = tl.zeros((BM,), tl.float32)  # sum of squared distances from the mean so far
    for k in range(0, K, BK):
        cols = k + tl.arange(0, BK)
        v = _load_rows(x, rows, cols, M, K, x_row, x_col, EVEN_K)
        count = tl.minimum(K - k, BK).to(tl.float32)
        seen = k.to(tl.float32) if not isinstance(k, int) else k * 1.0
        here = tl.sum(v, axis=1) / count
        centred = v - here[:, None]
        if not EVEN_K:
            centred = tl.where((cols < K)[None, :], centred, 0.0)
        delta = here - mean
        squares += tl.sum(centred * centred, axis=1) + delta * delta * (seen * count / (seen + count))
        mean += delta * (count / (seen + count))
    variance = squares / K
    return mean, tl.div_rn(tl.full((BM,), 1.0, tl.float32), tl.sqrt_rn(variance + eps))


@triton.jit
def _modulation(values, rows, cols, M, K, row_stride, rows_per_batch, ONE_BATCH: tl.constexpr, EVEN_K: tl.constexpr):
    """fp32 [1, BK] or [BM, BK] of shift or scale."""
    if ONE_BATCH:
        batch = tl.min(rows, axis=0) // rows_per_batch
        at = batch.to(tl.int64) * row_stride + cols[None, :]
        mask = (cols < K)[None, :]
    else:
        at = (rows // rows_per_batch).to(tl.int64)[:, None] * row_stride + cols[None, :]
        mask = (cols < K)[None, :] & (rows < M)[:, None]
    return tl.load(values + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _group_scales(v3, LARGEST: tl.constexpr):
    """amax / LARGEST of every group of v3 [BM, groups, width], and the same with 1 in place of 0."""
    amax = tl.max(tl.abs(v3), axis=2)
    scale = tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32))
    return scale, tl.where(scale > 0.0, scale, 1.0)


@triton.jit
def _e2m1(u):
    """0 <= u -> nearest e2m1 magnitude, ties to the even code, saturating at 6."""
    coarse = tl.where(u < 4.0, rne(u), 2.0 * rne(tl.minimum(u, 6.0) * 0.5))
    return tl.where(u < 2.0, 0.5 * rne(2.0 * tl.minimum(u, 6.0)), coarse)


@triton.jit
def _nvfp4(v, BM: tl.constexpr, BK: tl.constexpr, EMULATE: tl.constexpr):
    """v fp32 [BM, BK] -> e2m1 code times e4m3 group scale, fp32: 6 significant bits, exact in bf16 and fp16."""
    v3 = tl.reshape(v, (BM, BK // 16, 16))
    amax = tl.max(tl.abs(v3), axis=2)
    scale = tl.minimum(tl.div_rn(amax, tl.full(amax.shape, 6.0, tl.float32)), 448.0)
    safe = tl.where(scale > 0.0, scale, 1.0)
    ratio = quotient(tl.abs(v3), safe[:, :, None], reciprocal(safe)[:, :, None], EMULATE)
    magnitude = _e2m1(ratio) * e4m3_value(scale)[:, :, None]
    return tl.reshape(tl.where(v3 < 0, -magnitude, magnitude), (BM, BK))


@triton.jit
def _store_codes(
    codes, scales, v, row_scale, rows, cols, k, M, KP, KIND: tl.constexpr,
    LARGEST: tl.constexpr, BYTES: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Codes of one v tile [BM, BK] and, for groups of 64, their scales."""
    at = rows.to(tl.int64)[:, None] * KP + cols[None, :]
    mask = (rows < M)[:, None] & (cols >= 0)[None, :]
    if KIND == "plain":
        tl.store(codes + at, storable(v, codes.dtype.element_ty, EMULATE), mask=mask)
    elif KIND == "nvfp4":
        tl.store(codes + at, storable(_nvfp4(v, BM, BK, EMULATE), codes.dtype.element_ty, EMULATE), mask=mask)
    elif KIND == "e4m3":
        ratio = quotient(v, row_scale[:, None], reciprocal(row_scale)[:, None], EMULATE)
        tl.store(codes + at, e4m3_byte(ratio, EMULATE), mask=mask)
    else:
        v3 = tl.reshape(v, (BM, BK // 64, 64))
        scale, safe = _group_scales(v3, LARGEST)
        ratio = rne(quotient(v3, safe[:, :, None], reciprocal(safe)[:, :, None], EMULATE))
        LOWEST: tl.constexpr = 0.0 if LARGEST == 15 else -LARGEST * 1.0
        code = tl.reshape(tl.minimum(tl.maximum(ratio, LOWEST), LARGEST * 1.0), (BM, BK)).to(tl.int32)
        if BYTES:
            tl.store(codes + at, tl.where(code < 0, 128 - code, code).to(tl.uint8), mask=mask)
        else:
            tl.store(codes + at, code.to(tl.int8), mask=mask)
        groups = k // 64 + tl.arange(0, BK // 64)
        tl.store(scales + groups[None, :] * M + rows[:, None], scale, mask=(rows < M)[:, None] & (groups >= 0)[None, :])


@triton.jit
def _smooth_quantize(
    x, smooth, down, shift, scale, codes, scales, lowrank, M, K, KP, x_row, x_col, shift_row, scale_row, rows_per_batch, eps,
    KIND: tl.constexpr, LARGEST: tl.constexpr, BYTES: tl.constexpr, UNSIGNED: tl.constexpr, NORM: tl.constexpr, ONE_BATCH: tl.constexpr,
    EVEN_K: tl.constexpr, RANKS: tl.constexpr, RB: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Program (i, j): rows i*BM.. and columns j*RB.. of the low-rank product; programs with j = 0 also quantise."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    chunk = tl.program_id(1)
    mean = tl.zeros((BM,), tl.float32)
    rstd = tl.zeros((BM,), tl.float32)
    if NORM:
        mean, rstd = _statistics(x, rows, M, K, x_row, x_col, eps, EVEN_K, BM, BK)
    row_scale = tl.full((BM,), 1.0, tl.float32)
    PASSES: tl.constexpr = 2 if KIND == "e4m3" else 1
    ranks = chunk * RB + tl.arange(0, RB)
    h = tl.zeros((BM, RB), tl.float32)
    for step in tl.static_range(PASSES):
        amax = tl.zeros((BM,), tl.float32)
        for k in range(0, KP, BK):
            cols = k + tl.arange(0, BK)
            m = _load_rows(x, rows, cols, M, K, x_row, x_col, EVEN_K)
            if NORM:
                factor = 1.0 + _modulation(scale, rows, cols, M, K, scale_row, rows_per_batch, ONE_BATCH, EVEN_K)
                offset = _modulation(shift, rows, cols, M, K, shift_row, rows_per_batch, ONE_BATCH, EVEN_K)
                m = rounded_finite((m - mean[:, None]) * rstd[:, None] * factor + offset, DTYPE, EMULATE)
                if not EVEN_K:
                    m = tl.where((cols < K)[None, :], m, 0.0)
            divisor = tl.load(smooth + cols)
            v = quotient(m + _SHIFT if UNSIGNED else m, divisor[None, :], reciprocal(divisor)[None, :], EMULATE)
            v = rounded_or_kept(v, DTYPE, EMULATE)
            if not EVEN_K:
                v = tl.where((cols < K)[None, :], v, 0.0)
            if step == PASSES - 1:
                if RANKS > 0:
                    at = cols[:, None] * RANKS + ranks[None, :]
                    d = tl.load(down + at, mask=(ranks < RANKS)[None, :], other=0.0).to(tl.float32)
                    h = dot_split(m, d, h, tl.bfloat16 != DTYPE, tl.bfloat16 != down.dtype.element_ty, EMULATE)
                if chunk == 0:
                    _store_codes(codes, scales, v, row_scale, rows, cols, k, M, KP, KIND, LARGEST, BYTES, BM, BK, EMULATE)
            else:
                amax = tl.maximum(amax, tl.max(tl.abs(v), axis=1))
        if step < PASSES - 1:
            found = tl.div_rn(amax, tl.full((BM,), 448.0, tl.float32))
            if chunk == 0:
                tl.store(scales + rows, found, mask=rows < M)
            row_scale = tl.where(found > 0.0, found, 1.0)
    if RANKS > 0:
        at = rows.to(tl.int64)[:, None] * RANKS + ranks[None, :]
        tl.store(lowrank + at, h, mask=(rows < M)[:, None] & (ranks < RANKS)[None, :])


def kind_of(part: PartView, mode: str) -> tuple[str, str, int]:
    """(kind of the result, KIND of the kernel, largest code) of a part in a mode."""
    spec = part.spec
    if spec.precision == "nvfp4":
        return ("plain", "nvfp4", 0) if mode == "exact" else ("plain", "plain", 0)
    if mode == "exact":
        return "int4", "int", 15 if spec.act_unsigned else 7
    return ("int8", "int", 127) if spec.code_form == "int8" else ("e4m3", "e4m3", 0)


def _outputs(x: Tensor, part: PartView, kind: str) -> QuantizedInput:
    rows, kp = x.shape[0], part.spec.k_padded
    dtype = plain_dtype(x.dtype) if kind == "plain" else torch.uint8 if part.spec.code_form == "e4m3" else torch.int8
    shape = {"plain": None, "e4m3": (rows,)}.get(kind, (kp // 64, rows))
    scales = None if shape is None else torch.empty(shape, dtype=torch.float32, device=x.device)
    lowrank = None
    if part.down is not None:
        lowrank = torch.empty(rows, part.down.shape[1], dtype=torch.float32, device=x.device)
    return QuantizedInput(kind, torch.empty(rows, kp, dtype=dtype, device=x.device), scales, lowrank, x.dtype)


def rank_block(ranks: int, dtype: torch.dtype) -> int:
    """Columns of the low-rank product a program makes: more would spill registers beside a norm. Other types than bf16 take two dots."""
    return min(max(16, triton.next_power_of_2(ranks)), 64 if dtype == torch.bfloat16 else 32)


def _last_contiguous(values: Tensor) -> Tensor:
    return values if values.stride(1) == 1 else values.contiguous()


def smooth_quantize_triton(x: Tensor, part: PartView, mode: str, norm: Norm | None = None) -> QuantizedInput:
    """Same arguments, result and layouts as smooth_quantize_torch. Operands must have been checked."""
    kind, kernel_kind, largest = kind_of(part, mode)
    q = _outputs(x, part, kind)
    rows, k = x.shape
    if rows == 0:
        return q
    tile = quantize_tile(target_for(x.device), x.dtype, part.spec.k_padded, norm is not None)
    ranks = 0 if part.down is None else part.down.shape[1]
    columns = rank_block(ranks, x.dtype)
    shift = scale = part.smooth  # never read without a norm
    shift_row = scale_row = rows_per_batch = 1
    eps = 0.0
    if norm is not None:
        shift, scale, eps = _last_contiguous(norm.shift), _last_contiguous(norm.scale), norm.eps
        shift_row, scale_row, rows_per_batch = shift.stride(0), scale.stride(0), min(norm.rows_per_batch, rows)
    dummy = q.codes
    with launch_device(x.device):
        _smooth_quantize[(triton.cdiv(rows, tile.bm), max(1, triton.cdiv(ranks, columns)))](
            x, part.smooth, part.down if ranks else dummy, shift, scale, q.codes, dummy if q.scales is None else q.scales,
            dummy if q.lowrank is None else q.lowrank, rows, k, part.spec.k_padded, x.stride(0), x.stride(1), shift_row, scale_row,
            rows_per_batch, eps,
            KIND=kernel_kind, LARGEST=largest, BYTES=part.spec.code_form == "e4m3", UNSIGNED=part.spec.act_unsigned and mode == "exact",
            NORM=norm is not None, ONE_BATCH=rows_per_batch >= rows or rows_per_batch % tile.bm == 0, EVEN_K=k == part.spec.k_padded,
            RANKS=ranks, RB=columns, BM=tile.bm, BK=tile.bk, EMULATE=interpreting(),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return q
