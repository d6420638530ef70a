"""RMSNorm of what joins a residual stream: out = x + gate * (y / sqrt(mean(y^2) + eps)), in fp32, rounded once.

How Z-Image's blocks end: the norm's weight and tanh of the modulation are in gate already. RMSNorm: arXiv 1910.07467.
The kernel is in norm_gate_triton.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .norm_modulate import batch_rows, round_to
from .targets import triton_reason


def check_operands(x: Tensor, y: Tensor, gate: Tensor, rows_per_batch: int, out: Tensor | None) -> None:
    """Raises ValueError when shapes or types do not fit each other."""
    if x.ndim != 2 or y.shape != x.shape:
        raise ValueError(f"x has shape {list(x.shape)} and y {list(y.shape)}, expected [M, K] both")
    for name, tensor in (("x", x), ("y", y)):
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"{name} is {tensor.dtype}, expected bfloat16, float16 or float32")
    rows, k = x.shape
    batches = -(-rows // rows_per_batch)
    if gate.ndim != 2 or gate.shape[0] < batches or gate.shape[1] != k:
        raise ValueError(f"gate has shape {list(gate.shape)}, expected [{batches}, {k}]")
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype):
        raise ValueError(f"out is {out.dtype} {list(out.shape)}, expected {x.dtype} {list(x.shape)}")


def norm_gate(x: Tensor, y: Tensor, gate: Tensor, rows_per_batch: int, eps: float, out: Tensor | None = None) -> Tensor:
    """x, y [M, K] (bf16, fp16 or fp32; last dimension contiguous, else the torch path) -> out [M, K] of x's type.

    gate [B, K] of any float type: all that multiplies; row m takes gate[m // rows_per_batch]. out: where to write, x itself too.
    Raises ValueError when shapes or types do not fit each other.
    """
    check_operands(x, y, gate, rows_per_batch, out)
    contiguous = all(t.stride(1) == 1 for t in (x, y, x if out is None else out))
    if triton_reason(x.device, needs_dot=False) is not None or not contiguous:
        return norm_gate_torch(x, y, gate, rows_per_batch, eps, out)
    from .norm_gate_triton import norm_gate_triton

    return norm_gate_triton(x, y, gate, rows_per_batch, eps, out)


def norm_gate_torch(x: Tensor, y: Tensor, gate: Tensor, rows_per_batch: int, eps: float, out: Tensor | None = None) -> Tensor:
    """Oracle of norm_gate."""
    v = y.float()
    normed = v * torch.rsqrt(v.square().mean(dim=1, keepdim=True) + eps)
    found = round_to(x.float() + batch_rows(gate, x.shape[0], rows_per_batch) * normed, x.dtype)
    return found if out is None else out.copy_(found)
