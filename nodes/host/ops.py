"""What our blocks get from ComfyUI: attention, weights on the right device, the cancel check. Features are looked for, never versions."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn

from ...models.runtime import Runtime


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    pe: Tensor | None = None,
    mask: Tensor | None = None,
    transformer_options: dict | None = None,
) -> Tensor:
    """The host's own FLUX attention, RoPE included: q, k, v [B, H, L, D] -> [B, L, H * D]. Looked up at each call: a replacement counts."""
    return comfy.ldm.flux.math.attention(q, k, v, pe=pe, mask=mask, transformer_options=transformer_options or {})


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, transformer_options: dict | None = None) -> Tensor:
    """The host's attention back end on q, k, v [B, H, L, D] whose positions are already applied -> [B, L, H * D]."""
    run = comfy.ldm.modules.attention.optimized_attention
    return run(q, k, v, heads, skip_reshape=True, mask=mask, transformer_options=transformer_options or {})


@contextlib.contextmanager
def acquire(module: nn.Module, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The module's weight and bias on `device`, unchanged in type: its own when they lie there, else through the host's streaming.

    The host's bias functions (a LoRA's bias in an offloaded layer) are applied; packed weights have no weight functions (see patcher.py).
    """
    weight, bias = module.weight, module.bias
    at_home = weight.device == torch.device(device) and not module.comfy_cast_weights and not hasattr(module, "_v")
    if at_home and not module.weight_function and not module.bias_function:
        yield weight, bias
        return
    asked = {"dtype": weight.dtype, "device": torch.device(device), "bias_dtype": weight.dtype if bias is None else bias.dtype}
    if "offloadable" not in inspect.signature(comfy.ops.cast_bias_weight).parameters:
        yield comfy.ops.cast_bias_weight(module, None, **asked)
        return
    weight, bias, stream = comfy.ops.cast_bias_weight(module, None, offloadable=True, **asked)
    try:
        yield weight, bias
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)


def check_cancel() -> None:
    """Raises the host's interruption when the user has pressed cancel."""
    every_op = getattr(comfy.ops, "run_every_op", None)
    (every_op or comfy.model_management.throw_exception_if_processing_interrupted)()


def host_runtime() -> Runtime:
    return Runtime(attention=attention, attend=attend, acquire=acquire, check_cancel=check_cancel)
