"""Exact attention by the back end that is fastest on this GPU, chosen once for every shape.

    softmax(q k^T / sqrt(D) + mask) v                                   q, k, v [B, H, L, D] -> [B, H, L, D]

cuDNN from sm_90 on, wherever torch says that it takes the operands; our kernel (kernels/attention_fp16.py) where torch has no fused one for
them and would write the scores to memory; else torch's own choice. One H200, bf16, 4608 tokens, 24 heads of 128: cuDNN 405 us, torch's
choice (flash 2) 791; with a mask 800 and 2106; never slower from 64 tokens on.

cuDNN is called by its own torch operator. torch's context manager for choosing a back end sets flags of the whole process, which other
threads see, and costs 30 us a call; the operator does neither.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.attention_fp16 import attention_fp16
from ..kernels.attention_fp16_torch import HEAD_DIMS
from ..kernels.targets import target_for, triton_reason

log = logging.getLogger(__name__)

FP16 = "nunchaku-fp16"
MOST_SHAPES = 1024  # remembered; then the choice starts afresh

_takes: dict[tuple, bool] = {}  # (device, type, shapes, mask) -> does cuDNN take it?


def prefers_cudnn(device: torch.device) -> bool:
    """Whether cuDNN is the fastest on this device, whatever the shape."""
    name = target_for(device).name
    return name.startswith("sm_") and int(name[3:]) >= 90


def cudnn_takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether cuDNN is there, is preferred on this device and takes these operands, by what torch says of it."""
    if not prefers_cudnn(q.device) or not hasattr(torch.backends.cuda, "can_use_cudnn_attention"):
        return False
    if mask is not None and (mask.dtype not in (torch.bool, q.dtype) or mask.ndim != 4):
        return False
    return torch.backends.cuda.can_use_cudnn_attention(torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, False, False), False)


def cudnn_operator(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What scaled_dot_product_attention does when it has chosen cuDNN, outside training."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, added(mask, q.dtype), False)[0]


def added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as one that is added to the scores: a boolean one says where to look."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))


def by_cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor | None:
    """Attention of q, k, v [B, H, L, D] by cuDNN, or None where torch's (or a host's) own choice should be taken."""
    shape = None if mask is None else (mask.dtype, mask.shape)
    key = (q.device, q.dtype, q.shape, k.shape, shape)
    takes = _takes.get(key)
    if takes is None:
        if len(_takes) >= MOST_SHAPES:
            _takes.clear()
        takes = _takes[key] = cudnn_takes(q, k, v, mask)
        _tell(q.device, q.dtype, q.shape[-1], mask is not None, takes)
    if not takes or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return None
    try:
        return cudnn_operator(q, k, v, mask)
    except RuntimeError as error:
        text = str(error).strip() or "no message"
        if isinstance(error, torch.OutOfMemoryError) or text.startswith("CUDA error"):  # these say nothing about cuDNN
            raise
        _takes[key] = False
        log.warning("cuDNN attention fails for q %s, k %s (%s): torch's own is used.", list(q.shape), list(k.shape), text.splitlines()[0])
        return None


@functools.lru_cache(maxsize=256)
def _tell(device: torch.device, dtype: torch.dtype, dim: int, masked: bool, cudnn: bool) -> None:
    """One log line for each kind of attention; the cache is what makes it one."""
    what = f"{str(dtype).removeprefix('torch.')}, heads of {dim}{', masked' if masked else ''}"
    log.info("Attention on %s (%s): %s.", device, what, "cuDNN" if cudnn else "the default")


@functools.lru_cache(maxsize=256)
def by_kernel(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether our own kernel attends to heads like these: where torch has no fused one, and Triton runs. Said once."""
    if device.type != "cuda" or dim not in HEAD_DIMS or dtype == torch.float64 or triton_reason(device) is not None:
        return False
    if torch_fuses(torch.empty(1, 1, 128, dim, dtype=dtype, device=device)):
        return False
    log.info("Attention on %s (%s, heads of %d): ours, since torch has no fused one.", device, str(dtype).removeprefix("torch."), dim)
    return True


def torch_fuses(x: Tensor) -> bool:
    """Whether torch has a fused kernel for attention of operands like x [B, H, L, D]."""
    asked = torch.backends.cuda.SDPAParams(x, x, x, None, 0.0, False, False)
    return torch.backends.cuda.can_use_flash_attention(asked, False) or torch.backends.cuda.can_use_efficient_attention(asked, False)


def with_heads(mask: Tensor | None) -> Tensor | None:
    """A mask [L, L] or [B, L, L] as [B, 1, L, L]."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask.unsqueeze(1)


def heads_last(x: Tensor) -> Tensor:
    """[B, H, L, D] -> [B, L, H * D]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, transformer_options: dict | None = None) -> Tensor:
    """Exact attention of q, k, v [B, H, L, D] (position already applied) -> [B, L, H * D]. mask: [L, L], [B, L, L] or [B, H or 1, L, L]."""
    out = fastest(q, k, v, mask, wants_fp16(transformer_options))
    return heads_last(F.scaled_dot_product_attention(q, k, v, attn_mask=with_heads(mask))) if out is None else out


def wants_fp16(transformer_options: dict | None) -> bool:
    """Whether the loader's `attention` allows products in fp16 ("nunchaku-fp16", the default)."""
    return (transformer_options or {}).get("tonfa", {}).get("attention", FP16) == FP16


def fastest(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, fp16: bool = True) -> Tensor | None:
    """As `attend` where this module knows better than torch's default, else None. fp16: our kernel, which multiplies in fp16, may run."""
    if torch.compiler.is_compiling():
        from . import ops

        return ops.attend(q, k, v, with_heads(mask)) if ops.prefers_cudnn(q.device) else None
    out = by_cudnn(q, k, v, with_heads(mask))
    if out is not None:
        return heads_last(out)
    return attention_fp16(q, k, v) if fp16 and mask is None and by_kernel(q.device, q.dtype, q.shape[-1]) else None


def attend_now(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As `attend`, for a mask that has heads, outside tracing."""
    out = by_cudnn(q, k, v, mask)
    return heads_last(F.scaled_dot_product_attention(q, k, v, attn_mask=mask) if out is None else out)
