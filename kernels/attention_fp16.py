"""attention_fp16: exact attention through fp16 products that cannot overflow. Formula: attention_fp16_torch.py."""

from __future__ import annotations

from torch import Tensor

from .attention_fp16_torch import attention_fp16_torch, check_attention
from .targets import triton_reason


def attention_fp16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H, L, D], k and v [B, H, S, D] (fp16, bf16 or fp32; D 32, 64 or 128) -> [B, L, H * D] in q.dtype.

    Raises ValueError when the operands do not fit each other.
    """
    if triton_reason(q.device) is not None:
        return attention_fp16_torch(q, k, v)
    from .attention_fp16_triton import attention_fp16_triton

    check_attention(q, k, v)
    return attention_fp16_triton(q, k, v)
