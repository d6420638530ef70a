"""The leaf modules of a 4-bit network: one per host linear, all packed storage in one uint8 parameter called `weight`.

A host counts, moves, pins and streams parameters called `weight` and `bias` of modules that carry `comfy_cast_weights`; that is all it
needs to know of these. Formula of a part: y = Q(x / smooth) @ W4^T + (x @ down^T) @ up^T + bias (SVDQuant, arXiv 2411.05007).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import layout
from ..kernels.norm_modulate import Norm, norm_modulate
from ..kernels.t5_layout import T5Spec
from ..kernels.targets import resolve_compute
from ..kernels.w4_matmul import ExpandedWeight, Finish, Peak, finds_peak, quantize_for, swiglu_torch, unpack_for, w4_matmul
from ..kernels.w4a16_linear import w4a16_linear
from .lora import Side
from .runtime import Runtime

if TYPE_CHECKING:
    from .streaming import Streamer

LARGEST_FP16 = 65504.0
Weights = list[ExpandedWeight | None] | None  # of every part, unpacked before its turn


@dataclass(frozen=True)
class Ending:
    """What follows a linear inside its kernel: GELU(tanh) from output row `gelu_from` on, residual + gate * y, or SwiGLU.

    gate: [B, N]; residual: [B, L, N]. Results equal the same steps done apart (the linear's result is rounded first).
    swiglu: the first N/2 outputs are values, the last N/2 their gates: the linear returns values * silu(gates) [B, L, N/2]. A packed linear
    stores its rows in pairs for it (layout.plan), and nothing else may follow.
    peak: see peak_between.
    """

    gelu_from: int | None = None
    gate: Tensor | None = None
    residual: Tensor | None = None
    peak: Peak | None = None
    swiglu: bool = False


def apply_ending(y: Tensor, ending: Ending | None) -> Tensor:
    """`ending` in torch on y [B, L, N]: the same rounding points as the kernel's."""
    if ending is None:
        return y
    if ending.swiglu:
        return swiglu_torch(y)
    if ending.gelu_from is not None:
        y = torch.cat((y[..., : ending.gelu_from], F.gelu(y[..., ending.gelu_from :], approximate="tanh")), -1)
    if ending.gate is not None:
        y = torch.addcmul(ending.residual, y, ending.gate.unsqueeze(1))
    return y


class Leaf(nn.Module):
    """What the host expects of a module whose weight it may keep elsewhere: these attributes, and `weight` and `bias`."""

    comfy_cast_weights = False  # the host sets True on an instance it leaves offloaded
    streamer: Streamer | None = None  # who brings its tensors to the device, where its block is streamed

    def __init__(self, runtime: Runtime):
        super().__init__()
        self.runtime = runtime
        self.weight_function: list = []
        self.bias_function: list = []

    def put(self, name: str, tensor: nn.Parameter) -> None:
        """Puts another tensor with the same numbers in place of `weight` or `bias`."""
        setattr(self, name, tensor)

    @property
    def home(self) -> torch.device:
        """Where it computes: where its weight lies, or where that is streamed to."""
        return self.weight.device if self.streamer is None else self.streamer.device

    def set_streamer(self, streamer: Streamer | None) -> None:
        self.streamer = streamer

    def side_tensors(self) -> list[Tensor]:
        """What lies beside the weight and is computed with."""
        return []


class PackedLeaf(Leaf):
    """A linear whose weight is packed bytes: the host moves them and never rewrites them, and LoRA runs beside them.

    spec: has out_features, in_features and the parts that LoRA's columns are planned by (models/lora.py).
    """

    def __init__(self, spec: layout.PackSpec | T5Spec, weight: Tensor, bias: Tensor | None, runtime: Runtime):
        super().__init__(runtime)
        self.spec = spec
        self.out_features, self.in_features = spec.out_features, spec.in_features
        self.weight, self.bias = parameter(weight), parameter(bias)
        self._side: Side | None = None
        self._views: tuple[int, object] | None = None  # address of the weight they look at

    def set_side(self, side: Side | None) -> None:
        """Replaces what lies beside the 4-bit weight; None removes it."""
        self._side = side
        self._views = None

    def put(self, name: str, tensor: nn.Parameter) -> None:
        super().put(name, tensor)
        self._views = None

    def set_streamer(self, streamer: Streamer | None) -> None:
        super().set_streamer(streamer)
        self._views = None

    @property
    def has_side(self) -> bool:
        return self._side is not None

    def side_tensors(self) -> list[Tensor]:
        return [] if self._side is None else self._side.tensors()

    def make_views(self, blob: Tensor) -> object:
        """What the kernels are given of a weight, windows on its bytes."""
        raise NotImplementedError

    def views(self, blob: Tensor) -> object:
        """make_views: kept for a weight that has its place, since making them costs more than a launch; made for a host's copy."""
        if blob is not (self.weight if self.streamer is None else self.streamer.tensors(self)["weight"]):
            return self.make_views(blob)
        kept, at = self._views, blob.data_ptr()
        if kept is None or kept[0] != at:
            kept = self._views = (at, self.make_views(blob))
        return kept[1]

    def _apply(self, *args: object, **kwargs: object) -> PackedLeaf:
        self._views = None  # they would keep alive the memory that the weight moves away from
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_views": None}  # a copy has its own weight

    def convert_weight(self, weight: Tensor, inplace: bool = False, **_: object) -> Tensor:
        """The host's hook for reading a packed weight: bytes, perhaps cast to fp32 (which is exact) -> dense fp32 [N, K]."""
        raise NotImplementedError

    def set_weight(self, weight: Tensor, *args: object, **kwargs: object) -> None:
        """The host's hook for writing a merged weight back: refused, since nothing is re-quantised behind the user's back."""
        raise RuntimeError(
            "A 4-bit weight cannot be overwritten by a dense one. LoRA and merge patches are applied beside it by the model's own patcher: "
            "use the model that the loader returned, or merge into the dense file that `python -m tonfa dequantize` writes."
        )


def parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, fits_fp16: bool | None) -> Tensor:
    """x @ weight^T + bias, the bias added in fp32. float16 multiplies in fp32 where the weight would overflow it."""
    if x.dtype == torch.float16 and not fits_fp16:
        y = F.linear(x.float(), weight.float())
    else:
        y = F.linear(x, weight.to(x.dtype))
    return y.to(x.dtype) if bias is None else (y.float() + bias.float()).to(x.dtype)


