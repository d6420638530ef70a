"""Key names of LoRA files for FLUX.1: which part of a LoRA of which linear a key is.

A key is `prefix + module + suffix`. Modules come in two vocabularies, diffusers' (`transformer_blocks.0.attn.to_q`) and the native one of
BFL and ComfyUI (`double_blocks.0.img_attn.qkv`), with dots or, after kohya's prefixes, underscores. Every spelling ends in one Target and
one part name, so that the rest of the reader knows a single vocabulary. What ComfyUI itself takes was read and run in 0.3.64 and 0.29.0
(comfy/lora.py, comfy/utils.py flux_to_diffusers, comfy/weight_adapter).
"""

import re
from dataclasses import dataclass
from functools import lru_cache


class LoraError(ValueError):
    """A file cannot be used as a LoRA for FLUX.1. The sentence names the file, its family where that can be told, and keys."""


@dataclass(frozen=True)
class Target:
    """What a patch changes: a linear of the host's Flux, a slice of its rows, or the vector of an RMSNorm.

    native   "double_blocks.0.img_attn.qkv"
    host     name of the patch that both ComfyUI versions take, e.g. "transformer.transformer_blocks.0.attn.to_q"
    rows     output features in multiples of the hidden size; 0: any (final_layer.linear). A norm has rows = -1
    cols     input features likewise; 0: any
    first    first row of the slice, in multiples of the hidden size
    whole    rows of the whole linear, in multiples of the hidden size
    swapped  rows come as (scale, shift), the host's weight has (shift, scale)
    """

    native: str
    host: str
    rows: int
    cols: int
    first: int = 0
    whole: int = 0
    swapped: bool = False

    @property
    def is_norm(self) -> bool:
        return self.rows < 0

    @property
    def is_slice(self) -> bool:
        return self.rows != self.whole


@dataclass(frozen=True)
class Name:
    """A key that was understood. plain: ComfyUI takes this very key, in every version from 0.3.64 to 0.29.0, and rightly."""

    target: Target
    part: str
    form: str
    style: str
    plain: bool


# -- modules -----------------------------------------------------------------------------------------------------------------------------

# native module -> (rows, columns) in multiples of the hidden size, 0 where any number may be
_SIZES = {
    "double_blocks": {
        f"{side}_{layer}": size
        for side in ("img", "txt")
        for layer, size in {"mod.lin": (6, 1), "attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.0": (4, 1), "mlp.2": (1, 4)}.items()
    },
    "single_blocks": {"modulation.lin": (3, 1), "linear1": (7, 1), "linear2": (1, 5)},
}
_SIZES_OUTSIDE = {
    "img_in": (1, 0), "txt_in": (1, 0), "final_layer.linear": (0, 1), "final_layer.adaLN_modulation.1": (2, 1),
    **{f"{m}.{layer}": (1, cols) for m in ("time_in", "vector_in", "guidance_in") for layer, cols in (("in_layer", 0), ("out_layer", 1))},
}  # fmt: skip
_STACK = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_NATIVE_STACK = {v: k for k, v in _STACK.items()}
# diffusers module -> native module, or (native module, first row, rows) of a slice
_DIFFUSERS: dict[str, dict[str, str | tuple[str, int, int]]] = {
    "double_blocks": {
        "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin", "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
        **{f"attn.to_{p}": ("img_attn.qkv", i, 1) for i, p in enumerate("qkv")},
        **{f"attn.add_{p}_proj": ("txt_attn.qkv", i, 1) for i, p in enumerate("qkv")},
    },
    "single_blocks": {
        "norm.linear": "modulation.lin", "proj_out": "linear2", "proj_mlp": ("linear1", 3, 4),
        **{f"attn.to_{p}": ("linear1", i, 1) for i, p in enumerate("qkv")},
    },
}  # fmt: skip
_DIFFUSERS_OUTSIDE = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    **{
        f"time_text_embed.{theirs}.linear_{i + 1}": f"{ours}.{layer}"
        for theirs, ours in {"timestep_embedder": "time_in", "text_embedder": "vector_in", "guidance_embedder": "guidance_in"}.items()
        for i, layer in enumerate(("in_layer", "out_layer"))
    },
}  # fmt: skip
# names that other tools give the same modules and that not every ComfyUI takes
_ALIASES: dict[str, dict[str, str | tuple[str, int, int]]] = {
    "double_blocks": {
        "attn.to_qkv": "img_attn.qkv", "attn.add_qkv_proj": "txt_attn.qkv", "attn.to_out": "img_attn.proj",
        "processor.qkv_lora1": "img_attn.qkv", "processor.qkv_lora2": "txt_attn.qkv",
        "processor.proj_lora1": "img_attn.proj", "processor.proj_lora2": "txt_attn.proj",
    },
    "single_blocks": {
        "attn.to_qkv": ("linear1", 0, 3), "processor.qkv": ("linear1", 0, 3), "processor.qkv_lora": ("linear1", 0, 3),
        "processor.proj": "linear2", "processor.proj_lora": "linear2",
    },
}  # fmt: skip
_NORMS = {  # diffusers -> native
    "double_blocks": {
        f"attn.norm_{added}{q[0]}": f"{side}_attn.norm.{q}_norm"
        for side, added in (("img", ""), ("txt", "added_"))
        for q in ("query", "key")
    },
    "single_blocks": {f"attn.norm_{q[0]}": f"norm.{q}_norm" for q in ("query", "key")},
}


