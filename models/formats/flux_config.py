"""The configuration of a FLUX checkpoint: read from the shapes of its tensors, completed and cross-checked with its metadata.

Tensors are the truth for every size. Metadata decides what no tensor shows (axes_dim, theta, model class) and how many blocks there must
be. Where the two disagree the tensors win and a warning says so, except for missing blocks and for the precision, which are errors.
"""

import json
import math
from collections.abc import Mapping

from .flux_names import DOUBLE, SINGLE, FluxDims, split_block_key
from .tensorfile import CheckpointError, Entry

FLUX_AXES = (16, 56, 56)
THETA = 10000


def read_json(metadata: Mapping[str, str], key: str, warnings: list[str]) -> dict:
    """The JSON object stored under `key`; {} (with a warning when it is there but broken)."""
    if key not in metadata:
        return {}
    try:
        value = json.loads(metadata[key])
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value
    except (ValueError, RecursionError) as e:
        warnings.append(f"metadata {key!r} is unreadable ({e}) and is not used; tensor shapes decide")
        return {}


def read_dims(index: Mapping[str, Entry], where: str, comfy: dict, config: dict, warnings: list[str]) -> FluxDims:
    """Sizes from shapes. CheckpointError when a tensor that shows a size is missing or cannot be right."""

    def shape(key: str, ndim: int) -> tuple[int, ...]:
        if key not in index:
            raise CheckpointError(f"{where}: tensor {key} is missing, so this is no complete FLUX.1 checkpoint. Download it again.")
        e = index[key]
        if len(e.shape) != ndim or 0 in e.shape:
            raise CheckpointError(f"{e.file.path}: {e.key} has shape {list(e.shape)}, expected {ndim} dimensions, none of them empty.")
        return e.shape

    depth = {stack: _depth(index, where, stack, _told(comfy, config, *names)) for stack, names in (
        (DOUBLE, ("depth", "num_layers")), (SINGLE, ("depth_single_blocks", "num_single_layers")),
    )}  # fmt: skip
    for stack, name, key in ((DOUBLE, "depth", "double"), (SINGLE, "depth_single_blocks", "single")):
        if comfy.get(name, depth[stack]) != depth[stack]:
            warnings.append(f"metadata says {comfy[name]!r} {key} blocks, the file holds {depth[stack]}; the file is believed")
    hidden, in_width = shape("x_embedder.weight", 2)
    first = f"{DOUBLE if depth[DOUBLE] else SINGLE}.0."
    (head_dim,) = shape(first + "norm_q.weight", 1)
    fc1 = first + "mlp_fc1."
    mlp = shape(fc1 + ("qweight" if fc1 + "qweight" in index else "weight"), 2)[0]
    for what, value, multiple in (("hidden size", hidden, 128), ("MLP size", mlp, 128), ("hidden size", hidden, head_dim),
                                  ("head size", head_dim, 2), ("input width", in_width, 4)):  # fmt: skip
        if value % multiple:
            raise CheckpointError(f"{where}: the {what} is {value} by the tensor shapes, expected a multiple of {multiple} for FLUX.1.")
    out_width = shape("proj_out.weight", 2)[0]
    if out_width % 4:
        raise CheckpointError(f"{where}: the output width is {out_width} by proj_out.weight, expected a multiple of 4 for FLUX.1.")
    return FluxDims(
        hidden=hidden, head_dim=head_dim, mlp=mlp, depth=depth[DOUBLE], depth_single=depth[SINGLE], in_width=in_width,
        out_width=out_width, context=shape("context_embedder.weight", 2)[1],
        vec=shape("time_text_embed.text_embedder.linear_1.weight", 2)[1], guidance=_guidance(index, comfy, config, warnings),
    )  # fmt: skip


def _told(comfy: dict, config: dict, comfy_key: str, config_key: str) -> int:
    """The largest count that the metadata names, 0 when it names none."""
    values = (comfy.get(comfy_key), config.get(config_key))
    return max((v for v in values if type(v) is int), default=0)


def _depth(index: Mapping[str, Entry], where: str, stack: str, told: int) -> int:
    """Number of blocks of one stack. CheckpointError when one is missing, in the middle or (by the metadata) at the end."""
    split = (split_block_key(key) for key in index)
    found = {s[1] for s in split if s and s[0] == stack}
    count = max(found, default=-1) + 1
    missing = next((i for i in range(count) if i not in found), None)
    if missing is not None:
        raise CheckpointError(f"{where}: block {stack}.{missing} is missing ({len(found)} of {count} are there). Download the file again.")
    if told > count:
        raise CheckpointError(f"{where}: holds {count} blocks {stack}.*, its metadata says {told}: block {stack}.{count} is missing. "
                              "Download the file again.")  # fmt: skip
    if count == 0 and stack == DOUBLE and not any(key.startswith(SINGLE) for key in index):
        raise CheckpointError(f"{where}: holds no FLUX.1 block.")
    return count


