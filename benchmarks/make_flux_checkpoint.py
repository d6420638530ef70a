"""Writes a full-size FLUX.1 checkpoint of random codes in the published Nunchaku single-file layout (6.8 GB for INT4 rank 32).

    python benchmarks/make_flux_checkpoint.py OUT.safetensors [--precision int4|nvfp4] [--rank 32] [--depth 19] [--single-depth 38]

The sizes, names, types and metadata are a real file's, the numbers are random but tame (weights of about 0.02, like a trained model's), so
that time, memory, power and kernels can be measured where no real file can be had. Codes are spread as those of quantised weights are.
"""

from __future__ import annotations

import argparse
import json
import os

import torch
from safetensors.torch import save_file

HIDDEN, MLP, HEAD_DIM = 3072, 12288, 128
DOUBLE = {  # layer: (N, K)
    "qkv_proj": (3 * HIDDEN, HIDDEN), "qkv_proj_context": (3 * HIDDEN, HIDDEN),
    "out_proj": (HIDDEN, HIDDEN), "out_proj_context": (HIDDEN, HIDDEN),
    "mlp_fc1": (MLP, HIDDEN), "mlp_fc2": (HIDDEN, MLP), "mlp_context_fc1": (MLP, HIDDEN), "mlp_context_fc2": (HIDDEN, MLP),
}  # fmt: skip
SINGLE = {"qkv_proj": (3 * HIDDEN, HIDDEN), "out_proj": (HIDDEN, HIDDEN), "mlp_fc1": (MLP, HIDDEN), "mlp_fc2": (HIDDEN, MLP)}
OUTSIDE = {
    "x_embedder": (HIDDEN, 64), "context_embedder": (HIDDEN, 4096),
    "time_text_embed.timestep_embedder.linear_1": (HIDDEN, 256), "time_text_embed.timestep_embedder.linear_2": (HIDDEN, HIDDEN),
    "time_text_embed.guidance_embedder.linear_1": (HIDDEN, 256), "time_text_embed.guidance_embedder.linear_2": (HIDDEN, HIDDEN),
    "time_text_embed.text_embedder.linear_1": (HIDDEN, 768), "time_text_embed.text_embedder.linear_2": (HIDDEN, HIDDEN),
    "norm_out.linear": (2 * HIDDEN, HIDDEN), "proj_out": (64, HIDDEN),
}  # fmt: skip