def flat(name: str) -> str:
    return name.replace(".", "_")


# (stack, module with underscores) -> (native module or slice, module with dots, vocabulary)
_BLOCK_MODULES: dict[tuple[str, str], tuple[str | tuple[str, int, int], str, str]] = {}
_OUTSIDE_MODULES: dict[str, tuple[str, str, str]] = {}
for _stack, _layers in _SIZES.items():
    _diffusers = _STACK[_stack]
    for _table, _own, _vocabulary in ((_ALIASES, _diffusers, "alias"), (_DIFFUSERS, _diffusers, "diffusers")):
        for _theirs, _ours in _table[_stack].items():
            _where = _stack if _theirs.startswith("processor.") else _own
            _BLOCK_MODULES[_where, flat(_theirs)] = (_ours, _theirs, "xlabs" if _where == _stack else _vocabulary)
    for _theirs, _ours in _NORMS[_stack].items():
        _BLOCK_MODULES[_diffusers, flat(_theirs)] = (_ours, _theirs, "diffusers")
        _BLOCK_MODULES[_stack, flat(_ours)] = (_ours, _ours, "native norm")
    for _ours in _layers:
        _BLOCK_MODULES[_stack, flat(_ours)] = (_ours, _ours, "native")
_BLOCK_MODULES["single_blocks", "linear1_qkv"] = (("linear1", 0, 3), "linear1_qkv", "native")
for _theirs, _ours in _DIFFUSERS_OUTSIDE.items():
    _OUTSIDE_MODULES[flat(_theirs)] = (_ours, _theirs, "diffusers")
for _ours in _SIZES_OUTSIDE:
    _OUTSIDE_MODULES[flat(_ours)] = (_ours, _ours, "native")
_SLICE_NAME = {(s, to): name for s, names in _DIFFUSERS.items() for name, to in names.items() if isinstance(to, tuple)}
_NORM_NAME = {(s, ours): theirs for s, names in _NORMS.items() for theirs, ours in names.items()}
IN_BLOCK = re.compile(r"(double_blocks|single_blocks|transformer_blocks|single_transformer_blocks)[._](0|[1-9]\d{0,3})[._](.+)", re.ASCII)


def _block_target(stack: str, index: str, to: str | tuple[str, int, int]) -> Target:
    """The Target of a native module (or slice) of block `index` of the native `stack`."""
    layer, first, rows = to if isinstance(to, tuple) else (to, 0, 0)
    native = f"{stack}.{index}.{layer}"
    diffusers = f"transformer.{_STACK[stack]}.{index}."
    if (stack, layer) in _NORM_NAME:
        return Target(native, diffusers + _NORM_NAME[stack, layer], -1, 0, whole=-1)
    whole, cols = _SIZES[stack][layer]
    if not rows:
        return Target(native, f"diffusion_model.{native}", whole, cols, whole=whole)
    host = f"diffusion_model.{native}_qkv" if rows == 3 else diffusers + _SLICE_NAME[stack, to]
    return Target(native, host, rows, cols, first, whole)


