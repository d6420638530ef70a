"""Oracle of expand_weight: a part's packed 4-bit weight as one operand that matrix instructions take, in plain torch.

form     values [Np, Kp]                            what gives the weight back
"e4m3"   e4m3(4 * code * (s / e)), int4 parts       ratio fp32 [ceil(Kp/BLOCK), Np]: w = values * product of ratio[k // BLOCK :]
"half"   fp16(code * s / u), int4 parts             scale fp32 [Np] = u: w = values * u
"plain"  code * s in `dtype`, nvfp4 parts (exact)   nothing

s: the group's scale. e: its block's (block_scale.py), chosen so that rounding to e4m3 costs little: 2.3 % of a weight. The product
multiplies its running sum by ratio[p] = e[p] / e[p + 1] behind block p, by e / 4 behind the last.
u: the power of two in the row's largest scale, 1 for a row of zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .block_scale import GROUPS
from .layout import E2M1, PartView, signed_codes, unpack_nibbles


@dataclass(eq=False)
class ExpandedWeight:
    """One form of a weight; fields and shapes are in this file's docstring."""

    values: Tensor
    ratio: Tensor | None = None
    scale: Tensor | None = None


def power_of_two(x: Tensor) -> Tensor:
    """The power of two in fp32 x > 0 (1 <= x / result < 2); 1 where x is 0 or subnormal."""
    power = (x.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(power > 0, power, 1.0)


def expand_weight_torch(part: PartView, form: str, dtype: torch.dtype | None = None) -> ExpandedWeight:
    """The part's weight in `form` ("e4m3", "half", "plain"); dtype is the 16-bit type or fp32 of "plain"."""
    scales = part.scales.t().float().contiguous()  # [Np, groups]
    n = scales.shape[0]
    if form == "plain":
        values = torch.tensor(E2M1, device=scales.device)[unpack_nibbles(part.codes).int()]
        return ExpandedWeight((values.view(n, -1, part.spec.group) * scales[:, :, None]).view(n, -1).to(dtype))
    codes = signed_codes(part).float().view(n, -1, 64)
    if form == "half":
        unit = power_of_two(scales.amax(1))
        return ExpandedWeight((codes * (scales / unit[:, None])[:, :, None]).view(n, -1).half(), scale=unit)
    e = part.block_scale.t().float()
    fold = scales / e.repeat_interleave(GROUPS, 1)[:, : scales.shape[1]]
    ratio = torch.cat((e[:, :-1] / e[:, 1:], e[:, -1:] / 4), 1)
    return ExpandedWeight((codes * (4 * fold)[:, :, None]).view(n, -1).to(torch.float8_e4m3fn), ratio=ratio.t().contiguous())
