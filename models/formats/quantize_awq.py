"""Quantise a linear to groups of 128 inputs with a scale and a zero each (AWQ's format, T5 encoder): the best clipping of every group.

W[n, k] = code * scale + zero. A group starts from rounding to nearest with an integer zero point. Then its minimum and its maximum are
shrunk by every pair of SHRINK's factors, and whatever has the least weighted squared error is kept; at last POLISH times scale and zero are
fitted to the codes by weighted least squares. All of it sees scale and zero as the file will hold them, so the result is never worse than
rounding to nearest. The clipping search is that of AWQ (arXiv 2306.00978) with both ends free, the fit one of linear regression.

The weight of a column is the mean square of the input that meets it, as far as it is known: `importance`.
"""

import torch
from torch import Tensor

from ...kernels.t5_layout import GROUP, T5Linear, check_size

SHRINK = tuple(1 - i / 20 for i in range(9))  # 1 to 0.6
POLISH = 2
LEVELS = 15
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 25}  # weights at a time: temporaries in a CPU's cache, 128 MB each on a GPU


def quantize_groups(weight: Tensor, importance: Tensor | None = None, dtype: torch.dtype = torch.float16, scale: Tensor | None = None,
                    search: bool = True) -> T5Linear:  # fmt: skip
    """The 4-bit linear of weight [N, K] (any float type, fp8 too), made on the weight's device.

    importance  fp32 [K] >= 0, the mean square of each input up to a factor; None: all alike
    dtype       fp16 or bf16, the type of scales and zeros
    scale       what the weight is to be multiplied by: one number, or [N, 1] (scaled fp8)
    search      False: round to nearest with an integer zero point, and leave it at that
    ValueError for sizes that the format cannot hold, and for values that are not finite or beyond `dtype`.
    """
    n, k = weight.shape
    check_size(n, k)
    columns = None if importance is None else _columns(importance.to(weight.device), k)
    rows = max(_CHUNK.get(weight.device.type, 1 << 19) // k, 1)
    made = []
    for start in range(0, n, rows):
        part = weight[start : start + rows].float()
        if scale is not None:
            part = part * (scale if scale.numel() == 1 else scale[start : start + rows])
        groups = part.view(part.shape[0], -1, GROUP)
        if not groups.abs().amax() <= torch.finfo(dtype).max:  # also what is no number
            raise ValueError(f"it holds values that are not finite or beyond {torch.finfo(dtype).max:g}")
        made.append(_quantize(groups, columns, dtype, search))
    codes, scales, zeros = (torch.cat(parts) for parts in zip(*made, strict=True))
    return T5Linear(codes, scales, zeros)


def _columns(importance: Tensor, k: int) -> Tensor:
    """fp32 [K/128, 128], every group's mean 1; a group that no input meets counts all columns alike."""
    columns = importance.float().reshape(k // GROUP, GROUP)
    mean = columns.mean(1, keepdim=True)
    return torch.where(mean > 0, columns / mean, 1.0)


def _quantize(groups: Tensor, columns: Tensor | None, dtype: torch.dtype, search: bool) -> tuple[Tensor, Tensor, Tensor]:
    """codes uint8 [rows, K], scales and zeros [rows, K/128] of groups fp32 [rows, K/128, 128]."""
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    best = _Best(groups, columns, dtype)
    with_zero = (high.clamp(min=0) - low.clamp(max=0)) / LEVELS
    best.offer(with_zero, (low.clamp(max=0) / torch.where(with_zero > 0, with_zero, 1.0)).round() * with_zero)
    if search:
        for a in SHRINK:
            for b in SHRINK:
                best.offer((high * b - low * a) / LEVELS, low * a)
        for _ in range(POLISH):
            best.offer(*_fit(groups, best.codes(), columns))
    return best.codes().to(torch.uint8).flatten(1), best.scale.to(dtype).squeeze(2), best.zero.to(dtype).squeeze(2)


class _Best:
    """The scale and zero of the least weighted error so far, of every group: fp32 [rows, K/128, 1], values that `dtype` has."""

    def __init__(self, groups: Tensor, columns: Tensor | None, dtype: torch.dtype):
        self.groups, self.columns, self.dtype = groups, columns, dtype
        self.scale = self.zero = self.error = None

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        scale, zero = scale.to(self.dtype).float(), zero.to(self.dtype).float()
        error = _codes(self.groups, scale, zero).mul_(scale).add_(zero).sub_(self.groups).square_()
        if self.columns is not None:
            error.mul_(self.columns)
        error = error.sum(2, keepdim=True)
        if self.error is None:
            self.scale, self.zero, self.error = scale, zero, error
            return
        better = error < self.error
        self.scale, self.zero = torch.where(better, scale, self.scale), torch.where(better, zero, self.zero)
        self.error = torch.where(better, error, self.error)

    def codes(self) -> Tensor:
        """fp32 [rows, K/128, 128], 0..15."""
        return _codes(self.groups, self.scale, self.zero)


def _codes(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (groups - zero).div_(torch.where(scale == 0, 1.0, scale)).round_().clamp_(0, LEVELS)


def _fit(groups: Tensor, codes: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """(scale, zero) of the weighted linear regression of a group's weights on its codes; scale 0 where all codes are alike."""
    share = 1 / GROUP if columns is None else columns / columns.sum(1, keepdim=True)
    code_mean, mean = (codes * share).sum(2, keepdim=True), (groups * share).sum(2, keepdim=True)
    codes = codes - code_mean
    spread = (codes.square() * share).sum(2, keepdim=True)
    scale = (codes * (groups - mean) * share).sum(2, keepdim=True) / torch.where(spread > 0, spread, 1.0)
    return scale, mean - scale * code_mean
