"""FLUX.1's blocks over 4-bit linears, filled from a checkpoint, and a small standalone FLUX around them.

Structure and parameter names are the host's (black-forest-labs/flux, native names), so that its forward, LoRA key maps and patches fit.
Every block has two paths over the same weights: fused where nothing asks to look inside, plain where a patch, an attention override, a
mask or per-token modulation does. Rounding points are the same in both: once each for norm and modulation, linear, GELU and residual.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import layout
from ..kernels.norm_modulate import Norm
from ..kernels.qk_norm_rope import qk_norm_rope_
from ..kernels.targets import code_form, target_for, triton_reason
from .first_block_cache import cached_double, cached_single
from .formats.checkpoint import FluxCheckpoint, HostLinear
from .graphs import may_record
from .linear import LARGEST_FP16, Ending, Leaf, Linear, PackedLinear, PlainLinear, normalised, parameter, peak_between, resolved
from .runtime import Runtime

EPS = 1e-6
Dims = list[tuple[int, int, int]]  # (first token, end token, row of the modulation) per slice


@dataclass
class Mod:
    """One modulation: shift, scale, gate, each [B, 1, D] (or [B, T, D], a row per time, with modulation_dims)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    """vec [B, D] or [B, T, D] -> one (single block) or two (double block) Mods."""

    def __init__(self, lin: Linear):
        super().__init__()
        self.lin = lin

    def forward(self, vec: Tensor) -> tuple[Mod, Mod | None]:
        vec = vec if vec.ndim == 3 else vec.unsqueeze(1)
        chunks = self.lin(F.silu(vec)).chunk(self.lin.out_features // self.lin.in_features, dim=-1)
        return Mod(*chunks[:3]), Mod(*chunks[3:]) if len(chunks) == 6 else None


class RMSNorm(Leaf):
    """RMSNorm over a head; its one parameter is called `scale` or `weight`, whichever the host's own class uses."""

    def __init__(self, scale: Tensor, name: str, runtime: Runtime):
        super().__init__(runtime)
        self._name = name
        self.weight = self.bias = None  # hosts since 2025-12 read both on every module that may be offloaded
        setattr(self, name, parameter(scale))  # takes the place of the None when the name is `weight`

    def scale_on(self, device: torch.device) -> Tensor:
        """The scale [D] on `device`, with what a host adds to it where it streams the weight."""
        if self._name != "weight":  # hosts stream and patch only what is called so
            return (self._parameters if self.streamer is None else self.streamer.tensors(self))[self._name].to(device)
        with self.runtime.acquire(self, device) as (weight, _):
            return weight if weight is self.weight else weight.clone()  # a streaming buffer is used again

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.scale_on(x.device).float(), EPS).to(x.dtype)


class QKNorm(nn.Module):
    def __init__(self, query: RMSNorm, key: RMSNorm):
        super().__init__()
        self.query_norm, self.key_norm = query, key

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class SelfAttention(nn.Module):
    def __init__(self, qkv: Linear, norm: QKNorm, proj: Linear):
        super().__init__()
        self.qkv, self.norm, self.proj = qkv, norm, proj


def modulated(x: Tensor, mod: Mod, dims: Dims | None) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in fp32, rounded once. x [B, L, D]."""
    if dims is None and mod.shift.shape[1] == 1:
        return normalised(x, _norm(x, mod))
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


def _norm(x: Tensor, mod: Mod) -> Norm:
    return Norm(_one_time(mod.shift, x), _one_time(mod.scale, x), max(x.shape[1], 1), EPS)


def _residual(x: Tensor, gate: Tensor) -> Ending:
    return Ending(gate=_one_time(gate, x), residual=x)


def _one_time(values: Tensor, x: Tensor) -> Tensor:
    """[B, D] of a modulation's values [B|1, 1, D], B that of x."""
    values = values[:, 0]
    return values if values.shape[0] == x.shape[0] else values.expand(x.shape[0], -1)