class PlainLinear(Leaf):
    """A linear that a file left in 16 bit, with the calling form of PackedLinear. weight [N, K], bias [N] or None, in the file's types."""

    def __init__(self, weight: Tensor, bias: Tensor | None, runtime: Runtime):
        super().__init__(runtime)
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = parameter(weight), parameter(bias)
        self.fits_fp16 = bool(weight.abs().max() <= LARGEST_FP16)

    def outputs(self, x: Tensor, rows: range) -> Tensor:
        """As PackedLinear.outputs; the others are computed too, for a product of fewer may be rounded in another order."""
        return self(x)[..., rows.start : rows.stop]

    def unpack(self, rows: int, compute: str, dtype: torch.dtype) -> Weights:
        """As PackedLinear.unpack: there is nothing to unpack."""
        return None

    def forward(self, x: Tensor, compute: str | None = None) -> Tensor:
        with self.runtime.acquire(self, x.device) as (weight, bias):
            return dense_linear(x, weight, bias, self.fits_fp16)

    def run(
        self,
        x: Tensor | list[Tensor],
        compute: str,
        norm: Norm | None = None,
        ending: Ending | None = None,
        out: Tensor | None = None,
        peak: Peak | None = None,
        weights: Weights = None,
    ) -> Tensor:
        """As PackedLinear.run."""
        y = apply_ending(self(normalised(x, norm)), ending)
        return y if out is None else out.copy_(y)


def normalised(x: Tensor | list[Tensor], norm: Norm | None) -> Tensor:
    """The linear's input as one tensor: parts joined along K, norm and modulation applied."""
    x = x if isinstance(x, Tensor) else torch.cat(tuple(x), -1)
    if norm is None:
        return x
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if torch.compiler.is_compiling():
        from . import ops

        return ops.norm_modulate(rows, norm).view(x.shape)
    return norm_modulate(rows, norm).view(x.shape)


def resolved(compute: str, device: torch.device) -> str:
    """resolve_compute; compiled code keeps what it was told when it was compiled."""
    if torch.compiler.is_compiling():
        from . import ops

        return ops.resolve_compute(compute, device)
    return resolve_compute(compute, device)


