"""Z-Image's blocks over 4-bit linears, filled from a checkpoint: the host's NextDiT block with qkv, norms and RoPE, and the SwiGLU, fused.

    m = RMSNorm(x; w1) * (1 + scale)    y = out(attention(qkv(m)))    x = x + tanh(gate) * RMSNorm(y; w2)
and the same with the feed-forward for attention. A block of the context refiner has no modulation: scale 0, and 1 for tanh(gate).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..kernels.norm_gate import norm_gate
from ..kernels.norm_modulate import Norm
from .blocks import (
    Dims,
    Leaves,
    RMSNorm,
    check_cancel,
    compute_mode,
    finite,
    heads_first,
    looked_into,
    patched_attention,
    qk_normed_,
    recorded,
    side_for,
    stand_in,
    unpacked,
)
from .first_block_cache import cached
from .formats.packed import PackedCheckpoint
from .linear import Ending, Linear, apply_ending, normalised, peak_between
from .runtime import Runtime

NORM_EPS = 1e-5  # of the norms over a token
HEAD_EPS = torch.finfo(torch.float32).eps  # of those over a head: the host leaves it to torch
NOT_CACHED = -1  # position of a refiner's block
Slices = list[tuple[int, int]]  # (first token, end token) of the references' and texts' tokens


class Attention(nn.Module):
    def __init__(self, qkv: Linear, out: Linear, q_norm: RMSNorm, k_norm: RMSNorm):
        super().__init__()
        self.qkv, self.out, self.q_norm, self.k_norm = qkv, out, q_norm, k_norm


class SwiGLU(nn.Module):
    """The stacked w3 (values) and w1 (gates); what follows the linear is done inside it."""

    def __init__(self, proj: Linear):
        super().__init__()
        self.proj = proj


class FeedForward(nn.Module):
    def __init__(self, proj: Linear, w2: Linear):
        super().__init__()
        self.net = nn.ModuleList([SwiGLU(proj)])
        self.w2 = w2
        stand_in(self, proj)


class ZImageBlock(nn.Module):
    """One stream of text and image tokens. Called as the host calls its own: see `forward`."""

    position = NOT_CACHED  # among the main blocks

    def __init__(self, leaves: Leaves, name: str, heads: int, modulation: bool):
        super().__init__()
        self.num_heads, self.runtime, self.modulation = heads, leaves.runtime, modulation
        q_norm, k_norm = (leaves.norm(f"{name}.attention.{q}_norm.weight", eps=HEAD_EPS) for q in ("q", "k"))
        self.attention = Attention(leaves.linear(f"{name}.attention.qkv"), leaves.linear(f"{name}.attention.out"), q_norm, k_norm)
        proj = leaves.linear(f"{name}.feed_forward.net.0.proj", paired=True)
        self.feed_forward = FeedForward(proj, leaves.linear(f"{name}.feed_forward.w2"))
        for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            self.add_module(norm, leaves.norm(f"{name}.{norm}.weight", eps=NORM_EPS))
        if modulation:
            self.adaLN_modulation = nn.Sequential(leaves.unpacked(f"{name}.adaLN_modulation.0"))
        self.dim = self.attention.qkv.in_features

    def forward(
        self,
        x: Tensor,
        x_mask: Tensor | None,
        freqs_cis: Tensor,
        adaln_input: Tensor | None = None,
        timestep_zero_index: Slices | None = None,
        transformer_options: dict | None = None,
        **unknown: object,
    ) -> Tensor:
        """x [B, L, D], x_mask as attention takes it, freqs_cis [B|1, L, 1, d/2, 2, 2] -> [B, L, D].

        adaln_input: [B, 256], or with timestep_zero_index [2B, 256], of which the second half modulates the tokens of those slices. None in
        the context refiner. Unknown keywords are ignored.
        """
        options = transformer_options or {}
        times, dims = adaln_input, None
        if timestep_zero_index is not None and times is not None:
            times, dims = torch.stack(times.chunk(2, dim=0), 1), dims_of(timestep_zero_index, x.shape[1])
        return cached(self.position, (x,), options, lambda: (self._run(x, times, freqs_cis, x_mask, dims, options),))[0]

    def _run(self, x: Tensor, times: Tensor | None, freqs_cis: Tensor, mask: Tensor | None, dims: Dims | None, options: dict) -> Tensor:
        check_cancel(self.runtime)
        compute = compute_mode(options, x.device)
        times = x[:, 0] if times is None else times  # never read
        if not looked_into(times, freqs_cis, mask, dims, options):

            def fused(x: Tensor, times: Tensor, freqs_cis: Tensor, out: list[Tensor | None]) -> tuple[Tensor]:
                return (self._fused(x, times, freqs_cis.transpose(1, 2), compute, options, out[0]),)

            return recorded(self, compute, [x, times, freqs_cis], 1, fused)[0]  # that very tensor: it is copied once a step
        return self._plain(x, times, freqs_cis.transpose(1, 2), mask, dims, compute, options)

    def _factors(self, times: Tensor) -> Tensor:
        """fp32 [B, T, 4, D]: what multiplies the normed input and result of attention, then of the feed-forward."""
        norms = self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2
        weights = torch.stack([norm.scale_on(times.device).float() for norm in norms])
        if not self.modulation:
            return weights[None, None]
        times = times if times.ndim == 3 else times.unsqueeze(1)
        scale1, gate1, scale2, gate2 = self.adaLN_modulation[0](times).float().chunk(4, -1)
        return torch.stack((1 + scale1, gate1.tanh(), 1 + scale2, gate2.tanh()), 2) * weights

    def _plain(self, x: Tensor, times: Tensor, pe: Tensor, mask: Tensor | None, dims: Dims | None, compute: str, options: dict) -> Tensor:
        a, ff, factors = self.attention, self.feed_forward, self._factors(times)
        in1, out1, in2, out2 = factors.unbind(2)
        qkv = qk_normed_(a.qkv(by_token(x, in1, dims, rms_normed), compute), (a.q_norm, a.k_norm), self.num_heads, None)
        attn = patched_attention(self.runtime, self.num_heads, *heads_first(qkv, self.num_heads), pe, mask, options, None)
        x = by_token(x, out1, dims, gated(finite(a.out(attn, compute))))
        h = apply_ending(ff.net[0].proj(by_token(x, in2, dims, rms_normed), compute), Ending(swiglu=True))
        return by_token(x, out2, dims, gated(finite(ff.w2(h, compute))))

    def _fused(self, x: Tensor, times: Tensor, pe: Tensor, compute: str, options: dict, out: Tensor | None) -> Tensor:
        a, ff, rows = self.attention, self.feed_forward, x.shape[:2].numel()
        gaps = side_for(self.runtime, "gaps", x.device)
        with gaps:
            (first,) = unpacked(gaps, compute, x, a.qkv)
            peak = peak_between(ff.net[0].proj, ff.w2, 0, rows, compute, x.device)
        in1, out1, in2, out2 = self._factors(times)[:, 0].unbind(1)
        gaps.join()
        qkv = a.qkv.run(x, compute, norm=rms_of(x, in1), weights=first)
        del first
        qk_normed_(qkv, (a.q_norm, a.k_norm), self.num_heads, pe)
        with gaps:
            out_weights, proj_weights, w2_weights = unpacked(gaps, compute, x, a.out, ff.net[0].proj, ff.w2)
        attn = self.runtime.attend(*heads_first(qkv, self.num_heads), self.num_heads, None, options)
        gaps.join()
        x = gate_of(x, finite(a.out.run(attn, compute, weights=out_weights)), out1)
        h = ff.net[0].proj.run(x, compute, norm=rms_of(x, in2), ending=Ending(swiglu=True, peak=peak), weights=proj_weights)
        return gate_of(x, finite(ff.w2.run(h, compute, peak=peak, weights=w2_weights)), out2, out)


def rms_of(x: Tensor, factor: Tensor) -> Norm:
    """RMSNorm of x [B, L, D] before a linear, times factor [B|1, D]."""
    return Norm(None, factor.expand(x.shape[0], -1), max(x.shape[1], 1), NORM_EPS, rms=True)


def gate_of(x: Tensor, y: Tensor, gate: Tensor, out: Tensor | None = None) -> Tensor:
    """x + gate * RMSNorm(y), rounded once. x, y [B, L, D], gate [B|1, D]."""
    rows, length = x.shape[:2].numel(), max(x.shape[1], 1)
    gate = gate.expand(x.shape[0], -1)
    flat = x.reshape(rows, -1), y.reshape(rows, -1)
    if torch.compiler.is_compiling():
        from . import ops

        made = ops.norm_gate(*flat, gate, length, NORM_EPS)
    else:
        made = norm_gate(*flat, gate, length, NORM_EPS, None if out is None else out.view(rows, -1))
    return made.view(x.shape)


def rms_normed(x: Tensor, factor: Tensor, tokens: slice) -> Tensor:
    return normalised(x[:, tokens], rms_of(x[:, tokens], factor))


def gated(y: Tensor) -> Callable[[Tensor, Tensor, slice], Tensor]:
    return lambda x, gate, tokens: gate_of(x[:, tokens], y[:, tokens], gate)


def by_token(x: Tensor, factors: Tensor, dims: Dims | None, work: Callable[[Tensor, Tensor, slice], Tensor]) -> Tensor:
    """work(x, factor [B|1, D], tokens) on all tokens, or on every slice of them with its row of factors [B|1, T, D]."""
    if dims is None:
        return work(x, factors[:, 0], slice(None))
    return torch.cat([work(x, factors[:, row], slice(start, end)) for start, end, row in dims], 1)


def dims_of(slices: Slices, length: int) -> Dims:
    """Row 1 for the tokens of the slices, row 0 for all others, in the tokens' order."""
    found, at = [], 0
    for start, end in sorted(slices):
        found += [(at, start, 0)] if at < start else []
        found += [(max(at, start), end, 1)] if max(at, start) < end else []
        at = max(at, end)
    return found + ([(at, length, 0)] if at < length else [])


def build_blocks(
    checkpoint: PackedCheckpoint,
    *,
    device: torch.device | str = "cpu",
    runtime: Runtime | None = None,
    target: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[int, ZImageBlock]]:
    """Stack -> index -> block, of the blocks that have a linear in 4 bit: files may leave the refiners in 16 bit, and those blocks are the
    host's own. Arguments and errors as `Leaves`."""
    leaves = Leaves(checkpoint, device, runtime, target, progress)
    heads, blocks = checkpoint.config["n_heads"], {}
    packed = {tuple(host.name.split(".")[:2]) for host in checkpoint.host_linears() if host.kind != "plain"}
    with torch.inference_mode(False), torch.no_grad():
        for stack, name in checkpoint.dims.blocks():
            name = name.removesuffix(".")
            index = name.rpartition(".")[2]
            if (stack, index) not in packed:
                continue
            i = int(index)
            block = blocks.setdefault(stack, {})[i] = ZImageBlock(leaves, name, heads, stack != "context_refiner")
            if stack == "layers":
                block.position = i
    return blocks
