"""From the host's patches on one packed weight to the branch that runs beside it."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.lora
import comfy.weight_adapter
import torch
from torch import Tensor

from ...models.linear import PackedLinear

# The host's patch: (strength, adapter or tuple or list, strength of the model's own weight, (dim, start, length) or None, function or None)
Patch = tuple


class PatchError(ValueError):
    """A patch that does not fit its layer."""


@dataclass(frozen=True)
class Branch:
    """What is added to one packed weight: up [N, r] @ down [r, K], or a dense delta [N, K]."""

    down: Tensor | None = None
    up: Tensor | None = None
    delta: Tensor | None = None

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.down, self.up, self.delta) if t is not None)

    def to(self, device: torch.device) -> Branch:
        return Branch(*(None if t is None else t.to(device) for t in (self.down, self.up, self.delta)))


def is_low_rank(patch: Patch) -> bool:
    """Plain LoRA: a product of two factors added to the weight, and nothing that depends on the weight itself."""
    _, value, strength_model, _, function = patch
    if not isinstance(value, comfy.weight_adapter.LoRAAdapter) or strength_model != 1.0 or function is not None:
        return False
    return all(extra is None for extra in value.weights[3:6])  # mid, DoRA scale, reshape


def active(patches: list[Patch]) -> list[Patch]:
    """Without those that change nothing: strength 0 beside the model's own weight in full. ("set" ignores its strength.)"""
    return [p for p in patches if p[0] != 0 or p[2] != 1.0 or (isinstance(p[1], tuple) and p[1][0] == "set")]


def planned_elements(module: PackedLinear, patches: list[Patch]) -> int:
    """How many numbers the branch of these patches will hold."""
    patches, n, k = active(patches), module.out_features, module.in_features
    if not all(is_low_rank(p) for p in patches):
        return n * k
    return min(sum(p[1].weights[1].shape[0] for p in patches) * (n + k), n * k)


def make_branch(module: PackedLinear, key: str, patches: list[Patch], device: torch.device, dtype: torch.dtype) -> Branch | None:
    """The branch of a layer's patches, on `device` in `dtype`; None when they change nothing. Raises PatchError when one does not fit."""
    patches = active(patches)
    if not patches:
        return None
    if not all(is_low_rank(p) for p in patches):
        return Branch(delta=dense_delta(module, key, patches, device).to(dtype))
    factors = [low_rank_factors(module, key, p, device) for p in patches]
    up, down = torch.cat([u for u, _ in factors], 1), torch.cat([d for _, d in factors], 0)
    if down.shape[0] * (module.out_features + module.in_features) >= module.out_features * module.in_features:
        return Branch(delta=(up @ down).to(dtype))  # many or large LoRAs: the product is the smaller form
    return Branch(down=down.to(dtype), up=up.to(dtype))


def low_rank_factors(module: PackedLinear, key: str, patch: Patch, device: torch.device) -> tuple[Tensor, Tensor]:
    """up [N, r] (strength * alpha / r folded in) and down [r, K] in fp32; rows or columns outside the patch's slice are zero."""
    strength, adapter, _, offset, _ = patch
    up, down = (t.to(device, torch.float32).flatten(1) for t in adapter.weights[:2])
    alpha = adapter.weights[2]
    up = up * (strength * (1.0 if alpha is None else float(alpha) / down.shape[0]))
    n, k = module.out_features, module.in_features
    dim, start, length = offset or (0, 0, n)
    expected = (length, k) if dim == 0 else (n, length)
    if (up.shape[0], down.shape[1]) != expected or start + length > (n, k)[dim]:
        raise PatchError(f"{key} is {expected[0]} x {expected[1]}, the LoRA {up.shape[0]} x {down.shape[1]}")
    if offset is not None and dim == 0:
        up = torch.nn.functional.pad(up, (0, 0, start, n - start - length))
    elif offset is not None:
        down = torch.nn.functional.pad(down, (start, k - start - length))
    return up, down


def dense_delta(module: PackedLinear, key: str, patches: list[Patch], device: torch.device) -> Tensor:
    """fp32 [N, K]: what the host's own merge makes of the dense weight, minus that weight (LoKr, LoHa, DoRA, diffs, merged models)."""
    dense = module.convert_weight(module.weight.to(device))
    originals = {key: [(dense, lambda weight, **_: weight)]}
    merged = comfy.lora.calculate_weight(patches, dense.clone(), key, intermediate_dtype=torch.float32, original_weights=originals)
    if merged.shape != dense.shape:
        raise PatchError(f"{key} is {tuple(dense.shape)}, the patch makes it {tuple(merged.shape)}")
    delta = merged.sub_(dense)
    if not delta.any():
        raise PatchError(f"{key}: the host could not apply it (its reason is above)")
    return delta


def merged_weight(module: PackedLinear, branch: Branch | None) -> Tensor:
    """fp32 [N, K]: the dense weight that a packed layer and its branch amount to, on the layer's device."""
    weight = module.dense()[0]
    for part in () if branch is None else (branch.delta, None if branch.up is None else branch.up.float() @ branch.down.float()):
        weight = weight if part is None else weight + part.to(weight.device)
    return weight


def shifts_input(module: PackedLinear) -> bool:
    """Whether a layer adds a constant to its input, which its stored bias takes back (INT4 layers fed by a GELU)."""
    return module.bias is not None and any(part.act_unsigned for part in module.spec.parts)


def shift_of(module: PackedLinear) -> Tensor:
    """fp32 [N]: what such a layer's stored bias lacks against the plain layer's."""
    return module.dense()[1] - module.bias.float()