class PackedLinear(PackedLeaf):
    """A host linear in 4 bit.

    `weight`: uint8 [spec.nbytes], the packed layout of kernels/layout.py. `bias`: [N] in the file's type (fp32 for modulation layers), so
    that a bf16 file in float16 compute loses nothing.
    """

    def __init__(self, spec: layout.PackSpec, weight: Tensor, bias: Tensor | None, runtime: Runtime):
        super().__init__(spec, weight, bias, runtime)
        self.handle = spec_handle(spec)
        self.is_modulation = spec.parts[0].precision == "w4a16"
        self._fits_fp16: bool | None = None

    def fuses_side(self, compute: str) -> bool:
        """Whether the kernels take all of the side: columns they do, but torch's product with the dense weight does not."""
        return self._side is None or (self._side.delta is None and (compute != "weight_only" or self.is_modulation))

    def unpack(self, rows: int, compute: str, dtype: torch.dtype) -> Weights:
        """The weight as `run` will unpack it for `rows` tokens of `dtype`; None where it lies elsewhere or is used in another way."""
        if compute not in ("exact", "fast") or self.is_modulation or not self.fuses_side(compute) or "forward" in self.__dict__:
            return None
        held = self.runtime.held(self, self.home)
        return None if held is None else [unpack_for(part, compute, rows, dtype) for part in self.views(held["weight"])]

    # -- forward ----------------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, compute: str | None = None) -> Tensor:
        """x [..., K] -> [..., N] in x's type. compute: "exact", "fast", "weight_only"; None: what `auto` means on x's device."""
        if compute is None:  # modulation layers have one way to compute
            compute = "weight_only" if self.is_modulation else resolved("auto", x.device)
        shape = x.shape
        return self._run(x.reshape(1, shape[:-1].numel(), shape[-1]), compute).view(*shape[:-1], self.out_features)

    def outputs(self, x: Tensor, rows: range) -> Tensor:
        """forward(x)[..., rows] of a modulation layer: no other output is computed, where that can be. rows: from a multiple of 16 on."""
        alone = self.is_modulation and self.fuses_side("weight_only") and "forward" not in self.__dict__
        if not alone or torch.compiler.is_compiling():
            return self.forward(x)[..., rows.start : rows.stop]
        with self.runtime.acquire(self, x.device) as (blob, bias):
            y = w4a16_linear(x.reshape(x.shape[:-1].numel(), self.in_features), self.views(blob)[0], bias, rows)
        return y.view(*x.shape[:-1], len(rows))

    def run(
        self,
        x: Tensor | list[Tensor],
        compute: str,
        norm: Norm | None = None,
        ending: Ending | None = None,
        out: Tensor | None = None,
        peak: Peak | None = None,
        weights: Weights = None,
    ) -> Tensor:
        """The linear with its neighbours fused.

        x: [B, L, K], or a list of one [B, L, K_i] per part of a linear split along K, which may be emptied so that the inputs can be freed
        early. norm: LayerNorm and modulation of x before it. peak: what the linear before found of the last part's input.
        weights: what `unpack` gave.
        out: [B, L, N] to write to (any strides but a contiguous last dimension), else a new tensor. Returns [B, L, N] in x's type;
        N/2 where it ends in SwiGLU.
        """
        if "forward" not in self.__dict__:
            return self._run(x, compute, norm, ending, out, peak, weights)
        y = apply_ending(self.forward(normalised(x, norm), compute), ending)  # the host wrapped this very module's forward (bypass LoRA)
        return y if out is None else out.copy_(y)

    def _run(
        self,
        x: Tensor | list[Tensor],
        compute: str,
        norm: Norm | None = None,
        ending: Ending | None = None,
        out: Tensor | None = None,
        peak: Peak | None = None,
        weights: Weights = None,
    ) -> Tensor:
        device = x.device if isinstance(x, Tensor) else x[0].device
        with self.runtime.acquire(self, device) as (blob, bias):
            if self.fuses_side(compute):
                return self._four_bit(x, blob, bias, compute, norm, ending, out, peak, weights)
            x = normalised(x, norm)
            y = apply_ending(self._side.add(self.spec, self._four_bit(x, blob, bias, compute), x), ending)
            return y if out is None else out.copy_(y)

    def _four_bit(
        self,
        x: Tensor | list[Tensor],
        blob: Tensor,
        bias: Tensor | None,
        compute: str,
        norm: Norm | None = None,
        ending: Ending | None = None,
        out: Tensor | None = None,
        peak: Peak | None = None,
        weights: Weights = None,
    ) -> Tensor:
        """As `run`, with a weight and bias on the device, and with the side only where the kernels take it."""
        if torch.compiler.is_compiling():
            from . import ops

            side = self._side if self.fuses_side(compute) else None
            return ops.linear(x, blob, bias, self.handle, compute, norm, ending, out, side)
        half = (x if isinstance(x, Tensor) else x[0]).dtype == torch.float16
        if half and compute == "weight_only" and self._fits_fp16 is None and not self.is_modulation:
            self._fits_fp16 = fits_fp16(self.spec, blob)  # asked for here only, so that loading does not wait for it
        return packed_linear(self.spec, self.views(blob), x, bias, compute, norm, ending, out, self._fits_fp16, peak, weights)

    def make_views(self, blob: Tensor) -> list[layout.PartView]:
        """Views of the parts, with the side's columns where the kernels take all of it."""
        parts = layout.views(self.spec, blob)
        if self._side is not None and self._side.delta is None:
            for part, columns in zip(parts, self._side.to(parts[0].codes.device).columns, strict=True):
                part.extra = columns
        return parts

    # -- dense forms ------------------------------------------------------------------------------------------------------------

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """The 16-bit linear that the resident storage stands for: fp32 weight [N, K] and bias [N]; side branches are left out."""
        return dense_form(self.spec, layout.views(self.spec, self.weight), self.bias)

    def convert_weight(self, weight: Tensor, inplace: bool = False, **_: object) -> Tensor:
        return dense_form(self.spec, layout.views(self.spec, weight.to(torch.uint8)), None)[0]


