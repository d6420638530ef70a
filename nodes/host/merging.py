"""The half of the patcher that gives weights away: real numbers for nodes that merge, extract or save, and plain biases.

Also what goes the other way and concerns biases: INT4 layers that a GELU feeds add a constant to their input, which their stored bias
takes back (`shift_of`), while whoever merges means the plain layer's bias.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, ItemsView, Iterator, ValuesView

import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

from ...kernels.layout import views
from ...models.linear import PackedLeaf, PackedLinear
from .branches import merged_weight
from .patches import Patch, caught, completed, is_kind
from .sides import Sides
from .stacked import Window, sliced, take_apart, windows_of


class MergingPatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher of a model with packed leaves, as far as single weights are concerned."""

    _packed: tuple[nn.Module, dict[str, PackedLeaf]] | None = None
    _windows: tuple[nn.Module, dict[str, Window]] | None = None
    _stacks = False  # while the host looks up the modules of keys: stacked linears are modules, their rows are not
    _hidden: dict[str, list[Patch]] | None = None  # patches on packed keys, while the host's own code is not to see them

    @property
    def packed(self) -> dict[str, PackedLeaf]:
        """State-dict key of the weight -> leaf. The leaves are fixed once the model is built, so they are looked up once."""
        if self._packed is None or self._packed[0] is not self.model:  # newer hosts give a clone another model
            self._packed = self.model, {f"{n}.weight": m for n, m in self.model.named_modules() if isinstance(m, PackedLeaf)}
        return self._packed[1]

    @property
    def windows(self) -> dict[str, Window]:
        """Key of a linear that the host has and that is rows of a stacked one here -> where they are. Looked up once, as `packed`."""
        if self._windows is None or self._windows[0] is not self.model:
            self._windows = self.model, windows_of(self.model)
        return self._windows[1]

    @property
    def packed_patches(self) -> dict[str, list[Patch]]:
        """The patches on packed keys, hidden or not."""
        return self._hidden if self._hidden is not None else {k: v for k, v in self.patches.items() if k in self.packed}

    @property
    def sides(self) -> Sides:
        """What runs beside the packed weights now; clones share it."""
        sides = getattr(self.model, "tonfa_sides", None)
        if sides is None:
            sides = self.model.tonfa_sides = Sides(self.packed)
        return sides

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.model.manual_cast_dtype or self.model.get_dtype()

    def saved_dtype(self, module: PackedLeaf) -> torch.dtype:
        """The type in which a packed weight is saved."""
        return self.compute_dtype

    def shifted(self, key: str) -> PackedLeaf | None:
        """The layer whose bias a key is, if its stored bias is not the plain layer's."""
        module = self.packed.get(key.removesuffix("bias") + "weight") if key.endswith(".bias") else None
        return module if module is not None and shifts_input(module) else None

    # -- patches that come in -------------------------------------------------------------------------------------------------------

    def add_patches(self, patches: dict, *args: object, **kwargs: object) -> list:
        """As the host's; then puts merges (strength_model not 1, or "set") of biases right that lack their layer's input shift.

        Keys of linears that are rows of a stacked one become slices of it.
        """
        patches, asked = sliced(patches, self.windows)
        shifted = {name: self.shifted(name) for name in (key if isinstance(key, str) else key[0] for key in patches)}
        shifted = {name: (module, len(self.patches.get(name, ()))) for name, module in shifted.items() if module is not None}
        added = super().add_patches({key: completed(value) for key, value in patches.items()}, *args, **kwargs)
        for name, (module, before) in shifted.items():
            for patch in self.patches.get(name, [])[before:]:
                kept = 0.0 if is_kind(patch[1], "set") else patch[2]
                if kept != 1.0:
                    self.patches[name].append((kept - 1.0, ("diff", (shift_of(module),)), 1.0, None, shift_correction))
        return [asked.get(key, key) for key in added]

    def add_hook_patches(self, hook: object, patches: dict, *args: object, **kwargs: object) -> list:
        patches, asked = sliced(patches, self.windows)
        added = super().add_hook_patches(hook, {key: completed(value) for key, value in patches.items()}, *args, **kwargs)
        return [asked.get(key, key) for key in added]

    def patch_weight_to_device(self, key: str, device_to: torch.device | None = None, *args: object, **kwargs: object) -> Tensor | None:
        """A packed weight stays as it is; any other is merged by the host, and left alone when the host cannot.

        With `return_weight` (newer hosts: saving) the answer is what the dense model's weight or bias would be.
        """
        answers = kwargs.get("return_weight", args[1] if len(args) > 1 else False)
        if answers and key in self.windows:
            window = self.windows[key]
            return window.of(self.patch_weight_to_device(window.stacked, device_to, return_weight=True))
        if key in self.packed:
            if not answers:
                return self.packed[key].weight
            merged = merged_weight(self.packed[key], key, self.packed_patches.get(key, []), device_to)
            return merged.to(self.saved_dtype(self.packed[key]))
        with self._refusing(key):
            weight = super().patch_weight_to_device(key, device_to, *args, **kwargs)
            return add_shift(self.shifted(key), weight).to(weight.dtype) if answers and self.shifted(key) is not None else weight
        return comfy.utils.get_attr(self.model, key)

    def patch_hook_weight_to_device(self, hooks: object, combined_patches: dict, key: str, *args: object, **kwargs: object) -> None:
        """The same for weight hooks. "model_as_lora" takes the difference to a plain bias, which the stored one may not be."""
        if key in self.packed:
            return
        originals = kwargs.get("original_weights", args[0] if args else None)
        if originals and self.shifted(key) is not None:
            (bias, convert), *rest = originals[key]
            originals[key] = [(convert(bias), convert), *rest]
        with self._refusing(key):
            super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)

    @contextlib.contextmanager
    def _refusing(self, key: str) -> Iterator[None]:
        """What goes wrong inside with a key is told in our words instead of raised, or logged by the host."""
        with caught(key, listen=True) as said:
            yield
        if said:
            self._tell(said)

    def _tell(self, refused: list[str]) -> None:
        raise NotImplementedError

    # -- weights that go out -----------------------------------------------------------------------------------------------------------

    def get_key_patches(self, *args: object, **kwargs: object) -> dict[str, list]:
        """The host's {key: [(weight, convert function), patches...]}: real numbers for whoever merges from this model, and plain biases."""
        asked_stacked = self._stacks
        with self._stacked():
            listed = super().get_key_patches(*args, **kwargs)
        for key in listed:
            module = self.shifted(key)
            if module is not None:
                (bias, _), *rest = listed[key]
                listed[key] = [(bias, functools.partial(add_shift, module)), *(p for p in rest if p[4] is not shift_correction)]
        if asked_stacked:
            return listed

        def rows(key: str, window: Window, whole: list) -> list:
            (weight, convert), *rest = whole
            return [(weight, functools.partial(window.converted, convert)), *filter(None, map(window.alone, rest))]

        return take_apart(listed, self.windows, rows)

    @contextlib.contextmanager
    def _stacked(self) -> Iterator[None]:
        """Stacked linears under their own keys, for the host's code that looks up modules by key."""
        before, self._stacks = self._stacks, True
        try:
            yield
        finally:
            self._stacks = before

    def model_state_dict(self, *args: object, **kwargs: object) -> dict:
        """The host's, with dense weights and plain biases for whoever reads them."""
        state = super().model_state_dict(*args, **kwargs)
        if not self._stacks:
            take_apart(state, self.windows, lambda key, window, whole: window.placeholder(whole))
        return DenseState(state, self._dense_value)

    def _dense_value(self, key: str, stored: Tensor) -> Tensor:
        """What a dense model's state dict would have for a key, as the model runs now."""
        if key in self.windows:
            window = self.windows[key]
            return window.of(self._dense_value(window.stacked, comfy.utils.get_attr(self.model, window.stacked)))
        if key in self.packed:
            return merged_weight(self.packed[key], key, self.sides.patches(key)).to(self.compute_dtype)
        module = self.shifted(key)
        return stored if module is None else add_shift(module, stored).to(stored.dtype)

    def model_state_dict_for_saving(self, model: nn.Module | None = None, prefix: str = "") -> dict:
        """Newer hosts': tensors, and placeholders for what is made when its turn to be written has come, such as dense weights."""
        model = self.model if model is None else model
        weights = [key.removeprefix(prefix) for key in self.packed if key.startswith(prefix)]
        state = model.state_dict()
        biases = {name: bias for name in weights if (bias := name.removesuffix("weight") + "bias") in state}
        saved = super().model_state_dict_for_saving(_Without(model, [*weights, *biases.values()]), prefix)
        for name in weights:
            key = prefix + name
            module = self.packed[key]
            meta = torch.empty(module.out_features, module.in_features, dtype=self.saved_dtype(module), device="meta")
            saved[name] = comfy.model_patcher.LazyCastingParam(self, key, meta)
            if name in biases:
                saved[biases[name]] = self._saved_bias(key, prefix + biases[name])
        saved = {name: saved[name] for name in state}
        return take_apart(saved, self.windows, self._saved_rows, lambda key: key.removeprefix(prefix))

    def _saved_rows(self, key: str, window: Window, whole: Tensor) -> Tensor:
        if key.endswith(".bias"):
            return window.of(whole).clone()
        module = comfy.utils.get_attr(self.model, window.stacked.removesuffix(".weight"))
        meta = torch.empty(window.rows, module.in_features, dtype=self.compute_dtype, device="meta")
        return comfy.model_patcher.LazyCastingParam(self, key, meta)

    def _saved_bias(self, key: str, bias: str) -> Tensor:
        if self.sides.is_loaded(key):
            made = self._dense_value(bias, comfy.utils.get_attr(self.model, bias))
        else:
            made = self.patch_weight_to_device(bias, device_to=self.load_device, return_weight=True)
        return made.to("cpu", self.compute_dtype)


