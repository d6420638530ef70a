"""ComfyUI's own Qwen-Image around our blocks: text to image, Edit (2509, 2511) and Layered, with 4-bit linears inside.

References and their methods, control, patches, wrappers and position ids are the host's code; only the list of blocks is ours.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable

import comfy.ldm.qwen_image.model
import comfy.model_base
import comfy.supported_models
import torch
from torch import nn

from ...models.formats.packed import PackedCheckpoint
from ...models.formats.qwen_names import INDEX_TIMESTEP_ZERO
from ...models.formats.tensorfile import CheckpointError
from ...models.qwen_image import build_blocks
from .base_model import SavesDense, accepted
from .ops import host_runtime

log = logging.getLogger(__name__)


class TonfaQwenImage(comfy.ldm.qwen_image.model.QwenImageTransformer2DModel):
    """The host's transformer, built without blocks, then given ours."""

    def __init__(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        operations: object = None,
        *,
        checkpoint: PackedCheckpoint,
        target: torch.device,
        progress: Callable[[int, int], None] | None = None,
        **config: object,
    ):
        super().__init__(dtype=dtype, device=device, operations=operations, **{**config, "num_layers": 0})
        outside = checkpoint.outside_blocks()
        if INDEX_TIMESTEP_ZERO in self.state_dict():  # a mark without content, which the file's metadata may stand for
            outside.setdefault(INDEX_TIMESTEP_ZERO, torch.tensor([]))
        else:
            outside.pop(INDEX_TIMESTEP_ZERO, None)
        self.load_state_dict(outside, strict=True)
        self.runtime = host_runtime()
        self.transformer_blocks = build_blocks(checkpoint, device=device, runtime=self.runtime, target=target, progress=progress)

    def blocks(self) -> list[nn.Module]:
        """In the order in which they run."""
        return list(self.transformer_blocks)

    def cached_blocks(self) -> tuple[int, int]:
        """How many blocks, in one stage or two, the first-block cache is for."""
        return len(self.transformer_blocks), 0


class TonfaQwenModel(SavesDense, comfy.model_base.QwenImage):
    """The host's base model for Qwen-Image (LoRA key maps ask for this class)."""

    def __init__(self, config: comfy.supported_models.QwenImage, device: torch.device, network: Callable):
        flow = comfy.model_base.ModelType.FLUX
        if "unet_model" in inspect.signature(comfy.model_base.QwenImage.__init__).parameters:
            super().__init__(config, model_type=flow, device=device, unet_model=network)
            return
        # In 2025 QwenImage's own makes the transformer itself.
        comfy.model_base.BaseModel.__init__(self, config, flow, device=device, unet_model=network)
        self.memory_usage_factor_conds = ("ref_latents",)


def unet_config(checkpoint: PackedCheckpoint) -> dict:
    """The file's configuration as this host's class takes it; a warning for what it does not know."""
    config = accepted(comfy.ldm.qwen_image.model.QwenImageTransformer2DModel, checkpoint.config)
    if "use_additional_t_cond" in checkpoint.config and "use_additional_t_cond" not in config:
        raise CheckpointError(
            f"{checkpoint.path} is Qwen-Image-Layered, which this ComfyUI does not have. Update ComfyUI to one of 2026 or newer."
        )
    if "default_ref_method" in checkpoint.config and "default_ref_method" not in config:
        log.warning(
            "%s wants the reference method '%s', which this ComfyUI does not have: its pictures will be off. Update ComfyUI.",
            checkpoint.path, checkpoint.config["default_ref_method"],
        )  # fmt: skip
    return config


def settings(checkpoint: PackedCheckpoint) -> comfy.supported_models.QwenImage:
    """The host's settings for a model of this file."""
    return comfy.supported_models.QwenImage(unet_config(checkpoint))


def make(config: object, checkpoint: PackedCheckpoint, device: torch.device, network: Callable) -> TonfaQwenModel:
    """The host's model on `device`; network makes the transformer."""
    return TonfaQwenModel(config, device, network)
