"""ComfyUI's own FLUX around our blocks: the host's forward, its model class and its sampling, with 4-bit linears inside.

References, control, patches, wrappers and position ids are the host's code; only the two block lists are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import comfy.ldm.flux.layers
import comfy.ldm.flux.model
import comfy.model_base
import comfy.ops
import comfy.supported_models
import torch
from torch import nn

from ...models.flux import build_blocks
from ...models.formats.packed import PackedCheckpoint
from .base_model import SavesDense
from .ops import host_runtime


def norm_parameter() -> str:
    """What the host calls the parameter of its q/k norms: `scale` before 2026-02, `weight` since."""
    norm = comfy.ldm.flux.layers.QKNorm(8, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    return next(name for name, _ in norm.query_norm.named_parameters())


class TonfaFlux(comfy.ldm.flux.model.Flux):
    """The host's FLUX, built without blocks, then given ours."""

    def __init__(
        self,
        image_model: str | None = None,
        final_layer: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        operations: object = None,
        *,
        checkpoint: PackedCheckpoint,
        target: torch.device,
        progress: Callable[[int, int], None] | None = None,
        **config: object,
    ):
        bare = {**config, "depth": 0, "depth_single_blocks": 0}
        super().__init__(image_model=image_model, final_layer=final_layer, dtype=dtype, device=device, operations=operations, **bare)
        self.params.depth, self.params.depth_single_blocks = config["depth"], config["depth_single_blocks"]
        self.load_state_dict(checkpoint.outside_blocks(), strict=True)  # the block lists are still empty
        self.runtime = host_runtime()
        self.double_blocks, self.single_blocks = build_blocks(
            checkpoint, device=device, runtime=self.runtime, norm_param=norm_parameter(), target=target, progress=progress
        )

    def blocks(self) -> list[nn.Module]:
        """In the order in which they run."""
        return [*self.double_blocks, *self.single_blocks]

    def cached_blocks(self) -> tuple[int, int]:
        """How many blocks of either kind the first-block cache is for."""
        return len(self.double_blocks), len(self.single_blocks)


class TonfaModel(SavesDense, comfy.model_base.Flux):
    """The host's base model for FLUX (LoRA key maps ask for this class)."""


def unet_config(found: Mapping) -> dict:
    """A checkpoint's configuration as this host's FluxParams takes it: no field unknown to it, none missing that newer hosts ask for."""
    known = comfy.ldm.flux.model.FluxParams.__dataclass_fields__
    config = {"image_model": "flux", **{k: v for k, v in found.items() if k in known}}
    if "txt_ids_dims" in known:
        config.setdefault("txt_ids_dims", [])
    return config


def settings(checkpoint: PackedCheckpoint) -> comfy.supported_models.Flux:
    """The host's settings for a model of this file."""
    kind = comfy.supported_models.FluxSchnell if is_schnell(checkpoint) else comfy.supported_models.Flux
    return kind(unet_config(checkpoint.config))


def make(config: comfy.supported_models.Flux, checkpoint: PackedCheckpoint, device: torch.device, network: Callable) -> TonfaModel:
    """The host's model on `device`; network makes the transformer."""
    model_type = comfy.model_base.ModelType.FLOW if is_schnell(checkpoint) else comfy.model_base.ModelType.FLUX
    return TonfaModel(config, model_type=model_type, device=device, unet_model=network)


def is_schnell(checkpoint: PackedCheckpoint) -> bool:
    return checkpoint.model_class == "FluxSchnell"
