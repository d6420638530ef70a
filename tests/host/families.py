"""What the host tests of Qwen-Image and Z-Image share: small checkpoints of tame random weights, their dense twins, sampling."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import tempfile
from pathlib import Path

import comfy.ldm.qwen_image.model
import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from tonfa.models.dequantize import dense_state_dict
from tonfa.models.formats.checkpoint import open_packed
from tonfa.models.formats.quantize import quantize_linear, quantize_modulation
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
        tensors |= packed_files.packed(prefix, tame(layer, rank, g), 6 if layer.precision == "w4a16" else 0)
    quantised = set(layers)
    for name, tensor in tensors.items():
        prefix, _, suffix = name.rpartition(".")
        if prefix not in quantised:
            tensors[name] = tame_plain(prefix, suffix, tensor, g)
    path = Path(tempfile.mkdtemp(dir=MADE.name)) / f"svdq-{precision}_r{rank}-{family}.safetensors"
    return packed_files.save(path, tensors, metadata)


def tame(layer: object, rank: int, g: torch.Generator) -> object:
    """A layer of the same kind and size that keeps its input's size, a part of it of low rank."""
    n, k = layer.codes.shape
    weight = torch.randn(n, k, generator=g) * k**-0.5
    bias = None if layer.bias is None else torch.randn(n, generator=g) * 0.1
    if layer.precision == "w4a16":
        return quantize_modulation(weight * 0.5, bias)
    smooth = torch.exp(0.4 * torch.randn(k, generator=g))
    return quantize_linear(weight, bias, rank, layer.precision, layer.act_unsigned, smooth)


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