def find_module(module: str) -> tuple[Target, str, str] | None:
    """(Target, module with dots in its own vocabulary, vocabulary) of a module name without prefix, dots or underscores; else None."""
    if m := IN_BLOCK.fullmatch(module):
        found = _BLOCK_MODULES.get((m[1], flat(m[3])))
        if found is None:
            return None
        to, dotted, vocabulary = found
        return _block_target(_NATIVE_STACK.get(m[1], m[1]), m[2], to), f"{m[1]}.{m[2]}.{dotted}", vocabulary
    found = _OUTSIDE_MODULES.get(flat(module))
    if found is None:
        return None
    native, dotted, vocabulary = found
    rows, cols = _SIZES_OUTSIDE[native]
    swapped = dotted == "norm_out.linear"
    host = f"transformer.{dotted}" if swapped else f"diffusion_model.{native}"
    return Target(native, host, rows, cols, whole=rows, swapped=swapped), dotted, vocabulary


# -- prefixes and suffixes ---------------------------------------------------------------------------------------------------------------

_UNDERSCORED = re.compile(r"(lora_unet_|lora_transformer_|lycoris_)")
_DOTTED = re.compile(r"((?:(?:base_model|model|module|diffusion_model|transformer|unet)\.)+)")
_TEXT = re.compile(r"(lora_te\d?_|lora_prior_te_|text_encoders?(_\d)?\.|t5xxl\.|clip_[lgh]\.|lycoris_te\d?_|lora_text_encoder)")
# prefixes and vocabularies that every supported ComfyUI takes
_TAKEN = {
    ("transformer.", "diffusers"), ("lora_transformer_", "diffusers"), ("lycoris_", "diffusers"),
    ("diffusion_model.", "native"), ("lora_unet_", "native"),
}  # fmt: skip
_PAIRS = (  # (suffix of down, suffix of up); the first word of a form names it
    (".lora_down.weight", ".lora_up.weight"), ("_lora.down.weight", "_lora.up.weight"), (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"), (".lora_A", ".lora_B"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"), (".lora_A.default.weight", ".lora_B.default.weight"),
)  # fmt: skip
# suffix -> part name, where ComfyUI knows the suffix
_SUFFIXES = {
    **{s: part for pair in _PAIRS for s, part in zip(pair, ("down", "up"), strict=True)},
    **{f".{p}": p for p in ("alpha", "dora_scale", "reshape_weight", "diff", "diff_b", "set_weight", "oft_blocks", "rescale",
                            "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a",
                            "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "w_norm", "b_norm")},
    **{f".{p}.weight": p for p in ("a1", "a2", "b1", "b2")},
    ".lora_mid.weight": "mid",
    ".bias.diff": "diff_b",
    ".bias.set_weight": "set_b",
}  # fmt: skip
_FORM = {s: pair[0] for pair in _PAIRS for s in pair}
_SUFFIX = re.compile(
    r"(.+?)("
    + "|".join(re.escape(s) for s in sorted(_SUFFIXES, key=len, reverse=True))
    + r"|\.down\.weight|\.up\.weight"  # xlabs
    + r"|\.lora_[AB]\.\w+\.weight"  # PEFT with the adapter's name
    + r"|\.lora_B(?:\.\w+)?\.bias|\.lora_magnitude_vector(?:\.\w+)*"
    + r"|\.(?:scale|weight)\.(?:diff|set_weight)|\.scale|\.weight"  # RMSNorms
    + r")",
    re.ASCII,
)
_OTHER_LORA = re.compile(r"[._]lora(_down|_up|[12]?\.(down|up))(\.weight)?$|proj_(down|up)$")  # xlabs, and files that nunchaku converted
# the one spelling of a part in what the reader hands on
HOST_SUFFIX = {part: suffix for suffix, part in _SUFFIXES.items()} | {
    "down": ".lora_A.weight", "up": ".lora_B.weight", "diff_b": ".diff_b",
}  # fmt: skip


def is_text_encoder(key: str) -> bool:
    """A key for CLIP or T5, which the host applies where a CLIP is connected."""
    return _TEXT.match(key) is not None


def is_lora_key(key: str) -> bool:
    """A key that only a LoRA has, of whatever model."""
    m = _SUFFIX.fullmatch(key)
    part, form = _part(m[2]) if m else ("raw", "")
    return (part not in ("raw", "alpha", "rescale") and form != "xlabs") or _OTHER_LORA.search(key) is not None


def split_prefix(key: str) -> tuple[str, str]:
    """(prefix, rest): "lora_unet_", or any chain of "base_model.model.", "transformer." and their like, or nothing."""
    m = _UNDERSCORED.match(key) or _DOTTED.match(key)
    return (m[1], key[m.end() :]) if m else ("", key)


def _part(suffix: str) -> tuple[str, str]:
    """(part, form) of a suffix. The form says what `down` and `up` must share for ComfyUI to find both."""
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix], _FORM.get(suffix, "")
    if suffix.endswith((".diff", ".set_weight")):
        return suffix.rsplit(".", 1)[1], suffix
    if suffix in (".down.weight", ".up.weight"):
        return suffix.split(".")[1], "xlabs"
    if suffix.startswith(".lora_magnitude_vector"):
        return "magnitude", "PEFT"
    if suffix.endswith(".bias"):
        return "up_bias", "PEFT"
    if suffix.startswith(".lora_"):
        return ("down" if suffix[6] == "A" else "up"), suffix.split(".")[2]
    return "raw", suffix  # .scale or .weight: the value itself


def _style(prefix: str, vocabulary: str) -> str:
    if vocabulary == "xlabs":
        return "xlabs"
    if "base_model." in prefix:
        return "PEFT"
    if prefix == "lora_unet_":
        return "kohya" if vocabulary.startswith("native") else "kohya split"
    if prefix in ("lora_transformer_", "lycoris_"):
        return {"lora_transformer_": "OneTrainer", "lycoris_": "LyCORIS"}[prefix]
    if vocabulary.startswith("native"):
        return "ComfyUI" if prefix else "BFL"
    return "diffusers"


@lru_cache(maxsize=8192)  # files are asked twice, and nearly all have the same names
def parse(key: str) -> Name | None:
    """The Name of a key, None when it is none of a FLUX.1 LoRA's."""
    prefix, rest = split_prefix(key)
    m = _SUFFIX.fullmatch(rest)
    underscored = prefix != "" and not prefix.endswith(".")
    module = m[1].rstrip("_") if m and underscored else m[1] if m else ""  # some early trainer left a "_" at the end
    found = find_module(module)
    if m is None or found is None:
        return None
    target, dotted, vocabulary = found
    part, form = _part(m[2])
    if not _fits(target, part) or module != (flat(dotted) if underscored else dotted):  # double_blocks.0.img_attn_qkv is HunyuanVideo's
        return None
    plain = (prefix, vocabulary) in _TAKEN and m[2] in _SUFFIXES and module == m[1]
    if module.endswith("linear1_qkv") or ".bias." in m[2]:
        plain = plain and prefix == "diffusion_model."
    if part in ("diff_b", "b_norm", "set_b"):  # elsewhere than on a whole linear, ComfyUI 0.3.64 and 0.29.0 aim at a tensor "().bias"
        plain = plain and not target.is_slice and not target.swapped
    return Name(target, part, form, _style(prefix, vocabulary), plain)


def _fits(target: Target, part: str) -> bool:
    """Whether a part of this name can be on this target at all: norms take vectors, and a bias can be set only as a whole."""
    if target.is_norm:
        return part in ("diff", "set_weight", "w_norm", "raw")
    return part != "raw" and not (part == "set_b" and (target.is_slice or target.swapped))
