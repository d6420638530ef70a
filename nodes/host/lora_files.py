"""From a LoRA file's name to patches on a MODEL, and the one place where ComfyUI's own LoRA nodes learn formats that they do not read."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import comfy.lora
import comfy.lora_convert
import comfy.model_base
import comfy.utils
import comfy.weight_adapter
import torch
from torch import Tensor
from torch.nn import Module

from ...kernels import layout
from ...models.formats.flux_names import FluxDims, host_linears
from ...models.formats.lora import LoraError, LoraFile, read_lora
from ...models.formats.lora_converted import is_converted
from ...models.formats.lora_family import lora_family
from ...models.formats.tensorfile import TensorFile
from ...models.linear import PackedLinear
from .files import LORAS, identity, names_in, path_in, resolve
from .stacked import windows_of

log = logging.getLogger(__name__)

MOST_NAMED = 6
IMG_IN = "diffusion_model.img_in.weight"
Patches = dict  # key, or (key, slice, function), to the host's adapter or tuple


class LoraFiles:
    """The LoRA files of one node: each read once, and made into patches once for each model.

    Another strength then adds the very same patches, by which the model's patcher knows that nothing has to be loaded again.
    """

    def __init__(self) -> None:
        self._open: dict[str, LoraFileInUse] = {}

    def apply(self, model: object, rows: Iterable[tuple[str, str, float]]) -> object:
        """A clone of the MODEL with the LoRA of every (input name, file name, strength). Raises sentences, and then nothing has changed."""
        out, used = model.clone(), {}
        for widget, asked, strength in rows:
            name = find(asked, widget)
            path = path_in(LORAS, name)
            file = used.get(path) or self._open.get(path)
            if file is None or file.identity != identity(path):
                file = LoraFileInUse(name, identity(path), read(path))
            used[path] = file
            out.add_patches(file.patches_for(out), strength)
        self._open = used
        return out


def find(asked: str, widget: str) -> str:
    """The entry of today's list that a saved LoRA name means; one log line when that is not the very entry."""
    found = resolve(asked, names_in(LORAS), replace(LORAS, widget=widget))
    if found.how is not None:
        log.warning("LoRA '%s' is not here; using '%s' (%s).", asked, found.name, found.how)
    return found.name


def read(path: str) -> dict[str, Tensor]:
    """The tensors of a LoRA file, mapped where the host maps files. Raises ValueError, a sentence, when it cannot be read."""
    if path.lower().endswith((".safetensors", ".sft")):
        TensorFile(path)  # checks the header and says what is wrong with it
    try:
        loaded = comfy.utils.load_torch_file(path, safe_load=True)
        return {str(key): tensor for key, tensor in loaded.items() if isinstance(tensor, Tensor)}
    except Exception as error:  # whatever torch.load finds in a file
        raise LoraError(f"LoRA {path} cannot be read ({type(error).__name__}: {first_line(error)}). Download it again.") from error


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


@dataclass
class LoraFileInUse:
    """A file's tensors, and the patches that they are on the model that they were last made for."""

    name: str
    identity: tuple
    tensors: dict[str, Tensor]
    _model: Callable[[], object] = lambda: None  # weakly, so that a node keeps no model alive
    _patches: dict[int, Patches] = field(default_factory=dict)  # by the width of img_in

    def patches_for(self, patcher: object) -> Patches:
        if self._model() is not patcher.model:
            self._model, self._patches = weakref.ref(patcher.model), {}
        width = img_in_width(patcher)
        if width not in self._patches:
            self._patches[width] = make_patches(patcher, self.tensors, self.name, width)
        return self._patches[width]


def is_flux(patcher: object) -> bool:
    """FLUX.1, of whoever's making: other networks share its class in the host, but not its layers."""
    config = getattr(getattr(patcher.model, "model_config", None), "unet_config", {})
    return isinstance(patcher.model, comfy.model_base.Flux) and config.get("image_model") == "flux"


