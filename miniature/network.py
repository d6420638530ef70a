"""The trainable miniature: models/flux.py's Flux in plain dense modules, same parameter names and arithmetic, and the captions' tables.

FLUX.1 (black-forest-labs/flux): double blocks with joint attention, then single blocks; rectified flow, velocity = noise - latent.
"""

from __future__ import annotations

import math

import torch
from scenes import CAPTION, SIZE, VOCABULARY
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6
CONFIG = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 64,
    "context_in_dim": 128,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 6,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
}
LATENT = SIZE // 8


class Captions(nn.Module):
    """Word ids [B, 16] -> context [B, 16, C], a vector per word and one per place in the caption, and pooled [B, V], the words' mean."""

    def __init__(self, config: dict = CONFIG):
        super().__init__()
        self.words = nn.Parameter(torch.randn(len(VOCABULARY), config["context_in_dim"]))
        self.places = nn.Parameter(torch.randn(CAPTION, config["context_in_dim"]))
        self.pooled = nn.Parameter(torch.randn(len(VOCABULARY), config["vec_in_dim"]))

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        return self.words[words] + self.places, self.pooled[words].mean(1)


class Modulation(nn.Module):
    def __init__(self, hidden: int, mods: int):
        super().__init__()
        self.mods, self.lin = mods, nn.Linear(hidden, 3 * mods * hidden)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """vec [B, D] -> shift, scale, gate (twice in double blocks), each [B, 1, D]."""
        return self.lin(F.silu(vec)).unsqueeze(1).chunk(3 * self.mods, -1)


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.scale


class QKNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(dim), RMSNorm(dim)


