"""The loader's cpu_offload: blocks that are streamed by us (enable), everything resident (disable), or all left to the host (auto)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...models.streaming import Streamer, leaves_of, room_for, sizes
from .exchange import is_loaded, keep_loaded

if TYPE_CHECKING:
    from .patcher import TonfaPatcher

log = logging.getLogger(__name__)

NO_LIMIT, NOTHING = 1e32, 0.1  # budgets as hosts give them


@dataclass(frozen=True)
class Offload:
    """mode: "auto", "enable" or "disable". With "enable": resident, how many of the first blocks stay on the device; pin, whether the
    others wait in page-locked memory."""

    mode: str = "auto"
    resident: int = 1
    pin: bool = True

    @property
    def streams(self) -> bool:
        return self.mode == "enable"

    def budget(self, given: float) -> float:
        """What the host is to load of the model, in bytes."""
        return {"enable": NOTHING, "disable": NO_LIMIT}.get(self.mode, given)


def streamed_blocks(model: nn.Module, offload: Offload) -> list[nn.Module]:
    """The blocks that pass through the device, in their order."""
    network = getattr(model, "diffusion_model", None)
    if not offload.streams or network is None:
        return []
    return network.blocks()[max(offload.resident, 0) :]


def streamed_nbytes(blocks: Sequence[nn.Module]) -> tuple[int, int]:
    """(bytes of the blocks' tensors, bytes of the ring that they pass through)."""
    found = [sizes(block) for block in blocks]
    return sum(own for own, _ in found), room_for([slab for _, slab in found])[1]


def streamer_of(model: nn.Module) -> Streamer | None:
    return getattr(model, "tonfa_streamer", None)


def start(patcher: TonfaPatcher, device: torch.device) -> None:
    """Loads what the host has left offloaded of the rest of the model, and starts streaming the blocks. The patcher hides its patches."""
    blocks = streamed_blocks(patcher.model, patcher.offload)
    passing = {leaf for block in blocks for leaf in leaves_of(block)}
    for name, module in patcher.model.named_modules():
        if hasattr(module, "comfy_cast_weights") and module not in passing and not is_loaded(module):
            keep_loaded(patcher, name, module, device)
    moved, buffers = streamed_nbytes(blocks)
    patcher.model.model_loaded_weight_memory = patcher.model_size() - moved  # with the few buffers that partial loads do not count
    old = streamer_of(patcher.model)
    if old is not None and old.device == device and old.blocks == blocks and old.pin == patcher.offload.pin and old.is_whole():
        return
    stop(patcher.model)
    patcher.model.tonfa_streamer = Streamer(blocks, device, patcher.model.diffusion_model, patcher.offload.pin)
    log.info("%d blocks (%.2f GB) are streamed through %.2f GB on %s.", len(blocks), moved / 1e9, buffers / 1e9, device)


def stop(model: nn.Module) -> None:
    """Ends the streaming, if there is any."""
    streamer = streamer_of(model)
    if streamer is not None:
        streamer.stop()
        model.tonfa_streamer = None
