"""Triton kernels of t5_linear: formula in t5_linear_torch.py.

Up to FEW tokens: products are summed in fp32 where they arise; every packed byte is read once for up to four tokens.

More tokens: the weight is unpacked and torch multiplies it, two or three launches a linear: unpacked in pieces that stay in L2 it would be
less work for the GPU, but an encoding waits for the CPU. Its type is x's. The host gives T5 fp32 activations, which fp16 would overflow and
bf16 would shorten to 8 bits; so every row of x gets a power of two that brings its maximum to 2^14..2^15 and becomes fp16 (11 bits for
everything down to 2^-28 of the maximum), is multiplied by an fp16 weight into fp32, and gets its power back. Where torch cannot multiply
fp16 into fp32 (before 2.8, and not on CUDA) weight and product are fp32.

What rounding costs beside 4 bits (Gaussian weights, 4096 inputs, error of y 1.0e-1 by the codes themselves): fp16 weight and fp32 x as
above differ from the same codes in fp32 by 2.8e-4 and raise that error by less than 3e-5 of itself, bf16 weight and x by 2.4e-3 and less
than 3e-4. Nothing but bf16 callers gets a bf16 weight.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rounding import has_pairs, storable
from .t5_layout import GROUP, T5View
from .targets import interpreting, launch_device, target_for
from .tiles import linear_tile
from .w4a16_linear_triton import above_16

FEW = 8  # tokens
SLICES = 16  # slices of 128 weights that four warps unpack together: 8 bytes of codes a thread, which become two stores of 16 bytes


@triton.jit
def _weights(packed, HALF: tl.constexpr, scale, zero, PTX: tl.constexpr):
    """fp32 code * scale + zero of the low (HALF 0) or high nibbles of uint8 bytes."""
    return (above_16(packed, HALF, PTX) - 16.0) * scale + zero


@triton.jit
def _stored(x, DTYPE: tl.constexpr, PAIRS: tl.constexpr, EMULATE: tl.constexpr):
    """fp32 -> DTYPE for a store, two numbers an instruction where the target has it (LLVM converts them one by one)."""
    if PAIRS and tl.bfloat16 == DTYPE:
        y = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)
    elif PAIRS and tl.float16 == DTYPE:
        y = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2)
    else:
        y = storable(x, DTYPE, EMULATE)
    return y


@triton.jit
def _unpack_slices(packed, at, scales, zeros, out, slices, live, PAIRS: tl.constexpr, EMULATE: tl.constexpr):
    """packed uint8 [S, 64]: the codes of slices [S]; their 128 weights each go to `out`."""
    scale = tl.load(scales + slices, mask=live, other=0.0).to(tl.float32)[:, None]
    zero = tl.load(zeros + slices, mask=live, other=0.0).to(tl.float32)[:, None]
    low = _weights(packed, 0, scale, zero, PAIRS)
    high = _weights(packed, 1, scale, zero, PAIRS)
    tl.store(out + at, _stored(low, out.dtype.element_ty, PAIRS, EMULATE), mask=live[:, None])
    tl.store(out + at + 64, _stored(high, out.dtype.element_ty, PAIRS, EMULATE), mask=live[:, None])


@triton.jit
def _half_row(x, half, unit, row, K, x_row, x_col, BK: tl.constexpr):
    """A row of half = x / unit: powers of two, at least 2^-100, that bring each row's maximum to 2^14..2^15."""
    row = row.to(tl.int64)
    j = tl.arange(0, BK)
    largest = tl.zeros((BK,), tl.float32)
    for k in range(0, K, BK):
        largest = tl.maximum(largest, tl.abs(tl.load(x + row * x_row + (k + j) * x_col, mask=k + j < K, other=0.0)))
    exponent = tl.maximum((tl.max(largest).to(tl.int32, bitcast=True) >> 23) - 14, 27)  # as fp32 stores it, 127 more
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(unit + row, (exponent << 23).to(tl.float32, bitcast=True))
    for k in range(0, K, BK):
        v = tl.load(x + row * x_row + (k + j) * x_col, mask=k + j < K, other=0.0)
        tl.store(half + row * K + k + j, (v * inverse).to(tl.float16), mask=k + j < K)


