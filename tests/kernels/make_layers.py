"""Random logical linears for the kernel tests."""

from __future__ import annotations

import torch
from tonfa.kernels.layout import Columns, LogicalLinear, PartView, pack, plan, views


def random_layer(
    precision: str,
    n: int,
    k: int,
    rank: int = 32,
    *,
    seed: int = 0,
    act_unsigned: bool = False,
    segments: tuple[int, ...] = (0,),
    scale_dtype: torch.dtype = torch.bfloat16,
    channel_scale: bool = False,
) -> LogicalLinear:
    """Codes over the whole range (so -8 too), realistic scales, a smooth vector of both sides of 1, a bias."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
    group = 16 if precision == "nvfp4" else 64
    scales = torch.rand(n, k // group, generator=g) * 0.02 + 0.001
    if precision == "nvfp4":
        scales = (scales * 1000).to(torch.float8_e4m3fn)
    else:
        scales = scales.to(scale_dtype)
    if precision == "w4a16":
        zeros = (-7.5 * scales.float()).to(scale_dtype)
        return LogicalLinear("w4a16", codes, scales, zeros=zeros, bias=torch.randn(n, generator=g).to(scale_dtype))
    low_rank = {}
    if rank:
        low_rank = {
            "down": (torch.randn(len(segments) * rank, k, generator=g) * k**-0.5).to(scale_dtype),
            "up": torch.randn(n, rank, generator=g).to(scale_dtype),
        }
    return LogicalLinear(
        precision,
        codes,
        scales,
        smooth=(torch.rand(k, generator=g) * 2 + 0.25).to(scale_dtype),
        channel_scale=(torch.rand(n, generator=g) * 0.002 + 0.0005) if channel_scale else None,
        bias=torch.randn(n, generator=g).to(torch.bfloat16),
        act_unsigned=act_unsigned,
        segments=segments,
        **low_rank,
    )


def packed_view(layer: LogicalLinear, code_form: str = "e4m3", paired: bool = False) -> PartView:
    spec = plan(layer.n, layer.k, [(layer, 0, 0)], code_form, paired)
    return views(spec, pack(spec, [layer]))[0]


def with_columns(view: PartView, rank: int, segments: tuple[int, ...], dtype: torch.dtype) -> PartView:
    """The view with random further columns of its low-rank branch."""
    g, spec = torch.Generator().manual_seed(5), view.spec
    down, up = torch.zeros(spec.k_padded, len(segments) * rank), torch.zeros(spec.n_padded, rank)
    down[: spec.k] = torch.randn(spec.k, len(segments) * rank, generator=g) * spec.k**-0.5
    up[: spec.n] = torch.randn(spec.n, rank, generator=g)
    view.extra = Columns(down.to(dtype), up.to(dtype), segments)
    return view
