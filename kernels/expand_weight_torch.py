"""Oracle of expand_weight: a part's packed 4-bit weight as one operand that matrix instructions take, in plain torch. Exact in every form.

int4, code form e4m3    the code alone, as the byte s000mmmm: read as e4m3 it is code * 2^-9
nvfp4                   code * group scale in 16 bit (6 significant bits)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import E2M1, PartView, signed_codes, unpack_nibbles


def expand_weight_torch(part: PartView, dtype: torch.dtype) -> Tensor:
    """[Np, Kp] in `dtype`: float8_e4m3fn for an int4 part in e4m3 form, a 16-bit type or fp32 for nvfp4."""
    if part.spec.precision == "nvfp4":
        values = torch.tensor(E2M1, device=part.codes.device)[unpack_nibbles(part.codes).int()]
        n, k = values.shape
        return (values.view(n, -1, part.spec.group) * part.scales.t().float()[:, :, None]).view(n, k).to(dtype)
    return (signed_codes(part).float() / 512).to(dtype)