def make_patches(patcher: object, tensors: dict[str, Tensor], name: str, width: int) -> Patches:
    """What the host's add_patches takes, of one file. One log line. Raises LoraError when the file is not for this model."""
    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    if is_flux(patcher):
        params = patcher.model.diffusion_model.params
        size = {"hidden": params.hidden_size, "depths": (params.depth, params.depth_single_blocks), "in_width": width or None}
        file = read_lora(tensors, name, base_pairs(patcher.model.diffusion_model), **size)
    else:  # no more than the host's own node does
        file = LoraFile("as ComfyUI reads it", comfy.lora_convert.convert_lora(tensors))
    state = {key: tensor for key, tensor in file.state.items() if key not in file.text_encoder}
    try:
        made = comfy.lora.load_lora(state, keys, log_missing=False)
    except KeyError as error:  # half of a pair, in a file of another family than FLUX.1
        raise LoraError(f"LoRA {name} lacks the tensor {error}: the file is damaged or cut off. Download it again.") from error
    here = patcher.model.state_dict()
    stacked = windows_of(patcher.model)
    patches = {target: value for target, value in made.items() if key_of(target) in here or key_of(target) in stacked}
    left = [*file.ignored, *unplaced(state, keys), *(key_of(target) for target in made if target not in patches)]
    if not patches:
        raise LoraError(f"LoRA {name} ({file.format}) has nothing for this model: {listed(left or list(tensors))}.")
    if wrong := misfits(patches, here):
        raise LoraError(f"LoRA {name} ({file.format}) was made for another model: {listed(wrong)}.")
    report(name, file, len(patches), left)
    return patches


def report(name: str, file: LoraFile, patches: int, left: list[str]) -> None:
    """One log line a file; a warning when some of it is not applied."""
    text = len(file.text_encoder)
    told = f"LoRA {name} ({file.format}): {patches} patches"
    told += f"; {text} tensors for text encoders are left out, since this node has no CLIP" if text else ""
    if left:
        log.warning("%s; not applied: %s.", told, listed(left))
    else:
        log.info("%s.", told)


def key_of(target: str | tuple) -> str:
    """The model's key in a patch's: that key, or (key, slice, function)."""
    return target if isinstance(target, str) else target[0]


def misfits(patches: Patches, here: dict[str, Tensor]) -> list[str]:
    """Whole unpacked tensors that a patch does not fit. The host would find them where it merges, and leave one out or stop the sampling.

    read_lora has checked the layers whose size it knows.
    """
    wrong = []
    for key, value in patches.items():
        found = shape_of(value)
        if found is None or key == IMG_IN or not isinstance(key, str) or key not in here or here[key].dtype == torch.uint8:
            continue
        if tuple(here[key].shape) != found:
            wrong.append(f"{key} is {list(here[key].shape)}, the LoRA's {list(found)}")
    return wrong


def shape_of(value: object) -> tuple[int, ...] | None:
    """The shape of what a patch adds or sets; None for kinds that say it in another way."""
    if isinstance(value, tuple):
        return tuple(value[1][0].shape) if value[0] in ("diff", "set") else None
    if isinstance(value, comfy.weight_adapter.LoRAAdapter):
        return value.weights[0].shape[0], value.weights[1].flatten(1).shape[1]
    return None


def unplaced(state: dict[str, Tensor], keys: dict[str, object]) -> list[str]:
    """The names in a LoRA of layers that the model does not have."""

    def known(name: str) -> bool:
        while "." in name:
            name = name.rpartition(".")[0]
            if name in keys:
                return True
        return False

    return [name for name in state if not known(name)]


