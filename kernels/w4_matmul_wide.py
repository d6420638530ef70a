"""w4_matmul for many tokens: unpack the weight into scratch, then a product of plain operands with everything behind it in its ending.

Unpacking inside the product stalls it in every step; outside it costs one pass over the weight (formula: w4_matmul_torch.py;
expand_weight_torch.py). Operands come through tensor descriptors (the copy engine where there is one). Group scales of INT4 weights, and of
exact activations, are applied to the sum of every 64 products: folding them into e4m3 operands would be faster (1.4x cuBLAS bf16 was
measured) but costs 6 dB in a whole sampling, because a weight's rounding is the same in every step.
A program makes an output tile [BM tokens, BN outputs].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .expand_weight_triton import expand_weight_triton
from .layout import PartView
from .rounding import dot_split
from .smooth_quantize_torch import QuantizedInput
from .targets import launch_device, target_for
from .tiles import wide_tile
from .w4_matmul_triton import check_segments, finish, launch_sizes, launch_switches


@triton.jit
def _lowrank(acc, lowrank, up, m, n, seg, ROWS: tl.constexpr, RANK: tl.constexpr, RB: tl.constexpr, EMULATE: tl.constexpr):
    """acc [BM, BN] + h @ up^T, h fp32 in two bf16 halves."""
    for r in tl.range(0, RANK, RB, num_stages=1):
        ranks = r + tl.arange(0, RB)
        u = tl.load(up + n[:, None] * RANK + ranks[None, :]).to(tl.float32)
        h = tl.load(lowrank + m.to(tl.int64)[:, None] * ROWS + (seg * RANK + ranks)[None, :])
        acc = dot_split(h, u.T, acc, True, tl.bfloat16 != up.dtype.element_ty, EMULATE)
    return acc


@triton.jit
def _dot(xd, wd, m0, n0, k, acc, EMULATE: tl.constexpr):
    x = xd.load([m0, k])
    w = wd.load([n0, k])
    if EMULATE:
        acc = tl.dot(x.to(tl.float32), w.to(tl.float32).T, acc, input_precision="ieee")
    else:
        acc = tl.dot(x, w.T, acc)
    return acc


@triton.jit
def _scaled_product(
    xd, wd, x_scales, scales, m0, n0, token, n, M, NP, KP, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EMULATE: tl.constexpr
):  # fmt: skip
    """[BM, BN]: sums of 64 products times the weight's group scale (GROUP: and the token's)."""
    acc = tl.zeros((BM, BN), tl.float32)
    w_scale = tl.load(scales + n).to(tl.float32)  # one step ahead: a scale loaded where it is used is waited for in every step
    if GROUP:
        x_scale = tl.load(x_scales + token)
    for k in range(0, KP, 64):
        ahead = tl.minimum(k // 64 + 1, KP // 64 - 1)
        next_w = tl.load(scales + ahead * NP + n).to(tl.float32)
        part = _dot(xd, wd, m0, n0, k, tl.zeros((BM, BN), tl.float32), EMULATE)
        if GROUP:
            next_x = tl.load(x_scales + ahead.to(tl.int64) * M + token)
            part *= x_scale[:, None]
            x_scale = next_x
        acc += part * w_scale[None, :]
        w_scale = next_w
    return acc


@triton.jit
def _w4_matmul_wide(
    xd, wd, x_scales, scales, lowrank, up, channel_scale, shift_bias, bias, out, residual, gate,
    M, N, NP, KP, out_row, out_col, residual_row, residual_col, gate_row, rows_per_batch, gelu_from, seg1, seg2, seg3,
    KIND: tl.constexpr, FOLD: tl.constexpr, RANK: tl.constexpr, RB: tl.constexpr, SEGMENTS: tl.constexpr,
    HAS_CHANNEL: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, GELU: tl.constexpr,
    GATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, PIECES: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """KIND: "plain" (16-bit operands, NVFP4), "row" (e4m3 activations with a scale a token), "group" (4-bit ones with a scale every 64)."""
    tiles_m = tl.cdiv(M, BM)
    band = GROUP_M * tl.cdiv(NP, BN)
    first = tl.program_id(0) // band * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = tl.program_id(0) % band
    m0 = (first + inside % height) * BM
    n0 = inside // height * BN
    m = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    token = tl.minimum(m, M - 1)  # rows past the end repeat the last one; nothing of them is stored
    if KIND == "plain":
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, KP, BK):
            acc = _dot(xd, wd, m0, n0, k, acc, EMULATE)
    else:
        acc = _scaled_product(xd, wd, x_scales, scales, m0, n0, token, n, M, NP, KP, KIND == "group", BM, BN, EMULATE)
        acc *= FOLD
    if KIND == "row":
        acc *= tl.load(x_scales + token)[:, None]
    if HAS_CHANNEL:
        acc *= tl.load(channel_scale + n)[None, :]
    if RANK > 0:
        seg = (n0 >= seg1).to(tl.int32) + (n0 >= seg2).to(tl.int32) + (n0 >= seg3).to(tl.int32)
        acc = _lowrank(acc, lowrank, up, token, n, seg, SEGMENTS * RANK, RANK, RB, EMULATE)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if HAS_SHIFT:
        acc += tl.load(shift_bias + n)[None, :]
    # The ending's loads and stores piece by piece: fewer registers at once.
    pieces = _pieces(acc, BM, BN, PIECES)
    for i in tl.static_range(PIECES):
        finish(
            pieces[i], out, residual, gate, n0 + i * (BN // PIECES) + tl.arange(0, BN // PIECES), m, M, N,
            out_row, out_col, residual_row, residual_col, gate_row, rows_per_batch, gelu_from, ACCUMULATE, GELU, GATE, EMULATE,
        )  # fmt: skip


@triton.jit
def _pieces(acc, BM: tl.constexpr, BN: tl.constexpr, PIECES: tl.constexpr):
    """acc [BM, BN] as PIECES (2 or 4) tensors of neighbouring columns."""
    left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
    if PIECES == 2:
        result = (left, right)
    else:
        a, b = tl.split(tl.permute(tl.reshape(left, (BM, 2, BN // 4)), (0, 2, 1)))
        c, d = tl.split(tl.permute(tl.reshape(right, (BM, 2, BN // 4)), (0, 2, 1)))
        result = (a, b, c, d)
    return result


def w4_matmul_wide(
    q: QuantizedInput,
    part: PartView,
    bias: Tensor | None,
    out: Tensor,
    *,
    accumulate: bool = False,
    gelu_from: int | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    rows_per_batch: int = 1 << 30,
) -> Tensor:
    """Same arguments and result as w4_matmul_torch, where the part is in code form e4m3 or NVFP4. Operands must have been checked.

    Raises ValueError for more than four segments.
    """
    spec, rows = part.spec, q.codes.shape[0]
    check_segments(spec)
    if rows == 0:
        return out
    kind = {"plain": "plain", "e4m3": "row", "int4": "group"}[q.kind]
    x = q.codes if kind == "plain" else q.codes.view(torch.float8_e4m3fn)
    tile = wide_tile(target_for(out.device), kind)
    rank = 0 if q.lowrank is None else spec.rank_padded
    shift = spec.act_unsigned and kind != "group"
    gate = gate if gate is None or gate.stride(1) == 1 else gate.contiguous()
    weight = expand_weight_triton(part, x.dtype)
    with launch_device(out.device):
        _w4_matmul_wide[(triton.cdiv(rows, tile.bm) * triton.cdiv(spec.n_padded, tile.bn),)](
            TensorDescriptor.from_tensor(x, [tile.bm, tile.bk]), TensorDescriptor.from_tensor(weight, [tile.bn, tile.bk]),
            out if kind == "plain" else q.scales, out if kind == "plain" else part.scales, q.lowrank if rank else out,
            part.up if rank else out, out if part.channel_scale is None else part.channel_scale, part.shift_bias if shift else out,
            out if bias is None else bias.contiguous(), out, out if residual is None else residual, out if gate is None else gate,
            *launch_sizes(spec, rows, out, residual, gate, rows_per_batch, gelu_from),
            KIND=kind, FOLD={"plain": 1.0, "row": 2.0**9, "group": 2.0**18}[kind], BM=tile.bm, BN=tile.bn, BK=tile.bk,
            PIECES=4 if tile.bn > 128 else 2, **launch_switches(part, rank, shift, bias, accumulate, gelu_from, gate),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out
