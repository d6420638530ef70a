"""Small dense FLUX models and the files that hold one, written from the names that black-forest-labs and diffusers publish."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 64, "context_in_dim": 128,
    "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 2, "qkv_bias": True, "guidance_embed": True,
    "axes_dim": [16, 56, 56], "theta": 10000,
}  # fmt: skip
H, M, D = 256, 1024, 128
STREAM = {"attn.qkv": (3 * H, H), "attn.proj": (H, H), "mlp.0": (M, H), "mlp.2": (H, M), "mod.lin": (6 * H, H)}
SINGLE = {"linear1": (3 * H + M, H), "linear2": (H, H + M), "modulation.lin": (3 * H, H)}
OUTSIDE = {
    "img_in": (H, 64), "txt_in": (H, 128), "time_in.in_layer": (H, 256), "time_in.out_layer": (H, H), "vector_in.in_layer": (H, 64),
    "vector_in.out_layer": (H, H), "guidance_in.in_layer": (H, 256), "guidance_in.out_layer": (H, H), "final_layer.linear": (64, H),
    "final_layer.adaLN_modulation.1": (2 * H, H),
}  # fmt: skip


def block_linears(depth: int = 1, single: int = 2) -> dict[str, tuple[int, int]]:
    """Native name -> shape of every linear in a block."""
    found = {f"double_blocks.{i}.{s}_{name}": shape for i in range(depth) for s in ("img", "txt") for name, shape in STREAM.items()}
    return found | {f"single_blocks.{i}.{name}": shape for i in range(single) for name, shape in SINGLE.items()}


def dense_state(dtype: torch.dtype = torch.bfloat16, depth: int = 1, single: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors by native names, of gains that keep a network alive. A few input channels have larger weights, and modulation makes a
    few others large, as trained models have them."""
    gen = torch.Generator().manual_seed(seed)
    state = {}
    for name, (n, k) in (block_linears(depth, single) | OUTSIDE).items():
        weight = torch.randn(n, k, generator=gen) * k**-0.5
        weight[:, ::61] *= 4
        state[f"{name}.weight"], state[f"{name}.bias"] = weight, torch.randn(n, generator=gen) * 0.1
        if name.endswith(".lin"):
            state[f"{name}.bias"].view(-1, 3, H)[:, 1, 5::83] += 8  # shift, scale, gate, perhaps twice
    norms = [f"double_blocks.{i}.{s}_attn.norm" for i in range(depth) for s in ("img", "txt")]
    for name in norms + [f"single_blocks.{i}.norm" for i in range(single)]:
        for which in ("query", "key"):
            state[f"{name}.{which}_norm.scale"] = 1 + 0.1 * torch.randn(D, generator=gen)
    return {name: t.to(dtype) for name, t in state.items()}


def in_diffusers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same model as diffusers names and cuts it."""
    out = {}
    for name, t in state.items():
        stem, _, kind = name.rpartition(".")
        for theirs, part in _diffusers(stem, t):
            out[f"{theirs}.{'weight' if kind == 'scale' else kind}"] = part.contiguous()
    return out


def _diffusers(stem: str, t: Tensor) -> list[tuple[str, Tensor]]:
    outside = {
        "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1", "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1", "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    }  # fmt: skip
    if stem in outside:
        return [(outside[stem], t)]
    if stem == "final_layer.adaLN_modulation.1":
        shift, scale = t.chunk(2)
        return [("norm_out.linear", torch.cat((scale, shift)))]
    stack, index, rest = stem.split(".", 2)
    block = f"{'single_' if stack == 'single_blocks' else ''}transformer_blocks.{index}."
    if stack == "single_blocks":
        if rest == "linear1":
            names, rows = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), (H, H, H, M)
            return [(block + name, part) for name, part in zip(names, t.split(rows), strict=True)]
        simple = {"linear2": "proj_out", "modulation.lin": "norm.linear", "norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
        return [(block + simple[rest], t)]
    text = rest.startswith("txt")
    if rest.endswith("attn.qkv"):
        names = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj") if text else ("attn.to_q", "attn.to_k", "attn.to_v")
        return [(block + name, part) for name, part in zip(names, t.chunk(3), strict=True)]
    simple = {
        "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear", "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out", "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2", "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2", "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k",
    }  # fmt: skip
    return [(block + simple[rest], t)]


def write_dense(folder: Path, state: dict[str, Tensor] | None = None, name: str = "dense", metadata: dict[str, str] | None = None) -> Path:
    path = folder / f"{name}.safetensors"
    save_file(dense_state() if state is None else state, path, metadata)
    return path
