"""Oracle of t5_linear: y = x @ (code * scale + zero)^T + bias, in fp32, rounded once to x.dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import unpack_nibbles
from .t5_layout import GROUP, T5View

ROWS = 1024  # outputs whose weight is unpacked at a time


def check_t5(x: Tensor, view: T5View, bias: Tensor | None) -> None:
    """Raises ValueError when x is no float matrix that fits the linear, or the bias does not."""
    if x.ndim != 2 or x.shape[1] != view.spec.k:
        raise ValueError(f"x has shape {list(x.shape)}, expected [M, {view.spec.k}]")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"x is {x.dtype}, expected float16, bfloat16 or float32")
    if bias is not None and tuple(bias.shape) != (view.spec.n,):
        raise ValueError(f"bias has shape {list(bias.shape)}, expected [{view.spec.n}]")


def t5_weight(view: T5View, start: int, end: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[end - start, K] in dtype: code * scale + zero of some outputs, computed in fp32 and rounded once."""
    weight = unpack_nibbles(view.codes[start:end]).float().view(end - start, -1, GROUP)
    weight *= view.scales[start:end].float()[:, :, None]
    weight += view.zeros[start:end].float()[:, :, None]
    return weight.view(end - start, -1).to(dtype)


def t5_linear_torch(x: Tensor, view: T5View, bias: Tensor | None = None) -> Tensor:
    """x [M, K] of any strides -> [M, N] in x.dtype. Raises ValueError as `check_t5`."""
    check_t5(x, view, bias)
    n = view.spec.n
    y = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    wide = x.float()
    for start in range(0, n, ROWS):
        end = min(start + ROWS, n)
        part = wide.new_empty(wide.shape[0], end - start).addmm_(wide, t5_weight(view, start, end).t(), beta=0)  # autocast leaves it alone
        y[:, start:end] = part if bias is None else part + bias[start:end].float()
    return y
