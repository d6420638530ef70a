"""The host's model patcher, taught that packed weights are never rewritten: what LoRA adds to them runs beside them.

The host's patch list stays the truth. Patches on packed keys stay in `self.patches` (clones, their comparison and other nodes read them
there) and are hidden only while the host's own code loads, moves or merges weights. Biases and unpacked layers are the host's business,
except that another clone's patches on them are exchanged where they lie: the host would unload the model and load it again.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Iterator

import comfy.hooks
import comfy.model_management
import torch

from ...models.graphs import Graphs
from ...models.linear import Leaf
from ...models.lora import Side
from ...models.segments import prepare
from .branches import Plan, make_branch, plan_branch
from .exchange import bound_to_stay, complete, exchange, is_loaded, merged, split
from .merging import MergingPatcher
from .offloading import Offload, start, stop, streamed_blocks, streamed_nbytes, streamer_of
from .patches import fingerprint, named

log = logging.getLogger(__name__)

Hooked = dict[str, Side | None]


class TonfaPatcher(MergingPatcher):
    """A ModelPatcher for models with packed leaves. Signatures take what any host version passes."""

    cached_patcher_init: tuple | None = None
    offload = Offload()
    _planned: tuple[tuple, dict[str, Plan]] | None = None
    _refused: list[str] | None = None  # what could not be applied, while it is collected

    def __init__(self, *args: object, **kwargs: object):
        self._kept: dict[comfy.hooks.HookGroup, tuple[tuple, Hooked]] = {}  # sides of weight hooks that may come on again
        self._told: set[str] = set()  # what could not be applied and has been said: loading again is no news
        super().__init__(*args, **kwargs)

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

    # -- clones and sizes ---------------------------------------------------------------------------------------------------------

    def clone(self, *args: object, **kwargs: object) -> TonfaPatcher:
        copy = super().clone(*args, **kwargs)
        copy.size = self.size  # newer hosts pass on model_size(), but this is to be the weights' alone
        copy.cached_patcher_init, copy.offload = self.cached_patcher_init, self.offload
        return copy

    def set_offload(self, offload: Offload) -> None:
        """Another way of offloading for this clone."""
        if offload != self.offload:
            self.offload = offload
            self.patches_uuid = uuid.uuid4()  # or the host would take it for loaded where another clone is

    @property
    def plans(self) -> dict[str, Plan]:
        """What the patches on packed keys will become."""
        patches = self.packed_patches
        if not patches:
            return {}
        state = self.patches_uuid, sum(map(len, patches.values()))
        if self._planned is None or self._planned[0] != state:
            size = self.compute_dtype.itemsize
            self._planned = state, {key: plan_branch(self.packed[key], key, listed, size) for key, listed in patches.items()}
        return self._planned[1]

    def model_size(self) -> int:
        """Bytes when all is loaded: the weights, or what streamed ones pass through, and what this patcher's patches need beside them."""
        size = super().model_size()
        if self._hidden is not None:
            return size
        streamed, buffers = streamed_nbytes(streamed_blocks(self.model, self.offload))
        return size - streamed + buffers + self.sides.sizes(self.plans)[0] + self._hook_bytes()

    def loaded_size(self) -> int:
        """Bytes of those that are loaded. The host's own count, `model_loaded_weight_memory`, is of the weights alone."""
        loaded = self.model.model_loaded_weight_memory + self.sides.sizes(self.plans)[1] + self._hook_bytes() + self._buffer_bytes()
        return min(max(loaded, 0), self.model_size())

    def _buffer_bytes(self) -> int:
        """Bytes of what blocks are streamed through."""
        streamer = streamer_of(self.model)
        return 0 if streamer is None else streamer.nbytes

    def _hook_bytes(self) -> int:
        """Bytes of what weight hooks have beside the layers, or keep for their next turn."""
        kept = {id(sides): sides for _, sides in self._kept.values()}
        return sum(map(self.sides.loaded, (kept | {id(self.sides.hooked): self.sides.hooked}).values()))

    def _used(self) -> int:
        """Bytes that the model takes where it is loaded, whoever's patches are on it."""
        return self.model.model_loaded_weight_memory + self.sides.nbytes() + self._buffer_bytes()

    # -- loading and unloading --------------------------------------------------------------------------------------------------------

    def load(self, device_to: torch.device | None = None, lowvram_model_memory: float = 0, *args: object, **kwargs: object) -> None:
        """As the host's. A budget (0: no limit) is shared between what is still to be loaded of the weights and what runs beside them."""
        budget = self.offload.budget(lowvram_model_memory)
        used, limit = self.model.model_loaded_weight_memory, budget + self.sides.nbytes()
        if self.offload.streams:
            kwargs["full_load"] = False
        with self._hiding():
            weights = self.model_size()
        sides = self.sides.sizes(self.plans)[0]
        if device_to is not None and (not budget or budget >= weights + sides):  # all of it
            prepare(torch.device(device_to), weights - used)
        if budget:
            budget = max(used + (budget - used) * weights / (weights + sides), 0.1)
        with self._collecting():
            with self._hiding():
                super().load(device_to, budget, *args, **kwargs)
                complete(self, device_to)
                if self.offload.streams:
                    start(self, torch.device(device_to))
                self._settle()
            self.sides.exchange(self.plans, self._make)
        if budget and self._used() > limit and not self.offload.streams:  # sides are unevenly spread
            self.partially_unload(self.offload_device, self._used() - limit)

    def pin_weight_to_device(self, key: str, *args: object, **kwargs: object) -> None:
        """As the host's (2025-11 on), but for blocks that we stream, which lie in memory of ours, and for what still lies there."""
        module, _, parameter = split(self, key)
        tensor = module._parameters.get(parameter)
        ours = isinstance(module, Leaf) and tensor is not None
        if ours and (self.offload.streams or tensor.untyped_storage().nbytes() > tensor.nbytes):
            return
        super().pin_weight_to_device(key, *args, **kwargs)

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, *args: object, **kwargs: object) -> int:
        """As the host's, but when another clone's patches are on the model, they are exchanged for this one's where they lie."""
        used = self._used()
        force = kwargs.get("force_patch_weights", args[0] if args else False)
        loaded = self.model.current_weight_patches_uuid
        if loaded not in (None, self.patches_uuid) and not force and self.sides.settings == self._settings():
            self._exchange(device_to)
            room = extra_memory - (self._used() - used)
            if extra_memory >= 0 > room:
                self.partially_unload(self.offload_device, -room)
            extra_memory = room if extra_memory < 0 else max(room, 0.1)
        super().partially_load(device_to, extra_memory, *args, **kwargs)
        return self._used() - used

    def _exchange(self, device: torch.device) -> None:
        self.clear_cached_hook_weights()
        try:
            with self._collecting():
                with self._hiding():
                    exchange(self, self.sides.host, device)
                    complete(self, device)
                    self._settle()
                self.sides.exchange(self.plans, self._make)
        except Exception:
            self.detach()
            raise
        self.model.current_weight_patches_uuid = self.patches_uuid

    def _settings(self) -> tuple:
        """What a load depends on besides patches."""
        return fingerprint(self.weight_wrapper_patches), self.force_cast_weights, self.offload

    def _settle(self) -> None:
        """Notes what the host has merged."""
        self.sides.host, self.sides.settings = merged(self), self._settings()

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, *args: object, **kwargs: object) -> int:
        """As the host's; what runs beside a layer that goes comes along, and both count."""
        self._graphs.release()
        freed, share = 0, self.model.model_loaded_weight_memory / max(self._used(), 1)
        with self._keeping_some():
            for asked in (memory_to_free * share, None):  # the second time for what the first left, when sides are unevenly spread
                before = self.sides.nbytes()
                with self._hiding():
                    freed += super().partially_unload(device_to, memory_to_free - freed if asked is None else asked, *args, **kwargs)
                freed += before - self.sides.nbytes()
                if freed >= memory_to_free or not self.sides.nbytes():
                    break
        self.sides.place()
        return freed

    @contextlib.contextmanager
    def _keeping_some(self) -> Iterator[None]:
        """Layers that are bound to stay look to the host as if they were gone."""
        with self._hiding():
            kept = [module for module in bound_to_stay(self).values() if is_loaded(module)]
        for module in kept:
            module.comfy_patched_weights = False
        try:
            yield
        finally:
            for module in kept:
                module.comfy_patched_weights = True

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True, **kwargs: object) -> None:
        if unpatch_weights:
            stop(self.model)
        super().unpatch_model(device_to, unpatch_weights, **kwargs)
        if unpatch_weights:
            self._kept.clear()
            self.sides.exchange({}, self._make)
            self.sides.host = {}
            self._graphs.release()

    def eject_model(self) -> None:
        """As the host's, which leaves the layers of a bypass LoRA with their own `forward` as an attribute, as if it were still wrapped."""
        injected = self.is_injected
        super().eject_model()
        for module in self.model.modules() if injected else ():
            forward = module.__dict__.get("forward") if isinstance(module, Leaf) else None
            if getattr(forward, "__func__", None) is type(module).forward:
                del module.forward

    def cleanup(self) -> None:
        """After a sampling."""
        super().cleanup()
        if self.load_device.type == "cuda":
            self._graphs.trim(self.load_device)

    @property
    def _graphs(self) -> Graphs:
        """Where the model's blocks are recorded."""
        return self.model.diffusion_model.runtime.graphs

    # -- weight hooks -----------------------------------------------------------------------------------------------------------------

    def patch_hooks(self, hooks: comfy.hooks.HookGroup | None) -> None:
        with self._stacked():
            super().patch_hooks(hooks)
        self.sides.hook({} if hooks is None else self._hooked(hooks))

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        super().unpatch_hooks(whitelist_keys_set)
        if not whitelist_keys_set:
            self.sides.hook({})

    def clear_cached_hook_weights(self) -> None:
        self._kept.clear()
        super().clear_cached_hook_weights()

    def _hooked(self, hooks: comfy.hooks.HookGroup) -> Hooked:
        """The sides of the layers that these hooks touch, from the patcher's own patches and theirs.

        They are kept for the hooks' next turn, as the host keeps merged weights, unless it is to spare memory or there is none to spare.
        """
        state = self.patches_uuid, tuple(hook.strength for hook in hooks.hooks)
        if hooks in self._kept and self._kept[hooks][0] == state:
            return self._kept[hooks][1]
        self._kept.pop(hooks, None)
        own, combined = self.packed_patches, self.get_combined_hook_patches(hooks)
        size, made = self.compute_dtype.itemsize, {}
        with self._collecting():
            for key in (key for key in combined if key in self.packed):
                plan = plan_branch(self.packed[key], key, own.get(key, []) + combined[key], size)
                side = self._make(key, plan)
                made[key] = None if side is None else side.to(self.packed[key].home)
        if self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed and self._has_room():
            self._kept[hooks] = state, made
            self.cached_hook_patches.setdefault(hooks, {})  # or the host would look at every weight again
        return made

    def _has_room(self) -> bool:
        """Whether the host would keep merged weights on the device now."""
        manager = comfy.model_management
        return manager.get_free_memory(self.load_device) > 2 * manager.minimum_inference_memory()

    # -- making and telling --------------------------------------------------------------------------------------------------------------

    def _make(self, key: str, plan: Plan) -> Side | None:
        side, refused = make_branch(self.packed[key], key, plan, self.load_device, self.compute_dtype)
        self._tell(refused)
        return side

    def _tell(self, refused: list[str]) -> None:
        """One log line of what could not be applied and is new, when whatever is under way is done."""
        with self._collecting():
            self._refused += refused

    @contextlib.contextmanager
    def _collecting(self) -> Iterator[None]:
        if self._refused is not None:  # within another one
            yield
            return
        self._refused = []
        try:
            yield
        finally:
            refused, self._refused = [sentence for sentence in self._refused if sentence not in self._told], None
            self._told.update(refused)
            if refused:
                log.warning("%d patch(es) could not be applied to this 4-bit model: %s", len(refused), named(refused))
