"""Triton kernel of norm_gate; the formula is stated in norm_gate.py. A program has one row of x and y in registers: each is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rounding import storable
from .targets import interpreting, launch_device


@triton.jit(do_not_specialize=["rows_per_batch"])
def _norm_gate(
    x, y, gate, out, K, x_row, y_row, gate_row, out_row, rows_per_batch, eps, BLOCK: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    batch = (row // rows_per_batch).to(tl.int64)
    row = row.to(tl.int64)
    cols = tl.arange(0, BLOCK)
    live = cols < K
    v = tl.load(y + row * y_row + cols, mask=live, other=0.0).to(tl.float32)
    residual = tl.load(x + row * x_row + cols, mask=live, other=0.0)  # on its way while the sum is made
    g = tl.load(gate + batch * gate_row + cols, mask=live, other=0.0).to(tl.float32)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(v * v, axis=0) / K + eps))
    total = tl.fma(v * rstd, g, residual.to(tl.float32))
    if tl.float16 == out.dtype.element_ty:
        total = tl.minimum(tl.maximum(total, -65504.0), 65504.0)
    tl.store(out + row * out_row + cols, storable(total, out.dtype.element_ty, EMULATE), mask=live)


def row_block(k: int) -> tuple[int, int]:
    """(BLOCK, warps) of a program that holds rows of k numbers: 32 a thread at Z-Image's 3840."""
    block = max(triton.next_power_of_2(k), 128)
    return block, min(max(block // 1024, 1), 16)


def norm_gate_triton(x: Tensor, y: Tensor, gate: Tensor, rows_per_batch: int, eps: float, out: Tensor | None = None) -> Tensor:
    """Same arguments and result as norm_gate_torch, already checked."""
    rows, k = x.shape
    out = torch.empty(rows, k, dtype=x.dtype, device=x.device) if out is None else out
    if rows == 0:
        return out
    gate = gate if gate.stride(1) == 1 else gate.contiguous()
    block, warps = row_block(k)
    with launch_device(x.device):
        _norm_gate[(rows,)](
            x, y, gate, out, k, x.stride(0), y.stride(0), gate.stride(0), out.stride(0), min(rows_per_batch, rows), eps,
            BLOCK=block, EMULATE=interpreting(), num_warps=warps,
        )  # fmt: skip
    return out
