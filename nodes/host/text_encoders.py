"""FLUX.1's two text encoders as one CLIP: the host's own classes, with 4-bit linears in the T5 where the file has them.

A T5 in 16 bit or fp8 is loaded by the host's own loader. A 4-bit one is built by it too, with places for linears (Slot) that are filled
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
from ...models.formats.text_encoders import Encoder, recognise
from ...models.graphs import Graphs
from ...models.linear import parameter
from ...models.t5 import put_linears
from .ops import host_runtime
from .patcher import TonfaPatcher
from .shell import progress_bar

log = logging.getLogger(__name__)

SAFETENSORS = (".safetensors", ".sft")
XXL = {"num_layers": 24, "d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "vocab_size": 32128}  # the host's own T5
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
    """The files of one CLIP."""

    clip_l: str
    t5: str
    four_bit: bool
    dims: T5Dims | None


class TextEncoderPatcher(TonfaPatcher):
    """TonfaPatcher of a text encoder, which computes in fp32 and has no blocks to record."""

    _no_graphs = Graphs()

    @property
    def _graphs(self) -> Graphs:
        return self._no_graphs

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float32


# -- which file is which ------------------------------------------------------------------------------------------------------------


def look_at(slot: Slot) -> Encoder:
    """What lies in a slot. Raises CheckpointError naming the slot."""
    where = f"{slot.widget}: {slot.name}"
    try:
        if os.path.splitext(slot.path)[1].lower() in SAFETENSORS:
            file = TensorFile(slot.path)
            encoder = recognise({name: entry.shape for name, entry in file.entries.items()}, file.metadata, where)
            if encoder.kind == "t5_4bit":
                open_awq_t5(slot.path)  # for its checks
            return encoder
        with open(slot.path, "rb") as opened:
            gguf = opened.read(4) == b"GGUF"
        if gguf:
            raise CheckpointError(f"{slot.path} is a GGUF file; load it with 'DualCLIPLoader (GGUF)' of the pack ComfyUI-GGUF, not here.")
        tensors = comfy.utils.load_torch_file(slot.path, safe_load=True)
        return recognise({name: tuple(t.shape) for name, t in tensors.items() if isinstance(t, Tensor)}, {}, where)
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error


def sort_out(first: Slot, second: Slot, four_bit_folder: Slot | None = None) -> Pair:
    """The CLIP-L and the T5 of two slots, in either order. four_bit_folder: the deprecated node's, in place of a T5 in a slot.

    Raises CheckpointError naming the slot and what was found in it.
    """
    found = {}
    for slot in (first, second):
        encoder = look_at(slot)
        role = "clip_l" if encoder.kind == "clip_l" else "t5"
        if encoder.kind == "other":
            raise CheckpointError(f"{slot.widget}: {slot.name} is {encoder.what}. {WANTED}")
        if role in found:
            raise CheckpointError(f"{slot.widget}: {slot.name} is {encoder.what}, and so is {found[role][0].name}. {WANTED}")
        found[role] = slot, encoder
    (clip_l, _), (t5, encoder) = found["clip_l"], found["t5"]
    if four_bit_folder is not None:
        try:
            open_awq_t5(four_bit_folder.path)
        except CheckpointError as error:
            raise CheckpointError(f"{four_bit_folder.widget}: {error}") from error
        return Pair(clip_l.path, four_bit_folder.path, True, None)
    return Pair(clip_l.path, t5.path, encoder.kind == "t5_4bit", encoder.dims)


# -- building -----------------------------------------------------------------------------------------------------------------------


def load_clip(pair: Pair) -> comfy.sd.CLIP:
    """A CLIP of the two files. Raises CheckpointError for a 4-bit T5 that is damaged."""
    embeddings = folder_paths.get_folder_paths("embeddings")
    if not pair.four_bit:
        options = config_for(pair.dims)
        return comfy.sd.load_clip([pair.clip_l, pair.t5], embeddings, clip_type=comfy.sd.CLIPType.FLUX, model_options=options)
    awq = open_awq_t5(pair.t5)
    clip = build(pair, awq, embeddings)
    awq.close()
    log.info("%s: a 4-bit T5 of %d layers on %s.", pair.t5, len(awq.quantised), clip.patcher.load_device)
    return clip


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
    settle(network)
    adopt(clip, (pair,))
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


def settle(network: nn.Module) -> None:
    """The host's own linears in the places that are left, with the weights that were loaded into them."""
    for name, place in list(network.named_modules()):
        if isinstance(place, Place):
            linear = comfy.ops.manual_cast.Linear(
                place.in_features, place.out_features, bias=False, device="meta", dtype=place.weight.dtype
            )
            linear.weight, linear.bias = place.weight, None
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, linear)


def adopt(clip: comfy.sd.CLIP, arguments: tuple) -> None:
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
    clip.patcher.force_cast_weights = old.force_cast_weights
    clip.patcher.cached_patcher_init = (load_patcher, arguments)


def load_patcher(pair: Pair, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The patcher of a CLIP built anew; disable_dynamic: the host's keyword, ours is never dynamic."""
    return load_clip(pair).patcher


def with_min_length(clip: comfy.sd.CLIP, tokens: int) -> comfy.sd.CLIP:
    """A clone whose T5 gets at least so many tokens."""
    clone = clip.clone()
    clone.set_tokenizer_option("t5xxl_min_length", tokens)
    return clone