def _guidance(index: Mapping[str, Entry], comfy: dict, config: dict, warnings: list[str]) -> bool:
    """Whether there is a guidance embedder: its tensors decide; when all metadata says yes and none is there, they are missing."""
    there = any(key.startswith("time_text_embed.guidance_embedder.") for key in index)
    told = [v for v in (comfy.get("guidance_embed"), config.get("guidance_embeds")) if isinstance(v, bool)]
    if any(v != there for v in told):
        if not there and all(told):
            return True
        warnings.append(f"metadata and tensors disagree on the guidance embedder; the file {'has' if there else 'has not'} its tensors")
    return there


def default_axes(head_dim: int) -> list[int]:
    """Rotary split of a head into (time, row, column): FLUX's 16:56:56 in proportion, every part even."""
    side = 2 * (head_dim * 7 // 32)
    return [head_dim - 2 * side, side, side]


def _good_axes(axes: object, head_dim: int) -> bool:
    return (
        isinstance(axes, list) and len(axes) == 3 and all(type(a) is int and a > 0 and a % 2 == 0 for a in axes) and sum(axes) == head_dim
    )


def _axes(d: FluxDims, comfy: dict, config: dict, warnings: list[str]) -> list[int]:
    told = [(name, source[name]) for source, name in ((comfy, "axes_dim"), (config, "axes_dims_rope")) if name in source]
    good = [axes for _, axes in told if _good_axes(axes, d.head_dim)]
    for name, axes in told:
        if not _good_axes(axes, d.head_dim):
            warnings.append(f"metadata {name} {axes!r:.80} is not a split of the head size {d.head_dim} into three even parts; not used")
    if len(good) == 2 and good[0] != good[1]:
        warnings.append(f"metadata gives two rotary splits, {good[0]} and {good[1]}; the first is used")
    if not good and d.head_dim != sum(FLUX_AXES):
        warnings.append(f"no metadata gives the rotary split; {default_axes(d.head_dim)} is assumed")
    if good and d.head_dim == sum(FLUX_AXES) and good[0] != list(FLUX_AXES):
        warnings.append(f"metadata gives the rotary split {good[0]}, FLUX.1 has {list(FLUX_AXES)}; the metadata is believed")
    return good[0] if good else default_axes(d.head_dim)


def _theta(comfy: dict, warnings: list[str]) -> int | float:
    theta = comfy.get("theta", THETA)
    if type(theta) not in (int, float) or not math.isfinite(theta) or theta <= 1:
        warnings.append(f"metadata theta {theta!r:.80} is not a usable number; {THETA} is used")
        return THETA
    if theta != THETA:
        warnings.append(f"metadata theta is {theta}, FLUX.1 has {THETA}; the metadata is believed")
    return theta


def unet_config(d: FluxDims, comfy: dict, config: dict, warnings: list[str]) -> dict:
    """The host's FLUX config of these sizes. Adds a warning for every metadata entry that the tensors contradict."""
    heads = d.hidden // d.head_dim
    mlp_ratio = d.mlp / d.hidden
    out = {
        "image_model": "flux", "in_channels": d.in_width // 4, "out_channels": d.out_width // 4, "patch_size": 2, "vec_in_dim": d.vec,
        "context_in_dim": d.context, "hidden_size": d.hidden, "mlp_ratio": mlp_ratio, "num_heads": heads, "depth": d.depth,
        "depth_single_blocks": d.depth_single, "qkv_bias": True, "guidance_embed": d.guidance,
        "axes_dim": _axes(d, comfy, config, warnings), "theta": _theta(comfy, warnings),
    }  # fmt: skip
    checked_elsewhere = ("axes_dim", "theta", "depth", "depth_single_blocks", "guidance_embed")
    for key, value in out.items():
        if key not in checked_elsewhere and key in comfy and comfy[key] != value:
            warnings.append(f"metadata {key} is {comfy[key]!r:.80}, the tensors say {value!r}; the tensors are believed")
    facts = {"attention_head_dim": d.head_dim, "num_attention_heads": heads, "in_channels": d.in_width, "num_layers": d.depth,
             "num_single_layers": d.depth_single, "joint_attention_dim": d.context, "pooled_projection_dim": d.vec}  # fmt: skip
    for key, value in facts.items():
        if key in config and config[key] != value:
            warnings.append(f"metadata config.{key} is {config[key]!r:.80}, the tensors say {value}; the tensors are believed")
    return out


def model_class(told: object, guidance: bool, warnings: list[str]) -> str:
    """ "Flux" or "FluxSchnell" (they differ in sampling settings): the metadata's word, else by the guidance embedder."""
    guess = "Flux" if guidance else "FluxSchnell"
    if told in ("Flux", "FluxSchnell"):
        if told != guess:
            warnings.append(f"metadata calls the model {told}, {'with' if guidance else 'without'} a guidance embedder that is unusual")
        return told
    if told is not None:
        warnings.append(f"metadata model_class {told!r:.80} is unknown; taken for {guess}")
    return guess


def told_precision(quantization: dict, where: str, warnings: list[str]) -> str | None:
    """Precision by the metadata's quantization_config, None when it does not say."""
    weight = quantization.get("weight")
    dtype = weight.get("dtype") if isinstance(weight, dict) else None
    if dtype == "int4":
        return "int4"
    if dtype == "fp4_e2m1_all":
        return "nvfp4"
    if dtype is not None:
        warnings.append(f"metadata quantization_config names an unknown weight type {dtype!r:.80}; the tensors decide")
    return None