def listed(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (f", and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")


def img_in_width(patcher: object) -> int:
    """The input channels that a model's img_in has with the patches on it (FLUX tools' LoRAs widen it); 0 where there is no such layer."""
    weight = getattr(getattr(getattr(patcher.model, "diffusion_model", None), "img_in", None), "weight", None)
    if weight is None or weight.ndim != 2:
        return 0
    kept = patcher.backup.get(IMG_IN)  # while another clone's patches are merged into it, the weight itself may be wider
    widths = [(weight if kept is None else kept.weight).shape[1]]
    for _, value, *_ in patcher.patches.get(IMG_IN, []):
        if isinstance(value, comfy.weight_adapter.LoRAAdapter) and value.weights[5] is not None:
            widths.append(value.weights[5][1])
    return max(widths)


# -- the columns that a converted file's own have to be told from --------------------------------------------------------------------


def base_pairs(network: Module) -> Callable[[str], tuple[Tensor, Tensor] | None]:
    """Layer name of a Nunchaku file -> that layer's own low-rank pair in the loaded 4-bit model, down [K, R] and up [N, R], on the CPU.

    Read from the pairs' own fields: unpacking the layers would go through all their codes.
    """
    params = network.params
    hidden = params.hidden_size
    dims = FluxDims(hidden, 0, int(hidden * params.mlp_ratio), params.depth, params.depth_single_blocks, 0, 0, 0, 0, True)
    places = {prefix: (host.name, row, column) for host in host_linears(dims) for prefix, row, column in host.parts}

    def pair(prefix: str) -> tuple[Tensor, Tensor] | None:
        name, row, column = places.get(prefix, ("", 0, 0))
        leaf = network.get_submodule(name)
        if not name or not isinstance(leaf, PackedLinear):
            return None
        for view in layout.views(leaf.spec, leaf.weight):
            part = view.spec
            starts = [part.row_offset + start for start in part.segments]
            if view.up is not None and part.col_offset == column and row in starts:
                i = starts.index(row)
                first, end = part.segments[i], (*part.segments, part.n)[i + 1]
                down = view.down[: part.k, i * part.rank_padded : i * part.rank_padded + part.rank]
                return down.cpu(), view.up[first:end, : part.rank].cpu()
        return None

    return pair


# -- ComfyUI's own LoRA nodes ----------------------------------------------------------------------------------------------------------


def teach_stock_nodes() -> None:
    """Lets the host's LoRA nodes read what they would leave out. Two functions of the host are wrapped, once a process, when a 4-bit model
    is first made; other models see no difference.

    comfy.lora_convert.convert_lora, for FLUX.1's formats (xlabs, PEFT prefixes, bare names and so on): those nodes give a file's tensors
    to it before anything else, and to nothing of ours. What the host reads itself, and every other family's file, goes through untouched.
    comfy.lora.model_lora_keys_unet, for Qwen-Image and Z-Image: it tells which names of a file mean which layer of a model, and knows
    neither the layers that are stacked in ours nor some trainers' prefixes.
    """
    if hasattr(comfy.lora_convert, "tonfa_wraps"):
        return
    convert = comfy.lora_convert.tonfa_wraps = comfy.lora_convert.convert_lora
    name_keys = comfy.lora.model_lora_keys_unet

    def convert_lora(sd: dict, *args: object, **kwargs: object) -> dict:
        return convert(for_the_host(sd), *args, **kwargs)

    def model_lora_keys_unet(model: Module, *args: object, **kwargs: object) -> dict:
        names = name_keys(model, *args, **kwargs)
        return add_names(model, names) if getattr(model, "tonfa_family", "flux") != "flux" else names

    comfy.lora_convert.convert_lora, comfy.lora.model_lora_keys_unet = convert_lora, model_lora_keys_unet


DOTTED = ("", "diffusion_model.", "transformer.", "unet.", "base_model.model.", "base_model.model.transformer.")
UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")


def add_names(model: Module, names: dict[str, object]) -> dict[str, object]:
    """The host's map from a LoRA's names to a model's keys, with every trainer's name of every layer, also of those stacked in ours."""
    keys = [key for key in (*model.state_dict(), *windows_of(model)) if key.endswith(".weight")]
    layers = {key.removeprefix("diffusion_model.").removesuffix(".weight"): key for key in keys if key.startswith("diffusion_model.")}
    layers |= {name: target for name, target in names.items() if f"transformer.{name}" in names}  # diffusers' names, where they differ
    for name, target in layers.items():
        for prefix in DOTTED:
            names.setdefault(prefix + name, target)
        for prefix in UNDERSCORED:
            names.setdefault(prefix + name.replace(".", "_"), target)
    return names


def for_the_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, or a FLUX.1 LoRA in names that the host reads where it would leave some out.

    Raises LoraError for a file converted for Nunchaku, since of those the host would apply a stray tensor or nothing. Anything else that
    goes wrong is logged, and the host does what it did before.
    """
    converted = False
    try:
        converted = is_converted(tensors)
        if not converted and lora_family(tensors) != "FLUX.1":
            return tensors
        file = read_lora(tensors, "This LoRA")
    except Exception as error:
        if converted:
            raise
        told = str(error) if isinstance(error, LoraError) else f"This LoRA could not be looked at ({type(error).__name__}: {error})."
        log.warning("%s ComfyUI reads of it what it can.", told)
        return tensors
    if file.host_reads:
        return tensors
    if file.ignored:
        log.warning("This LoRA (%s): not applied: %s.", file.format, listed(file.ignored))
    return file.state
