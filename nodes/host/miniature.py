"""The miniature in ComfyUI's own classes. The host's loader would not recognise its FLUX: it knows real sizes only."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import comfy.model_base
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch

from ...models.dense_flux import open_dense
from ...models.formats.flux_names import host_linears, plain_specs
from ...models.formats.writer import dims_of
from ...models.miniature import AUTOENCODER, FLUX, FOLDER
from .flux_shell import norm_parameter, unet_config
from .shell import nearest, place


def model(path: Path = FOLDER / FLUX, dtype: torch.dtype | None = None) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of a dense FLUX of any size: weights in bf16, computing in bf16 where the device does. dtype: both in another type."""
    where = place(0, "bfloat16", "Tonfa Miniature FLUX")
    with closing(open_dense(path)) as source:
        kind = comfy.supported_models.Flux if source.config["guidance_embed"] else comfy.supported_models.FluxSchnell
        config = kind(unet_config(source.config))
        computes_in = dtype or nearest(torch.bfloat16, where.load, config.supported_inference_dtypes)
        config.set_inference_dtype(dtype or torch.bfloat16, None if computes_in == (dtype or torch.bfloat16) else computes_in)
        flow = comfy.model_base.ModelType.FLUX if source.config["guidance_embed"] else comfy.model_base.ModelType.FLOW
        made = comfy.model_base.Flux(config, model_type=flow, device=where.offload)
        state = {name.replace("_norm.scale", f"_norm.{norm_parameter()}"): tensor for name, tensor in named(source)}
    made.diffusion_model.load_state_dict(state)
    made.diffusion_model.eval()
    return comfy.model_patcher.ModelPatcher(made, load_device=where.load, offload_device=where.offload)


def named(source) -> list[tuple[str, torch.Tensor]]:
    """(native name, tensor) of a whole dense FLUX."""
    dims, found = dims_of(source.config), []
    for linear in host_linears(dims):
        weight, bias = source.linear(linear.name, "cpu")
        found += [(f"{linear.name}.weight", weight)] + ([] if bias is None else [(f"{linear.name}.bias", bias)])
    return found + [(name, source.tensor(name)) for name, _, _ in plain_specs(dims)]


def autoencoder() -> comfy.sd.VAE:
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(FOLDER / AUTOENCODER)))
