"""qk_norm_rope_: RMSNorm of every q and k head and RoPE behind it, in place.

The formula is in qk_norm_rope_torch.py, the kernel in qk_norm_rope_triton.py.
"""

from __future__ import annotations

from torch import Tensor

from .qk_norm_rope_torch import check_qkv, qk_norm_rope_torch
from .targets import triton_reason


def qk_norm_rope_(qkv: Tensor, query_scale: Tensor, key_scale: Tensor, pe: Tensor | None, heads: int, eps: float = 1e-6) -> Tensor:
    """In place on qkv [B, L, >= 2 * heads * D] (last dimension contiguous; q heads, then k heads; the rest is untouched); returns it.

    query_scale, key_scale [D]; pe [B|1, 1, L, D/2, 2, 2], None for the norm alone. Any float types; both scales of one type, and none in
    fp64, save a cast. A head size that is no power of two takes the torch path.
    Raises ValueError when the shapes do not fit each other.
    """
    check_qkv(qkv, query_scale, key_scale, pe, heads)
    dim = query_scale.shape[0]
    if triton_reason(qkv.device, needs_dot=False) is not None or dim & (dim - 1) or qkv.stride(-1) != 1:
        return qk_norm_rope_torch(qkv, query_scale, key_scale, pe, heads, eps)
    from .qk_norm_rope_triton import qk_norm_rope_triton

    return qk_norm_rope_triton(qkv, query_scale, key_scale, pe, heads, eps)
