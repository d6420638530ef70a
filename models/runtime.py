"""What the blocks need from whoever runs them: attention, a weight on the right device, a cancel check.

The defaults are plain torch. nodes/host builds the ComfyUI one, so that overrides, offloading and cancelling stay the host's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import attend
from .graphs import Graphs


def apply_rope(x: Tensor, pe: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, L, D] by pe [B|1, 1, L, D/2, 2, 2]: (x0, x1) pairs times 2x2 matrices, in pe's type; x's type out."""
    pairs = x.to(pe.dtype).reshape(*x.shape[:-1], -1, 1, 2)
    return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).reshape(x.shape).to(x.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    pe: Tensor | None = None,
    mask: Tensor | None = None,
    transformer_options: dict | None = None,
) -> Tensor:
    """As `attend`, for q and k before RoPE."""
    if pe is not None:
        q, k = apply_rope(q, pe), apply_rope(k, pe)
    return attend(q, k, v, heads, mask, transformer_options)


def own_tensors(module: nn.Module, device: torch.device) -> AbstractContextManager[tuple[Tensor, Tensor | None]]:
    """The module's own weight and bias on `device`; copied there for the length of the call if they lie elsewhere."""
    bias = module.bias
    return contextlib.nullcontext((module.weight.to(device), None if bias is None else bias.to(device)))


def lies_on(module: nn.Module, device: torch.device) -> bool:
    """Whether every parameter of the module lies on the device."""
    return all(p is None or p.device == device for p in module._parameters.values())


def held(module: nn.Module, device: torch.device) -> Mapping[str, Tensor | None] | None:
    """The module's own parameters, where they lie on the device."""
    return module._parameters if lies_on(module, device) else None


@dataclass(frozen=True)
class Runtime:
    """The host's services, as functions of tensors.

    attention(q, k, v, heads, pe, mask, transformer_options): q, k [B, H, L, D] before RoPE -> [B, L, H * D].
    attend(q, k, v, heads, mask, transformer_options): the same after RoPE.
    acquire(module, device): context manager giving (weight, bias) on the device, unchanged in type; the module's own where they are there.
    check_cancel(): called once a block, outside compiled code; raises to stop.
    held(module, device): the module's parameters by name where acquire gives the same tensors at every call; None where it makes them.
    attention_in_use(): what `attend` goes to, as something to compare by equality; None where it may do more than compute.
    graphs: where blocks are recorded as CUDA graphs; None to leave it.
    """

    attention: Callable[..., Tensor] = attention
    attend: Callable[..., Tensor] = attend
    acquire: Callable[[nn.Module, torch.device], AbstractContextManager[tuple[Tensor, Tensor | None]]] = own_tensors
    check_cancel: Callable[[], None] = lambda: None
    held: Callable[[nn.Module, torch.device], Mapping[str, Tensor | None] | None] = held
    attention_in_use: Callable[[], object] = lambda: attend
    graphs: Graphs | None = None
