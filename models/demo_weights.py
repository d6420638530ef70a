"""A small FLUX-shaped network with random weights, and what to sample it with: the demo's material.

Random, but not white: the pixels of a patch are treated alike and the start is smooth noise, so that the result looks like something.
Nothing is trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .formats.flux_names import host_linears, plain_specs
from .formats.writer import dims_of, write_flux

RANK = 32
CONFIG = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 64,
    "context_in_dim": 96,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 4,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
}


@dataclass(frozen=True)
class Inputs:
    """What every run of the demo samples from: noise [1, 16, h, w], context [1, L, C], pooled [1, V], all fp32."""

    noise: Tensor
    context: Tensor
    pooled: Tensor


def inputs(size: int, seed: int = 7) -> Inputs:
    """Noise with as much in every octave down to single latent pixels, of variance 1."""
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    noise = torch.zeros(1, 16, size, size)
    for cells in (2, 4, 8, 16):
        noise += F.interpolate(randn(1, 16, cells, cells), size=(size, size), mode="bicubic", align_corners=True) / math.sqrt(cells)
    noise = (noise - noise.mean((2, 3), keepdim=True)) / noise.std((2, 3), keepdim=True)
    return Inputs(noise, randn(1, 32, CONFIG["context_in_dim"]), randn(1, CONFIG["vec_in_dim"]))


def random_state_dict(seed: int = 1) -> dict[str, Tensor]:
    """fp32 tensors of CONFIG's network, by native names."""
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    dims, state = dims_of(CONFIG), {}
    for linear in host_linears(dims):
        gain = 0.4 if linear.kind == "w4a16" else 1.5
        state[f"{linear.name}.weight"] = randn(linear.out_features, linear.in_features) * gain * linear.in_features**-0.5
        state[f"{linear.name}.bias"] = randn(linear.out_features) * 0.05
        if linear.kind == "w4a16":  # shift, scale, gate, perhaps twice: gates of one half, so that every block counts
            state[f"{linear.name}.bias"].view(-1, 3, dims.hidden)[:, 2] += 1.5
    for name, _, shape in plain_specs(dims):
        if name.endswith("_norm.scale"):
            state[name] = 1 + 0.1 * randn(*shape)
        else:
            state[name] = randn(*shape) * (shape[1] ** -0.5 if len(shape) == 2 else 0.05)
    # Gains are such that rounding activations shows about as it does in a trained model of this format.
    columns = state["img_in.weight"].unflatten(1, (-1, 4))  # channel, then the 2 x 2 pixels of a patch
    state["img_in.weight"] = columns.mean(2, keepdim=True).expand(-1, -1, 4).flatten(1) * 2
    rows = state["final_layer.linear.weight"].unflatten(0, (-1, 4))
    state["final_layer.linear.weight"] = rows.mean(1, keepdim=True).expand(-1, 4, -1).flatten(0, 1) * 4
    state["final_layer.linear.bias"] = state["final_layer.linear.bias"].unflatten(0, (-1, 4)).mean(1, keepdim=True).expand(-1, 4).flatten()
    return state


def write_checkpoint(path: Path, progress=None) -> None:
    """The network, quantised to INT4 and written as a published single-file checkpoint. progress(done, total) counts layers."""
    write_flux(path, random_state_dict(), CONFIG, rank=RANK, precision="int4", progress=progress)
