"""Oracle of w4_matmul: the 4-bit product, the low-rank branch, the bias and the ending, in plain torch.

    y = (codes*scales) @ W^T * channel_scale + lowrank @ up^T + bias [+ shift_bias] [+ out's old value]     in fp32
    y = round(y)                                            the one rounding to out.dtype
    y = round(gelu_tanh(y))     for outputs n >= gelu_from
    y = round(residual + gate*y)
    h = round(v * silu(g))      SwiGLU: v the first N/2 of y, g the last N/2, fp16 saturating at its largest number; h is the result

W is codes * group scales; for e4m3 activations as expand_weight_torch.py rounds it.
shift_bias belongs to act_unsigned layers whose activations were not shifted (fast): the file's bias compensates for a shift.
Outputs, and a bias, are in the order of the linear's outputs, also where a part stores its rows in pairs (layout.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_scale import BLOCK
from .expand_weight_torch import expand_weight_torch
from .layout import PartSpec, PartView, in_order, signed_codes
from .norm_modulate import batch_rows
from .smooth_quantize_torch import QuantizedInput, divided_by_smooth


@dataclass(eq=False)
class Peak:
    """Where a product leaves the largest |v| of every row of its result, v being what smooth_quantize makes of it for the next part.

    amax     fp32 [M], zeros before: larger numbers that are there stay
    smooth   fp32 [Kp] of the next part, whose input are the outputs from `first` on
    shifted  the next part's input is shifted (exact, unsigned)
    """

    amax: Tensor
    smooth: Tensor
    shifted: bool = False
    first: int = 0


@dataclass(frozen=True, eq=False)
class Finish:
    """What follows a product inside its kernel.

    accumulate    add out's old value before the rounding
    gelu_from     outputs n >= gelu_from end in gelu_tanh
    gate          [B, N] with residual [M, N]: y = residual + gate[m // rows_per_batch] * y
    swiglu        the result is [M, N/2]: values times silu of their gates; paired parts only, and nothing of the above with it
    peak          where to leave the row maxima of the result; with the kernel for many tokens only
    """

    accumulate: bool = False
    gelu_from: int | None = None
    gate: Tensor | None = None
    residual: Tensor | None = None
    rows_per_batch: int = 1 << 30
    peak: Peak | None = None
    swiglu: bool = False

    def columns(self, spec: PartSpec) -> int:
        """Of the result."""
        return spec.n // 2 if self.swiglu else spec.n


PLAIN = Finish()


def check_operands(q: QuantizedInput, part: PartView, out: Tensor, finish: Finish) -> None:
    """Raises ValueError when the operands do not fit the part."""
    gate, residual, rows_per_batch = finish.gate, finish.residual, finish.rows_per_batch
    spec = part.spec
    int4 = ("int4", "int8") if spec.code_form == "int8" else ("int4", "half", "e4m3")
    kinds = {"nvfp4": ("plain",), "int4": int4}.get(spec.precision, ())
    if q.kind not in kinds:
        raise ValueError(f"the input is of kind {q.kind!r}, a {spec.precision} layer in {spec.code_form} form takes {' or '.join(kinds)}")
    rows = q.codes.shape[0]
    if q.codes.shape[1] != spec.k_padded:
        raise ValueError(f"the quantised input has {q.codes.shape[1]} columns, the layer has {spec.k_padded}")
    columns = finish.columns(spec)
    if tuple(out.shape) != (rows, columns):
        raise ValueError(f"out has shape {list(out.shape)}, expected [{rows}, {columns}]")
    if finish.swiglu and not (spec.paired and finish.gelu_from is None and gate is None and residual is None and not finish.accumulate):
        raise ValueError("SwiGLU ends linears whose rows are stored in pairs, and no other ending goes with it")
    if (gate is None) != (residual is None):
        raise ValueError("gate and residual belong together: give both or neither")
    peak = finish.peak
    if peak is not None:
        fits = peak.amax.shape == (rows,) and peak.amax.dtype == torch.float32 and peak.amax.is_contiguous()
        if not fits or not 0 <= peak.first <= columns <= peak.first + peak.smooth.shape[0]:
            found = f"{peak.amax.dtype} amax {list(peak.amax.shape)} and smooth {list(peak.smooth.shape)} from output {peak.first} on"
            raise ValueError(f"peak has {found}, the result has shape {list(out.shape)}; amax is contiguous float32, a number a row")
    if gate is None:
        return
    batches = -(-rows // rows_per_batch)
    if residual.shape != out.shape:
        raise ValueError(f"residual has shape {list(residual.shape)}, expected {list(out.shape)}")
    if gate.ndim != 2 or gate.shape[0] < batches or gate.shape[1] != spec.n:
        raise ValueError(f"gate has shape {list(gate.shape)}, expected [{batches}, {spec.n}]")


def dequantized_input(q: QuantizedInput, code_form: str) -> Tensor:
    """fp32 [M, Kp]: what the codes and scales stand for."""
    if q.kind == "plain":
        return q.codes.float()
    if q.kind in ("e4m3", "half"):
        return (q.codes.view(torch.float8_e4m3fn) if q.kind == "e4m3" else q.codes).float() * q.scales[:, None]
    values = q.codes.float()
    if q.kind == "int4" and code_form == "e4m3":
        values = torch.where(values >= 128, 128 - values, values)
    return (values.view(values.shape[0], values.shape[1] // 64, 64) * q.scales.t()[:, :, None]).view(values.shape)


def dequantized_weight(part: PartView, kind: str = "int4") -> Tensor:
    """fp32 [N, Kp]: what activations of `kind` meet: codes times group scales, without channel_scale and smooth; rounded for "e4m3".

    Rows as the part stores them.
    """
    n, group = part.spec.n, part.spec.group
    if kind == "e4m3":
        weight = expand_weight_torch(part, "e4m3")
        scale = weight.ratio.double().flip(0).cumprod(0).flip(0).float().t()[:n]
        return weight.values[:n].float() * scale.repeat_interleave(BLOCK, 1)[:, : part.spec.k_padded]
    if part.spec.precision == "nvfp4":
        return expand_weight_torch(part, "plain", torch.float32).values[:n]
    values = signed_codes(part)[:n].float()
    return (values.view(n, -1, group) * part.scales.t()[:n].float()[:, :, None]).view(n, -1)


def lowrank_product(lowrank: Tensor, up: Tensor, segments: tuple[int, ...], n: int) -> Tensor:
    """fp32 [M, N]: every segment's outputs from its own columns of the low-rank activation. up [Np, R]."""
    ends = (*segments[1:], n)
    columns = lowrank.float().split(up.shape[1], dim=1)
    return torch.cat([h @ up[a:b].float().t() for h, a, b in zip(columns, segments, ends, strict=True)], dim=1)


def swiglu_torch(y: Tensor) -> Tensor:
    """[..., N], values first and gates last -> values * silu(gates) [..., N/2] in y's type, rounded once."""
    values, gates = saturated(y.float(), y.dtype).chunk(2, -1)
    return saturated(values * F.silu(gates), y.dtype).to(y.dtype)


def saturated(y: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 y with nothing that becomes an infinity in float16, where `dtype` is that."""
    return y.clamp(-65504.0, 65504.0) if dtype == torch.float16 else y


def w4_matmul_torch(q: QuantizedInput, part: PartView, bias: Tensor | None, out: Tensor, finish: Finish = PLAIN) -> Tensor:
    """Writes y [M, N] into `out` (any strides) and returns it. Arguments as `w4_matmul`. Raises ValueError as `check_operands`."""
    check_operands(q, part, out, finish)
    spec = part.spec
    y = dequantized_input(q, spec.code_form) @ dequantized_weight(part, q.kind).t()
    if part.channel_scale is not None:
        y *= part.channel_scale[: spec.n]
    if q.lowrank is not None:
        y += lowrank_product(q.lowrank, part.up, spec.segments, spec.n)
    if q.extra is not None:
        y += lowrank_product(q.extra, part.extra.up, part.extra.segments, spec.n)
    if spec.paired:
        y = in_order(y.t()).t()
    if bias is not None:
        y += bias.float()
    if spec.act_unsigned and q.kind in ("e4m3", "int8"):
        y += part.shift_bias[: spec.n]
    if finish.accumulate:
        y += out.float()
    y = y.to(out.dtype)
    if finish.gelu_from is not None:
        y[:, finish.gelu_from :] = F.gelu(y[:, finish.gelu_from :].float(), approximate="tanh").to(out.dtype)
    if finish.gate is not None:
        y = finish.residual.float() + batch_rows(finish.gate, y.shape[0], finish.rows_per_batch) * y.float()
    if finish.swiglu:
        y = swiglu_torch(y)
    out.copy_(y)  # rounds to out.dtype
    if finish.peak is not None:
        peak = finish.peak
        v = divided_by_smooth(out[:, peak.first :], peak.smooth[: out.shape[1] - peak.first], peak.shifted)
        torch.maximum(peak.amax, v.abs().amax(1), out=peak.amax)
    return out
