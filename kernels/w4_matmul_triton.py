"""Triton kernel of w4_matmul that unpacks the weight in every program; w4_matmul_wide.py is the one for many tokens.

The formula is stated in w4_matmul_torch.py, the packed layout in layout.py. It computes y^T = W x^T: the weight is the left operand, so
that unpacked codes stay in registers. A step takes 128 of K, that is one byte column block [BN, 64]: its low nibbles are the first 64 of K,
its high nibbles the next 64, each with one group scale (NVFP4: four).

Powers of two that code tricks leave behind are folded into one constant at the end (FOLD), which is exact:
    int8 form    a code kept in the high nibble of its byte is 16 times itself
    e4m3 form    the byte s000mmmm read as e4m3 is +-m * 2^-9, weights and activations
    NVFP4        e2m1 and e4m3 bit patterns moved into fp16 are value * 2^-14 and value * 2^-8; 2^14 is given back at once
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .int_to_float import by_magic
from .layout import RUN, PartView
from .rounding import dot_split, has_ptx, inverse_of, operand, rounded, rounded_pairs, storable
from .smooth_quantize_torch import QuantizedInput
from .targets import interpreting, launch_device, target_for
from .tiles import matmul_tile
from .w4_matmul_torch import Finish

FAR = (1 << 31) - 1  # a segment start that no output reaches
SEGMENT_STARTS = ("seg1", "seg2", "seg3", "xseg1", "xseg2", "xseg3")
GROUP_M = 8
_RUN = tl.constexpr(RUN)


# The same steps as the Triton forms below, on four codes in a 32-bit register at once. In order: nibble moved to the low half of its
# byte, sign bit, magnitude, "magnitude is 0" (m + 7 leaves bit 3 clear), which turns a lone sign into an 8, sign moved to bit 7.
_E4M3_ASM = """
{{
    .reg .b32 x, s, m, t;
    shr.b32 x, $1, {shift};
    and.b32 s, x, 0x08080808;
    and.b32 m, x, 0x07070707;
    add.u32 t, m, 0x07070707;
    not.b32 t, t;
    and.b32 t, t, s;
    or.b32 m, m, t;
    shl.b32 s, s, 4;
    or.b32 $0, m, s;
}}
"""
_E4M3_LOW = tl.constexpr(_E4M3_ASM.format(shift=0))
_E4M3_HIGH = tl.constexpr(_E4M3_ASM.format(shift=4))
_INT8_LOW = tl.constexpr("{ .reg .b32 x; shl.b32 x, $1, 4; and.b32 $0, x, 0xF0F0F0F0; }")
_INT8_HIGH = tl.constexpr("and.b32 $0, $1, 0xF0F0F0F0;")


@triton.jit
def e4m3_weights(packed, HALF: tl.constexpr, PTX: tl.constexpr):
    """Sign-magnitude nibbles (0b1000 = -8) of one half of uint8 bytes -> e4m3 tensor of value * 2^-9."""
    if PTX:
        ASM: tl.constexpr = _E4M3_LOW if HALF == 0 else _E4M3_HIGH
        byte = tl.inline_asm_elementwise(ASM, "=r,r", [packed], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        nibble = (packed >> (4 * HALF)) & 15
        sign = nibble & 8
        magnitude = nibble & 7
        eight = sign & ((magnitude + 7) ^ 8)  # 8 where the nibble is 0b1000, the only one with a sign and no magnitude
        byte = magnitude | eight | (sign << 4)
    return byte.to(tl.float8e4nv, bitcast=True)


@triton.jit
def _int8_weights(packed, HALF: tl.constexpr, PTX: tl.constexpr):
    """Two's complement nibbles of one half of uint8 bytes -> int8 tensor of value * 16."""
    if PTX:
        ASM: tl.constexpr = _INT8_LOW if HALF == 0 else _INT8_HIGH
        byte = tl.inline_asm_elementwise(ASM, "=r,r", [packed], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        byte = packed << 4 if HALF == 0 else packed & 240
    return byte.to(tl.int8, bitcast=True)


@triton.jit
def _e2m1_weights(nibble, scales, n, first_group, NP, BN: tl.constexpr):
    """fp16 [BN, 64] of e2m1 * e4m3 scale * 2^-8, exact (at most 6 significant bits, multiples of 2^-18)."""
    code = nibble.to(tl.uint16)
    values = (((code & 8) << 12) | ((code & 7) << 9)).to(tl.float16, bitcast=True)
    groups = first_group + tl.arange(0, 4)
    byte = tl.load(scales + groups[None, :] * NP + n[:, None]).to(tl.uint16)
    scale = (((byte & 128) << 8) | ((byte & 127) << 7)).to(tl.float16, bitcast=True) * 16384.0
    wide = tl.broadcast_to(scale.to(tl.float16)[:, :, None], (BN, 4, 16))
    return values * tl.reshape(wide, (BN, 64))


@triton.jit
def _half_product(
    packed, x, at, scales, n, group, NP, acc, HALF: tl.constexpr, KIND: tl.constexpr, E4M3: tl.constexpr, BN: tl.constexpr,
    PTX: tl.constexpr, MAGIC: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The product of one 64 of K: unscaled and separate for codes, added to acc for NVFP4 (whose scales are inside the operand)."""
    v = tl.load(x + at)
    if KIND == "plain":
        DTYPE: tl.constexpr = x.dtype.element_ty
        w = _e2m1_weights((packed >> (4 * HALF)) & 15, scales, n, group * 4, NP, BN)
        left = operand(w.to(tl.float32), DTYPE, EMULATE)
        right = operand(v.to(tl.float32), DTYPE, EMULATE)
        product = tl.dot(left, right, acc, input_precision="ieee")
    elif E4M3:
        w = e4m3_weights(packed, HALF, PTX)
        product = tl.dot(w, v.to(tl.float8e4nv, bitcast=True), out_dtype=tl.float32)
    else:
        w = _int8_weights(packed, HALF, PTX)
        total = tl.dot(w, v, out_dtype=tl.int32)
        if MAGIC:  # int_to_float.py; a group's total is below 2^22
            product = (total + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
        else:
            product = total.to(tl.float32)
    return product


@triton.jit
def _gelu_tanh(y, PTX: tl.constexpr):
    """0.5*y*(1 + tanh(z)) = y * sigmoid(2z), z = sqrt(2/pi) * (y + 0.044715*y^3); exp, because libdevice fails in the interpreter."""
    z = 0.7978845608028654 * (y + 0.044715 * y * y * y)
    below = 1.0 + tl.exp(-2.0 * z)
    if PTX:
        result = y * inverse_of(below, PTX)  # a division would be half of this
    else:
        result = y / below
    return result


@triton.jit
def segment_of(n0, seg1, seg2, seg3):
    """Which segment of the low-rank branch output n0 belongs to."""
    return (n0 >= seg1).to(tl.int32) + (n0 >= seg2).to(tl.int32) + (n0 >= seg3).to(tl.int32)


@triton.jit
def _add_lowrank(acc, lowrank, up, n, m, seg, h_row, rank, RB: tl.constexpr, EMULATE: tl.constexpr):
    """acc [BN, BM] + up @ h^T, h fp32 in two bf16 halves, its rows h_row apart."""
    for r in tl.range(0, rank, RB, num_stages=1):
        ranks = r + tl.arange(0, RB)
        u = tl.load(up + n[:, None] * rank + ranks[None, :]).to(tl.float32)
        h = tl.load(lowrank + m.to(tl.int64)[None, :] * h_row + (seg * rank + ranks)[:, None])
        acc = dot_split(u, h, acc, tl.bfloat16 != up.dtype.element_ty, True, EMULATE)
    return acc


@triton.jit
def finish_rows(
    y, out, residual, gate, n, m, M, N, out_row, out_col, residual_row, residual_col, gate_row, rows_per_batch, gelu_from,
    ACCUMULATE: tl.constexpr, GELU: tl.constexpr, GATE: tl.constexpr, PTX: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Ending and store of y [BM, BN]; returns y as it was stored, but for the rounding."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    mask = (m < M)[:, None] & (n < N)[None, :]
    m64 = m.to(tl.int64)
    at = m64[:, None] * out_row + n[None, :] * out_col
    if ACCUMULATE:
        y += tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    if GELU or GATE:
        y = rounded(y, DTYPE, EMULATE)
    if GELU:
        y = tl.where((n >= gelu_from)[None, :], rounded(_gelu_tanh(y, PTX), DTYPE, EMULATE), y)
    if GATE:
        g = tl.load(gate + (m64 // rows_per_batch)[:, None] * gate_row + n[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(residual + m64[:, None] * residual_row + n[None, :] * residual_col, mask=mask, other=0.0).to(tl.float32) + g * y
    tl.store(out + at, storable(y, DTYPE, EMULATE), mask=mask)
    return y


@triton.jit
def logical_rows(n, N):
    """The outputs that stored rows n of a paired part are; rows behind the last are themselves."""
    run = n // _RUN
    return tl.where(n < N, run // 2 * _RUN + n % _RUN + run % 2 * (N // 2), n)


@triton.jit
def _saturated(y, DTYPE: tl.constexpr):
    if tl.float16 == DTYPE:
        y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)
    return y


@triton.jit
def swiglu_rows(y, out, n0, m, M, N, out_row, out_col, BN: tl.constexpr, BM: tl.constexpr, PTX: tl.constexpr, EMULATE: tl.constexpr):
    """SwiGLU and store of y [BN, BM], rows of a paired part from n0 on. Returns the outputs' numbers [BN / 2] and h [BM, BN / 2].

    Rows r and r + 8 of 16 lie in one thread on NVIDIA's accumulators: nothing moves before the store.
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    y = rounded_pairs(_saturated(y, DTYPE), DTYPE, PTX, EMULATE)
    values, gates = tl.split(tl.permute(tl.reshape(y, (BN // (2 * _RUN), 2, _RUN, BM)), (0, 2, 3, 1)))
    below = 1.0 + tl.exp2(-1.4426950408889634 * gates)
    if PTX:
        h = values * (gates * inverse_of(below, PTX))  # a division would be half of this
    else:
        h = values * (gates / below)
    h = tl.trans(tl.reshape(rounded_pairs(_saturated(h, DTYPE), DTYPE, PTX, EMULATE), (BN // 2, BM)))
    n = n0 // 2 + tl.arange(0, BN // 2)
    mask = (m < M)[:, None] & (n < N // 2)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * out_row + n[None, :] * out_col, storable(h, DTYPE, EMULATE), mask=mask)
    return n, h


@triton.jit(do_not_specialize=["M", "rows_per_batch", "gelu_from", *SEGMENT_STARTS])
def _w4_matmul(
    x, x_scales, lowrank, extra, codes, scales, up, extra_up, channel_scale, shift_bias, bias, out, residual, gate,
    M, N, NP, KP, out_row, out_col, residual_row, residual_col, gate_row, rows_per_batch, gelu_from, seg1, seg2, seg3,
    h_row, extra_row, extra_rank, xseg1, xseg2, xseg3,
    KIND: tl.constexpr, E4M3: tl.constexpr, FOLD: tl.constexpr, RANK: tl.constexpr, RB: tl.constexpr, XB: tl.constexpr,
    HAS_CHANNEL: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, GELU: tl.constexpr,
    GATE: tl.constexpr, PAIRED: tl.constexpr, SWIGLU: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, GROUP_M: tl.constexpr,
    PTX: tl.constexpr, MAGIC: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """KIND: "group" (int4: a scale per 64 on both sides; E4M3 says in which form), "plain" (NVFP4)."""
    # Programs that run together share weight rows and token rows: walk GROUP_M token tiles for every weight tile.
    tiles_m = tl.cdiv(M, BM)
    band = GROUP_M * tl.cdiv(NP, BN)
    first = tl.program_id(0) // band * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = tl.program_id(0) % band
    m = (first + inside % height) * BM + tl.arange(0, BM)
    n0 = inside // height * BN
    n = n0 + tl.arange(0, BN)
    j = tl.arange(0, 64)
    token = tl.minimum(m, M - 1)  # rows past the end repeat the last one: no mask in the loop, nothing of them is stored
    x_at = token.to(tl.int64)[None, :] * KP + j[:, None]
    codes_at = codes + n.to(tl.int64)[:, None] * (KP // 2) + j[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    last = KP // 64 - 2
    if KIND != "plain":  # one step ahead: a scale loaded where it is used is waited for in every step
        w0 = tl.load(scales + n).to(tl.float32)
        w1 = tl.load(scales + NP + n).to(tl.float32)
    if KIND == "group":
        a0 = tl.load(x_scales + token)
        a1 = tl.load(x_scales + M + token)
    for k in range(0, KP, 128):
        packed = tl.load(codes_at + k // 2)
        group = k // 64
        if KIND == "plain":
            acc = _half_product(packed, x, x_at + k, scales, n, group, NP, acc, 0, KIND, E4M3, BN, PTX, MAGIC, EMULATE)
            acc = _half_product(packed, x, x_at + (k + 64), scales, n, group + 1, NP, acc, 1, KIND, E4M3, BN, PTX, MAGIC, EMULATE)
        else:
            ahead = tl.minimum(group + 2, last)
            next_w0 = tl.load(scales + ahead * NP + n).to(tl.float32)
            next_w1 = tl.load(scales + (ahead + 1) * NP + n).to(tl.float32)
            low = _half_product(packed, x, x_at + k, scales, n, group, NP, acc, 0, KIND, E4M3, BN, PTX, MAGIC, EMULATE)
            next_a0 = tl.load(x_scales + ahead.to(tl.int64) * M + token)
            next_a1 = tl.load(x_scales + (ahead + 1).to(tl.int64) * M + token)
            acc += low * (w0[:, None] * a0[None, :])
            high = _half_product(packed, x, x_at + (k + 64), scales, n, group + 1, NP, acc, 1, KIND, E4M3, BN, PTX, MAGIC, EMULATE)
            acc += high * (w1[:, None] * a1[None, :])
            a0 = next_a0
            a1 = next_a1
            w0 = next_w0
            w1 = next_w1
    acc *= FOLD
    if HAS_CHANNEL:
        acc *= tl.load(channel_scale + n)[:, None]
    if RANK > 0:
        acc = _add_lowrank(acc, lowrank, up, n, token, segment_of(n0, seg1, seg2, seg3), h_row, RANK, RB, EMULATE)
    if XB > 0:
        acc = _add_lowrank(acc, extra, extra_up, n, token, segment_of(n0, xseg1, xseg2, xseg3), extra_row, extra_rank, XB, EMULATE)
    if PAIRED:
        n = logical_rows(n, N)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if HAS_SHIFT:
        acc += tl.load(shift_bias + n)[:, None]
    if SWIGLU:
        swiglu_rows(acc, out, n0, m, M, N, out_row, out_col, BN, BM, PTX, EMULATE)
    else:
        finish_rows(
            tl.trans(acc), out, residual, gate, n, m, M, N, out_row, out_col, residual_row, residual_col, gate_row, rows_per_batch,
            gelu_from, ACCUMULATE, GELU, GATE, PTX, EMULATE,
        )  # fmt: skip


def check_segments(part: PartView) -> None:
    """Raises ValueError for more low-rank segments than the kernels take."""
    for segments in (part.spec.segments, part.extra.segments if part.extra else ()):
        if len(segments) > 4:
            raise ValueError(f"the layer has {len(segments)} low-rank segments, the kernel takes at most 4")


def launch_sizes(q: QuantizedInput, part: PartView, out: Tensor, finish: Finish) -> tuple[int, ...]:
    """The integer arguments M to xseg3, which both product kernels take in this order."""
    spec, rows = part.spec, q.codes.shape[0]
    strides = (0, 0) if finish.residual is None else finish.residual.stride()
    starts, further = ([*segments[1:], FAR, FAR, FAR][:3] for segments in (spec.segments, part.extra.segments if part.extra else ()))
    h_rows = (0 if h is None else h.stride(0) for h in (q.lowrank, q.extra))
    return (
        rows, spec.n, spec.n_padded, spec.k_padded, *out.stride(), *strides, 0 if finish.gate is None else finish.gate.stride(0),
        min(finish.rows_per_batch, rows), finish.gelu_from or 0, *starts, *h_rows, extra_rank(q, part), *further,
    )  # fmt: skip


def extra_rank(q: QuantizedInput, part: PartView) -> int:
    """R of a part's further columns; 0 without any."""
    return 0 if q.extra is None else part.extra.up.shape[1]


def launch_switches(part: PartView, rank: int, shift: bool, bias: Tensor | None, finish: Finish) -> dict[str, int | bool]:
    """The constants that both product kernels take."""
    return {
        "RANK": rank, "HAS_CHANNEL": part.channel_scale is not None, "HAS_SHIFT": shift,
        "HAS_BIAS": bias is not None, "ACCUMULATE": finish.accumulate, "GELU": finish.gelu_from is not None,
        "GATE": finish.gate is not None, "PAIRED": part.spec.paired, "SWIGLU": finish.swiglu, "EMULATE": interpreting(),
    }  # fmt: skip


def unit_gate(finish: Finish) -> Finish:
    """finish with a gate whose outputs lie side by side."""
    gate = finish.gate
    return finish if gate is None or gate.stride(1) == 1 else replace(finish, gate=gate.contiguous())


def rank_step(rank: int, largest: int) -> int:
    """Ranks that a step of the low-rank product takes: a power of two in the padded rank, 0 without one."""
    return min(rank & -rank, largest)


def variant_of(kind: str, code_form: str) -> tuple[str, bool, float]:
    """(KIND, E4M3, FOLD) of the kernel for a kind of quantised input."""
    if kind == "plain":
        return "plain", False, 2.0**8
    return ("group", True, 2.0**18) if code_form == "e4m3" else ("group", False, 2.0**-4)


def w4_matmul_triton(q: QuantizedInput, part: PartView, bias: Tensor | None, out: Tensor, finish: Finish) -> Tensor:
    """Same arguments and result as w4_matmul_torch. Operands must have been checked. Raises ValueError for more than four segments."""
    spec, rows = part.spec, q.codes.shape[0]
    check_segments(part)
    if rows == 0:
        return out
    kernel_kind, e4m3, fold = variant_of(q.kind, spec.code_form)
    target = target_for(out.device)
    tile = matmul_tile(target, kernel_kind, rows)
    rank = 0 if q.lowrank is None else spec.rank_padded
    shift = spec.act_unsigned and q.kind == "int8"
    finish, dummy = unit_gate(finish), out
    scales = part.scales.view(torch.uint8) if kernel_kind == "plain" else part.scales  # Triton has no e4m3 type below sm_89
    with launch_device(out.device):
        _w4_matmul[(triton.cdiv(rows, tile.bm) * triton.cdiv(spec.n_padded, tile.bn),)](
            q.codes, dummy if q.scales is None else q.scales, q.lowrank if rank else dummy, dummy if q.extra is None else q.extra,
            part.codes, scales, part.up if rank else dummy, dummy if q.extra is None else part.extra.up,
            dummy if part.channel_scale is None else part.channel_scale,
            part.shift_bias if shift else dummy, dummy if bias is None else bias.contiguous(), out,
            dummy if finish.residual is None else finish.residual, dummy if finish.gate is None else finish.gate,
            *launch_sizes(q, part, out, finish),
            KIND=kernel_kind, E4M3=e4m3, FOLD=fold, RB=rank_step(rank, 32), XB=rank_step(extra_rank(q, part), 32),
            BN=tile.bn, BM=tile.bm, GROUP_M=GROUP_M,
            PTX=has_ptx(target), MAGIC=by_magic(),
            **launch_switches(part, rank, shift, bias, finish), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out
