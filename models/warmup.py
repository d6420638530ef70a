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

from ..kernels.targets import resolve_compute, triton_reason
from ..kernels.tiles import ALL_TILES
from .flux import build_blocks, rope_table
from .formats.checkpoint import FluxCheckpoint

log = logging.getLogger(__name__)

TOKENS = 512  # of either stream: enough for the kernels for many tokens, in every tile


def warm_up(checkpoint: FluxCheckpoint, device: torch.device, dtype: torch.dtype, compute: str = "auto") -> Callable[[], None]:
    """Starts compiling for the device; returns what waits for it. Nothing that fails here is raised: the first image would show it too.

    dtype: of the activations. compute: as the loader's input of that name.
    """
    if device.type != "cuda" or triton_reason(device) is not None or resolve_compute(compute, device) == "weight_only":
        return lambda: None
    pool = ThreadPoolExecutor(2, thread_name_prefix="tonfa-warm-up")
    kinds = ("double", "single")
    jobs = [pool.submit(_run_block, checkpoint, kind, device, dtype, compute) for kind in kinds]

    def wait() -> None:
        for kind, job in zip(kinds, jobs, strict=True):
            error = job.exception()
            if error is not None:
                log.debug("Compiling the %s block's kernels ahead failed: %s: %s", kind, type(error).__name__, error)
        pool.shutdown()

    return wait


@torch.inference_mode()
def _run_block(checkpoint: FluxCheckpoint, kind: str, device: torch.device, dtype: torch.dtype, compute: str) -> None:
    config = checkpoint.config
    depths = {"depth": int(kind == "double"), "depth_single_blocks": int(kind == "single")}
    shallow = dataclasses.replace(checkpoint, config={**config, **depths})
    double, single = build_blocks(shallow, device=device, target=device)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    ids = torch.zeros(1, 2 * TOKENS, len(config["axes_dim"]), device=device)
    ids[..., -1] = torch.arange(2 * TOKENS, device=device)
    pe = rope_table(ids, config["axes_dim"], config["theta"])
    width, options = config["hidden_size"], {"tonfa": {"compute": compute}}
    every_tile = ALL_TILES.set(True)  # in this thread only
    try:
        for block in double:
            block(noise(1, TOKENS, width), noise(1, TOKENS, width), noise(1, width), pe, transformer_options=options)
        for block in single:
            block(noise(1, 2 * TOKENS, width), noise(1, width), pe, transformer_options=options)
    finally:
        ALL_TILES.reset(every_tile)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
