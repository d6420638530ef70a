"""smooth_quantize: everything that happens to the input of a quantised linear.

[LayerNorm or RMSNorm, and modulation], division by smooth, quantisation, and the low-rank branch's down projection. The formulas are in
smooth_quantize_torch.py, the kernels in row_statistics_triton.py and smooth_quantize_triton.py.
"""

from __future__ import annotations

from torch import Tensor

from .layout import PartView
from .norm_modulate import Norm
from .smooth_quantize_torch import QuantizedInput, check_input, smooth_quantize_torch
from .targets import triton_reason

__all__ = ["Norm", "QuantizedInput", "smooth_quantize"]


def smooth_quantize(
    x: Tensor, part: PartView, mode: str, norm: Norm | None = None, row_amax: Tensor | None = None, *, wide: bool = False
) -> QuantizedInput:
    """x [M, K] (any strides; bf16, fp16 or fp32) -> QuantizedInput for `part`; mode "exact" or "fast".

    row_amax  fp32 [M], without a norm only: the largest |v| of every row (v as smooth_quantize_torch.py defines it) where it is known
              already. Taken as it is; kinds with a scale per group do not need it
    wide      the product will multiply in 16 bit where it has a choice (kind "half")
    Raises ValueError when x, mode, norm or row_amax do not fit the part.
    """
    if triton_reason(x.device) is not None:
        return smooth_quantize_torch(x, part, mode, norm, row_amax, wide=wide)
    from .smooth_quantize_triton import smooth_quantize_triton

    check_input(x, part, mode, norm, row_amax)
    return smooth_quantize_triton(x, part, mode, norm, row_amax, wide=wide)
