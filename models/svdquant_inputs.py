"""What the quantiser knows of a linear's inputs: the statistics it is given, and what it reads off them for one choice of smoothing.

Inputs are written as the 4-bit branch sees them, divided by smooth: x before the kernels quantise them, a after. Then the outputs are
a @ W4.T + x @ (branch times smooth).T, with a shift taken off as the stored bias takes it off.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.layout import SHIFT
from ..kernels.smooth_quantize_torch import divide, divided_by_smooth, e2m1_round
from .formats.nunchaku import GROUP

PEAK = 6.0  # squared largest of a group of weights or activations over their mean square, about


@dataclass
class InputStatistics:
    """What met a linear with K inputs: amax [K] and square [K] (mean of squares) fp32 over `count` rows, sample [S, K] some of them (S may
    be 0), of any float type; on any device. Unshifted: what comes out of the GELU, where there is one."""

    amax: Tensor
    square: Tensor
    sample: Tensor
    count: int

    def columns(self, start: int, stop: int) -> InputStatistics:
        """Of the inputs start .. stop - 1."""
        return InputStatistics(self.amax[start:stop], self.square[start:stop], self.sample[:, start:stop], self.count)


def quantized_input(x: Tensor, smooth: Tensor, precision: str, act_unsigned: bool = False) -> Tensor:
    """fp32 [S, K]: what the kernels in exact mode make of x / smooth, x [S, K] of a 16-bit type. Shifted activations: SHIFT / smooth taken
    off again, as the bias does, so that the result stands for x / smooth here too."""
    v = divided_by_smooth(x, smooth.float(), act_unsigned)
    groups = v.unflatten(1, (-1, GROUP[precision]))
    amax = groups.abs().amax(-1, keepdim=True)
    if precision == "nvfp4":
        scale = divide(amax, 6.0).clamp(max=448.0)
        return (e2m1_round(groups / torch.where(scale > 0, scale, 1.0)) * scale.to(torch.float8_e4m3fn).float()).flatten(1)
    scale = divide(amax, 15.0 if act_unsigned else 7.0)
    codes = (groups / torch.where(scale > 0, scale, 1.0)).round().clamp(0 if act_unsigned else -8, 15 if act_unsigned else 7)
    values = (codes * scale).flatten(1)
    return values - SHIFT / smooth.float() if act_unsigned else values


def shrinkage(centred: Tensor) -> Tensor:
    """fp32 scalar, 0.02 to 1: how far the covariance of centred rows [S, K] is to be shrunk towards its diagonal for the least expected
    squared error (Schaefer and Strimmer 2005)."""
    s = len(centred)
    if s < 2:
        return torch.ones((), device=centred.device)
    squares = centred.square()
    moments = (centred @ centred.T).square().sum() / s**2 - squares.mean(0).square().sum()  # squared, off the diagonal
    spread = (squares.sum(1).square() - squares.square().sum(1)).sum() / s
    return torch.where(moments > 0, (spread - moments) / ((s - 1) * moments), 1.0).clamp(0.02, 1.0)


@dataclass(eq=False)
class Metric:
    """Second moments rows.T @ rows + diag(columns^2) of a linear's inputs: rows [S, K] or None, columns [K], fp32."""

    rows: Tensor | None
    columns: Tensor

    @staticmethod
    def of(sample: Tensor, square: Tensor) -> Metric:
        """From sampled rows and the mean squares of all. The mean, which is large behind a GELU, is taken as it is."""
        if not len(sample):
            return Metric(None, square.sqrt())
        mean = sample.mean(0)
        centred = sample - mean
        part = shrinkage(centred)
        variance = (square - mean.square()).clamp(min=0.01 * square)
        return Metric(torch.cat([centred * ((1 - part) / len(sample)).sqrt(), mean[None]]), (part * variance).sqrt())

    def matrix(self) -> Tensor:
        return self.rows.T @ self.rows + torch.diag(self.columns.square())


@dataclass(eq=False)
class LayerInputs:
    """Inputs of one linear under one smooth t [K] fp32: of its sample, x [S, K] divided by t but not quantised, a quantised. square [K]:
    mean squares of x / t over all rows. fit and score: which rows are used for what."""

    t: Tensor
    x: Tensor
    a: Tensor
    square: Tensor
    fit: Tensor = field(init=False)
    score: Tensor = field(init=False)

    def __post_init__(self):
        every = torch.arange(len(self.x), device=self.x.device)
        apart = len(every) >= 64
        self.fit, self.score = (every[every % 4 != 3], every[every % 4 == 3]) if apart else (every, every)

    def moments(self) -> Metric:
        return Metric.of(self.x[self.fit], self.square)

    def quantized_moments(self) -> Metric:
        a = self.a[self.fit]
        noise = (a - self.x[self.fit]).square().mean(0)
        return Metric.of(a, self.square + noise)

    def rounding_cost(self, group: int) -> Metric:
        """A column's part in what rounding costs, from the group that it lies in: rounded activations times the weight there, and rounded
        weights times the activations."""
        cost = self.square.view(-1, group).mean(1)
        if len(self.fit):
            largest = self.x[self.fit].abs().unflatten(1, (-1, group)).amax(2).square().mean(0)
            cost = (cost + largest / PEAK) / 2
        return Metric(None, cost.sqrt().repeat_interleave(group))


def layer_inputs(known: InputStatistics | None, smooth: Tensor, precision: str, act_unsigned: bool) -> LayerInputs:
    """On the device of smooth [K], which is of the file's type. Rows are rounded to the type of the sample, bfloat16 for a wider one."""
    t = smooth.float()
    square = torch.ones_like(t) if known is None else known.square.to(t)
    square = square + 1e-4 * square.mean()  # what was zero in the sample need not always be
    x = torch.zeros(0, len(t)) if known is None else known.sample
    x = x.to(t.device, x.dtype if x.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16)
    return LayerInputs(t, x.float() / t, quantized_input(x, smooth, precision, act_unsigned), square / t.square())
