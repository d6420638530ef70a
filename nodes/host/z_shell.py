"""ComfyUI's own Z-Image (its NextDiT class) around our blocks, with 4-bit linears inside.

Refiners that the file leaves in 16 bit are the host's own blocks. References, control, patches, wrappers, padding and position ids are the
host's code.
"""

from __future__ import annotations

from collections.abc import Callable

import comfy.ldm.lumina.model
import comfy.model_base
import comfy.supported_models
import torch
from torch import nn

from ...models.formats.packed import PackedCheckpoint
from ...models.formats.tensorfile import CheckpointError
from ...models.formats.zimage_names import STACKS
from ...models.z_image import ZImageBlock, build_blocks
from .base_model import SavesDense, accepted
from .ops import host_runtime


class TonfaZImage(comfy.ldm.lumina.model.NextDiT):
    """The host's transformer, in which blocks with 4-bit linears are ours."""

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
        config = accepted(comfy.ldm.lumina.model.NextDiT, config)
        depths = {"n_layers": config["n_layers"], "n_refiner_layers": config["n_refiner_layers"]}
        bare = {**config, **dict.fromkeys(depths, 0)}
        super().__init__(dtype=dtype, device=device, operations=operations, **bare)
        self.load_state_dict(checkpoint.outside_blocks(), strict=True)  # the block lists are still empty
        self.runtime = host_runtime()
        found = build_blocks(checkpoint, device=device, runtime=self.runtime, target=target, progress=progress)
        plain = checkpoint.plain_loaders()
        for stack in STACKS:
            depth = depths["n_layers" if stack == "layers" else "n_refiner_layers"]
            ours, blocks = found.get(stack, {}), nn.ModuleList()
            for i in range(depth):
                blocks.append(ours[i] if i in ours else self._host_block(stack, i, config, plain, dtype, device, operations))
            setattr(self, stack, blocks)

    def _host_block(
        self,
        stack: str,
        index: int,
        config: dict,
        plain: dict[str, Callable[[], torch.Tensor]],
        dtype: torch.dtype | None,
        device: torch.device | None,
        operations: object,
    ) -> nn.Module:
        """The host's own block with the file's 16-bit tensors."""
        one = {**config, "n_layers": int(stack == "layers"), "n_refiner_layers": int(stack != "layers")}
        shell = comfy.ldm.lumina.model.NextDiT(dtype=dtype, device="meta", operations=operations, **one)
        block = getattr(shell, stack)[0].to_empty(device=device)
        prefix = f"{stack}.{index}."
        block.load_state_dict({name.removeprefix(prefix): load() for name, load in plain.items() if name.startswith(prefix)}, strict=True)
        block.layer_id = index
        return block

    def blocks(self) -> list[nn.Module]:
        """Ours, in the order in which they run."""
        every = (*self.context_refiner, *self.noise_refiner, *self.layers)
        return [block for block in every if isinstance(block, ZImageBlock)]

    def cached_blocks(self) -> tuple[int, int]:
        """How many blocks, in one stage or two, the first-block cache is for: none where a main block is the host's own."""
        ours = all(isinstance(block, ZImageBlock) for block in self.layers)
        return (len(self.layers) if ours else 0), 0


class TonfaZModel(SavesDense, comfy.model_base.Lumina2):
    """The host's base model for Z-Image (LoRA key maps ask for this class)."""

    def __init__(self, config: object, device: torch.device, network: Callable):
        # Not Lumina2's own: it makes the transformer itself.
        comfy.model_base.BaseModel.__init__(self, config, comfy.model_base.ModelType.FLOW, device=device, unet_model=network)
        self.memory_usage_factor_conds = ("ref_latents",)


def settings(checkpoint: PackedCheckpoint) -> object:
    """The host's settings for a model of this file. CheckpointError where this host has no Z-Image."""
    if not hasattr(comfy.supported_models, "ZImage"):
        raise CheckpointError(
            f"{checkpoint.path} is Z-Image, which this ComfyUI does not have. Update ComfyUI to one of December 2025 or newer."
        )
    safe = allows_fp16(checkpoint)
    config = comfy.supported_models.ZImage({**checkpoint.config, "allow_fp16": safe})
    if not safe:  # hosts of 2025 do not ask
        config.supported_inference_dtypes = [dtype for dtype in config.supported_inference_dtypes if dtype != torch.float16]
    return config


def allows_fp16(checkpoint: PackedCheckpoint) -> bool:
    """Whether the host computes this model in float16 where it is asked to: its own rule, by the spread of one norm."""
    norm = checkpoint.plain_loaders().get(f"layers.{checkpoint.config['n_layers'] - 2}.ffn_norm1.weight")
    return norm is not None and float(norm().float().std(unbiased=False)) < 0.42


def make(config: object, checkpoint: PackedCheckpoint, device: torch.device, network: Callable) -> TonfaZModel:
    """The host's model on `device`; network makes the transformer."""
    return TonfaZModel(config, device, network)
