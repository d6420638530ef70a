"""The 4-bit linears of the T5 text encoder, inside whatever network a host builds for it.

y = x @ (code * scale + zero)^T, and what LoRA puts beside it. Bytes: kernels/t5_layout.py; file: formats/awq.py.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from ..kernels.t5_layout import T5Spec, T5View, pack, read_spec, views
from ..kernels.t5_linear import t5_linear
from ..kernels.t5_linear_torch import t5_weight
from .formats.awq import AwqT5
from .formats.tensorfile import CheckpointError
from .linear import PackedLeaf
from .runtime import Runtime

LOADERS = 4  # layers that are read and re-packed at a time


class PackedT5Linear(PackedLeaf):
    """`weight`: uint8 [spec.nbytes], no bias."""

    spec: T5Spec

    def __init__(self, weight: Tensor, runtime: Runtime):
        super().__init__(read_spec(weight), weight, None, runtime)

    def make_views(self, blob: Tensor) -> T5View:
        return views(self.spec, blob)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's type (fp16, bf16 or fp32)."""
        with self.runtime.acquire(self, x.device) as (blob, _):
            y = self._four_bit(x.reshape(x.shape[:-1].numel(), x.shape[-1]), blob).view(*x.shape[:-1], self.out_features)
        return y if self._side is None else self._side.add(self.spec, y, x)

    def _four_bit(self, x: Tensor, blob: Tensor) -> Tensor:
        """x [M, K] -> [M, N] without the side."""
        if torch.compiler.is_compiling():
            from . import ops

            return ops.t5_linear(x, blob, self.spec)
        return t5_linear(x, self.views(blob))

    def convert_weight(self, weight: Tensor, inplace: bool = False, **_: object) -> Tensor:
        return t5_weight(views(self.spec, weight.to(torch.uint8)), 0, self.out_features)


def put_linears(
    network: nn.Module,
    awq: AwqT5,
    runtime: Runtime,
    device: torch.device,
    target: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Puts the file's 4-bit linears in the places of `network` that have their names. Only a few at a time are in memory twice.

    network: the T5, with Hugging Face's names inside. device: where they lie. target: where they are re-packed.
    Raises CheckpointError where the network has no such place, or one of another size.
    """
    places = {prefix: _place(network, awq, prefix) for prefix in awq.quantised}

    def make(prefix: str) -> Tensor:
        layer = awq.linear(prefix, target)
        size, wanted = (layer.n, layer.k), places[prefix]
        if size != wanted:
            raise CheckpointError(f"{awq.path}: {prefix} is {size[0]} x {size[1]}, expected {wanted[0]} x {wanted[1]}.")
        return pack(layer).to(device)

    # Copies to and from a GPU wait for pages of ordinary memory, so several at a time; on the CPU re-packing uses all cores by itself.
    pool = ThreadPoolExecutor(LOADERS if target.type == "cuda" else 1, thread_name_prefix="tonfa-t5")
    try:
        for done, (prefix, blob) in enumerate(zip(places, pool.map(make, places), strict=True)):
            parent, _, name = prefix.rpartition(".")
            setattr(network.get_submodule(parent), name, PackedT5Linear(blob, runtime))
            progress(done + 1, len(places))
    finally:
        pool.shutdown(cancel_futures=True)


def _place(network: nn.Module, awq: AwqT5, prefix: str) -> tuple[int, int]:
    """(N, K) of the network's own linear of that name."""
    try:
        place = network.get_submodule(prefix)
    except AttributeError as error:
        raise CheckpointError(f"{awq.path} has a layer {prefix} that this ComfyUI's T5 has no place for.") from error
    return place.out_features, place.in_features
