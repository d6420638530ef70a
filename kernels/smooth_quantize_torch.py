"""Oracle of smooth_quantize: what a quantised linear does to its input, in plain torch.

    m = LN(x)*(1+scale)+shift, or RMS(x)*scale        with a norm; rounded to the compute type (x.dtype)
    h = m @ down, m @ extra.down                      summed in fp32: the low-rank branch sees m, not divided, not shifted, not quantised;
                                                      kept in fp32, beside e4m3 codes rounded to bf16 where x and down are
    v = (m [+ SHIFT]) / smooth                        true division, rounded to the compute type (what fp16 cannot hold is left in fp32);
                                                      SHIFT for unsigned layers in exact only
    codes, scales of v by precision and mode:

    precision  mode   kind    codes                                              scales
    int4       exact  "int4"  rne(v/s) in -8..7 (unsigned 0..15)                 s = amax/7 (/15), a group of 64: fp32 [Kp/64, M]
    int4       exact  "half"  fp16(code*s / u), code and s as above              u = 2^(floor(log2(amax of the row)) - 8): fp32 [M]
    int4       fast   "e4m3"  e4m3(v*(448/amax)), code form e4m3                 s = amax/448 of the row: fp32 [M]
    int4       fast   "int8"  rne(v/s) in -127..127, code form int8              s = amax/127, a group of 64: fp32 [Kp/64, M]
    nvfp4      exact  "plain" e2m1(v/s) * e4m3(s), s = min(amax/6, 448), 16s     none: the product is exact in the compute type
    nvfp4      fast   "plain" v                                                  none

"half" is what `wide` asks for in code form e4m3: the same numbers as "int4", ready for 16-bit matrix units. They stay below 512, where fp16
keeps 11 bits of them, and the division by u is exact. u is not below 2^-126.
Codes are [M, Kp] (K padded to 128 with zeros). "int4" codes are int8 values in code form int8, bytes s000mmmm in code form e4m3.
A group or row of zeros has scale 0 (u = 1) and codes 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import SHIFT, PartView
from .norm_modulate import Norm, norm_modulate_torch


@dataclass(eq=False)
class QuantizedInput:
    """A quantised activation; kinds and shapes are in this file's docstring. dtype is the compute type the linear's output takes.

    lowrank [M, S * R] and extra, h of the part's own columns and of its further ones: of one type, rows may lie apart.
    """

    kind: str
    codes: Tensor
    scales: Tensor | None
    lowrank: Tensor | None
    dtype: torch.dtype
    extra: Tensor | None = None


def check_input(x: Tensor, part: PartView, mode: str, norm: Norm | None, row_amax: Tensor | None = None) -> None:
    """Raises ValueError when x, the mode, the norm or row_amax do not fit the part."""
    spec = part.spec
    if spec.precision == "w4a16":
        raise ValueError("this is a w4a16 layer: its input is not quantised, use w4a16_linear")
    if mode not in ("exact", "fast"):
        raise ValueError(f"mode is {mode!r}, expected 'exact' or 'fast'")
    if x.ndim != 2 or x.shape[1] != spec.k:
        raise ValueError(f"x has shape {list(x.shape)}, expected [M, {spec.k}]")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x is {x.dtype}, expected bfloat16, float16 or float32")
    check_columns(part)
    if norm is not None:
        if norm.rms != (norm.shift is None):
            raise ValueError(f"norm.shift is {'missing' if norm.shift is None else 'given'}: LayerNorm takes one, RMSNorm takes none")
        batches = -(-x.shape[0] // norm.rows_per_batch)
        for name, tensor in (("shift", norm.shift), ("scale", norm.scale)):
            if tensor is None:
                continue
            if tensor.ndim != 2 or tensor.shape[1] != spec.k or tensor.shape[0] < batches:
                raise ValueError(f"norm.{name} has shape {list(tensor.shape)}, expected [{batches}, {spec.k}]")
    if row_amax is not None:
        if norm is not None:
            raise ValueError("row_amax belongs to an input without a norm: give one of the two")
        if row_amax.shape != x.shape[:1] or row_amax.dtype != torch.float32 or not row_amax.is_contiguous():
            raise ValueError(f"row_amax is {row_amax.dtype} {list(row_amax.shape)}, expected contiguous float32 [{x.shape[0]}]")


def check_columns(part: PartView) -> None:
    """Raises ValueError when a part's further columns do not fit it."""
    if part.extra is None:
        return
    spec, (down, up, segments) = part.spec, (part.extra.down, part.extra.up, part.extra.segments)
    rank = up.shape[1]
    if down.shape != (spec.k_padded, len(segments) * rank) or up.shape[0] != spec.n_padded or rank % 16:
        raise ValueError(
            f"the further columns are {list(down.shape)} and {list(up.shape)} in {len(segments)} segments, expected "
            f"[{spec.k_padded}, segments * R] and [{spec.n_padded}, R], R a multiple of 16"
        )


def kind_of(part: PartView, mode: str, wide: bool) -> str:
    """The kind of the result for a part, a mode and the product's path."""
    spec = part.spec
    if spec.precision == "nvfp4":
        return "plain"
    if mode == "exact":
        return "half" if wide and spec.code_form == "e4m3" else "int4"
    return spec.code_form


def lowrank_dtype(x: Tensor, part: PartView, kind: str) -> torch.dtype:
    """Type of the low-rank activation: bf16 beside e4m3 codes where up is bf16 too, so that the product multiplies both as they are."""
    pairs = [pair for pair in (part.down, part.extra and part.extra.down) if pair is not None]
    narrow = kind == "e4m3" and all(t.dtype == torch.bfloat16 for t in (x, *pairs))
    return torch.bfloat16 if narrow else torch.float32


