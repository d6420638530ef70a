"""w4_matmul for many tokens: unpack the weight into scratch, then a product of plain operands with everything behind it in its ending.

Unpacking inside the product stalls it in every step; outside it costs one pass over the weight. The formulas are in w4_matmul_torch.py and
expand_weight_torch.py. Operands come through tensor descriptors where there is a copy engine, else through pointers. As in
w4_matmul_triton.py the weight is the left operand: y^T = W x^T, so that what belongs to a weight row is a number or two for a thread.

Group scales of "row" products: the accumulator itself is multiplied by ratio[p] behind every BLOCK of K, which needs no second accumulator.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .block_scale import BLOCK
from .expand_weight_torch import ExpandedWeight
from .expand_weight_triton import expand_weight_triton
from .layout import PartView
from .rounding import has_pairs, held, in_registers, rounded, settled
from .row_statistics_triton import largest_smoothed
from .smooth_quantize_torch import QuantizedInput
from .targets import Target, launch_device, target_for
from .tiles import Tile, wide_bands
from .w4_matmul_torch import Finish
from .w4_matmul_triton import (
    SEGMENT_STARTS,
    check_segments,
    extra_rank,
    finish_rows,
    launch_sizes,
    launch_switches,
    logical_rows,
    rank_step,
    segment_of,
    swiglu_rows,
    unit_gate,
)

# Hopper adds e4m3 products to its accumulator with about 14 bits and truncates. With inputs of both signs the sum so far shrinks by that,
# with those of a GELU, nearly all of one sign, it grows (measured on an H200). This share of it, per 256 products, is given back with every
# scaling; at K 12288 errors are then 2.7e-3 to 2.8e-3. (5e-5 for both signs left 3.03e-3 with one token.)
HOPPER_E4M3_LOSS = {"signed": 1.2e-5, "unsigned": -3.5e-5}
GROUP_M = {"row": 16, "half": 8, "plain": 8}
MOST_HELD = 32  # ranks whose operands fit in registers beside the accumulator


@triton.jit
def _dot(w_from, x_from, n, m, KP, k, acc, COPY_ENGINE: tl.constexpr, BK: tl.constexpr, EMULATE: tl.constexpr):
    """acc + W[n, k : k + BK] @ X[m, k : k + BK]^T. n, m: first rows for tensor descriptors, else all rows."""
    if COPY_ENGINE:
        w = w_from.load([n, k])
        x = x_from.load([m, k])
    else:
        cols = k + tl.arange(0, BK)[None, :]
        w = tl.load(w_from + n.to(tl.int64)[:, None] * KP + cols)
        x = tl.load(x_from + m.to(tl.int64)[:, None] * KP + cols)
    if EMULATE:
        acc = tl.dot(w.to(tl.float32), x.to(tl.float32).T, acc, input_precision="ieee")
    else:
        acc = tl.dot(w, x.T, acc)
    return acc


@triton.jit
def _lowrank_operands(up, lowrank, n, m, seg, r, h_row, rank, RB: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Ranks r to r + RB of up [BN, RB] and of the low-rank activation [BM, RB]. n, m: first rows for tensor descriptors, else all rows."""
    if DESCRIPTORS:
        u = up.load([n, r])
        h = lowrank.load([m, seg * rank + r])
    else:
        ranks = r + tl.arange(0, RB)[None, :]
        u = tl.load(up + n.to(tl.int64)[:, None] * rank + ranks)
        h = tl.load(lowrank + m.to(tl.int64)[:, None] * h_row + seg * rank + ranks)
    return u, h


