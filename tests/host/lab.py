"""What the host tests share: small checkpoints, their dense twins in the host's own class, and sampling with the host's own sampler."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from tonfa.models.dequantize import dense_state_dict
from tonfa.models.formats.checkpoint import open_checkpoint
from tonfa.models.formats.writer import write_flux
from tonfa.nodes.host.flux_shell import unet_config
from tonfa.nodes.host.shell import Placement, load_model
from torch import Tensor

import nodes

CPU = torch.device("cpu")
DATA = Path(__file__).resolve().parent.parent / "data"
FP32 = Placement(CPU, CPU, torch.float32)
MADE = tempfile.TemporaryDirectory(prefix="tonfa-made-")  # goes when the process ends
CONTEXT, POOLED = 96, 64  # widths of the small models' conditioning
CONFIG = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": POOLED, "context_in_dim": CONTEXT,
    "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 24, 24], "theta": 10000,
    "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip


def rel(got: Tensor, wanted: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def snr(got: Tensor, wanted: Tensor) -> float:
    """Signal to noise in dB."""
    return -20 * torch.log10(torch.tensor(max(rel(got, wanted), 1e-12))).item()


# -- models ----------------------------------------------------------------------------------------------------------------------


def random_state(config: dict, seed: int = 0) -> dict[str, Tensor]:
    """Random weights for the host's FLUX of `config`: gentle enough that eight steps stay finite and every input still matters."""
    g = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shell = comfy.ldm.flux.model.Flux(**host_fields(config), dtype=torch.float32, operations=torch.nn)
    state = {}
    for name, p in shell.state_dict().items():
        name = name.replace("_norm.weight", "_norm.scale")
        gain = p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1
        state[name] = torch.randn(p.shape, generator=g) * gain * (0.5 if "mod" in name else 1.0)
        if name.endswith("_norm.scale"):
            state[name] = 1 + state[name]
    return state


def host_fields(config: dict) -> dict:
    known = comfy.ldm.flux.model.FluxParams.__dataclass_fields__
    return {**{k: v for k, v in config.items() if k in known}, **({"txt_ids_dims": []} if "txt_ids_dims" in known else {})}


@functools.cache
def made(precision: str = "int4", seed: int = 0, **changes: object) -> Path:
    """A checkpoint of random weights in the published layout, written by our own writer. `changes` go into its configuration."""
    config = {**CONFIG, **changes}
    path = Path(tempfile.mkdtemp(dir=MADE.name)) / f"svdq-{precision}_r16-made.safetensors"
    write_flux(path, random_state(config, seed), config, rank=16, precision=precision)
    return path


def loaded(path: Path, compute: str = "weight_only"):
    """Our patcher on the checkpoint, in fp32 on the CPU."""
    with torch.inference_mode():
        patcher = load_model(str(path), FP32)
    patcher.model_options["transformer_options"]["tonfa"] = {"compute": compute}
    return patcher


def dense_state(path: Path) -> dict[str, Tensor]:
    """The checkpoint's weights in fp32 under native names, as `dequantize` makes them: from the logical layers, not the packed layout."""
    return dict(dense_state_dict(open_checkpoint(path), torch.float32))


def twin(path: Path, dtype: torch.dtype = torch.float32) -> comfy.model_patcher.ModelPatcher:
    """The same weights, dense, in the host's own FLUX under its own patcher."""
    checkpoint = open_checkpoint(path)
    schnell = checkpoint.model_class == "FluxSchnell"
    config = (comfy.supported_models.FluxSchnell if schnell else comfy.supported_models.Flux)(unet_config(checkpoint.config))
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, device=CPU)
    with torch.inference_mode():
        model.diffusion_model.load_state_dict(model.model_config.process_unet_state_dict(dense_state(path)), strict=True)
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


# -- sampling --------------------------------------------------------------------------------------------------------------------


def conditioning(tokens: int = 12, seed: int = 3, **extra: object) -> list:
    g = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, CONTEXT, generator=g)
    return [[context, {"pooled_output": torch.randn(1, POOLED, generator=g), "guidance": 3.5, **extra}]]


def sample(
    patcher, positive: list | None = None, negative: list | None = None, seed: int = 1, steps: int = 4, cfg: float = 1.0,
    size: tuple[int, int] = (8, 12), batch: int = 1, latent: dict | None = None,
) -> Tensor:  # fmt: skip
    """The host's common_ksampler (euler, simple) -> latents in fp32."""
    positive = conditioning() if positive is None else positive
    latent = latent or {"samples": torch.zeros(batch, 16, *size)}
    with torch.inference_mode():
        out = nodes.common_ksampler(patcher, seed, steps, cfg, "euler", "simple", positive, negative or positive, latent)
    return out[0]["samples"].float().clone()
