"""Triton kernels of w4a16_linear: formula in w4a16_linear_torch.py; few rows of x, so no matrix instruction is worth its set-up.

A program keeps BN outputs of one row, and reads a group of the weight in runs of RUN codes. With 16 + code in the place of the code, which
takes two instructions, a run's share of y is

    scale * (sum((16 + code) * x) - 16 * sum(x)) + zero * sum(x)

so that scale and zero cost an eighth of what they would on every weight: instructions, not bytes, bound this kernel (36 us for 18432 x 3072
with both on every weight, 24 as it is, where the bytes would take 8). Further columns take a launch of their own for x @ down.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import PartView
from .rounding import has_pairs, storable
from .targets import interpreting, launch_device, target_for
from .w4_matmul_triton import FAR, check_segments, rank_step, segment_of

EXTRA_STARTS = ("xseg1", "xseg2", "xseg3")

DOWN_K, DOWN_WARPS = 4096, 16  # all of K at once: few programs, and the block waits for them
BN, SLICES, WARPS, RUN = 8, 8, 4, 8  # four warps share 1024 of K, so that a third of a block's outputs fills the machine too

# Four codes of a 32-bit word into the top of the mantissa of 16 + code: byte i of t above 16 bits of 0, under 0x41.
_ASM = """{{
    .reg .b32 t;
    {shift} t, $4, {by};
    and.b32 t, t, 0x78787878;
    or.b32 t, t, 0x80808080;
    prmt.b32 $0, t, 0x41, 0x4055;
    prmt.b32 $1, t, 0x41, 0x4155;
    prmt.b32 $2, t, 0x41, 0x4255;
    prmt.b32 $3, t, 0x41, 0x4355;
}}"""
_LOW, _HIGH = tl.constexpr(_ASM.format(shift="shl.b32", by=3)), tl.constexpr(_ASM.format(shift="shr.b32", by=1))


@triton.jit
def above_16(packed, HALF: tl.constexpr, PTX: tl.constexpr):
    """fp32 16 + code of one half of uint8 bytes."""
    if PTX:
        ASM: tl.constexpr = _LOW if HALF == 0 else _HIGH
        y = tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r", [packed], dtype=tl.float32, is_pure=True, pack=4)
    else:
        code = packed.to(tl.int32)
        bits = (code & 15) << 19 if HALF == 0 else (code & 240) << 15
        y = (bits | 0x41800000).to(tl.float32, bitcast=True)
    return y


@triton.jit
def _down(x, down, h, K, KP, RANKS, x_row, x_col, BK: tl.constexpr, RB: tl.constexpr):
    """h [M, RANKS] fp32 = x @ down; a program makes RB of a row."""
    row = tl.program_id(0).to(tl.int64)
    ranks = tl.program_id(1) * RB + tl.arange(0, RB)
    acc = tl.zeros((RB,), tl.float32)
    for k in range(0, KP, BK):
        cols = k + tl.arange(0, BK)
        v = tl.load(x + row * x_row + cols * x_col, mask=cols < K, other=0.0).to(tl.float32)
        d = tl.load(down + cols[:, None] * RANKS + ranks[None, :], mask=(cols < KP)[:, None], other=0.0).to(tl.float32)
        acc += tl.sum(v[:, None] * d, axis=0)
    tl.store(h + row * RANKS + ranks, acc)


@triton.jit(do_not_specialize=["FIRST", *EXTRA_STARTS])
def _w4a16_linear(
    x, codes, scales, zeros, bias, out, h, up, FIRST, N, NP, K, KP, x_row, x_col, h_row, rank, xseg1, xseg2, xseg3,
    XB: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr, S: tl.constexpr, RUN: tl.constexpr, PTX: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """Outputs FIRST to FIRST + N, S slices of 128 of K at once."""
    row = tl.program_id(0).to(tl.int64)  # rows first: they share what is read of the weight
    at = tl.program_id(1) * BN + tl.arange(0, BN)
    n = FIRST + at
    s = tl.arange(0, S)
    j = tl.arange(0, 64)
    codes_at = codes + n.to(tl.int64)[:, None, None] * (KP // 2) + s[None, :, None] * 64 + j[None, None, :]
    groups_at = 2 * s[None, :] * NP + n[:, None]
    cols = s[:, None] * 128 + j[None, :]
    acc = tl.zeros((BN, S, 64 // RUN), tl.float32)
    for k in range(0, KP, 128 * S):
        live = k + 128 * s < KP
        packed = tl.load(codes_at + k // 2, mask=live[None, :, None], other=0)
        for half in tl.static_range(2):
            group = (k // 64 + half) * NP
            scale = tl.load(scales + group + groups_at, mask=live[None, :], other=0.0).to(tl.float32)[:, :, None]
            zero = tl.load(zeros + group + groups_at, mask=live[None, :], other=0.0).to(tl.float32)[:, :, None]
            col = k + 64 * half + cols
            v = tl.load(x + row * x_row + col * x_col, mask=col < K, other=0.0).to(tl.float32)
            sums = tl.sum(tl.reshape(v, (S, 64 // RUN, RUN)), axis=2)[None, :, :]
            products = tl.reshape(above_16(packed, half, PTX) * v[None, :, :], (BN, S, 64 // RUN, RUN))
            acc += scale * tl.sum(products, axis=3) + (zero - 16.0 * scale) * sums
    y = tl.sum(tl.sum(acc, axis=2), axis=1)
    if XB > 0:
        seg = segment_of(FIRST + tl.program_id(1) * BN, xseg1, xseg2, xseg3)
        for r in range(0, rank, XB):
            ranks = r + tl.arange(0, XB)
            u = tl.load(up + n.to(tl.int64)[:, None] * rank + ranks[None, :]).to(tl.float32)
            y += tl.sum(tl.load(h + row * h_row + seg * rank + ranks)[None, :] * u, axis=1)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=at < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + at, storable(y, out.dtype.element_ty, EMULATE), mask=at < N)


def _lowrank(x: Tensor, part: PartView) -> Tensor:
    """fp32 [M, S * R]: x @ extra.down."""
    check_segments(part)
    down, (rows, k) = part.extra.down, x.shape
    h = torch.empty(rows, down.shape[1], dtype=torch.float32, device=x.device)
    with launch_device(x.device):
        _down[(rows, down.shape[1] // 16)](
            x, down, h, k, down.shape[0], down.shape[1], x.stride(0), x.stride(1), BK=DOWN_K, RB=16, num_warps=DOWN_WARPS
        )
    return h


def w4a16_linear_triton(x: Tensor, part: PartView, bias: Tensor | None, rows: range) -> Tensor:
    """Same arguments and result as w4a16_linear_torch. Operands must have been checked."""
    spec, m = part.spec, x.shape[0]
    out = torch.empty(m, len(rows), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    extra = part.extra
    h, rank, starts = out, 0, (FAR,) * 3
    if extra is not None:
        h, rank, starts = _lowrank(x, part), extra.up.shape[1], [*extra.segments[1:], *starts][:3]
    with launch_device(x.device):
        _w4a16_linear[(m, triton.cdiv(len(rows), BN))](
            x, part.codes, part.scales, part.zeros, out if bias is None else bias.contiguous(), out,
            h, out if extra is None else extra.up, rows.start, len(rows), spec.n_padded, spec.k, spec.k_padded, x.stride(0), x.stride(1),
            0 if extra is None else h.stride(0), rank, *starts, XB=rank_step(rank, 32),
            HAS_BIAS=bias is not None, BN=BN, S=SLICES, RUN=RUN,
            PTX=has_pairs(target_for(x.device)), EMULATE=interpreting(), num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    return out