class _Without:
    """A module whose state dict lacks some names."""

    def __init__(self, module: nn.Module, names: list[str]):
        self._module, self._names = module, set(names)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._module.state_dict().items() if name not in self._names}

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


class DenseState(dict):
    """A state dict that makes what is read from it: make(key, stored tensor). Its keys cost nothing."""

    def __init__(self, stored: dict[str, Tensor], make: Callable[[str, Tensor], Tensor]):
        super().__init__(stored)
        self._make, self._set = make, set()  # a value that was set later is given back as it is

    def __getitem__(self, key: str) -> Tensor:
        stored = super().__getitem__(key)
        return stored if key in self._set else self._make(key, stored)

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._set.add(key)
        super().__setitem__(key, value)

    def __iter__(self) -> Iterator[str]:  # being there, it makes dict(this) read values through __getitem__
        return super().__iter__()

    def get(self, key: str, default: object = None) -> object:
        try:
            return self[key]
        except KeyError:
            return default

    def pop(self, key: str, *default: object) -> object:
        value = self.get(key, *default) if default else self[key]
        super().pop(key, None)
        return value

    def items(self) -> ItemsView:
        return ItemsView(self)

    def values(self) -> ValuesView:
        return ValuesView(self)

    def copy(self) -> DenseState:
        copy = DenseState({key: super(DenseState, self).__getitem__(key) for key in self}, self._make)
        copy._set = set(self._set)
        return copy