def heads_first(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, L, 3 * H * D] -> q, k, v views [B, H, L, D]."""
    q, k, v = qkv.unflatten(-1, (3, heads, qkv.shape[-1] // (3 * heads))).permute(2, 0, 3, 1, 4)
    return q, k, v


def qk_normed_(qkv: Tensor, norm: QKNorm, heads: int, pe: Tensor | None) -> Tensor:
    """q and k heads of qkv [B, L, 3 * H * D] normed in place, and turned by pe where one is given."""
    scales = norm.query_norm.scale_on(qkv.device), norm.key_norm.scale_on(qkv.device)
    if torch.compiler.is_compiling():
        from . import ops

        return ops.qk_norm_rope_(qkv, *scales, pe, heads, EPS)
    return qk_norm_rope_(qkv, *scales, pe, heads, EPS)


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


class DoubleBlock(nn.Module):
    """Image and text streams with joint attention. Called as the host calls its own: see `forward`."""

    position = 0  # among all blocks of the model, double ones first

    def __init__(self, leaf: Callable[[str], Linear], norm: Callable[[str], QKNorm], heads: int, runtime: Runtime):
        super().__init__()
        self.num_heads, self.runtime = heads, runtime
        for s in ("img", "txt"):
            self.add_module(f"{s}_mod", Modulation(leaf(f"{s}_mod.lin")))
            self.add_module(f"{s}_attn", SelfAttention(leaf(f"{s}_attn.qkv"), norm(f"{s}_attn.norm"), leaf(f"{s}_attn.proj")))
            self.add_module(f"{s}_mlp", nn.Sequential(leaf(f"{s}_mlp.0"), nn.GELU(approximate="tanh"), leaf(f"{s}_mlp.2")))
        self.hidden_size = self.img_attn.qkv.in_features

    @cached_double
    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        pe: Tensor,
        attn_mask: Tensor | None = None,
        modulation_dims_img: Dims | None = None,
        modulation_dims_txt: Dims | None = None,
        transformer_options: dict | None = None,
        **unknown: object,
    ) -> tuple[Tensor, Tensor]:
        """img [B, Li, D], txt [B, Lt, D], vec [B, D], pe [B|1, 1, Lt + Li, d/2, 2, 2] (text first) -> (img, txt).

        Unknown keywords are ignored.
        """
        check_cancel(self.runtime)
        options = transformer_options or {}
        compute = compute_mode(options, img.device)
        if not looked_into(vec, pe, attn_mask, modulation_dims_img or modulation_dims_txt, options):

            def fused(img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, out: list[Tensor | None]) -> tuple[Tensor, Tensor]:
                return self._fused(img, txt, vec, pe, compute, options, out)

            return recorded(self, compute, [img, txt, vec, pe], 2, fused)
        (img_mod1, img_mod2), (txt_mod1, txt_mod2) = (self.img_mod(vec), self.txt_mod(vec)) if isinstance(vec, Tensor) else vec
        if modulation_dims_img is not None:  # the text stream has one time only: the first row
            txt_mod1, txt_mod2 = (Mod(*(t[:, :1] for t in (m.shift, m.scale, m.gate))) for m in (txt_mod1, txt_mod2))
        attn = self._attention(img, txt, img_mod1, txt_mod1, pe, attn_mask, modulation_dims_img, modulation_dims_txt, compute, options)
        n = txt.shape[1]
        img = self._finish("img", img, attn[:, n:], img_mod1, img_mod2, modulation_dims_img, compute)
        txt = self._finish("txt", txt, attn[:, :n], txt_mod1, txt_mod2, modulation_dims_txt, compute)
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
        for stream, x, mod, dims in ((self.txt_attn, txt, txt_mod, dims_txt), (self.img_attn, img, img_mod, dims_img)):
            qkv = qk_normed_(stream.qkv(modulated(x, mod, dims), compute), stream.norm, self.num_heads, None)
            parts.append(heads_first(qkv, self.num_heads))
        q, k, v = (torch.cat(t, 2) for t in zip(*parts, strict=True))
        return patched_attention(self.runtime, self.num_heads, q, k, v, pe, mask, options, [txt.shape[1], q.shape[2]])

    def _finish(self, s: str, x: Tensor, attn: Tensor, mod1: Mod, mod2: Mod, dims: Dims | None, compute: str) -> Tensor:
        proj, mlp = getattr(self, f"{s}_attn").proj, getattr(self, f"{s}_mlp")
        x = gated(x, proj(attn, compute), mod1.gate, dims)
        h = F.gelu(mlp[0](modulated(x, mod2, dims), compute), approximate="tanh")
        return gated(x, mlp[2](h, compute), mod2.gate, dims)

    # -- fused path ---------------------------------------------------------------------------------------------------------------

    def _fused(
        self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, compute: str, options: dict, out: list[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        n = txt.shape[1]
        attn, (img_mod1, img_mod2), (txt_mod1, txt_mod2) = self._fused_attention(img, txt, vec, pe, compute, options)
        img = self._fused_finish("img", img, attn[:, n:], img_mod1, img_mod2, compute, out[0])
        txt = self._fused_finish("txt", txt, attn[:, :n], txt_mod1, txt_mod2, compute, out[1])
        return img, finite(txt)

    def _fused_attention(
        self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, compute: str, options: dict
    ) -> tuple[Tensor, tuple[Mod, Mod], tuple[Mod, Mod]]:
        """(attention's result, the image stream's modulations, the text stream's)."""
        n = txt.shape[1]
        qkv = img.new_empty(img.shape[0], n + img.shape[1], self.txt_attn.qkv.out_features)
        img_mods = self._fused_qkv("img", img, vec, pe[:, :, n:], qkv[:, n:], compute)
        txt_mods = self._fused_qkv("txt", txt, vec, pe[:, :, :n], qkv[:, :n], compute)
        return self.runtime.attend(*heads_first(qkv, self.num_heads), self.num_heads, None, options), img_mods, txt_mods

    def _fused_qkv(self, s: str, x: Tensor, vec: Tensor, pe: Tensor, out: Tensor, compute: str) -> tuple[Mod, Mod]:
        """Writes the stream's normed and turned q, k and v; returns its modulations."""
        mod1, mod2 = getattr(self, f"{s}_mod")(vec)
        stream = getattr(self, f"{s}_attn")
        stream.qkv.run(x, compute, norm=_norm(x, mod1), out=out)
        qk_normed_(out, stream.norm, self.num_heads, pe)
        return mod1, mod2

    def _fused_finish(self, s: str, x: Tensor, attn: Tensor, mod1: Mod, mod2: Mod, compute: str, out: Tensor | None) -> Tensor:
        proj, mlp = getattr(self, f"{s}_attn").proj, getattr(self, f"{s}_mlp")
        x = proj.run(attn, compute, ending=_residual(x, mod1.gate))
        peak = peak_between(mlp[0], mlp[2], 0, x.shape[:2].numel(), compute, x.device)
        h = mlp[0].run(x, compute, norm=_norm(x, mod2), ending=Ending(gelu_from=0, peak=peak))
        return mlp[2].run(h, compute, ending=_residual(x, mod2.gate), out=out, peak=peak)


class SingleBlock(nn.Module):
    """Parallel attention and MLP over text and image tokens together."""

    position = 0

    def __init__(self, leaf: Callable[[str], Linear], norm: Callable[[str], QKNorm], heads: int, runtime: Runtime):
        super().__init__()
        self.num_heads, self.runtime = heads, runtime
        self.linear1, self.linear2 = leaf("linear1"), leaf("linear2")
        self.norm = norm("norm")
        self.modulation = Modulation(leaf("modulation.lin"))
        self.mlp_act = nn.GELU(approximate="tanh")
        self.hidden_size = self.linear1.in_features

    @cached_single
    def forward(
        self,
        x: Tensor,
        vec: Tensor,
        pe: Tensor,
        attn_mask: Tensor | None = None,
        modulation_dims: Dims | None = None,
        transformer_options: dict | None = None,
        **unknown: object,
    ) -> Tensor:
        """x [B, Lt + Li, D] (text first), vec [B, D], pe as in DoubleBlock -> [B, Lt + Li, D]. Unknown keywords are ignored."""
        check_cancel(self.runtime)
        options = transformer_options or {}
        compute = compute_mode(options, x.device)
        inner = 3 * self.hidden_size
        if not looked_into(vec, pe, attn_mask, modulation_dims, options):

            def fused(x: Tensor, vec: Tensor, pe: Tensor, out: list[Tensor | None]) -> tuple[Tensor]:
                return (self._fused(x, vec, pe, compute, options, out[0]),)

            return recorded(self, compute, [x, vec, pe], 1, fused)[0]
        mod = self.modulation(vec)[0] if isinstance(vec, Tensor) else vec
        y = self.linear1(modulated(x, mod, modulation_dims), compute)
        qk_normed_(y[..., :inner], self.norm, self.num_heads, None)
        q, k, v = heads_first(y[..., :inner], self.num_heads)
        attn = patched_attention(self.runtime, self.num_heads, q, k, v, pe, attn_mask, options, options.get("img_slice"))
        h = torch.cat((attn, F.gelu(y[..., inner:], approximate="tanh")), 2)
        return finite(gated(x, self.linear2(h, compute), mod.gate, modulation_dims))

    def _fused(self, x: Tensor, vec: Tensor, pe: Tensor, compute: str, options: dict, out: Tensor | None) -> Tensor:
        mod, inner = self.modulation(vec)[0], 3 * self.hidden_size
        peak = peak_between(self.linear1, self.linear2, inner, x.shape[:2].numel(), compute, x.device)
        y = self.linear1.run(x, compute, norm=_norm(x, mod), ending=Ending(gelu_from=inner, peak=peak))
        qk_normed_(y[..., :inner], self.norm, self.num_heads, pe)
        attn = self.runtime.attend(*heads_first(y[..., :inner], self.num_heads), self.num_heads, None, options)
        parts = [attn, y[..., inner:]]
        del y, attn  # linear2 empties the list: at full size these two are most of the step's memory
        return finite(self.linear2.run(parts, compute, ending=_residual(x, mod.gate), out=out, peak=peak))


# -- from a checkpoint ------------------------------------------------------------------------------------------------------------


def build_blocks(
    checkpoint: FluxCheckpoint,
    *,
    device: torch.device | str = "cpu",
    runtime: Runtime | None = None,
    norm_param: str = "scale",
    target: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """All double and single blocks, re-packed and filled from the checkpoint.

    device: where the parameters are left. target: the device that will compute: it decides the code form of the packed layout, and
    re-packing runs there (seconds on a GPU). norm_param: name of the q/k norms' parameter. progress(done, total) is
    called once a linear. Raises CheckpointError (see models/formats/checkpoint.py).
    """
    runtime = runtime or Runtime()
    target = torch.device(target if target is not None else device)
    linears = {h.name: h for h in checkpoint.host_linears()}
    plain = {name: t for name, t in checkpoint.plain_tensors() if name.startswith(("double_blocks.", "single_blocks."))}
    done = 0

    def leaf(name: str) -> Linear:
        nonlocal done
        if linears[name].kind == "plain":
            weight, bias = (plain[f"{name}.{p}"].to(device, copy=True) for p in ("weight", "bias"))
            module = PlainLinear(weight, bias, runtime)
        else:
            module = load_packed(checkpoint, linears[name], device, target, runtime)
        done += 1
        if progress is not None:
            progress(done, len(linears))
        return module

    def qk_norm(name: str) -> QKNorm:
        scales = (plain[f"{name}.{k}_norm.scale"].to(device, torch.float32, copy=True) for k in ("query", "key"))
        return QKNorm(*(RMSNorm(scale, norm_param, runtime) for scale in scales))

    def stack(kind: type, prefix: str, depth: int) -> nn.ModuleList:
        heads = checkpoint.config["num_heads"]
        return nn.ModuleList(
            [
                kind(lambda n, i=i: leaf(f"{prefix}.{i}.{n}"), lambda n, i=i: qk_norm(f"{prefix}.{i}.{n}"), heads, runtime)
                for i in range(depth)
            ]
        )

    with torch.inference_mode(False), torch.no_grad():
        config = checkpoint.config
        doubles = stack(DoubleBlock, "double_blocks", config["depth"])
        singles = stack(SingleBlock, "single_blocks", config["depth_single_blocks"])
    for position, block in enumerate((*doubles, *singles)):
        block.position = position
    return doubles, singles


def load_packed(
    checkpoint: FluxCheckpoint, linear: HostLinear, device: torch.device | str, target: torch.device, runtime: Runtime
) -> PackedLinear:
    """One quantised host linear as a module: packed on and for `target`, parameters left on `device`."""
    layers = checkpoint.load_linear(linear, device=target)
    bias = host_bias(linear, layers)
    spec = layout.plan(linear.out_features, linear.in_features, layers, code_form(target))
    blob = layout.pack(spec, [layer for layer, _, _ in layers])
    return PackedLinear(spec, blob.to(device), None if bias is None else bias.to(device), runtime)


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


# -- standalone -------------------------------------------------------------------------------------------------------------------


def timestep_embedding(t: Tensor, dim: int = 256, max_period: float = 10000.0, time_factor: float = 1000.0) -> Tensor:
    """Sinusoidal embedding [B, dim] of t [B] in 0..1, cosines first (Vaswani et al., arXiv 1706.03762, as FLUX uses it)."""
    freqs = torch.exp(-math.log(max_period) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    args = (time_factor * t.float())[:, None] * freqs
    return torch.cat((args.cos(), args.sin()), -1)


def rope_table(ids: Tensor, axes_dim: list[int], theta: float) -> Tensor:
    """Position ids [B, L, axes] -> pe [B, 1, L, d/2, 2, 2] fp32 (RoPE, arXiv 2104.09864, one frequency band per axis)."""
    tables = []
    for i, dim in enumerate(axes_dim):
        omega = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
        angle = ids[..., i].double()[..., None] * omega
        tables.append(torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1).unflatten(-1, (2, 2)))
    return torch.cat(tables, -3).float().unsqueeze(1)


class Embedder(nn.Module):
    def __init__(self, in_dim: int, hidden: int, **kw: object):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(in_dim, hidden, **kw), nn.Linear(hidden, hidden, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class LastLayer(nn.Module):
    def __init__(self, hidden: int, out: int, **kw: object):
        super().__init__()
        self.linear = nn.Linear(hidden, out, **kw)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden, **kw))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, -1)
        return self.linear(modulated(x, Mod(shift, scale, shift), None))


