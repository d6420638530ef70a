"""FLUX.1's two text encoders as one CLIP: the host's own classes, with 4-bit linears in the T5 where the file has them.

A T5 in 16 bit or fp8 is loaded by the host's own loader. A 4-bit one is built by it too, with places for linears (Place) that are filled
afterwards, one by one, so that nothing is there twice.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import torch
from torch import Tensor, nn

from ...models.formats.awq import AwqT5, open_awq_t5
from ...models.formats.t5 import EMBEDDINGS, T5Dims
from ...models.formats.tensorfile import CheckpointError, TensorFile
from ...models.formats.text_encoders import Encoder, check_types, recognise
from ...models.graphs import Graphs
from ...models.linear import parameter
from ...models.t5 import PackedT5Linear, put_linears
from .branches import merged_weight
from .ops import host_runtime
from .patcher import TonfaPatcher
from .shell import progress_bar

log = logging.getLogger(__name__)

SAFETENSORS = (".safetensors", ".sft")
XXL = {"num_layers": 24, "d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "vocab_size": 32128}  # the host's own T5
UNREADABLE = "{} is quantised in a form that this ComfyUI cannot read. Update ComfyUI, or take another T5 file."
BETTER = "Download it again, best as a .safetensors file."
FP8 = {torch.float8_e4m3fn, torch.float8_e5m2}
WANTED = (
    "FLUX.1 takes CLIP-L (clip_l.safetensors) and T5-XXL (t5xxl_fp16.safetensors, its fp8 forms or awq-int4-flux.1-t5xxl.safetensors) "
    "here, in either order."
)


@dataclass(frozen=True)
class Slot:
    """A text-encoder input of a node: its name, the file's name and its path."""

    widget: str
    name: str
    path: str


@dataclass(frozen=True)
class Pair:
    """The files of one CLIP. where: the T5's slot and name, as messages begin. names: of its tensors, where it is not in 4 bit."""

    clip_l: str
    t5: str
    four_bit: bool
    dims: T5Dims | None
    where: str
    names: frozenset[str] = frozenset()


class TextEncoderPatcher(TonfaPatcher):
    """TonfaPatcher of a text encoder, which computes in fp32 and has no blocks to record. It is saved in 16 bit."""

    _no_graphs = Graphs()

    @property
    def _graphs(self) -> Graphs:
        return self._no_graphs

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float32

    def saved_dtype(self, module: PackedT5Linear) -> torch.dtype:
        return module.spec.scale_dtype


class TextEncoders(comfy.sd.CLIP):
    """The host's CLIP, whose state dict holds dense weights for nodes that save it."""

    def clone(self, *args: object, **kwargs: object) -> TextEncoders:
        copy = super().clone(*args, **kwargs)
        copy.__class__ = TextEncoders
        return copy

    def get_sd(self) -> dict[str, Tensor]:
        state, sides = super().get_sd(), self.patcher.sides
        for key, leaf in self.patcher.packed.items():
            state[key] = merged_weight(leaf, key, sides.patches(key)).to("cpu", self.patcher.saved_dtype(leaf))
        return state


# -- which file is which ------------------------------------------------------------------------------------------------------------


def look_at(slot: Slot) -> tuple[Encoder, frozenset[str]]:
    """What lies in a slot, and the names of its tensors. Raises CheckpointError naming the slot."""
    where = f"{slot.widget}: {slot.name}"
    try:
        if is_gguf(slot.path):
            raise CheckpointError(f"{slot.path} is a GGUF file; load it with 'DualCLIPLoader (GGUF)' of the pack ComfyUI-GGUF, not here.")
        if os.path.splitext(slot.path)[1].lower() not in SAFETENSORS:
            shapes = pickled(slot.path)
            encoder = recognise(shapes, {}, where)
            if encoder.kind == "t5_4bit":
                raise CheckpointError(f"{slot.path} is a 4-bit T5, which is read from a .safetensors file only. Download it as one.")
            return encoder, frozenset(shapes)
        file = TensorFile(slot.path)
        encoder = recognise({name: entry.shape for name, entry in file.entries.items()}, file.metadata, where)
        if encoder.kind == "t5":
            check_types({name: entry.dtype for name, entry in file.entries.items()}, where)
        elif encoder.kind == "t5_4bit":
            open_awq_t5(slot.path)  # for its checks
        return encoder, frozenset(file.entries)
    except CheckpointError as error:
        raise named(error, where) from error


