"""Triton kernel of expand_weight; what it computes is stated in expand_weight_torch.py.

The result is scratch: 57 MB read and written for the largest FLUX linear, which mostly stays in L2 until the product reads it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_scale import BLOCK
from .expand_weight_torch import ExpandedWeight
from .layout import PartView
from .rounding import e4m3_byte, has_ptx, storable
from .targets import interpreting, launch_device, target_for
from .w4_matmul_triton import e4m3_weights

ROWS = 8  # outputs a program expands


@triton.jit
def _e2m1_values(nibble):
    """e2m1 codes -> fp32: the three magnitude bits are the top of an fp16 number, 2^14 too small."""
    code = nibble.to(tl.uint16)
    return (((code & 8) << 12) | ((code & 7) << 9)).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def _e4m3_values(byte):
    """e4m3 bytes -> fp32, on every target: the seven magnitude bits are the top of an fp16 number, 2^8 too small."""
    wide = byte.to(tl.uint16)
    return (((wide & 128) << 8) | ((wide & 127) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _scale(scales, n, group, NP, KP):
    """fp32 scale of a group, 0 behind K."""
    return tl.load(scales + group * NP + n, mask=(group < KP // 64) & (n >= 0), other=0.0).to(tl.float32)


@triton.jit
def _unit(scales, n, NP, KP, GROUPS: tl.constexpr):
    """The power of two in the largest scale of rows n [BN]; 1 for a row of zeros."""
    groups = tl.arange(0, GROUPS)
    live = (groups < KP // 64)[:, None] & (n >= 0)[None, :]
    largest = tl.max(tl.load(scales + groups[:, None] * NP + n[None, :], mask=live, other=0.0).to(tl.float32), axis=0)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(power > 0.0, power, 1.0)


@triton.jit
def _expand_weight(
    codes, scales, block_scale, out, table, NP, KP,
    FORM: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, S: tl.constexpr, PTX: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    s = tl.program_id(1) * S + tl.arange(0, S)
    j = tl.arange(0, 64)
    live = (s < KP // 128)[None, :, None] & (n >= 0)[:, None, None] & (j >= 0)[None, None, :]
    row = n.to(tl.int64)[:, None, None]
    packed = tl.load(codes + row * (KP // 2) + s[None, :, None] * 64 + j[None, None, :], mask=live, other=0)
    at = row * KP + s[None, :, None] * 128 + j[None, None, :]
    if FORM == "plain":
        for half in tl.static_range(2):
            group = s[None, :, None] * 8 + half * 4 + tl.arange(0, 4)[None, None, :]
            scale = _e4m3_values(tl.load(scales + group * NP + n[:, None, None], mask=(s < KP // 128)[None, :, None], other=0))
            wide = tl.reshape(tl.broadcast_to(scale[:, :, :, None], (BN, S, 4, 16)), (BN, S, 64))
            value = _e2m1_values((packed >> (4 * half)) & 15) * wide
            tl.store(out + at + half * 64, storable(value, out.dtype.element_ty, EMULATE), mask=live)
    else:
        first = _scale(scales, n[:, None], 2 * s[None, :], NP, KP)
        second = _scale(scales, n[:, None], 2 * s[None, :] + 1, NP, KP)
        low = e4m3_weights(packed, 0, PTX).to(tl.float32)  # code * 2^-9
        high = e4m3_weights(packed, 1, PTX).to(tl.float32)
        if FORM == "half":
            unit = _unit(scales, n, NP, KP, GROUPS)
            units = tl.broadcast_to(unit[:, None], first.shape)
            tl.store(out + at, (low * (tl.div_rn(first, units) * 512.0)[:, :, None]).to(tl.float16), mask=live)
            tl.store(out + at + 64, (high * (tl.div_rn(second, units) * 512.0)[:, :, None]).to(tl.float16), mask=live)
            tl.store(table + n, unit, mask=(n >= 0) & (tl.program_id(1) == 0))
        else:
            each: tl.constexpr = BLOCK // 128
            block = (s // each)[None, :]
            last = (KP - 1) // BLOCK
            inside = (s < KP // 128)[None, :] & (n >= 0)[:, None]
            e = tl.load(block_scale + block * NP + n[:, None], mask=inside, other=1.0).to(tl.float32)
            following = tl.load(block_scale + tl.minimum(block + 1, last) * NP + n[:, None], mask=inside, other=1.0).to(tl.float32)
            tl.store(out + at, e4m3_byte(low * (tl.div_rn(first, e) * 2048.0)[:, :, None], EMULATE), mask=live)
            tl.store(out + at + 64, e4m3_byte(high * (tl.div_rn(second, e) * 2048.0)[:, :, None], EMULATE), mask=live)
            ratio = tl.div_rn(e, tl.where(block == last, 4.0, following))
            tl.store(table + block * NP + n[:, None], ratio, mask=inside & (s % each == 0)[None, :])


def program_slices(form: str, cols: int) -> int:
    """Slices of 128 inputs that a program expands."""
    return 4 if form == "half" and cols < 8192 else 8


def expand_weight_triton(part: PartView, form: str, dtype: torch.dtype | None = None) -> ExpandedWeight:
    """Same arguments and result as expand_weight_torch."""
    rows, cols = part.spec.n_padded, part.spec.k_padded
    device = part.codes.device
    dtype = {"e4m3": torch.float8_e4m3fn, "half": torch.float16}.get(form, dtype)
    values = torch.empty(rows, cols, dtype=dtype, device=device)
    table: Tensor | None = None
    if form != "plain":
        table = torch.empty((triton.cdiv(cols, BLOCK), rows) if form == "e4m3" else (rows,), dtype=torch.float32, device=device)
    slices = program_slices(form, cols)
    with launch_device(device):
        _expand_weight[(rows // ROWS, triton.cdiv(cols // 128, slices))](
            part.codes,
            part.scales.view(torch.uint8) if form == "plain" else part.scales,  # Triton has no e4m3 type below sm_89
            part.scales if part.block_scale is None else part.block_scale,
            values.view(torch.uint8) if form == "e4m3" else values, values if table is None else table, rows, cols,
            FORM=form, GROUPS=triton.next_power_of_2(cols // 64) if form == "half" else 1, BLOCK=BLOCK, BN=ROWS, S=slices,
            PTX=has_ptx(target_for(device)), EMULATE=interpreting(), num_warps=4,
        )  # fmt: skip
    return ExpandedWeight(values, ratio=table if form == "e4m3" else None, scale=table if form == "half" else None)
