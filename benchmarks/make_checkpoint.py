"""Writes a full-size checkpoint of random codes in the published Nunchaku single-file layout, of FLUX.1, Qwen-Image or Z-Image Turbo.

    python benchmarks/make_checkpoint.py flux|qwen-image|z-image OUT.safetensors [--precision int4|nvfp4] [--rank 32] [--depth N]
        [--single-depth 38] [--schnell]     (flux: 6.8 GB for INT4 rank 32)
        [--skip-refiners]                   (z-image: those in 16 bit, 4.6 GB; else 3.6. qwen-image: 11.5 GB)

The sizes, names, types and metadata are a real file's, the numbers are random but tame (weights of about 0.02, like a trained model's), so
that time, memory, power and kernels can be measured where no real file can be had. Codes are spread as those of quantised weights are.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import save_file

HEAD_DIM = 128
V2 = {"smooth": "smooth_factor", "smooth_orig": "smooth_factor_orig", "lora_down": "proj_down", "lora_up": "proj_up"}

# layer: (N, K)
FLUX, FLUX_MLP = 3072, 12288
FLUX_DOUBLE = {
    "qkv_proj": (3 * FLUX, FLUX), "qkv_proj_context": (3 * FLUX, FLUX), "out_proj": (FLUX, FLUX), "out_proj_context": (FLUX, FLUX),
    "mlp_fc1": (FLUX_MLP, FLUX), "mlp_fc2": (FLUX, FLUX_MLP), "mlp_context_fc1": (FLUX_MLP, FLUX), "mlp_context_fc2": (FLUX, FLUX_MLP),
}  # fmt: skip
FLUX_SINGLE = {"qkv_proj": (3 * FLUX, FLUX), "out_proj": (FLUX, FLUX), "mlp_fc1": (FLUX_MLP, FLUX), "mlp_fc2": (FLUX, FLUX_MLP)}
FLUX_OUTSIDE = {
    "x_embedder": (FLUX, 64), "context_embedder": (FLUX, 4096),
    "time_text_embed.timestep_embedder.linear_1": (FLUX, 256), "time_text_embed.timestep_embedder.linear_2": (FLUX, FLUX),
    "time_text_embed.guidance_embedder.linear_1": (FLUX, 256), "time_text_embed.guidance_embedder.linear_2": (FLUX, FLUX),
    "time_text_embed.text_embedder.linear_1": (FLUX, 768), "time_text_embed.text_embedder.linear_2": (FLUX, FLUX),
    "norm_out.linear": (2 * FLUX, FLUX), "proj_out": (64, FLUX),
}  # fmt: skip

QWEN, QWEN_MLP, QWEN_TEXT = 3072, 12288, 3584
QWEN_LAYERS = {
    "attn.to_qkv": (3 * QWEN, QWEN), "attn.add_qkv_proj": (3 * QWEN, QWEN), "attn.to_out.0": (QWEN, QWEN), "attn.to_add_out": (QWEN, QWEN),
    "img_mlp.net.0.proj": (QWEN_MLP, QWEN), "img_mlp.net.2": (QWEN, QWEN_MLP),
    "txt_mlp.net.0.proj": (QWEN_MLP, QWEN), "txt_mlp.net.2": (QWEN, QWEN_MLP),
}  # fmt: skip
QWEN_OUTSIDE = {
    "img_in": (QWEN, 64), "txt_in": (QWEN, QWEN_TEXT), "time_text_embed.timestep_embedder.linear_1": (QWEN, 256),
    "time_text_embed.timestep_embedder.linear_2": (QWEN, QWEN), "norm_out.linear": (2 * QWEN, QWEN), "proj_out": (64, QWEN),
}  # fmt: skip

Z, Z_MLP, Z_TEXT, Z_REFINERS = 3840, 10240, 2560, 2
Z_LAYERS = {
    "attention.to_qkv": (3 * Z, Z), "attention.to_out.0": (Z, Z),
    "feed_forward.net.0.proj": (2 * Z_MLP, Z), "feed_forward.net.2": (Z, Z_MLP),
}  # fmt: skip
Z_OUTSIDE = {
    "all_x_embedder.2-1": (Z, 64), "all_final_layer.2-1.linear": (64, Z), "all_final_layer.2-1.adaLN_modulation.1": (Z, 256),
    "t_embedder.mlp.0": (1024, 256), "t_embedder.mlp.2": (256, 1024), "cap_embedder.1": (Z, Z_TEXT),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is wanted of a file. depth: of the main stack, as many blocks as the model has when None. single_depth and guidance are FLUX's,
    skip_refiners is Z-Image's."""

    precision: str = "int4"
    rank: int = 32
    depth: int | None = None
    single_depth: int = 38
    guidance: bool = True
    skip_refiners: bool = False