Linear = PackedLinear | PlainLinear


# -- computing with packed bytes ----------------------------------------------------------------------------------------------------


def packed_linear(
    spec: layout.PackSpec,
    parts: list[layout.PartView],
    x: Tensor | list[Tensor],
    bias: Tensor | None,
    compute: str,
    norm: Norm | None = None,
    ending: Ending | None = None,
    out: Tensor | None = None,
    fits_fp16: bool | None = None,
    peak: Peak | None = None,
    weights: Weights = None,
) -> Tensor:
    """PackedLinear.run as a function of tensors. fits_fp16: float16 holds every weight (None: it may not)."""
    if parts[0].spec.precision == "w4a16":
        x = normalised(x, norm)
        y = w4a16_linear(x.reshape(x.shape[:-1].numel(), spec.in_features), parts[0], bias).view(*x.shape[:-1], spec.out_features)
        y = apply_ending(y, ending)
    elif compute == "weight_only":
        y = apply_ending(dense_linear(normalised(x, norm), *dense_form(spec, parts, bias), fits_fp16), ending)
    else:
        xs = [x[..., p.spec.col_offset : p.spec.col_offset + p.spec.k] for p in parts] if isinstance(x, Tensor) else x
        return fused_linear(spec, parts, xs, bias, compute, norm, ending or Ending(), out, peak, weights)
    return y if out is None else out.copy_(y)


