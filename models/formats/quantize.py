"""Quantise a dense linear to the layers of SVDQuant files: low-rank part by SVD, the rest to 4 bits, nearest, group by group.

`quantize_linear` is the plain recipe (no calibration, no smoothing, no search), for demos, tests and benchmarks. ../svdquant.py is the
one for files that people use; it is made of the same pieces. SVDQuant is described in arXiv 2411.05007.
"""

from itertools import product

import torch
from torch import Tensor

from ...kernels.layout import E2M1, SHIFT, LogicalLinear, dense_weight4
from ...kernels.smooth_quantize_torch import e2m1_round
from .nunchaku import GROUP, RANK_TILE, TILE

_OVERSAMPLING = 16  # columns of a randomised SVD beyond the rank
_CUTS = (0.0, 0.04, 0.08, 0.12)  # parts of the range of a modulation layer's group that may be left off at either end


def low_rank(w: Tensor, rank: int, rows: Tensor | None = None, columns: Tensor | None = None, steps: int = 3) -> tuple[Tensor, Tensor]:
    """(up [N, R], down [R, K]) fp32 of the matrix of rank R = min(rank, N, K) that is nearest to w fp32 [N, K].

    Nearest by the norm of (w - up @ down) @ F.T, F = [rows; diag(columns)], rows [S, K] and columns [K] (None: ones): F.T @ F stands for
    the second moments of what w is multiplied by. With U the leading left singular vectors of w @ F.T, that matrix is U @ (U.T @ w); up
    is U, so its columns are orthonormal and fall in what they take.

    Small matrices have an exact SVD, larger ones a randomised subspace iteration of `steps` steps (Halko, Martinsson, Tropp 2011), its
    seed fixed so that a file comes out the same twice.
    """
    columns = torch.ones(w.shape[1], device=w.device) if columns is None else columns
    rows = w.new_zeros(0, w.shape[1]) if rows is None else rows
    width = rank + _OVERSAMPLING
    if 4 * width >= min(w.shape):
        u = torch.linalg.svd(torch.cat([w @ rows.T, w * columns], 1), full_matrices=False).U[:, :rank]
        return u, u.T @ w
    gen = torch.Generator().manual_seed(0)
    y = w @ torch.randn(w.shape[1], width, generator=gen).to(w)
    for _ in range(steps):
        z = _apart(_times_factor(w.T @ _apart(y), rows, columns))
        y = w @ (rows.T @ z[: len(rows)] + columns[:, None] * z[len(rows) :])
    y = _apart(_apart(_apart(y)), 1e-7)  # each pass brings weak columns up a thousandfold
    taken = _times_factor(w.T @ y, rows, columns)
    u = y @ torch.linalg.eigh(taken.T @ taken).eigenvectors.flip(1)[:, :rank]
    return u, u.T @ w


