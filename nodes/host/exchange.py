"""Exchanging the patches that the host has merged into what is not packed: embedders, final layer, norms and biases.

The host does that by unloading the whole model and loading it again. Here each such weight is put back from the host's backup and merged
anew, on the device; an offloaded layer gets its new patches in the functions that the host calls when it streams the layer.
"""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import comfy.weight_adapter
import torch
from torch import nn

from .patches import Patch, fingerprint, is_kind

LowVramPatch = comfy.model_patcher.LowVramPatch


def split(patcher: comfy.model_patcher.ModelPatcher, key: str) -> tuple[nn.Module, str, str]:
    """A key's module, the module's name, and the parameter's name in it."""
    name, _, parameter = key.rpartition(".")
    return comfy.utils.get_attr(patcher.model, name), name, parameter


def is_loaded(module: nn.Module) -> bool:
    """Whether the host has loaded a module, and merged its patches."""
    return getattr(module, "comfy_patched_weights", False) is True


def can_be_streamed(module: nn.Module, parameter: str) -> bool:
    """Whether the host can leave a parameter elsewhere and stream it with the patches on it."""
    return hasattr(module, "comfy_cast_weights") and hasattr(module, f"{parameter}_function")


def is_streamed(module: nn.Module, parameter: str) -> bool:
    return can_be_streamed(module, parameter) and not is_loaded(module)


def functions(module: nn.Module, parameter: str) -> list:
    """What the host calls on a parameter that it streams."""
    return getattr(module, f"{parameter}_function", None) or []


def patches_streamed(module: nn.Module, parameter: str) -> int:
    """How many of those are patches."""
    return sum(isinstance(f, LowVramPatch) for f in functions(module, parameter))


def streamed(patcher: comfy.model_patcher.ModelPatcher) -> dict[str, object]:
    """Fingerprints of the patches that are applied while streaming, by key."""
    found = {}
    for module in patcher.model.modules():
        for parameter in ("weight", "bias"):
            for f in functions(module, parameter):
                if isinstance(f, LowVramPatch):
                    found[f.key] = fingerprint(f.patches.get(f.key, ()))
    return found


def merged(patcher: comfy.model_patcher.ModelPatcher) -> dict[str, object]:
    """Fingerprints of the patches that have just been merged by this patcher, by key."""
    return {key: fingerprint(patcher.patches[key]) for key in patcher.backup if key in patcher.patches}


def exchange(patcher: comfy.model_patcher.ModelPatcher, before: dict[str, object], device: torch.device) -> None:
    """Puts the patcher's patches in place of the merged and streamed ones of another clone. before: what `merged` said of those.

    The patcher hides its patches on packed weights meanwhile.
    """
    applied = streamed(patcher) | {key: before.get(key) for key in patcher.backup}
    wanted = {key: fingerprint(patches) for key, patches in patcher.patches.items()}
    for key in sorted(applied.keys() | wanted.keys()):
        if applied.get(key, ()) != wanted.get(key, ()):
            exchange_one(patcher, key, device)


def exchange_one(patcher: comfy.model_patcher.ModelPatcher, key: str, device: torch.device) -> None:
    module, _, parameter = split(patcher, key)
    restore(patcher, key)
    kept = [f for f in functions(module, parameter) if not isinstance(f, LowVramPatch)]
    patcher.model.lowvram_patch_counter -= patches_streamed(module, parameter)
    if is_streamed(module, parameter) and key in patcher.patches:
        _, set_function, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
        kept.insert(0, LowVramPatch(key, patcher.patches, convert, set_function))
        patcher.model.lowvram_patch_counter += 1
    if kept or functions(module, parameter):
        setattr(module, f"{parameter}_function", kept)
    if is_loaded(module):
        if key in patcher.patches:
            patcher.patch_weight_to_device(key, device_to=device)
        if getattr(module, parameter).device != device:
            comfy.utils.set_attr_param(patcher.model, key, getattr(module, parameter).to(device))


def restore(patcher: comfy.model_patcher.ModelPatcher, key: str) -> None:
    """Undoes the host's merge of a key, if there is one. The weight is then where the backup was."""
    backup = patcher.backup.pop(key, None)
    if backup is None:
        return
    if backup.inplace_update:
        comfy.utils.copy_to_param(patcher.model, key, backup.weight)
    else:
        comfy.utils.set_attr_param(patcher.model, key, backup.weight)


# -- what the host leaves out of a partial load ------------------------------------------------------------------------------------------


def widens(patches: list[Patch]) -> bool:
    """Whether patches change a weight's shape (FLUX tools' LoRAs give img_in more input channels)."""
    for _, value, *_ in patches:
        if isinstance(value, comfy.weight_adapter.LoRAAdapter) and value.weights[5] is not None:
            return True
        if is_kind(value, "diff") and len(value[1]) > 1 and value[1][1].get("pad_weight"):
            return True
    return False


def bound_to_stay(patcher: comfy.model_patcher.ModelPatcher) -> dict[str, nn.Module]:
    """The layers that have to be loaded for the patcher's patches to count: those that the host cannot stream, and those with new shapes.

    FLUX looks at the shape of img_in's weight to find out what it is given, which is the new one only once that is merged.
    """
    found = {}
    for key, patches in patcher.patches.items():
        module, name, parameter = split(patcher, key)
        if widens(patches) or not can_be_streamed(module, parameter):
            found[name] = module
    return found


def complete(patcher: comfy.model_patcher.ModelPatcher, device: torch.device) -> None:
    """Puts right what a partial load by the host leaves wrong.

    It may offload layers that are bound to stay. And a loaded layer that a later load would rather offload is marked as streamed, with its
    patches a second time, but stays where it is.
    """
    for name, module in bound_to_stay(patcher).items():
        if not is_loaded(module):
            keep_loaded(patcher, name, module, device)
    for name, module in patcher.model.named_modules():
        if is_loaded(module) and hasattr(module, "prev_comfy_cast_weights") and not patcher.force_cast_weights:
            keep_loaded(patcher, name, module, device)


def keep_loaded(patcher: comfy.model_patcher.ModelPatcher, name: str, module: nn.Module, device: torch.device) -> None:
    """Loads a layer that the host has just offloaded, or marked so."""
    size = comfy.model_management.module_size(module)
    patcher.model.lowvram_patch_counter -= sum(patches_streamed(module, parameter) for parameter in module._parameters)
    comfy.model_patcher.wipe_lowvram_weight(module)
    for parameter in list(module._parameters):
        key = f"{name}.{parameter}"
        if hasattr(patcher, "unpin_weight"):
            patcher.unpin_weight(key)
        if key in patcher.patches and key not in patcher.backup:
            patcher.patch_weight_to_device(key, device_to=device)
        wrappers = patcher.weight_wrapper_patches.get(key)
        if wrappers:
            setattr(module, f"{parameter}_function", list(wrappers))
    module.to(device)
    module.comfy_patched_weights = True
    patcher.model.model_loaded_weight_memory += size