def named(error: CheckpointError, where: str) -> CheckpointError:
    """The error, beginning with the slot."""
    return error if str(error).startswith(where) else CheckpointError(f"{where}: {error}")


def is_gguf(path: str) -> bool:
    """By its content: some are called .bin or .safetensors."""
    try:
        with open(path, "rb") as opened:
            return opened.read(4) == b"GGUF"
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def pickled(path: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a .bin, .pt or .ckpt file, by the host's own reader of such files."""
    with open(path, "rb") as opened:
        if opened.read(9)[8:] == b"{":
            raise CheckpointError(f"{path} is a safetensors file under another name. Let its name end in .safetensors.")
    try:
        tensors = comfy.utils.load_torch_file(path, safe_load=True)
        return {name: tuple(t.shape) for name, t in tensors.items() if isinstance(t, Tensor)}
    except Exception as error:  # torch raises several unrelated types, and advises to run whatever is in the file
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}): it is damaged, or holds something else than tensors with names. {BETTER}"
        ) from error


def sort_out(first: Slot, second: Slot, four_bit_folder: Slot | None = None) -> Pair:
    """The CLIP-L and the T5 of two slots, in either order. four_bit_folder: the deprecated node's, in place of a T5 in a slot.

    Raises CheckpointError naming the slot and what was found in it.
    """
    found = {}
    for slot in (first, second):
        encoder, names = look_at(slot)
        role = "clip_l" if encoder.kind == "clip_l" else "t5"
        if encoder.kind == "other":
            raise CheckpointError(f"{slot.widget}: {slot.name} is {encoder.what}. {WANTED}")
        if role in found:
            raise CheckpointError(f"{slot.widget}: {slot.name} is {encoder.what}, and so is {found[role][0].name}. {WANTED}")
        found[role] = slot, encoder, names
    clip_l, (t5, encoder, names) = found["clip_l"][0], found["t5"]
    if four_bit_folder is not None:
        try:
            open_awq_t5(four_bit_folder.path)
        except CheckpointError as error:
            raise named(error, four_bit_folder.widget) from error
        return Pair(clip_l.path, four_bit_folder.path, True, None, four_bit_folder.widget)
    return Pair(clip_l.path, t5.path, encoder.kind == "t5_4bit", encoder.dims, f"{t5.widget}: {t5.name}", names)


# -- building -----------------------------------------------------------------------------------------------------------------------


def load_clip(pair: Pair, **keywords: object) -> comfy.sd.CLIP:
    """A CLIP of the two files. Raises CheckpointError, naming the slot, for a T5 that is damaged or in a form that this host lacks.

    keywords: the host's, for a T5 that is not in 4 bit.
    """
    embeddings = folder_paths.get_folder_paths("embeddings")
    if not pair.four_bit:
        warn_of_size(pair.dims, pair.where)
        try:
            return load_plain(pair, embeddings, **keywords)
        except RuntimeError as error:
            if pair.dims is None and "size mismatch" in str(error):
                raise CheckpointError(UNREADABLE.format(pair.where)) from error
            raise
    try:
        awq = open_awq_t5(pair.t5)
        try:
            clip = build(pair, awq, embeddings)
        finally:
            awq.close()
    except CheckpointError as error:
        raise named(error, pair.where) from error
    log.info("%s: a 4-bit T5 of %d layers on %s.", pair.t5, len(awq.quantised), clip.patcher.load_device)
    warn_of_size(awq.dims, pair.where)
    return clip


