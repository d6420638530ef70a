"""Compiles the kernels a model will need in threads, while its file is still being loaded.

A Triton kernel compiles where it is first launched, one after the other, in seconds each: the first image would wait for all of them.
So the first block of each kind is run once on a few tokens: what it launches is what every other block launches, and hardly a kernel
depends on the number of tokens. Later starts find the kernels in Triton's cache on disk.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..kernels.targets import resolve_compute, triton_reason
from ..kernels.tiles import ALL_TILES
from . import flux, qwen_image, z_image
from .formats.packed import PackedCheckpoint

log = logging.getLogger(__name__)

TOKENS = 512  # of either stream: enough for the kernels for many tokens, in every tile


def warm_up(checkpoint: PackedCheckpoint, device: torch.device, dtype: torch.dtype, compute: str = "auto") -> Callable[[], None]:
    """Starts compiling for the device; returns what waits for it. Nothing that fails here is raised: the first image would show it too.

    dtype: of the activations. compute: as the loader's input of that name.
    """
    if device.type != "cuda" or triton_reason(device) is not None or resolve_compute(compute, device) == "weight_only":
        return lambda: None
    pool = ThreadPoolExecutor(2, thread_name_prefix="tonfa-warm-up")
    kinds = tuple(KINDS[checkpoint.family])
    jobs = [pool.submit(_run_block, checkpoint, kind, device, dtype, compute) for kind in kinds]

    def wait() -> None:
        for kind, job in zip(kinds, jobs, strict=True):
            error = job.exception()
            if error is not None:
                log.debug("Compiling the %s block's kernels ahead failed: %s: %s", kind, type(error).__name__, error)
        pool.shutdown()

    return wait


@torch.inference_mode()
def _run_block(checkpoint: PackedCheckpoint, kind: str, device: torch.device, dtype: torch.dtype, compute: str) -> None:
    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    every_tile = ALL_TILES.set(True)  # in this thread only
    try:
        KINDS[checkpoint.family][kind](checkpoint, device, noise, {"tonfa": {"compute": compute}})
    finally:
        ALL_TILES.reset(every_tile)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


Noise = Callable[..., Tensor]


def _flux_double(checkpoint: PackedCheckpoint, device: torch.device, noise: Noise, options: dict) -> None:
    config = checkpoint.config
    shallow = dataclasses.replace(checkpoint, config={**config, "depth": 1, "depth_single_blocks": 0})
    (block,), _ = flux.build_blocks(shallow, device=device, target=device)
    width, pe = config["hidden_size"], _table(config["axes_dim"], config["theta"], device)
    block(noise(1, TOKENS, width), noise(1, TOKENS, width), noise(1, width), pe, transformer_options=options)


def _flux_single(checkpoint: PackedCheckpoint, device: torch.device, noise: Noise, options: dict) -> None:
    config = checkpoint.config
    shallow = dataclasses.replace(checkpoint, config={**config, "depth": 0, "depth_single_blocks": 1})
    _, (block,) = flux.build_blocks(shallow, device=device, target=device)
    width, pe = config["hidden_size"], _table(config["axes_dim"], config["theta"], device)
    block(noise(1, 2 * TOKENS, width), noise(1, width), pe, transformer_options=options)


def _qwen_image(checkpoint: PackedCheckpoint, device: torch.device, noise: Noise, options: dict) -> None:
    config = checkpoint.config
    (block,) = qwen_image.build_blocks(dataclasses.replace(checkpoint, config={**config, "num_layers": 1}), device=device, target=device)
    width, pe = block.dim, _table(config["axes_dims_rope"], 10000.0, device).to(noise(1).dtype)
    block(noise(1, TOKENS, width), noise(1, TOKENS, width), None, noise(1, width), pe, transformer_options=options)


def _z_image(checkpoint: PackedCheckpoint, device: torch.device, noise: Noise, options: dict) -> None:
    config, dims = checkpoint.config, dataclasses.replace(checkpoint.dims, depth=1, refiners=0)
    block = z_image.build_blocks(dataclasses.replace(checkpoint, dims=dims), device=device, target=device)["layers"][0]
    pe = _table(config["axes_dims"], config["rope_theta"], device).transpose(1, 2)
    times = noise(1, block.adaLN_modulation[0].in_features)
    block(noise(1, 2 * TOKENS, block.dim), None, pe, times, transformer_options=options)


def _table(axes: list[int], theta: float, device: torch.device) -> Tensor:
    """pe [1, 1, 2 * TOKENS, d/2, 2, 2]."""
    ids = torch.zeros(1, 2 * TOKENS, len(axes), device=device)
    ids[..., -1] = torch.arange(2 * TOKENS, device=device)
    return flux.rope_table(ids, axes, theta)


# Of every family the kinds of blocks between which kernels differ.
KINDS = {
    "flux": {"double": _flux_double, "single": _flux_single},
    "qwen-image": {"joint": _qwen_image},
    "z-image": {"main": _z_image},
}
