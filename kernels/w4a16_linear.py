"""w4a16_linear: the modulation layers, a row per image of the batch. Formula: w4a16_linear_torch.py, kernel: w4a16_linear_triton.py."""

from __future__ import annotations

from torch import Tensor

from .layout import PartView
from .targets import triton_reason
from .w4a16_linear_torch import check_w4a16, w4a16_linear_torch


def w4a16_linear(x: Tensor, part: PartView, bias: Tensor | None, rows: range | None = None) -> Tensor:
    """x [M, K] (any strides) -> [M, N] in x.dtype, fp32 accumulation.

    rows: of these outputs only (the first one a multiple of 16); the same numbers as among all of them.
    Raises ValueError when x or rows do not fit the part.
    """
    if triton_reason(x.device, needs_dot=False) is not None:
        return w4a16_linear_torch(x, part, bias, rows)
    from .w4a16_linear_triton import w4a16_linear_triton

    return w4a16_linear_triton(x, part, bias, check_w4a16(x, part, rows))
