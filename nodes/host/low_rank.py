"""The best low-rank form of a matrix within an error bound."""

from __future__ import annotations

import torch
from torch import Tensor

ERROR = 0.009  # of the matrix's Frobenius norm; rounding the factors to 16 bit then leaves it under 1 %
FIRST_RANK = 32
POWER_ITERATIONS = 2
HOPE = 1.1  # how much better than the sketch the true singular vectors may be, where giving up is decided


def low_rank_form(matrix: Tensor, largest: int, error: float = ERROR) -> tuple[Tensor, Tensor] | None:
    """up [N, r] and down [r, K] with |matrix - up @ down| <= error * |matrix|, r as small as that allows; None when `largest` is too small.

    Randomised subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061) from a fixed seed, with ranks that double. Singular values
    fall, so what a first sketch has found bounds what any larger rank can find: most matrices without such a form are left after one.
    """
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    largest = min(largest, *matrix.shape)
    if largest < 1 or not 0 < total < float("inf"):
        return None
    allowed, seeds = total * error**2, torch.Generator(matrix.device).manual_seed(0)
    basis, rank = None, min(FIRST_RANK, largest)
    while True:
        basis = _basis(matrix, basis, rank, seeds)
        inside = basis.t() @ matrix
        values, vectors = torch.linalg.eigh(inside @ inside.t())
        found = values.flip(0).clamp(min=0).double().cumsum(0)
        enough = (total - found <= allowed).nonzero()
        if len(enough):
            best = vectors.flip(1)[:, : int(enough[0]) + 1]
            return basis @ best, best.t() @ inside
        if rank == largest or float(found[-1]) * largest / rank * HOPE < total - allowed:
            return None
        rank = min(2 * rank, largest)


def _basis(matrix: Tensor, known: Tensor | None, rank: int, seeds: torch.Generator) -> Tensor:
    """Orthonormal columns [N, rank] that span nearly what the first left singular vectors do. known: a smaller such basis."""
    have = 0 if known is None else known.shape[1]
    random = torch.randn(matrix.shape[1], rank - have, generator=seeds, device=matrix.device, dtype=matrix.dtype)
    basis = matrix @ random
    basis = torch.linalg.qr(basis if known is None else torch.cat((known, basis), 1))[0]
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis)[0])[0]
    return basis
