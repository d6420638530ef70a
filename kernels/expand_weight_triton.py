"""Triton kernel of expand_weight; what it computes is stated in expand_weight_torch.py.

The result is scratch: 57 MB read and written for the largest FLUX linear, which mostly stays in L2 until the product reads it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import PartView
from .rounding import storable
from .targets import interpreting, launch_device

ROWS, SLICES = 8, 8  # a program expands 8 outputs x 8 slices of 128 inputs


@triton.jit
def _code_bytes(nibble):
    """Sign-magnitude nibbles (0b1000 = -8) -> bytes s000mmmm."""
    sign = nibble & 8
    magnitude = nibble & 7
    eight = sign & ((magnitude + 7) ^ 8)  # 8 where the nibble is 0b1000, the only one with a sign and no magnitude
    return magnitude | eight | (sign << 4)


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
def _expand_weight(
    codes, scales, out, NP, KP, NVFP4: tl.constexpr, BN: tl.constexpr, S: tl.constexpr, EMULATE: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    s = tl.program_id(1) * S + tl.arange(0, S)
    j = tl.arange(0, 64)
    live = (s < KP // 128)[None, :, None] & (n >= 0)[:, None, None] & (j >= 0)[None, None, :]
    row = n.to(tl.int64)[:, None, None]
    packed = tl.load(codes + row * (KP // 2) + s[None, :, None] * 64 + j[None, None, :], mask=live, other=0)
    for half in tl.static_range(2):
        nibble = (packed >> (4 * half)) & 15
        at = row * KP + s[None, :, None] * 128 + half * 64 + j[None, None, :]
        if NVFP4:
            group = s[None, :, None] * 8 + half * 4 + tl.arange(0, 4)[None, None, :]
            scale = _e4m3_values(tl.load(scales + group * NP + n[:, None, None], mask=(s < KP // 128)[None, :, None], other=0))
            wide = tl.reshape(tl.broadcast_to(scale[:, :, :, None], (BN, S, 4, 16)), (BN, S, 64))
            tl.store(out + at, storable(_e2m1_values(nibble) * wide, out.dtype.element_ty, EMULATE), mask=live)
        else:
            tl.store(out + at, _code_bytes(nibble), mask=live)


def expand_weight_triton(part: PartView, dtype: torch.dtype) -> Tensor:
    """Same arguments and result as expand_weight_torch."""
    spec = part.spec
    out = torch.empty(spec.n_padded, spec.k_padded, dtype=dtype, device=part.codes.device)
    nvfp4 = spec.precision == "nvfp4"
    scales = part.scales.view(torch.uint8) if nvfp4 else part.scales  # Triton has no e4m3 type below sm_89
    with launch_device(out.device):
        _expand_weight[(spec.n_padded // ROWS, triton.cdiv(spec.k_padded // 128, SLICES))](
            part.codes, scales, out if nvfp4 else out.view(torch.uint8), spec.n_padded, spec.k_padded,
            NVFP4=nvfp4, BN=ROWS, S=SLICES, EMULATE=interpreting(), num_warps=4,
        )  # fmt: skip
    return out
