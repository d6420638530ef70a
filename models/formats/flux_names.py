"""FLUX.1 in the published SVDQuant files: layer names of both generations, the host's (BFL, ComfyUI) names, and every tensor's shape.

Three vocabularies: v1 names (FLUX files on disk: `transformer_blocks.0.qkv_proj.lora_down`), v2 names (`transformer_blocks.0.attn.to_qkv
.proj_down`), and native names (`double_blocks.0.img_attn.qkv`). All other modules work in v1 names; `to_v1` brings v2 names there.
"""

import re
from dataclasses import dataclass

from .nunchaku import GROUP, w4a16_scale_rows

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
FLOATS = ("BF16", "F16", "F32")
HALVES = ("BF16", "F16")


@dataclass(frozen=True)
class FluxDims:
    """Sizes of a FLUX.1 transformer. in_width and out_width are channels after 2x2 patching (64 for the plain models)."""

    hidden: int
    head_dim: int
    mlp: int
    depth: int
    depth_single: int
    in_width: int
    out_width: int
    context: int
    vec: int
    guidance: bool


@dataclass(frozen=True)
class LayerSpec:
    """One quantised layer of the file: n outputs, k inputs. chunks > 0: a W4A16 modulation layer of that many chunks.
    gelu_fed: in INT4 files its activations are shifted and unsigned."""

    n: int
    k: int
    chunks: int = 0
    gelu_fed: bool = False


@dataclass(frozen=True)
class HostLinear:
    """One linear of the host's Flux and the layers of the file that make it.

    name          native name without ".weight", e.g. "double_blocks.0.img_attn.qkv"
    kind          "w4a4" | "w4a16" | "plain" (left in 16 bit by whoever made the file: comes with plain_tensors(), not load_linear())
    parts         (v1 prefix, row offset, column offset) of each layer inside this linear
    """

    name: str
    out_features: int
    in_features: int
    kind: str
    parts: tuple[tuple[str, int, int], ...]


# v1 -> v2 layer names; everything not listed is the same in both
_V2_DOUBLE = {
    "qkv_proj": "attn.to_qkv",
    "qkv_proj_context": "attn.add_qkv_proj",
    "out_proj": "attn.to_out.0",
    "out_proj_context": "attn.to_add_out",
    "mlp_fc1": "ff.net.0.proj",
    "mlp_fc2": "ff.net.2",
    "mlp_context_fc1": "ff_context.net.0.proj",
    "mlp_context_fc2": "ff_context.net.2",
    "norm_q": "attn.norm_q",
    "norm_k": "attn.norm_k",
    "norm_added_q": "attn.norm_added_q",
    "norm_added_k": "attn.norm_added_k",
}
_V2_SINGLE = {"qkv_proj": "attn.to_qkv", "out_proj": "attn.to_out", "norm_q": "attn.norm_q", "norm_k": "attn.norm_k"}
V2_SUFFIXES = {"lora_down": "proj_down", "lora_up": "proj_up", "smooth": "smooth_factor", "smooth_orig": "smooth_factor_orig"}
_V1_OF = {
    DOUBLE: {v2: v1 for v1, v2 in _V2_DOUBLE.items()},
    SINGLE: {v2: v1 for v1, v2 in _V2_SINGLE.items()},
}
_V1_SUFFIX = {v2: v1 for v1, v2 in V2_SUFFIXES.items()}
_BLOCK_KEY = re.compile(r"(transformer_blocks|single_transformer_blocks)\.(0|[1-9]\d{0,5})\.(.+)\.(\w+)", re.ASCII)


def split_block_key(key: str) -> tuple[str, int, str, str] | None:
    """("transformer_blocks", 3, "qkv_proj", "qweight") of a key inside a block (layer and suffix as they stand), else None."""
    m = _BLOCK_KEY.fullmatch(key)
    return (m[1], int(m[2]), m[3], m[4]) if m else None


def to_v1(key: str) -> str:
    """The v1 name of a tensor of either generation (unknown names come back unchanged)."""
    parts = split_block_key(key)
    if parts is None:
        return key
    stack, index, layer, suffix = parts
    return f"{stack}.{index}.{_V1_OF[stack].get(layer, layer)}.{_V1_SUFFIX.get(suffix, suffix)}"


def to_v2(key: str) -> str:
    """The v2 name of a v1 tensor name."""
    parts = split_block_key(key)
    if parts is None:
        return key
    stack, index, layer, suffix = parts
    layers = _V2_DOUBLE if stack == DOUBLE else _V2_SINGLE
    return f"{stack}.{index}.{layers.get(layer, layer)}.{V2_SUFFIXES.get(suffix, suffix)}"


