"""Triton kernels of smooth_quantize; every formula and output layout is stated in smooth_quantize_torch.py.

Up to three launches:
row_statistics  where there is a norm, or a row's scale needs its maximum and nobody knows it: row_statistics_triton.py.
_quantize       codes, scales and the low-rank branch's product with down on matrix units, in one pass over x where one program
                takes all ranks (tiles.py says how many it can). Few row blocks leave multiprocessors idle, so K is cut into pieces then.
_add_pieces     adds the pieces' products, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .layout import PartView
from .norm_modulate import Norm
from .norm_modulate_triton import norm_modulate_triton
from .rounding import divided, dot_split, e4m3_byte, e4m3_value, has_pairs, inverse_of, rne, safe_scale, settled, storable
from .row_statistics_triton import load_moments, load_rows, modulated, norm_arguments, one_batch, row_statistics_triton, smoothed
from .smooth_quantize_torch import QuantizedInput, kind_of, lowrank_dtype, plain_dtype
from .targets import Target, interpreting, launch_device, target_for
from .tiles import QUANTIZE_PIECES, Tile, quantize_tile

DESCRIPTOR_COLUMNS = 4096  # shorter rows gain little from tensor descriptors, and making them costs the CPU as much as a launch


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
def _row_scale(row_amax, scales, rows, M, KIND: tl.constexpr, FIRST):
    """What v of every row is multiplied by, from the row's maximum; the first piece stores the row's scale."""
    amax = tl.load(row_amax + rows, mask=rows < M, other=0.0)
    if KIND == "half":
        scale, factor = _power_below(amax)
    else:
        largest = tl.full(amax.shape, 448.0, tl.float32)
        scale = tl.div_rn(amax, largest)
        factor = tl.where(scale > 0.0, tl.div_rn(largest, tl.maximum(amax, 1e-30)), 0.0)
    tl.store(scales + rows, scale, mask=(rows < M) & FIRST)
    return factor


@triton.jit
def _store_codes(
    codes, scales, v, factor, rows, k, M, K8, KIND: tl.constexpr, LARGEST: tl.constexpr, BYTES: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, PTX: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Codes of a tile, columns k on, and for integer codes the groups' scales."""
    at = rows.to(tl.int64)[:, None] * (K8 * 8) + (k + tl.arange(0, BK))[None, :]
    mask = (rows < M)[:, None]
    if KIND == "plain":
        tl.store(codes + at, storable(v, codes.dtype.element_ty, EMULATE), mask=mask)
    elif KIND == "nvfp4":
        tl.store(codes + at, storable(_nvfp4(v, BM, BK, PTX, EMULATE), codes.dtype.element_ty, EMULATE), mask=mask)
    elif KIND == "e4m3":
        tl.store(codes + at, e4m3_byte(v * factor[:, None], EMULATE), mask=mask)
    else:
        code3, scale = _group_codes(v, LARGEST, BM, BK, PTX, EMULATE)
        if KIND == "half":
            value = tl.reshape(code3 * scale[:, :, None], (BM, BK)) * factor[:, None]
            tl.store(codes + at, value.to(tl.float16), mask=mask)
        else:
            code = tl.reshape(code3, (BM, BK))
            if BYTES:  # rne makes no negative zero
                sign = (code.to(tl.int32, bitcast=True) >> 24) & 128
                tl.store(codes + at, (_integer(tl.abs(code)) | sign).to(tl.uint8), mask=mask)
            else:
                tl.store(codes + at, _integer(code).to(tl.int8), mask=mask)
            groups = k // 64 + tl.arange(0, BK // 64)
            tl.store(scales + groups[None, :] * M + rows[:, None], scale, mask=mask)


