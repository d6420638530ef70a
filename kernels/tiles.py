"""Tile choices by target and shape class: a table, so that no user waits for an autotuner at the first image."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .targets import Target


@dataclass(frozen=True)
class Tile:
    """bn weight rows (outputs) x bm tokens x bk, warps and pipeline stages of one program."""

    bn: int
    bm: int
    bk: int
    warps: int
    stages: int


# w4_matmul, large M, by target family and form of the operands. No entry spills registers (tests/kernels/test_compile.py holds that):
# "group" needs a second accumulator for every 64 of K, so its tiles are half those of "row" and "plain".
_MATMUL = {
    "hopper": {"group": Tile(128, 64, 128, 8, 4), "row": Tile(128, 128, 128, 8, 4), "plain": Tile(128, 128, 128, 8, 3)},
    "datacenter blackwell": {"group": Tile(64, 128, 128, 4, 4), "row": Tile(128, 128, 128, 8, 4), "plain": Tile(128, 128, 128, 8, 3)},
    "other nvidia": {"group": Tile(128, 64, 128, 8, 3), "row": Tile(128, 128, 128, 8, 3), "plain": Tile(128, 64, 128, 8, 2)},
    "cdna": {"group": Tile(128, 64, 128, 4, 2), "plain": Tile(128, 64, 128, 4, 2)},
    "rdna": {"group": Tile(64, 32, 128, 8, 2), "plain": Tile(64, 32, 128, 8, 2)},
}
_FEW_ROWS = Tile(bn=64, bm=16, bk=128, warps=4, stages=4)  # up to 32 tokens: weights are what is read, tokens fill one matrix instruction


def _family(target: Target) -> str:
    if target.name.startswith("gfx9"):
        return "cdna"
    if target.name.startswith("gfx"):
        return "rdna"
    return {"sm_90": "hopper", "sm_100": "datacenter blackwell", "sm_103": "datacenter blackwell"}.get(target.name, "other nvidia")


def quantize_tile(target: Target, dtype: torch.dtype) -> Tile:
    """smooth_quantize: few rows a program, because a program walks the whole of K and the machine wants many programs.

    Other types than bf16 take two low-rank dots: more warps share their registers.
    """
    return Tile(bn=0, bm=16, bk=64 if _family(target) == "rdna" else 128, warps=4 if dtype == torch.bfloat16 else 8, stages=2)


def matmul_tile(target: Target, kind: str, rows: int) -> Tile:
    """w4_matmul; kind is the kernel's: "group", "row" or "plain". The loop always steps over 128 of K."""
    family = _family(target)
    if rows <= 32 and family not in ("cdna", "rdna"):
        return _FEW_ROWS
    return _MATMUL[family][kind]


def linear_tile(target: Target, rows: int) -> Tile:
    """w4a16_linear: bm tokens share one pass over the weights."""
    return Tile(bn=16, bm=1 if rows == 1 else 2 if rows == 2 else 4, bk=128, warps=4, stages=3)
