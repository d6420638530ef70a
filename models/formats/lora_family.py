"""The model family that a LoRA was made for, told from its key names, so that a wrong pick gets one sentence."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from .lora_converted import is_converted
from .lora_names import IN_BLOCK, flat, is_text_encoder, parse, split_prefix

# (family, names without prefix that it has and FLUX.1 never has); dots count as underscores, except where a pattern has "\\."
_FAMILIES = [
    (family, re.compile("|".join(patterns)))
    for family, *patterns in (
        (
            "FLUX.2",
            r"(double|single)_stream_modulation",
            r"single_transformer_blocks_\d+_attn_to_(qkv_mlp_proj|out)_",
            r"transformer_blocks_\d+_ff(_context)?_linear_(in|out)_",
        ),
        ("Qwen-Image", r"transformer_blocks_\d+_(img|txt)_(mlp|mod)_"),
        (
            "HunyuanVideo",
            r"double_blocks_\d+_(img|txt)_(mlp_fc[12]|mod_linear|attn_[qkv]_)",
            r"double_blocks\.\d+\.(img|txt)_attn_(qkv|proj)\.",
            r"single_blocks_\d+_modulation_linear",
            r"(txt_in|context_embedder)_(individual_)?token_refiner",
        ),
        ("Chroma", r"distilled_guidance_layer", r"nerf_"),
        ("LTX-Video, PixArt, SANA or CogVideoX", r"transformer_blocks_\d+_attn1_"),
        ("Stable Diffusion 3", r"joint_blocks_\d+_", r"transformer_blocks_\d+_attn2_"),
        ("AuraFlow", r"joint_transformer_blocks_", r"(double|single)_layers_\d+_", r"single_transformer_blocks_\d+_ff_"),
        ("HiDream", r"(double|single)_stream_blocks_\d+_"),
        ("Z-Image or Lumina", r"(layers|noise_refiner|context_refiner)_\d+_(attention|feed_forward|adaLN_modulation)"),
        ("OmniGen2", r"(layers|noise_refiner|context_refiner|ref_image_refiner)_\d+_(attn|norm1)_", r"(single|double)_stream_layers_"),
        ("Wan", r"_?blocks_\d+_(self_attn_[qkvo]|cross_attn_(k_img|v_img|[qkvo])|ffn_[02])_"),
        ("Mochi", r"blocks_\d+_(attn_(qkv|proj)_[xy]|mod_[xy]|mlp_[xy])_"),
        ("Cosmos", r"blocks_\d+_(block|self_attn|cross_attn|mlp|adaln)"),
        ("SDXL", r"add_embedding|label_emb", r"(down|up|input|output|mid|middle)_blocks?_.*transformer_blocks_[1-9]_"),
        ("Stable Diffusion 1.5 or SDXL", r"(down|up|input|output|mid|middle)_blocks?_"),
        ("Stable Cascade", r"lora_prior_unet_"),
    )
]
DOUBLE, SINGLE = 19, 38  # blocks of every published FLUX.1


def foreign(keys: Iterable[str]) -> tuple[str, list[str]] | None:
    """(family, its keys) when names tell of another family than FLUX.1, None when none does. Text encoders say nothing."""
    bare = [(k, split_prefix(k)[1]) for k in keys if not is_text_encoder(k)]
    names = [(k, dotted, flat(dotted)) for k, dotted in bare]
    for family, pattern in _FAMILIES:
        if hits := [k for k, dotted, name in names if pattern.match(name) or pattern.match(dotted)]:
            return family, hits
    return None


def _blocks(keys: Iterable[str]) -> list[tuple[str, bool, int]]:
    """(key, in a single block, block number) of all keys inside blocks."""
    found = [(k, IN_BLOCK.match(split_prefix(k)[1])) for k in keys]
    return [(k, "single" in m[1], int(m[2])) for k, m in found if m]


def beyond(keys: Iterable[str], depths: tuple[int, int]) -> list[str]:
    """The keys of double blocks from number depths[0] up and of single blocks from depths[1] up."""
    return [k for k, single, number in _blocks(keys) if number >= depths[single]]


def deeper_family(keys: Iterable[str]) -> str:
    """The family of a LoRA whose names are FLUX.1's but whose block numbers are not: a guess from how many blocks each family has."""
    blocks = _blocks(keys)
    double = max((number for _, single, number in blocks if not single), default=-1)
    single = max((number for _, single, number in blocks if single), default=-1)
    if single >= 0 or any("double_blocks" in k for k, _, _ in blocks):
        return "FLUX.2" if single >= 40 else "HunyuanVideo"
    return "Qwen-Image" if double >= 38 else "Stable Diffusion 3"


def lora_family(keys: Iterable[str] | Mapping[str, Tensor]) -> str:
    """The model family whose LoRA has these keys, in words for people: "FLUX.1", "SDXL", "Qwen-Image" ...; "unknown" if none fits.

    Given the tensors too, it tells by their shapes the families that share names."""
    names = list(keys)
    if is_converted(names):
        return "FLUX.1"
    if found := foreign(names):
        return family_of_shapes(keys, found[0]) if isinstance(keys, Mapping) else found[0]
    if beyond(names, (DOUBLE, SINGLE)):
        return deeper_family(names)
    known = "FLUX.1" if any(parse(k) for k in names) else "unknown"
    return family_of_shapes(keys, known) if isinstance(keys, Mapping) else known


# input features of attn2.to_k, the width of the text encoders' output
_CROSS = re.compile(r".*attn2[._]to_[kv]\W.*(lora_down|lora\.down|lora_A)", re.ASCII)
_CONTEXT = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2", 2048: "SDXL"}
_FLUX2 = {("linear1", 9), ("linear2", 1 / 4), ("img_mlp.0", 6), ("txt_mlp.0", 6)}  # output / input features; FLUX.1: 7, 1/5, 4, 4
_SD3_HIDDEN = (1536, 2432)


def family_of_shapes(tensors: Mapping[str, Tensor], told: str) -> str:
    """The family `told` by names, or what the shapes of LoRA pairs say more exactly."""
    if told.startswith("Stable Diffusion 1.5"):
        widths = [t.shape[1] for k, t in tensors.items() if _CROSS.match(k) and t.ndim > 1]
        return next((_CONTEXT[w] for w in widths if w in _CONTEXT), told)
    if told != "FLUX.1":
        return told
    parts: dict[tuple[str, str], int] = {}
    for key, t in tensors.items():
        name = parse(key)
        if name and name.part in ("up", "down") and t.ndim > 1 and not name.target.is_slice:
            parts[name.target.native.split(".", 2)[-1], name.part] = t.shape[0 if name.part == "up" else 1]
    sizes = {layer: (n, parts[layer, "down"]) for (layer, part), n in parts.items() if part == "up" and (layer, "down") in parts}
    if any(k and (layer, n / k) in _FLUX2 for layer, (n, k) in sizes.items()):
        return "FLUX.2"
    if any(n in _SD3_HIDDEN for layer, (n, _) in sizes.items() if layer.endswith("attn.proj")):
        return "Stable Diffusion 3"
    return told
