"""Tile choices by target and shape class: a table, so that no user waits for an autotuner at the first image."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

import torch

from .targets import Target


@dataclass(frozen=True)
class Tile:
    """bn weight rows (outputs) x bm tokens x bk, warps and pipeline stages of one program.

    pieces  w4_matmul_wide: its ending runs in so many. smooth_quantize: so many programs share K.
    both    smooth_quantize: columns that a program makes of two low-rank products together.
    """

    bn: int
    bm: int
    bk: int
    warps: int
    stages: int
    pieces: int = 1
    both: int = 0


# _w4_matmul, by target family and form of the operands. No entry spills registers (tests/kernels/test_compile.py holds that):
# "group" needs a second accumulator for every 64 of K, so its tiles are at most those of "plain".
_MATMUL = {
    "hopper": {"group": Tile(128, 64, 128, 8, 4), "plain": Tile(128, 128, 128, 8, 3)},
    "datacenter blackwell": {"group": Tile(64, 128, 128, 4, 4), "plain": Tile(128, 128, 128, 8, 3)},
    "ampere": {"group": Tile(64, 128, 128, 8, 3), "plain": Tile(128, 64, 128, 8, 2)},
    "other nvidia": {"group": Tile(128, 64, 128, 8, 3), "plain": Tile(128, 64, 128, 8, 2)},
    "cdna": {"group": Tile(128, 64, 128, 4, 2), "plain": Tile(128, 64, 128, 4, 2)},
    "rdna": {"group": Tile(64, 32, 128, 8, 2), "plain": Tile(64, 32, 128, 8, 2)},
}
_FEW_ROWS = Tile(bn=64, bm=16, bk=128, warps=4, stages=4)  # up to 32 tokens: weights are what is read, tokens fill one matrix instruction

_FAMILIES = {"sm_80": "ampere", "sm_86": "ampere", "sm_87": "ampere", "sm_90": "hopper"}
_FAMILIES |= {"sm_100": "datacenter blackwell", "sm_103": "datacenter blackwell"}


def _family(target: Target) -> str:
    if target.name.startswith("gfx9"):
        return "cdna"
    if target.name.startswith("gfx"):
        return "rdna"
    return _FAMILIES.get(target.name, "other nvidia")


QUANTIZE_PIECES = 16  # at most so many programs share K


def quantize_tile(target: Target, dtype: torch.dtype, rows: int, k: int, grouped: bool) -> Tile:
    """smooth_quantize's _quantize; a program makes up to bn ranks of the low-rank product.

    k: the padded K, cut into `pieces` so that an H200's multiprocessors have four programs each. grouped: codes have a scale for every 64
    inputs.
    """
    family = _family(target)
    narrow = dtype != torch.bfloat16  # two dots
    bm, warps, stages = 64, 4, 3
    if narrow and family != "hopper":
        bm = 32  # registers
    if dtype == torch.float32:
        bm, stages = 32, 2  # shared memory
    if family == "datacenter blackwell":
        bm = 32  # its pipeliner cannot take inline PTX before the newer matrix instruction
    if family in ("cdna", "rdna"):
        bm, warps, stages = 16, 8 if narrow else 4, 2
    if rows <= 32:
        bm = 16
    # More would spill registers beside a norm.
    ranks = (192 if family == "hopper" else 64) if dtype == torch.bfloat16 else 16
    both = ranks if family == "hopper" else 48 if dtype == torch.bfloat16 else 32
    bk = 32 if family == "rdna" and narrow and not grouped else 64
    return Tile(ranks, bm, bk, warps, stages, max(1, min(528 // max(-(-rows // bm), 1), k // 256, QUANTIZE_PIECES)), both)


def matmul_tile(target: Target, kind: str, rows: int) -> Tile:
    """_w4_matmul; kind is the kernel's: "group" or "plain". The loop always steps over 128 of K."""
    family = _family(target)
    if rows <= 32 and family not in ("cdna", "rdna"):
        return _FEW_ROWS
    return _MATMUL[family][kind]


# _w4_matmul_wide, by target family and operands. "row" scales its accumulator now and then and wants two programs a multiprocessor,
# one multiplying while the other scales: 96 KB of shared memory on Hopper, and registers of 64 accumulators a thread.
_WIDE = {
    "hopper": {"row": Tile(128, 128, 128, 8, 3, pieces=4), "16 bit": Tile(128, 256, 64, 8, 3, pieces=4)},
    "datacenter blackwell": {"row": Tile(128, 128, 128, 8, 3), "16 bit": Tile(128, 128, 64, 8, 4)},
    "other nvidia": {"row": Tile(128, 64, 128, 8, 3), "16 bit": Tile(128, 64, 64, 8, 3)},
}


def wide_tile(target: Target, kind: str) -> Tile:
    """_w4_matmul_wide; kind is the kernel's: "row", "half" or "plain"."""
    return _WIDE.get(_family(target), _WIDE["other nvidia"])["row" if kind == "row" else "16 bit"]


_LAST_ROWS = Tile(128, 128, 64, 8, 3)  # half of Hopper's "16 bit" tile
# Hopper's "row" for many inputs: one program a multiprocessor hides no ending, but a product reads a quarter less, and the board's power is
# what bounds it.
_LONG_ROW, LONG_K = Tile(128, 256, 128, 8, 4, pieces=4), 8192
ALL_TILES: ContextVar[bool] = ContextVar("ALL_TILES", default=False)  # set while kernels are compiled ahead: take every tile there is


def wide_bands(target: Target, kind: str, rows: int, n: int, k: int) -> list[tuple[int, int, Tile]]:
    """Bands (first row, end, tile) that share out the rows of a product with n outputs of k inputs.

    Large tiles leave most of the machine idle in their last round when only a few are left (FLUX's 3072 outputs: 432 tiles on 132
    multiprocessors); then the last rows are made in tiles of half the size. Hopper's "row" has large ones beyond LONG_K inputs, where they
    fill the machine once.
    """
    tile, smaller = wide_tile(target, kind), _LAST_ROWS
    if kind == "row" and k > LONG_K and _family(target) == "hopper":
        tile, smaller = _LONG_ROW, tile
    if ALL_TILES.get() and tile.bm == 256 < rows:
        return [(0, 256, tile), (256, rows, smaller)]
    across = -(-n // tile.bn)
    tiles = across * -(-rows // tile.bm)
    rounds, left = divmod(tiles, max(target.multiprocessors, 1))
    if rounds == 0 and tile is _LONG_ROW:  # few tokens
        tile = smaller
    whole = rounds * target.multiprocessors // across * tile.bm  # rows that full rounds make
    if tile.bm < 256 or not 1 <= rounds <= 8 or left == 0 or left > target.multiprocessors // 2 or not 0 < whole < rows:
        return [(0, rows, tile)]
    return [(0, whole, tile), (whole, rows, smaller)]


def linear_tile(target: Target, rows: int) -> Tile:
    """t5_linear for few tokens, of which bm share one pass over the weights."""
    bm = 1 if rows == 1 else 2 if rows == 2 else 4
    return Tile(bn=4, bm=bm, bk=1024, warps=1, stages=1)
