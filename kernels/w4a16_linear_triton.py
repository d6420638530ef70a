"""Triton kernel of w4a16_linear: y = x @ (code*scale + zero)^T + bias with few rows of x, so no matrix instruction is worth its set-up.

A program keeps BN outputs of BM rows: every packed byte is read once for BM rows, products are summed in fp32 where they arise and
added up across lanes once at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import PartView
from .rounding import storable
from .targets import interpreting, launch_device, target_for
from .tiles import linear_tile


@triton.jit
def _weights(nibbles, scales, zeros, n, group, NP):
    """fp32 [BN, 64] of one group."""
    scale = tl.load(scales + group * NP + n).to(tl.float32)
    zero = tl.load(zeros + group * NP + n).to(tl.float32)
    return nibbles.to(tl.float32) * scale[:, None] + zero[:, None]


@triton.jit
def _w4a16_linear(
    x, codes, scales, zeros, bias, out, M, N, NP, K, KP, x_row, x_col,
    HAS_BIAS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    j = tl.arange(0, 64)
    acc = tl.zeros((BM, BN, 64), tl.float32)
    row_at = rows.to(tl.int64)[:, None] * x_row
    for k in range(0, KP, 128):
        packed = tl.load(codes + n.to(tl.int64)[:, None] * (KP // 2) + (k // 2 + j)[None, :])
        for half in tl.static_range(2):
            cols = k + 64 * half + j
            w = _weights((packed >> (4 * half)) & 15, scales, zeros, n, k // 64 + half, NP)
            mask = (rows < M)[:, None] & (cols < K)[None, :]
            v = tl.load(x + row_at + cols[None, :] * x_col, mask=mask, other=0.0).to(tl.float32)
            acc += w[None, :, :] * v[:, None, :]
    y = tl.sum(acc, axis=2)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    mask = (rows < M)[:, None] & (n < N)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * N + n[None, :], storable(y, out.dtype.element_ty, EMULATE), mask=mask)


def w4a16_linear_triton(x: Tensor, part: PartView, bias: Tensor | None) -> Tensor:
    """Same arguments and result as w4a16_linear_torch. Operands must have been checked."""
    spec, rows = part.spec, x.shape[0]
    out = torch.empty(rows, spec.n, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    tile = linear_tile(target_for(x.device), rows)
    with launch_device(x.device):
        _w4a16_linear[(triton.cdiv(spec.n, tile.bn), triton.cdiv(rows, tile.bm))](
            x, part.codes, part.scales, part.zeros, out if bias is None else bias.contiguous(), out,
            rows, spec.n, spec.n_padded, spec.k, spec.k_padded, x.stride(0), x.stride(1),
            HAS_BIAS=bias is not None, BN=tile.bn, BM=tile.bm, EMULATE=interpreting(), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out
