"""t5_linear: a linear of the 4-bit T5 encoder. Formula: t5_linear_torch.py, kernels: t5_linear_triton.py, bytes: t5_layout.py."""

from __future__ import annotations

from torch import Tensor

from .t5_layout import T5View
from .t5_linear_torch import check_t5, t5_linear_torch
from .targets import triton_reason


def t5_linear(x: Tensor, view: T5View, bias: Tensor | None = None) -> Tensor:
    """x [M, K] (any strides; fp16, bf16 or fp32) -> [M, N] in x.dtype, fp32 accumulation. Raises ValueError when x or bias does not fit."""
    if triton_reason(x.device, needs_dot=False) is not None:
        return t5_linear_torch(x, view, bias)
    from .t5_linear_triton import t5_linear_triton

    check_t5(x, view, bias)
    return t5_linear_triton(x, view, bias)
