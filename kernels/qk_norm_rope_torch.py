"""RMSNorm of q and k heads, then RoPE, in torch: the oracle of qk_norm_rope.py and the path without Triton."""

from __future__ import annotations


from torch import Tensor
from torch.nn import functional as F


def qk_norm_rope_(qkv: Tensor, query_scale: Tensor, key_scale: Tensor, pe: Tensor, heads: int, eps: float = 1e-6) -> Tensor:
    """In place on qkv [B, L, >= 2 * heads * D] (q heads, k heads, ...; v untouched).

    head <- round(head / rms(head) * scale), then pairs (x0, x1) <- pe @ (x0, x1), rounded; fp32 inside.
    query_scale, key_scale [D]; pe [B|1, 1, L, D/2, 2, 2] fp32. RMSNorm: arXiv 1910.07467; RoPE: arXiv 2104.09864.
    """
    dim = query_scale.shape[0]
    for i, scale in enumerate((query_scale, key_scale)):
        part = qkv[..., i * heads * dim : (i + 1) * heads * dim].unflatten(-1, (heads, dim))  # [B, L, H, D]
        x = F.rms_norm(part.float(), (dim,), scale.float(), eps).to(qkv.dtype).float()
        pairs = x.unflatten(-1, (dim // 2, 1, 2))
        table = pe.transpose(1, 2)  # [B|1, L, 1, D/2, 2, 2]
        part.copy_((table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]).flatten(-2))
    return qkv
