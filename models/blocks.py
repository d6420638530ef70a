"""What the blocks of all families are made of: norms, modulation, attention with the host's patches, recording, and the joint block.

A block has two paths over the same weights: fused where nothing asks to look inside, plain where a patch, an attention override, a mask
or per-token modulation does. Rounding points are the same in both: once each for norm and modulation, linear, ending and residual.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import layout
from ..kernels.norm_modulate import Norm
from ..kernels.qk_norm_rope import qk_norm_rope_
from ..kernels.targets import code_form, target_for, triton_reason
from ..kernels.w4_matmul import Peak
from .formats.checkpoint import HostLinear, PackedCheckpoint
from .graphs import Side, may_record
from .linear import Ending, Leaf, Linear, PackedLinear, PlainLinear, Weights, normalised, parameter, peak_between, resolved
from .runtime import Runtime

EPS = 1e-6
Dims = list[tuple[int, int, int]]  # (first token, end token, row of the modulation) per slice


@dataclass
class Mod:
    """One modulation: shift, scale, gate, each [B, 1, D] (or [B, T, D], a row per time, with modulation_dims)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class RMSNorm(Leaf):
    """RMSNorm of a head or a token; its one parameter is called `scale` or `weight`, whichever the host's own class uses."""

    def __init__(self, scale: Tensor, name: str, runtime: Runtime, eps: float = EPS):
        super().__init__(runtime)
        self._name, self.eps = name, eps
        self.weight = self.bias = None  # hosts since 2025-12 read both on every module that may be offloaded
        setattr(self, name, parameter(scale))  # takes the place of the None when the name is `weight`

    def scale_on(self, device: torch.device) -> Tensor:
        """The scale [D] on `device`, with what a host adds to it where it streams the weight."""
        if self._name != "weight":  # hosts stream and patch only what is called so
            return (self._parameters if self.streamer is None else self.streamer.tensors(self))[self._name].to(device)
        with self.runtime.acquire(self, device) as (weight, _):
            return weight if weight is self.weight else weight.clone()  # a streaming buffer is used again

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.scale_on(x.device).float(), self.eps).to(x.dtype)


Norms = tuple[RMSNorm, RMSNorm]  # of query and key heads
Values = tuple[Tensor, ...]  # of a modulation, each [B, 1, D]


