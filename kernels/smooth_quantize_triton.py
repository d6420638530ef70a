"""Triton kernels of smooth_quantize; every formula and output layout is stated in smooth_quantize_torch.py.

Up to four launches:
_row_moments  with a norm only: mean and 1/std of every row (row_statistics_triton.py).
_quantize     codes and scales. Where a row's maximum has to be found a program holds one row in registers, otherwise a piece of one.
_down         the low-rank branch's product with down on matrix units, row blocks from the last to the first, which finds what was read last
              still in L2. Few row blocks leave multiprocessors idle, so K is cut into pieces then.
_add_pieces   adds the pieces' products, in a fixed order.
_quantize and _down in one kernel would hold too few warps to hide the latency of their loads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import PartView
from .norm_modulate import Norm
from .rounding import divided, dot_split, e4m3_byte, e4m3_value, has_pairs, inverse_of, rne, safe_scale, storable
from .row_statistics_triton import load_rows, modulated, norm_arguments, one_batch, row_moments_triton, row_tile, smoothed
from .smooth_quantize_torch import QuantizedInput, kind_of, lowrank_dtype, plain_dtype
from .targets import interpreting, launch_device, target_for
from .tiles import down_tile


@triton.jit
def _e2m1(u):
    """0 <= u -> nearest e2m1 magnitude, ties to the even code, saturating at 6."""
    coarse = tl.where(u < 4.0, rne(u), 2.0 * rne(tl.minimum(u, 6.0) * 0.5))
    return tl.where(u < 2.0, 0.5 * rne(2.0 * tl.minimum(u, 6.0)), coarse)


@triton.jit
def _over(a, N: tl.constexpr, PTX: tl.constexpr, EMULATE: tl.constexpr):
    """a / N to nearest."""
    return divided(a, tl.full(a.shape, N, tl.float32), tl.full(a.shape, 1.0 / N, tl.float32), PTX, EMULATE)


@triton.jit
def _nvfp4(v, BM: tl.constexpr, BK: tl.constexpr, PTX: tl.constexpr, EMULATE: tl.constexpr):
    """v fp32 [BM, BK] -> e2m1 code times e4m3 group scale, fp32: 6 significant bits, exact in bf16 and fp16."""
    v3 = tl.reshape(v, (BM, BK // 16, 16))
    amax = tl.max(tl.abs(v3), axis=2)
    scale = tl.minimum(_over(amax, 6, PTX, EMULATE), 448.0)
    safe = safe_scale(scale)
    ratio = divided(tl.abs(v3), safe[:, :, None], inverse_of(safe, PTX)[:, :, None], PTX, EMULATE)
    magnitude = _e2m1(ratio) * e4m3_value(scale)[:, :, None]
    return tl.reshape(tl.where(v3 < 0, -magnitude, magnitude), (BM, BK))


@triton.jit
def _group_codes(v, LARGEST: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PTX: tl.constexpr, EMULATE: tl.constexpr):
    """v fp32 [BM, BK] -> integer codes as fp32 [BM, BK / 64, 64] and the scale of every group of 64. amax / scale needs no upper bound."""
    v3 = tl.reshape(v, (BM, BK // 64, 64))
    amax = tl.max(tl.abs(v3), axis=2)
    scale = _over(amax, LARGEST, PTX, EMULATE)
    safe = safe_scale(scale)
    ratio = divided(v3, safe[:, :, None], inverse_of(safe, PTX)[:, :, None], PTX, EMULATE)
    if LARGEST == 15:
        ratio = tl.maximum(ratio, 0.0)
    return rne(ratio), scale


@triton.jit
def _integer(x):
    """A small integer in fp32 -> int32 whose low byte is right: the conversion instruction runs at an eighth of the rate."""
    return (x + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _power_below(amax):
    """(u, 1/u), u = 2^(floor(log2(amax)) - 8), not below 2^-126; 1 where amax is 0."""
    exponent = (amax.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.where(amax > 0.0, tl.maximum(exponent - 8, 1), 127)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _values(
    x, smooth, shift, scale, moments, rows, cols, M, K, x_row, x_col, shift_row, scale_row, rows_per_batch,
    UNSIGNED: tl.constexpr, NORM: tl.constexpr, ONE_BATCH: tl.constexpr, PTX: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """v of a tile, fp32."""
    m = load_rows(x, rows, cols, M, K, x_row, x_col)
    if NORM:
        mean = tl.load(moments + rows, mask=rows < M, other=0.0)
        rstd = tl.load(moments + M + rows, mask=rows < M, other=0.0)
        m = modulated(m, mean, rstd, shift, scale, rows, cols, M, K, shift_row, scale_row, rows_per_batch, ONE_BATCH, PTX, EMULATE)
    return smoothed(m.to(tl.float32), smooth, cols, K, x.dtype.element_ty, UNSIGNED, PTX, EMULATE)


@triton.jit
def _store_codes(
    codes, scales, v, divisor, inverse, rows, cols, group, M, KP, KIND: tl.constexpr, LARGEST: tl.constexpr, BYTES: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, PTX: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Codes of a tile whose first group of 64 is `group`, and for integer codes the groups' scales."""
    at = rows.to(tl.int64)[:, None] * KP + cols[None, :]
    mask = (rows < M)[:, None] & (cols < KP)[None, :]
    if KIND == "plain":
        tl.store(codes + at, storable(v, codes.dtype.element_ty, EMULATE), mask=mask)
    elif KIND == "nvfp4":
        tl.store(codes + at, storable(_nvfp4(v, BM, BK, PTX, EMULATE), codes.dtype.element_ty, EMULATE), mask=mask)
    elif KIND == "e4m3":
        b, i = tl.broadcast_to(divisor[:, None], v.shape), tl.broadcast_to(inverse[:, None], v.shape)
        tl.store(codes + at, e4m3_byte(divided(v, b, i, PTX, EMULATE), EMULATE), mask=mask)
    else:
        code3, scale = _group_codes(v, LARGEST, BM, BK, PTX, EMULATE)
        if KIND == "half":
            value = tl.reshape(code3 * scale[:, :, None], (BM, BK)) * inverse[:, None]
            tl.store(codes + at, value.to(tl.float16), mask=mask)
        else:
            code = tl.reshape(code3, (BM, BK))
            if BYTES:  # rne makes no negative zero
                sign = (code.to(tl.int32, bitcast=True) >> 24) & 128
                tl.store(codes + at, (_integer(tl.abs(code)) | sign).to(tl.uint8), mask=mask)
            else:
                tl.store(codes + at, _integer(code).to(tl.int8), mask=mask)
            groups = group + tl.arange(0, BK // 64)
            inside = (rows < M)[:, None] & (groups < KP // 64)[None, :]
            tl.store(scales + groups[None, :] * M + rows[:, None], scale, mask=inside)


@triton.jit(do_not_specialize=["M", "rows_per_batch"])
def _quantize(
    x, smooth, shift, scale, row_amax, codes, scales, moments, M, K, KP, x_row, x_col, shift_row, scale_row, rows_per_batch,
    KIND: tl.constexpr, LARGEST: tl.constexpr, BYTES: tl.constexpr, UNSIGNED: tl.constexpr, NORM: tl.constexpr, ONE_BATCH: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, REST: tl.constexpr, PTX: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Program (i, j): rows i*BM.. and columns j*BK..; where a row's maximum has to be found, one row: BK columns, then REST columns."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * BK
    cols = first + tl.arange(0, BK)
    v = _values(
        x, smooth, shift, scale, moments, rows, cols, M, K, x_row, x_col, shift_row, scale_row, rows_per_batch,
        UNSIGNED, NORM, ONE_BATCH, PTX, EMULATE,
    )  # fmt: skip
    if REST:
        more = BK + tl.arange(0, REST)
        w = _values(
            x, smooth, shift, scale, moments, rows, more, M, K, x_row, x_col, shift_row, scale_row, rows_per_batch,
            UNSIGNED, NORM, ONE_BATCH, PTX, EMULATE,
        )  # fmt: skip
    divisor = tl.full((BM,), 1.0, tl.float32)
    inverse = divisor
    if KIND == "e4m3" or KIND == "half":
        if row_amax is None:
            amax = tl.max(tl.abs(v), axis=1)
            if REST:
                amax = tl.maximum(amax, tl.max(tl.abs(w), axis=1))
        else:
            amax = tl.load(row_amax + rows, mask=rows < M, other=0.0)
        if KIND == "half":
            row_scale, inverse = _power_below(amax)
        else:
            row_scale = tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))
            divisor = safe_scale(row_scale)
            inverse = inverse_of(divisor, PTX)
        if first == 0:
            tl.store(scales + rows, row_scale, mask=rows < M)
    _store_codes(codes, scales, v, divisor, inverse, rows, cols, first // 64, M, KP, KIND, LARGEST, BYTES, BM, BK, PTX, EMULATE)
    if REST:
        _store_codes(codes, scales, w, divisor, inverse, rows, more, BK // 64, M, KP, KIND, LARGEST, BYTES, BM, REST, PTX, EMULATE)


@triton.jit(do_not_specialize=["M", "rows_per_batch", "steps"])
def _down(
    x, down, shift, scale, moments, products, M, K, RANKS, x_row, x_col, shift_row, scale_row, rows_per_batch, steps,
    NORM: tl.constexpr, ONE_BATCH: tl.constexpr, RB: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PTX: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Program (i, p, j): rows i*BM.. counted from the end, `steps` times BK of K from piece p's first on, ranks j*RB.."""
    rows = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM + tl.arange(0, BM)
    piece = tl.program_id(1)
    ranks = tl.program_id(2) * RB + tl.arange(0, RB)
    if NORM:
        mean = tl.load(moments + rows, mask=rows < M, other=0.0)
        rstd = tl.load(moments + M + rows, mask=rows < M, other=0.0)
    h = tl.zeros((BM, RB), tl.float32)
    first = piece * steps * BK
    for k in range(first, tl.minimum(first + steps * BK, K), BK):
        cols = k + tl.arange(0, BK)
        m = load_rows(x, rows, cols, M, K, x_row, x_col)
        if NORM:
            m = modulated(m, mean, rstd, shift, scale, rows, cols, M, K, shift_row, scale_row, rows_per_batch, ONE_BATCH, PTX, EMULATE)
        d = tl.load(down + cols[:, None] * RANKS + ranks[None, :], mask=(ranks < RANKS)[None, :], other=0.0).to(tl.float32)
        h = dot_split(m.to(tl.float32), d, h, tl.bfloat16 != x.dtype.element_ty, tl.bfloat16 != down.dtype.element_ty, EMULATE)
    at = (piece * M + rows).to(tl.int64)[:, None] * RANKS + ranks[None, :]
    tl.store(products + at, storable(h, products.dtype.element_ty, EMULATE), mask=(rows < M)[:, None] & (ranks < RANKS)[None, :])


@triton.jit(do_not_specialize=["total", "pieces"])
def _add_pieces(products, out, total, pieces, BLOCK: tl.constexpr, EMULATE: tl.constexpr):
    """out = sum of the pieces' products, in their order; `total` numbers each."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = tl.zeros((BLOCK,), tl.float32)
    for piece in range(pieces):
        h += tl.load(products + piece * total + at, mask=at < total, other=0.0)
    tl.store(out + at, storable(h, out.dtype.element_ty, EMULATE), mask=at < total)


def rank_block(ranks: int, dtype: torch.dtype) -> int:
    """Columns of the low-rank product a program makes: more would spill registers beside a norm. Other types than bf16 take two dots."""
    return min(max(16, triton.next_power_of_2(ranks)), 64 if dtype == torch.bfloat16 else 32)


def kernel_kind(kind: str, part: PartView, mode: str) -> tuple[str, int]:
    """(KIND, LARGEST) of _quantize for a kind of result."""
    if kind == "plain":
        return ("nvfp4" if mode == "exact" else "plain"), 0
    if kind == "e4m3":
        return kind, 0
    return ("half" if kind == "half" else "int"), 127 if kind == "int8" else 15 if part.spec.act_unsigned else 7


def quantize_tile(k: int, whole_rows: bool) -> tuple[int, int, int]:
    """(BK, REST, warps) of _quantize; k is the padded K. One row a program: its columns' vectors then lie over the threads as the row does.

    Whole rows are cut in two where that wastes fewer lanes than the next power of two; K 3072 and 12288 then waste none.
    """
    if not whole_rows:
        return (1024, 0, 1) if k % 2048 else (2048, 0, 2)
    width, warps = row_tile(k)
    rest = max(triton.next_power_of_2(k - width // 2), 128)
    return (width // 2, rest, max(warps // 2, 1)) if rest < width // 2 else (width, 0, warps)


def _outputs(x: Tensor, part: PartView, kind: str) -> QuantizedInput:
    rows, kp = x.shape[0], part.spec.k_padded
    dtype = {"plain": plain_dtype(x.dtype), "half": torch.float16}.get(kind, torch.uint8 if part.spec.code_form == "e4m3" else torch.int8)
    shape = {"plain": None, "e4m3": (rows,), "half": (rows,)}.get(kind, (kp // 64, rows))
    scales = None if shape is None else torch.empty(shape, dtype=torch.float32, device=x.device)
    return QuantizedInput(kind, torch.empty(rows, kp, dtype=dtype, device=x.device), scales, None, x.dtype)


def smooth_quantize_triton(
    x: Tensor, part: PartView, mode: str, norm: Norm | None = None, row_amax: Tensor | None = None, *, wide: bool = False
) -> QuantizedInput:
    """Same arguments, result and layouts as smooth_quantize_torch. Operands must have been checked."""
    kind = kind_of(part, mode, wide)
    q = _outputs(x, part, kind)
    (rows, k), kp, device = x.shape, part.spec.k_padded, x.device
    ranks = 0 if part.down is None else part.down.shape[1]
    if rows == 0:
        q.lowrank = torch.empty(0, ranks, dtype=lowrank_dtype(x, part, kind), device=device) if ranks else None
        return q
    finds_amax = kind in ("e4m3", "half") and row_amax is None
    width, rest, warps = quantize_tile(kp, finds_amax)
    target, emulate = target_for(device), interpreting()
    pairs = has_pairs(target)
    shift, scale, shift_row, scale_row, rows_per_batch = norm_arguments(norm, part.smooth, rows)
    moments = part.smooth if norm is None else row_moments_triton(x, norm.eps)
    code_kind, largest = kernel_kind(kind, part, mode)
    block = 16 if emulate and rows > 64 else 1  # the interpreter's time is programs
    with launch_device(device):
        _quantize[(triton.cdiv(rows, block), triton.cdiv(kp, width + rest))](
            x, part.smooth, shift, scale, row_amax, q.codes, q.codes if q.scales is None else q.scales, moments,
            rows, k, kp, x.stride(0), x.stride(1), shift_row, scale_row, rows_per_batch,
            KIND=code_kind, LARGEST=largest, BYTES=part.spec.code_form == "e4m3", UNSIGNED=part.spec.act_unsigned and mode == "exact",
            NORM=norm is not None, ONE_BATCH=one_batch(rows, rows_per_batch, block), BM=block, BK=width, REST=rest,
            PTX=pairs, EMULATE=emulate, num_warps=warps,
        )  # fmt: skip
        if ranks == 0:
            return q
        tile, columns = down_tile(target, x.dtype, rows, kp), rank_block(ranks, x.dtype)
        q.lowrank = torch.empty(rows, ranks, dtype=lowrank_dtype(x, part, kind), device=device)
        products = q.lowrank
        if tile.pieces > 1:
            products = torch.empty(tile.pieces, rows, ranks, dtype=torch.float32, device=device)
        _down[(triton.cdiv(rows, tile.bm), tile.pieces, triton.cdiv(ranks, columns))](
            x, part.down, shift, scale, moments, products, rows, k, ranks, x.stride(0), x.stride(1), shift_row, scale_row,
            rows_per_batch, triton.cdiv(kp // tile.bk, tile.pieces),
            NORM=norm is not None, ONE_BATCH=one_batch(rows, rows_per_batch, tile.bm), RB=columns,
            BM=tile.bm, BK=tile.bk, PTX=pairs, EMULATE=emulate, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if tile.pieces > 1:
            _add_pieces[(triton.cdiv(rows * ranks, 1024),)](
                products, q.lowrank, rows * ranks, tile.pieces, BLOCK=1024, EMULATE=emulate, num_warps=4
            )
    return q
