"""Oracle of expand_weight: a part's packed 4-bit weight as one operand that matrix instructions take, in plain torch.

form     values [Np, Kp]                            what gives the weight back
"e4m3"   e4m3(32 * code * (s / e)), int4 parts      ratio fp32 [ceil(Kp/BLOCK), Np]: w = values * product of ratio[k // BLOCK] on
"half"   fp16(code * s / u), int4 parts             scale fp32 [Np] = u: w = values * u
"plain"  code * s in `dtype`, nvfp4 parts (exact)   nothing

s: the group's scale. e: the largest scale of the groups in a block of BLOCK inputs (the last block may be shorter), 1 where all are 0. An
e4m3 number has four significant bits: codes of the group with the largest scale are exact in it, the others rounded (2.2 % of a weight in
all; 1.8 % with blocks of 128, 2.4 % with 512, 2.6 % if every group were rounded). The product multiplies its running sum by ratio[p] =
e[p] / e[p + 1] behind block p, by e / 32 behind the last.
u: the power of two in the row's largest scale, 1 for a row of zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import E2M1, PartView, signed_codes, unpack_nibbles

BLOCK = 256  # inputs that share a scale in the e4m3 form


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
    groups = BLOCK // 64
    blocks = F.pad(scales, (0, -scales.shape[1] % groups)).view(n, -1, groups)
    largest = blocks.amax(2)
    largest = torch.where(largest > 0, largest, 1.0)
    fold = (blocks / largest[:, :, None]).view(n, -1)[:, : scales.shape[1]]
    ratio = torch.cat((largest[:, :-1] / largest[:, 1:], largest[:, -1:] / 32), 1)
    return ExpandedWeight((codes * (32 * fold)[:, :, None]).view(n, -1).to(torch.float8_e4m3fn), ratio=ratio.t().contiguous())