def layer_specs(d: FluxDims) -> dict[str, LayerSpec]:
    """v1 prefix -> LayerSpec of every layer that the format quantises, in file order."""
    h, m = d.hidden, d.mlp
    out = {}
    for i in range(d.depth):
        for context, dash in (("", "mlp_"), ("_context", "mlp_context_")):
            p = f"{DOUBLE}.{i}."
            out[f"{p}norm1{context}.linear"] = LayerSpec(6 * h, h, chunks=6)
            out[f"{p}qkv_proj{context}"] = LayerSpec(3 * h, h)
            out[f"{p}out_proj{context}"] = LayerSpec(h, h)
            out[f"{p}{dash}fc1"] = LayerSpec(m, h)
            out[f"{p}{dash}fc2"] = LayerSpec(h, m, gelu_fed=True)
    for i in range(d.depth_single):
        p = f"{SINGLE}.{i}."
        out[f"{p}norm.linear"] = LayerSpec(3 * h, h, chunks=3)
        out[f"{p}qkv_proj"] = LayerSpec(3 * h, h)
        out[f"{p}mlp_fc1"] = LayerSpec(m, h)
        out[f"{p}out_proj"] = LayerSpec(h, h)
        out[f"{p}mlp_fc2"] = LayerSpec(h, m, gelu_fed=True)
    return out


def host_linears(d: FluxDims) -> list[HostLinear]:
    """Every block linear of the host's Flux, as the format quantises it, block by block."""
    h, m, out = d.hidden, d.mlp, []
    for i in range(d.depth):
        src, dst = f"{DOUBLE}.{i}.", f"double_blocks.{i}."
        for side, context, dash in (("img", "", "mlp_"), ("txt", "_context", "mlp_context_")):
            out += [
                HostLinear(f"{dst}{side}_mod.lin", 6 * h, h, "w4a16", ((f"{src}norm1{context}.linear", 0, 0),)),
                HostLinear(f"{dst}{side}_attn.qkv", 3 * h, h, "w4a4", ((f"{src}qkv_proj{context}", 0, 0),)),
                HostLinear(f"{dst}{side}_attn.proj", h, h, "w4a4", ((f"{src}out_proj{context}", 0, 0),)),
                HostLinear(f"{dst}{side}_mlp.0", m, h, "w4a4", ((f"{src}{dash}fc1", 0, 0),)),
                HostLinear(f"{dst}{side}_mlp.2", h, m, "w4a4", ((f"{src}{dash}fc2", 0, 0),)),
            ]
    for i in range(d.depth_single):
        src, dst = f"{SINGLE}.{i}.", f"single_blocks.{i}."
        out += [
            HostLinear(f"{dst}modulation.lin", 3 * h, h, "w4a16", ((f"{src}norm.linear", 0, 0),)),
            HostLinear(f"{dst}linear1", 3 * h + m, h, "w4a4", ((f"{src}qkv_proj", 0, 0), (f"{src}mlp_fc1", 3 * h, 0))),
            HostLinear(f"{dst}linear2", h, h + m, "w4a4", ((f"{src}out_proj", 0, 0), (f"{src}mlp_fc2", 0, h))),
        ]
    return out


def plain_specs(d: FluxDims) -> list[tuple[str, str, tuple[int, ...]]]:
    """(native name, v1 name, shape) of every tensor that the format leaves alone."""
    h = d.hidden
    linears = [
        ("img_in", "x_embedder", h, d.in_width),
        ("txt_in", "context_embedder", h, d.context),
        ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1", h, 256),
        ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2", h, h),
        ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1", h, d.vec),
        ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2", h, h),
    ]
    if d.guidance:
        linears += [
            ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1", h, 256),
            ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2", h, h),
        ]
    linears += [("final_layer.adaLN_modulation.1", "norm_out.linear", 2 * h, h), ("final_layer.linear", "proj_out", d.out_width, h)]
    out = []
    for native, v1, n, k in linears:
        out += [(f"{native}.weight", f"{v1}.weight", (n, k)), (f"{native}.bias", f"{v1}.bias", (n,))]
    for i in range(d.depth):
        for side, added in (("img", ""), ("txt", "added_")):
            for q in ("query", "key"):
                native = f"double_blocks.{i}.{side}_attn.norm.{q}_norm.scale"
                out.append((native, f"{DOUBLE}.{i}.norm_{added}{q[0]}.weight", (d.head_dim,)))
    for i in range(d.depth_single):
        for q in ("query", "key"):
            out.append((f"single_blocks.{i}.norm.{q}_norm.scale", f"{SINGLE}.{i}.norm_{q[0]}.weight", (d.head_dim,)))
    return out


def layer_tensors(spec: LayerSpec, precision: str, rank: int) -> dict[str, tuple[tuple[str, ...], tuple[int, ...], bool]]:
    """v1 suffix -> (allowed dtypes, shape, required) of one quantised layer with n, k in multiples of 128."""
    n, k = spec.n, spec.k
    if spec.chunks:
        rows = w4a16_scale_rows(k)
        return {
            "qweight": (("I32",), (n // 4, k // 2), True),
            "wscales": (HALVES, (rows, n), True),
            "wzeros": (HALVES, (rows, n), True),
            "bias": (FLOATS, (n,), True),
        }
    out = {
        "qweight": (("I8",), (n, k // 2), True),
        "wscales": (HALVES if precision == "int4" else ("F8_E4M3",), (k // GROUP[precision], n), True),
        "bias": (FLOATS, (n,), True),
        "smooth": (HALVES, (k,), True),
        "smooth_orig": (HALVES, (k,), False),  # what calibration found; inference never uses it
        "lora_down": (HALVES, (k, rank), True),
        "lora_up": (HALVES, (n, rank), True),
    }
    if precision == "nvfp4":
        out["wtscale"] = (FLOATS, (1,), False)
        out["wcscales"] = (HALVES, (n,), False)
    return out
