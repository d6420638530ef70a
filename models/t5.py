"""The 4-bit linears of the T5 text encoder, inside whatever network a host builds for it.

y = x @ (code * scale + zero)^T, and what LoRA puts beside it. Bytes: kernels/t5_layout.py; file: formats/awq.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..kernels.t5_layout import T5Spec, pack, read_spec, views
from ..kernels.t5_linear import t5_linear
from ..kernels.t5_linear_torch import t5_weight
from .formats.awq import AwqT5
from .formats.tensorfile import CheckpointError
from .linear import PackedLeaf
from .runtime import Runtime


class PackedT5Linear(PackedLeaf):
    """`weight`: uint8 [spec.nbytes], no bias."""

    spec: T5Spec

    def __init__(self, weight: Tensor, runtime: Runtime):
        super().__init__(read_spec(weight), weight, None, runtime)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's type (fp16, bf16 or fp32)."""
        with self.runtime.acquire(self, x.device) as (blob, _):
            y = t5_linear(x.reshape(x.shape[:-1].numel(), self.in_features), views(self.spec, blob)).view(*x.shape[:-1], self.out_features)
        return y if self._side is None else self._side.add(self.spec, y, x)

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
    """Puts the file's 4-bit linears in the places of `network` that have their names. One at a time is in memory twice.

    network: the T5, with Hugging Face's names inside. device: where they lie. target: where they are re-packed.
    Raises CheckpointError where the network has no such place, or one of another size.
    """
    for done, prefix in enumerate(awq.quantised):
        parent, _, name = prefix.rpartition(".")
        try:
            place = getattr(network.get_submodule(parent), name)
        except AttributeError as error:
            raise CheckpointError(f"{awq.path} has a layer {prefix} that this ComfyUI's T5 has no place for.") from error
        layer = awq.linear(prefix, target)
        size, wanted = (layer.n, layer.k), (place.out_features, place.in_features)
        if size != wanted:
            raise CheckpointError(f"{awq.path}: {prefix} is {size[0]} x {size[1]}, expected {wanted[0]} x {wanted[1]}.")
        setattr(network.get_submodule(parent), name, PackedT5Linear(pack(layer).to(device), runtime))
        progress(done + 1, len(awq.quantised))
