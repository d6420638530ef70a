"""Tile choices by target and shape class: a table, so that no user waits for an autotuner at the first image."""

from __future__ import annotations

from dataclasses import dataclass

from .targets import Target


@dataclass(frozen=True)
class Tile:
    """bn weight rows (outputs) x bm tokens x bk, warps and pipeline stages of one program."""

    bn: int
    bm: int
    bk: int
    warps: int
    stages: int


def quantize_tile(target: Target, rows: int) -> Tile:
    """smooth_quantize: few rows a program, because a program walks the whole of K and the machine wants many programs."""
    return Tile(bn=0, bm=16, bk=128, warps=4, stages=2)


def matmul_tile(target: Target, kind: str, rows: int) -> Tile:
    """w4_matmul, by kind of quantised input (see QuantizedInput). The loop always steps over 128 of K."""
    stages = 3 if target.shared > 110000 else 2
    if rows <= 32:
        return Tile(bn=64, bm=16, bk=128, warps=4, stages=stages + 1)
    if kind == "plain":
        return Tile(bn=128, bm=128, bk=128, warps=8, stages=stages)
    return Tile(bn=128, bm=64, bk=128, warps=4, stages=stages + 1)


def linear_tile(target: Target, rows: int) -> Tile:
    """w4a16_linear: bm tokens share one pass over the weights."""
    return Tile(bn=16, bm=1 if rows == 1 else 2 if rows == 2 else 4, bk=128, warps=4, stages=3)
