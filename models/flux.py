"""FLUX.1's blocks over 4-bit linears, filled from a checkpoint, and a small standalone FLUX around them.

Structure and parameter names are the host's (black-forest-labs/flux, native names), so that its forward, LoRA key maps and patches fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import (
    Dims,
    JointBlock,
    Leaves,
    Mod,
    Norms,
    RMSNorm,
    Stream,
    check_cancel,
    compute_mode,
    finite,
    gated,
    heads_first,
    looked_into,
    modulated,
    modulation_values,
    modulations,
    norm_of,
    patched_attention,
    qk_normed_,
    recorded,
    residual_of,
    side_for,
    unpacked,
)
from .first_block_cache import cached
from .formats.checkpoint import FluxCheckpoint
from .linear import LARGEST_FP16, Ending, Linear, peak_between
from .runtime import Runtime


class Modulation(nn.Module):
    """vec [B, D] or [B, T, D] -> one (single block) or two (double block) Mods."""

    def __init__(self, lin: Linear):
        super().__init__()
        self.lin = lin

    def forward(self, vec: Tensor) -> tuple[Mod, Mod | None]:
        first, *second = modulations(self.lin, vec)
        return first, second[0] if second else None


class QKNorm(nn.Module):
    def __init__(self, query: RMSNorm, key: RMSNorm):
        super().__init__()
        self.query_norm, self.key_norm = query, key

    @property
    def pair(self) -> Norms:
        return self.query_norm, self.key_norm

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class SelfAttention(nn.Module):
    def __init__(self, qkv: Linear, norm: QKNorm, proj: Linear):
        super().__init__()
        self.qkv, self.norm, self.proj = qkv, norm, proj


class DoubleBlock(JointBlock):
    """Image and text streams with joint attention. Called as the host calls its own: see `forward`."""

    def __init__(self, leaf: Callable[[str], Linear], norm: Callable[[str], QKNorm], heads: int, runtime: Runtime):
        super().__init__(heads, runtime)
        for s in ("img", "txt"):
            self.add_module(f"{s}_mod", Modulation(leaf(f"{s}_mod.lin")))
            self.add_module(f"{s}_attn", SelfAttention(leaf(f"{s}_attn.qkv"), norm(f"{s}_attn.norm"), leaf(f"{s}_attn.proj")))
            self.add_module(f"{s}_mlp", nn.Sequential(leaf(f"{s}_mlp.0"), nn.GELU(approximate="tanh"), leaf(f"{s}_mlp.2")))
        self.hidden_size = self.img_attn.qkv.in_features

    def stream(self, side: str) -> Stream:
        if side == "img":
            mod, attn, mlp = self.img_mod, self.img_attn, self.img_mlp
        else:
            mod, attn, mlp = self.txt_mod, self.txt_attn, self.txt_mlp
        return Stream(mod.lin, attn.qkv, attn.norm.pair, attn.proj, mlp[0], mlp[2])

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
        options = transformer_options or {}

        def work() -> tuple[Tensor, Tensor]:
            return self.joint(img, txt, vec, pe, attn_mask, modulation_dims_img, modulation_dims_txt, options)

        return cached(self.position, (img, txt), options, work)


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
        options = transformer_options or {}
        return cached(self.position, (x,), options, lambda: (self._run(x, vec, pe, attn_mask, modulation_dims, options),))[0]

    def _run(self, x: Tensor, vec: Tensor, pe: Tensor, mask: Tensor | None, dims: Dims | None, options: dict) -> Tensor:
        check_cancel(self.runtime)
        compute = compute_mode(options, x.device)
        inner = 3 * self.hidden_size
        if not looked_into(vec, pe, mask, dims, options):

            def fused(x: Tensor, vec: Tensor, pe: Tensor, out: list[Tensor | None]) -> tuple[Tensor]:
                return (self._fused(x, vec, pe, compute, options, out[0]),)

            return recorded(self, compute, [x, vec, pe], 1, fused)[0]
        mod = self.modulation(vec)[0] if isinstance(vec, Tensor) else vec
        y = self.linear1(modulated(x, mod, dims), compute)
        qk_normed_(y[..., :inner], self.norm.pair, self.num_heads, None)
        q, k, v = heads_first(y[..., :inner], self.num_heads)
        attn = patched_attention(self.runtime, self.num_heads, q, k, v, pe, mask, options, options.get("img_slice"))
        h = torch.cat((attn, F.gelu(y[..., inner:], approximate="tanh")), 2)
        return finite(gated(x, self.linear2(h, compute), mod.gate, dims))

    def _fused(self, x: Tensor, vec: Tensor, pe: Tensor, compute: str, options: dict, out: Tensor | None) -> Tensor:
        inner, vec, gaps = 3 * self.hidden_size, F.silu(vec).unsqueeze(1), side_for(self.runtime, "gaps", x.device)
        with gaps:
            (first,) = unpacked(gaps, compute, x, self.linear1)
            peak = peak_between(self.linear1, self.linear2, inner, x.shape[:2].numel(), compute, x.device)
        shift, scale, gate = modulation_values(self.modulation.lin, vec, 0, 3)
        gaps.join()
        y = self.linear1.run(x, compute, norm=norm_of(x, shift, scale), ending=Ending(gelu_from=inner, peak=peak), weights=first)
        del first
        qk_normed_(y[..., :inner], self.norm.pair, self.num_heads, pe)
        with gaps:
            (second,) = unpacked(gaps, compute, x, self.linear2)
        attn = self.runtime.attend(*heads_first(y[..., :inner], self.num_heads), self.num_heads, None, options)
        gaps.join()
        parts = [attn, y[..., inner:]]
        del y, attn  # linear2 empties the list: at full size these two are most of the step's memory
        return finite(self.linear2.run(parts, compute, ending=residual_of(x, gate), out=out, peak=peak, weights=second))


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
    """All double and single blocks of the checkpoint. norm_param: name of the q/k norms' parameter; the rest and errors as `Leaves`."""
    leaves = Leaves(checkpoint, device, runtime, target, progress)

    def qk_norm(name: str) -> QKNorm:
        return QKNorm(*(leaves.norm(f"{name}.{k}_norm.scale", norm_param) for k in ("query", "key")))

    def stack(kind: type, prefix: str, depth: int) -> nn.ModuleList:
        heads = checkpoint.config["num_heads"]
        return nn.ModuleList(
            [
                kind(lambda n, i=i: leaves.linear(f"{prefix}.{i}.{n}"), lambda n, i=i: qk_norm(f"{prefix}.{i}.{n}"), heads, leaves.runtime)
                for i in range(depth)
            ]
        )

    with torch.inference_mode(False), torch.no_grad():
        doubles = stack(DoubleBlock, "double_blocks", checkpoint.config["depth"])
        singles = stack(SingleBlock, "single_blocks", checkpoint.config["depth_single_blocks"])
    for position, block in enumerate((*doubles, *singles)):
        block.position = position
    return doubles, singles


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
        outside = checkpoint.outside_blocks()
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