class Maker:
    """Tensors in main memory, made on `device` one by one. suffixes: other names for the last parts of names."""

    def __init__(self, precision: str, rank: int, device: str, suffixes: Mapping[str, str]):
        self.precision, self.rank, self.device, self.suffixes = precision, rank, device, suffixes
        self.tensors: dict[str, torch.Tensor] = {}

    def put(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None = torch.bfloat16) -> None:
        layer, _, suffix = name.rpartition(".")
        if suffix in self.suffixes:
            name = f"{layer}.{self.suffixes[suffix]}"
        self.tensors[name] = (tensor if dtype is None else tensor.to(dtype)).cpu().contiguous()

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device=self.device) * std

    def around(self, *shape: int, centre: float) -> torch.Tensor:
        """Positive numbers within a factor of 1.5 of `centre`."""
        return centre * torch.exp((torch.rand(*shape, device=self.device) - 0.5) * 0.8)

    def codes(self, *shape: int) -> torch.Tensor:
        """4-bit codes as quantising normally distributed weights gives them, one a byte (uint8)."""
        if self.precision == "int4":  # groups of 64: the largest of them, 2.7 sigma on average, becomes 7
            return self.normal(*shape, std=2.6).round_().clamp_(-8, 7).to(torch.int8).view(torch.uint8) & 15
        value = self.normal(*shape, std=3.0)  # groups of 16: 1.8 to 2 sigma become 6
        between = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=self.device)
        return torch.bucketize(value.abs(), between).to(torch.uint8) | (value < 0).to(torch.uint8) << 3

    def linear(self, p: str, n: int, k: int, smooth: torch.Tensor | None = None, bias: bool = True) -> None:
        self.put(f"{p}.qweight", (self.codes(n, k // 2) | self.codes(n, k // 2) << 4).view(torch.int8), None)
        if self.precision == "int4":
            self.put(f"{p}.wscales", self.around(k // 64, n, centre=0.02 / 2.6))
        else:
            self.put(f"{p}.wscales", self.around(k // 16, n, centre=4.0), torch.float8_e4m3fn)
            if "qkv" in p:
                self.put(f"{p}.wcscales", self.around(n, centre=0.02 / 12))
            else:
                self.put(f"{p}.wtscale", self.around(1, centre=0.02 / 12))
        if bias:
            self.put(f"{p}.bias", self.normal(n, std=0.02))
        smooth = self.around(k, centre=1.0) if smooth is None else smooth
        self.put(f"{p}.smooth", smooth)
        self.put(f"{p}.smooth_orig", smooth)
        self.put(f"{p}.lora_down", self.normal(k, self.rank, std=0.02))
        self.put(f"{p}.lora_up", self.normal(n, self.rank, std=0.02))

    def modulation(self, p: str, hidden: int, chunks: int) -> None:
        n, k = chunks * hidden, hidden
        words = torch.randint(-(2**31), 2**31 - 1, (n // 4, k // 2), device=self.device, dtype=torch.int64)
        self.put(f"{p}.qweight", words, torch.int32)
        scales = self.around(k // 64, n, centre=0.004 / 4.6)
        self.put(f"{p}.wscales", scales)
        self.put(f"{p}.wzeros", -7 * scales)
        bias = self.normal(n, std=0.02).view(hidden, chunks)
        bias[:, 1] += 1
        bias[:, chunks - 2] += 1
        self.put(f"{p}.bias", bias.flatten())

    def norm(self, name: str, width: int) -> None:
        self.put(f"{name}.weight", self.around(width, centre=1.0))

    def plain(self, name: str, n: int, k: int, bias: bool = True) -> None:
        self.put(f"{name}.weight", self.normal(n, k, std=0.02))
        if bias:
            self.put(f"{name}.bias", self.normal(n, std=0.02))


# -- FLUX.1 ------------------------------------------------------------------------------------------------------------------------


def flux(m: Maker, plan: Plan) -> dict[str, str]:
    """Puts the tensors of a FLUX.1 into `m`; returns its metadata but for the quantisation."""
    depth = 19 if plan.depth is None else plan.depth
    for i in range(depth):
        norms = ["norm_q", "norm_k", "norm_added_q", "norm_added_k"]
        flux_block(m, f"transformer_blocks.{i}", FLUX_DOUBLE, {"norm1.linear": 6, "norm1_context.linear": 6}, norms)
    for i in range(plan.single_depth):
        flux_block(m, f"single_transformer_blocks.{i}", FLUX_SINGLE, {"norm.linear": 3}, ["norm_q", "norm_k"])
    for name, (n, k) in FLUX_OUTSIDE.items():
        if plan.guidance or "guidance" not in name:
            m.plain(name, n, k)
    comfy = {
        "axes_dim": [16, 56, 56], "context_in_dim": 4096, "depth": depth, "depth_single_blocks": plan.single_depth,
        "guidance_embed": plan.guidance, "hidden_size": FLUX, "image_model": "flux", "in_channels": 16, "mlp_ratio": 4.0, "num_heads": 24,
        "out_channels": 16, "patch_size": 2, "qkv_bias": True, "theta": 10000, "vec_in_dim": 768, "disable_unet_model_creation": True,
    }  # fmt: skip
    config = {
        "num_layers": depth, "num_single_layers": plan.single_depth, "num_attention_heads": 24, "attention_head_dim": HEAD_DIM,
        "in_channels": 64, "guidance_embeds": plan.guidance, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
        "axes_dims_rope": [16, 56, 56], "patch_size": 1,
    }  # fmt: skip
    return {
        "config": json.dumps(config),
        "comfy_config": json.dumps({"model_class": "Flux" if plan.guidance else "FluxSchnell", "model_config": comfy}),
        "model_class": "NunchakuFluxTransformer2dModel",
    }


def flux_block(m: Maker, p: str, layers: dict, mods: dict[str, int], norms: list[str]) -> None:
    """The layers that take the block's hidden states are smoothed alike."""
    smooth = m.around(FLUX, centre=1.0)
    for name, (n, k) in layers.items():
        m.linear(f"{p}.{name}", n, k, smooth if k == FLUX else None)
    for name, chunks in mods.items():
        m.modulation(f"{p}.{name}", FLUX, chunks)
    for name in norms:
        m.norm(f"{p}.{name}", HEAD_DIM)


# -- Qwen-Image --------------------------------------------------------------------------------------------------------------------


def qwen_image(m: Maker, plan: Plan) -> dict[str, str]:
    """As flux, of a Qwen-Image with W4A16 modulation."""
    depth = 60 if plan.depth is None else plan.depth
    for p in (f"transformer_blocks.{i}" for i in range(depth)):
        for name, (n, k) in QWEN_LAYERS.items():
            m.linear(f"{p}.{name}", n, k)
        for name in ("img_mod.1", "txt_mod.1"):
            m.modulation(f"{p}.{name}", QWEN, 6)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            m.norm(f"{p}.attn.{name}", HEAD_DIM)
    for name, (n, k) in QWEN_OUTSIDE.items():
        m.plain(name, n, k)
    m.norm("txt_norm", QWEN_TEXT)
    config = {
        "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": depth, "attention_head_dim": HEAD_DIM,
        "num_attention_heads": QWEN // HEAD_DIM, "joint_attention_dim": QWEN_TEXT, "axes_dims_rope": [16, 56, 56], "guidance_embeds": False,
    }  # fmt: skip
    return {"config": json.dumps(config), "model_class": "NunchakuQwenImageTransformer2DModel"}


# -- Z-Image -----------------------------------------------------------------------------------------------------------------------


def z_image(m: Maker, plan: Plan) -> dict[str, str]:
    """As flux, of a Z-Image Turbo."""
    depth = 30 if plan.depth is None else plan.depth
    for stack, blocks in (("noise_refiner", Z_REFINERS), ("context_refiner", Z_REFINERS), ("layers", depth)):
        for p in (f"{stack}.{i}" for i in range(blocks)):
            z_image_linears(m, p, quantised=stack == "layers" or not plan.skip_refiners)
            for name in ("norm_q", "norm_k"):
                m.norm(f"{p}.attention.{name}", HEAD_DIM)
            for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                m.norm(f"{p}.{name}", Z)
            if stack != "context_refiner":
                m.plain(f"{p}.adaLN_modulation.0", 4 * Z, 256)
    for name, (n, k) in Z_OUTSIDE.items():
        m.plain(name, n, k)
    m.norm("cap_embedder.0", Z_TEXT)
    for name in ("x_pad_token", "cap_pad_token"):
        m.put(name, m.normal(1, Z))
    config = {
        "all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16, "dim": Z, "n_layers": depth, "n_refiner_layers": Z_REFINERS,
        "n_heads": Z // HEAD_DIM, "n_kv_heads": Z // HEAD_DIM, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": Z_TEXT,
        "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
    }  # fmt: skip
    return {"config": json.dumps(config), "model_class": "NunchakuZImageTransformer2DModel"}


def z_image_linears(m: Maker, p: str, quantised: bool) -> None:
    for name, (n, k) in Z_LAYERS.items():
        if quantised:
            m.linear(f"{p}.{name}", n, k, bias=False)
        elif name == "attention.to_qkv":
            for part in ("to_q", "to_k", "to_v"):
                m.plain(f"{p}.attention.{part}", n // 3, k, bias=False)
        else:
            m.plain(f"{p}.{name}", n, k, bias=False)


# -- the file ----------------------------------------------------------------------------------------------------------------------

FAMILIES = {"flux": (flux, {}), "qwen-image": (qwen_image, V2), "z-image": (z_image, V2)}


def quantization(family: str, plan: Plan) -> dict:
    q = {"dtype": "int4", "scale_dtype": None, "group_size": 64}
    w = q
    if plan.precision == "nvfp4":
        w = {"dtype": "fp4_e2m1_all", "scale_dtype": [None, "fp8_e4m3_nan"], "group_size": 16}
        q = {"dtype": "fp4_e2m1_all", "scale_dtype": "fp8_e4m3_nan", "group_size": 16}
    found = {"method": "svdquant", "weight": w, "activation": q, "rank": plan.rank}
    return found | ({"skip_refiners": plan.skip_refiners} if family == "z-image" else {})


def make(path: str, family: str, plan: Plan, device: str) -> None:
    torch.manual_seed(0)
    fill, suffixes = FAMILIES[family]
    m = Maker(plan.precision, plan.rank, device, suffixes)
    metadata = fill(m, plan)
    save_file(m.tensors, path + ".part", {**metadata, "quantization_config": json.dumps(quantization(family, plan))})
    os.replace(path + ".part", path)
    print(f"{path}: {len(m.tensors)} tensors, {os.path.getsize(path) / 1e9:.2f} GB")


def main() -> None:
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("family", choices=FAMILIES)
    a.add_argument("out")
    a.add_argument("--precision", choices=("int4", "nvfp4"), default="int4")
    a.add_argument("--rank", type=int, default=32)
    a.add_argument("--depth", type=int, help="blocks of the main stack (19, 60 or 30)")
    a.add_argument("--single-depth", type=int)
    a.add_argument("--schnell", action="store_true")
    a.add_argument("--skip-refiners", action="store_true")
    o = a.parse_args()
    if o.family != "flux" and (o.schnell or o.single_depth is not None):
        a.error("--single-depth and --schnell are for flux")
    if o.family != "z-image" and o.skip_refiners:
        a.error("--skip-refiners is for z-image")
    single = 38 if o.single_depth is None else o.single_depth
    plan = Plan(o.precision, o.rank, o.depth, single, not o.schnell, o.skip_refiners)
    make(o.out, o.family, plan, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