class Maker:
    def __init__(self, precision: str, rank: int, device: str):
        self.precision, self.rank, self.device = precision, rank, device
        self.tensors: dict[str, torch.Tensor] = {}

    def put(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None = torch.bfloat16) -> None:
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

    def linear(self, p: str, n: int, k: int, smooth: torch.Tensor | None = None) -> None:
        self.put(f"{p}.qweight", (self.codes(n, k // 2) | self.codes(n, k // 2) << 4).view(torch.int8), None)
        if self.precision == "int4":
            self.put(f"{p}.wscales", self.around(k // 64, n, centre=0.02 / 2.6))
        else:
            self.put(f"{p}.wscales", self.around(k // 16, n, centre=4.0), torch.float8_e4m3fn)
            if "qkv" in p:
                self.put(f"{p}.wcscales", self.around(n, centre=0.02 / 12))
            else:
                self.put(f"{p}.wtscale", self.around(1, centre=0.02 / 12))
        self.put(f"{p}.bias", self.normal(n, std=0.02))
        smooth = self.around(k, centre=1.0) if smooth is None else smooth
        self.put(f"{p}.smooth", smooth)
        self.put(f"{p}.smooth_orig", smooth)
        self.put(f"{p}.lora_down", self.normal(k, self.rank, std=0.02))
        self.put(f"{p}.lora_up", self.normal(n, self.rank, std=0.02))

    def modulation(self, p: str, chunks: int) -> None:
        n, k = chunks * HIDDEN, HIDDEN
        words = torch.randint(-(2**31), 2**31 - 1, (n // 4, k // 2), device=self.device, dtype=torch.int64)
        self.put(f"{p}.qweight", words, torch.int32)
        scales = self.around(k // 64, n, centre=0.004 / 4.6)
        self.put(f"{p}.wscales", scales)
        self.put(f"{p}.wzeros", -7 * scales)
        bias = self.normal(n, std=0.02).view(HIDDEN, chunks)
        bias[:, 1] += 1
        bias[:, chunks - 2] += 1
        self.put(f"{p}.bias", bias.flatten())

    def norms(self, p: str, names: list[str]) -> None:
        for name in names:
            self.put(f"{p}.{name}.weight", self.around(HEAD_DIM, centre=1.0))

    def block(self, p: str, layers: dict, mods: dict[str, int], norms: list[str]) -> None:
        shared = {k: self.around(k, centre=1.0) for k in (HIDDEN,)}
        for name, (n, k) in layers.items():
            self.linear(f"{p}.{name}", n, k, shared.get(k))
        for name, chunks in mods.items():
            self.modulation(f"{p}.{name}", chunks)
        self.norms(p, norms)


def metadata(precision: str, rank: int, depth: int, single: int, guidance: bool) -> dict[str, str]:
    q = {"dtype": "int4", "scale_dtype": None, "group_size": 64}
    w = q
    if precision == "nvfp4":
        w = {"dtype": "fp4_e2m1_all", "scale_dtype": [None, "fp8_e4m3_nan"], "group_size": 16}
        q = {"dtype": "fp4_e2m1_all", "scale_dtype": "fp8_e4m3_nan", "group_size": 16}
    comfy = {
        "axes_dim": [16, 56, 56], "context_in_dim": 4096, "depth": depth, "depth_single_blocks": single, "guidance_embed": guidance,
        "hidden_size": HIDDEN, "image_model": "flux", "in_channels": 16, "mlp_ratio": 4.0, "num_heads": 24, "out_channels": 16,
        "patch_size": 2, "qkv_bias": True, "theta": 10000, "vec_in_dim": 768, "disable_unet_model_creation": True,
    }  # fmt: skip
    config = {
        "num_layers": depth, "num_single_layers": single, "num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 64,
        "guidance_embeds": guidance, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "axes_dims_rope": [16, 56, 56],
        "patch_size": 1,
    }  # fmt: skip
    return {
        "config": json.dumps(config),
        "comfy_config": json.dumps({"model_class": "Flux" if guidance else "FluxSchnell", "model_config": comfy}),
        "model_class": "NunchakuFluxTransformer2dModel",
        "quantization_config": json.dumps({"method": "svdquant", "weight": w, "activation": q, "rank": rank}),
    }


def make(path: str, precision: str, rank: int, depth: int, single: int, guidance: bool, device: str) -> None:
    torch.manual_seed(0)
    m = Maker(precision, rank, device)
    for i in range(depth):
        m.block(
            f"transformer_blocks.{i}",
            DOUBLE,
            {"norm1.linear": 6, "norm1_context.linear": 6},
            ["norm_q", "norm_k", "norm_added_q", "norm_added_k"],
        )
    for i in range(single):
        m.block(f"single_transformer_blocks.{i}", SINGLE, {"norm.linear": 3}, ["norm_q", "norm_k"])
    for name, (n, k) in OUTSIDE.items():
        if guidance or "guidance" not in name:
            m.put(f"{name}.weight", m.normal(n, k, std=0.02))
            m.put(f"{name}.bias", m.normal(n, std=0.02))
    save_file(m.tensors, path + ".part", metadata(precision, rank, depth, single, guidance))
    os.replace(path + ".part", path)
    print(f"{path}: {len(m.tensors)} tensors, {os.path.getsize(path) / 1e9:.2f} GB")


def main() -> None:
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("out")
    a.add_argument("--precision", choices=("int4", "nvfp4"), default="int4")
    a.add_argument("--rank", type=int, default=32)
    a.add_argument("--depth", type=int, default=19)
    a.add_argument("--single-depth", type=int, default=38)
    a.add_argument("--schnell", action="store_true")
    o = a.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make(o.out, o.precision, o.rank, o.depth, o.single_depth, not o.schnell, device)


if __name__ == "__main__":
    main()
