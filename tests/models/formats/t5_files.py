"""A small T5 encoder with the real names, in memory: the sizes of T5-XXL, divided."""

import torch
from tonfa.models.formats.t5 import T5Dims

DIMS = T5Dims(blocks=2, model=128, heads=2, inner=128, ff=256, vocab=64, buckets=32)


def tiny_t5(dtype: torch.dtype = torch.float16, seed: int = 0, dims: T5Dims = DIMS) -> dict[str, torch.Tensor]:
    """Heavy-tailed weights (Student's t with 4 degrees of freedom), norm weights of different sizes; the embedding under `shared` only."""
    torch.manual_seed(seed)
    draw = torch.distributions.StudentT(4.0)
    tensors = {f"{prefix}.weight": draw.sample(shape) * 0.05 for prefix, shape in dims.linears().items()}
    for name, shape in dims.plain().items():
        tensors[name] = torch.exp(torch.randn(shape) * 0.5) * 0.2 if "layer_norm" in name else torch.randn(shape)
    return {name: t.to(dtype) for name, t in tensors.items()}


def scaled_fp8(tensors: dict[str, torch.Tensor], scale_name: str = "scale_weight") -> dict[str, torch.Tensor]:
    """The same as ComfyUI's scaled fp8: linears as e4m3 with a scale each, everything else as it is."""
    made: dict[str, torch.Tensor] = {}
    for name, t in tensors.items():
        if "SelfAttention" not in name and "DenseReluDense" not in name or "bias" in name:
            made[name] = t
            continue
        prefix = name.removesuffix(".weight")
        scale = t.float().abs().max() / 448
        made[name] = (t.float() / scale).to(torch.float8_e4m3fn)
        made[f"{prefix}.{scale_name}"] = scale
        if scale_name == "weight_scale":
            made[f"{prefix}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    if scale_name == "scale_weight":
        made["scaled_fp8"] = torch.tensor([], dtype=torch.float8_e4m3fn)
    return made
