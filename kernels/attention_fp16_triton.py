"""Triton kernel of attention_fp16: formula in attention_fp16_torch.py, the softmax tile by tile as in FlashAttention-2 (arXiv 2307.08691).

A program owns BM queries of one head and goes over all keys; scores are kept in units of log2, because exp2 is one instruction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_fp16_torch import units
from .rounding import storable
from .targets import Target, interpreting, launch_device, target_for
from .tiles import Tile

LOG2_E = 1.4426950408889634


@triton.jit
def _half(x, inverse, EMULATE: tl.constexpr):
    """x times a power of two as fp16; in the interpreter as fp32 that holds fp16 numbers."""
    y = (x.to(tl.float32) * inverse).to(tl.float16)
    if EMULATE:
        y = y.to(tl.float32)
    return y


@triton.jit(do_not_specialize=["L", "S"])
def _attention_fp16(
    q, k, v, unit_q, unit_k, unit_v, out, scale, H, L, S,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """q, k, v: [B, H, L or S, D] by strides, D contiguous. unit_*: fp32 [B * H]. out [B, L, H * D]. scale: log2(e) / sqrt(D)."""
    head = tl.program_id(1)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    dims = tl.arange(0, D)
    uq = tl.load(unit_q + head)
    uk = tl.load(unit_k + head)
    uv = tl.load(unit_v + head)
    at = rows.to(tl.int64)[:, None]
    queries = _half(tl.load(q + b * q_b + h * q_h + at * q_l + dims[None, :], mask=(rows < L)[:, None], other=0.0), 1.0 / uq, EMULATE)
    keys_from, values_from = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    inverse_k, inverse_v, factor = 1.0 / uk, 1.0 / uv, scale * uq * uk
    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for first in tl.range(0, S, BN, num_stages=STAGES):
        cols = first + tl.arange(0, BN)
        live = (cols < S)[:, None]
        keys = tl.load(keys_from + cols.to(tl.int64)[:, None] * k_l + dims[None, :], mask=live, other=0.0)
        scores = tl.dot(queries, _half(keys, inverse_k, EMULATE).T, input_precision="ieee") * factor
        scores = tl.where((cols < S)[None, :], scores, float("-inf"))
        reached = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - reached)
        p = tl.exp2(scores - reached[:, None])
        total = total * shrink + tl.sum(p, 1)
        values = tl.load(values_from + cols.to(tl.int64)[:, None] * v_l + dims[None, :], mask=live, other=0.0)
        acc = acc * shrink[:, None]
        acc = tl.dot(_half(p, 1.0, EMULATE), _half(values, inverse_v, EMULATE), acc, input_precision="ieee")
        largest = reached
    y = acc / total[:, None] * uv
    place = out + (b * L + at) * (H * D) + h * D + dims[None, :]
    tl.store(place, storable(y, out.dtype.element_ty, EMULATE), mask=(rows < L)[:, None])


def attention_tile(target: Target) -> Tile:
    """Queries a program (bm), keys a step (bk), warps, stages: what spills no registers beside heads of 128. Not tuned."""
    if target.name.startswith("gfx9"):
        return Tile(0, 64, 64, 4, 1)
    if target.name.startswith("gfx"):
        return Tile(0, 64, 32, 4, 1)
    return Tile(0, 128, 32 if target.name == "sm_80" else 64, 8, 2)


def attention_fp16_triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Same arguments and result as attention_fp16_torch, S at least 1. Operands must have been checked."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    (batch, heads, length, dim), keys = q.shape, k.shape[2]
    out = torch.empty(batch, length, heads * dim, dtype=q.dtype, device=q.device)
    if not length:
        return out
    tile = attention_tile(target_for(q.device))
    with launch_device(q.device):
        _attention_fp16[(triton.cdiv(length, tile.bm), batch * heads)](
            q, k, v, units(q), units(k), units(v), out, LOG2_E * dim**-0.5, heads, length, keys,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            D=dim, BM=tile.bm, BN=tile.bk, STAGES=tile.stages, EMULATE=interpreting(), num_warps=tile.warps,
        )  # fmt: skip
    return out
