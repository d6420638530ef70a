"""Oracle of w4a16_linear: y = x @ (code*scale + zero)^T + (x @ extra.down) @ extra.up^T + bias, in fp32, rounded once to x.dtype."""

from __future__ import annotations

from torch import Tensor

from .layout import PartView, unpack_nibbles
from .smooth_quantize_torch import check_columns
from .w4_matmul_torch import lowrank_product


def check_w4a16(x: Tensor, part: PartView, rows: range | None) -> range:
    """rows, or all of them. Raises ValueError when the part is no w4a16 layer or x or rows do not fit it."""
    if part.spec.precision != "w4a16":
        raise ValueError(f"this is a {part.spec.precision} layer, expected w4a16")
    if x.ndim != 2 or x.shape[1] != part.spec.k:
        raise ValueError(f"x has shape {list(x.shape)}, expected [M, {part.spec.k}]")
    check_columns(part)
    rows = range(part.spec.n) if rows is None else rows
    if rows.step != 1 or rows.start % 16 or not 0 <= rows.start <= rows.stop <= part.spec.n:
        raise ValueError(f"rows are {rows}, expected some of {part.spec.n} that lie side by side, from a multiple of 16 on")
    return rows


def w4a16_linear_torch(x: Tensor, part: PartView, bias: Tensor | None, rows: range | None = None) -> Tensor:
    """x [M, K] of any strides -> [M, N] in x.dtype, or the outputs in `rows`. Raises ValueError as `check_w4a16`."""
    rows = check_w4a16(x, part, rows)
    n, k = part.spec.n, part.spec.k
    weight = unpack_nibbles(part.codes[:n]).float().view(n, -1, 64)
    weight *= part.scales.t()[:n].float()[:, :, None]
    weight += part.zeros.t()[:n].float()[:, :, None]
    y = x.float() @ weight.view(n, -1)[:, :k].t()
    if part.extra is not None:
        y += lowrank_product(x.float() @ part.extra.down[:k].float(), part.extra.up, part.extra.segments, n)
    return (y if bias is None else y + bias.float()).to(x.dtype)[:, rows.start : rows.stop]