def dense_for_saving(model: nn.Module, saved: dict[str, Tensor], prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """`saved` with the packed bytes in it made real numbers, with what runs beside them, and plain biases; on the CPU.

    prefix: of the saved names of model.diffusion_model. Hosts that save through the patcher have put dense weights there already.
    """
    sides = getattr(model, "tonfa_sides", None)
    for name, module in model.diffusion_model.named_modules():
        weight, bias = f"{prefix}{name}.weight", f"{prefix}{name}.bias"
        if not isinstance(module, PackedLinear) or weight not in saved or saved[weight].dtype != torch.uint8:
            continue
        key = f"diffusion_model.{name}.weight"
        saved[weight] = merged_weight(module, key, sides.patches(key) if sides is not None else []).to("cpu", dtype)
        if bias in saved:
            saved[bias] = add_shift(module, module.bias).to("cpu", dtype)
    return take_apart(
        saved, windows_of(model), lambda key, window, whole: window.of(whole).clone(),
        lambda key: prefix + key.removeprefix("diffusion_model."),
    )  # fmt: skip


# -- biases of layers that shift their input --------------------------------------------------------------------------------------------


def shifts_input(module: PackedLeaf) -> bool:
    """Whether a layer adds a constant to its input, which its stored bias takes back (INT4 layers fed by a GELU)."""
    return module.bias is not None and any(part.act_unsigned for part in module.spec.parts)


def shift_of(module: PackedLinear) -> Tensor:
    """fp32 [N]: what a layer's stored bias lacks against the plain layer's."""
    shift = torch.zeros(module.out_features, device=module.weight.device)
    for view in views(module.spec, module.weight):
        part = view.spec
        if part.act_unsigned:
            shift[part.row_offset : part.row_offset + part.n] += view.shift_bias[: part.n]
    return shift


def shift_correction(weight: Tensor) -> Tensor:
    """Identity; as a patch's function it marks what add_patches added for a shifted bias."""
    return weight


def add_shift(module: PackedLinear, bias: Tensor, **_: object) -> Tensor:
    """fp32: the plain layer's bias from a layer's stored one; as the host's convert function it costs only whoever asks."""
    return bias.float() + shift_of(module).to(bias.device)