def warn_of_size(dims: T5Dims | None, where: str) -> None:
    """One log line for a T5 that no FLUX.1 was trained with; it is loaded all the same, for models made with it."""
    if dims is not None and (dims.model, dims.vocab) != (XXL["d_model"], XXL["vocab_size"]):
        log.warning(
            "%s is a T5 of %d channels and %d tokens. FLUX.1 takes T5-XXL, which has %d and %d.",
            where, dims.model, dims.vocab, XXL["d_model"], XXL["vocab_size"],
        )  # fmt: skip


def load_plain(pair: Pair, embeddings: list[str], **keywords: object) -> comfy.sd.CLIP:
    """By the host's own loader, unless the T5 has names that this host would leave out: then under the host's names."""
    how = {"clip_type": comfy.sd.CLIPType.FLUX, "model_options": config_for(pair.dims), **keywords}
    tensors = renamed(pair)
    if tensors is None:
        return comfy.sd.load_clip([pair.clip_l, pair.t5], embeddings, **how)
    files = [comfy.utils.load_torch_file(pair.clip_l, safe_load=True), tensors]
    clip = comfy.sd.load_text_encoder_state_dicts(files, embeddings, **how)
    clip.patcher.cached_patcher_init = (load_patcher, (pair,))
    return clip


def renamed(pair: Pair) -> dict[str, Tensor] | None:
    """The T5's tensors under the host's names; None where the file has those already.

    Every host takes the embedding from `shared` alone. Hosts of 2025 know a scaled fp8 weight by `scale_weight`, newer ones by both names.
    """
    convert = getattr(comfy.utils, "convert_old_quants", None)
    old_names = convert is None and any(name.endswith(".weight_scale") for name in pair.names)
    if not old_names and EMBEDDINGS[0] in pair.names:
        return None
    tensors, metadata = comfy.utils.load_torch_file(pair.t5, safe_load=True, return_metadata=True)
    tensors.setdefault(EMBEDDINGS[0], tensors.get(EMBEDDINGS[1]))
    if convert is not None:
        return convert(tensors, model_prefix="", metadata=metadata)[0]
    return with_old_names(tensors, pair) if old_names else tensors


def with_old_names(tensors: dict[str, Tensor], pair: Pair) -> dict[str, Tensor]:
    """Scaled fp8 as hosts of 2025 read it: one type and one scale for every linear of the T5. Raises CheckpointError for anything else."""
    linears = [] if pair.dims is None else list(pair.dims.linears())
    kinds = {tensors[f"{prefix}.weight"].dtype for prefix in linears}
    scales = {f"{prefix}.scale_weight": tensors.get(f"{prefix}.weight_scale") for prefix in linears}
    if len(kinds) != 1 or not kinds <= FP8 or any(scale is None or scale.numel() != 1 for scale in scales.values()):
        raise CheckpointError(UNREADABLE.format(pair.where))
    kept = {name: t for name, t in tensors.items() if not name.endswith((".weight_scale", ".comfy_quant"))}
    return kept | {name: scale.reshape(()) for name, scale in scales.items()} | {"scaled_fp8": torch.tensor([], dtype=kinds.pop())}