@triton.jit
def _lowrank_dot(u, h, acc, TF32: tl.constexpr, COPY_ENGINE: tl.constexpr, EMULATE: tl.constexpr):
    """acc [BN, BM] + u @ h^T: both bf16, or in tf32, which holds 16-bit numbers exactly and fp32 ones with 11 significant bits."""
    if EMULATE:
        acc = tl.dot(u.to(tl.float32), h.to(tl.float32).T, acc, input_precision="ieee")
    elif TF32:
        acc = tl.dot(u.to(tl.float32), h.T, acc, input_precision="tf32")
    else:
        u = in_registers(u, COPY_ENGINE)  # from shared memory, ptxas would serialise the main loop's products too (its warning C7515)
        acc = tl.dot(u, h.T, acc)
    return acc


@triton.jit
def _side_by_side(a, b, ROWS: tl.constexpr, RB: tl.constexpr):
    """a and b [ROWS, RB] as one operand [ROWS, 2 * RB], column by column in turn: the order of ranks does not matter to a product."""
    return tl.reshape(tl.join(a, b), (ROWS, 2 * RB))


@triton.jit
def _add_lowrank(
    acc, up, lowrank, n, m, seg, h_row, rank, RB: tl.constexpr, TF32: tl.constexpr, COPY_ENGINE: tl.constexpr, EMULATE: tl.constexpr
):
    """acc + up @ h^T, RB ranks a step."""
    # Settled: pipelined, operands that are still read would be overwritten (Triton 3.6).
    for r in tl.range(0, rank, RB, num_stages=1 if TF32 else max(2, 128 // RB)):
        u, h = _lowrank_operands(up, lowrank, n, m, seg, r, h_row, rank, RB, COPY_ENGINE)
        acc = settled(_lowrank_dot(u, h, acc, TF32, COPY_ENGINE, EMULATE), COPY_ENGINE and not EMULATE)
    return acc


@triton.jit(do_not_specialize=["start", "M", "rows_per_batch", "gelu_from", *SEGMENT_STARTS, "peak_first"])
def _w4_matmul_wide(
    w_from, x_from, up, lowrank, extra_up, extra, table, x_scales, channel_scale, shift_bias, bias, out, residual, gate, peak,
    next_smooth, gain,
    start, M, N, NP, KP, out_row, out_col, residual_row, residual_col, gate_row, rows_per_batch, gelu_from, seg1, seg2, seg3,
    h_row, extra_row, extra_rank, xseg1, xseg2, xseg3, peak_first,
    KIND: tl.constexpr, RANK: tl.constexpr, RB: tl.constexpr, FETCH: tl.constexpr, XB: tl.constexpr, EXTRA_FETCH: tl.constexpr,
    JOINED: tl.constexpr,
    HAS_CHANNEL: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, GELU: tl.constexpr,
    GATE: tl.constexpr, PAIRED: tl.constexpr, SWIGLU: tl.constexpr, PEAK: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, PIECES: tl.constexpr, TF32: tl.constexpr, COPY_ENGINE: tl.constexpr,
    PTX: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Rows start to M of out.

    KIND: "row" (e4m3, table = ratio [ceil(KP / BLOCK), NP]), "half" (fp16, table = scale [NP]), "plain" (16 bit, no scales).
    PEAK: 1: row maxima of the result over next_smooth go to peak (fp32 as int32 [M]), 2: shifted ones.
    w_from [NP, KP], x_from [M, KP]: tensor descriptors with COPY_ENGINE, else pointers.
    up [NP, RANK], lowrank [M, S * RANK]: likewise, but pointers unless fetched in "steps". extra_up, extra: the same of the
    further columns, XB a step.
    """
    tiles_m = tl.cdiv(M - start, BM)
    band = GROUP_M * tl.cdiv(NP, BN)
    first = tl.program_id(0) // band * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = tl.program_id(0) % band
    m0 = start + (first + inside % height) * BM
    n0 = inside // height * BN
    n = n0 + tl.arange(0, BN)
    acc = tl.zeros((BN, BM), tl.float32)
    if COPY_ENGINE:
        w_rows = n0
        x_rows = m0
    else:
        w_rows = n
        x_rows = tl.minimum(m0 + tl.arange(0, BM), M - 1)
    # Low-rank operands that fit in registers are fetched here: behind the main loop nothing would hide the time they take, and copies by
    # descriptors would be waited for where they stand.
    if FETCH == "ahead" or EXTRA_FETCH == "ahead":
        tokens = tl.minimum(m0 + tl.arange(0, BM), M - 1)
    seg = segment_of(n0, seg1, seg2, seg3)
    xseg = segment_of(n0, xseg1, xseg2, xseg3)
    if FETCH == "ahead":
        u_first, h_first = _lowrank_operands(up, lowrank, n, tokens, seg, 0, h_row, RANK, RB, False)
    if EXTRA_FETCH == "ahead":
        u_extra, h_extra = _lowrank_operands(extra_up, extra, n, tokens, xseg, 0, extra_row, XB, XB, False)
    if KIND == "row":
        ratio = tl.load(table + n)  # one block ahead: a ratio loaded where it is used is waited for in every block
        for k in range(0, KP, 128):
            acc = _dot(w_from, x_from, w_rows, x_rows, KP, k, acc, COPY_ENGINE, 128, EMULATE)
            if (k + 128) % BLOCK == 0 or k + 128 >= KP:
                acc *= (ratio * gain)[:, None]
                ratio = tl.load(table + tl.minimum(k // BLOCK + 1, (KP - 1) // BLOCK) * NP + n)
    else:
        for k in range(0, KP, BK):
            acc = _dot(w_from, x_from, w_rows, x_rows, KP, k, acc, COPY_ENGINE, BK, EMULATE)
    if FETCH == "behind":
        tokens = tl.minimum(m0 + tl.arange(0, BM), M - 1)  # anew: held through the main loop they would spill registers
        u_first, h_first = _lowrank_operands(up, lowrank, n, tokens, seg, 0, h_row, RANK, RB, False)
    if EXTRA_FETCH == "behind":
        u_extra, h_extra = _lowrank_operands(extra_up, extra, n, tokens, xseg, 0, extra_row, XB, XB, False)
    if KIND == "half":
        acc *= tl.load(table + n)[:, None]
    if HAS_CHANNEL:
        acc *= tl.load(channel_scale + n)[:, None]
    if KIND != "plain":
        acc *= tl.load(x_scales + tl.minimum(m0 + tl.arange(0, BM), M - 1))[None, :]
    if JOINED:  # one product for both, and one wait
        u = _side_by_side(held(u_first, PTX), held(u_extra, PTX), BN, RB)
        h = _side_by_side(held(h_first, PTX), held(h_extra, PTX), BM, RB)
        acc = _lowrank_dot(u, h, acc, TF32, COPY_ENGINE, EMULATE)
    else:
        if FETCH != "steps":
            acc = _lowrank_dot(held(u_first, PTX), held(h_first, PTX), acc, TF32, COPY_ENGINE, EMULATE)
        elif RANK > 0:
            acc = _add_lowrank(acc, up, lowrank, w_rows, x_rows, seg, h_row, RANK, RB, TF32, COPY_ENGINE, EMULATE)
        if EXTRA_FETCH != "steps":
            acc = _lowrank_dot(held(u_extra, PTX), held(h_extra, PTX), acc, TF32, COPY_ENGINE, EMULATE)
        elif XB > 0:
            acc = _add_lowrank(acc, extra_up, extra, w_rows, x_rows, xseg, extra_row, extra_rank, XB, TF32, COPY_ENGINE, EMULATE)
    # The ending piece by piece: fewer registers at once.
    pieces = _pieces(acc, BN, BM, PIECES)
    if PAIRED:
        n = logical_rows(n, N)
    for i in tl.static_range(PIECES):
        y = pieces[i]
        m = m0 + i * (BM // PIECES) + tl.arange(0, BM // PIECES)
        if HAS_BIAS:
            y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if HAS_SHIFT:
            y += tl.load(shift_bias + n)[:, None]
        if SWIGLU:
            col, y = swiglu_rows(y, out, n0, m, M, N, out_row, out_col, BN, BM // PIECES, PTX, EMULATE)
        else:
            y = finish_rows(
                tl.trans(y), out, residual, gate, n, m, M, N, out_row, out_col, residual_row, residual_col, gate_row, rows_per_batch,
                gelu_from, ACCUMULATE, GELU, GATE, PTX, EMULATE,
            )  # fmt: skip
        if PEAK:
            if SWIGLU:
                width = N // 2
            else:
                if GATE or not GELU:  # a GELU's result is rounded already
                    y = rounded(y, out.dtype.element_ty, EMULATE)
                y = tl.where((n >= peak_first)[None, :], y, 0.0)
                col = tl.where(n >= peak_first, n - peak_first, N)  # N: beyond the next layer's K
                width = N - peak_first
            largest = largest_smoothed(y, next_smooth, col, width, out.dtype.element_ty, PEAK == 2, PTX, EMULATE)
            # As integers, numbers from 0 on have the same order: a maximum that does not depend on who comes first.
            tl.atomic_max(peak + m, largest.to(tl.int32, bitcast=True), mask=m < M, sem="relaxed")


@triton.jit
def _pieces(acc, BN: tl.constexpr, BM: tl.constexpr, PIECES: tl.constexpr):
    """acc [BN, BM] as a tuple of PIECES (1, 2 or 4) tensors of neighbouring columns."""
    if PIECES == 1:
        result = (acc,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BN, 2, BM // 2)), (0, 2, 1)))
        if PIECES == 2:
            result = (left, right)
        else:
            a, b = tl.split(tl.permute(tl.reshape(left, (BN, 2, BM // 4)), (0, 2, 1)))
            c, d = tl.split(tl.permute(tl.reshape(right, (BN, 2, BM // 4)), (0, 2, 1)))
            result = (a, b, c, d)
    return result


def e4m3_gain(target: Target, unsigned: bool) -> float:
    """What the accumulator of an e4m3 product is multiplied by behind every BLOCK inputs."""
    loss = HOPPER_E4M3_LOSS["unsigned" if unsigned else "signed"]
    return 1.0 + loss * BLOCK / 256 if target.name == "sm_90" else 1.0


def _sources(left: Tensor, right: Tensor, tile: Tile, columns: int, target: Target | None) -> list[Tensor | TensorDescriptor]:
    """What the kernel reads tiles [bn, columns] and [bm, columns] from: descriptors where the target has a copy engine."""
    if target is None or not target.copy_engine:
        return [left, right]
    return [TensorDescriptor.from_tensor(left, [tile.bn, columns]), TensorDescriptor.from_tensor(right, [tile.bm, columns])]


def ranks_a_step(rank: int, tf32: bool) -> int:
    """Ranks that a step of the low-rank product takes; more at a time would not fit beside a main loop's stages in tf32."""
    return rank_step(rank, 32 if tf32 else 64)


def fetches(kind: str, tf32: bool, gate: bool, rank: int, further: int) -> tuple[str, str]:
    """When the low-rank operands of the part's own ranks and of the further ones are fetched.

    "ahead" of the main loop, where all fit into one step and there are registers to hold them: "row" products mostly run two programs
    a multiprocessor, the others need most of a program's for the result. "behind" it all at once, where a gate needs registers too.
    Else in "steps".
    """
    own, other = (0 < r == rank_step(r, MOST_HELD) for r in (rank, further))
    if kind != "row":
        return "ahead" if own else "steps", "steps"
    if tf32 or (gate and further and not (own and other)):
        return "steps", "steps"
    when = "behind" if gate and further else "ahead"
    return when if own else "steps", when if other else "steps"


def joins(target: Target, fetch: str, extra_fetch: str, block: int, extra_block: int) -> bool:
    """Whether both pairs are multiplied as one: on Hopper, where it was measured; on sm_120 it would spill registers."""
    return target.name == "sm_90" and "steps" not in (fetch, extra_fetch) and block == extra_block


def most_registers(target: Target, kind: str, further: int, tile: Tile) -> int | None:
    """A thread's registers for two programs a multiprocessor, where the compiler would take a few more."""
    return 128 if target.name == "sm_90" and kind == "row" and further and tile.bm == 128 else None


def w4_matmul_wide(
    q: QuantizedInput, part: PartView, bias: Tensor | None, out: Tensor, finish: Finish, weight: ExpandedWeight | None = None
) -> Tensor:
    """Same arguments and result as w4_matmul_torch, for kinds "e4m3", "half" and "plain". Operands must have been checked.

    Raises ValueError for more than four segments.
    """
    spec, rows = part.spec, q.codes.shape[0]
    check_segments(part)
    if rows == 0:
        return out
    kind = "row" if q.kind == "e4m3" else q.kind
    x = q.codes.view(torch.float8_e4m3fn) if kind == "row" else q.codes
    target = target_for(out.device)
    rank = 0 if q.lowrank is None else spec.rank_padded
    shift = spec.act_unsigned and kind == "row"
    finish, peak = unit_gate(finish), finish.peak
    weight = weight or expand_weight_triton(part, q.kind, x.dtype)
    table = weight.ratio if kind == "row" else weight.scale
    pairs = [(part.up, q.lowrank)] if rank else []
    further = extra_rank(q, part)
    pairs += [(part.extra.up, q.extra)] if further else []
    tf32 = any(t.dtype != torch.bfloat16 for pair in pairs for t in pair)
    block, extra_block = ranks_a_step(rank, tf32), ranks_a_step(further, tf32)
    fetch, extra_fetch = fetches(kind, tf32, finish.gate is not None, rank, further)
    switches = launch_switches(part, rank, shift, bias, finish)
    sizes = launch_sizes(q, part, out, finish)[1:]
    with launch_device(out.device):
        for start, stop, tile in wide_bands(target, kind, rows, spec.n_padded, spec.k_padded):
            operands = _sources(weight.values, x, tile, tile.bk, target)
            described = target if rank and fetch == "steps" else None
            further_described = target if further and extra_fetch == "steps" else None
            operands += _sources(*(pairs[0] if rank else (out, out)), tile, block, described)
            operands += _sources(*(pairs[-1] if further else (out, out)), tile, extra_block, further_described)
            _w4_matmul_wide[(triton.cdiv(stop - start, tile.bm) * triton.cdiv(spec.n_padded, tile.bn),)](
                *operands, out if table is None else table, out if q.scales is None else q.scales,
                out if part.channel_scale is None else part.channel_scale, part.shift_bias if shift else out,
                out if bias is None else bias.contiguous(), out, out if finish.residual is None else finish.residual,
                out if finish.gate is None else finish.gate,
                out if peak is None else peak.amax.view(torch.int32), out if peak is None else peak.smooth,
                e4m3_gain(target, spec.act_unsigned) if kind == "row" else 1.0, start, stop, *sizes, 0 if peak is None else peak.first,
                KIND=kind, RB=block, FETCH=fetch, XB=extra_block, EXTRA_FETCH=extra_fetch,
                JOINED=joins(target, fetch, extra_fetch, block, extra_block),
                BN=tile.bn, BM=tile.bm, BK=tile.bk, GROUP_M=GROUP_M[kind], PIECES=tile.pieces, TF32=tf32,
                PEAK=0 if peak is None else 1 + peak.shifted, BLOCK=BLOCK, PTX=has_pairs(target),
                COPY_ENGINE=target.copy_engine,
                **switches, num_warps=tile.warps, num_stages=tile.stages, maxnreg=most_registers(target, kind, further, tile),
            )  # fmt: skip
    return out
