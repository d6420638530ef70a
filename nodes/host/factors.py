"""Adapters of the host that add a product of two small factors to a weight, and those factors.

The formulas are those of the host's comfy/weight_adapter, which names an adapter's tensors by their place in `weights`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import comfy.weight_adapter as adapters
import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, float]  # up [n, r] and down [r, k] in any float type, and a scale
Weight = Callable[[], Tensor]  # the weight as it is before the patch, fp32 [n, k]


@dataclass(frozen=True)
class Form:
    """One kind of adapter.

    size(weights, rows, columns): (rows, columns, rank) of the product, None where these weights add none; rows and columns are the layer's.
    make(weights, device, weight): the factors.
    dora: where the scale of a weight decomposition lies, with which the sum is no product.
    """

    size: Callable[[tuple, int, int], tuple[int, int, int] | None]
    make: Callable[[tuple, torch.device, Weight], Factors]
    dora: int


def product_size(value: object, rows: int, columns: int) -> tuple[int, int, int] | None:
    """(rows, columns, rank) of the product that a patch's value adds to a layer of that size; None where it adds something else."""
    form = FORMS.get(type(value))
    return None if form is None or value.weights[form.dora] is not None else form.size(value.weights, rows, columns)


def factors(value: object, device: torch.device, weight: Weight) -> Factors:
    """That product."""
    return FORMS[type(value)].make(value.weights, device, weight)


def scale_of(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else float(alpha) / rank


def on(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """fp32 on the device; in their own type on the way there, which is the smaller one."""
    return tuple(t.to(device).float() for t in tensors)


def lora_size(w: tuple, rows: int, columns: int) -> tuple[int, int, int] | None:
    """w: up, down, alpha, mid, DoRA, reshape."""
    if w[3] is not None or not (w[5] is None or tuple(w[5]) == (rows, columns)):
        return None
    return w[0].shape[0], w[1][0].numel(), w[1].shape[0]


def lora_factors(w: tuple, device: torch.device, weight: Weight) -> Factors:
    return w[0].flatten(1), w[1].flatten(1), scale_of(w[2], w[1].shape[0])


def loha_size(w: tuple, rows: int, columns: int) -> tuple[int, int, int] | None:
    """w: a1 [n, r], b1 [r, k], alpha, a2, b2, t1, t2, DoRA."""
    return None if w[5] is not None else (w[0].shape[0], w[1].shape[1], w[1].shape[0] * w[4].shape[0])


def loha_factors(w: tuple, device: torch.device, weight: Weight) -> Factors:
    """(a1 b1) o (a2 b2): an element-wise product of two products is the product of all pairs of columns and all pairs of rows."""
    a1, b1, a2, b2 = on(device, w[0], w[1], w[3], w[4])
    up = torch.einsum("ni,nj->nij", a1, a2).flatten(1)
    return up, torch.einsum("ik,jk->ijk", b1, b2).flatten(0, 1), scale_of(w[2], b1.shape[0])


def lokr_size(w: tuple, rows: int, columns: int) -> tuple[int, int, int] | None:
    """w: w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, t2, DoRA; w1 and w2 whole or as two factors."""
    if w[7] is not None:
        return None
    (n1, k1, r1), (n2, k2, r2) = kron_size(w[0], w[3], w[4]), kron_size(w[1], w[5], w[6])
    return n1 * n2, k1 * k2, r1 * r2


def kron_size(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[int, int, int]:
    return (a.shape[0], b.shape[1], b.shape[0]) if whole is None else (*whole.shape, min(whole.shape))


def lokr_factors(w: tuple, device: torch.device, weight: Weight) -> Factors:
    """(a1 b1) x (a2 b2) = (a1 x a2) (b1 x b2), for the Kronecker product x."""
    (a1, b1), (a2, b2) = kron_factors(device, w[0], w[3], w[4]), kron_factors(device, w[1], w[5], w[6])
    split = [b.shape[0] for whole, b in ((w[1], w[6]), (w[0], w[4])) if whole is None]
    scale = scale_of(w[2], split[0]) if split else 1.0  # the alpha of a whole w1 and w2 means nothing to the host
    return torch.kron(a1, a2), torch.kron(b1, b2), scale


def kron_factors(device: torch.device, whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, ...]:
    if whole is None:
        return on(device, a, b)
    (whole,) = on(device, whole)
    n, k = whole.shape
    return (whole, torch.eye(k, device=device)) if k <= n else (torch.eye(n, device=device), whole)


def glora_size(w: tuple, rows: int, columns: int) -> tuple[int, int, int] | None:
    """w: a1, a2, b1, b2, alpha, DoRA. Raises ValueError where the host could not tell a rank."""
    first, second, rank = (3, 2, w[0].shape[0]) if is_old_glora(w, rows, columns) else (2, 3, w[1].shape[0])
    return w[first].shape[0], w[second][0].numel(), 2 * rank


def is_old_glora(w: tuple, rows: int, columns: int) -> bool:
    """Files of old LyCORIS versions have the factors the other way round. Where both ways fit, the host goes by the layer's shape."""
    old = w[3].shape[1] == w[2].shape[0] == w[0].shape[0] == w[1].shape[1]
    new = w[3].shape[0] == w[2].shape[1] == w[0].shape[1] == w[1].shape[0]
    if not old and not new:
        raise ValueError(f"its GLoRA factors {[tuple(t.shape) for t in w[:4]]} do not multiply")
    return old and not (new and not w[1].shape[0] == rows == columns)


def glora_factors(w: tuple, device: torch.device, weight: Weight) -> Factors:
    """W a1 a2 + b1 b2, or in the old form W a2 a1 + b2 b1."""
    whole = weight()
    old = is_old_glora(w, *whole.shape)
    a1, a2, b1, b2 = on(device, *(t.flatten(1) for t in w[:4]))
    (a1, a2), (b1, b2) = ((a2, a1), (b2, b1)) if old else ((a1, a2), (b1, b2))
    return torch.cat((whole @ a1, b1), 1), torch.cat((a2, b2), 0), scale_of(w[4], a2.shape[0])


FORMS = {
    adapters.LoRAAdapter: Form(lora_size, lora_factors, 4),
    adapters.LoHaAdapter: Form(loha_size, loha_factors, 7),
    adapters.LoKrAdapter: Form(lokr_size, lokr_factors, 8),
    adapters.GLoRAAdapter: Form(glora_size, glora_factors, 5),
}