def build(pair: Pair, awq: AwqT5, embeddings: list[str]) -> comfy.sd.CLIP:
    load, offload = comfy.model_management.text_encoder_device(), comfy.model_management.text_encoder_offload_device()
    options = config_for(awq.dims) | {"custom_operations": operations(awq), "initial_device": offload}
    keywords = (
        {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(comfy.sd.load_text_encoder_state_dicts).parameters else {}
    )
    plain = {name: awq.plain(name) for name in awq.plain_names()}
    plain.setdefault(EMBEDDINGS[0], plain.get(EMBEDDINGS[1]))
    files = [comfy.utils.load_torch_file(pair.clip_l, safe_load=True), plain]
    clip = comfy.sd.load_text_encoder_state_dicts(
        files, embedding_directory=embeddings, clip_type=comfy.sd.CLIPType.FLUX, model_options=options, **keywords
    )
    network = clip.cond_stage_model.t5xxl.transformer
    target = load if load.type == "cuda" else torch.device("cpu")
    if load.type == "cuda":
        comfy.model_management.free_memory(1 << 30, load)  # room to re-pack a layer
    put_linears(network, awq, host_runtime(), offload, target, progress_bar())
    settle(clip.cond_stage_model)
    adopt(clip, pair)
    return clip


def config_for(dims: T5Dims | None) -> dict:
    """The host's option for a T5 whose sizes are not T5-XXL's."""
    if dims is None:
        return {}
    sizes = dict(zip(XXL, (dims.blocks, dims.model, dims.inner // dims.heads, dims.heads, dims.ff, dims.vocab), strict=True))
    return {} if sizes == XXL else {"t5xxl_model_config": sizes}


class Place(nn.Module):
    """Where a linear of the T5 will be: keeps the weight that the host loads into it, if the file has a plain one."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = None

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *_: object) -> None:
        weight = state_dict.get(f"{prefix}weight")
        self.weight = None if weight is None else parameter(weight.clone())


def operations(awq: AwqT5) -> type:
    """The host's ordinary operations, with places for linears of the shapes that the file has in 4 bit."""
    linears = awq.dims.linears()
    shapes = {linears[prefix] for prefix in awq.quantised}

    class Operations(comfy.ops.manual_cast):
        @staticmethod
        def Linear(in_features: int, out_features: int, bias: bool = True, **named: object) -> nn.Module:  # noqa: N802 (the host's name)
            if not bias and (out_features, in_features) in shapes:
                return Place(in_features, out_features)
            return comfy.ops.manual_cast.Linear(in_features, out_features, bias=bias, **named)

    return Operations


def settle(model: nn.Module) -> None:
    """The host's own linears in the places that are left, with the weights that were loaded into them.

    CLIP-L's text projection may be among them, when it has the shape of a linear of the T5; FLUX has no use for it, and files may lack it.
    """
    for name, place in list(model.named_modules()):
        if isinstance(place, Place):
            n, k = place.out_features, place.in_features
            weight = parameter(torch.zeros(n, k, dtype=torch.float16)) if place.weight is None else place.weight
            linear = comfy.ops.manual_cast.Linear(k, n, bias=False, device="meta", dtype=weight.dtype)
            linear.weight, linear.bias = weight, None
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, linear)


def adopt(clip: comfy.sd.CLIP, pair: Pair) -> None:
    """Our patcher in place of the one that the host has just made."""
    old, loaded = clip.patcher, comfy.model_management.current_loaded_models
    old.detach()  # where load and offload device are one, the host has loaded the model already
    loaded[:] = [entry for entry in loaded if entry.model is not old]
    archive = getattr(comfy.model_management, "archive_model_dtypes", None)
    if archive is not None:
        archive(clip.cond_stage_model)
    clip.patcher = TextEncoderPatcher(clip.cond_stage_model, load_device=old.load_device, offload_device=old.offload_device)
    clip.patcher.hook_mode, clip.patcher.is_clip = old.hook_mode, True
    clip.patcher.object_patches.update(old.object_patches)  # newer hosts: that text encoders compute in fp32
    # Not old.force_cast_weights: every layer here casts for itself, and packed ones that lie on the device need no cast.
    clip.patcher.cached_patcher_init = (load_patcher, (pair,))
    clip.__class__ = TextEncoders


def load_patcher(pair: Pair, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The patcher of a CLIP built anew. disable_dynamic: the host's keyword, for its own patchers; ours is never dynamic."""
    return load_clip(pair, **({"disable_dynamic": True} if disable_dynamic else {})).patcher


def with_min_length(clip: comfy.sd.CLIP, tokens: int) -> comfy.sd.CLIP:
    """A clone whose T5 gets at least so many tokens."""
    clone = clip.clone()
    clone.set_tokenizer_option("t5xxl_min_length", tokens)
    return clone
