"""Quantise a dense linear to the layers of SVDQuant files: low-rank part by SVD, the rest to 4 bits, nearest, group by group.

This is the plain recipe (no calibration, no smoothing search): for demos, tests and benchmarks, not a substitute for a calibrated file.
SVDQuant is described in arXiv 2411.05007.
"""

import torch
from torch import Tensor

from ...kernels.layout import E2M1, SHIFT, LogicalLinear, dense_weight4
from .nunchaku import RANK_TILE, TILE

_FULL_SVD = 768  # up to this many rows or columns an exact SVD is quick; above, a randomised one


def low_rank(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up [N, rank], down [rank, K]) fp32 of the best rank-`rank` approximation of w fp32 [N, K].

    Large matrices: randomised subspace iteration (Halko, Martinsson, Tropp 2011), its seed fixed so that a file comes out the same twice.
    """
    if min(w.shape) <= _FULL_SVD:
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        return u[:, :rank] * s[:rank], v[:rank]
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(w.shape[1], rank + 16, generator=gen).to(w)
    for _ in range(3):
        q = torch.linalg.qr(w @ q).Q
        q = torch.linalg.qr(w.T @ q).Q
    u, s, v = torch.linalg.svd(w @ q, full_matrices=False)
    return u[:, :rank] * s[:rank], (v @ q.T)[:rank]


def nearest_e2m1(x: Tensor) -> Tensor:
    """uint8 e2m1 codes of fp32 x, nearest (ties to the even code), saturating at +-6."""
    # between magnitudes i and i+1; a tie goes up only where the lower code is odd
    edges = torch.tensor([(a + b) / 2 for a, b in zip(E2M1[:7], E2M1[1:8], strict=True)], device=x.device)
    up = torch.bucketize(x.abs(), edges, right=False)  # a tie stays at the lower code
    up_ties = torch.bucketize(x.abs(), edges, right=True)
    magnitude = torch.where(up % 2 == 1, up_ties, up).to(torch.uint8)
    return magnitude | ((x < 0) & (magnitude > 0)).to(torch.uint8) << 3


def _int4(residual: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes [N, K] in -7..7 as nibbles, scales [N, K/64])."""
    groups = residual.unflatten(1, (-1, 64))
    scales = (groups.abs().amax(-1) / 7).to(dtype)
    scales[scales == 0] = 1
    codes = (groups / scales.float()[..., None]).round().clamp(-7, 7).to(torch.int8)
    return (codes.flatten(1) & 15).to(torch.uint8), scales


def _nvfp4(residual: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [N, K], scales [N, K/16] e4m3, top scale as one fp32 element that `dtype` holds exactly)."""
    groups = residual.unflatten(1, (-1, 16))
    amax = groups.abs().amax(-1)
    top = (amax.max() / (6 * 448)).to(dtype).float()
    top = torch.where(top > 0, top, torch.ones_like(top))
    scales = (amax / 6 / top).clamp(max=448).to(torch.float8_e4m3fn)
    step = scales.float() * top
    codes = nearest_e2m1(groups / torch.where(step > 0, step, torch.ones_like(step))[..., None])
    return codes.flatten(1), scales, top


def quantize_linear(weight: Tensor, bias: Tensor | None, rank: int, precision: str, act_unsigned: bool = False,
                    smooth: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> LogicalLinear:  # fmt: skip
    """One W4A4 layer of a dense linear.

    weight [N, K] (N and K multiples of 128) and bias [N], any float type; smooth [K] (None = ones); dtype is the file's 16-bit type.
    act_unsigned: for INT4 layers fed by a GELU, whose stored bias takes back what shifting the activations by SHIFT adds.
    ValueError for sizes that FLUX files cannot hold and for an unknown precision.
    """
    n, k = weight.shape
    if n % TILE or k % TILE:
        raise ValueError(f"linear is {n} x {k}; both must be multiples of {TILE}")
    if precision not in ("int4", "nvfp4"):
        raise ValueError(f"precision is {precision!r}, expected int4 or nvfp4")
    if rank < 1 or rank % RANK_TILE or rank > 1024:
        raise ValueError(f"rank is {rank}, expected a multiple of {RANK_TILE} up to 1024")
    smooth = torch.ones(k, device=weight.device).to(dtype) if smooth is None else smooth.to(dtype)
    t = smooth.float()
    w = weight.float() * t  # what meets x / smooth
    up, down = low_rank(w, min(rank, n, k))
    up = torch.nn.functional.pad(up, (0, rank - up.shape[1])).to(dtype)
    down = torch.nn.functional.pad(down / t, (0, 0, 0, rank - down.shape[0])).to(dtype)  # the low-rank branch sees x itself
    residual = w - up.float() @ (down.float() * t)  # of the rounded factors, so that 4 bits also take up their rounding
    channel_scale = None
    if precision == "int4":
        codes, scales = _int4(residual, dtype)
    else:
        codes, scales, top = _nvfp4(residual, dtype)
        channel_scale = top.repeat(n)
    layer = LogicalLinear(precision, codes, scales, smooth=smooth, down=down, up=up, channel_scale=channel_scale, act_unsigned=act_unsigned)
    bias = torch.zeros(n, device=weight.device) if bias is None else bias.float()
    if act_unsigned:
        bias = bias - SHIFT * (dense_weight4(layer) / t).sum(1)
    return LogicalLinear(precision, codes, scales, None, smooth, down, up, channel_scale, bias.to(dtype), act_unsigned)


def quantize_modulation(weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.bfloat16) -> LogicalLinear:
    """W4A16 layer of a dense modulation linear in native row order: weight [S*D, D], bias [S*D], S = 3 or 6.

    Groups of 64 from their minimum (zero) to their maximum in 15 steps. The bias comes back fp32, rounded as the file rounds it: scale
    chunks are stored as bias + 1 in `dtype`. ValueError when the shape is not that of a modulation layer.
    """
    n, k = weight.shape
    chunks = n // k
    if n != chunks * k or chunks not in (3, 6) or k % 64:
        raise ValueError(f"modulation weight is {n} x {k}, expected 3 or 6 times as many rows as columns, and a multiple of 64 columns")
    groups = weight.float().unflatten(1, (-1, 64))
    zeros = groups.amin(-1).to(dtype)
    scales = ((groups.amax(-1) - zeros.float()) / 15).to(dtype)
    scales[scales <= 0] = 1
    codes = ((groups - zeros.float()[..., None]) / scales.float()[..., None]).round().clamp(0, 15).to(torch.uint8).flatten(1)
    bias = torch.zeros(n, device=weight.device) if bias is None else bias.float()
    bias = bias.view(chunks, -1) + scale_chunk_one(chunks, bias.device)
    bias = bias.to(dtype).float() - scale_chunk_one(chunks, bias.device)
    return LogicalLinear("w4a16", codes, scales, zeros=zeros, bias=bias.view(-1))


def scale_chunk_one(chunks: int, device: torch.device | str) -> Tensor:
    """fp32 [chunks, 1]: 1 where the chunk is a modulation scale (1 and chunks - 2), whose 1 + ... the file folds into its bias."""
    one = torch.zeros(chunks, 1, device=device)
    one[[1, chunks - 2]] = 1
    return one
