"""Qwen-Image (text to image, Edit, Layered) in the published SVDQuant files: layers, tensors and their shapes, the host's names.

The files have the layer names of v2, which are the host's own except that q, k and v are one layer: `attn.to_qkv` holds the rows of to_q,
to_k and to_v, `attn.add_qkv_proj` those of add_q_proj, add_k_proj and add_v_proj. A linear stacked so keeps the file's name, since the
host has none for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .flux_config import default_axes
from .flux_names import HostLinear, LayerSpec
from .layout import Layout, Piece, v2_suffix
from .sizes import Sizes, axes_of, contradictions
from .tensorfile import CheckpointError, Entry

TITLE = "Qwen-Image"
STACK = "transformer_blocks"
INDEX_TIMESTEP_ZERO = "__index_timestep_zero__"  # an empty tensor by which the host knows Edit-2511
ADDED_TIMESTEP = "time_text_embed.addition_t_embedding.weight"  # Layered
MLP_RATIO = 4  # fixed in the host's class


@dataclass(frozen=True)
class QwenDims:
    """Sizes of a Qwen-Image transformer. in_width and out_width are channels after 2x2 patching. added_timestep: it has the embedding of
    Layered; marked: it has the empty tensor that marks Edit-2511."""

    hidden: int
    head_dim: int
    depth: int
    in_width: int
    out_width: int
    context: int
    added_timestep: bool = False
    marked: bool = False

    @property
    def mlp(self) -> int:
        return MLP_RATIO * self.hidden


def read_dims(tensors: Mapping[str, Entry], where: str, config: Mapping[str, object]) -> QwenDims:
    """Sizes from shapes, the number of blocks checked with the metadata's config. CheckpointError when they cannot be right."""
    sizes = Sizes(tensors, where, TITLE)
    depth = sizes.blocks(STACK, config.get("num_layers"))
    hidden, in_width = sizes.shape("img_in.weight", 2)
    (head_dim,) = sizes.shape(f"{STACK}.0.attn.norm_q.weight", 1)
    out_width = sizes.shape("proj_out.weight", 2)[0]
    sizes.multiples(("hidden size", hidden, 128), ("hidden size", hidden, head_dim), ("head size", head_dim, 2),
                    ("input width", in_width, 4), ("output width", out_width, 4))  # fmt: skip
    mlp = sizes.inputs(f"{STACK}.0.img_mlp.net.2")
    if mlp != MLP_RATIO * hidden:
        raise CheckpointError(f"{where}: {STACK}.0.img_mlp.net.2 has {mlp} inputs, expected {MLP_RATIO * hidden} ({MLP_RATIO} times the "
                              f"hidden size {hidden}) for {TITLE}.")  # fmt: skip
    return QwenDims(
        hidden=hidden, head_dim=head_dim, depth=depth, in_width=in_width, out_width=out_width,
        context=sizes.shape("txt_in.weight", 2)[1], added_timestep=ADDED_TIMESTEP in tensors, marked=INDEX_TIMESTEP_ZERO in tensors,
    )  # fmt: skip


def unet_config(d: QwenDims, config: Mapping[str, object], warnings: list[str]) -> dict:
    """The host's config of these sizes: arguments of its QwenImageTransformer2DModel. Warns of metadata that the tensors contradict."""
    heads = d.hidden // d.head_dim
    out = {
        "image_model": "qwen_image", "patch_size": 2, "in_channels": d.in_width, "out_channels": d.out_width // 4, "num_layers": d.depth,
        "attention_head_dim": d.head_dim, "num_attention_heads": heads, "joint_attention_dim": d.context,
        "axes_dims_rope": axes_of(config.get("axes_dims_rope"), default_axes(d.head_dim), d.head_dim, warnings),
    }  # fmt: skip
    if d.added_timestep:
        out |= {"use_additional_t_cond": True, "default_ref_method": "negative_index"}
    elif d.marked or config.get("zero_cond_t") is True:  # diffusers' word for the same thing
        out["default_ref_method"] = "index_timestep_zero"
    told = ("in_channels", "out_channels", "num_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim")
    contradictions(config, {key: out[key] for key in told}, warnings)
    return out


def layer_specs(d: QwenDims) -> dict[str, LayerSpec]:
    """prefix -> LayerSpec of every layer that the format quantises, in file order. Modulation layers are W4A16 in published files."""
    h, out = d.hidden, {}
    for i in range(d.depth):
        p = f"{STACK}.{i}."
        for side, qkv, proj in (("img", "to_qkv", "to_out.0"), ("txt", "add_qkv_proj", "to_add_out")):
            out[f"{p}{side}_mod.1"] = LayerSpec(6 * h, h, chunks=6)
            out[f"{p}attn.{qkv}"] = LayerSpec(3 * h, h)
            out[f"{p}attn.{proj}"] = LayerSpec(h, h)
            out[f"{p}{side}_mlp.net.0.proj"] = LayerSpec(d.mlp, h)
            out[f"{p}{side}_mlp.net.2"] = LayerSpec(h, d.mlp, gelu_fed=True)
    return out


def host_linears(d: QwenDims) -> list[HostLinear]:
    """Every block linear, as the format quantises it, block by block; each is one layer of the file, under its name."""
    return [
        HostLinear(prefix, spec.n, spec.k, "w4a16" if spec.chunks else "w4a4", ((prefix, 0, 0),)) for prefix, spec in layer_specs(d).items()
    ]


def qkv_pieces(d: QwenDims) -> dict[str, tuple[Piece, ...]]:
    """prefix of a stacked layer -> the host's (and diffusers') q, k and v linears that are its rows."""
    out = {}
    for i in range(d.depth):
        p = f"{STACK}.{i}.attn."
        for stacked, names in (("to_qkv", ("to_q", "to_k", "to_v")), ("add_qkv_proj", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            out[p + stacked] = tuple(Piece(p + name, j * d.hidden, d.hidden) for j, name in enumerate(names))
    return out


def plain_specs(d: QwenDims) -> list[tuple[str, str, tuple[int, ...]]]:
    """(native name, key, shape) of every tensor that the format leaves alone; both names are the same."""
    h = d.hidden
    linears = (
        ("img_in", h, d.in_width), ("txt_in", h, d.context), ("time_text_embed.timestep_embedder.linear_1", h, 256),
        ("time_text_embed.timestep_embedder.linear_2", h, h), ("norm_out.linear", 2 * h, h), ("proj_out", d.out_width, h),
    )  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"txt_norm.weight": (d.context,)}
    for name, n, k in linears:
        shapes |= {f"{name}.weight": (n, k), f"{name}.bias": (n,)}
    if d.added_timestep:
        shapes[ADDED_TIMESTEP] = (2, h)
    if d.marked:
        shapes[INDEX_TIMESTEP_ZERO] = (0,)
    for i in range(d.depth):
        shapes |= {f"{STACK}.{i}.attn.norm_{name}.weight": (d.head_dim,) for name in ("q", "k", "added_q", "added_k")}
    return [(name, name, shape) for name, shape in shapes.items()]


def layout(d: QwenDims) -> Layout:
    """What a Qwen-Image file of these sizes holds."""
    pieces = qkv_pieces(d)
    return Layout(TITLE, host_linears(d), layer_specs(d), plain_specs(d), v2_suffix, natives=pieces, splits=pieces, w4a4_modulation=True)