@triton.jit(do_not_specialize=["M", "total"])
def _operands(
    x, half, unit, codes, scales, zeros, weight, M, K, total, x_row, x_col,
    BK: tl.constexpr, S: tl.constexpr, PAIRS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The first M programs make a row of half [M, K] and unit [M] each, the others all `total` slices of the weight, 2 * S each.

    Slices lie one behind another, rows do not matter.
    """
    if tl.program_id(0) < M:
        _half_row(x, half, unit, tl.program_id(0), K, x_row, x_col, BK)
    else:
        j = tl.arange(0, 64)[None, :]
        a = (tl.program_id(0) - M) * (2 * S) + tl.arange(0, S)
        b = a + S
        a_codes = tl.load(codes + a[:, None] * 64 + j, mask=(a < total)[:, None], other=0)
        b_codes = tl.load(codes + b[:, None] * 64 + j, mask=(b < total)[:, None], other=0)
        _unpack_slices(a_codes, a[:, None] * 128 + j, scales, zeros, weight, a, a < total, PAIRS, EMULATE)
        _unpack_slices(b_codes, b[:, None] * 128 + j, scales, zeros, weight, b, b < total, PAIRS, EMULATE)


@triton.jit(do_not_specialize=["M"])
def _few_tokens(
    x, codes, scales, zeros, bias, out, M, N, K, x_row, x_col,
    HAS_BIAS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, S: tl.constexpr, PAIRS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """BN outputs of BM tokens. A step takes S slices of 128 of K, whose loads are in flight together; S divides K / 128."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    j = tl.arange(0, 64)
    row_at = rows.to(tl.int64)[:, None] * x_row
    acc = tl.zeros((BM, BN, 64), tl.float32)
    for first in range(0, K // 128, S):
        for s in tl.static_range(S):
            slices = n * (K // 128) + first + s
            packed = tl.load(codes + slices[:, None] * 64 + j[None, :])
            scale = tl.load(scales + slices).to(tl.float32)[:, None]
            zero = tl.load(zeros + slices).to(tl.float32)[:, None]
            for half in tl.static_range(2):
                cols = (first + s) * 128 + half * 64 + j
                v = tl.load(x + row_at + cols[None, :] * x_col, mask=(rows < M)[:, None], other=0.0).to(tl.float32)
                acc += _weights(packed, half, scale, zero, PAIRS)[None, :, :] * v[:, None, :]
    y = tl.sum(acc, axis=2)
    if HAS_BIAS:
        y += tl.load(bias + n).to(tl.float32)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * N + n[None, :], storable(y, out.dtype.element_ty, EMULATE), mask=(rows < M)[:, None])


def operands(x: Tensor, view: T5View) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x [M, K], weight [N, K], unit fp32 [M, 1]): both of x's type and no unit, or both fp16, where the product counts in units."""
    spec, rows = view.spec, x.shape[0]
    short = x.dtype == torch.float32 and has_wide_product(x.device)
    weight = torch.empty(spec.n, spec.k, dtype=torch.float16 if short else x.dtype, device=x.device)
    half, unit, first, total = x, x, 0, spec.n * (spec.k // GROUP)
    if short:
        half, unit, first = x.new_empty(rows, spec.k, dtype=torch.float16), x.new_empty(rows, 1), rows
    with launch_device(x.device):
        _operands[(first + triton.cdiv(total, 2 * SLICES),)](
            x, half, unit, view.codes, view.scales, view.zeros, weight, first, spec.k, total, x.stride(0), x.stride(1),
            BK=2048, S=SLICES, PAIRS=has_pairs(target_for(x.device)), EMULATE=interpreting(), num_warps=4,
        )  # fmt: skip
    return half, weight, unit if short else None


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """fp16 x [M, K], fp16 weight [N, K] -> fp32 [M, N]."""
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


@lru_cache(maxsize=64)
def has_wide_product(device: torch.device) -> bool:
    """Whether torch multiplies fp16 into fp32 on this device."""
    try:
        ones = torch.ones(16, 16, dtype=torch.float16, device=device)
        return bool((wide_product(ones, ones) == 16).all())
    except torch.OutOfMemoryError:  # says nothing about torch: raised, so that lru_cache keeps no answer
        raise
    except Exception:  # an unknown argument, or a device without it
        return False


def _many_tokens(x: Tensor, view: T5View) -> Tensor:
    """x @ W^T."""
    x, weight, unit = operands(x, view)
    if unit is not None:
        return wide_product(x, weight).mul_(unit)
    return torch.mm(x, weight.t(), out=x.new_empty(x.shape[0], weight.shape[0]))  # with out, autocast leaves the types alone


def t5_linear_triton(x: Tensor, view: T5View, bias: Tensor | None = None) -> Tensor:
    """Same arguments and result as t5_linear_torch. Operands must have been checked."""
    (rows, k), n = x.shape, view.spec.n
    if rows > FEW:
        y = _many_tokens(x, view)
        return y if bias is None else y.add_(bias)
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    if rows:
        tile = linear_tile(target_for(x.device), rows)
        with launch_device(x.device):
            _few_tokens[(n // tile.bn, triton.cdiv(rows, tile.bm))](
                x, view.codes, view.scales, view.zeros, out if bias is None else bias.contiguous(), out, rows, n, k,
                x.stride(0), x.stride(1), HAS_BIAS=bias is not None, BN=tile.bn, BM=tile.bm, S=math.gcd(tile.bk, k) // 128,
                PAIRS=has_pairs(target_for(x.device)), EMULATE=interpreting(), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return out
