"""Help for the tests of Qwen-Image and Z-Image files: miniatures in the key layout of the published files, with random layers.

The key tables here are written out by hand, after listings of published files, and share nothing with the readers'.
"""

import json

import torch
from safetensors.torch import save_file
from tonfa.kernels.layout import LogicalLinear
from tonfa.models.formats.writer import pack_layer

V2_SUFFIX = {"lora_down": "proj_down", "lora_up": "proj_up", "smooth": "smooth_factor", "smooth_orig": "smooth_factor_orig"}
HIDDEN, HEAD, CONTEXT = 256, 128, 64
QWEN_MLP, Z_MLP = 1024, 768
QWEN_LAYERS = {  # layer of a block: outputs, inputs
    "attn.to_qkv": (768, 256), "attn.add_qkv_proj": (768, 256), "attn.to_out.0": (256, 256), "attn.to_add_out": (256, 256),
    "img_mlp.net.0.proj": (1024, 256), "txt_mlp.net.0.proj": (1024, 256), "img_mlp.net.2": (256, 1024), "txt_mlp.net.2": (256, 1024),
}  # fmt: skip
QWEN_MODULATION = ("img_mod.1", "txt_mod.1")
Z_LAYERS = {
    "attention.to_qkv": (768, 256), "attention.to_out.0": (256, 256), "feed_forward.net.0.proj": (1536, 256),
    "feed_forward.net.2": (256, 768),
}  # fmt: skip


