"""What our blocks get from ComfyUI: attention, weights on the right device, the cancel check. Features are looked for, never versions."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import ModuleType

import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn

from ...models.attention import fastest, wants_fp16
from ...models.graphs import Graphs
from ...models.runtime import Runtime, apply_rope, lies_on


def host_made(function: Callable, module: ModuleType) -> Callable | None:
    """The function, unless something (a custom node that came first) has put its own in the host's place."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return function if code is not None and code.co_filename == module.__file__ else None


# What the host attends with when nobody has chosen anything else. Compared by identity at every call: a replacement counts at once.
STOCK_ATTENTION = host_made(comfy.ldm.modules.attention.attention_pytorch, comfy.ldm.modules.attention)
STOCK_FLUX = host_made(comfy.ldm.flux.math.attention, comfy.ldm.flux.math)


def chosen_attention() -> Callable:
    """The host's attention: what was put in place of it in either module that a FLUX block's call goes through, else its own choice."""
    general = comfy.ldm.modules.attention.optimized_attention
    return general if general is not STOCK_ATTENTION else comfy.ldm.flux.math.optimized_attention


def host_attention() -> Callable | None:
    """The chosen attention where it is one of the host's own: another may look at the step or count its calls."""
    return host_made(chosen_attention(), comfy.ldm.modules.attention)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    pe: Tensor | None = None,
    mask: Tensor | None = None,
    transformer_options: dict | None = None,
) -> Tensor:
    """The host's FLUX attention, RoPE included: q, k, v [B, H, L, D] -> [B, L, H * D].

    Where nobody has changed it: our RoPE and `attend`, which the fused path uses too, so that both paths agree.
    """
    options = transformer_options or {}
    if comfy.ldm.flux.math.attention is not STOCK_FLUX or "optimized_attention_override" in options:
        return comfy.ldm.flux.math.attention(q, k, v, pe=pe, mask=mask, transformer_options=options)
    if pe is not None:
        q, k = apply_rope(q, pe), apply_rope(k, pe)
    return attend(q, k, v, heads, mask, options)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, transformer_options: dict | None = None) -> Tensor:
    """The host's attention back end on q, k, v [B, H, L, D] whose positions are already applied -> [B, L, H * D].

    The host's plain one (torch's) is taken to mean "no choice made": then cuDNN on the GPUs where it is the fastest.
    """
    options = transformer_options or {}
    run = chosen_attention()
    if run is STOCK_ATTENTION and "optimized_attention_override" not in options:
        out = fastest(q, k, v, mask, wants_fp16(options))
        if out is not None:
            return out
    return run(q, k, v, heads, skip_reshape=True, mask=mask, transformer_options=options)


def acquire(module: nn.Module, device: torch.device) -> AbstractContextManager[tuple[Tensor, Tensor | None]]:
    """The module's weight and bias on `device`, unchanged in type: its own when they lie there, else through our streaming or the host's.

    The host's bias functions (a LoRA's bias in an offloaded layer) are applied; packed weights have no weight functions (see patcher.py).
    """
    found = held(module, device)
    return streamed(module, device) if found is None else contextlib.nullcontext((found.get("weight"), found.get("bias")))


def held(module: nn.Module, device: torch.device) -> Mapping[str, Tensor | None] | None:
    """The parameters that the module computes with, by name: its own as they lie on the device, or our streaming's. None: see acquire."""
    changed = module.comfy_cast_weights or hasattr(module, "_v") or module.weight_function or module.bias_function
    if not changed and lies_on(module, device):
        return module._parameters
    streamer = getattr(module, "streamer", None)
    if streamer is None or streamer.device != device or module.bias_function:
        return None
    return streamer.tensors(module)


@contextlib.contextmanager
def streamed(module: nn.Module, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The module's weight and bias as the host brings them to the device."""
    weight, bias = module.weight, module.bias
    asked = {"dtype": weight.dtype, "device": device, "bias_dtype": weight.dtype if bias is None else bias.dtype}
    if not hands_back(comfy.ops.cast_bias_weight):
        yield comfy.ops.cast_bias_weight(module, None, **asked)
        return
    weight, bias, stream = comfy.ops.cast_bias_weight(module, None, offloadable=True, **asked)
    try:
        yield weight, bias
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)


@functools.lru_cache(maxsize=4)
def hands_back(cast: Callable) -> bool:
    """Whether this host's cast_bias_weight wants its buffers back (2025-11 on)."""
    return "offloadable" in inspect.signature(cast).parameters


def check_cancel() -> None:
    """Raises the host's interruption when the user has pressed cancel."""
    every_op = getattr(comfy.ops, "run_every_op", None)
    (every_op or comfy.model_management.throw_exception_if_processing_interrupted)()


def host_runtime() -> Runtime:
    return Runtime(
        attention=attention, attend=attend, acquire=acquire, check_cancel=check_cancel, held=held,
        attention_in_use=host_attention, graphs=Graphs(),
    )  # fmt: skip