def fused_linear(
    spec: layout.PackSpec,
    parts: list[layout.PartView],
    xs: list[Tensor],
    bias: Tensor | None,
    compute: str,
    norm: Norm | None,
    ending: Ending,
    out: Tensor | None,
    peak: Peak | None,
    weights: Weights,
) -> Tensor:
    """Quantise, multiply, end. xs: [B, L, K_i] per part; emptied."""
    batch, length = xs[0].shape[:2]
    rows, columns = batch * length, spec.out_features // 2 if ending.swiglu else spec.out_features
    inputs = []
    for part in parts:  # all of them before the output exists, letting go of each input: the peak of a whole step is here
        known = peak.amax if peak is not None and part is parts[-1] else None
        inputs.append(quantize_for(xs.pop(0).reshape(rows, part.spec.k), part, compute, norm, known))
    direct = out is not None and batch == 1
    y = out[0] if direct else torch.empty(rows, columns, dtype=inputs[0].dtype, device=inputs[0].codes.device)
    residual = None if ending.residual is None else ending.residual.reshape(rows, columns)
    firsts = [part.spec.row_offset for part in parts]
    for i, (q, part) in enumerate(zip(inputs, parts, strict=True)):
        first, n = firsts[i], part.spec.n
        last = first not in firsts[i + 1 :]
        finish = Finish(
            accumulate=first in firsts[:i],
            gelu_from=None if ending.gelu_from is None or not last else max(ending.gelu_from - first, 0),
            gate=cut(ending.gate, first, n) if last else None,
            residual=cut(residual, first, n) if last else None,
            rows_per_batch=max(length, 1),
            peak=ending.peak if last and first + n == spec.out_features else None,
            swiglu=ending.swiglu,
        )
        weight = None if weights is None else weights[i]
        w4_matmul(q, part, cut(bias, first, n) if last else None, y if ending.swiglu else cut(y, first, n), finish, weight)
    if direct:
        return out
    y = y.view(batch, length, columns)
    return y if out is None else out.copy_(y)


def peak_between(first: Linear, second: Linear, gelu_from: int, rows: int, compute: str, device: torch.device) -> Peak | None:
    """Where `first` leaves the row maxima that `second` needs to quantise its last part's input, which is first's output from gelu_from on.

    What a linear that stores its rows in pairs puts out is its SwiGLU, gelu_from then 0. None where first does not find them, or where it
    would have to know weights of second that are elsewhere.
    """
    if torch.compiler.is_compiling() or not isinstance(first, PackedLinear) or not isinstance(second, PackedLinear):
        return None
    if compute not in ("exact", "fast"):
        return None
    if not (first.fuses_side(compute) and second.fuses_side(compute)) or "forward" in first.__dict__ or "forward" in second.__dict__:
        return None
    held = second.runtime.held(second, device)
    if held is None:
        return None
    last = second.views(held["weight"])[-1]
    makers = [p for p in first.spec.parts if p.row_offset + p.n > gelu_from]
    outputs = first.spec.out_features // 2 if first.spec.parts[0].paired else first.spec.out_features
    if len(makers) != 1 or outputs - gelu_from != last.spec.k or not finds_peak(makers[0], device, compute, rows):
        return None
    shifted = last.spec.act_unsigned and compute == "exact"
    amax = torch.zeros(rows, dtype=torch.float32, device=device)
    return Peak(amax, last.smooth, shifted, max(gelu_from - makers[0].row_offset, 0))


def cut(x: Tensor | None, first: int, n: int) -> Tensor | None:
    """x[..., first : first + n]; x itself where that is all of it."""
    return x if x is None or x.shape[-1] == n else x[..., first : first + n]


def dense_form(spec: layout.PackSpec, parts: list[layout.PartView], bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """fp32 weight [N, K] of the packed bytes, and the bias that belongs to unshifted activations."""
    device = parts[0].codes.device
    weight = torch.zeros(spec.out_features, spec.in_features, device=device)
    if bias is not None or any(view.spec.act_unsigned for view in parts):
        bias = torch.zeros(spec.out_features, device=device) if bias is None else bias.float().clone()
    for view in parts:
        part = view.spec
        rows, cols = slice(part.row_offset, part.row_offset + part.n), slice(part.col_offset, part.col_offset + part.k)
        weight[rows, cols] = layout.dense_weight(layout.unpack_view(view))
        if part.act_unsigned:
            bias[rows] += view.shift_bias[: part.n]
    return weight, bias


def fits_fp16(spec: layout.PackSpec, blob: Tensor) -> bool:
    """Whether float16 holds every weight of a blob. Waits for the device."""
    return layout.largest_weight(spec, blob) <= LARGEST_FP16


# Compiled code names a layout by a number: operators take no objects. One number for equal layouts, so that blocks share compiled code.
_SPECS: list[layout.PackSpec] = []


def spec_handle(spec: layout.PackSpec) -> int:
    """The number of a layout."""
    if spec not in _SPECS:
        _SPECS.append(spec)
    return _SPECS.index(spec)


def spec_of(handle: int) -> layout.PackSpec:
    """The layout of a number."""
    return _SPECS[handle]
