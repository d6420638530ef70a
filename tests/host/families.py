"""What the host tests of Qwen-Image and Z-Image share: small checkpoints of tame random weights, their dense twins, sampling."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import tempfile
from dataclasses import replace
from pathlib import Path

import comfy.ldm.qwen_image.model
import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from tonfa.kernels.layout import LogicalLinear
from tonfa.models.dequantize import dense_state_dict
from tonfa.models.formats.checkpoint import open_packed
from tonfa.nodes.host.shell import Placement, load_model
from torch import Tensor

import nodes

from .lab import CPU, FP32, MADE

_spec = importlib.util.spec_from_file_location(
    "packed_files", Path(__file__).resolve().parent.parent / "models" / "formats" / "packed_files.py"
)
packed_files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(packed_files)

TEXT = packed_files.CONTEXT
HAS_Z_IMAGE = hasattr(comfy.supported_models, "ZImage")
needs_z_image = pytest.mark.skipif(not HAS_Z_IMAGE, reason="this ComfyUI has no Z-Image")
FAMILIES = [pytest.param("qwen-image"), pytest.param("z-image", marks=needs_z_image)]
LIKE_2511 = "default_ref_method" in inspect.signature(comfy.ldm.qwen_image.model.QwenImageTransformer2DModel).parameters


# -- models ------------------------------------------------------------------------------------------------------------------------


@functools.cache
def made(family: str = "qwen-image", precision: str = "int4", seed: int = 0, rank: int = 16, **changes: object) -> Path:
    """A checkpoint in the published layout. changes: as packed_files' function of the family takes them."""
    maker = {"qwen-image": packed_files.qwen, "z-image": packed_files.zimage}[family]
    tensors, metadata, layers = maker(precision, rank, seed=seed, **changes)
    g = torch.Generator().manual_seed(seed)
    for prefix, layer in layers.items():
        tensors |= packed_files.packed(prefix, tame(layer, g), 6 if layer.precision == "w4a16" else 0)
    quantised = set(layers)
    for name, tensor in tensors.items():
        prefix, _, suffix = name.rpartition(".")
        if prefix not in quantised:
            tensors[name] = tame_plain(prefix, suffix, tensor, g)
    path = Path(tempfile.mkdtemp(dir=MADE.name)) / f"svdq-{precision}_r{rank}-{family}.safetensors"
    return packed_files.save(path, tensors, metadata)


def tame(layer: LogicalLinear, g: torch.Generator) -> LogicalLinear:
    """A layer of the same kind and size that keeps its input's size. Codes are spread as those of quantised weights are."""
    (n, k), dtype = layer.codes.shape, torch.bfloat16
    if layer.precision == "w4a16":
        scales = (torch.rand(n, k // 64, generator=g) * 0.5 + 0.5).mul(0.1 * k**-0.5).to(dtype)
        return replace(layer, scales=scales, zeros=(-7.5 * scales.float()).to(dtype), bias=(layer.bias * 0.2).to(dtype).float())
    smooth = torch.exp(0.4 * torch.randn(k, generator=g)).to(dtype)
    spread = torch.randn(n, k, generator=g)
    if layer.precision == "int4":
        codes, unit = (2.3 * spread).round().clamp(-7, 7).to(torch.int8).view(torch.uint8) & 15, 2.3
    else:
        codes, unit = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8), 2.5  # of e2m1
    shape = layer.scales.shape
    scales = (torch.rand(shape, generator=g) * 0.5 + 0.75) * (k**-0.5 / unit)
    top = None
    if layer.precision == "nvfp4":
        top = layer.channel_scale
        scales = (scales / 0.5).to(torch.float8_e4m3fn)
    else:
        scales = scales.to(dtype)
    rank = layer.down.shape[0]
    down = (torch.randn(rank, k, generator=g) * k**-0.5).to(dtype)
    up = (torch.randn(n, rank, generator=g) * 0.5 * rank**-0.5).to(dtype)
    bias = None if layer.bias is None else (0.1 * torch.randn(n, generator=g)).to(dtype)
    return replace(layer, codes=codes, scales=scales, smooth=smooth, down=down, up=up, channel_scale=top, bias=bias)


def tame_plain(prefix: str, suffix: str, tensor: Tensor, g: torch.Generator) -> Tensor:
    if suffix == "weight" and tensor.ndim == 2:
        gain = tensor.shape[1] ** -0.5 * (0.5 if "adaLN" in prefix else 1.0)
        return (torch.randn(tensor.shape, generator=g) * gain).to(tensor.dtype)
    if suffix == "weight" and "norm" in prefix:
        return (1 + 0.1 * torch.randn(tensor.shape, generator=g)).to(tensor.dtype)
    return (0.3 * torch.randn(tensor.shape, generator=g)).to(tensor.dtype)


def loaded(path: Path, compute: str = "weight_only", where: Placement = FP32):
    """Our patcher on the checkpoint, in fp32 on the CPU unless it is to be elsewhere."""
    with torch.inference_mode():
        patcher = load_model(str(path), where)
    patcher.model_options["transformer_options"]["tonfa"] = {"compute": compute}
    return patcher


def twin(path: Path, dtype: torch.dtype = torch.float32) -> comfy.model_patcher.ModelPatcher:
    """The same weights, dense, in the host's own class under its own patcher, as the host's loader makes it of a 16-bit file."""
    checkpoint = open_packed(path)
    if checkpoint.family == "qwen-image":
        known = inspect.signature(comfy.ldm.qwen_image.model.QwenImageTransformer2DModel).parameters
        config = comfy.supported_models.QwenImage({k: v for k, v in checkpoint.config.items() if k in known})
    else:
        config = comfy.supported_models.ZImage(dict(checkpoint.config))
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, device=CPU)
    with torch.inference_mode():
        state = dict(dense_state_dict(checkpoint, torch.float32))
        model.diffusion_model.load_state_dict(state, strict=True)
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


# -- sampling ----------------------------------------------------------------------------------------------------------------------


def conditioning(tokens: int = 12, seed: int = 3, **extra: object) -> list:
    g = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, tokens, TEXT, generator=g), {**extra}]]


def empty_latent(family: str, batch: int = 1, size: tuple[int, int] = (8, 12)) -> dict:
    """As the host's own node for the family makes it: Qwen-Image has a dimension for time."""
    middle = (1,) if family == "qwen-image" else ()
    return {"samples": torch.zeros(batch, 16, *middle, *size)}


def sample(
    patcher, family: str, positive: list | None = None, negative: list | None = None, seed: int = 1, steps: int = 4, cfg: float = 1.0,
    size: tuple[int, int] = (8, 12), batch: int = 1, latent: dict | None = None,
) -> Tensor:  # fmt: skip
    """The host's common_ksampler (euler, simple) -> latents in fp32."""
    positive = conditioning() if positive is None else positive
    latent = latent or empty_latent(family, batch, size)
    with torch.inference_mode():
        out = nodes.common_ksampler(patcher, seed, steps, cfg, "euler", "simple", positive, negative or positive, latent)
    return out[0]["samples"].float().clone()
