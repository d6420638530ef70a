"""Oracle of qk_norm_rope_: RMSNorm of q and k heads, then RoPE, in plain torch.

    x  = round(x / sqrt(mean(x^2) + eps) * scale)                    per head of D, fp32 inside
    x' = round([pe00 x0 + pe01 x1, pe10 x0 + pe11 x1])               per pair (x0, x1) = (x[2i], x[2i+1]), fp32 inside

RMSNorm: arXiv 1910.07467. RoPE: arXiv 2104.09864, tables as FLUX makes them (a 2x2 matrix a pair).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def check_qkv(qkv: Tensor, query_scale: Tensor, key_scale: Tensor, pe: Tensor | None, heads: int) -> None:
    """Raises ValueError when the shapes do not fit each other."""
    dim = query_scale.shape[0]
    if qkv.ndim != 3 or qkv.shape[2] < 2 * heads * dim or key_scale.shape != query_scale.shape:
        raise ValueError(f"qkv has shape {list(qkv.shape)}, expected [B, L, at least {2 * heads * dim}] for {heads} heads of {dim}")
    if pe is None:
        return
    want = (1, qkv.shape[1], dim // 2, 2, 2)
    if pe.ndim != 6 or tuple(pe.shape[1:]) != want or pe.shape[0] not in (1, qkv.shape[0]):
        raise ValueError(f"pe has shape {list(pe.shape)}, expected [1 or {qkv.shape[0]}, {', '.join(map(str, want))}]")


def qk_norm_rope_torch(qkv: Tensor, query_scale: Tensor, key_scale: Tensor, pe: Tensor | None, heads: int, eps: float = 1e-6) -> Tensor:
    """In place on qkv; arguments as `qk_norm_rope_`."""
    dim = query_scale.shape[0]
    for i, scale in enumerate((query_scale, key_scale)):
        part = qkv[..., i * heads * dim : (i + 1) * heads * dim].unflatten(-1, (heads, dim))  # [B, L, H, D]
        x = F.rms_norm(part.float(), (dim,), scale.float(), eps).to(qkv.dtype)
        if pe is None:
            part.copy_(x)
            continue
        table = pe.float().transpose(1, 2)  # [B|1, L, 1, D/2, 2, 2]
        pairs = x.float().unflatten(-1, (dim // 2, 1, 2))
        part.copy_((table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]).flatten(-2))
    return qkv
