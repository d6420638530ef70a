"""smooth_quantize: everything that happens to the input of a quantised linear, in one kernel.

[LayerNorm + modulation], division by smooth, quantisation, and the low-rank branch's down projection. The formulas are in
smooth_quantize_torch.py, the kernel in smooth_quantize_triton.py.
"""

from __future__ import annotations

from torch import Tensor

from .layout import PartView
from .norm_modulate import Norm
from .smooth_quantize_torch import QuantizedInput, check_input, smooth_quantize_torch
from .targets import triton_reason

__all__ = ["Norm", "QuantizedInput", "smooth_quantize"]


def smooth_quantize(x: Tensor, part: PartView, mode: str, norm: Norm | None = None) -> QuantizedInput:
    """x [M, K] (any strides; bf16, fp16 or fp32) -> QuantizedInput for `part`; mode "exact" or "fast".

    Raises ValueError when x, mode or norm do not fit the part.
    """
    if triton_reason(x.device) is not None:
        return smooth_quantize_torch(x, part, mode, norm)
    from .smooth_quantize_triton import smooth_quantize_triton

    check_input(x, part, mode, norm)
    return smooth_quantize_triton(x, part, mode, norm)