@triton.jit(do_not_specialize=["M", "K8", "rows_per_batch", "steps"])
def _quantize(
    x, smooth, shift, scale, moments, row_amax, down, extra, codes, scales, products,
    M, K, K8, RANKS, EXTRA, x_row, x_col, shift_row, scale_row, rows_per_batch, steps,
    KIND: tl.constexpr, LARGEST: tl.constexpr, BYTES: tl.constexpr, UNSIGNED: tl.constexpr, NORM: tl.constexpr, RMS: tl.constexpr,
    ONE_BATCH: tl.constexpr, RB: tl.constexpr, XB: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    COPY_ENGINE: tl.constexpr, PTX: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Program (i, p, j): rows i*BM.. counted from the end, `steps` times BK of K from piece p's first on, ranks j*RB.. (RB 0: no low rank).

    Of the further ranks j*XB.. (XB 0: none). x [M, K], down [Kp, RANKS] and extra [Kp, EXTRA]: tensor descriptors with COPY_ENGINE, else
    pointers. Codes are [M, 8 * K8]: a stride that is a multiple of 8 and not of 16 as far as Triton knows lets a thread have 8 columns of
    many rows, whose smooth, shift and scale it then needs once.
    """
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # what was read last is still in L2
    rows = row + tl.arange(0, BM)
    piece = tl.program_id(1)
    codes_too = tl.program_id(2) == 0
    factor = tl.full((BM,), 1.0, tl.float32)
    if KIND == "e4m3" or KIND == "half":
        factor = _row_scale(row_amax, scales, rows, M, KIND, (piece == 0) & codes_too)
    if NORM:
        mean, rstd = load_moments(moments, rows, M, RMS)
    if RB:
        h = tl.zeros((BM, RB), tl.float32)
        ranks = tl.program_id(2) * RB + tl.arange(0, RB)
    if XB:
        hx = tl.zeros((BM, XB), tl.float32)
        further = tl.program_id(2) * XB + tl.arange(0, XB)
    first = piece * steps * BK
    for k in tl.range(first, tl.minimum(first + steps * BK, K8 * 8), BK, num_stages=STAGES):
        cols = k + tl.arange(0, BK)
        if COPY_ENGINE:
            a = x.load([row, k])
        else:
            a = load_rows(x, rows, cols, M, K, x_row, x_col)
        m = a
        if NORM:
            m = modulated(a, mean, rstd, shift, scale, rows, cols, M, K, shift_row, scale_row, rows_per_batch, RMS, ONE_BATCH, PTX, EMULATE)
        if RB:
            h = _low_rank(m, _ranks_of(down, k, cols, ranks, RANKS, RB, COPY_ENGINE), h, a.dtype, EMULATE)
        if XB:
            hx = _low_rank(m, _ranks_of(extra, k, cols, further, EXTRA, XB, COPY_ENGINE), hx, a.dtype, EMULATE)
        # Settled in every step: Triton 3.6 gives a tile that a wgmma and something else read from shared memory one buffer too few, and
        # the next load overwrites it while the wgmma still reads.
        if RB:
            h = settled(h, PTX)
        if XB:
            hx = settled(hx, PTX)
        if codes_too:
            v = smoothed(m.to(tl.float32), smooth, cols, K, a.dtype, UNSIGNED, PTX, EMULATE)
            _store_codes(codes, scales, v, factor, rows, k, M, K8, KIND, LARGEST, BYTES, BM, BK, PTX, EMULATE)
    if RB:
        _store_ranks(products, h, rows, piece, M, RANKS + EXTRA, ranks, ranks < RANKS, EMULATE)
    if XB:
        _store_ranks(products, hx, rows, piece, M, RANKS + EXTRA, RANKS + further, further < EXTRA, EMULATE)


@triton.jit
def _ranks_of(down, k, cols, ranks, RANKS, RB: tl.constexpr, COPY_ENGINE: tl.constexpr):
    """This program's ranks of down, columns of K from k on."""
    if COPY_ENGINE:
        d = down.load([k, tl.program_id(2) * RB])
    else:
        d = tl.load(down + cols[:, None] * RANKS + ranks[None, :], mask=(ranks < RANKS)[None, :], other=0.0)
    return d


@triton.jit
def _store_ranks(products, h, rows, piece, M, width, columns, inside, EMULATE: tl.constexpr):
    """h to columns of products [pieces, M, width], those inside."""
    at = (piece * M + rows).to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(products + at, storable(h, products.dtype.element_ty, EMULATE), mask=(rows < M)[:, None] & inside[None, :])


@triton.jit
def _low_rank(m, d, h, DTYPE: tl.constexpr, EMULATE: tl.constexpr):
    """h + m @ d; m holds numbers of DTYPE."""
    if tl.bfloat16 == DTYPE and d.dtype == tl.bfloat16 and not EMULATE:
        h = tl.dot(m.to(tl.bfloat16), d, h)
    else:
        h = dot_split(m.to(tl.float32), d.to(tl.float32), h, tl.bfloat16 != DTYPE, tl.bfloat16 != d.dtype, EMULATE)
    return h


@triton.jit(do_not_specialize=["total", "pieces"])
def _add_pieces(products, out, total, pieces, MOST: tl.constexpr, BLOCK: tl.constexpr, EMULATE: tl.constexpr):
    """out = sum of the pieces' products, in their order; `total` numbers each. Unrolled to MOST of them: all are fetched at once."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = tl.zeros((BLOCK,), tl.float32)
    for piece in tl.static_range(MOST):
        h += tl.load(products + piece * total + at, mask=(at < total) & (piece < pieces), other=0.0)
    tl.store(out + at, storable(h, out.dtype.element_ty, EMULATE), mask=at < total)


def rank_block(ranks: int, tile: Tile, taken: int = 0) -> int:
    """Columns of the low-rank product a program makes beside `taken` others; 0 without one."""
    left = max(tile.both - taken, 16) if taken else tile.bn
    return 0 if ranks == 0 else min(max(16, triton.next_power_of_2(ranks)), 1 << left.bit_length() - 1)


def rank_blocks(ranks: int, extra: int, tile: Tile) -> tuple[int, int, int]:
    """Columns of both products that a program makes, and how many programs share them; each of those reads x again."""
    block = rank_block(ranks, tile)
    extra_block = rank_block(extra, tile, block)
    return block, extra_block, max(triton.cdiv(ranks, max(block, 1)), triton.cdiv(extra, max(extra_block, 1)), 1)


def kernel_kind(kind: str, part: PartView, mode: str) -> tuple[str, int]:
    """(KIND, LARGEST) of _quantize for a kind of result."""
    if kind == "plain":
        return ("nvfp4" if mode == "exact" else "plain"), 0
    if kind == "e4m3":
        return kind, 0
    return ("half" if kind == "half" else "int"), 127 if kind == "int8" else 15 if part.spec.act_unsigned else 7


def _outputs(x: Tensor, part: PartView, kind: str, ranks: int, extra: int, apart: bool) -> QuantizedInput:
    rows, kp = x.shape[0], part.spec.k_padded
    dtype = {"plain": plain_dtype(x.dtype), "half": torch.float16}.get(kind, torch.uint8 if part.spec.code_form == "e4m3" else torch.int8)
    shape = {"plain": None, "e4m3": (rows,), "half": (rows,)}.get(kind, (kp // 64, rows))
    scales = None if shape is None else torch.empty(shape, dtype=torch.float32, device=x.device)
    codes = torch.empty(rows, kp, dtype=dtype, device=x.device)
    if not ranks + extra:
        return QuantizedInput(kind, codes, scales, None, x.dtype, None)
    widths = (ranks, extra) if apart else (ranks + extra,)
    made = [torch.empty(rows, n, dtype=lowrank_dtype(x, part, kind), device=x.device) for n in widths]
    lowrank, further = made if apart else (made[0][:, :ranks], made[0][:, ranks:])
    return QuantizedInput(kind, codes, scales, lowrank if ranks else None, x.dtype, further if extra else None)


def multiplied_apart(x: Tensor, part: PartView, kind: str, ranks: int, extra: int, tile: Tile) -> bool:
    """Whether the further columns' product is torch's: where each further program of _quantize would read x again for a few of them."""
    if lowrank_dtype(x, part, kind) != x.dtype:
        return False
    return rank_blocks(ranks, extra, tile)[2] > rank_blocks(ranks, 0, tile)[2]


def most_registers(target: Target, dtype: torch.dtype, block: int, extra_block: int) -> int | None:
    """A thread's registers for four programs a multiprocessor, where the compiler would take a few more."""
    return 128 if target.name == "sm_90" and dtype == torch.bfloat16 and extra_block and block + extra_block <= 64 else None


def copyable(x: Tensor) -> bool:
    """Whether a tensor descriptor can stand for x: rows contiguous, and 16 bytes apart."""
    return x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


def smooth_quantize_triton(
    x: Tensor, part: PartView, mode: str, norm: Norm | None = None, row_amax: Tensor | None = None, *, wide: bool = False
) -> QuantizedInput:
    """Same arguments, result and layouts as smooth_quantize_torch. Operands must have been checked."""
    kind = kind_of(part, mode, wide)
    (rows, k), kp, device = x.shape, part.spec.k_padded, x.device
    target, emulate = target_for(device), interpreting()
    code_kind, largest = kernel_kind(kind, part, mode)
    tile = quantize_tile(target, x.dtype, rows, kp, code_kind in ("int", "half"))
    ranks, extra = 0 if part.down is None else part.down.shape[1], 0 if part.extra is None else part.extra.down.shape[1]
    apart = multiplied_apart(x, part, kind, ranks, extra, tile)
    q = _outputs(x, part, kind, ranks, extra, apart)
    if rows == 0:
        return q
    pairs = has_pairs(target)
    unsigned = part.spec.act_unsigned and mode == "exact"
    finds_amax = kind in ("e4m3", "half") and row_amax is None
    moments = part.smooth
    if norm is not None or finds_amax:
        moments, found = row_statistics_triton(x, norm, part.smooth if finds_amax else None, unsigned)
        row_amax = found if finds_amax else row_amax
    shift, scale, shift_row, scale_row, rows_per_batch = norm_arguments(norm, part.smooth, rows)
    extra = 0 if apart else extra
    block, extra_block, blocks = rank_blocks(ranks, extra, tile)
    found = q.lowrank if ranks else q.extra if extra else q.codes  # one tensor holds both, the part's own ranks first
    products = found
    if ranks + extra and tile.pieces > 1:
        products = torch.empty(tile.pieces, rows, ranks + extra, dtype=torch.float32, device=device)
    engine = target.copy_engine and kp >= DESCRIPTOR_COLUMNS and copyable(x)
    source, down, further = x, part.down if ranks else q.codes, part.extra.down if extra else q.codes
    if engine:
        source = TensorDescriptor.from_tensor(x, [tile.bm, tile.bk])
        down = TensorDescriptor.from_tensor(down, [tile.bk, block]) if ranks else source
        further = TensorDescriptor.from_tensor(further, [tile.bk, extra_block]) if extra else source
    with launch_device(device):
        _quantize[(triton.cdiv(rows, tile.bm), tile.pieces, blocks)](
            source, part.smooth, shift, scale, moments, part.smooth if row_amax is None else row_amax, down, further,
            q.codes, q.codes if q.scales is None else q.scales, products,
            rows, k, kp // 8, ranks, extra, x.stride(0), x.stride(1), shift_row, scale_row, rows_per_batch,
            triton.cdiv(kp // tile.bk, tile.pieces),
            KIND=code_kind, LARGEST=largest, BYTES=part.spec.code_form == "e4m3", UNSIGNED=unsigned, NORM=norm is not None,
            RMS=norm is not None and norm.rms, ONE_BATCH=one_batch(rows, rows_per_batch, tile.bm), RB=block, XB=extra_block, BM=tile.bm,
            BK=tile.bk, STAGES=tile.stages, COPY_ENGINE=engine, PTX=pairs, EMULATE=emulate, num_warps=tile.warps,
            maxnreg=most_registers(target, x.dtype, block, extra_block),
        )  # fmt: skip
        if products.ndim == 3:
            _add_pieces[(triton.cdiv(rows * (ranks + extra), 512),)](
                products, found, rows * (ranks + extra), tile.pieces, MOST=QUANTIZE_PIECES, BLOCK=512, EMULATE=emulate, num_warps=4
            )
        if apart:
            torch.mm(x if norm is None else norm_modulate_triton(x, norm, moments), part.extra.down[:k], out=q.extra)
    return q
