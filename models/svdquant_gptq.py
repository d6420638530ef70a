"""GPTQ (arXiv 2210.17323): round a weight's columns one after the other, each correcting what those before it did to the outputs.

In the form of LDLQ (arXiv 2307.13304), which gives the same: with the second moments H = U @ U.T of the inputs, U upper triangular, and
columns in falling order of H's diagonal, column j is rounded to the nearest of w_j + sum_{i<j} (w_i - q_i) * U_ij / U_jj.
"""

import torch
from torch import Tensor

from .formats.quantize import nearest_value

BLOCK = 128  # columns between two products of whole matrices
DAMPING = 0.01  # of the mean of H's diagonal, added to it


def gptq_values(w: Tensor, steps: Tensor, moments: Tensor, precision: str) -> Tensor:
    """fp32 [N, K]: numbers that codes stand for, times which the steps are near w [N, K] as inputs of second moments [K, K] see it.

    steps [N, groups], fp32. What a code cannot be is decided by `precision`. Raises torch.linalg.LinAlgError where moments are not those
    of any inputs.
    """
    k = w.shape[1]
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    feedback = _feedback(moments[order][:, order])
    w, steps = w[:, order], torch.where(steps > 0, steps, torch.ones_like(steps)).repeat_interleave(k // steps.shape[1], 1)[:, order]
    left, values = torch.zeros_like(w), torch.empty_like(w)
    for a in range(0, k, BLOCK):
        b = min(a + BLOCK, k)
        wanted = torch.addmm(w[:, a:b], left[:, :a], feedback[:a, a:b]).T.contiguous()  # a column is a row here: it lies together
        steps_, w_ = steps[:, a:b].T.contiguous(), w[:, a:b].T.contiguous()
        left_, values_ = torch.empty_like(w_), torch.empty_like(w_)
        near = feedback[a:b, a:b].T.contiguous()
        for j in range(b - a):
            aim = torch.addmv(wanted[j], left_[:j].T, near[j, :j])
            values_[j] = nearest_value(aim / steps_[j], precision)
            torch.addcmul(w_[j], values_[j], steps_[j], value=-1, out=left_[j])
        left[:, a:b], values[:, a:b] = left_.T, values_.T
    result = torch.empty_like(values)
    result[:, order] = values
    return result


def _feedback(moments: Tensor) -> Tensor:
    """U, every column divided by its element on the diagonal."""
    damped = moments + torch.diag((DAMPING * moments.diagonal().mean() + 1e-30).expand(len(moments)))
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    return upper / upper.diagonal()