def _times_factor(z: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return torch.cat([rows @ z, columns[:, None] * z])


def _apart(z: Tensor, shift: float = 1e-6) -> Tensor:
    """z with its columns nearly orthonormal, the same span: by a Cholesky decomposition, which a GPU does far faster than a QR of something
    so tall. The shift, a part of all the squares, lets dependent columns pass."""
    gram = z.T @ z
    whole = shift * gram.diagonal().sum() + 1e-30
    factor = torch.linalg.cholesky_ex(gram + torch.diag(whole.expand(len(gram)))).L
    return torch.linalg.solve_triangular(factor, z.T, upper=False).T


def nearest_e2m1(x: Tensor) -> Tensor:
    """uint8 e2m1 codes of fp32 x, nearest (ties to the even code), saturating at +-6."""
    # between magnitudes i and i+1; a tie goes up only where the lower code is odd
    edges = torch.tensor([(a + b) / 2 for a, b in zip(E2M1[:7], E2M1[1:8], strict=True)], device=x.device)
    up = torch.bucketize(x.abs(), edges, right=False)  # a tie stays at the lower code
    up_ties = torch.bucketize(x.abs(), edges, right=True)
    magnitude = torch.where(up % 2 == 1, up_ties, up).to(torch.uint8)
    return magnitude | ((x < 0) & (magnitude > 0)).to(torch.uint8) << 3


def nearest_value(ratio: Tensor, precision: str) -> Tensor:
    """fp32 ratios of weight to step -> the nearest numbers that 4-bit codes stand for: -8..7 (int4), or e2m1 (nvfp4)."""
    return ratio.round().clamp_(-8, 7) if precision == "int4" else e2m1_round(ratio)


def codes_of(values: Tensor, precision: str) -> Tensor:
    """uint8 codes of numbers that `nearest_value` gave."""
    return (values.to(torch.int8) & 15).to(torch.uint8) if precision == "int4" else nearest_e2m1(values)


def multipliers(scales: Tensor, top: Tensor | None) -> Tensor:
    """fp32 [N, groups]: what the codes are multiplied by."""
    return scales.float() if top is None else scales.float() * top


def group_scales(residual: Tensor, precision: str, dtype: torch.dtype, clips: tuple[float, ...] = (1.0,),
                 importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(scales, top) of a residual fp32 [N, K]: per group, of the scales that `clips` offers, the one with the least squared error.

    A clip c lets c times the largest weight of a group be the largest positive number (7, or 6); 1 is plain rounding. importance [K]: what
    a column's squared error counts (None: all alike). INT4: scales [N, K/64] in `dtype`, top None. NVFP4: scales [N, K/16] e4m3 and
    top, one fp32 element that `dtype` holds exactly, by which all of them are multiplied.
    """
    groups = residual.unflatten(1, (-1, GROUP[precision]))
    amax = groups.abs().amax(-1)
    if precision == "int4":
        top, offered = None, [(clip * amax / 7).to(dtype) for clip in clips]
    else:
        top = (amax.max() * max(clips) / (6 * 448)).to(dtype).float()
        top = torch.where(top > 0, top, torch.ones_like(top))
        offered = [(clip * amax / 6 / top).clamp(max=448).to(torch.float8_e4m3fn) for clip in clips]
    scales = offered[0] if len(offered) == 1 else _least_error(groups, offered, top, precision, importance)
    return (torch.where(scales == 0, torch.ones_like(scales), scales) if precision == "int4" else scales), top


def _least_error(groups: Tensor, offered: list[Tensor], top: Tensor | None, precision: str, importance: Tensor | None) -> Tensor:
    importance = groups.new_ones(groups.shape[1:]) if importance is None else importance.view(groups.shape[1:])
    best = least = None
    for scales in offered:
        steps = multipliers(scales, top)[..., None]
        rounded = nearest_value(groups / _divisor(steps), precision)
        error = torch.einsum("ngj,gj->ng", rounded.mul_(steps).sub_(groups).square_(), importance)
        if best is None:
            best, least = scales.float(), error
        else:
            best, least = torch.where(error < least, scales.float(), best), torch.minimum(error, least)
    return best.to(offered[0].dtype)


def nearest_codes(residual: Tensor, scales: Tensor, top: Tensor | None, precision: str) -> Tensor:
    """uint8 codes [N, K] of a residual fp32 [N, K] at given scales."""
    groups = residual.unflatten(1, (-1, GROUP[precision]))
    return codes_of(nearest_value(groups / _divisor(multipliers(scales, top))[..., None], precision), precision).flatten(1)


def _divisor(steps: Tensor) -> Tensor:
    """steps with ones in place of zeros (an e4m3 scale of a group of next to nothing), whose codes do not count."""
    return torch.where(steps > 0, steps, torch.ones_like(steps))


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
    up, down = low_rank(w, rank)
    up = torch.nn.functional.pad(up, (0, rank - up.shape[1])).to(dtype)
    down = torch.nn.functional.pad(down / t, (0, 0, 0, rank - down.shape[0])).to(dtype)  # the low-rank branch sees x itself
    residual = w - up.float() @ (down.float() * t)  # of the rounded factors, so that 4 bits also take up their rounding
    scales, top = group_scales(residual, precision, dtype)
    codes = nearest_codes(residual, scales, top, precision)
    channel_scale = None if top is None else top.repeat(n)
    layer = LogicalLinear(precision, codes, scales, smooth=smooth, down=down, up=up, channel_scale=channel_scale, act_unsigned=act_unsigned)
    bias = torch.zeros(n, device=weight.device) if bias is None else bias.float()
    if act_unsigned:
        bias = bias - SHIFT * (dense_weight4(layer) / t).sum(1)
    return LogicalLinear(precision, codes, scales, None, smooth, down, up, channel_scale, bias.to(dtype), act_unsigned)


def quantize_modulation(weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.bfloat16) -> LogicalLinear:
    """W4A16 layer of a dense modulation linear in native row order: weight [S*D, D], bias [S*D], S = 3 or 6.

    Groups of 64 in 15 steps over the part of their range that has the least squared error. The bias comes back fp32, rounded as
    the file rounds it: scale chunks are stored as bias + 1 in `dtype`. ValueError when the shape is not that of a modulation layer.
    """
    n, k = weight.shape
    chunks = n // k
    if n != chunks * k or chunks not in (3, 6) or k % 64:
        raise ValueError(f"modulation weight is {n} x {k}, expected 3 or 6 times as many rows as columns, and a multiple of 64 columns")
    groups = weight.float().unflatten(1, (-1, 64))
    low, high = groups.amin(-1), groups.amax(-1)
    zeros = scales = least = None
    for below, above in product(_CUTS, repeat=2):
        zero = (low + below * (high - low)).to(dtype)
        scale = ((high - above * (high - low) - zero.float()) / 15).to(dtype)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        error = (_steps(groups, zero, scale) * scale.float()[..., None] + zero.float()[..., None] - groups).square_().sum(-1)
        if least is None:
            zeros, scales, least = zero, scale, error
        else:
            better = error < least
            zeros, scales, least = torch.where(better, zero, zeros), torch.where(better, scale, scales), torch.where(better, error, least)
    codes = _steps(groups, zeros, scales).to(torch.uint8).flatten(1)
    bias = torch.zeros(n, device=weight.device) if bias is None else bias.float()
    bias = bias.view(chunks, -1) + scale_chunk_one(chunks, bias.device)
    bias = bias.to(dtype).float() - scale_chunk_one(chunks, bias.device)
    return LogicalLinear("w4a16", codes, scales, zeros=zeros, bias=bias.view(-1))


def _steps(groups: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """fp32 whole numbers 0..15 of a modulation layer's groups."""
    return ((groups - zeros.float()[..., None]) / scales.float()[..., None]).round_().clamp_(0, 15)


def scale_chunk_one(chunks: int, device: torch.device | str) -> Tensor:
    """fp32 [chunks, 1]: 1 where the chunk is a modulation scale (1 and chunks - 2), whose 1 + ... the file folds into its bias."""
    one = torch.zeros(chunks, 1, device=device)
    one[[1, chunks - 2]] = 1
    return one