class Flux(nn.Module):
    """FLUX.1 without a host: for the demo, the quantiser and tests. The host shell swaps only this class; blocks and names are the same."""

    def __init__(
        self,
        checkpoint: FluxCheckpoint,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ):
        super().__init__()
        c = self.config = checkpoint.config
        self.dtype, hidden, kw = dtype, c["hidden_size"], {"dtype": dtype, "device": device}
        patch = c.get("patch_size", 2) ** 2
        self.img_in = nn.Linear(c["in_channels"] * patch, hidden, **kw)
        self.time_in = Embedder(256, hidden, **kw)
        self.vector_in = Embedder(c["vec_in_dim"], hidden, **kw)
        self.guidance_in = Embedder(256, hidden, **kw) if c["guidance_embed"] else nn.Identity()
        self.txt_in = nn.Linear(c["context_in_dim"], hidden, **kw)
        self.final_layer = LastLayer(hidden, c["out_channels"] * patch, **kw)
        outside = {k: v for k, v in checkpoint.plain_tensors() if not k.startswith(("double_blocks.", "single_blocks."))}
        if dtype == torch.float16 and any(t.abs().max() > LARGEST_FP16 for t in outside.values()):
            raise ValueError(f"{checkpoint.path} has values beyond float16's range in its 16-bit layers: compute in bfloat16 or float32")
        self.load_state_dict(outside)
        self.double_blocks, self.single_blocks = build_blocks(checkpoint, device=device, progress=progress)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        transformer_options: dict | None = None,
    ) -> Tensor:
        """Latent x [B, C, h, w] (h, w even), timestep and guidance [B], context [B, L, context_in_dim], y [B, vec_in_dim]

        -> velocity [B, out_channels, h, w].
        """
        b, _, h, w = x.shape
        p = self.config.get("patch_size", 2)
        img = F.pixel_unshuffle(x, p).flatten(2).transpose(1, 2)  # channel-major patches, as the host's rearrange
        rows, cols = torch.meshgrid(torch.arange(h // p, device=x.device), torch.arange(w // p, device=x.device), indexing="ij")
        img_ids = torch.stack((torch.zeros_like(rows), rows, cols), -1).flatten(0, 1).float().expand(b, -1, -1)
        ids = torch.cat((img_ids.new_zeros(b, context.shape[1], 3), img_ids), 1)
        pe = rope_table(ids, self.config["axes_dim"], self.config["theta"])
        vec = self.time_in(timestep_embedding(timestep).to(self.dtype)) + self.vector_in(y.to(self.dtype))
        if self.config["guidance_embed"] and guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance).to(self.dtype))
        img, txt = self.img_in(img.to(self.dtype)), self.txt_in(context.to(self.dtype))
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe, transformer_options=transformer_options)
        h_all = torch.cat((txt, finite(img)), 1)
        for block in self.single_blocks:
            h_all = block(h_all, vec=vec, pe=pe, transformer_options=transformer_options)
        out = self.final_layer(h_all[:, txt.shape[1] :], vec)
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (h // p, w // p)), p).to(x.dtype)