def modulations(lin: Linear, vec: Tensor) -> list[Mod]:
    """lin(silu(vec)) as modulations of three chunks each. vec [B, D], or [B, T, D], a row per time."""
    vec = vec if vec.ndim == 3 else vec.unsqueeze(1)
    chunks = lin(F.silu(vec)).chunk(lin.out_features // lin.in_features, dim=-1)
    return [Mod(*chunks[i : i + 3]) for i in range(0, len(chunks), 3)]


def modulation_values(lin: Linear, vec: Tensor, first: int, count: int) -> Values:
    """`count` of the chunks [B, 1, D] of lin(vec), from `first` on: shift, scale, gate, and for a joint block the same again.

    vec [B, 1, K]: silu is behind it.
    """
    dim = lin.in_features
    return lin.outputs(vec, range(first * dim, (first + count) * dim)).chunk(count, dim=-1)


def modulated(x: Tensor, mod: Mod, dims: Dims | None) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in fp32, rounded once. x [B, L, D]."""
    if dims is None and mod.shift.shape[1] == 1:
        return normalised(x, norm_of(x, mod.shift, mod.scale))
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
    if dims is None:  # a modulation per token
        return (normed * (1 + mod.scale.float()) + mod.shift.float()).to(x.dtype)
    out = torch.empty_like(x)
    for start, end, row in dims:
        out[:, start:end] = (normed[:, start:end] * (1 + mod.scale[:, row : row + 1].float()) + mod.shift[:, row : row + 1].float()).to(
            x.dtype
        )
    return out


def gated(x: Tensor, y: Tensor, gate: Tensor, dims: Dims | None) -> Tensor:
    """x + gate * y, rounded once."""
    if dims is None:
        return torch.addcmul(x, y, gate)
    out = torch.empty_like(x)
    for start, end, row in dims:
        out[:, start:end] = torch.addcmul(x[:, start:end], y[:, start:end], gate[:, row : row + 1])
    return out


def norm_of(x: Tensor, shift: Tensor, scale: Tensor) -> Norm:
    return Norm(one_time(shift, x), one_time(scale, x), max(x.shape[1], 1), EPS)


def residual_of(x: Tensor, gate: Tensor) -> Ending:
    return Ending(gate=one_time(gate, x), residual=x)


def one_time(values: Tensor, x: Tensor) -> Tensor:
    """[B, D] of a modulation's values [B|1, 1, D], B that of x."""
    values = values[:, 0]
    return values if values.shape[0] == x.shape[0] else values.expand(x.shape[0], -1)


def heads_first(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, L, 3 * H * D] -> q, k, v views [B, H, L, D]."""
    q, k, v = qkv.unflatten(-1, (3, heads, qkv.shape[-1] // (3 * heads))).permute(2, 0, 3, 1, 4)
    return q, k, v


def qk_normed_(qkv: Tensor, norms: Norms, heads: int, pe: Tensor | None) -> Tensor:
    """q and k heads of qkv [B, L, 3 * H * D] normed in place, and turned by pe where one is given."""
    scales, eps = [norm.scale_on(qkv.device) for norm in norms], norms[0].eps
    if torch.compiler.is_compiling():
        from . import ops

        return ops.qk_norm_rope_(qkv, *scales, pe, heads, eps)
    return qk_norm_rope_(qkv, *scales, pe, heads, eps)


def finite(x: Tensor) -> Tensor:
    """float16 overflow brought back to the largest number, as the host does after its blocks."""
    return torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504) if x.dtype == torch.float16 else x


def looked_into(vec: object, pe: Tensor | None, mask: Tensor | None, dims: object, options: dict) -> bool:
    """Does anything want to see or change a block's inside? Then it takes the plain path."""
    patches = options.get("patches", {})
    return (
        mask is not None
        or pe is None
        or pe.ndim != 6
        or dims is not None
        or not isinstance(vec, Tensor)
        or vec.ndim != 2
        or bool(patches.get("attn1_patch"))
        or bool(patches.get("attn1_output_patch"))
        or options.get("optimized_attention_override") is not None
    )


def patched_attention(
    runtime: Runtime,
    heads: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pe: Tensor | None,
    mask: Tensor | None,
    options: dict,
    img_slice: list[int] | None,
) -> Tensor:
    """Attention with the host's attn1 patches around it: before RoPE (`attn1_patch`) and on the result (`attn1_output_patch`)."""
    patches = options.get("patches", {})
    extra = dict(options) if img_slice is None else dict(options, img_slice=img_slice)
    for patch in patches.get("attn1_patch", []):
        out = patch(q, k, v, pe=pe, attn_mask=mask, extra_options=extra)
        q, k, v = out.get("q", q), out.get("k", k), out.get("v", v)
        pe, mask = out.get("pe", pe), out.get("attn_mask", mask)
    attn = runtime.attention(q, k, v, heads, pe, mask, options)
    for patch in patches.get("attn1_output_patch", []):
        attn = patch(attn, extra)
    return attn


def compute_mode(options: dict, device: torch.device) -> str:
    """The compute mode of this call: `transformer_options["tonfa"]["compute"]`, resolved for the device."""
    return resolved(options.get("tonfa", {}).get("compute", "auto"), device)


def check_cancel(runtime: Runtime) -> None:
    """The host's cancel check; compiled code has none."""
    if not torch.compiler.is_compiling():
        runtime.check_cancel()


def addresses(block: nn.Module, device: torch.device) -> tuple[int, ...] | None:
    """Where everything lies that the block's leaves compute with; None where a weight has no place or the host took a leaf's call."""
    leaves = block.__dict__.get("_leaves")
    if leaves is None:
        leaves = block.__dict__["_leaves"] = [m for m in block.modules() if isinstance(m, Leaf)]
    found = []
    for leaf in leaves:
        held = block.runtime.held(leaf, device)
        if held is None or "forward" in leaf.__dict__:
            return None
        found += [p.data_ptr() for p in held.values() if p is not None]
        for t in leaf.side_tensors():
            if t.device != device:
                return None
            found += [t.data_ptr(), *t.shape]
    return tuple(found)


def recorded(block: nn.Module, compute: str, inputs: list[Tensor], results: int, work: Callable[..., tuple]) -> tuple[Tensor, ...]:
    """work(*inputs, out), recorded as a CUDA graph where the runtime keeps them and nothing of the block is brought from elsewhere.

    out: for each result where to write it, or None.
    """
    graphs, device = block.runtime.graphs, inputs[0].device
    if graphs is None or not may_record(device) or not only_kernels(device, inputs[0].dtype, compute):
        return work(*inputs, [None] * results)
    weights, attention = addresses(block, device), block.runtime.attention_in_use()
    if weights is None or attention is None:
        return work(*inputs, [None] * results)
    return graphs.run(block, (compute, attention, *weights), inputs, results, work)


def only_kernels(device: torch.device, dtype: torch.dtype, compute: str) -> bool:
    """Whether a block is nothing but launches here, on a GPU that outruns Python. Torch's paths copy tables from the host."""
    sixteen_bit = dtype in (torch.bfloat16, torch.float16)
    return target_for(device).copy_engine and sixteen_bit and compute in ("exact", "fast") and triton_reason(device) is None


# -- beside the main work -----------------------------------------------------------------------------------------------------------


def side_for(runtime: Runtime, name: str, device: torch.device) -> Side:
    """Graphs.side of the runtime's; without graphs, one that changes nothing."""
    graphs = None if torch.compiler.is_compiling() else runtime.graphs
    return Side(None) if graphs is None else graphs.side(device, name)


def unpacked(gaps: Side, compute: str, x: Tensor, *linears: Linear) -> list[Weights]:
    """The linears' weights for as many tokens as x [B, L, D] has, where `gaps` makes them beside other work.

    Else nothing, for they are large: each linear unpacks its own, and lets go of it.
    """
    return [lin.unpack(x.shape[:2].numel(), compute, x.dtype) if gaps else None for lin in linears]


# -- the joint block ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Stream:
    """The layers of one stream of a joint block."""

    mod: Linear
    qkv: Linear
    norms: Norms
    proj: Linear
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True, eq=False)
class Ready:
    """What a stream needs behind attention and does not depend on it: row maxima to fill, and weights where they were unpacked."""

    peak: Peak | None
    proj: Weights
    fc1: Weights
    fc2: Weights


