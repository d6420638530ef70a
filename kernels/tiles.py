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
# "group" needs a second accumulator for every 64 of K, so its tiles are half those of "plain".
_MATMUL = {
    "hopper": {"group": Tile(128, 64, 128, 8, 4), "plain": Tile(128, 128, 128, 8, 3)},
    "datacenter blackwell": {"group": Tile(64, 128, 128, 4, 4), "plain": Tile(128, 128, 128, 8, 3)},
    "other nvidia": {"group": Tile(128, 64, 128, 8, 3), "plain": Tile(128, 64, 128, 8, 2)},
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


def quantize_tile(target: Target, dtype: torch.dtype, k: int, norm: bool) -> Tile:
    """smooth_quantize and norm_modulate: few rows a program, because a program walks the whole of K and the machine wants many programs.

    k is the padded K. With a norm, or with two low-rank dots (types other than bf16), more warps share the registers.
    """
    if _family(target) in ("cdna", "rdna"):
        return Tile(0, 16, 64 if _family(target) == "rdna" else 128, 4 if dtype == torch.bfloat16 else 8, 2)
    if norm or dtype != torch.bfloat16 or k % 256:
        return Tile(0, 16, 128, 8, 2)
    return Tile(0, 16, 256, 4, 1)


def matmul_tile(target: Target, kind: str, rows: int) -> Tile:
    """w4_matmul; kind is the kernel's: "group" or "plain". The loop always steps over 128 of K."""
    family = _family(target)
    if rows <= 32 and family not in ("cdna", "rdna"):
        return _FEW_ROWS
    return _MATMUL[family][kind]


# w4_matmul_wide, by target family and kind. "row" and "group" step over 64 of K, the width of a scale, and hold two accumulators.
_WIDE = {
    "hopper": {"row": Tile(64, 128, 64, 4, 4), "group": Tile(128, 64, 64, 4, 4), "plain": Tile(256, 128, 64, 8, 4)},
    "datacenter blackwell": {"row": Tile(128, 128, 64, 8, 4), "group": Tile(128, 128, 64, 8, 4), "plain": Tile(128, 128, 64, 8, 4)},
    "other nvidia": {"row": Tile(128, 64, 64, 8, 3), "group": Tile(128, 64, 64, 8, 3), "plain": Tile(128, 64, 64, 8, 3)},
}


def wide_tile(target: Target, kind: str) -> Tile:
    """w4_matmul_wide; kind is the kernel's: "row", "group" or "plain"."""
    return _WIDE.get(_family(target), _WIDE["other nvidia"])[kind]


def linear_tile(target: Target, rows: int) -> Tile:
    """w4a16_linear: bm tokens share one pass over the weights."""
    return Tile(bn=16, bm=1 if rows == 1 else 2 if rows == 2 else 4, bk=128, warps=4, stages=3)
