"""From the host's patches on one packed weight to what runs beside it.

Patches that add a product of two factors become columns, exactly, in whatever order they come. What else a patch changes is collected in
a dense delta, for which the best low-rank form within 1 % is taken where that is much smaller. A patch that reads the weight (DoRA, OFT,
merges of models) reads it with everything that comes before it on the list.
"""

from __future__ import annotations

from dataclasses import dataclass

import comfy.weight_adapter as adapters
import torch
from torch import Tensor

from ...models.linear import PackedLeaf
from ...models.lora import Shape, Side, Term, make_side, planned_nbytes, shape_of
from .factors import FORMS, factors, product_size
from .low_rank import low_rank_form
from .patches import Patch, PatchError, active, caught, fingerprint, is_kind, patched, window


@dataclass(frozen=True)
class Plan:
    """What the patches on one packed weight will become, found out from shapes alone."""

    print: object  # equal for equal patches
    patches: tuple[tuple[Patch, Shape | None], ...] = ()  # those that fit, each with its exact low-rank form if it has one
    refused: tuple[str, ...] = ()
    nbytes: int = 0  # at most


def plan_branch(module: PackedLeaf, key: str, patches: list[Patch], itemsize: int) -> Plan:
    """The plan of a layer's patches, for numbers of `itemsize` bytes."""
    kept, refused, n, k = [], [], module.out_features, module.in_features
    for patch in active(patches):
        with caught(key) as said:
            kept.append((patch, exact_shape(patch, key, n, k)))
        refused += said
    dense = n * k * itemsize
    size = min(planned_nbytes(module.spec, [shape for _, shape in kept if shape is not None], itemsize), dense)
    size += dense if any(shape is None for _, shape in kept) else 0
    return Plan(fingerprint(patches), tuple(kept), tuple(refused), size)


def exact_shape(patch: Patch, key: str, n: int, k: int) -> Shape | None:
    """Shape of the product that a patch adds to an [n, k] weight; None where it adds none, or one that is larger than the weight.

    Raises PatchError where the patch does not fit the weight.
    """
    _, value, kept, _, function = patch
    rows, columns, row, column = window(patch, n, k)
    size = product_size(value, rows, columns)
    if size is None:
        return None
    *fits, rank = size
    if fits != [rows, columns]:
        raise PatchError(f"{key} is {rows} x {columns}, the LoRA {fits[0]} x {fits[1]}")
    small = isinstance(value, adapters.LoRAAdapter) or rank * (rows + columns) < rows * columns
    return (rank, rows, columns, row, column) if small and kept == 1.0 and function is None else None


def make_branch(module: PackedLeaf, key: str, plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[Side | None, list[str]]:
    """The side of a layer's patches, on `device` in `dtype`, None when they change nothing; and what could not be applied, in sentences."""
    weight, refused = Sum(module, device), list(plan.refused)
    for patch, shape in plan.patches:
        with caught(key) as said:
            if shape is None:
                delta, within = change(patch, key, weight)
                weight.add(delta)
                refused += within
            else:
                weight.terms.append(exact_term(patch, shape, weight))
        refused += said
    terms, delta = weight.smallest(dtype.itemsize)
    return make_side(module.spec, terms, delta, device, dtype), refused


class Sum:
    """What the patches that have been applied so far add to a layer's weight: exact products, and a delta for the rest."""

    def __init__(self, module: PackedLeaf, device: torch.device):
        self.module, self.device = module, device
        self.terms: list[Term] = []
        self.delta: Tensor | None = None

    def base(self) -> Tensor:
        """fp32 [N, K]: the layer's own weight."""
        return self.module.convert_weight(self.module.weight.to(self.device))

    def zeros(self) -> Tensor:
        return torch.zeros(self.module.out_features, self.module.in_features, device=self.device)

    def now(self) -> Tensor:
        """fp32 [N, K]: the weight with all of it."""
        weight = self._with_terms(self.base())
        return weight if self.delta is None else weight.add_(self.delta)

    def add(self, delta: Tensor) -> None:
        self.delta = delta if self.delta is None else self.delta.add_(delta)

    def smallest(self, itemsize: int) -> tuple[list[Term], Tensor | None]:
        """Terms, and a delta unless it is zero or has a low-rank form that is much smaller; a delta alone where the terms are larger."""
        n, k = self.module.out_features, self.module.in_features
        if planned_nbytes(self.module.spec, [shape_of(t) for t in self.terms], itemsize) >= n * k * itemsize:
            return [], self._with_terms(self.zeros() if self.delta is None else self.delta)
        if self.delta is None or not self.delta.any():
            return self.terms, None
        form = low_rank_form(self.delta, n * k // (4 * (n + k)))
        return (self.terms, self.delta) if form is None else ([*self.terms, Term(*form)], None)

    def _with_terms(self, weight: Tensor) -> Tensor:
        for t in self.terms:
            _, n, k, row, column = shape_of(t)
            up, down = (f.to(self.device).float() for f in (t.up, t.down))
            weight[row : row + n, column : column + k].addmm_(up, down, alpha=t.scale)
        return weight


def exact_term(patch: Patch, shape: Shape, weight: Sum) -> Term:
    """The product that a patch adds, with its strength."""
    _, rows, columns, row, column = shape

    def here() -> Tensor:
        return weight.now()[row : row + rows, column : column + columns]

    up, down, scale = factors(patch[1], weight.device, here)
    return Term(up, down, patch[0] * scale, row, column)


def change(patch: Patch, key: str, weight: Sum) -> tuple[Tensor, list[str]]:
    """fp32 [N, K]: what a patch adds to the weight as it is now, by the host's own code; and what could not be applied of it."""
    if not reads_weight(patch):
        return patched(weight.zeros(), patch, key, original_of(patch, weight))
    before = weight.now()
    after, refused = patched(before.clone(), patch, key)
    return after.sub_(before), refused


def original_of(patch: Patch, weight: Sum) -> Tensor | None:
    """The model's own weight, or the slice of it that the patch is for, where the patch is a difference to it."""
    if not is_kind(patch[1], "model_as_lora"):
        return None
    return weight.base() if patch[3] is None else weight.base().narrow(*patch[3])


def reads_weight(patch: Patch) -> bool:
    """Whether what a patch adds depends on the weight that it is added to."""
    _, value, kept, _, _ = patch
    if kept != 1.0 or is_kind(value, "set"):
        return True
    if not isinstance(value, adapters.WeightAdapterBase):
        return False
    form = FORMS.get(type(value))
    return form is None or isinstance(value, adapters.GLoRAAdapter) or value.weights[form.dora] is not None


def merged_weight(module: PackedLeaf, key: str, patches: list[Patch], device: torch.device | None = None) -> Tensor:
    """fp32 [N, K]: the dense weight with the patches that can be applied, on `device` or where the packed one lies."""
    layer = Sum(module, module.weight.device if device is None else device)
    weight = layer.base()
    for patch in active(patches):
        with caught(key):
            weight, _ = patched(weight.clone(), patch, key, original_of(patch, layer))
    return weight
