"""w4_matmul: 4-bit product + low-rank up + bias + ending. Formulas in w4_matmul_torch.py.

Kernels in w4_matmul_triton.py (one launch) and w4_matmul_wide.py (the weight is unpacked first, once for all tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .expand_weight_torch import ExpandedWeight
from .layout import PartSpec, PartView
from .norm_modulate import Norm
from .smooth_quantize import QuantizedInput, smooth_quantize
from .smooth_quantize_torch import kind_of, plain_dtype
from .targets import Target, target_for, triton_reason
from .w4_matmul_torch import PLAIN, Finish, Peak, check_operands, swiglu_torch, w4_matmul_torch

__all__ = ["Finish", "Peak", "finds_peak", "quantize_for", "swiglu_torch", "unpack_for", "w4_matmul"]


def w4_matmul(
    q: QuantizedInput, part: PartView, bias: Tensor | None, out: Tensor, finish: Finish = PLAIN, weight: ExpandedWeight | None = None
) -> Tensor:
    """Writes y [M, N] of a quantised linear into `out` and returns it; with SwiGLU h [M, N/2].

    out     [M, N] of any strides, also a slice of a wider tensor; may be `finish.residual` itself
    bias    [N] of any float type
    weight  what unpack_for gave for this input, where the weight has been unpacked already
    Raises ValueError when the operands do not fit the part.
    """
    no_matrix_unit = q.codes.dtype == torch.float32 and out.device.type != "cpu"  # NVFP4 on fp32 input: 16-bit operands would round it
    if no_matrix_unit or triton_reason(out.device) is not None:
        return w4_matmul_torch(q, part, bias, out, finish)
    check_operands(q, part, out, finish)
    if takes_wide(q.kind, part.spec, q.codes.shape[0], target_for(out.device)):
        from .w4_matmul_wide import w4_matmul_wide

        return w4_matmul_wide(q, part, bias, out, finish, weight)
    if finish.peak is not None:
        raise ValueError("row maxima are found by the product for many tokens only: ask finds_peak first")
    from .w4_matmul_triton import w4_matmul_triton

    return w4_matmul_triton(q, part, bias, out, finish)


def takes_wide(kind: str, spec: PartSpec, rows: int, target: Target) -> bool:
    """Whether the weight is unpacked first: where many tokens share it, or where the other kernel has no form for these activations."""
    return kind in ("e4m3", "half") or (spec.precision == "nvfp4" and _many_rows(rows, target))


def unpack_for(part: PartView, mode: str, rows: int, dtype: torch.dtype) -> ExpandedWeight | None:
    """The weight as w4_matmul unpacks it for `rows` tokens of `dtype`, for who would do that earlier; None where it does not."""
    device = part.codes.device
    kind = kind_of(part, mode, _wide(part, rows, device))
    if triton_reason(device) is not None or not takes_wide(kind, part.spec, rows, target_for(device)):
        return None
    from .expand_weight_triton import expand_weight_triton

    return expand_weight_triton(part, kind, plain_dtype(dtype))


def _wide(part: PartView, rows: int, device: torch.device) -> bool:
    return part.spec.code_form == "e4m3" and _many_rows(rows, target_for(device))


def _many_rows(rows: int, target: Target) -> bool:
    return rows >= 256 and not target.name.startswith("gfx")


def finds_peak(spec: PartSpec, device: torch.device, mode: str, rows: int) -> bool:
    """Whether w4_matmul leaves row maxima (`Finish.peak`) when it multiplies `rows` tokens by this part on this device."""
    if spec.code_form != "e4m3" or triton_reason(device) is not None:
        return False
    return mode == "fast" or (mode == "exact" and _many_rows(rows, target_for(device)))


def quantize_for(x: Tensor, part: PartView, mode: str, norm: Norm | None = None, row_amax: Tensor | None = None) -> QuantizedInput:
    """smooth_quantize in the form that w4_matmul multiplies fastest for x's number of rows. Arguments and errors as `smooth_quantize`."""
    return smooth_quantize(x, part, mode, norm, row_amax, wide=_wide(part, x.shape[0], x.device))
