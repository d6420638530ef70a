"""Write FLUX.1 checkpoints in the published single-file layout (v1 names, metadata), from logical layers or from a dense model.

Files appear under their name only when complete. Layers are packed one at a time while the file is written.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from ...kernels.layout import LogicalLinear
from . import flux_names
from . import nunchaku as nk
from .flux_names import FluxDims, LayerSpec
from .quantize import quantize_linear, quantize_modulation, scale_chunk_one
from .tensorfile import Slot, stream_save

__all__ = ["file_metadata", "pack_layer", "plain_slots", "quantize_linear", "quantize_modulation", "write_flux", "write_layers"]


def dims_of(config: Mapping) -> FluxDims:
    """Sizes of a host FLUX config (keys as in ComfyUI's unet_config). KeyError names a missing one."""
    hidden = config["hidden_size"]
    return FluxDims(
        hidden=hidden, head_dim=hidden // config["num_heads"], mlp=int(hidden * config["mlp_ratio"]), depth=config["depth"],
        depth_single=config["depth_single_blocks"], in_width=4 * config["in_channels"], out_width=4 * config["out_channels"],
        context=config["context_in_dim"], vec=config["vec_in_dim"], guidance=config["guidance_embed"],
    )  # fmt: skip


def file_metadata(config: Mapping, precision: str, rank: int, model_class: str = "Flux") -> dict[str, str]:
    """The metadata that published files carry, for a host FLUX config."""
    d = dims_of(config)
    diffusers = {
        "_class_name": "NunchakuFluxTransformer2dModel", "patch_size": 1, "in_channels": d.in_width, "out_channels": d.out_width,
        "num_layers": d.depth, "num_single_layers": d.depth_single, "attention_head_dim": d.head_dim,
        "num_attention_heads": d.hidden // d.head_dim, "joint_attention_dim": d.context, "pooled_projection_dim": d.vec,
        "guidance_embeds": d.guidance, "axes_dims_rope": list(config["axes_dim"]),
    }  # fmt: skip
    comfy = (
        {"image_model": "flux", "patch_size": 2, "qkv_bias": True, "theta": 10000} | dict(config) | {"disable_unet_model_creation": True}
    )
    int4 = {"dtype": "int4", "scale_dtype": None, "group_size": 64}
    fp4 = {"dtype": "fp4_e2m1_all", "scale_dtype": "fp8_e4m3_nan", "group_size": 16}
    weight, activation = (int4, int4) if precision == "int4" else (fp4 | {"scale_dtype": [None, "fp8_e4m3_nan"]}, fp4)
    return {
        "config": json.dumps(diffusers),
        "comfy_config": json.dumps({"model_class": model_class, "model_config": comfy}),
        "model_class": "NunchakuFluxTransformer2dModel",
        "quantization_config": json.dumps({"method": "svdquant", "weight": weight, "activation": activation, "rank": rank}),
    }


def pack_layer(layer: LogicalLinear, chunks: int = 0) -> dict[str, Tensor]:
    """v1 suffix -> packed tensor of one layer. chunks: for W4A16 layers, how many modulation chunks their rows are.

    ValueError when the layer says something that the format cannot hold (a channel scale that 16 bits do not hold exactly, several
    low-rank segments).
    """
    if len(layer.segments) > 1:
        raise ValueError("the format has one low-rank pair a layer: split a stacked layer before writing it")
    if layer.precision == "w4a16":
        return _pack_w4a16(layer, chunks)
    dtype = layer.up.dtype
    smooth = nk.pack_vector(layer.smooth)
    out = {
        "qweight": nk.pack_qweight(layer.codes),
        "wscales": (nk.pack_int4_scales if layer.precision == "int4" else nk.pack_nvfp4_scales)(layer.scales, layer.k),
        "bias": nk.pack_vector(layer.bias if layer.bias is not None else torch.zeros(layer.n, dtype=dtype)),
        "smooth": smooth,
        "smooth_orig": smooth,
        "lora_down": nk.pack_down(layer.down),
        "lora_up": nk.pack_up(layer.up),
    }
    if layer.precision == "nvfp4":
        scale = layer.channel_scale if layer.channel_scale is not None else torch.ones(layer.n)
        short = scale.to(dtype)
        if not torch.equal(short.float(), scale.float()):
            raise ValueError(f"channel scales are not exact in {dtype}, which is all the format has for them")
        if (short == short[0]).all():
            out["wtscale"] = short[:1].clone()
        else:
            out["wcscales"] = nk.pack_vector(short)
    return out


def _pack_w4a16(layer: LogicalLinear, chunks: int) -> dict[str, Tensor]:
    inter = partial(nk.interleave_rows, chunks=chunks)
    bias = layer.bias.float().view(chunks, -1) + scale_chunk_one(chunks, layer.bias.device)
    return {
        "qweight": nk.pack_w4a16_qweight(inter(layer.codes)),
        "wscales": nk.pack_w4a16_scales(inter(layer.scales), layer.k),
        "wzeros": nk.pack_w4a16_scales(inter(layer.zeros), layer.k),
        "bias": inter(bias.view(-1)).to(layer.scales.dtype),
    }


def write_layers(path: str | os.PathLike, config: Mapping, layer: Callable[[str], LogicalLinear], plain: Callable[[str], Tensor],
                 precision: str, rank: int, model_class: str = "Flux", dtype: torch.dtype = torch.bfloat16,
                 progress: Callable[[int, int], None] | None = None) -> None:  # fmt: skip
    """Write a checkpoint from logical layers.

    config         host FLUX config (unet_config keys)
    layer(prefix)  the LogicalLinear of a v1 layer ("transformer_blocks.0.qkv_proj"); modulation layers in native row order
    plain(name)    a plain tensor by its native name ("img_in.weight"), final_layer.adaLN_modulation.1 in native half order
    Both are called once, when their turn in the file comes. progress(done, total) counts layers and plain tensors.
    Memory: one layer besides the packed file content, which is gathered first because a layer may have its own rank and top scale.
    """
    d = dims_of(config)
    specs, plains = flux_names.layer_specs(d), list(plain_slots(config, plain, dtype))
    tensors: dict[str, Tensor] = {}
    for i, (prefix, spec) in enumerate(specs.items()):
        tensors |= {f"{prefix}.{suffix}": t.cpu() for suffix, t in _packed(layer(prefix), prefix, spec).items()}
        if progress:
            progress(i + 1, len(specs) + len(plains))
    for i, slot in enumerate(plains):
        tensors[slot.key] = slot.make()
        if progress:
            progress(len(specs) + i + 1, len(specs) + len(plains))
    slots = [Slot(k, t.dtype, tuple(t.shape), partial(tensors.get, k)) for k, t in tensors.items()]
    stream_save(path, slots, file_metadata(config, precision, rank, model_class))


def plain_slots(config: Mapping, plain: Callable[[str], Tensor], dtype: torch.dtype = torch.bfloat16) -> Iterator[Slot]:
    """Everything that the format leaves alone, in `dtype`, as it is written. plain: see write_layers; called when a slot's turn comes.

    A slot raises ValueError when its tensor has another shape than it should, or does not fit into `dtype`.
    """
    for native, v1, shape in flux_names.plain_specs(dims_of(config)):
        yield Slot(v1, dtype, shape, partial(_plain, native, shape, plain, dtype))


def _plain(native: str, shape: tuple[int, ...], plain: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
    t = plain(native).to("cpu", dtype)
    if tuple(t.shape) != shape:
        raise ValueError(f"{native} has shape {list(t.shape)}, expected {list(shape)}")
    if dtype == torch.float16 and not torch.isfinite(t).all():
        raise ValueError(f"{native} has values beyond float16's range: write the file in bfloat16")
    return torch.cat(t.chunk(2)[::-1]) if native.startswith("final_layer.adaLN_modulation.1.") else t


def _packed(layer: LogicalLinear, prefix: str, spec: LayerSpec) -> dict[str, Tensor]:
    if (layer.n, layer.k) != (spec.n, spec.k):
        raise ValueError(f"{prefix} is {layer.n} x {layer.k}, expected {spec.n} x {spec.k}")
    return pack_layer(layer, spec.chunks)


def write_flux(path: str | os.PathLike, state_dict: Mapping[str, Tensor], config: Mapping, rank: int = 32, precision: str = "int4",
               model_class: str | None = None, dtype: torch.dtype = torch.bfloat16,
               progress: Callable[[int, int], None] | None = None) -> None:  # fmt: skip
    """Quantise a dense FLUX (native names, hidden size a multiple of 128) and write it as a checkpoint.

    state_dict may be a plain dict or anything that loads lazily on []; values of any float type and device. KeyError names a missing one;
    ValueError a wrong shape. model_class None: "Flux" with a guidance embedder, else "FluxSchnell".
    """
    d = dims_of(config)
    where = {p: (host, row, col) for host in flux_names.host_linears(d) for p, row, col in host.parts}
    specs = flux_names.layer_specs(d)

    def layer(prefix: str) -> LogicalLinear:
        host, row, col = where[prefix]
        spec = specs[prefix]
        weight, bias = state_dict[f"{host.name}.weight"], state_dict.get(f"{host.name}.bias")
        if tuple(weight.shape) != (host.out_features, host.in_features):
            raise ValueError(f"{host.name}.weight is {list(weight.shape)}, expected {[host.out_features, host.in_features]}")
        weight = weight[row : row + spec.n, col : col + spec.k]
        bias = None if bias is None else bias[row : row + spec.n]
        if spec.chunks:
            return quantize_modulation(weight, bias, dtype)
        if host.name.endswith("linear2") and col == 0:
            bias = None  # as published files do: zeros here, the whole bias with the MLP columns
        return quantize_linear(weight, bias, rank, precision, spec.gelu_fed and precision == "int4", dtype=dtype)

    chosen = model_class or ("Flux" if d.guidance else "FluxSchnell")
    write_layers(path, config, layer, state_dict.__getitem__, precision, rank, chosen, dtype, progress)
