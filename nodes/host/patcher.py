"""The host's model patcher, taught that packed weights are never rewritten: what LoRA adds to them runs as a branch beside them.

The host's patch list stays the truth. Patches on packed keys stay in `self.patches` (clones, their comparison and other nodes read them
there) and are hidden only while the host's own code loads, moves or merges weights. Biases and unpacked layers are the host's business.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import comfy.model_patcher
import torch
from torch import Tensor

from ...models.graphs import Graphs
from ...models.linear import PackedLinear
from .branches import Branch, Patch, PatchError, make_branch, merged_weight, planned_elements, shift_of, shifts_input

log = logging.getLogger(__name__)

MOST_NAMED = 6


@dataclass
class Attached:
    """Which branches the model runs with. Kept on the model, which clones share."""

    owner: object  # patches_uuid that `own` was made from
    host_state: tuple  # what the host has merged beside them
    own: dict[str, Branch] = field(default_factory=dict)  # from a patcher's patches
    hooked: dict[str, Branch] = field(default_factory=dict)  # from the patches and the current weight hooks, where hooks touch a key

    @property
    def branches(self) -> dict[str, Branch]:
        return {**self.own, **self.hooked}


class TonfaPatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher for models with PackedLinear leaves. Signatures take what any host version passes."""

    cached_patcher_init: tuple | None = None
    _hidden: dict[str, list[Patch]] | None = None

    @property
    def packed(self) -> dict[str, PackedLinear]:
        """State-dict key of the weight -> leaf. The leaves are fixed once the model is built, so they are looked up once."""
        if "_packed" not in self.__dict__:
            self._packed = {f"{n}.weight": m for n, m in self.model.named_modules() if isinstance(m, PackedLinear)}
        return self._packed

    @property
    def packed_patches(self) -> dict[str, list[Patch]]:
        """The patches on packed keys, hidden or not."""
        return self._hidden if self._hidden is not None else {k: v for k, v in self.patches.items() if k in self.packed}

    @property
    def _compute_dtype(self) -> torch.dtype:
        return self.model.manual_cast_dtype or self.model.get_dtype()

    @contextlib.contextmanager
    def _hiding(self) -> Iterator[None]:
        """Patches on packed keys out of the host's sight."""
        if self._hidden is not None:  # within another one: hidden already
            yield
            return
        hidden = self._hidden = {key: self.patches.pop(key) for key in list(self.patches) if key in self.packed}
        try:
            yield
        finally:
            self._hidden = None
            self.patches.update(hidden)

    # -- clones, sizes, patch list --------------------------------------------------------------------------------------------------

    def clone(self, *args: object, **kwargs: object) -> TonfaPatcher:
        copy = super().clone(*args, **kwargs)
        copy.size = self.size  # newer hosts pass on model_size(), but this is to be the weights' alone
        copy.cached_patcher_init = self.cached_patcher_init
        return copy

    def model_size(self) -> int:
        """Bytes when all is loaded: the weights, and the branches that the patches will need."""
        size = super().model_size()
        return size if self._hidden is not None else size + self._planned_bytes()

    def _planned_bytes(self) -> int:
        elements = sum(planned_elements(self.packed[key], patches) for key, patches in self.packed_patches.items())
        return elements * self._compute_dtype.itemsize

    def add_patches(self, patches: dict, *args: object, **kwargs: object) -> list:
        """As the host's; then puts merges (strength_model not 1, or "set") of biases right that lack their layer's input shift."""
        before = {key: len(listed) for key, listed in self.patches.items()}
        added = super().add_patches(patches, *args, **kwargs)
        for key in {k if isinstance(k, str) else k[0] for k in added if str(k if isinstance(k, str) else k[0]).endswith(".bias")}:
            module = self.packed.get(key.removesuffix("bias") + "weight")
            for patch in self.patches[key][before.get(key, 0) :] if module is not None and shifts_input(module) else []:
                kept = 0.0 if isinstance(patch[1], tuple) and patch[1][0] == "set" else patch[2]
                if kept != 1.0:
                    self.patches[key].append((kept - 1.0, ("diff", (shift_of(module),)), 1.0, None, shift_correction))
        return added

    def get_key_patches(self, *args: object, **kwargs: object) -> dict[str, list]:
        """The host's {key: [(weight, convert function), patches...]}: real numbers for whoever merges from this model, and plain biases."""
        listed = super().get_key_patches(*args, **kwargs)
        for key, module in self.packed.items():
            bias_key = key.removesuffix("weight") + "bias"
            if bias_key in listed and shifts_input(module):
                (bias, _), *rest = listed[bias_key]
                listed[bias_key] = [(bias, functools.partial(add_shift, module)), *(p for p in rest if p[4] is not shift_correction)]
        return listed

    # -- loading and unloading --------------------------------------------------------------------------------------------------------

    def load(self, device_to: torch.device | None = None, lowvram_model_memory: float = 0, *args: object, **kwargs: object) -> None:
        budget = lowvram_model_memory
        if budget:  # 0 means no limit; else what is new of it is shared between weights and their branches
            used = self.model.model_loaded_weight_memory
            with self._hiding():
                weights = self.model_size()
                share = weights / max(weights + self._planned_bytes(), 1)
            budget = max(used - self._resident_bytes() + (budget - used) * share, 0.1)
        with self._hiding():
            super().load(device_to, budget, *args, **kwargs)
        self._attach()
        self.model.model_loaded_weight_memory += self._resident_bytes()

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, *args: object, **kwargs: object) -> int:
        """As the host's, but when only patches on packed keys differ from what is loaded, their branches are exchanged in place."""
        loaded, attached = self.model.current_weight_patches_uuid, self._attached
        force = kwargs.get("force_patch_weights", args[0] if args else False)
        if loaded not in (None, self.patches_uuid) and not force and attached is not None and same(attached.host_state, self._host_state()):
            self.unpatch_hooks()
            with self._counting():
                self._attach()
            self.model.current_weight_patches_uuid = self.patches_uuid
        return super().partially_load(device_to, extra_memory, *args, **kwargs)

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, *args: object, **kwargs: object) -> int:
        """As the host's; each layer that goes takes its branch along, and both count."""
        self._graphs.release()
        freed, used = 0, max(self.model.model_loaded_weight_memory, 1)
        share = 1 - self._resident_bytes() / used
        for asked in (memory_to_free * share, None):  # the second time for what the first left, when branches are unevenly spread
            before = self._resident_bytes()
            with self._hiding():
                freed += super().partially_unload(device_to, memory_to_free - freed if asked is None else asked, *args, **kwargs)
            released = before - self._resident_bytes()
            self.model.model_loaded_weight_memory -= released
            freed += released
            if freed >= memory_to_free or not self._resident_bytes():
                break
        self._place()
        return freed

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True, **kwargs: object) -> None:
        super().unpatch_model(device_to, unpatch_weights, **kwargs)
        if unpatch_weights:
            self._set_attached(None)
            self._graphs.release()

    def cleanup(self) -> None:
        """After a sampling."""
        super().cleanup()
        if self.load_device.type == "cuda":
            self._graphs.trim(self.load_device)

    @property
    def _graphs(self) -> Graphs:
        return self.model.diffusion_model.runtime.graphs

    def patch_weight_to_device(self, key: str, device_to: torch.device | None = None, *args: object, **kwargs: object) -> Tensor | None:
        """A packed weight stays as it is. With `return_weight` (newer hosts, saving) the answer is the dense weight with its branch."""
        if key not in self.packed:
            return super().patch_weight_to_device(key, device_to, *args, **kwargs)
        if kwargs.get("return_weight", args[1] if len(args) > 1 else False):
            branch = self._attached.branches.get(key) if self._attached is not None else None
            return merged_weight(self.packed[key], branch).to(self._compute_dtype)
        return self.packed[key].weight

    # -- weight hooks -----------------------------------------------------------------------------------------------------------------

    def patch_hooks(self, hooks: object) -> None:
        super().patch_hooks(hooks)
        combined = self.get_combined_hook_patches(hooks) if hooks is not None else {}
        self._attach_hooked({key: patches for key, patches in combined.items() if key in self.packed})

    def patch_hook_weight_to_device(self, hooks: object, combined_patches: dict, key: str, *args: object, **kwargs: object) -> None:
        if key not in self.packed:
            super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        super().unpatch_hooks(whitelist_keys_set)
        if not whitelist_keys_set:
            self._attach_hooked({})

    # -- branches -----------------------------------------------------------------------------------------------------------------------

    @property
    def _attached(self) -> Attached | None:
        return getattr(self.model, "tonfa_attached", None)

    def _host_state(self) -> tuple:
        """What a load depends on besides the patches on packed keys."""
        patches = {key: tuple(listed) for key, listed in self.patches.items() if key not in self.packed}
        wrappers = {key: tuple(listed) for key, listed in self.weight_wrapper_patches.items()}
        return patches, wrappers, self.force_cast_weights

    def _attach(self) -> None:
        """Puts the branches of this patcher's patches beside the packed weights, or leaves them where they are there already."""
        attached = self._attached
        if attached is None or attached.owner != self.patches_uuid:
            self._set_attached(Attached(self.patches_uuid, self._host_state(), self._make_branches(self.packed_patches)))
        else:
            attached.host_state = self._host_state()
            self._place()

    def _attach_hooked(self, patches: dict[str, list[Patch]]) -> None:
        """The same for the keys that weight hooks touch: `patches` come on top of the patcher's own."""
        attached = self._attached
        if attached is None or not (patches or attached.hooked):
            return
        own = self.packed_patches
        hooked = self._make_branches({key: own.get(key, []) + listed for key, listed in patches.items()})
        with self._counting():
            self._set_attached(Attached(attached.owner, attached.host_state, attached.own, hooked))

    def _make_branches(self, patches: dict[str, list[Patch]]) -> dict[str, Branch]:
        branches, refused = {}, []
        for key, listed in patches.items():
            try:
                branch = make_branch(self.packed[key], key, listed, self.load_device, self._compute_dtype)
            except PatchError as error:
                refused.append(str(error))
                continue
            if branch is not None:
                branches[key] = branch
        if refused:
            more = f"; and {len(refused) - MOST_NAMED} more" if len(refused) > MOST_NAMED else ""
            log.warning("%d patch(es) could not be applied to this 4-bit model: %s%s", len(refused), "; ".join(refused[:MOST_NAMED]), more)
        return branches

    def _set_attached(self, attached: Attached | None) -> None:
        old = self._attached
        self.model.tonfa_attached = attached
        for key in old.branches if old is not None else ():
            self.packed[key].set_side()
        self._place()

    def _place(self) -> None:
        """Each branch lies where its layer's weight lies."""
        attached = self._attached
        for kind in (attached.own, attached.hooked) if attached is not None else ():
            for key, branch in kind.items():
                kind[key] = branch.to(self.packed[key].weight.device)
        for key, branch in attached.branches.items() if attached is not None else ():
            self.packed[key].set_side(branch.down, branch.up, branch.delta)

    def _resident_bytes(self) -> int:
        """Bytes of the branches whose layers the host counts as loaded."""
        branches = self._attached.branches if self._attached is not None else {}
        return sum(b.nbytes() for key, b in branches.items() if getattr(self.packed[key], "comfy_patched_weights", False) is True)

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """Lets the loaded size follow what happens to the branches inside."""
        before = self._resident_bytes()
        yield
        self.model.model_loaded_weight_memory += self._resident_bytes() - before


def shift_correction(weight: Tensor) -> Tensor:
    """Identity; as a patch's function it marks what add_patches added for a shifted bias."""
    return weight


def add_shift(module: PackedLinear, bias: Tensor, **_: object) -> Tensor:
    """The plain layer's bias from a shifted layer's stored one; as the host's convert function it costs only whoever asks."""
    return bias.float() + shift_of(module).to(bias.device)


def same(a: object, b: object) -> bool:
    """Equality of nested dicts and tuples; all but numbers and strings in them by identity, since tensors have no truth value."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, int | float | str) and isinstance(b, int | float | str) and a == b)