def w4a4(n, k, precision, rank, gen, bias=True, unsigned=False, several=False, dtype=torch.bfloat16):
    """A random W4A4 layer. several: NVFP4 with three top scales by rows, as q, k and v have."""

    def rand(*shape):
        return (torch.rand(shape, generator=gen) + 0.5).to(dtype)

    groups = k // (64 if precision == "int4" else 16)
    scales = rand(n, groups)
    top = None
    if precision == "nvfp4":
        scales = scales.float().to(torch.float8_e4m3fn)
        top = torch.tensor([0.5, 0.25, 0.75] if several else [0.5] * 3).repeat_interleave(-(-n // 3))[:n]
    return LogicalLinear(
        precision=precision, codes=torch.randint(0, 16, (n, k), generator=gen, dtype=torch.uint8), scales=scales, smooth=rand(k),
        down=rand(rank, k), up=rand(n, rank), channel_scale=top, bias=rand(n) if bias else None, act_unsigned=unsigned,
    )  # fmt: skip


def w4a16(n, k, gen, dtype=torch.bfloat16):
    """A random modulation layer in native rows, its biases such that a 16-bit file holds them with 1 added."""
    scales = (torch.rand(n, k // 64, generator=gen) + 0.5).to(dtype)
    return LogicalLinear(
        precision="w4a16", codes=torch.randint(0, 16, (n, k), generator=gen, dtype=torch.uint8), scales=scales, zeros=-7 * scales,
        bias=torch.randint(-32, 32, (n,), generator=gen) / 64,
    )  # fmt: skip


def packed(prefix, layer, chunks=0):
    """The layer's tensors under their names in a published file."""
    out = {f"{prefix}.{V2_SUFFIX.get(suffix, suffix)}": t for suffix, t in pack_layer(layer, chunks).items()}
    if layer.bias is None:
        del out[f"{prefix}.bias"]
    return out


def metadata(model_class, config, precision, rank):
    int4 = {"dtype": "int4", "scale_dtype": None, "group_size": 64}
    fp4 = {"dtype": "fp4_e2m1_all", "scale_dtype": "fp8_e4m3_nan", "group_size": 16}
    kind = int4 if precision == "int4" else fp4
    quantization = {"method": "svdquant", "weight": kind, "activation": kind, "rank": rank}
    return {"model_class": model_class, "config": json.dumps(config), "quantization_config": json.dumps(quantization)}


def qwen(precision="int4", rank=32, depth=2, modulation="w4a16", dtype=torch.bfloat16, seed=0):
    """(tensors, metadata, prefix -> layer) of a Qwen-Image. modulation: "w4a16", "w4a4" or "plain"."""
    gen, layers, tensors = torch.Generator().manual_seed(seed), {}, {}
    for i in range(depth):
        block = f"transformer_blocks.{i}."
        for name, (n, k) in QWEN_LAYERS.items():
            unsigned = name.endswith("net.2") and precision == "int4"
            layers[block + name] = w4a4(n, k, precision, rank, gen, unsigned=unsigned, several="qkv" in name, dtype=dtype)
        for name in QWEN_MODULATION:
            if modulation == "w4a16":
                layers[block + name] = w4a16(6 * HIDDEN, HIDDEN, gen, dtype)
            elif modulation == "w4a4":
                layers[block + name] = w4a4(6 * HIDDEN, HIDDEN, precision, rank, gen, dtype=dtype)
            else:
                tensors |= plain(block + name, 6 * HIDDEN, HIDDEN, gen, dtype)
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            tensors[f"{block}attn.{norm}.weight"] = torch.randn(HEAD, generator=gen).to(dtype)
    for prefix, layer in layers.items():
        tensors |= packed(prefix, layer, 6 if layer.precision == "w4a16" else 0)
    for name, n, k in (
        ("img_in", HIDDEN, 64), ("txt_in", HIDDEN, CONTEXT), ("time_text_embed.timestep_embedder.linear_1", HIDDEN, 256),
        ("time_text_embed.timestep_embedder.linear_2", HIDDEN, HIDDEN), ("norm_out.linear", 2 * HIDDEN, HIDDEN), ("proj_out", 64, HIDDEN),
    ):  # fmt: skip
        tensors |= plain(name, n, k, gen, dtype)
    tensors["txt_norm.weight"] = torch.randn(CONTEXT, generator=gen).to(dtype)
    config = {
        "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": depth, "attention_head_dim": HEAD, "num_attention_heads": 2,
        "joint_attention_dim": CONTEXT, "axes_dims_rope": [16, 56, 56], "guidance_embeds": False,
    }  # fmt: skip
    return tensors, metadata("NunchakuQwenImageTransformer2DModel", config, precision, rank), layers


def zimage(precision="int4", rank=32, depth=2, refiners=1, skip_refiners=False, dtype=torch.bfloat16, seed=0):
    """(tensors, metadata, prefix -> layer) of a Z-Image. skip_refiners: their linears in 16 bit, q, k and v apart, as diffusers has them,
    the SwiGLU's two as one."""
    gen, layers, tensors = torch.Generator().manual_seed(seed), {}, {}
    blocks = [f"{stack}.{i}." for stack in ("noise_refiner", "context_refiner") for i in range(refiners)]
    for block in blocks + [f"layers.{i}." for i in range(depth)]:
        whole = skip_refiners and not block.startswith("layers")
        for name, (n, k) in Z_LAYERS.items():
            if not whole:
                layers[block + name] = w4a4(n, k, precision, rank, gen, bias=False, several="qkv" in name, dtype=dtype)
            elif name == "attention.to_qkv":
                for q in ("to_q", "to_k", "to_v"):
                    tensors |= plain(f"{block}attention.{q}", HIDDEN, HIDDEN, gen, dtype, bias=False)
            else:
                tensors |= plain(block + name, n, k, gen, dtype, bias=False)
        for norm, n in (
            ("attention.norm_q", HEAD), ("attention.norm_k", HEAD), ("attention_norm1", HIDDEN), ("attention_norm2", HIDDEN),
            ("ffn_norm1", HIDDEN), ("ffn_norm2", HIDDEN),
        ):  # fmt: skip
            tensors[f"{block}{norm}.weight"] = torch.randn(n, generator=gen).to(dtype)
        if not block.startswith("context"):
            tensors |= plain(f"{block}adaLN_modulation.0", 4 * HIDDEN, 256, gen, dtype)
    for prefix, layer in layers.items():
        tensors |= packed(prefix, layer)
    for name, n, k in (
        ("all_x_embedder.2-1", HIDDEN, 64), ("all_final_layer.2-1.linear", 64, HIDDEN),
        ("all_final_layer.2-1.adaLN_modulation.1", HIDDEN, 256), ("t_embedder.mlp.0", HIDDEN, 256), ("t_embedder.mlp.2", 256, HIDDEN),
        ("cap_embedder.1", HIDDEN, CONTEXT),
    ):  # fmt: skip
        tensors |= plain(name, n, k, gen, dtype)
    tensors["cap_embedder.0.weight"] = torch.randn(CONTEXT, generator=gen).to(dtype)
    for token in ("x_pad_token", "cap_pad_token"):
        tensors[token] = torch.randn(1, HIDDEN, generator=gen).to(dtype)
    config = {
        "all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16, "dim": HIDDEN, "n_layers": depth, "n_refiner_layers": refiners,
        "n_heads": 2, "n_kv_heads": 2, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": CONTEXT, "rope_theta": 256.0, "t_scale": 1000.0,
        "axes_dims": [32, 48, 48], "axes_lens": [1024, 512, 512],
    }  # fmt: skip
    return tensors, metadata("NunchakuZImageTransformer2DModel", config, precision, rank), layers


def plain(name, n, k, gen, dtype, bias=True):
    out = {f"{name}.weight": torch.randn(n, k, generator=gen).to(dtype)}
    return out | ({f"{name}.bias": torch.randn(n, generator=gen).to(dtype)} if bias else {})


def save(path, tensors, meta=None):
    save_file({key: t.contiguous().clone() for key, t in tensors.items()}, str(path), meta)  # packed layers share tensors
    return path
