"""Triton kernels of w4a16_linear: formula in w4a16_linear_torch.py; few rows of x, so no matrix instruction is worth its set-up.

A program keeps BN outputs of BM rows: every packed byte is read once for BM rows, products are summed in fp32 where they arise and
added up across lanes once at the end. Further columns take a launch of their own for x @ down, and little of the other's time.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import PartView
from .rounding import storable
from .targets import interpreting, launch_device, target_for
from .tiles import linear_tile
from .w4_matmul_triton import FAR, check_segments, rank_step, segment_of

EXTRA_STARTS = ("xseg1", "xseg2", "xseg3")


@triton.jit
def _weights(bits, scales, zeros, n, group, NP):
    """fp32 [BN, 64] of one group: code * scale + zero, bits = code << 19.

    The code goes into the top of the mantissa of 16 + code, because conversions of integers are slow; 16 * scale is taken off the zero.
    """
    scale = tl.load(scales + group * NP + n).to(tl.float32)
    zero = tl.load(zeros + group * NP + n).to(tl.float32)
    return (bits | 0x41800000).to(tl.float32, bitcast=True) * scale[:, None] + (zero - 16.0 * scale)[:, None]


@triton.jit
def _down(x, down, h, K, KP, RANKS, x_row, x_col, BK: tl.constexpr, RB: tl.constexpr):
    """h [M, RANKS] fp32 = x @ down; a program makes RB of a row."""
    row = tl.program_id(0).to(tl.int64)
    ranks = tl.program_id(1) * RB + tl.arange(0, RB)
    acc = tl.zeros((BK, RB), tl.float32)
    for k in range(0, KP, BK):
        cols = k + tl.arange(0, BK)
        v = tl.load(x + row * x_row + cols * x_col, mask=cols < K, other=0.0).to(tl.float32)
        acc += v[:, None] * tl.load(down + cols[:, None] * RANKS + ranks[None, :], mask=(cols < KP)[:, None], other=0.0).to(tl.float32)
    tl.store(h + row * RANKS + ranks, tl.sum(acc, axis=0))


@triton.jit(do_not_specialize=["M", *EXTRA_STARTS])
def _w4a16_linear(
    x, codes, scales, zeros, bias, out, h, up, M, N, NP, K, KP, x_row, x_col, h_row, rank, xseg1, xseg2, xseg3,
    XB: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, S: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """A step takes S slices of 128 of K, whose loads are in flight together; S divides KP / 128."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    j = tl.arange(0, 64)
    acc = tl.zeros((BM, BN, 64), tl.float32)
    row_at = rows.to(tl.int64)[:, None] * x_row
    for first in range(0, KP, 128 * S):
        for s in tl.static_range(S):
            k = first + 128 * s
            packed = tl.load(codes + n.to(tl.int64)[:, None] * (KP // 2) + (k // 2 + j)[None, :]).to(tl.int32)
            for half in tl.static_range(2):
                cols = k + 64 * half + j
                bits = (packed & 15) << 19 if half == 0 else (packed & 240) << 15
                w = _weights(bits, scales, zeros, n, k // 64 + half, NP)
                mask = (rows < M)[:, None] & (cols < K)[None, :]
                v = tl.load(x + row_at + cols[None, :] * x_col, mask=mask, other=0.0).to(tl.float32)
                acc += w[None, :, :] * v[:, None, :]
    y = tl.sum(acc, axis=2)
    if XB > 0:
        seg = segment_of(tl.program_id(0) * BN, xseg1, xseg2, xseg3)
        for r in range(0, rank, XB):
            ranks = r + tl.arange(0, XB)
            u = tl.load(up + n.to(tl.int64)[:, None] * rank + ranks[None, :]).to(tl.float32)
            left = tl.load(h + rows.to(tl.int64)[:, None] * h_row + (seg * rank + ranks)[None, :], mask=(rows < M)[:, None], other=0.0)
            y += tl.sum(left[:, None, :] * u[None, :, :], axis=2)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    mask = (rows < M)[:, None] & (n < N)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * N + n[None, :], storable(y, out.dtype.element_ty, EMULATE), mask=mask)


def _lowrank(x: Tensor, part: PartView) -> Tensor:
    """fp32 [M, S * R]: x @ extra.down."""
    check_segments(part)
    down, (rows, k) = part.extra.down, x.shape
    h = torch.empty(rows, down.shape[1], dtype=torch.float32, device=x.device)
    with launch_device(x.device):
        _down[(rows, down.shape[1] // 16)](
            x, down, h, k, down.shape[0], down.shape[1], x.stride(0), x.stride(1), BK=1024, RB=16, num_warps=8
        )
    return h


def w4a16_linear_triton(x: Tensor, part: PartView, bias: Tensor | None) -> Tensor:
    """Same arguments and result as w4a16_linear_torch. Operands must have been checked."""
    spec, rows = part.spec, x.shape[0]
    out = torch.empty(rows, spec.n, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    tile = linear_tile(target_for(x.device), rows)
    extra = part.extra
    h, rank, starts = out, 0, (FAR,) * 3
    if extra is not None:
        h, rank, starts = _lowrank(x, part), extra.up.shape[1], [*extra.segments[1:], *starts][:3]
    with launch_device(x.device):
        _w4a16_linear[(triton.cdiv(spec.n, tile.bn), triton.cdiv(rows, tile.bm))](
            x, part.codes, part.scales, part.zeros, out if bias is None else bias.contiguous(), out,
            h, out if extra is None else extra.up, rows, spec.n, spec.n_padded, spec.k, spec.k_padded, x.stride(0), x.stride(1),
            0 if extra is None else h.stride(0), rank, *starts, XB=rank_step(rank, 32),
            HAS_BIAS=bias is not None, BN=tile.bn, BM=tile.bm, S=math.gcd(tile.bk, spec.k_padded) // 128, EMULATE=interpreting(),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out