def plain_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of "plain" codes: bf16 for fp16 too, because x / smooth can leave fp16's range."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def rounded_or_kept(v: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 v rounded to `dtype`, as fp32; what fp16 cannot hold stays as it is: it becomes a code and a scale, which can."""
    rounded = v.to(dtype).float()
    return torch.where(v.abs() > 65504.0, v, rounded) if dtype == torch.float16 else rounded


def divide(a: Tensor, b: float) -> Tensor:
    """IEEE a / b. On CUDA torch turns a division by a Python number into a product with its reciprocal."""
    return a / torch.full((), b, dtype=a.dtype, device=a.device)


def e2m1_round(v: Tensor) -> Tensor:
    """Nearest e2m1 number (0, .5, 1, 1.5, 2, 3, 4, 6 and negatives), ties to the even code, saturating."""
    u = v.abs()
    coarse = torch.where(u < 4, torch.round(u), 2 * torch.round(u / 2))
    return torch.copysign(torch.where(u < 2, torch.round(2 * u) / 2, coarse).clamp(max=6.0), v)


def _scaled(v: Tensor, amax: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    scale = divide(amax, largest)
    return scale, torch.where(scale > 0, v / torch.where(scale > 0, scale, 1.0), 0.0)


def _group_codes(v: Tensor, largest: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    groups = v.view(v.shape[0], v.shape[1] // 64, 64)
    scale, ratio = _scaled(groups, groups.abs().amax(dim=2, keepdim=True), float(largest))
    codes = torch.round(ratio).clamp(low, high).to(torch.int8).view(v.shape)
    return codes, scale[:, :, 0].t().contiguous()


def _nvfp4_values(v: Tensor) -> Tensor:
    groups = v.view(v.shape[0], v.shape[1] // 16, 16)
    scale = divide(groups.abs().amax(dim=2, keepdim=True), 6.0).clamp(max=448.0)
    ratio = torch.where(scale > 0, groups / torch.where(scale > 0, scale, 1.0), 0.0)
    return (e2m1_round(ratio) * scale.to(torch.float8_e4m3fn).float()).view(v.shape)


def smoothed_torch(x: Tensor, part: PartView, shifted: bool, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """(m in x's type, v as fp32), both [M, K]."""
    m = x if norm is None else norm_modulate_torch(x, norm)
    return m, divided_by_smooth(m, part.smooth[: part.spec.k], shifted)


def divided_by_smooth(m: Tensor, smooth: Tensor, shifted: bool) -> Tensor:
    """v of m [M, K], as fp32."""
    v = m.float() + SHIFT if shifted else m.float()
    return rounded_or_kept(v / smooth, m.dtype)


def power_below(amax: Tensor) -> Tensor:
    """u = 2^(floor(log2(amax)) - 8), not below 2^-126; 1 where amax is 0."""
    exponent = (torch.frexp(amax).exponent - 9).clamp(min=-126)
    return torch.ldexp(torch.ones_like(amax), torch.where(amax > 0, exponent, 0))


def smooth_quantize_torch(
    x: Tensor, part: PartView, mode: str, norm: Norm | None = None, row_amax: Tensor | None = None, *, wide: bool = False
) -> QuantizedInput:
    """x [M, K] (any strides) -> QuantizedInput for `part`. Arguments as `smooth_quantize`. Raises ValueError as `check_input`."""
    check_input(x, part, mode, norm, row_amax)
    spec, dtype, kind = part.spec, x.dtype, kind_of(part, mode, wide)
    shifted = spec.act_unsigned and mode == "exact"
    m, v = smoothed_torch(x, part, shifted, norm)
    lowrank, extra = (
        None if down is None else (m.float() @ down[: spec.k].float()).to(lowrank_dtype(x, part, kind))
        for down in (part.down, part.extra and part.extra.down)
    )
    row_amax = v.abs().amax(dim=1) if row_amax is None else row_amax
    if spec.k != spec.k_padded:
        v = F.pad(v, (0, spec.k_padded - spec.k))
    if kind == "plain":
        codes = (_nvfp4_values(v) if mode == "exact" else v).to(plain_dtype(dtype))
        return QuantizedInput(kind, codes, None, lowrank, dtype, extra)
    if kind == "e4m3":
        scales = divide(row_amax, 448.0)
        factor = torch.where(scales > 0, torch.full_like(scales, 448.0) / row_amax.clamp(min=1e-30), 0.0)
        return QuantizedInput(kind, (v * factor[:, None]).to(torch.float8_e4m3fn).view(torch.uint8), scales, lowrank, dtype, extra)
    if kind == "int8":
        return QuantizedInput(kind, *_group_codes(v, 127, -127, 127), lowrank, dtype, extra)
    codes, scales = _group_codes(v, 15, 0, 15) if shifted else _group_codes(v, 7, -8, 7)
    if kind == "half":
        u = power_below(row_amax)
        values = codes.float() * scales.t().repeat_interleave(64, dim=1)
        return QuantizedInput(kind, (values / u[:, None]).to(torch.float16), u, lowrank, dtype, extra)
    if spec.code_form == "e4m3":
        codes = torch.where(codes < 0, (-codes.short() + 128), codes.short()).to(torch.uint8)
    return QuantizedInput(kind, codes, scales, lowrank, dtype, extra)