class JointBlock(nn.Module):
    """Image and text stream with joint attention, text first: FLUX's double block, Qwen-Image's block.

    A subclass has the host's names and calling form, and says by `stream` which of its layers are which.
    """

    position = 0  # among all blocks of the model, in the order in which they run
    text_beside = True  # whether a recorded block runs its text stream beside its image stream

    def __init__(self, heads: int, runtime: Runtime):
        super().__init__()
        self.num_heads, self.runtime = heads, runtime

    def stream(self, side: str) -> Stream:
        """The layers of "img" or "txt"."""
        raise NotImplementedError

    def joint(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor | tuple,
        pe: Tensor,
        mask: Tensor | None,
        dims_img: Dims | None,
        dims_txt: Dims | None,
        options: dict,
    ) -> tuple[Tensor, Tensor]:
        """img [B, Li, D], txt [B, Lt, D], pe [B|1, 1, Lt + Li, d/2, 2, 2], mask as attention takes it -> (img, txt).

        vec: [B, D]; [B, T, D] with dims_img, of which the text takes the first; or both streams' modulations, made outside.
        """
        check_cancel(self.runtime)
        compute = compute_mode(options, img.device)
        if not looked_into(vec, pe, mask, dims_img or dims_txt, options):

            def fused(img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, out: list[Tensor | None]) -> tuple[Tensor, Tensor]:
                return self._fused(img, txt, vec, pe, compute, options, out)

            return recorded(self, compute, [img, txt, vec, pe], 2, fused)
        streams = self.stream("img"), self.stream("txt")
        (img_mod1, img_mod2), (txt_mod1, txt_mod2) = [modulations(s.mod, vec) for s in streams] if isinstance(vec, Tensor) else vec
        if dims_img is not None:  # the text stream has one time only: the first row
            txt_mod1, txt_mod2 = (Mod(*(t[:, :1] for t in (m.shift, m.scale, m.gate))) for m in (txt_mod1, txt_mod2))
        attn = self._attention(img, txt, img_mod1, txt_mod1, pe, mask, dims_img, dims_txt, compute, options)
        n = txt.shape[1]
        img = self._finish("img", img, attn[:, n:], img_mod1, img_mod2, dims_img, compute)
        txt = self._finish("txt", txt, attn[:, :n], txt_mod1, txt_mod2, dims_txt, compute)
        return img, finite(txt)

    # -- plain path ---------------------------------------------------------------------------------------------------------------

    def _attention(
        self,
        img: Tensor,
        txt: Tensor,
        img_mod: Mod,
        txt_mod: Mod,
        pe: Tensor | None,
        mask: Tensor | None,
        dims_img: Dims | None,
        dims_txt: Dims | None,
        compute: str,
        options: dict,
    ) -> Tensor:
        parts = []
        for side, x, mod, dims in (("txt", txt, txt_mod, dims_txt), ("img", img, img_mod, dims_img)):
            s = self.stream(side)
            qkv = qk_normed_(s.qkv(modulated(x, mod, dims), compute), s.norms, self.num_heads, None)
            parts.append(heads_first(qkv, self.num_heads))
        q, k, v = (torch.cat(t, 2) for t in zip(*parts, strict=True))
        return patched_attention(self.runtime, self.num_heads, q, k, v, pe, mask, options, [txt.shape[1], q.shape[2]])

    def _finish(self, side: str, x: Tensor, attn: Tensor, mod1: Mod, mod2: Mod, dims: Dims | None, compute: str) -> Tensor:
        s = self.stream(side)
        x = gated(x, s.proj(attn, compute), mod1.gate, dims)
        h = F.gelu(s.fc1(modulated(x, mod2, dims), compute), approximate="tanh")
        return gated(x, s.fc2(h, compute), mod2.gate, dims)

    # -- fused path ---------------------------------------------------------------------------------------------------------------

    def _fused(
        self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, compute: str, options: dict, out: list[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        n, vec = txt.shape[1], F.silu(vec).unsqueeze(1)
        beside, gaps, text_gaps = (side_for(self.runtime, name, img.device) for name in ("text", "gaps", "gaps of text"))
        if not self.text_beside:
            beside = Side(None)
        s, t = self.stream("img"), self.stream("txt")
        qkv = img.new_empty(img.shape[0], n + img.shape[1], t.qkv.out_features)
        with gaps:
            (weights,) = unpacked(gaps, compute, img, s.qkv)
        with beside:
            txt_mod = modulation_values(t.mod, vec, 0, 6)
            self._fused_qkv(t, txt, txt_mod, pe[:, :, :n], qkv[:, :n], compute)
            img_rest = modulation_values(s.mod, vec, 2, 4) if beside else ()
        img_mod = modulation_values(s.mod, vec, 0, 2 if beside else 6) + img_rest  # in two: the image stream waits for the first alone
        gaps.join()
        self._fused_qkv(s, img, img_mod, pe[:, :, n:], qkv[:, n:], compute, weights)
        del weights
        beside.join()
        with gaps:
            img_ready = self._ready(s, img, gaps, compute)
        with text_gaps:
            txt_ready = self._ready(t, txt, text_gaps, compute)
        attn = self.runtime.attend(*heads_first(qkv, self.num_heads), self.num_heads, None, options)
        del qkv
        with beside:
            text_gaps.join()
            txt = finite(self._fused_finish(t, txt, attn[:, :n], txt_mod[2:], txt_ready, compute, out[1]))
        gaps.join()
        img = self._fused_finish(s, img, attn[:, n:], img_mod[2:], img_ready, compute, out[0])
        beside.join()
        return img, txt

    def _fused_qkv(self, s: Stream, x: Tensor, mod: Values, pe: Tensor, out: Tensor, compute: str, weights: Weights = None) -> None:
        """Writes the stream's normed and turned q, k and v. mod: shift and scale, perhaps more."""
        s.qkv.run(x, compute, norm=norm_of(x, *mod[:2]), out=out, weights=weights)
        qk_normed_(out, s.norms, self.num_heads, pe)

    def _ready(self, s: Stream, x: Tensor, gaps: Side, compute: str) -> Ready:
        peak = peak_between(s.fc1, s.fc2, 0, x.shape[:2].numel(), compute, x.device)
        return Ready(peak, *unpacked(gaps, compute, x, s.proj, s.fc1, s.fc2))

    def _fused_finish(self, s: Stream, x: Tensor, attn: Tensor, mod: Values, ready: Ready, compute: str, out: Tensor | None) -> Tensor:
        """mod: gate, shift, scale, gate."""
        gate1, shift, scale, gate2 = mod
        x = s.proj.run(attn, compute, ending=residual_of(x, gate1), weights=ready.proj)
        ending = Ending(gelu_from=0, peak=ready.peak)
        h = s.fc1.run(x, compute, norm=norm_of(x, shift, scale), ending=ending, weights=ready.fc1)
        return s.fc2.run(h, compute, ending=residual_of(x, gate2), out=out, peak=ready.peak, weights=ready.fc2)


class Rows:
    """Stands where the host has a linear that is rows of a stacked one, for whoever looks it up by its name. It owns nothing."""

    def __init__(self, stacked: Linear):
        self._stacked = stacked

    @property
    def comfy_cast_weights(self) -> bool:
        return self._stacked.comfy_cast_weights

    @property
    def comfy_patched_weights(self) -> bool:
        return getattr(self._stacked, "comfy_patched_weights", False)


def stand_in(parent: nn.Module, stacked: Linear) -> None:
    """Gives `parent` the names of the linears that are rows of `stacked`. They are no modules: nothing is counted or moved twice."""
    for piece in getattr(stacked, "pieces", ()):
        parent.__dict__[piece.name.rpartition(".")[2]] = Rows(stacked)


# -- from a checkpoint --------------------------------------------------------------------------------------------------------------


class Leaves:
    """Makes the leaf modules of a checkpoint's blocks, re-packed and filled.

    device: where the parameters are left. target: the device that will compute (None: the same one): it decides the code form of the packed
    layout, and re-packing runs there (seconds on a GPU). progress(done, total) is called once a linear.
    Its methods raise CheckpointError (see models/formats/checkpoint.py).
    """

    def __init__(
        self,
        checkpoint: PackedCheckpoint,
        device: torch.device | str = "cpu",
        runtime: Runtime | None = None,
        target: torch.device | str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ):
        self.checkpoint, self.device, self.runtime = checkpoint, device, runtime or Runtime()
        self.target = torch.device(target if target is not None else device)
        self._linears = {h.name: h for h in checkpoint.host_linears()}
        self._plain = checkpoint.plain_loaders()
        self._progress, self._done = progress, 0

    def linear(self, name: str, paired: bool = False) -> Linear:
        """The host linear of this name. paired: its rows are values and gates (Ending.swiglu)."""
        host = self._linears[name]
        pieces = self.checkpoint.pieces(host)
        module = self.unpacked(*(piece.name for piece in pieces)) if host.kind == "plain" else self._packed(host, paired)
        if len(pieces) > 1:
            module.pieces = pieces
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, len(self._linears))
        return module

    def unpacked(self, *names: str) -> PlainLinear:
        """A linear in 16 bit, or several stacked."""
        weight = torch.cat([self._plain[f"{name}.weight"]() for name in names]).to(self.device)
        biases = [self._plain[f"{name}.bias"]() for name in names if f"{name}.bias" in self._plain]
        return PlainLinear(weight, torch.cat(biases).to(self.device) if biases else None, self.runtime)

    def norm(self, name: str, parameter_name: str = "weight", eps: float = EPS) -> RMSNorm:
        """The RMSNorm whose scale is the tensor `name`; the host calls it parameter_name."""
        return RMSNorm(self._plain[name]().to(self.device, torch.float32, copy=True), parameter_name, self.runtime, eps)

    def _packed(self, host: HostLinear, paired: bool) -> PackedLinear:
        layers = self.checkpoint.load_linear(host, device=self.target)
        bias = host_bias(host, layers)
        spec = layout.plan(host.out_features, host.in_features, layers, code_form(self.target), paired)
        blob = layout.pack(spec, [layer for layer, _, _ in layers])
        return PackedLinear(spec, blob.to(self.device), None if bias is None else bias.to(self.device), self.runtime)


def host_bias(linear: HostLinear, layers: list[tuple[layout.LogicalLinear, int, int]]) -> Tensor | None:
    """The host linear's one bias [N] from its parts' (None where no part has one)."""
    biases = [(layer.bias, row) for layer, row, _ in layers if layer.bias is not None]
    if not biases:
        return None
    dtype = functools.reduce(torch.promote_types, (b.dtype for b, _ in biases))
    out = torch.zeros(linear.out_features, dtype=dtype, device=biases[0][0].device)
    for bias, row in biases:
        out[row : row + bias.shape[0]] += bias
    return out