class SelfAttention(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.qkv, self.norm, self.proj = nn.Linear(hidden, 3 * hidden), QKNorm(hidden // heads), nn.Linear(hidden, hidden)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=EPS) * (1 + scale) + shift


def heads_of(qkv: Tensor, heads: int, norm: QKNorm) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, L, 3 * H * D] -> q and k normed, v; each [B, H, L, D]."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return norm.query_norm(q), norm.key_norm(k), v


def turned(x: Tensor, pe: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, L, D] by pe [2, L, D / 2] (cosines, sines) on neighbouring pairs."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((pe[0] * even - pe[1] * odd, pe[0] * odd + pe[1] * even), -1).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(turned(q, pe).to(v.dtype), turned(k, pe).to(v.dtype), v)
    return out.transpose(1, 2).flatten(2)


class DoubleBlock(nn.Module):
    def __init__(self, hidden: int, heads: int, mlp: int):
        super().__init__()
        self.heads = heads
        for s in ("img", "txt"):
            self.add_module(f"{s}_mod", Modulation(hidden, 2))
            self.add_module(f"{s}_attn", SelfAttention(hidden, heads))
            self.add_module(f"{s}_mlp", nn.Sequential(nn.Linear(hidden, mlp), nn.GELU(approximate="tanh"), nn.Linear(mlp, hidden)))

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        img_mods, txt_mods = self.img_mod(vec), self.txt_mod(vec)
        parts = []
        for attn, x, mods in ((self.txt_attn, txt, txt_mods), (self.img_attn, img, img_mods)):
            parts.append(heads_of(attn.qkv(modulated(x, *mods[:2])), self.heads, attn.norm))
        joint = attend(*(torch.cat(t, 2) for t in zip(*parts, strict=True)), pe)
        n = txt.shape[1]
        img = self._finish(img, joint[:, n:], img_mods, self.img_attn, self.img_mlp)
        return img, self._finish(txt, joint[:, :n], txt_mods, self.txt_attn, self.txt_mlp)

    def _finish(self, x: Tensor, joint: Tensor, mods: tuple[Tensor, ...], attn: SelfAttention, mlp: nn.Module) -> Tensor:
        x = x + mods[2] * attn.proj(joint)
        return x + mods[5] * mlp(modulated(x, *mods[3:5]))


class SingleBlock(nn.Module):
    def __init__(self, hidden: int, heads: int, mlp: int):
        super().__init__()
        self.heads, self.split = heads, (3 * hidden, mlp)
        self.linear1, self.linear2 = nn.Linear(hidden, 3 * hidden + mlp), nn.Linear(hidden + mlp, hidden)
        self.norm, self.modulation = QKNorm(hidden // heads), Modulation(hidden, 1)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv, h = self.linear1(modulated(x, shift, scale)).split(self.split, -1)
        attn = attend(*heads_of(qkv, self.heads, self.norm), pe)
        return x + gate * self.linear2(torch.cat((attn, F.gelu(h, approximate="tanh")), -1))


class Embedder(nn.Module):
    def __init__(self, in_dim: int, hidden: int):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(in_dim, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class LastLayer(nn.Module):
    def __init__(self, hidden: int, out: int):
        super().__init__()
        self.linear = nn.Linear(hidden, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        return self.linear(modulated(x, *self.adaLN_modulation(vec).unsqueeze(1).chunk(2, -1)))


class Network(nn.Module):
    """The miniature FLUX for latents [B, 16, 16, 16]."""

    def __init__(self, config: dict = CONFIG):
        super().__init__()
        hidden, heads = config["hidden_size"], config["num_heads"]
        mlp, patch = int(hidden * config["mlp_ratio"]), config["patch_size"] ** 2
        self.img_in = nn.Linear(config["in_channels"] * patch, hidden)
        self.time_in, self.vector_in = Embedder(256, hidden), Embedder(config["vec_in_dim"], hidden)
        self.txt_in = nn.Linear(config["context_in_dim"], hidden)
        self.double_blocks = nn.ModuleList([DoubleBlock(hidden, heads, mlp) for _ in range(config["depth"])])
        self.single_blocks = nn.ModuleList([SingleBlock(hidden, heads, mlp) for _ in range(config["depth_single_blocks"])])
        self.final_layer = LastLayer(hidden, config["out_channels"] * patch)
        self.register_buffer("pe", positions(LATENT // 2, config), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Blocks begin as the identity and the velocity as zero (DiT, arXiv 2212.09748)."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for m in (*(m.lin for m in self.modules() if isinstance(m, Modulation)), self.final_layer.linear):
            nn.init.zeros_(m.weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, y: Tensor) -> Tensor:
        """Latent x [B, 16, 16, 16], timestep [B] in 0..1, context [B, 16, C], y [B, V] -> velocity, of x's shape and type."""
        img = self.img_in(F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)).float()
        txt = self.txt_in(context).float()
        vec = self.time_in(timestep_embedding(timestep)) + self.vector_in(y)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, self.pe)
        h = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            h = block(h, vec, self.pe)
        out = self.final_layer(h[:, txt.shape[1] :], vec)
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (LATENT // 2, LATENT // 2)), 2).to(x.dtype)


def timestep_embedding(t: Tensor, dim: int = 256) -> Tensor:
    """[B] -> [B, dim]: cosines, then sines, of 1000 t at frequencies from 1 down to 1 / 10000."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    angles = 1000 * t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)


def positions(side: int, config: dict) -> Tensor:
    """Cosines and sines [2, 16 + side * side, D / 2] of the rotary embedding: words at the origin, then the patches row by row."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.stack((torch.zeros_like(rows), rows, columns), -1).flatten(0, 1)
    ids = torch.cat((torch.zeros(CAPTION, 3, dtype=ids.dtype), ids)).double()
    angles = []
    for i, dim in enumerate(config["axes_dim"]):
        angles.append(ids[:, i, None] * config["theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim))
    angle = torch.cat(angles, -1)
    return torch.stack((angle.cos(), angle.sin())).float()


@torch.no_grad()
def sample(network: nn.Module, context: Tensor, pooled: Tensor, generator: torch.Generator, steps: int = 20) -> Tensor:
    """Latents fp32 [B, 16, 16, 16] by Euler steps of equal size from noise."""
    x = torch.randn(context.shape[0], 16, LATENT, LATENT, generator=generator, device=context.device)
    for i in range(steps):
        t = torch.full((x.shape[0],), 1 - i / steps, device=x.device)
        x = x - network(x, t, context, pooled).float() / steps
    return x
